"""A pack of models of one shape, trained as one and measured; what a sweep's trial runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from metasepia.diversity.measures import SPLITS, Evaluation, Problem, Row, Shared
from metasepia.diversity.trial import SHARED_IN_PACK, DiversityTrial
from metasepia.stacked.regressor import StackedRegressor
from metasepia.stacked.training import StackedAdam, StackedTraining, triangle
from metasepia.sweeps.plan import check_pack
from metasepia.sweeps.store import ROWS
from metasepia.synthetic.regression import batches_of_many

_FORWARD_SEQUENCES = 512
"""Sequences a model answers at a time when measured; fixed, so that rounding is too."""
_DRAWN_STEPS = 16
"""Steps whose batches are drawn together: few large operations instead of many small ones, the same numbers."""


class DiversityPack:
    """The trials of one pack (`metasepia.sweeps.plan.PackWork`). A pure function of them, the device type and torch.

    A model whose loss stops being finite stays as it is and is recorded as diverged; its neighbours go on.
    """

    def __init__(self, trials: Sequence[Mapping[str, Any]], device: str = "cpu") -> None:
        self.trials = tuple(DiversityTrial.from_json(trial) for trial in trials)
        check_pack(self.trials, SHARED_IN_PACK)
        first = self.trials[0]
        self.device = torch.device(device)
        self.stops = first.stops
        self._problems = [trial.tasks for trial in self.trials]
        self._seeds = [trial.seeds for trial in self.trials]
        self._model = StackedRegressor(
            first.shape, first.dims, [trial.model_seed for trial in self.trials], first.layout
        ).to(self.device)
        self._adam = StackedAdam(
            self._model,
            learning_rate=[trial.learning_rate for trial in self.trials],
            weight_decay=[trial.weight_decay for trial in self.trials],
        )
        self._training = StackedTraining(
            self._model, self._adam, self._losses, triangle(first.num_steps, first.warmup_share)
        )
        self._drawn: tuple[int, Tensor, Tensor] | None = None
        self._evaluations: list[Evaluation] | None = None

    @property
    def step(self) -> int:
        return self._training.step

    def advance(self, until: int) -> None:
        self._training.advance(until)

    def _losses(self, step: int) -> Tensor:
        x, y = self._batch(step)
        output = self._model(x, y)
        if self.trials[0].problem == "logistic":
            losses = F.binary_cross_entropy_with_logits(output, y, reduction="none")
        else:
            losses = (output - y).square()
        return losses.flatten(1).mean(1)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """x and y of this step, drawn for `_DRAWN_STEPS` steps together."""
        first = step - step % _DRAWN_STEPS
        if self._drawn is None or self._drawn[0] != first:
            steps = range(first, first + _DRAWN_STEPS)
            batch_size = self.trials[0].batch_size
            batch = batches_of_many(self._problems, self._seeds, steps, num_sequences=batch_size, device=self.device)
            self._drawn = first, batch.x, batch.y
        _, x, y = self._drawn
        return x[step - first], y[step - first]

    def measure(self) -> pa.Table:
        """One row a figure; a diverged model has one row, `diverged`: the step whose loss was not finite."""
        last = self.step >= self.stops[-1]
        outputs = {
            split: self._answers([evaluation.problems[split] for evaluation in self._evaluated()]) for split in SPLITS
        }
        ways = self._path_rows() if last else [[] for _ in self.trials]
        made: list[tuple[object, ...]] = []
        for i, (evaluation, diverged) in enumerate(
            zip(self._evaluated(), self._training.diverged.tolist(), strict=True)
        ):
            if diverged < 0 and not all(output[i].isfinite().all() for output in outputs.values()):
                diverged = self.step  # the last update broke it: no loss has said so yet, the next one would
            rows = [*evaluation.rows({split: output[i] for split, output in outputs.items()}, last=last), *ways[i]]
            if diverged >= 0:
                rows = [Row("diverged", "", -1, float(diverged))]
            status = "ok" if diverged < 0 else "diverged"
            made += [(i, self.step, row.metric, row.position, row.split, row.value, status) for row in rows]
        columns = map(list, zip(*made, strict=True))
        return pa.table(dict(zip(ROWS.names, columns, strict=True)), schema=ROWS)

    def _path_rows(self) -> list[list[Row]]:
        """The interpolation path of each model; all go together, as they do in training."""
        paths = [evaluation.paths() for evaluation in self._evaluated()]
        # A model without a path answers another's questions, for the stack's sake; nobody reads its answers.
        stand_in = next((path for path in paths if path), {})
        answers = {
            alpha: self._answers([path.get(alpha, problem) for path in paths]) for alpha, problem in stand_in.items()
        }
        return [
            evaluation.path_rows({alpha: answer[i] for alpha, answer in answers.items()}, path)
            for i, (evaluation, path) in enumerate(zip(self._evaluated(), paths, strict=True))
        ]

    def _evaluated(self) -> list[Evaluation]:
        if self._evaluations is None:
            shared: Shared = {}
            self._evaluations = [Evaluation(trial, self.device, shared=shared) for trial in self.trials]
        return self._evaluations

    @torch.no_grad()
    def _answers(self, problems: Sequence[Problem]) -> Tensor:
        """[models, batch, points]: each model on its own sequences."""
        x, y = torch.stack([p.x for p in problems]), torch.stack([p.y for p in problems])
        parts = [
            self._model(x[:, i : i + _FORWARD_SEQUENCES], y[:, i : i + _FORWARD_SEQUENCES])
            for i in range(0, x.shape[1], _FORWARD_SEQUENCES)
        ]
        return torch.cat(parts, dim=1)

    def state(self) -> dict[str, Tensor]:
        return self._training.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._training.restore(dict(state))
