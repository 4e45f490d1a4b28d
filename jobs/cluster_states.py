"""How hidden states come to tell tasks apart: sweeps on Ray Tune over small models, or the layers of a backbone.

    python -m jobs.cluster_states --mode synthetic --profile laptop --out runs/states
    python -m jobs.cluster_states --mode synthetic --resume --out runs/states
    python -m jobs.cluster_states --mode synthetic --out runs/mine --tasks 4,8,16 --layers 2,5 --seeds 0,1,2
    python -m jobs.cluster_states --mode backbone --texts DIR --out runs/layers

`synthetic` trains causal models from scratch on simplified instruction tasks and looks at every layer along training;
`backbone` asks which layers of a pretrained one tell the tasks of DIR apart (its options: --mode backbone --help). OUT
of `synthetic` is a folder or a `pyarrow.fs` URI: table.parquet, report.html, figures/. A sweep that was stopped or
killed goes on with `--resume`, here or elsewhere, to the same table, byte for byte, whatever the number of workers.
Axes given on the command line are crossed in full and replace what the profile varies. Needs Ray, and matplotlib (the
extra `train`) for figures.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

import torch

from jobs.sweep_tasks import add_run_options, gpus_of
from metasepia.digests import short
from metasepia.errors import InvalidSettings, MetasepiaError, NotSupported
from metasepia.instructions import report
from metasepia.instructions.profiles import AXES, PROFILES, plan_of, trials_of, values_of
from metasepia.instructions.results import Table
from metasepia.instructions.work import kept_of
from metasepia.sweeps.files import Files
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.store import MANIFEST, SweepStore

WORK = "metasepia.instructions.work:InstructionPack"
MODES = ("synthetic", "backbone")
OPTIONS = {
    "num_tasks": "--tasks",
    "num_keywords": "--keywords",
    "seed": "--seeds",
    "width": "--width",
    "layers": "--layers",
    "mask": "--mask",
}
"""How axes are called on the command line."""
FIXED = {"num_steps": "--steps", "batch_size": "--batch-size", "measured_sequences": "--measured-sequences"}
"""Settings that hold for all trials, whole numbers."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--mode", choices=MODES, default="synthetic")
    if first.parse_known_args(argv)[0].mode == "backbone":
        from jobs import cluster_backbone

        of_backbone = _parser(cluster_backbone.__doc__)
        cluster_backbone.add_arguments(of_backbone)
        return cluster_backbone.run(of_backbone.parse_args(argv))
    # Reports look at small models; a backbone's threads are its own mode's to choose.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        return synthetic(parser().parse_args(argv))
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2


def synthetic(arguments: argparse.Namespace) -> int:
    """Runs or goes on with a sweep, then writes its report."""
    plan = plan_from(arguments)
    profile = PROFILES[plan.settings["profile"]]
    workers = profile.workers if arguments.workers is None else arguments.workers
    gpus = gpus_of(arguments, 0.0)
    steps = sum(trial["num_steps"] for trial in plan.trials)
    print(
        f"sweep {short(plan.digest)}: {len(plan.trials)} models in {len(plan.packs)} packs, {steps:,} steps in all",
        flush=True,
    )
    if arguments.dry_run:
        return 0
    if not arguments.report_only:
        # Here and not above: everything that is refused is refused before Ray is imported, which takes a second.
        from jobs.sweeping import run_sweep

        swept = run_sweep(
            plan,
            arguments.out,
            WORK,
            workers=workers,
            gpus_per_trial=gpus,
            cpus_per_trial=arguments.cpus_per_trial,
            address=arguments.address,
            progress=not arguments.quiet,
        )
        print(f"table: {swept.table}", flush=True)
    write_report(SweepStore.read(arguments.out))
    return 0


