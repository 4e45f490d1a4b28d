"""Do hidden states fall into clusters by task while a model learns, and does it answer by them? Medians over seeds.

    python -m benchmarks.clustering
    python -m benchmarks.clustering --sweep runs/states --json benchmarks/results/clustering.json

Trains the models of `jobs.cluster_states --profile laptop` that have 8 tasks, 40 keywords, 5 blocks and width 64, under
each mask, here and without Ray, one pack a mask; or reads them from that sweep, finished. Each bound stands in its
row's note; the command exits with 1 where one is not reached. Figures depend on seeds, torch and the kind of processor,
not on how busy the machine is.
"""

import sys
import time
from collections.abc import Sequence

import pyarrow as pa
import torch

from benchmarks import report
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.instructions.claims import CLAIMS
from metasepia.instructions.model import MASKS
from metasepia.instructions.profiles import PROFILES, trials_of, values_of
from metasepia.instructions.results import Summary, Table, kinds, medians
from metasepia.instructions.trial import InstructionTrial
from metasepia.instructions.work import InstructionPack
from metasepia.sweeps.store import SweepStore

BASE = {name: values[0] for name, values in PROFILES["laptop"].base.items()} | {"seed": 0}


def trained(trials: Sequence[InstructionTrial]) -> tuple[Table, dict[str, float]]:
    """One pack from start to end, as a sweep runs it, and its processor seconds for training and for measuring."""
    work = InstructionPack([trial.to_json() for trial in trials])
    measured: list[pa.Table] = []
    spent = {"training": 0.0, "measuring": 0.0}
    for stop in work.stops:
        began = time.process_time()
        work.advance(stop)
        between = time.process_time()
        measured.append(work.measure())
        spent["training"] += between - began
        spent["measuring"] += time.process_time() - between
    return Table(pa.concat_tables(measured), trials), spent


def rows_of(found: dict[str, list[Summary]]) -> tuple[list[report.Row], list[str]]:
    """A row a claim, and what is not reached, a seed that diverged too. `found`: by mask, a summary a seed."""
    rows: list[report.Row] = []
    missed = [
        f"mask {mask}: {gone} of {len(each)} seeds diverged, and medians are without them"
        for mask, each in found.items()
        if (gone := sum(one.diverged >= 0 for one in each))
    ]
    for claim in CLAIMS:
        value = medians(found[claim.mask])[claim.figure]
        seeds = [getattr(one, claim.figure) for one in found[claim.mask] if one.diverged < 0]
        held = claim.holds(value)
        note = f"held to {claim.reach}" if claim.is_bound else "measured, no bound"
        spread = f"; seeds {min(seeds):.3f} to {max(seeds):.3f}" if seeds else "; all seeds diverged"
        rows.append(
            report.figure(
                f"{claim.figure}-{claim.mask}", claim.what, value, "", note + spread, part="synthetic",
                extra={"seeds": seeds, "mask": claim.mask, "reached": held},
            )
        )  # fmt: skip
        if held is False:
            missed.append(f"{claim.what}: {value:.3f}, held to {claim.reach}")
    return rows, missed


def from_sweep(uri: str) -> dict[str, list[Summary]]:
    """By mask, the summaries of the laptop profile's first setting in a finished sweep.

    Raises InvalidSettings for a sweep that is not finished or has no such models.
    """
    store = SweepStore.read(uri)
    trials = trials_of(store.plan)
    table = Table(store.table(), trials)
    found: dict[str, list[Summary]] = {}
    for trial, members in kinds(table).items():
        if trial == InstructionTrial.from_json({**BASE, "mask": trial.mask}):
            found[trial.mask] = [table.summary(one) for one in members]
    if lacking := [mask for mask in MASKS if mask not in found]:
        raise InvalidSettings("sweep", uri, f"one with the laptop's first models under the mask {lacking[0]} too")
    return found


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--sweep", metavar="URI", help="read the figures from this finished sweep, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started_on = report.machine()
    try:
        found, costs = (
            (from_sweep(arguments.sweep), []) if arguments.sweep else here(values_of("seed", arguments.seeds))
        )
    except MetasepiaError as error:
        sys.exit(str(error))
    rows, missed = rows_of(found)
    report.publish("clustering", rows + costs, json_file=arguments.json, started_on=started_on)
    if missed:
        sys.exit("not reached: " + "; ".join(missed))


def here(seeds: Sequence[int]) -> tuple[dict[str, list[Summary]], list[report.Row]]:
    """Trains a pack a mask: summaries by mask, and rows of what it cost."""
    found: dict[str, list[Summary]] = {}
    costs: list[report.Row] = []
    for mask in MASKS:
        trials = [InstructionTrial.from_json({**BASE, "mask": mask, "seed": seed}) for seed in seeds]
        table, spent = trained(trials)
        found[mask] = [table.summary(index) for index in range(len(trials))]
        for what, seconds in spent.items():
            costs.append(
                report.figure(
                    f"{what}-{mask}", f"{what}, one model of {trials[0].num_steps} steps, mask {mask}",
                    seconds / len(trials), "s CPU", f"{len(trials)} models as one, one thread",
                    part="synthetic", detail=True,
                )
            )  # fmt: skip
    return found, costs


if __name__ == "__main__":
    main()
