"""Few-shot adaptation: a mixture of experts found for a task by a few of its questions with their answers.

The examples are split, by their ids, into *shots*, on which mixtures are compared, and *held-out* ones, on which the
mixture found, the best single candidate of the shots and the base are measured once, at the end: nothing is chosen on
those. The whole population is asked for at once, as ordinary rows of low priority.
"""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from metasepia.digests import digest_of
from metasepia.errors import InvalidRequest
from metasepia.experts.mixing import adapter_of_rows
from metasepia.rows import Adapter, Row, Sampling, Scores, TokenChunk
from metasepia.search.cross_entropy import CrossEntropySearch, Generation, Score

PRIORITY = -1
"""Of a search's rows: whoever asks for an answer goes first."""

By = Literal["likelihood", "accuracy"]
"""`likelihood`: the mean natural log-probability of an answer's tokens, teacher-forced. `accuracy`: the share of shots
whose greedy answer is right, and among equals the mean log-probability of the right ones' tokens."""


@runtime_checkable
class RowBackbone(Protocol):
    """What is used of `metasepia.backbone.Backbone`."""

    @property
    def digest(self) -> str: ...
    def generate(self, row: Row) -> AsyncIterator[TokenChunk]: ...
    async def score(self, row: Row) -> Scores: ...


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A question and its answer, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """With the token that ends it, where a chat's answer should end."""
    is_right: Callable[[tuple[int, ...]], bool] | None = None
    """Whether a generated answer, without the token that ends it, is right; None: when it is `answer` to the token."""

    @property
    def id(self) -> str:
        """By the question alone: one question is never both a shot and held out."""
        return digest_of({"prompt": list(self.prompt)})


def split(shots: Sequence[Shot], num_shots: int, seed: int) -> tuple[list[Shot], list[Shot]]:
    """`num_shots` of the examples, drawn by the seed, and the rest, both in the order given.

    Raises InvalidRequest for a question that is there twice, and for less than two examples.
    """
    places: dict[str, int] = {}
    for place, shot in enumerate(shots):
        if shot.id in places:
            raise InvalidRequest(f"examples[{place}]", f"asks the same as examples[{places[shot.id]}]; leave one out")
        places[shot.id] = place
        if not shot.answer or not shot.prompt:
            raise InvalidRequest(f"examples[{place}]", "its question or its answer is empty")
    if len(shots) < 2:
        raise InvalidRequest("examples", f"a search needs two examples or more, got {len(shots)}")
    if num_shots < 1:
        raise InvalidRequest("shots", f"must be 1 or more, got {num_shots}")
    chosen = set(np.random.default_rng([seed, 1]).permutation(len(shots))[:num_shots].tolist())
    drawn = [shot for place, shot in enumerate(shots) if place in chosen]
    rest = [shot for place, shot in enumerate(shots) if place not in chosen]
    assert not {shot.id for shot in drawn} & {shot.id for shot in rest}
    return drawn, rest


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How mixtures are asked and ranked."""

    by: By = "likelihood"
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int = 16
    """by = accuracy: the longest answer that is generated."""
    priority: int = PRIORITY
    bases: frozenset[str] = frozenset()
    """Digests of the base as a candidate: alone it is asked as the base weights themselves."""
    share_prefix: bool = True
    """The tokens that all shots begin with are read once for a mixture, not once for each of its shots."""

    @property
    def perfect(self) -> float | None:
        return 1.0 if self.by == "accuracy" else None


class Asked:
    """The scores of mixtures on some shots. A mixture that comes again is not asked again: rows are pure functions."""

    def __init__(self, backbone: RowBackbone, shots: Sequence[Shot], scoring: Scoring) -> None:
        self._backbone, self._shots, self._scoring = backbone, tuple(shots), scoring
        self._known: dict[Adapter, Score] = {}
        self._prefix = common_prefix([shot.prompt for shot in shots]) if scoring.share_prefix else ()

    async def scores(self, adapters: Sequence[Adapter]) -> list[Score]:
        """All at once. Raises whatever a row raises; the rows that are still asked for are then dropped."""
        new = [one for one in dict.fromkeys(adapters) if one not in self._known]
        ask = self._likelihood if self._scoring.by == "likelihood" else self._accuracy
        try:
            async with asyncio.TaskGroup() as group:
                asked = [[group.create_task(ask(shot, adapter)) for shot in self._shots] for adapter in new]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for adapter, tasks in zip(new, asked, strict=True):
            values = [task.result() for task in tasks]
            right = [likelihood for value, likelihood in values if value > 0 or self._scoring.by == "likelihood"]
            self._known[adapter] = Score(
                value=math.fsum(value for value, _ in values) / len(values),
                likelihood=math.fsum(right) / len(right) if right else 0.0,
            )
        return [self._known[one] for one in adapters]

    async def _likelihood(self, shot: Shot, adapter: Adapter) -> tuple[float, float]:
        tokens = (*shot.prompt, *shot.answer)
        scores = await self._backbone.score(self._row(tokens, adapter, want="logprobs", score_from=len(shot.prompt)))
        mean = math.fsum(scores.logprobs.tolist()) / len(shot.answer)
        return mean, mean

    async def _accuracy(self, shot: Shot, adapter: Adapter) -> tuple[float, float]:
        """1 or 0, and the mean log-probability of what was generated."""
        scoring = self._scoring
        sampling = Sampling(temperature=0.0, max_tokens=scoring.max_tokens, stop_token_ids=scoring.stop_token_ids)
        answer: list[int] = []
        logprobs: list[float] = []
        async with aclosing(self._backbone.generate(self._row(shot.prompt, adapter, sampling=sampling))) as chunks:  # pyright: ignore[reportArgumentType]
            async for chunk in chunks:
                answer += chunk.token_ids
                logprobs += chunk.logprobs
        stops = set(scoring.stop_token_ids)
        wanted = tuple(token for token in shot.answer if token not in stops)
        right = tuple(answer) == wanted if shot.is_right is None else shot.is_right(tuple(answer))
        return float(right), math.fsum(logprobs) / max(len(logprobs), 1)

    def _row(self, token_ids: tuple[int, ...], adapter: Adapter, **more: object) -> Row:
        return Row(
            request_id=f"search-{uuid.uuid4().hex}",
            backbone=self._backbone.digest,
            token_ids=token_ids,
            adapter=adapter_of_rows(adapter, self._scoring.bases),
            priority=self._scoring.priority,
            prefix=self._prefix,
            **more,  # pyright: ignore[reportArgumentType]
        )


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all of them begin with; of one prompt none, since nothing would be shared."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:shared]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ended with."""

    adapter: Adapter
    """The mixture, as it is registered; rows carry `adapter_of_rows` of it."""
    shots: Mapping[str, Score]
    """On the shots, by `mixture`, `best single` and `base` (where it took part): the mixture was chosen on these."""
    held_out: Mapping[str, Score]
    """The same on the examples that nothing was chosen on; empty where there were none."""
    best_single: str
    """Digest of the candidate that alone did best on the shots."""
    stopped: str
    generations: int
    evaluations: int


