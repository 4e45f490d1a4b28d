import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from metasepia.backbone import ReferenceBackbone
from metasepia.decoding.engine import Engine
from metasepia.decoding.inflight import Limits
from metasepia.errors import InvalidRequest, Unavailable
from metasepia.experts.factors import factors_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Adapter, Executed, Row, Scores, TokenChunk
from metasepia.search.cross_entropy import CrossEntropySearch, Score, SearchSettings
from metasepia.search.fewshot import PRIORITY, Asked, Found, RowBackbone, Scoring, Shot, common_prefix, search, split
from tests.unit.test_engine import PREPARED

MATHS, LAW, BASE = "a" * 64, "b" * 64, "c" * 64
EOS = 9
TARGET = 0.8
"""Weight on MATHS that the pretended backbone answers best with."""
SHOTS = [Shot(prompt=(1, 2, place, 3), answer=(4, EOS)) for place in range(12)]


class Pretended:
    """A backbone whose answers become likelier, and from some point on right, near one mixture."""

    digest = "d" * 64

    def __init__(self, fails: bool = False) -> None:
        self.rows: list[Row] = []
        self.num_open, self.fails = 0, fails

    async def score(self, row: Row) -> Scores:
        self.rows.append(row)
        self.num_open += 1
        try:
            await asyncio.sleep(0)
            if self.fails and len(self.rows) > 20:
                raise Unavailable("the backbone", 1.0)
            await asyncio.sleep(0)
        finally:
            self.num_open -= 1
        values = np.full(len(row.token_ids) - row.score_from, -_distance(row.adapter), np.float32)
        return Scores(request_id=row.request_id, logprobs=values, executed=_executed(row))

    async def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        self.rows.append(row)
        await asyncio.sleep(0)
        token = 4 if _distance(row.adapter) < 0.3 else 5
        yield TokenChunk(request_id=row.request_id, token_ids=(token,), logprobs=(-_distance(row.adapter),))
        yield TokenChunk(request_id=row.request_id, token_ids=(), logprobs=(), finish="stop", executed=_executed(row))


def _distance(adapter: Adapter) -> float:
    weight = dict(adapter).get(MATHS, 0.0)
    assert isinstance(weight, float)
    return abs(weight - TARGET) + 0.1


def _executed(row: Row) -> Executed:
    return Executed(
        backbone=row.backbone, factors=None, adapter=row.adapter, path="factors", dtype="float32", tp_size=1
    )


def a_state() -> CrossEntropySearch:
    return CrossEntropySearch([MATHS, LAW, BASE], SearchSettings(population=16, generations=8))


def run(backbone: Pretended, scoring: Scoring, num_shots: int = 4) -> tuple[Found, CrossEntropySearch]:
    shots, held_out = split(SHOTS, num_shots, seed=0)
    state = a_state()
    return asyncio.run(search(backbone, shots, held_out, state, scoring)), state


LIMITS = Limits(max_rows=8, max_batch_tokens=4096, max_queued_tokens=100_000, max_prefix_tokens=1024)
LIKELIHOOD = Scoring(bases=frozenset({BASE}), stop_token_ids=(EOS,))
ACCURACY = Scoring(by="accuracy", bases=frozenset({BASE}), stop_token_ids=(EOS,))


@pytest.mark.parametrize("scoring", [LIKELIHOOD, ACCURACY])
def test_the_mixture_that_answers_best_is_found(scoring: Scoring) -> None:
    found, _ = run(Pretended(), scoring)
    weight = dict(found.adapter)[MATHS]
    assert isinstance(weight, float) and abs(weight - TARGET) < 0.1
    assert found.best_single == MATHS
    assert found.shots["mixture"] > found.shots["best single"] > found.shots["base"]
    assert found.held_out["mixture"] > found.held_out["base"]


def test_shots_and_held_out_share_no_question_and_are_all_there_is() -> None:
    shots, held_out = split(SHOTS, 5, seed=3)
    assert len(shots) == 5
    ids = [shot.id for shot in (*shots, *held_out)]
    assert sorted(ids) == sorted(shot.id for shot in SHOTS) and len(set(ids)) == 12
    assert split(SHOTS, 5, seed=3) == (shots, held_out)
    assert split(SHOTS, 5, seed=4) != (shots, held_out)


def test_held_out_questions_are_asked_once_at_the_end_of_three_mixtures() -> None:
    backbone = Pretended()
    shots, held_out = split(SHOTS, 4, seed=0)
    num_before: list[int] = []

    async def told(_: object) -> None:
        num_before.append(len(backbone.rows))

    asyncio.run(search(backbone, shots, held_out, a_state(), LIKELIHOOD, told=told))
    prompts = [row.token_ids[:4] for row in backbone.rows]
    asked_of_held_out = [i for i, prompt in enumerate(prompts) if prompt in {shot.prompt for shot in held_out}]
    assert len(asked_of_held_out) == 3 * len(held_out)
    assert min(asked_of_held_out) >= num_before[-1]


def test_a_question_that_is_there_twice_is_refused_by_its_place() -> None:
    again = Shot(prompt=SHOTS[1].prompt, answer=(7,))
    with pytest.raises(InvalidRequest, match=r"examples\[3\]: asks the same as examples\[1\]"):
        split([*SHOTS[:3], again], 2, seed=0)


