"""With one warm spare a rank, a gang is replaced within five seconds, and the next spares are warmed meanwhile."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.backbone import BackboneGroup
from tests import gangs
from tests.gangs import FAULTS, NAMES, REBUILT_FROM_SPARES_S, Case


@pytest.fixture(scope="module")
def case(
    cluster: dict[str, float], run: Callable[..., Any], home: Path, tiny_checkpoint: Callable[[str], Path]
) -> Iterator[Case]:
    yield from gangs.case_of(tiny_checkpoint("llama"), home, run, spares=1)


async def spares_are_warm(group: BackboneGroup) -> None:
    while len(group.info.spare_pids) < 2:
        await asyncio.sleep(0.1)


def survive_on_spares(case: Case, fault: signal.Signals, rank: int, load: str) -> None:
    case.run(spares_are_warm(case.group))
    before = case.group.info.spare_pids
    case.run(gangs.survive(case, fault, rank, load, REBUILT_FROM_SPARES_S))
    assert case.group.info.rebuilds[-1].from_spares
    assert case.group.info.pids == before


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["SIGKILL", "SIGSTOP"])
def test_warm_spares_replace_a_gang_within_five_seconds(case: Case, fault: signal.Signals) -> None:
    survive_on_spares(case, fault, 1, "under load")


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("fault", "rank", "load"), FAULTS, ids=NAMES)
def test_ten_times_warm_spares_replace_a_gang_within_five_seconds(
    case: Case, fault: signal.Signals, rank: int, load: str
) -> None:
    for _ in range(10):
        survive_on_spares(case, fault, rank, load)
