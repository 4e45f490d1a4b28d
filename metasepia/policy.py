"""REINFORCE through a trainable model (arXiv:2501.06252): sampled answers, advantages, the KL to the base.

The paper maximises E[r log pi(answer)] - lambda KL(pi || base) with rewards of +-1. Here answers are sampled at a
temperature and rewards have a baseline; greedy answers and none, as in its reference, are settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasepia.choices import gumbel
from metasepia.errors import InvalidSettings
from metasepia.teacher_forcing import logits_of
from metasepia.trainable import Trainable

Baseline = Literal["none", "batch", "group"]
"""Subtracted from a reward: nothing; the batch's mean; the mean of the other answers to the same prompt."""
KlForm = Literal["token", "full", "reference"]
"""KL(policy || base) as the paper writes it, from the sampled tokens or over the vocabulary; or KL(base || policy) over
the vocabulary, as its reference computes."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """An answer drawn from the policy, with its reward."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Without the end token."""
    ended: bool
    """Whether the policy chose to end after them; else they were cut off."""
    reward: float
    """In [-1, 1]."""
    group: int = 0
    """Answers to the same prompt share it."""
    logprobs: tuple[float, ...] = ()
    """Of `tokens` at temperature 1, as the sampler computed them; empty: not known."""
    choice: int | None = None
    """Which label was drawn, where the policy was restricted to labels."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """What REINFORCE minimises beside -(reward - baseline) log pi."""

    end_token_ids: tuple[int, ...]
    temperature: float = 1.0
    """That of the sampling, whose policy is the one that is improved; 0 (greedy) counts as 1 here."""
    baseline: Baseline = "batch"
    kl: float = 0.0
    """Weight of the KL to the base, summed over an answer's tokens."""
    kl_form: KlForm = "token"
    measure: bool = True
    """Whether the KL is measured where it has no weight; it costs a forward of the base."""
    label_tokens: tuple[int, ...] = ()
    """First tokens of the labels: the policy is restricted to them. Empty: it is not."""
    form: float = 0.0
    """Restricted only: weight of the next-token loss for answering with *some* label and ending there. Which label is
    right stays the reward's to teach."""

    @property
    def measures_kl(self) -> bool:
        return self.measure or self.kl > 0


def advantages(rewards: Sequence[float], groups: Sequence[int], baseline: Baseline) -> Float[Tensor, " answers"]:
    """Rewards less the baseline. Raises InvalidSettings for a group of one under the baseline `group`."""
    r = torch.tensor(rewards, dtype=torch.float64)
    if baseline == "none":
        return r.float()
    if baseline == "batch":
        return (r - r.mean()).float()
    group = torch.tensor(groups)
    same = (group[:, None] == group[None, :]).double()
    others = same.sum(1) - 1
    if bool((others < 1).any()):
        raise InvalidSettings("baseline", baseline, "batch or none where a prompt has one answer; or take more samples")
    return (r - (same @ r - r) / others).float()


@dataclass
class Actions:
    """Of a batch of sampled answers, by teacher forcing: [answers, longest], 0 where an answer is shorter."""

    logits: Float[Tensor, "answers longest vocab"]
    taken: Bool[Tensor, "answers longest"]
    """Where an action was taken: a token, or the end."""
    ids: Int[Tensor, "answers longest"]
    ends: Bool[Tensor, "answers longest"]

    @classmethod
    def of(cls, model: Any, batch: Sequence[Sampled], end_token_ids: Sequence[int]) -> "Actions":
        answers = [one.tokens + (tuple(end_token_ids[:1]) if one.ended else ()) for one in batch]
        longest = max(1, *map(len, answers))
        sequences = [one.prompt + answer for one, answer in zip(batch, answers, strict=True)]
        logits = logits_of(model, sequences, longest + 1)[:, :-1]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        taken, ends = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for row, answer in enumerate(answers):
            if answer:
                ids[row, -len(answer) :] = torch.tensor(answer)
                taken[row, -len(answer) :] = True
                ends[row, -1] = batch[row].ended
        device = logits.device
        return cls(logits, taken.to(device), ids.to(device), ends.to(device))

    def logprobs(self, end_token_ids: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "answers longest"]:
        """Of each action. Ending is one action, whichever of the end tokens does it."""
        scores = self.logits / temperature
        chosen = scores.gather(-1, self.ids[..., None])[..., 0]
        if len(end_token_ids) > 1:
            chosen = torch.where(self.ends, scores[..., list(end_token_ids)].logsumexp(-1), chosen)
        return torch.where(self.taken, chosen - scores.logsumexp(-1), 0.0)

    def first(self) -> Float[Tensor, "answers vocab"]:
        """The logits of each answer's first action."""
        return self.logits[torch.arange(len(self.logits)), self.taken.int().argmax(-1)]


