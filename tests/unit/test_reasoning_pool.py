import asyncio
import dataclasses
import time
from concurrent.futures import Future

import numpy as np
import pytest

from actors import reasoning_pool
from actors.messages import Classified, Classify, LabelledVectors
from actors.reasoning_pool import ReasoningPool
from cluster.settings import ReasoningSettings
from metasepia.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, UnknownName
from metasepia.reasoning import context as contexts
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.shipped import LoadedModule


@pytest.fixture(scope="module")
def loaded() -> LoadedModule:
    shape = ModuleShape(dims=4, pairs=17, layers=2, width=32, heads=4)
    return LoadedModule("random", "0" * 64, ReasoningModule(shape, seed=1).requires_grad_(False), {})


@pytest.fixture
def pool(loaded: LoadedModule):
    made = ReasoningPool(ReasoningSettings(max_queued_queries=100), loaded=[loaded])
    yield made
    made.stop()


def question(pool: ReasoningPool, *, tenant: int = 0, num_queries: int = 3, num_examples: int = 8) -> Classify:
    rng = np.random.default_rng(tenant)
    vectors = rng.standard_normal((num_examples + num_queries, 12)).astype(np.float32)
    labels = tuple("ab"[i % 2] for i in range(num_examples))
    return Classify(
        module=pool.digest,
        context=LabelledVectors(
            digest=f"tenant {tenant}, {num_examples}", vectors=vectors[:num_examples], labels=labels, seed=tenant
        ),
        queries=vectors[num_examples:],
        deadline_unix_s=time.time() + 30,
    )


def ask(pool: ReasoningPool, *questions: Classify) -> list[Classified]:
    async def all_at_once() -> list[Classified]:
        return await asyncio.gather(*(pool.classify(one) for one in questions))

    return asyncio.run(all_at_once())


class Hold:
    """Keeps the pool's worker inside one forward until released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._release = Future(), Future()
        real = contexts.answer

        def slow(module, asked):
            if not self.entered.done():
                self.entered.set_result(None)
                self._release.result(20)
            return real(module, asked)

        monkeypatch.setattr(contexts, "answer", slow)

    def release(self) -> None:
        self._release.set_result(None)


def test_many_tenants_that_wait_share_one_forward_and_get_the_answers_they_get_alone(pool, monkeypatch):
    questions = [question(pool, tenant=i, num_queries=i + 1) for i in range(5)]
    alone = [ask(pool, one)[0] for one in questions]
    before = pool.statistics()["forwards"]
    hold = Hold(monkeypatch)

    async def race() -> list[Classified]:
        first = asyncio.create_task(pool.classify(question(pool, tenant=9)))
        await asyncio.wrap_future(hold.entered)
        rest = [asyncio.create_task(pool.classify(one)) for one in questions]
        await asyncio.sleep(0.05)
        hold.release()
        await first
        return await asyncio.gather(*rest)

    together = asyncio.run(race())
    assert pool.statistics()["forwards"] == before + 2
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        assert (one.context, one.compiled, other.compiled) == (other.context, "now", "before")


def test_a_long_request_is_answered_over_several_rounds_and_whole(pool, monkeypatch):
    monkeypatch.setattr(reasoning_pool, "ROUND_BYTES", 1)
    long, short = question(pool, tenant=1, num_queries=40), question(pool, tenant=2)
    (got, _) = ask(pool, long, short)
    monkeypatch.undo()
    np.testing.assert_allclose(got.probabilities, ask(pool, long)[0].probabilities, atol=1e-5)
    assert got.probabilities.shape == (40, 2)


def test_another_modules_digest_is_unknown_and_the_known_one_is_named(pool):
    with pytest.raises(UnknownName, match=pool.digest):
        asyncio.run(pool.classify(dataclasses.replace(question(pool), module="f" * 64)))


def test_a_full_queue_refuses_and_says_when_to_come_back(pool, monkeypatch):
    hold = Hold(monkeypatch)

    async def fill() -> None:
        first = asyncio.create_task(pool.classify(question(pool, num_queries=90)))
        await asyncio.wrap_future(hold.entered)
        with pytest.raises(Overloaded) as refused:
            await pool.classify(question(pool, num_queries=11))
        assert refused.value.retry_after_s >= 1
        hold.release()
        await first

    asyncio.run(fill())
    assert len(ask(pool, question(pool, num_queries=100))[0].probabilities) == 100  # the queue is empty again
    with pytest.raises(InvalidRequest, match="at most 100 at once"):
        ask(pool, question(pool, num_queries=101))


def test_a_deadline_that_passes_while_waiting_is_kept(pool, monkeypatch):
    hold = Hold(monkeypatch)

    async def wait() -> float:
        first = asyncio.create_task(pool.classify(question(pool)))
        await asyncio.wrap_future(hold.entered)
        began = time.monotonic()
        late = dataclasses.replace(question(pool, tenant=3), deadline_unix_s=time.time() + 0.2)
        with pytest.raises(DeadlineExceeded):
            await pool.classify(late)
        waited = time.monotonic() - began
        hold.release()
        await first
        return waited

    assert 0.1 < asyncio.run(wait()) < 2
    with pytest.raises(DeadlineExceeded):
        ask(pool, dataclasses.replace(question(pool), deadline_unix_s=time.time() - 1))


def test_a_request_that_fails_fails_alone(pool):
    good, bad = question(pool), question(pool, tenant=1)
    assert isinstance(bad.context, LabelledVectors)
    one_class = dataclasses.replace(bad, context=dataclasses.replace(bad.context, digest="one", labels=("a",) * 8))
    not_finite = dataclasses.replace(bad, queries=np.full((1, 12), np.nan, np.float32))

    async def both() -> list[Classified | BaseException]:
        return await asyncio.gather(*map(pool.classify, (one_class, good, not_finite)), return_exceptions=True)

    first, second, third = asyncio.run(both())
    assert isinstance(first, InvalidRequest) and "one class only" in str(first)
    assert isinstance(second, Classified)
    assert isinstance(third, InvalidRequest) and "inputs[0]" in str(third)


def test_a_failed_forward_is_retried_in_halves_and_then_told_to_its_own_request(pool, monkeypatch):
    real = contexts.answer
    poisoned = question(pool, tenant=1, num_queries=2)

    def picky(module, asked):
        if any(len(queries) == 2 for _, queries in asked):
            raise MemoryError("too much")
        return real(module, asked)

    monkeypatch.setattr(contexts, "answer", picky)

    async def both() -> list[Classified | BaseException]:
        return await asyncio.gather(pool.classify(poisoned), pool.classify(question(pool)), return_exceptions=True)

    first, second = asyncio.run(both())
    assert isinstance(first, Unavailable) and "too much" in str(first)
    assert isinstance(second, Classified)
    asyncio.run(pool.check())


def test_stopping_fails_what_waits(loaded, monkeypatch):
    pool = ReasoningPool(ReasoningSettings(), loaded=[loaded])
    pool.stop()
    with pytest.raises(Unavailable):
        ask(pool, question(pool))
