"""Runs a sweep's packs on Ray Tune and writes the table; the programs that make plans call `run_sweep`.

Tune schedules: one trial of its own a pack, on any number of workers and nodes, whole or fractional GPUs, trials that
die begun again. What was computed is kept by `metasepia.sweeps.store` alone. Tune's own directory is a temporary one
that nothing is read from: going on means to run the packs that the store has not, each from its latest stop.
"""

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from cluster.connect import connect
from cluster.settings import RaySettings
from jobs.progress_bar import Bar
from jobs.sweep_progress import Told
from metasepia.digests import short
from metasepia.errors import CannotPlace, InvalidSettings, Unavailable
from metasepia.sweeps.failures import PacksFailed, StorageFailed
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.run import find_work
from metasepia.sweeps.store import SweepStore

MAX_DEATHS = 3
"""A pack whose process died so often in a row, with no stop reached in between, is failed; the sweep goes on."""
INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end the run as if it were whole
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the metric of ASHA is in the reports of stops alone
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # its state is never read
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Stops the worse trials early (ASHA, arXiv:1810.05934), by a figure that `measure` gives at each stop.

    Which trials are stopped depends on which came first: the table of such a sweep promises nothing about that, and
    says so in its metadata. Packs hold one trial each.
    """

    metric: str
    split: str = ""
    """The mean over rows with this metric and split at position -1 is compared."""
    mode: Literal["min", "max"] = "min"
    grace_steps: int = 1
    """No trial is stopped before. At least 1."""
    reduction_factor: float = 4.0
    """One in so many goes on from each rung. Above 1."""

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise InvalidSettings("asha.mode", self.mode, "min or max")
        if not self.grace_steps >= 1:
            raise InvalidSettings("asha.grace_steps", self.grace_steps, "at least 1")
        if not self.reduction_factor > 1:
            raise InvalidSettings("asha.reduction_factor", self.reduction_factor, "above 1")


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What one call of `run_sweep` did. Times are for people and benchmarks; the table has none."""

    table: str
    """Path or URI of the Parquet file."""
    num_packs: int
    num_run: int
    """Packs that this call ran, or went on with."""
    num_deaths: int
    """Processes of trials that died and were begun again."""
    num_given_up: int
    """Packs that ASHA stopped, in all."""
    workers: int
    ray_s: float
    """Until Ray was there."""
    wall_s: float
    """Of Tune, from its call to its return."""
    pack_s: Mapping[int, float]
    """Seconds inside the trial of each pack: work, measuring and storing, without waiting for Tune."""
    num_nodes: int
    """Alive when it began."""

    @property
    def inside_s(self) -> float:
        """Summed over the packs."""
        return sum(self.pack_s.values())


def run_sweep(
    plan: SweepPlan,
    uri: str,
    work: str,
    *,
    workers: int,
    gpus_per_trial: float = 0.0,
    cpus_per_trial: float = 1,
    address: str | None = None,
    asha: Asha | None = None,
    progress: bool = True,
) -> Swept:
    """Runs all packs of `plan` that `uri` has not, then writes the table. The same call goes on after any kill.

    `work`: "module:Class" of a PackWork, importable on every node. `workers`: packs at a time, as far as the cluster
    has the CPUs and GPUs. `address`: None starts Ray here and stops it again; `auto` or `host:port` joins a cluster,
    all of whose nodes must reach `uri`. A trial on a CPU computes with one thread, whatever `cpus_per_trial`, so that
    its bytes do not depend on it.

    Raises InvalidSettings and CorruptArtefact as `SweepStore.open` does, before anything is started; CannotPlace where
    the cluster has not the CPU or GPU of one trial; StorageFailed at the first pack that cannot be stored; Unavailable
    where a Ray that it started died, and the same call goes on; PacksFailed, after all the others are done, for packs
    whose work raised or whose process died MAX_DEATHS times in a row at one place. Ctrl-C and SIGTERM stop all
    processes and exit with 130. Packs that ASHA gave up are run to their end by a call without `asha`, after which the
    table promises all that it does without.
    """
    _check(plan, workers, gpus_per_trial, cpus_per_trial, asha)
    find_work(work)
    store = SweepStore.open(uri, plan)
    packs = range(len(plan.packs))
    given_up = {pack for pack in packs if store.given_up(pack) and not store.done(pack)} if asha else set[int]()
    told = Told(plan, [pack for pack in packs if not (pack in given_up or store.done(pack))])
    ran = _Ran()
    if told.todo:
        if progress:
            going_on = f", of which {len(packs) - len(told.todo)} are stored" if len(told.todo) < len(packs) else ""
            print(f"sweep {short(plan.digest)}: {len(plan.trials)} trials in {len(packs)} packs{going_on}", flush=True)
        config = {
            "uri": store.address,
            "sweep": plan.digest,
            "work": work,
            "device": "cuda" if gpus_per_trial else "cpu",
            "compared": None if asha is None else dataclasses.asdict(asha),
        }
        with _interruptible(store.uri):
            ran = _run(told, config, {"cpu": cpus_per_trial, "gpu": gpus_per_trial}, workers, address, progress)
    for pack in sorted(told.stopped):
        store.give_up(pack, told.step.get(pack, 0))
    if told.fatal is not None:
        raise StorageFailed(*told.fatal)
    if told.problems:
        lines = tuple(f"pack {pack}: {text}" for pack, text in sorted(told.problems.items()))
        raise PacksFailed(store.uri, lines, len(packs))
    return Swept(
        table=store.write_table(partial=asha is not None),
        num_packs=len(packs),
        num_run=len(told.todo),
        num_deaths=told.num_deaths,
        num_given_up=len(given_up | told.stopped),
        pack_s=told.pack_s,
        **dataclasses.asdict(ran),
    )


