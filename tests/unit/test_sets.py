import dataclasses

import numpy as np
import pytest
import torch

from metasepia.errors import InvalidRequest
from metasepia.reasoning import sets
from metasepia.reasoning.context import Context, answer, compile_context, compile_subsets
from metasepia.reasoning.set_module import SetModule, SetShape
from metasepia.reasoning.sets import Directions
from metasepia.reasoning.shipped import LoadedModule

SHAPE = SetShape(width=16, layers=3, value_dim=4, soft_heads=4, mlp=32)


@pytest.fixture(scope="module")
def loaded() -> LoadedModule:
    return LoadedModule("random", "0" * 64, SetModule(SHAPE, seed=1).eval().requires_grad_(False), {})


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def labels_of(num: int, classes: str = "ab") -> list[str]:
    return [classes[i % len(classes)] for i in range(num)]


def ask(loaded: LoadedModule, context: Context, queries: np.ndarray) -> np.ndarray:
    return answer(loaded.module, [(compile_context(context, loaded), queries)])[0]


@pytest.mark.parametrize(
    ("num", "width", "classes", "num_unlabelled"),
    [(12, 40, "ab", 0), (60, 20, "abc", 0), (30, 50, "abcd", 25), (20, 10, "ab", 90)],
    ids=["wide", "narrow", "unlabelled", "unlabelled, narrow"],
)
def test_compiled_answers_equal_the_forward_that_training_takes(
    loaded: LoadedModule, num: int, width: int, classes: str, num_unlabelled: int
):
    x, queries, unlabelled = draw(num, width), draw(7, width, seed=1), draw(num_unlabelled, width, seed=2)
    context = Context.of(x, labels_of(num, classes), unlabelled=unlabelled if num_unlabelled else None)
    y = torch.tensor([[i % len(classes) for i in range(num)]])
    beside = torch.from_numpy(unlabelled)[None] if num_unlabelled else None
    assert isinstance(loaded.module, SetModule)
    whole = loaded.module(torch.from_numpy(x)[None], y, torch.from_numpy(queries)[None], len(classes), beside)
    expected = torch.softmax(whole[0, num_unlabelled:], -1).numpy()
    np.testing.assert_allclose(ask(loaded, context, queries), expected, atol=2e-6)


def test_order_rotation_scale_and_place_change_no_answer(loaded: LoadedModule):
    x, y, queries = draw(20, 8), labels_of(20, "abc"), draw(5, 8, seed=1)
    expected = ask(loaded, Context.of(x, y), queries)
    order = np.random.default_rng(3).permutation(20)
    np.testing.assert_allclose(ask(loaded, Context.of(x[order], [y[i] for i in order]), queries), expected, atol=1e-6)
    turn = np.linalg.qr(draw(8, 8, seed=4))[0]
    moved = [(3.0 * one @ turn + 5.0).astype(np.float32) for one in (x, queries)]
    np.testing.assert_allclose(ask(loaded, Context.of(moved[0], y), moved[1]), expected, atol=1e-4)


def test_renamed_classes_have_their_probabilities_renamed(loaded: LoadedModule):
    x, y, queries = draw(20, 8), labels_of(20, "abc"), draw(5, 8, seed=1)
    renamed = [{"a": "z", "b": "m", "c": "k"}[label] for label in y]  # their order is turned round
    np.testing.assert_allclose(
        ask(loaded, Context.of(x, renamed), queries)[:, ::-1], ask(loaded, Context.of(x, y), queries), atol=1e-6
    )


def test_no_neighbour_changes_an_answer(loaded: LoadedModule):
    asked = []
    for i in range(6):
        num, width = 6 + 5 * i, 20 + i
        unlabelled = draw(4 * i + 1, width, seed=i) if i % 2 else None
        context = Context.of(draw(num, width, seed=i), labels_of(num, "abc" if i > 3 else "ab"), unlabelled=unlabelled)
        asked.append((compile_context(context, loaded), draw(300 if i == 2 else i, width, seed=9 + i)))
    together = answer(loaded.module, asked)
    for one, expected in zip(asked, together, strict=True):
        np.testing.assert_allclose(answer(loaded.module, [one])[0], expected, atol=1e-6)
    assert [len(one) for one in together] == [0, 1, 300, 3, 4, 5]


