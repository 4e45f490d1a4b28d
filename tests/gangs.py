"""What the gang tests share: a group on a tiny model, rows, the reference to compare with, and processes to look at."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.backbone import BackboneGroup
from actors.backbone_shard import process_state
from cluster import placement
from cluster.resources import gang_bundles
from cluster.settings import BackboneSettings
from metasepia import checkpoints
from metasepia.backbone import ReferenceBackbone
from metasepia.errors import UnknownName
from metasepia.experts import ExpertVectors
from metasepia.prepared import PreparedBackbone
from metasepia.rows import Adapter, Row, Sampling, TokenChunk
from metasepia.svf import FactorSet, factors_of

TIGHT = 1e-4
"""Of the largest logit, in fp32."""


@dataclasses.dataclass
class Oracle:
    """The one-process reference on the same checkpoint, with two experts."""

    reference: ReferenceBackbone
    factors: FactorSet
    experts: tuple[ExpertVectors, ...]

    @classmethod
    def of(cls, prepared: PreparedBackbone, settings: BackboneSettings, home: Path, width: float = 0.5) -> "Oracle":
        model = checkpoints.load(prepared, torch.float32, "cpu")
        factors = factors_of(model, settings.expert_layers, prepared.digest, home, progress=False)
        draw = np.random.default_rng(0)
        experts = tuple(
            ExpertVectors(
                backbone=prepared.digest,
                factors=factors.digest,
                z={
                    name: draw.uniform(1 - width, 1 + width, len(one.s)).astype(np.float32)
                    for name, one in factors.factors.items()
                },
            )
            for _ in range(2)
        )
        reference = ReferenceBackbone(model, prepared.digest, factors=factors, experts={e.digest: e for e in experts})
        return cls(reference, factors, experts)

    def fetch(self, digest: str) -> bytes:
        by_digest = {expert.digest: expert for expert in self.experts}
        if digest not in by_digest:
            raise UnknownName("expert", digest, tuple(by_digest))
        return by_digest[digest].to_bytes()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The base, each expert, and a mixture of both."""
        first, second = (expert.digest for expert in self.experts)
        return (), ((first, 1.0),), ((second, 1.0),), ((first, 0.25), (second, 0.75))

    def regret(self, row: Row, tokens: Sequence[int]) -> float:
        """How far, at worst, a token's logit lies below the reference's maximum, relative to the largest logit.

        The reference is given the tokens that were emitted: 0 means that it would have chosen each of them.
        """
        logits = self.reference.logits((*row.token_ids, *tokens), row.adapter)[len(row.token_ids) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        return float(((logits.max(-1).values - chosen) / logits.abs().max(-1).values).max())


def rows(prepared: PreparedBackbone, adapters: Sequence[Adapter], *, max_tokens: int, seed: int = 0) -> list[Row]:
    """One greedy row an adapter, prompts of different lengths."""
    draw = np.random.default_rng(seed)
    return [
        Row(
            request_id=f"row-{index}",
            backbone=prepared.digest,
            token_ids=tuple(int(t) for t in draw.integers(0, 250, 5 + 4 * index)),
            adapter=adapter,
            sampling=Sampling(temperature=0.0, max_tokens=max_tokens),
            deadline_unix_s=time.time() + 100,
        )
        for index, adapter in enumerate(adapters)
    ]


@contextlib.asynccontextmanager
async def started(
    settings: BackboneSettings, prepared: PreparedBackbone, home: Path, **options: Any
) -> AsyncIterator[BackboneGroup]:
    """A group in a placement group of its own; both are gone afterwards."""
    from ray.util.placement_group import remove_placement_group

    place = placement.place(gang_bundles(settings)[1:], name=settings.id)
    try:
        group = await BackboneGroup.start(settings, prepared, home, place, first_bundle=0, **options)
        try:
            yield group
        finally:
            await group.stop()
    finally:
        remove_placement_group(place)


async def tokens_of(group: BackboneGroup, row: Row, begun: asyncio.Event | None = None) -> list[int]:
    """All tokens of a row; `begun` is set when the first few are there."""
    chunks: list[TokenChunk] = []
    async for chunk in group.generate(row):
        chunks.append(chunk)
        if begun is not None and sum(len(one.token_ids) for one in chunks) >= 5:
            begun.set()
    assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish == "length" and chunks[-1].executed is not None
    assert chunks[-1].executed.adapter == row.adapter
    return [token for chunk in chunks for token in chunk.token_ids]


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if process_state(pid)[0] not in "XZ"]


async def gone(pids: Sequence[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < until:
        await asyncio.sleep(0.05)
    return not alive(pids)


def shared_memory_files() -> set[str]:
    """Names in /dev/shm, less Ray's own object store."""
    return {name for name in os.listdir("/dev/shm") if "plasma" not in name.lower()}
