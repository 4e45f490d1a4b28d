import numpy as np
import pytest

from metasepia.errors import InvalidRequest
from metasepia.reasoning import audit
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.reduction import ReductionRecipe
from metasepia.reasoning.set_module import SetModule, SetShape
from metasepia.reasoning.shipped import LoadedModule

RECIPE = ReductionRecipe(views=3)


@pytest.fixture(scope="module", params=["causal", "set"])
def loaded(request: pytest.FixtureRequest) -> LoadedModule:
    if request.param == "set":
        shape = SetShape(width=16, layers=3, value_dim=4, soft_heads=4, mlp=32)
        return LoadedModule("random", "0" * 64, SetModule(shape, seed=1).eval().requires_grad_(False), {})
    module = ReasoningModule(ModuleShape(dims=4, pairs=17, layers=2, width=32, heads=4), seed=1).requires_grad_(False)
    for parameter in module.parameters():  # larger than at the start, so that answers differ clearly
        parameter.mul_(8.0)
    return LoadedModule("random", "0" * 64, module, {})


def examples(num: int, classes: str = "ab", seed: int = 0, width: int = 12) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, width)).astype(np.float32), [classes[i % len(classes)] for i in range(num)]


def context_of(num: int, classes: str = "ab", seed: int = 0) -> Context:
    return Context.of(*examples(num, classes, seed), seed=seed, recipe=RECIPE)


def answer_without(
    left: int, vectors: np.ndarray, labels: list[str], queries: np.ndarray, loaded: LoadedModule
) -> np.ndarray:
    """The slow way: a context made of the other examples from the start, under the reduction fitted on all."""
    reduction = compile_context(Context.of(vectors, labels, recipe=RECIPE), loaded).reduction
    rest = Context.of(np.delete(vectors, left, 0), [y for i, y in enumerate(labels) if i != left], recipe=RECIPE)
    return answer(loaded.module, [(compile_context(rest, loaded, reduction=reduction), queries)])[0]


@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_a_left_out_answer_is_that_of_a_context_that_never_had_the_example(loaded: LoadedModule, classes: str):
    vectors, labels = examples(11, classes)
    whole = audit.left_out(Context.of(vectors, labels, recipe=RECIPE), loaded)
    for i in range(11):
        slow = answer_without(i, vectors, labels, vectors[i : i + 1], loaded)
        np.testing.assert_allclose(whole[i], slow[0], atol=1e-5)


def test_left_out_answers_are_numbered_as_the_caller_numbered_the_examples(loaded: LoadedModule):
    vectors, labels = examples(12, "abc")
    order = np.random.default_rng(3).permutation(12)
    first = audit.left_out(Context.of(vectors, labels, recipe=RECIPE), loaded)
    other = audit.left_out(Context.of(vectors[order], [labels[i] for i in order], recipe=RECIPE), loaded)
    np.testing.assert_allclose(other, first[order], atol=1e-5)
    some = audit.left_out(Context.of(vectors, labels, recipe=RECIPE), loaded, only=[7, 2])
    np.testing.assert_allclose(some, first[[7, 2]], atol=1e-5)


def test_the_label_of_a_left_out_example_cannot_reach_its_own_answer(loaded: LoadedModule):
    vectors, labels = examples(12, "abc")
    changed = [*labels[:5], "a" if labels[5] != "a" else "b", *labels[6:]]
    first, other = (Context.of(vectors, y, recipe=RECIPE) for y in (labels, changed))
    compiled = compile_context(first, loaded)
    recompiled = compile_context(other, loaded, reduction=compiled.reduction)
    before, after = audit.left_out(first, loaded, compiled), audit.left_out(other, loaded, recompiled)
    np.testing.assert_allclose(after[5], before[5], atol=1e-5)
    assert np.abs(after - before).max() > 0.01  # others see it


def test_an_example_alone_in_its_class_takes_the_class_with_it(loaded: LoadedModule):
    vectors = examples(7)[0]
    two = audit.left_out(Context.of(vectors, ["a", *"bbbbbb"], recipe=RECIPE), loaded, only=[0])
    np.testing.assert_array_equal(two, [[0, 1]])
    (three,) = audit.left_out(Context.of(vectors, ["a", *"bbbccc"], recipe=RECIPE), loaded, only=[0])
    assert three[0] == 0
    np.testing.assert_allclose(
        three[1:], answer_without(0, vectors, ["a", *"bbbccc"], vectors[:1], loaded)[0], atol=1e-5
    )


def test_contexts_compiled_few_at_a_time_give_the_same_answers(loaded: LoadedModule, monkeypatch: pytest.MonkeyPatch):
    context = context_of(9)
    together = audit.left_out(context, loaded)
    calls = []
    monkeypatch.setattr(audit, "COMPILED_BYTES", 1)
    monkeypatch.setattr(audit, "answer", lambda *asked: calls.append(len(asked[1])) or answer(*asked))
    np.testing.assert_allclose(audit.left_out(context, loaded), together, atol=1e-5)
    assert calls == [1] * 9


