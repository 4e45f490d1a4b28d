"""REINFORCE through a trainable model (arXiv:2501.06252): sampled answers, advantages, the KL to the base.

The paper maximises E[r log pi(answer)] - lambda KL(pi || base) with rewards of +-1. Here answers are sampled at a
temperature and rewards have a baseline; greedy answers and none, as in its reference, are settings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasepia.decoding.choices import gumbel
from metasepia.errors import InvalidSettings
from metasepia.training.teacher_forcing import logits_of
from metasepia.training.trainable import Trainable

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
    form: float = 0.0
    """Where labels are chosen: weight of the next-token loss for answering with *some* label and ending there. Which
    label is right stays the reward's to teach."""

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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A prompt whose answer is one of a few labels, and what each would earn."""

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    """Of the draws; noise is a function of (seed, position), as a decoder's is."""
    rewards: Callable[[int], float]
    """Of a label, by its index; asked for those drawn only."""


def draw(logits: Float[Tensor, " labels"], choice: Choice, temperature: float) -> list[int]:
    """Labels, one a seed; at temperature 0 the likeliest."""
    scores = logits.detach().double().cpu()
    if temperature == 0:
        return [int(scores.argmax())] * len(choice.seeds)
    noise = [torch.from_numpy(gumbel(seed, len(choice.prompt), len(scores))) for seed in choice.seeds]
    return [int((scores / temperature + one).argmax()) for one in noise]


@dataclass
class Seen:
    """What the parts of one step add up to."""

    kl: float = 0.0
    """Nats, summed over actions."""
    num_actions: int = 0
    off_policy: float = 0.0
    """Largest difference between the sampler's log-probability of a token and ours."""
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


def policy_loss(
    trainable: Trainable, part: Sequence[Sampled], advantage: Float[Tensor, " answers"], loss: PolicyLoss, seen: Seen
) -> Float[Tensor, ""]:
    """Summed over the answers; adds to what was `seen`."""
    ends = loss.end_token_ids
    trainable.renew()
    now = Actions.of(trainable.model, part, ends)
    taken, drawn = now.logprobs(ends, loss.temperature or 1.0), now.logprobs(ends)
    seen.off_policy = max(seen.off_policy, _difference(drawn, part))
    seen.num_actions += int(now.taken.sum())
    total = -(advantage.to(taken.device)[:, None] * taken).sum()
    if loss.measures_kl:
        with torch.no_grad(), trainable.base():
            base = Actions.of(trainable.model, part, ends)
        if loss.kl_form == "token":
            penalty, estimate = kl_of_drawn(drawn, base.logprobs(ends))
        else:
            penalty = torch.where(now.taken, kl_of(now.logits, base.logits, loss.kl_form), 0.0)
            estimate = penalty.detach()
        seen.kl += float(estimate.sum())
        total = total + loss.kl * penalty.sum()
    return total


def choice_losses(
    trainable: Trainable, part: Sequence[Choice], labels: Sequence[tuple[int, ...]], loss: PolicyLoss, seen: Seen
) -> Iterator[Float[Tensor, ""]]:
    """The same where the policy is restricted to labels, told apart by their first tokens, and drawn from right here.

    One forward serves the draws and the gradient, and all draws of a prompt. The baseline `batch` is the mean over
    `part`. The KL is that between the restricted policies, exact in every form. Summed over the draws, in two losses if
    the form is taught.
    """
    firsts, num_draws = [label[0] for label in labels], len(part[0].seeds)
    trainable.renew()
    logits = logits_of(trainable.model, [one.prompt for one in part], 1)[:, -1]
    policy = logits[:, firsts]
    drawn = [draw(row, one, loss.temperature) for row, one in zip(policy, part, strict=True)]
    rewards = [one.rewards(label) for one, row in zip(part, drawn, strict=True) for label in row]
    groups = [index for index, row in enumerate(drawn) for _ in row]
    advantage = advantages(rewards, groups, loss.baseline)
    seen.rewards += rewards
    seen.advantages += advantage.tolist()
    seen.num_actions += len(rewards)
    taken = (policy / (loss.temperature or 1.0)).log_softmax(-1).gather(-1, torch.tensor(drawn, device=policy.device))
    total = -(advantage.to(taken.device).view_as(taken) * taken).sum()
    if loss.measures_kl:
        with torch.no_grad(), trainable.base():
            base = logits_of(trainable.model, [one.prompt for one in part], 1)[:, -1, firsts]
        penalty = num_draws * kl_of(policy, base, loss.kl_form).sum()
        seen.kl += float(penalty.detach())
        total = total + loss.kl * penalty
    if not loss.form:
        yield total
        return
    yield total - loss.form * num_draws * (policy.logsumexp(-1) - logits.logsumexp(-1)).sum()
    answers = [
        Sampled(prompt=one.prompt, tokens=labels[row[0]], ended=True, reward=0.0)
        for one, row in zip(part, drawn, strict=True)
    ]
    trainable.renew()
    later = Actions.of(trainable.model, answers, loss.end_token_ids)
    after_first = later.taken & (later.taken.cumsum(-1) > 1)
    yield -loss.form * num_draws * later.logprobs(loss.end_token_ids)[after_first].sum()


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
