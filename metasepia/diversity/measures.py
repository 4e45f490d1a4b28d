"""What is measured of one model: its distance to two Bayesian estimators, on tasks of its pool and on new ones.

One estimator knows the pool (`dmmse`; `discrete` for logistic labels), the other the true prior (`ridge`; `gaussian`).
Differences and errors are squared and noiseless, and for linear problems divided by D, as Raventos et al.
(arXiv:2306.15063) report theirs but for the noise: their loss is ours plus sigma^2 / D. Logistic ones are of
probabilities. Estimators compute in float64, sums too, and in one order: equal models leave equal bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.diversity.trial import DiversityTrial
from metasepia.synthetic import estimators, sampling
from metasepia.synthetic.oracles import Predictive
from metasepia.synthetic.regression import RegressionBatch, path_between

Split = Literal["pretraining", "new"]
SPLITS: tuple[Split, ...] = ("pretraining", "new")
ESTIMATORS: Mapping[str, tuple[str, str]] = {"linear": ("dmmse", "ridge"), "logistic": ("discrete", "gaussian")}
"""By problem: the estimator that knows the pool, and the one that knows the prior alone."""
PATH_ALPHAS = tuple(i / 8 for i in range(9))
MAX_PATHS: Mapping[str, int] = {"linear": 256, "logistic": 64}
"""Pairs of tasks between which models are asked, at most, also at most a quarter of the evaluation sequences. The
Gaussian posterior of logistic labels is sampled, which costs more than all else that is measured."""


@dataclass(frozen=True)
class Row:
    """One figure; position -1 is the mean over all."""

    metric: str
    split: str
    position: int
    value: float


@dataclass(frozen=True)
class Problem:
    """Sequences that models are asked about, and what the two estimators answer."""

    x: Float[Tensor, "batch points dims"]
    y: Float[Tensor, "batch points"]
    target: Float[Tensor, "batch points"]
    answers: Mapping[str, Float[Tensor, "batch points"]]
    standard_error: float
    """Of the prior's estimator where it is Monte Carlo, else 0."""


Shared = dict[int, tuple[RegressionBatch, Predictive]]
"""By seed: sequences of fresh tasks, and the prior's answers, which are the same for every M."""