def test_a_self_check_counts_left_out_examples_that_are_answered_rightly(loaded: LoadedModule):
    vectors, labels = examples(13, "abc")
    context = Context.of(vectors, labels, recipe=RECIPE)
    best = audit.left_out(context, loaded).argmax(axis=1)
    expected = float(np.mean(["abc"[i] == label for i, label in zip(best, labels, strict=True)]))
    assert audit.self_check(context, loaded) == audit.SelfCheck(expected, 13, "leave-one-out")


def test_a_self_check_of_many_examples_leaves_each_out_once_in_stratified_folds(loaded: LoadedModule):
    context = context_of(47, "aabc")
    check = audit.self_check(context, loaded, limit=46, folds=5)
    assert (check.num_left_out, check.method) == (47, "5-fold")
    assert check == audit.self_check(context, loaded, limit=46, folds=5)
    folds = audit._folds(context, 5)
    assert sorted(np.concatenate(folds)) == list(range(47))
    labels = np.array(context.labels)
    for name in "abc":
        counts = [int((labels[fold] == name).sum()) for fold in folds]
        assert max(counts) - min(counts) <= 1
    other = Context.of(*examples(47, "aabc"), seed=1, recipe=RECIPE)
    assert not np.array_equal(folds[0], audit._folds(other, 5)[0])


def test_an_influence_is_the_log_probability_lost_without_the_example(loaded: LoadedModule):
    vectors, labels = examples(10, "abc")
    queries = examples(4, seed=9)[0]
    context = Context.of(vectors, labels, recipe=RECIPE)
    compiled = compile_context(context, loaded)
    found = audit.influences(context, loaded, compiled, queries)
    assert found.values.shape == (4, 10, 3)
    (whole,) = answer(loaded.module, [(compiled, queries)])
    for i in range(10):
        slow = np.log(whole) - np.log(answer_without(i, vectors, labels, queries, loaded))
        np.testing.assert_allclose(found.values[:, i], slow, atol=1e-4)
    some = audit.influences(context, loaded, compiled, queries, only=[8, 1])
    assert some.examples == (8, 1)
    np.testing.assert_allclose(some.values, found.values[:, [8, 1]], atol=1e-5)


def test_the_strongest_influences_come_first_whatever_their_sign():
    values = np.array([[[0.1, 0.0], [-3.0, 0.0], [2.0, 0.0]]], np.float32)
    found = audit.Influences(values, (4, 7, 9), ("a", "b"))
    assert found.strongest(0, "a", 2) == [(7, -3.0), (9, 2.0)]


def test_influences_are_finite_when_the_example_was_the_only_one_of_its_class(loaded: LoadedModule):
    context = Context.of(examples(6)[0], ["a", *"bbbbb"], recipe=RECIPE)
    compiled = compile_context(context, loaded)
    queries = examples(3, seed=5)[0]
    found = audit.influences(context, loaded, compiled, queries)
    (whole,) = answer(loaded.module, [(compiled, queries)])
    without = [audit.PROBABILITY_FLOOR, 1.0]  # "a" cannot be said at all
    np.testing.assert_allclose(
        found.values[:, 0], np.log(np.maximum(whole, audit.PROBABILITY_FLOOR)) - np.log(without), atol=1e-5
    )


def test_influences_beyond_the_bound_are_refused_in_words(loaded: LoadedModule, monkeypatch: pytest.MonkeyPatch):
    context = context_of(8)
    compiled = compile_context(context, loaded)
    monkeypatch.setattr(audit, "INFLUENCE_BYTES", 8 * 2 * 4 * 3)
    audit.influences(context, loaded, compiled, examples(3)[0])
    with pytest.raises(InvalidRequest, match="8 examples on 4 inputs over 2 classes"):
        audit.influences(context, loaded, compiled, examples(4)[0])


@pytest.mark.parametrize("only", [[8], [-1]])
def test_an_example_that_does_not_exist_is_named(loaded: LoadedModule, only: list[int]):
    with pytest.raises(InvalidRequest, match=f"there is no example {only[0]}; they are 0 to 7"):
        audit.left_out(context_of(8), loaded, only=only)


def test_the_nearest_examples_are_those_of_largest_cosine_in_the_callers_numbering():
    vectors = np.array([[0, 2], [3, 3], [1, 0], [-1, 0], [0, 0]], np.float32)
    context = Context.of(vectors, ["b", "a", "b", "a", "a"])
    found = audit.nearest(context, np.array([[5, 0], [0, 0]], np.float32), 4)
    assert found.examples.tolist() == [[2, 1, 0, 4], [0, 1, 2, 3]]  # at a tie the example given first
    np.testing.assert_allclose(found.similarity, [[1, 0.5**0.5, 0, 0], [0, 0, 0, 0]], atol=1e-5)
    assert audit.nearest(context, vectors, 99).examples.shape == (5, 5)
