"""The engine of one process against the oracle that runs each row alone."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from metasepia.backbone import Backbone, ReferenceBackbone
from metasepia.decoding.engine import Engine
from metasepia.decoding.inflight import Limits
from metasepia.errors import (
    CorruptArtefact,
    DeadlineExceeded,
    InvalidRequest,
    InvalidSettings,
    NotSupported,
    Unavailable,
    UnknownName,
    WindowExceeded,
)
from metasepia.experts.factors import factors_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import HiddenStatesWanted, Row, Sampling, TokenChunk
from tests import tiny

DIGEST = "b" * 64
PREPARED = tiny.prepared(DIGEST)
LIMITS = Limits(max_rows=3, max_batch_tokens=1024, max_queued_tokens=10_000)


def model_of(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> ReferenceBackbone:
    model = model_of(tiny_checkpoint("llama"))
    factors = factors_of(model, ("mlp.up_proj",), DIGEST, tmp_path_factory.mktemp("home"), progress=False)
    return ReferenceBackbone(model, DIGEST, factors=factors)


@pytest.fixture
def engine(oracle: ReferenceBackbone, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Engine]:
    model = model_of(tiny_checkpoint("llama"))
    assert oracle.factors is not None
    with Engine(model, PREPARED, experts=attach(model, oracle.factors), limits=LIMITS) as made:
        yield made


def expert(oracle: ReferenceBackbone, seed: int) -> ExpertVectors:
    assert oracle.factors is not None
    rng = np.random.default_rng(seed)
    z = {n: (1 + 0.5 * rng.standard_normal(len(f.s))).astype(np.float32) for n, f in oracle.factors.factors.items()}
    return ExpertVectors(backbone=DIGEST, factors=oracle.factors.digest, z=z)


def row(length: int = 9, **fields: Any) -> Row:
    tokens = tuple(np.random.default_rng(length).integers(0, 256, length).tolist())
    sampling = Sampling(temperature=0.0, max_tokens=6)
    return Row(**{"request_id": "r", "backbone": DIGEST, "token_ids": tokens, "sampling": sampling} | fields)


async def chunks_of(backbone: Backbone, one: Row) -> list[TokenChunk]:
    return [chunk async for chunk in backbone.generate(one)]


async def tokens_of(backbone: Backbone, one: Row) -> tuple[int, ...]:
    return tuple(token for chunk in await chunks_of(backbone, one) for token in chunk.token_ids)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def raised(work: Awaitable[Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        await work
    return caught.value


def test_more_rows_than_fit_answer_as_the_oracle_does_each_with_its_expert(
    engine: Engine, oracle: ReferenceBackbone
) -> None:
    first, second = expert(oracle, 1), expert(oracle, 2)
    for one in (first, second):
        engine.put_expert(one)
        oracle.put_expert(one)
    adapters = [(), ((first.digest, 1.0),), ((first.digest, 0.5), (second.digest, 0.5))]
    hot = Sampling(temperature=0.8, top_p=0.9, max_tokens=8)
    rows = [row(3 + 5 * i, adapter=adapters[i % 3], sampling=hot, seed=i) for i in range(7)]

    async def both() -> tuple[Any, Any]:
        ours = await asyncio.gather(*(chunks_of(engine, one) for one in rows))
        return ours, [await chunks_of(oracle, one) for one in rows]

    ours, theirs = run(both())
    for one, a, b in zip(rows, ours, theirs, strict=True):
        assert [chunk.token_ids for chunk in a] == [chunk.token_ids for chunk in b]
        np.testing.assert_allclose(
            [p for chunk in a for p in chunk.logprobs], [p for chunk in b for p in chunk.logprobs], atol=1e-4
        )
        assert {chunk.request_id for chunk in a} == {"r"}
        assert a[-1].executed is not None and a[-1].executed.adapter == one.adapter


def test_scores_and_hidden_states_are_the_oracles(engine: Engine, oracle: ReferenceBackbone) -> None:
    wanted = row(20, score_from=4, hidden=HiddenStatesWanted(layers=(0, -1)))

    async def both() -> list[Any]:
        sides = (engine, oracle)
        return [await side.score(wanted) for side in sides] + [await side.hidden_states(wanted) for side in sides]

    ours, theirs, our_states, their_states = run(both())
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    np.testing.assert_allclose(our_states.states, their_states.states, atol=1e-4)


def test_the_likeliest_tokens_are_the_oracles_beside_tokens_and_scores(
    engine: Engine, oracle: ReferenceBackbone
) -> None:
    rows = [row(8 + 3 * i, top_logprobs=number, score_from=2) for i, number in enumerate((0, 1, 5, 20))]

    async def both() -> list[Any]:
        sides = (engine, oracle)
        chunks = [await asyncio.gather(*(chunks_of(side, one) for one in rows)) for side in sides]
        return [*chunks, *[await asyncio.gather(*(side.score(one) for one in rows)) for side in sides]]

    ours, theirs, our_scores, their_scores = run(both())
    for one, a, b in zip(rows, ours, theirs, strict=True):
        for mine, other in zip(a, b, strict=True):
            assert [len(beside) for beside in mine.top] == [one.top_logprobs] * (len(mine.token_ids) * bool(mine.top))
            assert bool(mine.top) == bool(one.top_logprobs and mine.token_ids)
            for beside, expected in zip(mine.top, other.top, strict=True):
                assert [token for token, _ in beside] == [token for token, _ in expected]
                np.testing.assert_allclose([p for _, p in beside], [p for _, p in expected], atol=1e-4)
            if mine.top:  # greedy: what was chosen is the likeliest
                assert mine.top[0][0] == (mine.token_ids[0], mine.logprobs[0])
    assert our_scores[0].top_ids is None
    for one, mine, other in zip(rows[1:], our_scores[1:], their_scores[1:], strict=True):
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-4)
        assert mine.top_ids.shape == (len(one.token_ids) - 2, one.top_logprobs)
        np.testing.assert_array_equal(mine.top_ids, other.top_ids)
        np.testing.assert_allclose(mine.top_logprobs, other.top_logprobs, atol=1e-4)


@pytest.mark.parametrize("number", [-1, 21])
def test_more_likeliest_tokens_than_the_bound_are_refused(engine: Engine, number: int) -> None:
    error = run(raised(tokens_of(engine, row(top_logprobs=number))))
    assert isinstance(error, InvalidRequest) and error.param == "top_logprobs"


def test_two_event_loops_may_ask_at_once(engine: Engine, oracle: ReferenceBackbone) -> None:
    found: dict[int, tuple[int, ...]] = {}
    rows = {length: row(length) for length in (4, 11)}
    threads = [
        threading.Thread(target=lambda length=length: found.update({length: run(tokens_of(engine, rows[length]))}))
        for length in rows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {length: run(tokens_of(oracle, one)) for length, one in rows.items()}


def test_closing_the_iterator_drops_the_row(engine: Engine) -> None:
    async def leave_early() -> None:
        answers = engine.generate(row(5, sampling=Sampling(max_tokens=200)))
        await anext(answers)
        assert engine.load().num_live == 1
        await answers.aclose()
        await until(lambda: engine.load().num_live == 0)
        assert engine.load().steps < 150

    run(leave_early())


def test_refusals_reach_the_caller_and_the_engine_goes_on(engine: Engine, oracle: ReferenceBackbone) -> None:
    late = row(deadline_unix_s=time.time() - 1)
    cases = [
        (row(backbone="c" * 64), UnknownName),
        (row(adapter=((("e" * 64), 1.0),)), UnknownName),
        (row(sampling=Sampling(max_tokens=1000)), WindowExceeded),
        (late, DeadlineExceeded),
    ]
    for one, error in cases:
        with pytest.raises(error):
            run(tokens_of(engine, one))
    assert run(tokens_of(engine, row())) == run(tokens_of(oracle, row()))


def test_a_dropped_expert_is_unknown_and_one_that_does_not_fit_is_refused(
    engine: Engine, oracle: ReferenceBackbone
) -> None:
    one = expert(oracle, 3)
    asked = row(adapter=((one.digest, 1.0),))
    engine.put_expert(one)
    run(tokens_of(engine, asked))
    engine.drop_expert(one.digest)
    with pytest.raises(UnknownName):
        run(tokens_of(engine, asked))
    with pytest.raises(CorruptArtefact):
        engine.put_expert(ExpertVectors(backbone="c" * 64, factors=one.factors, z=one.z))


def test_an_engine_made_without_expert_layers_holds_low_rank_adapters_only(
    oracle: ReferenceBackbone, tiny_checkpoint: Callable[[str], Path]
) -> None:
    model, rng = model_of(tiny_checkpoint("llama")), np.random.default_rng(0)
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 96), (48, 2)))
    delta = LoraAdapter(backbone=DIGEST, a={name: a}, b={name: b})
    changed = model_of(tiny_checkpoint("llama"))
    changed.get_parameter(name).add_(torch.from_numpy(b @ a))
    with Engine(model, PREPARED) as plain:
        plain.put_expert(delta)
        with pytest.raises(NotSupported):
            plain.put_expert(expert(oracle, 1))
        asked = row(adapter=((delta.digest, 1.0),))
        assert run(tokens_of(plain, asked)) == run(tokens_of(ReferenceBackbone(changed, DIGEST), row()))


def test_a_model_whose_layers_were_attached_is_taken_with_them_only(tiny_checkpoint: Callable[[str], Path]) -> None:
    model = model_of(tiny_checkpoint("llama"))
    attach(model, backbone=DIGEST)
    with pytest.raises(InvalidSettings, match="attached once"):
        Engine(model, PREPARED)


def test_a_step_that_raises_ends_every_row_with_its_cause(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        answers = engine.generate(row(5, sampling=Sampling(max_tokens=200)))
        await anext(answers)

        def broken(_: object) -> None:
            raise MemoryError("out of it")

        monkeypatch.setattr(engine._decoder, "run", broken)

        async def rest() -> None:
            async for _ in answers:
                pass

        waiting = [rest(), tokens_of(engine, row())]
        for error in await asyncio.gather(*(raised(one) for one in waiting)):
            assert isinstance(error, Unavailable) and "out of it" in str(error)
            assert isinstance(error.__cause__, MemoryError)
        assert isinstance(await raised(tokens_of(engine, row())), Unavailable)

    run(fail())


def test_closing_ends_the_thread_and_the_rows(engine: Engine) -> None:
    async def close() -> None:
        answers = engine.generate(row(5, sampling=Sampling(max_tokens=200)))
        await anext(answers)
        await asyncio.to_thread(engine.close)
        with pytest.raises(Unavailable, match="closed"):
            async for _ in answers:
                pass
        with pytest.raises(Unavailable):
            await tokens_of(engine, row())

    run(close())
    engine.close()
    assert not any(thread.name == "engine" and thread is engine._thread for thread in threading.enumerate())


def test_a_caller_whose_loop_is_gone_costs_its_own_row_only(engine: Engine, oracle: ReferenceBackbone) -> None:
    loop = asyncio.new_event_loop()
    answers = engine.generate(row(5, sampling=Sampling(max_tokens=200)))
    loop.run_until_complete(anext(answers))
    loop.close()
    assert run(tokens_of(engine, row())) == run(tokens_of(oracle, row()))
    assert engine.load().num_live == 0 and engine.load().steps < 150
