"""What is measured of models in training: accuracy, clusters of hidden states by layer and position, patched answers.

States are read at two positions, because they say different things: at the separator that closes the instruction they
cluster by task, at the last token by output. Strings are unseen ones; centroids come from seen ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia import clustering
from metasepia.instructions import tasks as drawing
from metasepia.instructions.interventions import PATCHES, centroids, move, other_tasks
from metasepia.instructions.model import InstructionModel
from metasepia.instructions.tasks import INSTRUCTION_END, LAST, InstructionBatch
from metasepia.instructions.trial import InstructionTrial
from metasepia.synthetic import sampling

CLUSTERED = ((INSTRUCTION_END, "task"), (LAST, "task"), (LAST, "output"))
"""Where states are clustered, and against which labels. No output is fixed before the input is read."""
RESTARTS, SHUFFLES = 5, 5
POSITIONS = (INSTRUCTION_END, LAST)
ALL = -1


@dataclass(frozen=True)
class Figure:
    """One row of the table, but for trial, step and status."""

    metric: str
    position: int
    split: str
    value: float


def named(score: str, of: str, layer: int) -> str:
    """How a figure of one layer is called in the table, as `ari/task/layer3` or `flips/replace/layer1`."""
    return f"{score}/{of}/layer{layer}"


@dataclass(frozen=True)
class Seen:
    """A forward pass over one batch."""

    logits: Float[Tensor, "models batch words"]
    states: Float[Tensor, "layers models batch positions=2 width"]


class Evaluation:
    """The batches that models of one pack are measured on, drawn once."""

    def __init__(self, trials: Sequence[InstructionTrial], device: torch.device | str) -> None:
        self.trials, self.device = tuple(trials), torch.device(device)
        sets, seeds = [trial.tasks for trial in trials], [trial.seed for trial in trials]
        self.first_output = sets[0].first_output
        size = trials[0].measured_sequences
        self.batches: dict[str, InstructionBatch] = {
            split: drawing.draw(sets, seeds, 0, num_sequences=size, split=split, stream="evaluation").to(self.device)
            for split in drawing.SPLITS
        }
        self.num_tasks = max(trial.num_tasks for trial in trials)
        unseen = self.batches["unseen"]
        index = torch.arange(size)
        targets, shuffled = [], []
        for i, trial in enumerate(trials):
            shift = sampling.choice(trial.num_tasks - 1, sampling.key_of("other tasks", trial.seed, 0), index)
            targets.append(other_tasks(unseen.task[i].cpu(), shift, trial.num_tasks))
            order = sampling.bits(sampling.key_of("shuffled labels", trial.seed, 0), index).argsort()
            shuffled.append(self.batches["seen"].task[i].cpu()[order])
        self._target = torch.stack(targets).to(self.device)
        self._shuffled = torch.stack(shuffled).to(self.device)
        answers = torch.nn.utils.rnn.pad_sequence([tasks.answers() for tasks in sets], batch_first=True)
        model = torch.arange(len(sets))[:, None]
        self._target_output = answers[model, self._target.cpu(), unseen.input.cpu()].to(self.device)

    @torch.no_grad()
    def look(self, model: InstructionModel, split: drawing.Split) -> Seen:
        """Logits, and states of all layers at the two positions."""
        logits, states = model(self.batches[split].tokens, keep=True)
        return Seen(logits, torch.stack([layer[:, :, POSITIONS, :] for layer in states]))

    def answered(self, logits: Float[Tensor, "models batch words"], split: drawing.Split, trial: int) -> list[Figure]:
        """Accuracy over all words of the vocabulary, and the loss in nats."""
        right = self.batches[split].output[trial] + self.first_output
        loss = torch.nn.functional.cross_entropy(logits[trial].double(), right)
        accuracy = (logits[trial].argmax(-1) == right).double().mean()
        return [Figure("accuracy", LAST, split, accuracy.item()), Figure("loss", LAST, split, loss.item())]

    def clustered(self, seen: Seen, trial: int) -> Iterator[Figure]:
        """K-means of unseen strings' states, layer by layer, against tasks and outputs."""
        batch = self.batches["unseen"]
        labels = {"task": batch.task[trial].cpu().numpy(), "output": batch.output[trial].cpu().numpy()}
        for layer, states in enumerate(seen.states[:, trial].cpu().double().unbind(0)):
            for position, of in CLUSTERED:
                for score, value in _scores(states[:, POSITIONS.index(position)].numpy(), labels[of]).items():
                    yield Figure(named(score, of, layer), position, "unseen", value)

    @torch.no_grad()
    def patched(self, model: InstructionModel, seen: Seen) -> list[list[Figure]]:
        """For each trial, layer and patch: the share of answers that become the other task's, and that stay.

        Only sequences for whose input the two tasks differ count. Centroids are of seen strings' states.
        """
        unseen, known = self.batches["unseen"], self.batches["seen"]
        tells = unseen.output != self._target_output
        figures: list[list[Figure]] = [[] for _ in self.trials]
        closing = seen.states[:, :, :, POSITIONS.index(INSTRUCTION_END)].unbind(0)
        of_task, of_shuffled = (
            torch.stack([centroids(states, labels, self.num_tasks) for states in closing])
            for labels in (known.task, self._shuffled)
        )
        for layer in range(len(closing)):
            for patch in PATCHES:
                means = of_shuffled if patch == "shuffled" else of_task
                logits = model(unseen.tokens, edit=move(layer, patch, means, unseen.task, self._target))
                answer = logits.argmax(-1) - self.first_output
                for score, output in (("flips", self._target_output), ("kept", unseen.output)):
                    share = ((answer == output) & tells).sum(1).double() / tells.sum(1).clamp(min=1)
                    for one, value in zip(figures, share.tolist(), strict=True):
                        one.append(Figure(named(score, patch, layer), INSTRUCTION_END, "unseen", value))
        return figures


def _scores(states: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """As `clustering.scores`, with fewer restarts and shuffles: this runs for every layer at every stop."""
    found = clustering.kmeans(states, len(np.unique(labels)), 0, restarts=RESTARTS)
    return {
        "ari": clustering.adjusted_rand(found, labels),
        "nmi": clustering.nmi(found, labels),
        "silhouette": clustering.silhouette(states, labels),
        "ari_shuffled": clustering.shuffled(found, labels, 0, permutations=SHUFFLES)["ari_shuffled"],
    }
