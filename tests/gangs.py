"""What the gang tests share: a group on a tiny model, rows, the reference to compare with, and processes to look at."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from actors.backbone import BackboneGroup
from actors.processes import process_state
from cluster import placement
from cluster.resources import gang_bundles
from cluster.settings import BackboneSettings
from metasepia.backbone import ReferenceBackbone
from metasepia.errors import DeadlineExceeded, UnknownName
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, Row, Sampling, TokenChunk

TIGHT = 1e-4
"""Of the largest logit, in fp32."""

NOTICED_S = 3.0
REBUILT_S = 20.0
REBUILT_FROM_SPARES_S = 5.0
FAULTS = list(itertools.product((signal.SIGKILL, signal.SIGSTOP), (0, 1), ("idle", "under load")))
NAMES = [f"{fault.name} rank {rank} {load}" for fault, rank, load in FAULTS]


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


def rows(
    prepared: PreparedBackbone, adapters: Sequence[Adapter], *, max_tokens: int, within_s: float = 100.0
) -> list[Row]:
    """One greedy row an adapter, prompts of different lengths."""
    draw = np.random.default_rng(0)
    return [
        Row(
            request_id=f"row-{index}",
            backbone=prepared.digest,
            token_ids=tuple(int(t) for t in draw.integers(0, 250, 5 + 4 * index)),
            adapter=adapter,
            sampling=Sampling(temperature=0.0, max_tokens=max_tokens),
            deadline_unix_s=time.time() + within_s,
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


def rank_pids() -> list[int]:
    """Processes of this machine that are, or will be, ranks: by the name that Ray gives an actor's process."""
    found = (p for p in psutil.process_iter(["cmdline"]) if "BackboneShard" in " ".join(p.info["cmdline"] or ()))  # pyright: ignore[reportAttributeAccessIssue]
    return alive([process.pid for process in found])


async def gone(pids: Sequence[int], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < until:
        await asyncio.sleep(0.05)
    return not alive(pids)


def shared_memory_files() -> set[str]:
    """Names in /dev/shm, less Ray's own object store."""
    return {name for name in os.listdir("/dev/shm") if "plasma" not in name.lower()}


@dataclasses.dataclass
class Case:
    group: BackboneGroup
    oracle: Oracle
    prepared: PreparedBackbone
    run: Callable[..., Any]
    files: set[str]
    """In /dev/shm before the gang started."""


def case_of(checkpoint: Path, home: Path, run: Callable[..., Any], **options: Any) -> Iterator[Case]:
    settings = BackboneSettings(id="tiny", source=str(checkpoint), tp_size=2, max_rows=8, **options)
    prepared = checkpoints.prepare(settings.source, home)
    oracle = Oracle.of(prepared, settings, home)
    files, others = shared_memory_files(), set(rank_pids())
    scope = started(settings, prepared, home, fetch=oracle.fetch)
    group = run(scope.__aenter__())
    try:
        yield Case(group, oracle, prepared, run, files)
    finally:
        run(scope.__aexit__(None, None, None))
    assert set(rank_pids()) <= others
    assert shared_memory_files() <= files


async def survive(case: Case, fault: signal.Signals, rank: int, load: str, rebuilt_s: float) -> None:
    """One fault, and all that has to hold after it."""
    group, rebuilds = case.group, len(case.group.info.rebuilds)
    pids = case.group.info.pids
    asking = rows(case.prepared, case.oracle.adapters, max_tokens=180)
    begun = [asyncio.Event() for _ in asking]

    def ask() -> list[asyncio.Task[list[int]]]:
        return [asyncio.create_task(tokens_of(group, row, event)) for row, event in zip(asking, begun, strict=True)]

    asked = ask() if load == "under load" else []
    if asked:
        await asyncio.gather(*(event.wait() for event in begun))
        assert not any(task.done() for task in asked)  # or there was no load
    hit = time.time()
    os.kill(pids[rank], fault)
    # Idle: asked while the gang is dead and nobody has noticed.
    late = tokens_of(group, dataclasses.replace(asking[0], deadline_unix_s=time.time() + 0.5))
    *answers, refused = await asyncio.gather(*(asked or ask()), late, return_exceptions=True)
    assert isinstance(refused, DeadlineExceeded)
    for row, tokens in zip(asking, answers, strict=True):
        assert not isinstance(tokens, BaseException), tokens
        assert len(tokens) == 180
        assert case.oracle.regret(row, tokens) < TIGHT
    rebuild = group.info.rebuilds[-1]
    assert len(group.info.rebuilds) == rebuilds + 1
    assert f"rank {rank} " in rebuild.reason
    assert rebuild.noticed_unix_s - hit < NOTICED_S
    assert rebuild.seconds < rebuilt_s
    assert await gone(pids, 1.0)
    assert not set(pids) & set(group.info.pids)
    assert shared_memory_files() <= case.files