class Evaluation:
    """The evaluation sequences of one model, made once; `rows` measures its answers to them."""

    def __init__(
        self, trial: DiversityTrial, device: torch.device | str = "cpu", *, shared: "Shared | None" = None
    ) -> None:
        """`shared` is filled with what trials of a pack that have the same seed have in common, and read from."""
        self.trial, self.device = trial, torch.device(device)
        self._shared: Shared = {} if shared is None else shared
        self.problems: dict[str, Problem] = {split: self._problem(split) for split in SPLITS}

    def _problem(self, split: Split) -> Problem:
        trial = self.trial
        fresh = split == "new" or trial.num_tasks is None
        batch, prior = self._shared.get(trial.seed, (None, None)) if fresh else (None, None)
        if batch is None or prior is None:
            batch = trial.tasks.batch(
                trial.measured_seeds,
                0,
                num_sequences=trial.measured_sequences,
                device=self.device,
                of=split,
                stream="evaluation",
            )
            prior = self._prior(batch)
            if fresh:
                self._shared[trial.seed] = batch, prior
        return self._answered(batch, prior)

    def _answered(self, batch: RegressionBatch, prior: Predictive) -> Problem:
        of_pool, of_prior = ESTIMATORS[self.trial.problem]
        # With a fresh task in every sequence the pool is the prior, and the two estimators are one.
        pool = prior.probabilities if self.trial.num_tasks is None else self._pool(batch)
        answers = {of_pool: pool, of_prior: prior.probabilities}
        return Problem(batch.x, batch.y, batch.target.double(), answers, prior.standard_error)

    def _prior(self, batch: RegressionBatch) -> Predictive:
        """What the prior's estimator answers; ridge has no error of its own."""
        trial = self.trial
        if trial.problem == "logistic":
            found = estimators.gaussian_predictive(batch.x, batch.y, trial.scale)
            return Predictive(found.probabilities.double(), found.standard_error)
        return Predictive(estimators.ridge(batch.x, batch.y, trial.noise_variance, trial.scale**2), 0.0)

    def _pool(self, batch: RegressionBatch) -> Tensor:
        pool = self.trial.tasks.pool
        if self.trial.problem == "logistic":
            return estimators.discrete_predictive(batch.x, batch.y, pool)
        return estimators.discrete_mmse(batch.x, batch.y, pool, self.trial.noise_variance)

    def paths(self) -> dict[float, Problem]:
        """Sequences of tasks on the way between two of the pool, by alpha (`regression.path_between`).

        The pairs of tasks are the same at every alpha, x and noise too. Empty for one task: there is no second.
        """
        trial = self.trial
        if trial.num_tasks == 1:
            return {}
        first, second = self._path_ends(max(1, min(MAX_PATHS[trial.problem], trial.measured_sequences // 4)))
        made: dict[float, Problem] = {}
        alphas = torch.tensor(PATH_ALPHAS, dtype=first.dtype, device=self.device)
        for alpha, w in zip(PATH_ALPHAS, path_between(first, second, alphas), strict=True):
            batch = trial.tasks.batch_of_tasks(w, trial.measured_seeds, 1, stream="evaluation")
            made[alpha] = self._answered(batch, self._prior(batch))
        return made

    def _path_ends(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Two tasks a pair, [pairs, dims] each: different ones of the pool; fresh ones where there is none."""
        trial, seeds = self.trial, self.trial.measured_seeds
        if trial.num_tasks is None:
            fresh = trial.tasks.batch(
                seeds, 1, num_sequences=2 * num_pairs, device=self.device, of="new", stream="evaluation"
            ).w
            return fresh[:num_pairs], fresh[num_pairs:]
        index = torch.arange(num_pairs, device=self.device)
        first = sampling.choice(trial.num_tasks, sampling.key_of("path first", seeds.task, 0), index)
        apart = 1 + sampling.choice(trial.num_tasks - 1, sampling.key_of("path second", seeds.task, 0), index)
        pool = trial.tasks.pool
        return pool.at(first), pool.at((first + apart) % trial.num_tasks)

    def rows(self, outputs: Mapping[str, Tensor], *, last: bool) -> list[Row]:
        """Figures of the model's outputs to `problems`, by split: per position and over all; block means if `last`."""
        rows: list[Row] = []
        for split in SPLITS:
            for metric, values in self.figures(self.problems[split], outputs[split]).items():
                rows.append(Row(metric, split, -1, float(values.mean())))
                rows.extend(Row(metric, split, k, value) for k, value in enumerate(values.mean(0).tolist()))
                if last:
                    blocks = values.reshape(self.trial.measured_blocks, -1).mean(1).tolist()
                    rows.extend(Row(block_metric(metric, b), split, -1, value) for b, value in enumerate(blocks))
            if self.trial.problem == "logistic":
                rows.append(Row("gaussian_standard_error", split, -1, self.problems[split].standard_error))
        return rows

    def path_rows(self, outputs: Mapping[float, Tensor], paths: Mapping[float, Problem]) -> list[Row]:
        """Figures along the way between tasks, means over pairs of tasks and positions; outputs by alpha."""
        return [
            Row(path_metric(metric, alpha), "", -1, float(values.mean()))
            for alpha, problem in paths.items()
            for metric, values in self.figures(problem, outputs[alpha]).items()
        ]

    def figures(self, problem: Problem, output: Float[Tensor, "batch points"]) -> dict[str, Tensor]:
        """Each figure of every sequence and position, float64."""
        logistic = self.trial.problem == "logistic"
        answer = torch.sigmoid(output.double()) if logistic else output.double()
        per = 1 if logistic else self.trial.dims
        made = {"error": (answer - problem.target).square() / per}
        for name, theirs in problem.answers.items():
            made[f"delta_{name}"] = (answer - theirs).square() / per
            made[f"{name}_error"] = (theirs - problem.target).square() / per
        of_pool, of_prior = problem.answers.values()
        made["delta_estimators"] = (of_pool - of_prior).square() / per
        if logistic:
            made["log_loss"] = _log_loss(answer, problem.target)
            made |= {f"{name}_log_loss": _log_loss(p, problem.target) for name, p in problem.answers.items()}
        return made


def block_metric(metric: str, block: int) -> str:
    """The name under which the mean of one block of sequences stands in the table."""
    return f"{metric}/block{block:02d}"


def path_metric(metric: str, alpha: float) -> str:
    return f"{metric}/alpha{alpha:.3f}"


def _log_loss(answer: Tensor, probability: Tensor) -> Tensor:
    """Expected over labels of that probability, in nats; answers nearer to 0 or 1 than 1e-9 count as 1e-9."""
    answer = answer.clamp(1e-9, 1 - 1e-9)
    return -(probability * answer.log() + (1 - probability) * torch.log1p(-answer))
