"""Task-diversity sweeps on Ray Tune: how varied must pretraining be? Leaves a table, figures and a report.

    python -m jobs.sweep_tasks --profile laptop --out runs/laptop
    python -m jobs.sweep_tasks --resume --out runs/laptop
    python -m jobs.sweep_tasks --profile laptop --out runs/mine --num-tasks 4,64,2^10,inf --dims 4,8
    python -m jobs.sweep_tasks --profile paper --out s3://bucket/paper --address auto --workers 8 --gpus-per-trial 0.5

OUT is a folder or a `pyarrow.fs` URI: table.parquet (one row a trial, step and metric), report.html, figures/. A sweep
that was stopped or killed goes on with `--resume`, here or on another machine, to the same table, byte for byte,
whatever the number of workers. Any axis takes several values, with commas between. Needs Ray, and matplotlib (the extra
`train`) for the figures.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch

from metasepia.digests import short
from metasepia.diversity.figures import Picture, pictures
from metasepia.diversity.findings import Findings
from metasepia.diversity.measures import ESTIMATORS
from metasepia.diversity.profiles import AXES, PROFILES, plan_of, trials_of, values_of
from metasepia.diversity.report import page_of, summary_of
from metasepia.diversity.results import Results, spelled
from metasepia.errors import InvalidSettings, MetasepiaError, NotSupported
from metasepia.sweeps.files import Files
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.store import MANIFEST, SweepStore

WORK = "metasepia.diversity.work:DiversityPack"
_SPELLINGS = {"num_steps": "--steps"}
_PARTIAL = (
    "Part of the trials did not run to their end, and which ones may depend on timing; they are left out of what "
    "follows."
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments, rest = parser().parse_known_args(argv)
    try:
        return _run(arguments, rest)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    for one in rest:
        allowed = f"one of {', '.join(option_of(axis) for axis in AXES)}, or an option in --help"
        raise InvalidSettings("axis", one, allowed)
    plan = plan_from(arguments)
    profile = PROFILES[plan.settings["profile"]]
    workers = profile.workers if arguments.workers is None else arguments.workers
    gpus = gpus_of(arguments, profile.gpus_per_trial)
    print(describe(plan), flush=True)
    if arguments.dry_run:
        return 0
    if arguments.report_only:
        store = SweepStore.read(arguments.out)
        write_report(store, store.table(partial=True), partial=not _whole(store))
        return 0
    # Here and not above: everything that is refused is refused before Ray is imported, which takes a second.
    from jobs.sweeping import Asha, run_sweep

    asha = None
    if arguments.scheduler == "asha":
        metric = regret_of(plan)
        asha = Asha(metric=metric, split="pretraining", grace_steps=max(1, trials_of(plan)[0].num_steps // 4))
    swept = run_sweep(
        plan,
        arguments.out,
        WORK,
        workers=workers,
        gpus_per_trial=gpus,
        cpus_per_trial=arguments.cpus_per_trial,
        address=arguments.address,
        asha=asha,
        progress=not arguments.quiet,
    )
    print(f"table: {swept.table}", flush=True)
    store = SweepStore.read(arguments.out)
    write_report(store, store.table(partial=asha is not None), partial=not _whole(store))
    return 0


def plan_from(arguments: argparse.Namespace) -> SweepPlan:
    """The sweep that was asked for, or with `--resume` and no axis the one stored at OUT.

    Raises InvalidSettings where OUT holds a sweep and `--resume` was not said, or none and it was.
    """
    axes = {axis: values_of(axis, text) for axis in AXES if (text := getattr(arguments, axis)) is not None}
    said = (
        axes
        or arguments.profile
        or any(one is not None for one in (arguments.pack, arguments.sample, arguments.sample_seed))
    )
    going_on = arguments.resume or arguments.report_only
    stored = Files.at(arguments.out).exists(MANIFEST)
    if going_on and not stored:
        raise InvalidSettings(
            "out", arguments.out, f"a sweep's folder, with its {MANIFEST}; there is none to go on with"
        )
    if stored and not going_on and not arguments.dry_run:
        store = SweepStore.read(arguments.out)
        state = "finished" if _whole(store) else "not finished"
        allowed = (
            f"a new folder, or add --resume: this one holds the sweep {short(store.plan.digest)}, {state}; "
            "--resume goes on with it and makes its report"
        )
        raise InvalidSettings("out", arguments.out, allowed)
    if going_on and not said:
        plan = SweepStore.read(arguments.out).plan
        trials_of(plan)
        return plan
    pack_size = arguments.pack
    if arguments.scheduler == "asha":
        if pack_size not in (None, 1):
            raise InvalidSettings("pack", pack_size, "1 with --scheduler asha: it stops models one by one")
        pack_size = 1
    if arguments.sample_seed is not None and arguments.sample is None:
        raise InvalidSettings("sample_seed", arguments.sample_seed, "given with --sample POINTS")
    sample = {"sample": arguments.sample, "sample_seed": arguments.sample_seed or 0}
    return plan_of(arguments.profile or "laptop", axes, pack_size=pack_size, **sample)


def regret_of(plan: SweepPlan) -> str:
    """The figure that ASHA compares: on pretraining tasks, the distance to the estimator that is the best there.

    It is by how much a model's error exceeds the least possible one, so pools of any size compare. Raises
    InvalidSettings for a sweep of both problems, whose distances have different units.
    """
    problems = sorted({trial.problem for trial in trials_of(plan)})
    if len(problems) > 1:
        raise InvalidSettings("scheduler", "asha", f"none for a sweep of both problems, {' and '.join(problems)}")
    return f"delta_{ESTIMATORS[problems[0]][0]}"


def gpus_of(arguments: argparse.Namespace, of_profile: float) -> float:
    """GPUs of one trial. Raises InvalidSettings where a GPU is asked for and this machine, alone, has none."""
    asked = arguments.gpus_per_trial
    if asked is not None and not 0 <= asked < float("inf"):
        raise InvalidSettings("gpus_per_trial", asked, "0 or more; a fraction lets trials share a GPU")
    if arguments.device == "cpu":
        if asked:
            raise InvalidSettings("gpus_per_trial", asked, "0 with --device cpu")
        return 0.0
    gpus = asked if asked is not None else of_profile or float(arguments.device == "cuda")
    if arguments.device == "cuda" and not gpus:
        raise InvalidSettings("gpus_per_trial", gpus, "above 0 with --device cuda")
    if gpus and arguments.address is None and not torch.cuda.is_available() and not _runs_nothing(arguments):
        allowed = "cpu: this machine has no CUDA device that torch sees; say --device cpu, or --address of a cluster"
        raise InvalidSettings("device", arguments.device or "cuda", allowed)
    return gpus


def _runs_nothing(arguments: argparse.Namespace) -> bool:
    return arguments.dry_run or arguments.report_only


def _whole(store: SweepStore) -> bool:
    return all(store.done(pack) for pack in range(len(store.plan.packs)))


def describe(plan: SweepPlan) -> str:
    """What will be run, in one line."""
    axes = {axis: values for axis in AXES if len(values := plan.settings["axes"].get(axis, ())) > 1}
    told = "; ".join(f"{axis} {', '.join(spelled(axis, value) for value in values)}" for axis, values in axes.items())
    steps = sum(trial["num_steps"] for trial in plan.trials)
    return (
        f"sweep {short(plan.digest)}: {len(plan.trials)} models in {len(plan.packs)} packs, {steps:,} steps of "
        f"training in all ({told or 'no axis'})"
    )


def command_of(plan: SweepPlan) -> str:
    """A command that makes this plan; the place is left open."""
    settings = plan.settings
    profile = PROFILES[settings["profile"]]
    words = ["python", "-m", "jobs.sweep_tasks", "--profile", settings["profile"]]
    for axis in AXES:
        values = settings["axes"].get(axis)
        if values is not None and list(profile.axes.get(axis, ())) != values:
            words += [option_of(axis), ",".join("inf" if value is None else str(value) for value in values)]
    if settings["pack"] != profile.pack:
        words += ["--pack", str(settings["pack"])]
    if settings["sample"] is not None:
        words += ["--sample", str(settings["sample"]["points"]), "--sample-seed", str(settings["sample"]["seed"])]
    return f"{shlex.join(words)} --out OUT"


def write_report(store: SweepStore, table: pa.Table, *, partial: bool = False) -> Findings:
    """Figures and the page beside the table, replaced if they are there; prints what the sweep says."""
    findings = Findings(Results(trials_of(store.plan), table), store.plan.settings["profile"])
    files = Files.at(store.address)
    notes = [_PARTIAL] if partial else []
    drawn: list[Picture] = []
    try:
        drawn = pictures(findings)
    except NotSupported as error:
        notes.append(f"Figures are missing: {error}.")
    for one in drawn:
        files.write(f"figures/{one.name}.png", one.png)
    page = page_of(findings, drawn, command=command_of(store.plan), digest=store.plan.digest, notes=notes)
    files.write("report.html", page.html().encode())
    print("\n".join(("", *summary_of(findings)[1:], *notes)))
    print(f"report: {files.path_of('report.html')}", flush=True)
    return findings


def option_of(axis: str) -> str:
    return _SPELLINGS.get(axis, "--" + axis.replace("_", "-"))


def add_run_options(p: argparse.ArgumentParser, profiles: Mapping[str, Any]) -> None:
    """What every sweep's command takes: what it runs, where it is kept, and on which machines."""
    p.add_argument("--profile", help="; ".join(f"{name}: {one.about}" for name, one in profiles.items()))
    p.add_argument("--out", required=True, metavar="URI", help="folder or pyarrow.fs URI, reachable from every node")
    p.add_argument("--resume", action="store_true", help="go on with the sweep at OUT; it knows its own axes")
    p.add_argument("--dry-run", action="store_true", help="say what would be run")
    p.add_argument("--report-only", action="store_true", help="make the report from what OUT holds, run nothing")
    where = p.add_argument_group("where")
    where.add_argument("--workers", type=int, help="packs that train at a time; the table does not depend on it")
    where.add_argument("--device", choices=["cpu", "cuda"], help="(cuda where GPUs are asked for)")
    where.add_argument("--gpus-per-trial", type=float, metavar="GPUS", help="of one pack; 0.5: two packs share a GPU")
    where.add_argument("--cpus-per-trial", type=float, default=1.0, metavar="CPUS")
    where.add_argument("--address", help="of a Ray cluster, or auto (default: Ray is started here, and stopped)")


def parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m jobs.sweep_tasks",
        description=about + "\n\n" + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_run_options(p, PROFILES)
    how = p.add_argument_group("how")
    how.add_argument("--pack", type=int, metavar="MODELS", help="models trained as one, at most")
    how.add_argument("--sample", type=int, metavar="POINTS", help="so many points of the grid, at random, not all")
    how.add_argument("--sample-seed", type=int, metavar="SEED", help="of that choice (0)")
    how.add_argument(
        "--scheduler", choices=["none", "asha"], default="none", help="asha stops the worse: no promise about the table"
    )
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    axes = p.add_argument_group("axes", "one value or several with commas between; those not given are the profile's")
    for axis, about in AXES.items():
        axes.add_argument(option_of(axis), dest=axis, metavar="A,B,...", help=about)
    return p


if __name__ == "__main__":
    sys.exit(main())