def test_a_held_out_question_among_the_shots_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="among the shots"):
        asyncio.run(search(Pretended(), SHOTS[:2], SHOTS[1:], a_state(), LIKELIHOOD))


@pytest.mark.parametrize("examples", [SHOTS[:0], SHOTS[:1]])
def test_less_than_two_examples_are_refused(examples: list[Shot]) -> None:
    with pytest.raises(InvalidRequest, match="two examples or more"):
        split(examples, 1, seed=0)


def test_the_base_alone_is_asked_as_the_base_weights_and_mixed_as_a_candidate() -> None:
    backbone = Pretended()
    run(backbone, LIKELIHOOD)
    adapters = {row.adapter for row in backbone.rows}
    assert () in adapters and ((BASE, 1.0),) not in adapters
    assert any(BASE in dict(adapter) for adapter in adapters)


def test_rows_go_behind_everybody_elses_and_share_the_prompts_beginning() -> None:
    backbone = Pretended()
    run(backbone, LIKELIHOOD)
    assert {row.priority for row in backbone.rows} == {PRIORITY} and PRIORITY < 0
    assert {row.prefix for row in backbone.rows} == {(1, 2)}


def test_only_the_answer_is_scored() -> None:
    backbone = Pretended()
    run(backbone, LIKELIHOOD)
    assert {row.score_from for row in backbone.rows} == {4}


def test_a_mixture_that_comes_again_is_not_asked_again() -> None:
    backbone = Pretended()
    asked = Asked(backbone, SHOTS[:3], LIKELIHOOD)
    adapter: Adapter = ((MATHS, 0.5), (LAW, 0.5))
    first = asyncio.run(asked.scores([adapter, adapter, ((LAW, 1.0),)]))
    assert len(backbone.rows) == 6
    assert asyncio.run(asked.scores([adapter])) == first[:1] and len(backbone.rows) == 6


@pytest.mark.parametrize("scoring", [LIKELIHOOD, ACCURACY])
def test_a_search_killed_in_any_generation_ends_with_the_same_mixture_and_bytes(scoring: Scoring) -> None:
    shots, held_out = split(SHOTS, 4, seed=0)
    states: list[bytes] = []
    whole = a_state()

    async def told(_: object) -> None:
        states.append(whole.to_bytes())

    wanted = asyncio.run(search(Pretended(), shots, held_out, whole, scoring, told=told))
    assert len(states) > 3
    for state in states:
        resumed = CrossEntropySearch.from_bytes(state)
        assert asyncio.run(search(Pretended(), shots, held_out, resumed, scoring)) == wanted
        assert resumed.to_bytes() == states[-1]


def test_an_error_of_one_row_ends_the_search_and_drops_the_other_rows() -> None:
    backbone = Pretended(fails=True)
    with pytest.raises(Unavailable):
        run(backbone, LIKELIHOOD)
    assert backbone.num_open == 0


def test_accuracy_is_judged_by_the_shot_where_it_can() -> None:
    shots = [Shot(prompt=(1, place), answer=(8,), is_right=lambda answer: answer == (4,)) for place in range(3)]
    score = asyncio.run(Asked(Pretended(), shots, ACCURACY).scores([((MATHS, 1.0),)]))[0]
    assert score.rounded == Score(value=1.0, likelihood=-0.3)


def test_the_common_beginning_of_one_prompt_is_nothing_to_share() -> None:
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == (1, 2)
    assert common_prefix([(1, 2)]) == ()
    assert common_prefix([(1, 2), (3, 2)]) == ()


def test_a_population_in_one_batch_finds_what_the_oracle_finds_row_by_row(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def model() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval().requires_grad_(False)

    factors = factors_of(model(), ("mlp.up_proj",), PREPARED.digest, tmp_path, progress=False)
    draw = np.random.default_rng(0)
    experts: dict[str, ExpertVectors | LoraAdapter] = {}
    for _ in range(2):
        z = {name: draw.uniform(0, 3, length).astype(np.float32) for name, length in factors.index.lengths.items()}
        one = ExpertVectors(backbone=PREPARED.digest, factors=factors.digest, z=z)
        experts[one.digest] = one
    base = ExpertVectors.identity(PREPARED.digest, factors.digest).digest
    tokens = draw.integers(0, 255, (6, 24)).tolist()
    shots = [Shot(prompt=(7,) * 20 + tuple(one[:20]), answer=tuple(one[20:])) for one in tokens]
    scoring = Scoring(bases=frozenset({base}))
    settings = SearchSettings(population=8, elites=2, generations=3, per_layer=True)

    def searched(backbone: RowBackbone) -> tuple[Found, CrossEntropySearch]:
        state = CrossEntropySearch([*experts, base], settings, num_layers=len(factors.index.lengths))
        return asyncio.run(search(backbone, shots[:4], shots[4:], state, scoring)), state

    oracle = ReferenceBackbone(model(), PREPARED.digest, factors=factors, experts=experts)
    wanted, slow = searched(oracle)
    ours = model()
    with Engine(ours, PREPARED, experts=attach(ours, factors), limits=LIMITS) as engine:
        for one in experts.values():
            engine.put_expert(one)
        found, state = searched(engine)
        assert engine.load().reused_tokens > 0
    assert state.to_bytes() == slow.to_bytes()
    assert found.adapter == wanted.adapter
    for name, score in wanted.held_out.items():
        assert score.value == pytest.approx(found.held_out[name].value, rel=1e-4)
