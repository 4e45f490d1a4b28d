"""Training whose answers come from a gang: each step the vectors go there as an expert, and no weight is loaded."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.backbone import BackboneGroup
from jobs.gang_rollouts import GangRollouts, settings_of
from jobs.training import TrainingRun, train
from jobs.workbench import Workbench
from tests.gangs import started
from tests.unit.test_train_experts import ASCII


class _Run:
    """The session's event loop, as GangRollouts wants it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        return self._run(work, timeout_s or 120.0)


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Callable[[str], Path], home: Path) -> Workbench:
    return Workbench.open(str(tiny_checkpoint("llama")), home)


def test_a_gang_answers_as_the_decoder_in_process_and_leads_to_the_same_expert(
    cluster: dict[str, float], bench: Workbench, home: Path, run: Callable[..., Any]
) -> None:
    wanted = TrainingRun(
        task=ASCII, method="reinforce", steps=3, batch=3, samples=2, learning_rate=0.1, valid=2, valid_every=2
    )
    alone = train(wanted, bench, progress=False)
    blobs: dict[str, bytes] = {}
    layers = wanted.resolved().layers
    assert layers is not None
    settings = settings_of(bench.prepared, layers, tp_size=2)
    scope = started(settings, bench.prepared, home, fetch=blobs.__getitem__)
    group: BackboneGroup = run(scope.__aenter__(), 300.0)
    try:
        pids = group.info.pids
        by_gang = train(wanted, bench, rollouts=GangRollouts(group, _Run(run), blobs), progress=False)
        assert group.info.pids == pids and not group.info.rebuilds
    finally:
        run(scope.__aexit__(None, None, None))
    assert max(entry["off_policy"] for entry in by_gang.log) < 1e-3
    assert [entry["reward"] for entry in by_gang.log] == [entry["reward"] for entry in alone.log]
    assert by_gang.adapter.digest == alone.adapter.digest
    assert len(blobs) == 1
