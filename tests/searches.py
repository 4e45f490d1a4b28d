"""A search with everything around it pretended but the registry: what the jobs are tested on."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from metasepia.errors import MetasepiaError
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import Artefact, Kind
from metasepia.rows import Adapter, Executed, HiddenStates, Row, Scores, TokenChunk
from metasepia.search.cross_entropy import SearchSettings
from metasepia.search.jobs import Example, SearchJob

BACKBONE, MATHS, LAW, BASE = "d" * 64, "a" * 64, "b" * 64, "c" * 64
EOS = 9
TARGET = 0.8
"""Weight on MATHS that the pretended backbone answers best with."""


class Direct:
    """The registry in this process, behind the client's face."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.puts = registry, list[Artefact]()

    async def resolve(self, kind: Kind, name: str, owner: str) -> Artefact:
        return self.registry.resolve(kind, name, owner)

    async def get(self, digest: str, owner: str | None = None) -> bytes:
        return self.registry.get(digest, owner)

    async def list(self, kind: Kind, owner: str, *, after: str = "", limit: int = 1000) -> Sequence[Artefact]:
        return self.registry.list(kind, owner, after=after, limit=limit)

    async def put(self, kind: Kind, blob: bytes, **rest: Any) -> Artefact:
        await asyncio.sleep(0)
        put = self.registry.put(kind, blob, **rest)
        self.puts.append(put)
        return put

    async def delete(self, kind: Kind, name: str, owner: str) -> Artefact:
        return self.registry.delete(kind, name, owner)


class PretendedRows:
    """A backbone whose answers become likelier, and from some point on right, near one mixture."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.calls: list[int] = []
        self.refusals: list[MetasepiaError] = []
        """Raised by the next calls, one each."""
        self.gate: asyncio.Event | None = None
        """Calls wait for it where there is one."""
        self.num_open = self.most_open = 0

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        self.calls.append(len(rows))
        self.rows += rows
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            if self.refusals:
                raise self.refusals.pop(0)
        finally:
            self.num_open -= 1
        return [
            Scores(
                request_id=row.request_id,
                logprobs=np.full(len(row.token_ids) - row.score_from, -distance(row.adapter), np.float32),
                executed=executed(row),
            )
            for row in rows
        ]

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        raise AssertionError("a search asks for no states")

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        self.rows.append(row)
        await asyncio.sleep(0)
        if self.refusals:
            raise self.refusals.pop(0)
        token = 4 if distance(row.adapter) < 0.3 else 5
        yield TokenChunk(request_id=row.request_id, token_ids=(token,), logprobs=(-distance(row.adapter),))
        yield TokenChunk(request_id=row.request_id, token_ids=(), logprobs=(), finish="stop", executed=executed(row))


def distance(adapter: Adapter) -> float:
    weight = dict(adapter).get(MATHS, 0.0)
    assert isinstance(weight, float)
    return abs(weight - TARGET) + 0.1


def executed(row: Row) -> Executed:
    return Executed(
        backbone=row.backbone, factors=None, adapter=row.adapter, path="factors", dtype="float32", tp_size=1
    )


def text_of(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def a_job(*, num_examples: int = 10, seed: int = 0, generations: int = 8, **changes: Any) -> SearchJob:
    fields: dict[str, Any] = {
        "backbone": BACKBONE,
        "candidates": (("base", BASE), ("law", LAW), ("maths", MATHS)),
        "bases": (BASE,),
        "factors": "f" * 64,
        "num_layers": 1,
        "examples": tuple(Example(prompt=(1, 2, i, 3), answer=(4, EOS), text="4") for i in range(num_examples)),
        "num_shots": 4,
        "settings": SearchSettings(population=12, generations=generations, seed=seed),
        "by": "likelihood",
        "match": "exact",
        "max_tokens": 4,
        "stop_token_ids": (EOS,),
    }
    return SearchJob(**(fields | changes))
