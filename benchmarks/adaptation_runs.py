"""Training runs of `benchmarks.adaptation`, each kept in a file of its own, and intervals over seeds and questions."""

import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.tasks import Example, Task
from jobs.training import LORA_LAYERS, TrainingRun, train
from jobs.workbench import EXPERT_LAYERS, HELD_OUT_SEED, Workbench, evaluate
from metasepia.digests import digest_of
from metasepia.experts.lora import LoraAdapter, read_adapter
from metasepia.experts.vectors import ExpertVectors

RESAMPLES = 10_000
KINDS: Mapping[str, tuple[str, ...]] = {
    "mlp": EXPERT_LAYERS,
    "attention": LORA_LAYERS,
    "both": (*EXPERT_LAYERS, *LORA_LAYERS),
}
"""Linear layers that are trained, by the paper's words; attention is q and v there too."""

Right = Mapping[str, Sequence[bool]]
Made = tuple[dict[str, Any], ExpertVectors | LoraAdapter | None]
"""What goes into a run's file, `right` among it, and the adapter, if any."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides one training run, beside its task's data."""

    task: str
    adapter: Literal["svf", "lora"] = "svf"
    method: Literal["sft", "reinforce"] = "sft"
    kind: Literal["mlp", "attention", "both"] = "mlp"
    seed: int = 0
    steps: int
    batch: int
    first_block: int

    @property
    def slug(self) -> str:
        return f"{self.task}-{self.adapter}-{self.method}-{self.kind}-s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Answers to the held-out questions, the same for every run of a task."""

    right: Right
    """By measure: `exact`, the whole greedy answer, and of label tasks `choice`, the likeliest label."""
    groups: Sequence[str]
    parameters: int = 0
    cpu_s: float = 0.0
    """Of training."""
    adapter: ExpertVectors | LoraAdapter | None = None
    kept: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """All that its file holds."""

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(sorted(self.right, reverse=True))

    def accuracy(self, measure: str = "exact") -> float:
        return float(np.mean(self.right[measure]))


class Runs:
    """Trains what has not been trained yet; a killed benchmark loses the run it was in."""

    def __init__(self, folder: Path, bench: Workbench, tasks: Mapping[str, Task], num_held_out: int) -> None:
        self.folder, self.bench, self.tasks, self.num_held_out = folder, bench, tasks, num_held_out
        folder.mkdir(parents=True, exist_ok=True)

    def held_out(self, task: str) -> list[Example]:
        return self.tasks[task].held_out(self.num_held_out, HELD_OUT_SEED)

    def base(self, task: str) -> Outcome:
        def asked() -> Made:
            return {"right": evaluate(self.bench, self.tasks[task], self.held_out(task), None)}, None

        return self.once(task, f"{task}-base", {}, asked)

    def expert(self, plan: Plan) -> Outcome:
        """A trained adapter and how it does."""
        layers, task = KINDS[plan.kind], self.tasks[plan.task]
        run = TrainingRun(
            task=task,
            adapter=plan.adapter,
            method=plan.method,
            layers=layers,
            first_block=plan.first_block,
            steps=plan.steps,
            batch=plan.batch,
            schedule="cosine",
            seed=plan.seed,
            valid=0,
            choice_steps=plan.steps if plan.method == "reinforce" and task.labels else 0,
            home=self.bench.home,
        )
        first, last = (task.batch("train", plan.batch, plan.seed, step) for step in (0, plan.steps - 1))
        learnt = digest_of({"examples": [[one.prompt, one.answer] for one in (*first, *last)]})

        def trained() -> Made:
            made = train(run, self.bench, progress=False)
            right = evaluate(self.bench, task, self.held_out(plan.task), made.adapter, layers)
            result = {"parameters": made.num_parameters, "cpu_s": round(made.cpu_s, 1), "stopped": made.stopped}
            return {"right": right, **result, "log": made.log}, made.adapter

        return self.once(plan.task, plan.slug, {"plan": dataclasses.asdict(plan), "learnt": learnt}, trained)

    def once(self, task: str, slug: str, decides: Mapping[str, Any], make: Callable[[], Made]) -> Outcome:
        """`kept`, of answers to the held-out questions of a task."""
        questions = digest_of({"questions": [[one.prompt, one.answer] for one in self.held_out(task)]})
        kept, adapter = self.kept(slug, {"questions": questions, **decides}, make)
        return Outcome(
            right=kept["right"],
            groups=[one.group for one in self.held_out(task)],
            parameters=kept.get("parameters", 0),
            cpu_s=kept.get("cpu_s", 0.0),
            adapter=adapter,
            kept=kept,
        )

    def kept(
        self, slug: str, decides: Mapping[str, Any], make: Callable[[], Made]
    ) -> tuple[dict[str, Any], ExpertVectors | LoraAdapter | None]:
        """What `make` gives, from its file if it was made before with all that `decides` it.

        Several processes may work on one folder: a run that another has begun is waited for.
        """
        header = {"backbone": self.bench.prepared.digest, **decides}
        path = self.folder / f"{slug}-{digest_of(header)[:12]}.json"
        blob = path.with_suffix(".safetensors")
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                began = time.perf_counter()
                result, adapter = make()
                if adapter is not None:  # first: a result without its adapter would never be completed
                    blob.write_bytes(adapter.to_bytes())
                wall_s = round(time.perf_counter() - began, 1)
                scratch = path.with_suffix(".tmp")
                scratch.write_text(json.dumps({**header, **result, "wall_s": wall_s}) + "\n")
                scratch.replace(path)
                of = {measure: round(float(np.mean(own)), 3) for measure, own in result.get("right", {}).items()}
                print(f"{time.strftime('%H:%M:%S')} {slug}: {of or 'done'} ({wall_s:.0f} s)", flush=True)
        adapter = read_adapter(blob.read_bytes(), slug) if blob.is_file() else None
        return json.loads(path.read_text()), adapter


def gain_over(
    ours: Sequence[Outcome], against: Sequence[Outcome], measure: str = "exact"
) -> tuple[float, float, float]:
    """Mean difference in accuracy and its 95 % interval, (gain, low, high).

    A percentile bootstrap over groups of questions, the same for both sides, and over the seeds of each side, so that
    the interval covers other questions and other runs. With three seeds the latter is coarse.
    """
    groups = ours[0].groups
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    member = np.zeros((len(groups), len(names)))
    member[np.arange(len(groups)), [names[one] for one in groups]] = 1
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    sizes = counts @ member.sum(0)
    sides = []
    for side in (ours, against):
        of_groups = np.asarray([one.right[measure] for one in side], float) @ member
        means = (counts @ of_groups.T) / sizes[:, None]
        drawn = rng.integers(len(side), size=(RESAMPLES, len(side)))
        sides.append(np.take_along_axis(means, drawn, axis=1).mean(1))
    gain = float(np.mean([one.accuracy(measure) for one in ours]) - np.mean([one.accuracy(measure) for one in against]))
    low, high = np.quantile(sides[0] - sides[1], [0.025, 0.975])
    return gain, float(low), float(high)