def test_small_forwards_give_the_same_answers(loaded: LoadedModule, monkeypatch: pytest.MonkeyPatch):
    context, queries = Context.of(draw(40, 8), labels_of(40), unlabelled=draw(9, 8, seed=5)), draw(5, 8, seed=1)
    expected = ask(loaded, context, queries)
    monkeypatch.setattr(sets, "WORK_BYTES", 1)  # then each row attends alone
    np.testing.assert_allclose(ask(loaded, context, queries), expected, atol=1e-6)


def test_subsets_answer_as_contexts_of_their_own_under_the_same_reduction(loaded: LoadedModule):
    context, queries = Context.of(draw(20, 30), labels_of(20, "abc")), draw(3, 30, seed=1)
    fitted = Directions.fit(context.pool)
    keeps = [np.delete(np.arange(20), i) for i in range(20)]
    subsets = compile_subsets(context, loaded, keeps, fitted)
    answers = answer(loaded.module, [(one, queries) for one in subsets])
    for keep, got in zip(keeps, answers, strict=True):
        alone = compile_context(context.subset(keep), loaded, reduction=fitted)
        np.testing.assert_allclose(got, answer(loaded.module, [(alone, queries)])[0], atol=2e-6)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((6, 5)),
        np.tile(draw(1, 5), (6, 1)),
        np.tile(draw(2, 5), (3, 1)),
        draw(6, 5) * 1e18,
        draw(6, 5) * 1e-18,
        draw(6, 5) * 1e-40,
        draw(6, 5) * 1e37,
        np.concatenate([draw(5, 5), 1e6 * np.ones((1, 5))]),
        draw(6, 700),
        draw(6, 1),
    ],
    ids=[
        "zero",
        "all alike",
        "three of each",
        "huge",
        "tiny",
        "subnormal",
        "near the end",
        "one far away",
        "wide",
        "one dimension",
    ],
)
def test_degenerate_vectors_get_probabilities(loaded: LoadedModule, x: np.ndarray):
    chances = ask(loaded, Context.of(x, labels_of(len(x))), np.concatenate([x, 1e12 * np.ones((1, x.shape[1]))]))
    assert np.isfinite(chances).all()
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-5)


def test_two_examples_and_a_class_of_one_get_probabilities(loaded: LoadedModule):
    assert np.isfinite(ask(loaded, Context.of(draw(2, 5), ["a", "b"]), draw(3, 5))).all()
    assert np.isfinite(ask(loaded, Context.of(draw(90, 5), ["a", *["b"] * 89]), draw(3, 5))).all()


def test_every_example_has_a_say(loaded: LoadedModule):
    x, y, queries = draw(400, 8), labels_of(400), draw(4, 8, seed=1)
    whole = ask(loaded, Context.of(x, y), queries)
    flipped = ask(loaded, Context.of(x, [*y[:-1], "a"]), queries)
    assert np.abs(whole - flipped).max() > 1e-7


def test_unlabelled_vectors_have_a_say_and_an_identity(loaded: LoadedModule):
    x, y, unlabelled, queries = draw(12, 8), labels_of(12), draw(30, 8, seed=2), draw(4, 8, seed=1)
    plain, informed = Context.of(x, y), Context.of(x, y, unlabelled=unlabelled)
    assert np.abs(ask(loaded, plain, queries) - ask(loaded, informed, queries)).max() > 1e-4
    assert plain.digest("m") != informed.digest("m")
    assert informed.digest("m") == Context.of(x, y, unlabelled=unlabelled[::-1]).digest("m")


def test_more_than_fits_is_refused_with_the_way_out(loaded: LoadedModule, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sets, "MAX_COMPILED_BYTES", 1000)
    with pytest.raises(InvalidRequest, match=r"20 examples of 2 classes would take .*send fewer examples or classes"):
        compile_context(Context.of(draw(20, 8), labels_of(20)), loaded)


def test_directions_keep_inner_products_and_whiten_with_a_floor():
    pool = draw(30, 12) * np.linspace(3, 0.1, 12)
    fitted = Directions.fit(pool)
    centred = pool - pool.mean(0)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / 30)
    floor = np.square(eigenvalues).sum() / eigenvalues.sum()
    z = fitted.apply(pool)
    np.testing.assert_allclose(z @ z.T, centred @ centred.T / eigenvalues.sum(), atol=1e-5)
    whitened = centred @ (vectors / (1 + eigenvalues / floor)) @ vectors.T @ centred.T / eigenvalues.sum()
    np.testing.assert_allclose((z * fitted.whitening) @ z.T, whitened, atol=1e-5)
    assert dataclasses.replace(fitted).num_bytes == fitted.num_bytes > 4 * 12 * 12
