"""A pack of models of one shape, trained as one and looked into; what a sweep's trial runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from metasepia.instructions.measures import Evaluation, Figure, Seen
from metasepia.instructions.model import InstructionModel
from metasepia.instructions.tasks import draw
from metasepia.instructions.trial import SHARED_IN_PACK, InstructionTrial
from metasepia.stacked.training import StackedAdam, StackedTraining
from metasepia.sweeps.plan import check_pack
from metasepia.sweeps.store import ROWS

DRAWN_POINTS = 200
"""Sequences whose states are kept to be drawn."""
_KEPT = "kept/"


class InstructionPack:
    """The trials of one pack (`metasepia.sweeps.plan.PackWork`). A pure function of them, the device type and torch.

    Beside the training's tensors `state` holds `kept/STEP`: the first trial's hidden states of unseen strings, [layers,
    points, positions, width], at a few steps up to now, for pictures of how they fall into clusters.
    """

    def __init__(self, trials: Sequence[Mapping[str, Any]], device: str = "cpu") -> None:
        """Raises InvalidSettings for no trials, or for two that differ in what a pack shares."""
        self.trials = tuple(InstructionTrial.from_json(trial) for trial in trials)
        check_pack(self.trials, SHARED_IN_PACK)
        first = self.trials[0]
        self.device = torch.device(device)
        self.stops = first.stops
        self._sets, self._seeds = [one.tasks for one in self.trials], [one.seed for one in self.trials]
        num_words = len(first.tasks.vocabulary)
        self.model = InstructionModel(first.shape, num_words, self._seeds, first.mask).to(self.device)
        adam = StackedAdam(
            self.model,
            learning_rate=[trial.learning_rate for trial in self.trials],
            weight_decay=[trial.weight_decay for trial in self.trials],
            clip_norm=first.clip_norm,
        )
        warmup = first.warmup_steps
        self._training = StackedTraining(
            self.model, adam, self._losses, lambda step: min(1.0, (step + 1) / warmup) if warmup else 1.0
        )
        self._kept: dict[int, Tensor] = {}
        self._evaluation: Evaluation | None = None

    @property
    def step(self) -> int:
        return self._training.step

    @property
    def evaluation(self) -> Evaluation:
        if self._evaluation is None:
            self._evaluation = Evaluation(self.trials, self.device)
        return self._evaluation

    def advance(self, until: int) -> None:
        self._training.advance(until)

    def _losses(self, step: int) -> Tensor:
        first = self.trials[0]
        batch = draw(self._sets, self._seeds, step, num_sequences=first.batch_size).to(self.device)
        log_probabilities = self.model(batch.tokens).log_softmax(-1)
        answer = batch.output + first.tasks.first_output
        return -log_probabilities.gather(2, answer[..., None]).squeeze(2).mean(1)

    def measure(self) -> pa.Table:
        """One row a figure; a diverged model has one row, `diverged`: the step whose loss was no number."""
        diverged = [int(step) for step in self._training.diverged.tolist()]
        unseen, seen = self.evaluation.look(self.model, "unseen"), self.evaluation.look(self.model, "seen")
        patched: list[list[Figure]] = [[] for _ in self.trials]
        if self.step in self.trials[0].patched_stops:
            patched = self.evaluation.patched(self.model, seen)
        rows: list[tuple[Any, ...]] = []
        for trial, of_patches in enumerate(patched):
            if diverged[trial] >= 0:
                rows.append((trial, self.step, "diverged", -1, "", float(diverged[trial]), "diverged"))
                continue
            for one in (*self._figures(trial, unseen, seen), *of_patches):
                rows.append((trial, self.step, one.metric, one.position, one.split, one.value, "ok"))
        return pa.Table.from_arrays(
            [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), ROWS, strict=True)],
            schema=ROWS,
        )

    def _figures(self, trial: int, unseen: Seen, seen: Seen) -> Iterator[Figure]:
        yield from self.evaluation.answered(seen.logits, "seen", trial)
        yield from self.evaluation.answered(unseen.logits, "unseen", trial)
        yield from self.evaluation.clustered(unseen, trial)

    def state(self) -> dict[str, Tensor]:
        if self.step in self.trials[0].kept_stops and self.step not in self._kept:
            states = self.evaluation.look(self.model, "unseen").states
            self._kept[self.step] = states[:, 0, :DRAWN_POINTS].cpu().contiguous()
        return {**self._training.state(), **{f"{_KEPT}{step}": states for step, states in self._kept.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._kept = kept_of(state)
        self._training.restore({name: tensor for name, tensor in state.items() if not name.startswith(_KEPT)})


def kept_of(state: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The hidden states among a pack's stored tensors, by step."""
    found = {int(name.removeprefix(_KEPT)): tensor for name, tensor in state.items() if name.startswith(_KEPT)}
    return dict(sorted(found.items()))