@dataclass
class _Ran:
    workers: int = 0
    num_nodes: int = 0
    ray_s: float = 0.0
    wall_s: float = 0.0


def _check(plan: SweepPlan, workers: int, gpus_per_trial: float, cpus_per_trial: float, asha: Asha | None) -> None:
    if not workers >= 1:
        raise InvalidSettings("workers", workers, "at least 1")
    if not (0 <= gpus_per_trial <= 1 or (gpus_per_trial > 1 and gpus_per_trial % 1 == 0)):
        raise InvalidSettings("gpus_per_trial", gpus_per_trial, "from 0 to 1, or a whole number")
    if not 0 < cpus_per_trial < float("inf"):
        raise InvalidSettings("cpus_per_trial", cpus_per_trial, "above 0")
    longest = max(len(one) for one in plan.packs)
    if asha is not None and longest > 1:
        raise InvalidSettings("asha", f"with packs of {longest}", "used with packs of one trial: it stops them singly")


def _run(
    told: Told,
    config: Mapping[str, Any],
    per_trial: Mapping[str, float],
    workers: int,
    address: str | None,
    progress: bool,
) -> _Ran:
    """Runs `told.todo` on the cluster, with Tune's directory in a temporary one."""
    workers, began = min(workers, len(told.todo)), time.monotonic()
    with (
        _cluster(address, workers, per_trial) as ours,
        _interrupts() as raise_if_interrupted,
        tempfile.TemporaryDirectory(prefix="metasepia-tune-") as scratch,
    ):
        workers = min(workers, _places(per_trial))
        with _quiet():
            from jobs.sweep_tune import tune_packs  # reads the environment that _quiet sets

            ran = _Ran(workers, len(_alive()), ray_s=time.monotonic() - began)
            began = time.monotonic()
            with Bar(told, shown=progress) as bar:
                tune_packs(
                    told,
                    bar,
                    config,
                    per_trial,
                    workers=workers,
                    max_deaths=MAX_DEATHS,
                    scratch=Path(scratch),
                    checks=[raise_if_interrupted, *([_check_node] if ours else [])],
                )
        ran.wall_s = time.monotonic() - began
    return ran


@contextlib.contextmanager
def _cluster(address: str | None, workers: int, per_trial: Mapping[str, float]) -> Iterator[bool]:
    """Ray, started or joined, and left as it was found; True where it is one that we started."""
    ours = not ray.is_initialized()
    if ours and address is None:
        num_gpus = _num_gpus() if per_trial["gpu"] else 0
        if num_gpus < per_trial["gpu"]:
            raise CannotPlace("GPU", float(per_trial["gpu"]), float(num_gpus), "one trial, on one node")
        connect(RaySettings(num_cpus=math.ceil(workers * per_trial["cpu"]), num_gpus=num_gpus, object_store_gib=0.2))
    elif ours:
        connect(RaySettings(address=str(address)))
    try:
        yield ours and address is None
    finally:
        if ours:
            ray.shutdown()


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _check_node() -> None:
    """Raises Unavailable where the one node of a Ray of our own died: Tune would wait for another for ever."""
    if not _alive():
        raise Unavailable("the Ray that this sweep started", 1.0)


def _places(per_trial: Mapping[str, float]) -> int:
    """How many trials the nodes have room for at once. Raises CannotPlace where none of them has for one."""
    has = [{"cpu": node["Resources"].get("CPU", 0.0), "gpu": node["Resources"].get("GPU", 0.0)} for node in _alive()]
    places = [min(int(one[name] / amount + 1e-6) for name, amount in per_trial.items() if amount) for one in has]
    if not sum(places):
        name = next((n for n, amount in per_trial.items() if max(one[n] for one in has) < amount), "cpu")
        raise CannotPlace(name.upper(), float(per_trial[name]), max(one[name] for one in has), "one trial, on one node")
    return sum(places)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own words off, except what goes wrong in it."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ |= QUIET
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _interruptible(uri: str) -> Iterator[None]:
    """Ctrl-C unwinds what is inside, which stops its processes, and exits with INTERRUPTED."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is stored in {uri}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], None]]:
    """SIGTERM as Ctrl-C, and neither is lost: what it gives raises again what a destructor or a callback swallowed.

    To be entered after Ray has started, whose own handler of SIGTERM exits with another status.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def raise_if_interrupted() -> None:
        if came:
            raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    before = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGINT) if mine}
    try:
        yield raise_if_interrupted
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
