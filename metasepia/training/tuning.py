"""Training steps on a `Trainable`: next-token loss on answers, and REINFORCE on sampled ones (arXiv:2501.06252).

Answers come from whoever serves the policy; here they are read by teacher forcing, which also tells whether both are
the same policy. One process.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from metasepia.digests import canonical_json
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings
from metasepia.training.policy import Choice, PolicyLoss, Sampled, Seen, advantages, choice_losses, policy_loss
from metasepia.training.teacher_forcing import Answered, summed_answer_loss
from metasepia.training.trainable import Trainable

Schedule = Literal["constant", "cosine"]


class Trainer:
    """Adam on a trainable's parameters; everything else of the model stays as it is."""

    def __init__(
        self,
        trainable: Trainable,
        *,
        learning_rate: float,
        run: dict[str, object],
        schedule: Schedule = "constant",
        num_steps: int | None = None,
        clip: float | None = None,
        micro_batch: int = 16,
    ) -> None:
        """`run` is everything that decides the result; a checkpoint of another run is refused.

        `num_steps`: where the cosine reaches 0. `clip`: the longest gradient; longer ones are shortened to it.
        `micro_batch`: answers whose forward is kept for the backward at once, the rest follow; it bounds memory.
        """
        if schedule == "cosine" and not num_steps:
            raise InvalidSettings("schedule", schedule, "given together with the number of steps")
        self.trainable, self._run = trainable, canonical_json(run).decode()
        self._parameters = list(trainable.parameters.values())
        self._adam = torch.optim.Adam(self._parameters, lr=learning_rate)
        self._rate, self._schedule, self._num_steps = learning_rate, schedule, num_steps
        self._clip, self._micro_batch = clip, micro_batch
        self.step = 0
        self.flat_batches = 0
        """Policy batches in a row, up to now, that could teach nothing: no answer fared better than expected."""
        self.told = False
        """Whether any policy batch could teach anything."""
        self.validated: list[tuple[int, float]] = []
        """(step, accuracy) of each validation."""
        self._best: dict[str, Tensor] = {}

    # -- steps ---------------------------------------------------------------------------------------------------------

    def train_step(self, batch: Sequence[Answered]) -> dict[str, float]:
        """One step of next-token loss; what to log of it. Raises InvalidRequest when the loss is not a number."""
        num_tokens, right, total = sum(len(one.answer) for one in batch), 0, 0.0

        def losses() -> Iterator[Tensor]:
            nonlocal right, total
            for part in self._parts(batch):
                self.trainable.renew()
                loss, _, rows_right = summed_answer_loss(self.trainable.model, part)
                right += rows_right
                total += float(loss.detach())
                yield loss / num_tokens

        norm = self._update(losses())
        return {
            "loss": total / num_tokens,
            "accuracy": right / len(batch),
            "gradient_norm": norm,
            "largest_change": self.trainable.largest_change,
        }

    def policy_step(self, batch: Sequence[Sampled], loss: PolicyLoss) -> dict[str, float]:
        """One REINFORCE step on answers drawn from the policy as it is now; what to log of it.

        `kl`, where it is measured, is nats a token. `off_policy` is the largest difference between the sampler's
        log-probability of a token and ours: near 0, or the sampler has another policy. A batch whose advantages are all
        zero changes nothing, unless the KL has a weight.
        """
        advantage = advantages([one.reward for one in batch], [one.group for one in batch], loss.baseline)
        seen = Seen(rewards=[one.reward for one in batch], advantages=advantage.tolist())
        idle = self._is_flat(seen) and not loss.kl
        by_part = iter(advantage.split(self._micro_batch))
        losses = (
            policy_loss(self.trainable, part, next(by_part), loss, seen) / len(batch) for part in self._parts(batch)
        )
        norm = self._measure(losses) if idle else self._update(losses)
        return self._seen(seen, norm, loss) | {
            "answer_tokens": float(np.mean([len(one.tokens) for one in batch])),
            "ended": float(np.mean([one.ended for one in batch])),
            "off_policy": seen.off_policy,
        }

    def choice_step(
        self, batch: Sequence[Choice], labels: Sequence[tuple[int, ...]], loss: PolicyLoss
    ) -> dict[str, float]:
        """One REINFORCE step of the policy restricted to labels, given by their tokens; what to log of it."""
        seen = Seen()
        num_draws = sum(len(one.seeds) for one in batch)
        losses = (
            one / num_draws
            for part in self._parts(batch)
            for one in choice_losses(self.trainable, part, labels, loss, seen)
        )
        idle = not (loss.kl or loss.form)
        norm = self._update(losses, may_skip=(lambda: self._is_flat(seen)) if idle else None)
        if not idle:
            self._is_flat(seen)
        return self._seen(seen, norm, loss)

    def _is_flat(self, seen: Seen) -> bool:
        """Whether no answer fared better than expected; counted."""
        flat = max(map(abs, seen.advantages)) < 1e-6
        self.flat_batches = self.flat_batches + 1 if flat else 0
        self.told = self.told or not flat
        return flat

    def _seen(self, seen: Seen, norm: float, loss: PolicyLoss) -> dict[str, float]:
        rewards = np.array(seen.rewards)
        return {
            "reward": float(rewards.mean()),
            "right": float((rewards == 1).mean()),
            **({"kl": seen.kl / max(1, seen.num_actions)} if loss.measures_kl else {}),
            "advantage": float(np.abs(seen.advantages).mean()),
            "gradient_norm": norm,
            "largest_change": self.trainable.largest_change,
        }

    def _parts(self, batch: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for start in range(0, len(batch), self._micro_batch):
            yield batch[start : start + self._micro_batch]

    def _measure(self, losses: Iterator[Tensor]) -> float:
        with torch.no_grad():
            for _ in losses:
                pass
        self.step += 1
        return 0.0

    def _update(self, losses: Iterator[Tensor], may_skip: Callable[[], bool] | None = None) -> float:
        """A step down the sum of the losses; the gradient's norm before it was clipped.

        `may_skip`, asked after the gradients are there, says that they are no reason to move: Adam would still coast.
        """
        rate = self._rate
        if self._schedule == "cosine" and self._num_steps:
            rate *= (1 + math.cos(math.pi * min(1.0, self.step / self._num_steps))) / 2
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.zero_grad()
        for loss in losses:
            if not torch.isfinite(loss):
                raise InvalidRequest(
                    "learning_rate", f"the loss at step {self.step} is {float(loss.detach())}; choose a smaller one"
                )
            loss.backward()
        if may_skip is not None and may_skip():
            self.step += 1
            return 0.0
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm)
        self._adam.step()
        self.trainable.renew()
        self.step += 1
        return float(norm)

    # -- the best so far -----------------------------------------------------------------------------------------------

    def validate(self, accuracy: float) -> None:
        """Takes down an accuracy on the validation split; the first that is higher than all before is kept."""
        if all(accuracy > before for _, before in self.validated):
            self._best = {name: one.detach().clone() for name, one in self.trainable.parameters.items()}
        self.validated.append((self.step, accuracy))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and accuracy of the best validation, the earliest of equals."""
        return max(self.validated, key=lambda one: (one[1], -one[0])) if self.validated else None

    def take_best(self) -> None:
        """The parameters of the best validation from now on."""
        with torch.no_grad():
            for name, parameter in self.trainable.parameters.items():
                parameter.copy_(self._best[name])
        self.trainable.renew()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes the checkpoint, whole or not at all."""
        tensors = {f"best/{name}": one for name, one in self._best.items()}
        for name, parameter in self.trainable.parameters.items():
            tensors[f"trained/{name}"] = parameter.detach()
            for moment, value in self._adam.state.get(parameter, {}).items():
                tensors[f"adam/{moment}/{name}"] = torch.as_tensor(value)
        header = {
            "run": self._run,
            "step": self.step,
            "flat_batches": self.flat_batches,
            "told": self.told,
            "validated": [list(one) for one in self.validated],
        }
        scratch = path.with_suffix(".tmp")
        scratch.write_bytes(
            save(
                {name: one.cpu().contiguous() for name, one in tensors.items()},
                {"checkpoint": canonical_json(header).decode()},
            )
        )
        scratch.replace(path)

    def resume(self, path: Path) -> bool:
        """Goes on from a checkpoint; False where there is none. Raises CorruptArtefact for a wrong or torn one."""
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("checkpoint", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise CorruptArtefact(str(path), f"it cannot be read ({error}); delete it to start anew") from error
        if header.get("run") != self._run:
            raise CorruptArtefact(str(path), "it is of a run with other options; delete it or choose another --out")
        with torch.no_grad():
            for name, parameter in self.trainable.parameters.items():
                parameter.copy_(tensors[f"trained/{name}"])
                moments = {key.split("/")[1]: one for key, one in tensors.items() if _is_moment(key, name)}
                if moments:
                    self._adam.state[parameter] = {
                        moment: one if moment == "step" else one.to(parameter.device) for moment, one in moments.items()
                    }
                if f"best/{name}" in tensors:
                    self._best[name] = tensors[f"best/{name}"].to(parameter.device)
        self.trainable.renew()
        self.step, self.flat_batches, self.told = header["step"], header["flat_batches"], header["told"]
        self.validated = [(int(step), float(value)) for step, value in header["validated"]]
        return True


def _is_moment(key: str, name: str) -> bool:
    return key.startswith("adam/") and key.split("/", 2)[2] == name


def paired_gain(
    base: Sequence[bool], ours: Sequence[bool], groups: Sequence[str], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean difference of two answers to the same questions, and its 95 % interval: (gain, low, high).

    A percentile bootstrap over groups (texts of one stem are not independent), so that it also covers new stems.
    """
    difference = np.asarray(ours, float) - np.asarray(base, float)
    names = sorted(set(groups))
    sums = np.array([difference[[g == name for g in groups]].sum() for name in names])
    counts = np.array([sum(g == name for g in groups) for name in names])
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
