import dataclasses

import numpy as np
import pytest
import torch

from metasepia.errors import InvalidRequest
from metasepia.reasoning import rows
from metasepia.reasoning.context import Context, ContextPool, answer, compile_context
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.reduction import ReductionRecipe
from metasepia.reasoning.rows import CompiledRows, plan_rows
from metasepia.reasoning.shipped import LoadedModule

SHAPE = ModuleShape(dims=4, pairs=17, layers=2, width=32, heads=4)
RECIPE = ReductionRecipe(views=3)


@pytest.fixture(scope="module")
def loaded() -> LoadedModule:
    module = ReasoningModule(SHAPE, seed=1).requires_grad_(False)
    for parameter in module.parameters():  # larger than at the start, so that answers differ clearly
        parameter.mul_(3.0)
    return LoadedModule("random", "0" * 64, module, {})


def examples(num: int, classes: str = "ab", seed: int = 0, width: int = 12) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, width)).astype(np.float32), [classes[i % len(classes)] for i in range(num)]


def given(num: int, classes: str = "ab", seed: int = 0) -> Context:
    return Context.of(*examples(num, classes, seed), seed=seed, recipe=RECIPE)


QUERIES = examples(7, seed=99)[0]


def test_probabilities_equal_those_of_whole_forwards_view_by_view(loaded: LoadedModule):
    context = given(12)
    compiled = compile_context(context, loaded)
    (fused,) = answer(loaded.module, [(compiled, QUERIES)])
    x, queries = (torch.from_numpy(compiled.reduction.apply(v)) for v in (context.vectors, QUERIES))
    logits = torch.zeros(7)
    for row in plan_rows(context, SHAPE).rows:
        shots = x[row.view][torch.from_numpy(row.order)]
        labels = torch.from_numpy(row.positive[row.order].astype(np.float32))
        for i in range(7):
            sequence = torch.cat([shots, queries[row.view, i : i + 1]])[None]
            logits[i] += loaded.module(sequence, torch.cat([labels, torch.zeros(1)])[None])[0, -1] / 3
    np.testing.assert_allclose(fused[:, 1], torch.sigmoid(logits), atol=1e-5)


def test_contexts_of_many_tenants_in_one_forward_equal_each_alone(loaded: LoadedModule, monkeypatch):
    asked = [
        (compile_context(given(num, classes, seed=num), loaded), examples(count, seed=count)[0])
        for num, classes, count in ((4, "ab", 1), (16, "abc", 70), (40, "ab", 9), (9, "abcd", 3))
    ]
    together = answer(loaded.module, asked)
    monkeypatch.setattr(rows, "FORWARD_BYTES", 1)  # then every row has a forward of its own
    for one, whole in zip(asked, together, strict=True):
        np.testing.assert_allclose(answer(loaded.module, [one])[0], whole, atol=1e-5)
        np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-5)


def test_contexts_without_queries_have_empty_answers_beside_those_with(loaded: LoadedModule):
    compiled = [compile_context(given(9, classes), loaded) for classes in ("ab", "abc")]
    asked = [(compiled[0], QUERIES[:0]), (compiled[1], QUERIES[:2]), (compiled[1], QUERIES[:0])]
    none, two, none_of_three = answer(loaded.module, asked)
    assert none.shape == (0, 2) and none_of_three.shape == (0, 3)
    np.testing.assert_allclose(two, answer(loaded.module, [asked[1]])[0], atol=1e-6)
    assert [one.shape for one in answer(loaded.module, asked[:1])] == [(0, 2)]


def test_the_order_in_which_examples_are_sent_changes_neither_digest_nor_answer(loaded: LoadedModule):
    vectors, labels = examples(14, "abc")
    order = np.random.default_rng(0).permutation(14)
    first = Context.of(vectors, labels, seed=5)
    other = Context.of(vectors[order], [labels[i] for i in order], seed=5)
    assert first.digest("m") == other.digest("m")
    (a,), (b,) = (answer(loaded.module, [(compile_context(c, loaded), QUERIES)]) for c in (first, other))
    assert np.array_equal(a, b)


def test_whatever_changes_the_answer_changes_the_digest():
    vectors, labels = examples(6)
    first = Context.of(vectors, labels)
    others = [
        Context.of(vectors * np.float32(1.001), labels),
        Context.of(vectors, labels[::-1]),
        Context.of(vectors, ["c" if one == "a" else one for one in labels]),
        Context.of(vectors, labels, seed=1),
        Context.of(vectors, labels, recipe=ReductionRecipe(views=1)),
    ]
    digests = [first.digest("m"), first.digest("another module"), *(one.digest("m") for one in others)]
    assert len(set(digests)) == len(digests)