def plan_from(arguments: argparse.Namespace) -> SweepPlan:
    """The sweep that was asked for, or with `--resume` and no axis the one stored at OUT.

    Raises InvalidSettings where OUT holds a sweep and `--resume` was not said, or none and it was.
    """
    axes = {axis: values_of(axis, text) for axis in AXES if (text := getattr(arguments, axis)) is not None}
    fixed = {name: value for name in FIXED if (value := getattr(arguments, name)) is not None}
    said = axes or fixed or arguments.profile or arguments.pack is not None
    going_on = arguments.resume or arguments.report_only
    stored = Files.at(arguments.out).exists(MANIFEST)
    if going_on and not stored:
        raise InvalidSettings(
            "out", arguments.out, f"a sweep's folder, with its {MANIFEST}; there is none to go on with"
        )
    if stored and not going_on and not arguments.dry_run:
        held = SweepStore.read(arguments.out).plan
        allowed = f"a new folder, or add --resume: this one holds the sweep {short(held.digest)} of kind {held.kind}"
        raise InvalidSettings("out", arguments.out, allowed)
    if going_on and not said:
        plan = SweepStore.read(arguments.out).plan
        trials_of(plan)
        return plan
    return plan_of(arguments.profile or "laptop", axes, fixed=fixed, pack_size=arguments.pack)


def command_of(plan: SweepPlan) -> str:
    """A command that makes this plan; the place is left open."""
    settings = plan.settings
    words = ["python", "-m", "jobs.cluster_states", "--mode", "synthetic", "--profile", settings["profile"]]
    for axis, values in settings["axes"].items():
        words += [OPTIONS[axis], ",".join(map(str, values))]
    for name, value in settings["fixed"].items():
        words += [FIXED[name], str(value)]
    if settings["pack"] != PROFILES[settings["profile"]].pack:
        words += ["--pack", str(settings["pack"])]
    return f"{shlex.join(words)} --out OUT"


def write_report(store: SweepStore) -> None:
    """Figures and the page beside the table, replaced if they are there; prints what the sweep says.

    Of a sweep that is not finished, trials that have not ended are left out.
    """
    plan, files = store.plan, Files.at(store.address)
    trials = trials_of(plan)
    done = [pack for pack in range(len(plan.packs)) if store.done(pack)]
    if not done:
        raise InvalidSettings("out", store.uri, "a sweep with at least one finished pack; --resume goes on with it")
    notes = []
    if len(done) < len(plan.packs):
        notes.append(f"{len(done)} of {len(plan.packs)} packs are finished; the others are left out.")
    table = Table(store.table(partial=bool(notes)), trials, [one for pack in done for one in plan.packs[pack]])
    pack_of = {plan.packs[pack][0]: pack for pack in done}
    kept = {}
    for trial in report.drawn_trials(table, list(pack_of)):
        latest = store.latest(pack_of[trial], trials[trial].stops)
        kept |= {trial: kept_of(latest[1])} if latest is not None else {}
    drawn: dict[str, report.Picture] = {}
    try:
        drawn = report.pictures(table, kept)
    except NotSupported as error:
        notes.append(f"Figures are missing: {error}.")
    for name, (png, _, _) in drawn.items():
        files.write(f"figures/{name}", png)
    page = report.page_of(plan, table, drawn, command_of(plan), notes)
    files.write("report.html", page.html().encode())
    print("\n".join(("", *report.findings(report.first_groups(report.groups_of(table))), *notes)))
    print(f"report: {files.path_of('report.html')}", flush=True)


def _parser(about: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m jobs.cluster_states",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--mode", choices=MODES, default="synthetic")
    return made


def parser() -> argparse.ArgumentParser:
    """Of `--mode synthetic`."""
    p = _parser(__doc__)
    add_run_options(p, PROFILES)
    how = p.add_argument_group("how")
    how.add_argument("--pack", type=int, metavar="MODELS", help="models trained as one, at most")
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    axes = p.add_argument_group("axes", "one value or several with commas between")
    for axis, about in AXES.items():
        axes.add_argument(OPTIONS[axis], dest=axis, metavar="A,B,...", help=about)
    fixed = p.add_argument_group("for all trials")
    for name, option in FIXED.items():
        fixed.add_argument(option, dest=name, type=int, metavar="N")
    return p


if __name__ == "__main__":
    sys.exit(main())
