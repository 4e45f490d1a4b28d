"""Named contexts in the pool: fetched by digest, compiled once, evicted and had again; self-checks and explanations."""

import asyncio
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest

from actors import audits
from actors.labelled import context_of, labelled_vectors
from actors.messages import Build, Built, Classified, Classify, Explain, Explained, LabelledVectors
from actors.reasoning_pool import ReasoningPool
from cluster.settings import ReasoningSettings
from metasepia.errors import CorruptArtefact, DeadlineExceeded, InvalidRequest, Outdated, Overloaded, UnknownName
from metasepia.reasoning import audit
from metasepia.reasoning import context as compiling
from metasepia.reasoning.examples import Context
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.named import EmbeddedContext, Example, NamedContext, vector_content, vectors_of_contents
from metasepia.reasoning.shipped import LoadedModule


def module(seed: int) -> LoadedModule:
    shape = ModuleShape(dims=4, pairs=17, layers=2, width=32, heads=4)
    return LoadedModule(f"random {seed}", str(seed) * 64, ReasoningModule(shape, seed=seed).requires_grad_(False), {})


FIRST, SECOND = module(1), module(2)


class Shelf:
    """A registry of blobs that counts."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.num_read = 0

    def add(self, embedded: EmbeddedContext) -> str:
        self.blobs[embedded.named.digest] = embedded.to_bytes()
        return embedded.named.digest

    async def get(self, digest: str) -> bytes:
        self.num_read += 1
        await asyncio.sleep(0.01)
        if digest not in self.blobs:
            raise UnknownName("artefact", digest, ())
        return self.blobs[digest]


def stored(tenant: int, *, module: LoadedModule = FIRST, num: int = 8, **changes: object) -> EmbeddedContext:
    rng = np.random.default_rng(tenant)
    contents = [vector_content(row.tolist(), "v") for row in rng.standard_normal((num, 12))]
    examples = [Example(content, "ab"[i % 2]) for i, content in enumerate(contents)]
    options = {"encoder": None, "module": module.digest, "reduction": {"views": 2}} | changes
    named = NamedContext.of("vector", examples, **options)  # pyright: ignore[reportArgumentType]
    return EmbeddedContext(named, vectors_of_contents(one.content for one in named.examples))


QUERIES = np.random.default_rng(99).standard_normal((3, 12)).astype(np.float32)


def classify(context: LabelledVectors | str, *, module: LoadedModule = FIRST, seconds: float = 30.0) -> Classify:
    return Classify(module=module.digest, context=context, queries=QUERIES, deadline_unix_s=time.time() + seconds)


def explain(context: LabelledVectors | str, *, seconds: float = 30.0) -> Explain:
    deadline = time.time() + seconds
    return Explain(module=FIRST.digest, context=context, queries=QUERIES, nearest=2, deadline_unix_s=deadline)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def pool(shelf: Shelf) -> Iterator[ReasoningPool]:
    made = ReasoningPool(ReasoningSettings(cache_mib=1), shelf, [FIRST, SECOND])
    yield made
    made.stop()


def ask(pool: ReasoningPool, *messages: Classify) -> list[Classified]:
    async def all_at_once() -> list[Classified]:
        return await asyncio.gather(*map(pool.classify, messages))

    return asyncio.run(all_at_once())


def test_a_context_known_by_its_digest_is_fetched_once_and_answers_as_by_value(pool: ReasoningPool, shelf: Shelf):
    embedded = stored(0)
    digest = shelf.add(embedded)
    by_value = ask(pool, classify(labelled_vectors(embedded)))[0]
    assert (by_value.context, shelf.num_read) == (digest, 0)
    other = ReasoningPool(ReasoningSettings(), shelf, [FIRST])
    try:
        answers = ask(other, *[classify(digest) for _ in range(20)])
        assert (shelf.num_read, other.statistics()["contexts_compiled"]) == (1, 1)
        assert sorted(one.compiled for one in answers) == ["before"] * 19 + ["now"]
        for one in answers:
            np.testing.assert_allclose(one.probabilities, by_value.probabilities, atol=1e-6)
    finally:
        other.stop()


def test_contexts_beyond_the_memory_are_evicted_and_answer_again_all_the_same(pool: ReasoningPool, shelf: Shelf):
    digests = [shelf.add(stored(i, reduction={"views": 16})) for i in range(60)]
    first = [ask(pool, classify(digest))[0] for digest in digests]
    assert pool.statistics()["context_bytes"] <= 2**20
    assert 0 < pool.statistics()["contexts_kept"] < 60
    again = ask(pool, *map(classify, digests))
    assert pool.statistics()["context_bytes"] <= 2**20
    assert pool.statistics()["contexts_compiled"] > 60
    for one, other in zip(first, again, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)


def test_a_context_evicted_while_its_question_waits_is_answered(pool: ReasoningPool, shelf: Shelf):
    digests = [shelf.add(stored(i, reduction={"views": 16})) for i in range(40)]
    ask(pool, classify(digests[0]))

    async def race() -> list[Classified]:
        return await asyncio.gather(*(pool.classify(classify(digest)) for digest in [*digests[1:], digests[0]]))

    assert len(asyncio.run(race())) == 40


def test_an_unknown_or_broken_blob_fails_its_own_question_and_can_be_asked_for_again(pool: ReasoningPool, shelf: Shelf):
    good, bad = shelf.add(stored(0)), "0" * 64
    shelf.blobs[bad] = b"not a context"

    async def three() -> list[Classified | BaseException]:
        asked = [classify(bad), classify("1" * 64), classify(good)]
        return await asyncio.gather(*map(pool.classify, asked), return_exceptions=True)

    broken, unknown, answered = asyncio.run(three())
    assert isinstance(broken, CorruptArtefact) and isinstance(unknown, UnknownName)
    assert isinstance(answered, Classified)
    shelf.blobs["1" * 64] = b"still none"
    with pytest.raises(CorruptArtefact):
        ask(pool, classify("1" * 64))


def test_a_context_of_a_reduction_that_this_program_has_not_is_outdated(pool: ReasoningPool, shelf: Shelf):
    digest = shelf.add(stored(0, reduction={"magic": 1}))
    with pytest.raises(Outdated, match="reduction"):
        ask(pool, classify(digest))


def test_modules_answer_side_by_side_each_with_its_own_contexts(pool: ReasoningPool, shelf: Shelf):
    one, two = stored(0), stored(0, module=SECOND)
    both = ask(pool, classify(shelf.add(one)), classify(shelf.add(two), module=SECOND))
    assert not np.allclose(both[0].probabilities, both[1].probabilities)
    assert [answer.module for answer in both] == [FIRST.digest, SECOND.digest]


@pytest.mark.parametrize(
    "change",
    [
        lambda vectors: np.ones_like(vectors),
        lambda vectors: np.zeros_like(vectors),
        lambda vectors: np.repeat(vectors[:2], len(vectors) // 2, axis=0),
        lambda vectors: vectors * np.float32(1e37),
        lambda vectors: vectors[:, :1],
    ],
    ids=["constant", "zeros", "duplicates", "huge", "one number"],
)
@pytest.mark.parametrize("labels", ["abababab", "aaaaaaab"])
def test_degenerate_vectors_and_a_label_of_one_example_are_built_and_answered_finitely(pool, change, labels):
    vectors = change(np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32))
    given = LabelledVectors(digest=f"{vectors.tobytes()} {labels}", vectors=vectors, labels=tuple(labels))
    built = asyncio.run(pool.build(Build(module=FIRST.digest, context=given, deadline_unix_s=time.time() + 30)))
    assert 0 <= built.self_check.accuracy <= 1
    message = dataclasses.replace(classify(given), queries=vectors[:2])
    np.testing.assert_allclose(ask(pool, message)[0].probabilities.sum(1), 1, atol=1e-5)


def test_an_answer_that_is_not_finite_is_refused(pool: ReasoningPool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "answer", lambda _, asked: [np.full((len(q), 2), np.nan) for _, q in asked])
    with pytest.raises(InvalidRequest, match="no finite answer"):
        ask(pool, classify(labelled_vectors(stored(0))))


def test_a_build_compiles_and_checks_and_the_context_is_there_then(pool: ReasoningPool, shelf: Shelf):
    embedded = stored(3)
    given = labelled_vectors(embedded)
    message = Build(module=FIRST.digest, context=given, deadline_unix_s=time.time() + 30)
    built: Built = asyncio.run(pool.build(message))
    assert ask(pool, classify(given.digest))[0].compiled == "before"
    assert shelf.num_read == 0
    context = Context.of(given.vectors, given.labels, recipe=context_of(given).recipe)
    assert built.self_check is not None and built.classes == ("a", "b")
    assert built.self_check.accuracy == pytest.approx(audit.self_check(context, FIRST).accuracy)
    assert built.self_check.num_left_out == 8


def test_a_context_is_built_without_a_self_check_that_would_take_all_the_time(pool: ReasoningPool, monkeypatch):
    def endless(*_):
        while True:
            time.sleep(0.01)
            yield

    monkeypatch.setattr(audit, "self_check_in_steps", endless)
    given = labelled_vectors(stored(4))
    built = asyncio.run(pool.build(Build(module=FIRST.digest, context=given, deadline_unix_s=time.time() + 1)))
    assert built.self_check is None and pool.statistics()["queued_audits"] == 0
    assert ask(pool, classify(given.digest))[0].compiled == "before"


def test_an_explanation_in_steps_is_that_of_the_audit_in_the_order_of_the_message(pool: ReasoningPool, shelf: Shelf):
    embedded = stored(5)
    given = labelled_vectors(embedded)
    shuffled = np.random.default_rng(0).permutation(8)
    other = dataclasses.replace(given, vectors=given.vectors[shuffled], labels=tuple(given.labels[i] for i in shuffled))
    explained: Explained = asyncio.run(pool.explain(explain(shelf.add(embedded))))
    by_value: Explained = asyncio.run(pool.explain(explain(other)))
    np.testing.assert_allclose(by_value.influences, explained.influences[:, shuffled], atol=1e-5)
    np.testing.assert_array_equal(shuffled[by_value.nearest], explained.nearest)
    context = context_of(given)
    whole = audit.influences(context, FIRST, compiling.compile_context(context, FIRST), QUERIES)
    np.testing.assert_allclose(explained.influences, whole.values, atol=1e-5)


def test_audits_leave_questions_their_turn_and_take_turns_themselves(pool: ReasoningPool, monkeypatch):
    real, steps = audit.influences, []

    def slow(context, module, compiled, queries, *, only):
        steps.append(context.seed)
        time.sleep(0.05)
        return real(context, module, compiled, queries, only=only)

    monkeypatch.setattr(audit, "influences", slow)
    monkeypatch.setattr(audits, "STEP_S", 0.0)  # one example a step
    given = [dataclasses.replace(labelled_vectors(stored(i)), seed=i) for i in range(2)]

    async def race() -> tuple[float, float]:
        began = time.monotonic()
        audits = [asyncio.create_task(pool.explain(explain(one))) for one in given]
        await asyncio.sleep(0.02)
        await pool.classify(classify(labelled_vectors(stored(7))))
        answered = time.monotonic() - began
        await asyncio.gather(*audits)
        return answered, time.monotonic() - began

    answered, explained = asyncio.run(race())
    assert answered < explained / 2
    assert len(steps) == 16 and {0, 1} == set(steps[:4])


def test_an_audit_whose_time_is_up_ends_and_the_queue_of_audits_is_bounded(shelf: Shelf, monkeypatch):
    pool = ReasoningPool(ReasoningSettings(max_queued_audits=1), shelf, [FIRST])
    num_steps, real = 0, audit.influences

    def slow(*args, **options):
        nonlocal num_steps
        num_steps += 1
        time.sleep(0.05)
        return real(*args, **options)

    monkeypatch.setattr(audit, "influences", slow)
    monkeypatch.setattr(audits, "STEP_S", 0.0)
    given = labelled_vectors(stored(0))
    ask(pool, classify(given))

    async def late() -> None:
        first = asyncio.create_task(pool.explain(explain(given, seconds=0.12)))
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="audits"):
            await pool.explain(explain(given))
        with pytest.raises(DeadlineExceeded):
            await first

    asyncio.run(late())
    monkeypatch.undo()
    asyncio.run(pool.explain(explain(given)))  # the queue is empty again
    assert num_steps < 8
    pool.stop()
