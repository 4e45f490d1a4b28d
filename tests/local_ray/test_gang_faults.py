"""A rank is killed or frozen, idle or under load: noticed, replaced, nothing left over, and no row loses a token.

One gang for all: each fault leaves the next a new one. `make test` runs each fault once, `make test-all` ten times.
"""

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.backbone import BackboneGroup
from cluster import placement
from cluster.resources import gang_bundles
from cluster.settings import BackboneSettings
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from tests import gangs
from tests.gangs import FAULTS, NAMES, REBUILT_S, TIGHT, Case

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def case(cluster: dict[str, float], run: Run, home: Path, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Case]:
    yield from gangs.case_of(tiny_checkpoint("llama"), home, run)


@pytest.mark.parametrize(
    ("fault", "rank", "load"),
    [pytest.param(*one, marks=pytest.mark.soak) if one[2] == "idle" else one for one in FAULTS],
    ids=NAMES,
)
def test_a_dead_or_frozen_rank_costs_time_but_no_row(case: Case, fault: signal.Signals, rank: int, load: str) -> None:
    case.run(gangs.survive(case, fault, rank, load, REBUILT_S))


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("fault", "rank", "load"), FAULTS, ids=NAMES)
def test_ten_dead_or_frozen_ranks_cost_no_row(case: Case, fault: signal.Signals, rank: int, load: str) -> None:
    for _ in range(10):
        case.run(gangs.survive(case, fault, rank, load, REBUILT_S))


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(3))
def test_faults_at_any_moment_also_during_a_rebuild_cost_no_row(case: Case, seed: int) -> None:
    draw = random.Random(seed)
    rows = gangs.rows(case.prepared, case.oracle.adapters * 8, max_tokens=60, within_s=600)

    async def storm() -> list[list[int]]:
        asked: list[asyncio.Task[list[int]]] = []
        for row in rows:
            asked.append(asyncio.create_task(gangs.tokens_of(case.group, row)))
            await asyncio.sleep(draw.uniform(0, 2))
            if draw.random() < 0.3 and (pids := gangs.rank_pids()):
                os.kill(draw.choice(pids), draw.choice((signal.SIGKILL, signal.SIGSTOP)))
        return await asyncio.gather(*asked)

    for row, tokens in zip(rows, case.run(storm(), 600), strict=True):
        assert len(tokens) == 60
        assert case.oracle.regret(row, tokens) < TIGHT


class Owner:
    """A process that owns a gang, as a Serve replica does."""

    async def start(self, settings: BackboneSettings, prepared: PreparedBackbone, home: Path, place: Any) -> None:
        self._group = await BackboneGroup.start(settings, prepared, home, place)

    async def pids(self) -> tuple[int, ...]:
        return (os.getpid(), *self._group.info.pids)


def test_ranks_end_with_their_owner_even_one_that_is_stopped(
    cluster: dict[str, float], run: Run, home: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    settings = BackboneSettings(id="orphan", source=str(tiny_checkpoint("llama")), tp_size=2)
    prepared = checkpoints.prepare(settings.source, home)
    place = placement.place(gang_bundles(settings), name="orphan")
    try:
        owner: Any = ray.remote(Owner).options(num_cpus=0.1).remote()
        ray.get(owner.start.remote(settings, prepared, home, place), timeout=120)
        pids = ray.get(owner.pids.remote(), timeout=10)
        assert len(gangs.alive(pids)) == 3
        os.kill(pids[2], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGKILL)
        assert run(gangs.gone(pids, 15.0)), gangs.alive(pids)
    finally:
        ray.util.remove_placement_group(place)
