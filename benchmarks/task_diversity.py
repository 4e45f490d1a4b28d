"""Task diversity: the two regimes and the crossing between them, from a sweep of the profile `laptop`.

    python -m benchmarks.task_diversity --sweep runs/laptop
    python -m benchmarks.task_diversity --sweep runs/evening --profile evening

Reads the finished sweep at `--sweep`; one that is not there, or not finished, is run first (laptop: about 25 minutes on
two cores). Distances and errors are noiseless, divided by D, means over seeds after the last step. The oracles are the
two Bayesian estimators, exact in float64: dMMSE, which knows the pool of tasks, and ridge, which knows the prior alone.
"""

import time
from collections.abc import Sequence

import numpy as np

from benchmarks import report
from jobs import sweep_tasks
from metasepia.diversity.findings import MEMORISED, Claim, Findings, seed_ratios
from metasepia.diversity.profiles import PROFILES, trials_of
from metasepia.diversity.results import Group, Results, spelled, tasks_spelled, words_of
from metasepia.errors import InvalidSettings
from metasepia.sweeps.files import Files
from metasepia.sweeps.store import MANIFEST, SweepStore


def rows_of(findings: Findings, *, wall_s: float | None = None) -> list[report.Row]:
    """The bounds of the first group, errors by M, and what moves the crossing."""
    group = findings.results.groups[0]
    if group.problem != "linear":
        raise InvalidSettings("sweep", group.problem, "a sweep of linear problems: the bounds are of those")
    made = [_claimed(claim, group, findings.profile) for claim in findings.claims if claim.holds is not None]
    for m in group.by_tasks:
        error, ridge = group.mean("error", "new", m), group.mean("ridge_error", "new", m)
        nearer = group.mean("delta_ridge", "new", m) < group.mean("delta_dmmse", "new", m)
        made.append(
            report.duration(
                f"diversity-new-{'inf' if m is None else m}",
                f"M = {tasks_spelled(m)}, new tasks: the model's error and ridge's",
                error,
                ridge,
                "squared error / D",
                f"{'nearer ridge' if nearer and m is not None else ''}",
                part=findings.profile,
                detail=True,
            )
        )
    made += [
        report.figure(
            f"diversity-moves-{moved.axis}-{moved.split}-{spelled(moved.axis, moved.values[1])}",
            f"{words_of(moved.axis)} {spelled(moved.axis, moved.values[0])} to {spelled(moved.axis, moved.values[1])}"
            f"{f' ({moved.rest})' if moved.rest else ''}: the crossing on {moved.split} tasks",
            moved.move.log2_difference,
            "doublings of M",
            moved.move.text,
            part=findings.profile,
            detail=moved.split != "new",
        )
        for moved in findings.moves
        if np.isfinite(moved.move.log2_difference)
    ]
    if wall_s is not None:
        made.append(
            report.figure(
                "diversity-minutes",
                f"the whole sweep, {len(findings.results.trials)} models",
                wall_s / 60,
                "min",
                part=findings.profile,
            )
        )
    return made


def _claimed(claim: Claim, group: Group, profile: str) -> report.Row:
    parts = {
        "kept": ("delta_ridge", "delta_dmmse", "pretraining", MEMORISED),
        "lost": ("error", "ridge_error", "new", MEMORISED),
        "learnt": ("error", "ridge_error", "new", None),
    }
    verdict = "holds" if claim.holds else "missed"
    by_seed = seed_ratios(group, *parts[claim.id]) if claim.id in parts else []
    each = f"; by seed {', '.join(f'{one:.3g}' for one in by_seed)}" if len(by_seed) > 1 else ""
    note = f"reach {claim.bound}: {verdict}{each}" + (f"; {claim.note}" if claim.note else "")
    unit = {"crossing": "tasks", "dimension": "doublings of M"}.get(claim.id, "times")
    extra = {"holds": claim.holds, "by_seed": by_seed}
    return report.figure(f"diversity-{claim.id}", claim.what, claim.value, unit, note, part=profile, extra=extra)


def findings_at(uri: str, profile: str) -> tuple[Findings, float | None]:
    """What the sweep there says, and how long it took if it was run, whole, by this call."""
    wall_s = None
    exists = Files.at(uri).exists(MANIFEST)
    store = SweepStore.read(uri) if exists else None
    if store is None or not all(store.done(pack) for pack in range(len(store.plan.packs))):
        began = time.monotonic()
        status = sweep_tasks.main(["--out", uri, *(["--resume"] if exists else ["--profile", profile])])
        if status:
            raise SystemExit(status)
        wall_s = None if exists else time.monotonic() - began
        store = SweepStore.read(uri)
    found = store.plan.settings.get("profile")
    if found != profile:
        raise InvalidSettings("sweep", uri, f"a sweep of the profile {profile}; it is one of {found}: say --profile")
    return Findings(Results(trials_of(store.plan), store.table()), profile), wall_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--sweep", default="runs/laptop", metavar="URI", help="a sweep's folder; run if it is not there"
    )
    parser.add_argument("--profile", default="laptop", choices=sorted(PROFILES))
    arguments = parser.parse_args(argv)
    started_on = report.machine()
    findings, wall_s = findings_at(arguments.sweep, arguments.profile)
    rows = rows_of(findings, wall_s=wall_s)
    report.publish("task_diversity", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
