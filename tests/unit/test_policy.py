"""REINFORCE: advantages, KL, and what a step does to the probabilities of answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from metasepia.errors import InvalidSettings
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.training.policy import (
    Baseline,
    Choice,
    KlForm,
    PolicyLoss,
    Sampled,
    Seen,
    advantages,
    choice_losses,
    draw,
    kl_of,
    kl_of_drawn,
    policy_loss,
    row_seed,
)
from metasepia.training.teacher_forcing import logits_of
from metasepia.training.trainable import SingularValues
from metasepia.training.tuning import Trainer
from tests import tiny

ENDS = (1, 2)
PROMPT: tuple[int, ...] = (5, 9, 3)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny.llama(vocab_size=12, hidden_size=16, intermediate_size=24, initializer_range=0.3)


@pytest.fixture(scope="module")
def factors(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> FactorSet:
    return factors_of(model, ("mlp.up_proj", "mlp.down_proj"), "b" * 64, tmp_path_factory.mktemp("home"))


@pytest.fixture
def trainable(model: LlamaForCausalLM, factors: FactorSet) -> SingularValues:
    """Some way from the base already, so that it has a KL."""
    made = SingularValues(model, factors, list(factors.factors))
    with torch.no_grad():
        made.parameters["z"].add_(0.3 * torch.randn(made.num_parameters, generator=torch.Generator().manual_seed(1)))
    made.renew()
    return made


def a_trainer(trainable: SingularValues, learning_rate: float = 0.02) -> Trainer:
    return Trainer(trainable, learning_rate=learning_rate, run={})


def answers(*given: tuple[tuple[int, ...], bool, float]) -> list[Sampled]:
    return [Sampled(prompt=PROMPT, tokens=t, ended=e, reward=r) for t, e, r in given]


@torch.no_grad()
def log_probability(model: Any, tokens: tuple[int, ...], ended: bool, temperature: float = 1.0) -> float:
    """The slow way: one forward a token, and ending by any of the end tokens."""
    total, sequence = 0.0, list(PROMPT)
    for token in tokens:
        logits = model(input_ids=torch.tensor([sequence])).logits[0, -1] / temperature
        total += float(logits.log_softmax(-1)[token])
        sequence.append(token)
    if ended:
        logits = model(input_ids=torch.tensor([sequence])).logits[0, -1] / temperature
        total += float(logits.log_softmax(-1)[list(ENDS)].logsumexp(0))
    return total


def test_each_baseline_is_what_its_name_says() -> None:
    rewards, groups = [1.0, -1.0, -1.0, 0.5], [0, 0, 1, 1]
    assert advantages(rewards, groups, "none").tolist() == rewards
    assert advantages(rewards, groups, "batch").tolist() == pytest.approx([r + 0.125 for r in rewards])
    assert advantages(rewards, groups, "group").tolist() == pytest.approx([2.0, -2.0, -1.5, 1.5])
    with pytest.raises(InvalidSettings, match="more samples"):
        advantages([1.0, -1.0], [0, 1], "group")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_the_advantage_times_the_log_probability_of_whole_answers(
    trainable: SingularValues, temperature: float
) -> None:
    batch = answers(((7, 4), True, 1.0), ((8, 3, 6), False, -1.0), ((), True, 0.5))
    weights = torch.tensor([1.2, -0.8, 0.3])
    loss = PolicyLoss(end_token_ids=ENDS, temperature=temperature)
    total = policy_loss(trainable, batch, weights, loss, Seen())
    with torch.no_grad():
        expected = sum(
            float(w) * log_probability(trainable.model, one.tokens, one.ended, temperature)
            for w, one in zip(weights, batch, strict=True)
        )
    assert float(total.detach()) == pytest.approx(-expected, rel=1e-4)


def test_a_step_makes_rewarded_answers_likelier_and_punished_ones_less_likely(trainable: SingularValues) -> None:
    trainer = a_trainer(trainable)
    batch = answers(((7, 4), True, 1.0), ((8, 3), True, -1.0))
    before = [log_probability(trainable.model, one.tokens, one.ended) for one in batch]
    for _ in range(5):
        trainer.policy_step(batch, PolicyLoss(end_token_ids=ENDS))
    after = [log_probability(trainable.model, one.tokens, one.ended) for one in batch]
    assert after[0] > before[0] + 0.1 and after[1] < before[1] - 0.1


def test_equal_rewards_move_nothing_and_are_counted_in_a_row(trainable: SingularValues) -> None:
    trainer = a_trainer(trainable)
    loss = PolicyLoss(end_token_ids=ENDS)
    trainer.policy_step(answers(((7, 4), True, 1.0), ((8, 3), True, -1.0)), loss)
    z = trainable.parameters["z"].detach().clone()
    for count in (1, 2):
        trainer.policy_step(answers(((7, 4), True, -1.0), ((8, 3), True, -1.0)), loss)
        assert trainer.flat_batches == count
    assert torch.equal(trainable.parameters["z"], z)  # Adam's momentum alone would have moved it
    assert trainer.step == 3 and trainer.told
    trainer.policy_step(answers(((7, 4), True, 1.0), ((8, 3), True, -1.0)), loss)
    assert trainer.flat_batches == 0
    # Without a baseline, as in the reference, equal rewards do move it.
    trainer.policy_step(answers(((7, 4), True, -1.0)), PolicyLoss(end_token_ids=ENDS, baseline="none"))
    assert trainer.flat_batches == 0 and not torch.equal(trainable.parameters["z"], z)


def test_the_kl_of_drawn_tokens_has_in_the_mean_the_value_and_the_gradient_of_the_exact_one() -> None:
    policy = torch.randn(9, generator=torch.Generator().manual_seed(0)).double().requires_grad_(True)
    base = torch.randn(9, generator=torch.Generator().manual_seed(1)).double()
    exact = kl_of(policy, base, "full")
    (wanted,) = torch.autograd.grad(exact, policy)
    p, q = policy.log_softmax(-1), base.log_softmax(-1)
    penalty, estimate = kl_of_drawn(p, q)
    probabilities = p.exp().detach()
    (gradient,) = torch.autograd.grad((probabilities * penalty).sum(), policy)
    torch.testing.assert_close(gradient, wanted)
    assert float((probabilities * estimate).sum()) == pytest.approx(float(exact.detach()))
    assert bool((estimate >= 0).all())
    assert float(kl_of(policy, base, "reference").detach()) == pytest.approx(
        float(kl_of(base, policy, "full").detach())
    )


@pytest.mark.parametrize("form", ["token", "full", "reference"])
def test_the_kl_term_alone_pulls_the_policy_back_to_the_base(trainable: SingularValues, form: KlForm) -> None:
    trainer = a_trainer(trainable, learning_rate=0.01)
    # Every answer of one token, as often as the policy gives it, so that the drawn form sees the mean.
    drawn = trainable.model(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach().softmax(-1)
    shares = [max(1, round(60 * float(share))) for share in drawn]
    batch = [one for t in range(3, 12) for one in answers(((t,), False, 0.0)) * shares[t]]
    loss = PolicyLoss(end_token_ids=ENDS, kl=1.0, kl_form=form)
    kls = [trainer.policy_step(batch, loss)["kl"] for _ in range(12)]
    assert kls[0] > 0.02 and kls[-1] < 0.7 * kls[0]


LABELS = ((4,), (6, 7), (8,))
"""By their tokens."""


def a_choice(index: int, rewards: Sequence[float], samples: int = 1, prompt: tuple[int, ...] = PROMPT) -> Choice:
    seeds = tuple(row_seed(3, index, draw) for draw in range(samples))
    return Choice(prompt=prompt, seeds=seeds, rewards=lambda label: rewards[label])


def test_a_choices_loss_is_that_of_the_restricted_policy_and_the_form_is_taught_apart(
    trainable: SingularValues,
) -> None:
    choices = [a_choice(i, (1.0, -1.0, 0.5), samples=2) for i in range(6)]
    logits = logits_of(trainable.model, [PROMPT], 1)[0, -1].detach()
    shares = (logits[[4, 6, 8]] / 2).log_softmax(-1)
    drawn = [draw(logits[[4, 6, 8]], one, 2.0) for one in choices]
    rewards = [[one.rewards(label) for label in row] for one, row in zip(choices, drawn, strict=True)]
    weights = [weight for row in rewards for weight in (row[0] - row[1], row[1] - row[0])]  # each less the other
    loss = PolicyLoss(end_token_ids=ENDS, temperature=2.0, baseline="group", measure=False)
    seen = Seen()
    (total,) = choice_losses(trainable, choices, LABELS, loss, seen)
    labels = [label for row in drawn for label in row]
    expected = -sum(weight * float(shares[label]) for weight, label in zip(weights, labels, strict=True))
    assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    assert any(seen.advantages) and seen.rewards == [r for row in rewards for r in row]

    formed = replace(loss, form=3.0)
    with_form = sum(float(one.detach()) for one in choice_losses(trainable, choices, LABELS, formed, Seen()))
    some_label = float(logits.log_softmax(-1)[[4, 6, 8]].logsumexp(0))
    rest = 0.0
    for row in drawn:
        label = LABELS[row[0]]
        rest += log_probability(trainable.model, label, True) - log_probability(trainable.model, label[:1], False)
    assert with_form - expected == pytest.approx(-3.0 * 2 * (6 * some_label + rest), rel=1e-3)


def test_labels_are_drawn_by_their_shares_and_by_seed_alone() -> None:
    logits = torch.tensor([0.5, -0.4, 1.0])
    drawn = draw(logits, a_choice(0, (), samples=2000), 0.7)
    shares = (logits / 0.7).softmax(-1)
    for i in range(3):
        assert drawn.count(i) / len(drawn) == pytest.approx(float(shares[i]), abs=0.04)
    assert draw(logits, a_choice(0, (), samples=7), 0.7) == drawn[:7]
    assert draw(logits, a_choice(1, (), samples=7), 0.7) != drawn[:7]
    assert draw(logits, a_choice(0, (), samples=2), 0.0) == [2, 2]


def test_equal_rewards_of_choices_move_nothing(trainable: SingularValues) -> None:
    trainer = a_trainer(trainable)
    loss = PolicyLoss(end_token_ids=ENDS)
    trainer.choice_step([a_choice(i, (1.0, -1.0, -1.0)) for i in range(8)], LABELS, loss)
    z = trainable.parameters["z"].detach().clone()
    trainer.choice_step([a_choice(i, (-1.0, -1.0, -1.0)) for i in range(8)], LABELS, loss)
    assert trainer.flat_batches == 1 and torch.equal(trainable.parameters["z"], z)
    formed = PolicyLoss(end_token_ids=ENDS, form=1.0)
    trainer.choice_step([a_choice(i, (-1.0, -1.0, -1.0)) for i in range(8)], LABELS, formed)
    assert trainer.flat_batches == 2 and not torch.equal(trainable.parameters["z"], z)


def test_a_sampler_with_another_policy_is_noticed(trainable: SingularValues) -> None:
    trainer = a_trainer(trainable)
    logits = trainable.model(input_ids=torch.tensor([[*PROMPT, 7]])).logits[0].detach().log_softmax(-1)
    exact = (float(logits[2, 7]), float(logits[3, 4]))

    def off(logprobs: tuple[float, float]) -> float:
        one = Sampled(prompt=PROMPT, tokens=(7, 4), ended=True, reward=1.0, logprobs=logprobs)
        # A second, shorter answer: padding must not shift the comparison.
        other = Sampled(prompt=(4,), tokens=(), ended=True, reward=1.0)
        return trainer.policy_step([other, one], PolicyLoss(end_token_ids=ENDS))["off_policy"]

    assert off(exact) < 1e-4
    assert off((exact[0], exact[1] - 0.1)) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("baseline", ["none", "batch", "group"])
def test_every_baseline_learns_which_label_is_right(
    model: LlamaForCausalLM, factors: FactorSet, baseline: Baseline
) -> None:
    trainable = SingularValues(model, factors, list(factors.factors))
    trainer = a_trainer(trainable, learning_rate=0.05)
    loss = PolicyLoss(end_token_ids=ENDS, baseline=baseline, measure=False)

    def shares() -> list[float]:
        return logits_of(trainable.model, [PROMPT], 1)[0, -1, [4, 6, 8]].detach().softmax(-1).tolist()

    before = shares()
    right = sorted(range(3), key=before.__getitem__)[1]
    for step in range(25):
        rewards = [1.0 if label == right else -1.0 for label in range(3)]
        trainer.choice_step([a_choice(8 * step + i, rewards, samples=4) for i in range(4)], LABELS, loss)
    assert before[right] < 0.5 and shares()[right] > 0.8


def test_seeds_of_rows_differ_by_run_step_and_row() -> None:
    seeds = {row_seed(seed, step, row) for seed in range(3) for step in range(3) for row in range(3)}
    assert len(seeds) == 27