def kl_of(
    policy: Float[Tensor, "*rows vocab"], base: Float[Tensor, "*rows vocab"], form: KlForm
) -> Float[Tensor, "*rows"]:
    """The exact KL between two rows of logits: base || policy for `reference`, else policy || base."""
    p, q = policy.log_softmax(-1), base.log_softmax(-1)
    if form == "reference":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


def kl_of_drawn(
    policy: Float[Tensor, "*rows"], base: Float[Tensor, "*rows"]
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """From log-probabilities of actions drawn from the policy: what to minimise, and an estimate of KL(policy || base).

    Two, because no one has both: the mean gradient of log(pi/base)^2 / 2 is the KL's, and base/pi - 1 - log(base/pi) is
    unbiased and never negative, while its gradient is that of the other direction.
    """
    ratio = policy - base
    return ratio.square() / 2, (torch.expm1(-ratio) + ratio).detach()


@torch.no_grad()
def draw_labels(
    trainable: Trainable,
    prompts: Sequence[tuple[int, ...]],
    label_tokens: Sequence[int],
    seeds: Sequence[int],
    temperature: float,
    micro_batch: int = 16,
) -> list[int]:
    """A label for each prompt, from the policy restricted to the labels' first tokens; 0 takes the likeliest.

    The noise is a function of (seed, position), as a decoder's is.
    """
    drawn: list[int] = []
    for part in range(0, len(prompts), micro_batch):
        chunk = prompts[part : part + micro_batch]
        trainable.renew()
        scores = logits_of(trainable.model, chunk, 1)[:, -1, list(label_tokens)].double().cpu()
        if temperature > 0:
            noise = [
                gumbel(seed, len(prompt), len(label_tokens))
                for seed, prompt in zip(seeds[part : part + micro_batch], chunk, strict=True)
            ]
            scores = scores / temperature + torch.from_numpy(np.stack(noise))
        drawn += scores.argmax(-1).tolist()
    return drawn


@dataclass
class Seen:
    """What the parts of one step add up to."""

    kl: float = 0.0
    """Nats, summed over actions."""
    num_actions: int = 0
    off_policy: float = 0.0
    """Largest difference between the sampler's log-probability of a token and ours."""


def policy_loss(
    trainable: Trainable, part: Sequence[Sampled], advantage: Float[Tensor, " answers"], loss: PolicyLoss, seen: Seen
) -> Float[Tensor, ""]:
    """Summed over the answers; adds to what was `seen`."""
    ends, labels = loss.end_token_ids, list(loss.label_tokens)
    trainable.renew()
    now = Actions.of(trainable.model, part, ends)
    if labels:
        policy = now.first()[:, labels][:, None]
        choice = torch.tensor([one.choice for one in part], device=policy.device)[:, None, None]
        taken = (policy / (loss.temperature or 1.0)).log_softmax(-1).gather(-1, choice)[..., 0]
        drawn, acted = policy.log_softmax(-1).gather(-1, choice)[..., 0], torch.ones_like(taken, dtype=torch.bool)
    else:
        policy, choice = now.logits, None
        taken, drawn, acted = now.logprobs(ends, loss.temperature or 1.0), now.logprobs(ends), now.taken
        seen.off_policy = max(seen.off_policy, _difference(drawn, part))
    total = -(advantage.to(taken.device)[:, None] * taken).sum()
    if loss.measures_kl:
        with torch.no_grad(), trainable.base():
            base = Actions.of(trainable.model, part, ends)
        base_policy = base.logits if choice is None else base.first()[:, labels][:, None]
        if loss.kl_form == "token":
            base_drawn = (
                base.logprobs(ends) if choice is None else base_policy.log_softmax(-1).gather(-1, choice)[..., 0]
            )
            penalty, estimate = kl_of_drawn(drawn, base_drawn)
        else:
            penalty = torch.where(acted, kl_of(policy, base_policy, loss.kl_form), 0.0)
            estimate = penalty.detach()
        seen.kl += float(estimate.sum())
        total = total + loss.kl * penalty.sum()
    seen.num_actions += int(acted.sum())
    if labels and loss.form:
        some_label = now.first()[:, labels].logsumexp(-1) - now.first().logsumexp(-1)
        later = now.taken & (now.taken.cumsum(-1) > 1)
        total = total - loss.form * (some_label.sum() + now.logprobs(ends)[later].sum())
    return total


def _difference(logprobs: Float[Tensor, "answers longest"], part: Sequence[Sampled]) -> float:
    """The largest difference to what the sampler said of the same tokens."""
    worst = 0.0
    for row, one in zip(logprobs.detach().cpu(), part, strict=True):
        if one.logprobs:
            stop = len(row) - int(one.ended)
            ours = row[stop - len(one.tokens) : stop]
            worst = max(worst, float((ours - torch.tensor(one.logprobs)).abs().max()))
    return worst


def row_seed(seed: int, step: int, row: int) -> int:
    """The seed of one sampled row of one step."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0])