def test_exchanging_the_names_of_two_classes_exchanges_their_roles(loaded: LoadedModule):
    vectors, labels = examples(12)
    renamed = [{"a": "yes", "b": "no"}[one] for one in labels]
    compiled = compile_context(Context.of(vectors, renamed), loaded)
    assert isinstance(compiled, CompiledRows) and compiled.num_problems == 1 and compiled.classes == ("no", "yes")
    plan = plan_rows(Context.of(vectors, renamed), SHAPE)
    assert all((row.positive == (np.array(sorted(renamed)) == "yes")).all() for row in plan.rows)


@pytest.mark.parametrize("sizes", [(8, 8), (5, 40), (40, 5), (30, 33), (100, 156), (1, 255), (500, 524)])
def test_every_example_of_a_large_context_is_compiled_and_no_row_exceeds_the_module(sizes: tuple[int, int]):
    labels = ["a"] * sizes[0] + ["b"] * sizes[1]
    plan = plan_rows(Context.of(examples(sum(sizes))[0], labels, recipe=RECIPE), SHAPE)
    assert all(len(row.order) <= SHAPE.max_examples for row in plan.rows)
    assert set(np.concatenate([row.order for row in plan.rows]).tolist()) == set(range(sum(sizes)))
    for row in plan.rows:
        assert len(set(row.order.tolist())) == len(row.order)
        assert 0 < row.positive[row.order].sum() < len(row.order)  # a row of one class would teach nothing


def test_examples_of_a_row_are_interleaved_and_their_order_follows_the_seed():
    plans = [plan_rows(Context.of(*examples(16), seed=s, recipe=RECIPE), SHAPE) for s in (0, 0, 1)]
    for row in plans[0].rows:
        classes = row.positive[row.order].astype(int)
        assert set(classes.reshape(8, 2).sum(1).tolist()) == {1}  # one of each in every two
    orders = [[row.order.tolist() for row in plan.rows] for plan in plans]
    assert orders[0] == orders[1] != orders[2] and orders[0][0] != orders[0][1]


@pytest.mark.parametrize(
    ("vectors", "labels", "message"),
    [
        (np.zeros((0, 4), np.float32), [], "0 labels for vectors of shape"),
        (np.ones((3, 4), np.float32), ["a", "b"], "2 labels for vectors of shape"),
        (np.ones((2, 4), np.float32), ["a", "a"], "one class only, 'a'"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]], np.float32), ["a", "b"], r"examples\[1\]: its vector holds NaN"),
    ],
)
def test_a_context_that_teaches_nothing_is_refused_in_words(vectors, labels, message):
    with pytest.raises(InvalidRequest, match=message):
        Context.of(vectors, labels)


def test_more_classes_or_examples_than_fit_are_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch):
    many = Context.of(examples(2100)[0], [str(i) for i in range(2100)])
    with pytest.raises(InvalidRequest, match="2100 classes; at most 2048 can be told apart"):
        plan_rows(many, SHAPE)
    monkeypatch.setattr(rows, "MAX_ROWS", 4)
    with pytest.raises(
        InvalidRequest, match="200 examples of 2 classes need 13 compiled rows of 16 examples; at most 4"
    ):
        plan_rows(Context.of(*examples(200), recipe=RECIPE), SHAPE)


def test_views_of_many_classes_are_few_and_those_of_two_are_all():
    vectors, labels = examples(60)[0], [str(i % 30) for i in range(60)]
    assert plan_rows(Context.of(vectors, labels), SHAPE).num_views == 256 // 30
    assert plan_rows(Context.of(vectors, ["ab"[i % 2] for i in range(60)]), SHAPE).num_views == ReductionRecipe().views


def test_identical_examples_give_finite_even_answers(loaded: LoadedModule):
    compiled = compile_context(Context.of(np.ones((6, 12), np.float32), ["a", "b"] * 3), loaded)
    (probabilities,) = answer(loaded.module, [(compiled, QUERIES)])
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities, probabilities[:1].repeat(7, 0), atol=1e-6)  # nothing tells queries apart


def test_queries_of_another_width_are_refused(loaded: LoadedModule):
    compiled = compile_context(given(6), loaded)
    with pytest.raises(InvalidRequest, match="whose vectors have 12 numbers"):
        answer(loaded.module, [(compiled, np.ones((1, 5), np.float32))])


def test_the_pool_forgets_the_least_recently_used_and_stays_within_its_bytes(loaded: LoadedModule):
    compiled = [compile_context(given(8, seed=i), loaded) for i in range(4)]
    pool = ContextPool(3 * compiled[0].num_bytes)
    for one in compiled[:3]:
        pool.put(one)
    assert pool.get(compiled[0].digest) is compiled[0]
    pool.put(compiled[3])
    assert pool.get(compiled[1].digest) is None and pool.get(compiled[0].digest) is compiled[0]
    assert len(pool) == 3 and pool.num_bytes == sum(c.num_bytes for c in (compiled[0], compiled[2], compiled[3]))
    large = compiled[1]
    assert isinstance(large, CompiledRows)
    pool.put(dataclasses.replace(large, rows=large.rows * 10))
    assert len(pool) == 3  # larger than all of it: not kept
