"""The part of a sweep that is Ray Tune's: the function that is a trial, what hears its reports, and the Tuner.

Imported after `jobs.sweeping.QUIET` is set, since Tune reads some of it when it is imported.
"""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from jobs.progress_bar import Bar
from jobs.sweep_progress import Told
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.sweeps.failures import StorageFailed
from metasepia.sweeps.run import find_work, run_pack
from metasepia.sweeps.store import SweepStore

SCORE = "score"
NEVER = 10**12
"""More steps than any trial makes."""
CHECK_EVERY_S = 1.0


class Reports:
    """A trial's reports to Tune, with the seconds spent between them and not in them."""

    def __init__(self, pack: int) -> None:
        self._pack, self._step, self._last, self._stored = pack, -1, 0, -1
        self._since_s = time.perf_counter()

    def begin(self) -> None:
        """Before anything of the work is made."""
        self._tell()

    def step(self, step: int, last: int) -> None:
        self._step, self._last = step, last
        self._tell(at_work=True)

    def stop(self, step: int, score: float | None) -> None:
        self._step = self._stored = step
        self._tell(at_work=True, **({} if score is None else {SCORE: score}))

    def done(self) -> None:
        self._tell(at_work=True, finished=True)

    def problem(self, text: str, fatal: tuple[str, str] | None = None) -> None:
        self._tell(problem=text, fatal=fatal)

    def _tell(self, **more: Any) -> None:
        told = {"at_work": False, "finished": False, "problem": "", "fatal": None, **more}
        told |= {"pack": self._pack, "step": self._step, "last": self._last, "stored": self._stored}
        tune.report({**told, "seconds": time.perf_counter() - self._since_s})  # waits until Tune has read it
        self._since_s = time.perf_counter()


def run_trial(config: dict[str, Any]) -> None:
    """One pack, in a process that Tune started. Our own errors are told and not tried again; all others are raised.

    What a retry begins from is what the store has; Tune restores nothing.
    """
    torch.set_num_threads(1)  # so that sums, and with them bytes, do not depend on the machine's cores
    pack, reports = int(config["pack"]), Reports(int(config["pack"]))
    reports.begin()
    try:
        store = SweepStore.read(config["uri"])
        if store.plan.digest != config["sweep"]:
            raise InvalidSettings("uri", store.uri, f"the folder of the sweep {config['sweep']}, the same on all nodes")
        compared: Mapping[str, Any] | None = config["compared"]
        run_pack(
            find_work(config["work"]),
            store,
            pack,
            lambda step, rows: reports.stop(step, score_of(rows, compared) if compared and rows is not None else None),
            device=config["device"],
            on_step=reports.step,
        )
    except StorageFailed as error:
        reports.problem(str(error), (error.path, error.problem))
    except MetasepiaError as error:
        reports.problem(str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        name = Path(where.filename).name
        reports.problem(f"{type(error).__name__}: {error} ({name}, line {where.lineno}, in {where.name})")
        raise
    else:
        reports.done()


def score_of(rows: pa.Table, compared: Mapping[str, Any]) -> float:
    """The mean value of a metric over a pack at position -1; what is not finite is worse than anything.

    Raises InvalidSettings where `measure` gives no such row.
    """
    values = [
        row["value"]
        for row in rows.select(["metric", "split", "position", "value"]).to_pylist()
        if (row["metric"], row["split"], row["position"]) == (compared["metric"], compared["split"], -1)
    ]
    if not values and set(rows["status"].to_pylist()) == {"ok"}:
        known = sorted({(row["metric"], row["split"]) for row in rows.select(["metric", "split"]).to_pylist()})
        raise InvalidSettings("asha.metric", (compared["metric"], compared["split"]), f"one of {known}")
    mean = float(np.mean(values)) if values else float("nan")  # diverged, and without other figures
    worst = float("inf") if compared["mode"] == "min" else float("-inf")
    return mean if np.isfinite(mean) else worst


class OfDriver:
    """Lives in the driver alone. Tune pickles callbacks and stopper into its directory, which we never read."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: object) -> "OfDriver":
        return self


class Listener(OfDriver, tune.Callback):
    """Hears of reports and deaths, in the driver."""

    def __init__(self, told: Told, bar: Bar, max_deaths: int, checks: Sequence[Callable[[], None]] = ()) -> None:
        self._told, self._bar, self._max_deaths, self._checks = told, bar, max_deaths, checks
        self._checked_s = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._checked_s > CHECK_EVERY_S:
            for check in self._checks:
                check()
            self._checked_s = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._told.running.add(trial.config["pack"])
        self._bar.show()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "pack" in result:
            self._told.take(result)
            self._allow(trial)
            self._bar.show(now=result["finished"] or bool(result["problem"]))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._told.died(trial.config["pack"])
        self._allow(trial)
        self._bar.show(now=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        pack = trial.config["pack"]
        number = self._told.died(pack)
        died = f"its process died {number} times in a row at step {max(0, self._told.step.get(pack, 0))}"
        self._told.problems.setdefault(pack, died)
        self._bar.show(now=True)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        pack = trial.config["pack"]
        self._told.running.discard(pack)
        if pack not in self._told.done and pack not in self._told.problems and self._told.fatal is None:
            self._told.stopped.add(pack)
        self._bar.show()

    def _allow(self, trial: Any) -> None:
        """Tune counts failures over a trial's life; we allow so many in a row, as a long trial may lose many nodes."""
        last_chance = self._told.deaths.get(trial.config["pack"], 0) >= self._max_deaths - 1
        trial.max_failures = 0 if last_chance else -1


class StopWhenStorageFails(OfDriver, tune.Stopper):
    """Ends all trials when one could not store: the others would not either."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._told.fatal is not None


def tune_packs(
    told: Told,
    bar: Bar,
    config: Mapping[str, Any],
    resources: Mapping[str, float],
    *,
    workers: int,
    max_deaths: int,
    scratch: Path,
    checks: Sequence[Callable[[], None]],
) -> None:
    """Runs `told.todo`, `workers` at a time, and returns when each is done, failed or stopped; `told` says which.

    `checks` are called every CHECK_EVERY_S; what they raise ends all trials and comes out.
    """
    asha, scheduler = config["compared"], FIFOScheduler()
    if asha is not None:
        scheduler = _asha(asha)
    tuner = tune.Tuner(
        tune.with_resources(run_trial, {name: amount for name, amount in resources.items() if amount}),
        param_space={**config, "pack": tune.grid_search(list(told.todo))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=workers,
            scheduler=scheduler,
            reuse_actors=True,  # else each pack waits for a process that imports torch
            trial_name_creator=lambda trial: f"pack-{trial.config['pack']:05d}",
            trial_dirname_creator=lambda trial: f"pack-{trial.config['pack']:05d}",
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[Listener(told, bar, max_deaths, checks)],
            stop=StopWhenStorageFails(told),
            failure_config=tune.FailureConfig(max_failures=-1 if max_deaths > 1 else 0),
        ),
    )
    tuner.fit()


def _asha(asha: Mapping[str, Any]) -> TrialScheduler:
    return AsyncHyperBandScheduler(
        time_attr="step",
        metric=SCORE,
        mode=asha["mode"],
        max_t=NEVER,
        grace_period=asha["grace_steps"],
        reduction_factor=asha["reduction_factor"],
    )