async def search(
    backbone: RowBackbone,
    shots: Sequence[Shot],
    held_out: Sequence[Shot],
    state: CrossEntropySearch,
    scoring: Scoring,
    *,
    told: Callable[[Generation], Awaitable[None]] | None = None,
) -> Found:
    """Runs `state` to its end and measures what it found.

    `told` is awaited after each generation, when `state.to_bytes()` may be kept: a search that goes on from there ends
    with the same bytes. Raises InvalidRequest when a held-out question is among the shots, and what rows raise.
    """
    if {shot.id for shot in shots} & {shot.id for shot in held_out}:
        raise InvalidRequest("examples", "a held-out question is among the shots")
    asked = Asked(backbone, shots, scoring)
    while state.stopped is None:
        generation = state.tell(await asked.scores(state.adapters()))
        if told is not None:
            await told(generation)
    singles: list[Adapter] = [((digest, 1.0),) for digest in state.candidates]
    of_shots = await asked.scores([state.incumbent, *singles])
    ranked = sorted(range(len(singles)), key=lambda i: (of_shots[i + 1].rounded, -i), reverse=True)
    named = {"mixture": state.incumbent, "best single": singles[ranked[0]]}
    for base in scoring.bases.intersection(state.candidates):
        named["base"] = ((base, 1.0),)
    known = dict(zip([state.incumbent, *singles], of_shots, strict=True))
    measured: dict[str, Score] = {}
    if held_out:
        scores = await Asked(backbone, held_out, scoring).scores(list(named.values()))
        measured = dict(zip(named, scores, strict=True))
    return Found(
        adapter=state.incumbent,
        shots={name: known[adapter] for name, adapter in named.items()},
        held_out=measured,
        best_single=singles[ranked[0]][0][0],
        stopped=state.stopped or "",
        generations=state.generation,
        evaluations=state.evaluations,
    )
