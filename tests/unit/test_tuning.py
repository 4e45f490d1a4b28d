from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.training.teacher_forcing import (
    Answered,
    first_logits_and_answers,
    last_states,
    left_padded,
    summed_answer_loss,
)
from metasepia.training.trainable import LowRank, SingularValues, Trainable, linear_layers, names_in_blocks, twin
from metasepia.training.tuning import Trainer, paired_gain
from tests import tiny

BATCH = [Answered((5, 9, 3), (7, 1)), Answered((4, 2, 8, 6, 5), (11, 12, 1)), Answered((9,), (7, 1))]
MLP = ("mlp.up_proj", "mlp.down_proj")
HIDDEN, INNER = 16, 24


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Training may not change it, so all tests share it."""
    return tiny.llama(vocab_size=40, hidden_size=HIDDEN, intermediate_size=INNER, initializer_range=0.3)


@pytest.fixture(scope="module")
def factors(model: LlamaForCausalLM, home: Path) -> FactorSet:
    return factors_of(model, MLP, "b" * 64, home, progress=False)


def a_trainer(
    model: LlamaForCausalLM, factors: FactorSet, *, learning_rate: float = 0.05, kind: str = "svf", **options: Any
) -> Trainer:
    """On the second block."""
    trainable: Trainable
    if kind == "lora":
        names = names_in_blocks(linear_layers(model, MLP), 1, None)
        trainable = LowRank(model, "b" * 64, names, rank=3, alpha=6.0)
    else:
        names = names_in_blocks(list(factors.factors), 1, None)
        trainable = SingularValues(model, factors, names, renormalise=options.pop("renormalise", True))
    run = {"seed": 0} | options.pop("run", {})
    return Trainer(trainable, learning_rate=learning_rate, run=run, **options)


def test_the_loss_is_the_sum_over_answer_tokens_of_each_row_alone(model: LlamaForCausalLM) -> None:
    loss, counted, right = summed_answer_loss(model, BATCH)
    total, num_tokens, rows_right = 0.0, 0, 0
    for one in BATCH:
        logits = model(input_ids=torch.tensor([one.prompt + one.answer])).logits[0]
        predicted = logits[len(one.prompt) - 1 : -1]
        wanted = torch.tensor(one.answer)
        total += float(torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum"))
        num_tokens += len(one.answer)
        rows_right += bool((predicted.argmax(-1) == wanted).all())
    assert float(loss) == pytest.approx(total, rel=1e-5)
    assert (counted, right) == (num_tokens, rows_right)


@pytest.mark.parametrize("kind", ["svf", "lora"])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(
    model: LlamaForCausalLM, factors: FactorSet, kind: str
) -> None:
    trainer = a_trainer(model, factors, learning_rate=0.1, kind=kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits = model(**left_padded([one.prompt for one in BATCH])).logits
    losses = [trainer.train_step(BATCH)["loss"] for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = set(map(id, trainer.trainable.parameters.values()))
    assert all(p.grad is None for p in trainer.trainable.model.parameters() if id(p) not in trained)
    with torch.no_grad(), trainer.trainable.base():
        torch.testing.assert_close(trainer.trainable.model(**left_padded([one.prompt for one in BATCH])).logits, logits)


def test_only_the_named_blocks_are_trained(model: LlamaForCausalLM, factors: FactorSet) -> None:
    trainer = a_trainer(model, factors)
    trainer.train_step(BATCH)
    expert = trainer.trainable.adapter()
    assert isinstance(expert, ExpertVectors)
    assert set(expert.z) == {name for name in factors.factors if ".1." in name}
    assert trainer.trainable.num_parameters == sum(len(one) for one in expert.z.values()) == 2 * HIDDEN
    with pytest.raises(InvalidSettings, match=r"blocks.*0 to 1"):
        names_in_blocks(list(factors.factors), 2, None)


class Made(TorchDispatchMode):
    """Shapes of the matrices that are made while it is on; views of what was there do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.untyped_storage().data_ptr() not in given:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("rank", [None, 5])
def test_no_gradient_of_a_weights_size_is_ever_made(
    model: LlamaForCausalLM, factors: FactorSet, rank: int | None
) -> None:
    trainable = SingularValues(model, factors, list(factors.factors), rank=rank)
    loss, *_ = summed_answer_loss(trainable.model, BATCH[:1])
    with Made() as made:
        loss.backward()
    weights = {(INNER, HIDDEN), (HIDDEN, INNER)}
    assert made.shapes and not weights & set(made.shapes)
    assert trainable.parameters["z"].grad is not None
    # The same check sees the gradient that training the weights themselves makes.
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.requires_grad_(True)
    try:
        loss, *_ = summed_answer_loss(model, BATCH[:1])
        with Made() as made:
            loss.backward()
        assert weights & set(made.shapes)
    finally:
        weight.requires_grad_(False)
        weight.grad = None


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("rank", [None, 5])
def test_the_model_in_training_is_what_its_expert_will_be(
    model: LlamaForCausalLM, factors: FactorSet, rank: int | None, renormalise: bool
) -> None:
    trainable = SingularValues(model, factors, list(factors.factors), rank=rank, renormalise=renormalise)
    with torch.no_grad():
        trainable.parameters["z"].add_(0.4 * torch.randn(trainable.num_parameters))
    trainable.renew()
    expert = trainable.adapter()
    assert expert.rank == (rank or HIDDEN)
    served = twin(model)
    layers = attach(served, factors)
    layers.put(expert.digest, expert)
    inputs = left_padded([one.prompt for one in BATCH])
    layers.select([((expert.digest, 1.0),)] * len(BATCH))
    with torch.no_grad():
        torch.testing.assert_close(trainable.model(**inputs).logits, served(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert (trainable.model(**inputs).logits - model(**inputs).logits).abs().max() > 0.05


def test_the_references_form_starts_at_the_base_because_the_nuclear_norm_is_kept(
    model: LlamaForCausalLM, factors: FactorSet
) -> None:
    names = list(factors.factors)
    inputs = left_padded([one.prompt for one in BATCH])
    base = model(**inputs).logits

    def distance(trainable: SingularValues) -> float:
        with torch.no_grad():
            return float((trainable.model(**inputs).logits - base).abs().max() / base.abs().max())

    kept = SingularValues(model, factors, names, form="reference", renormalise=True)
    truncated = SingularValues(model, factors, names, form="reference", renormalise=True, rank=5)
    assert max(distance(kept), distance(truncated)) < 0.02
    z = torch.cat(list(kept.z.values())).detach()
    assert float(z.mean()) == pytest.approx(1 / (1 + 2.718281828**-0.1), abs=0.002) and float(z.std()) > 0.001
    lost = SingularValues(model, factors, names)
    with torch.no_grad():
        lost.parameters["z"].copy_(z)
    lost.renew()
    assert distance(lost) > 0.2
    with pytest.raises(InvalidSettings, match="renormalise"):
        SingularValues(model, factors, names, form="reference")


def test_micro_batches_change_memory_and_not_the_step(model: LlamaForCausalLM, factors: FactorSet) -> None:
    whole, parts = a_trainer(model, factors), a_trainer(model, factors, micro_batch=2)
    for _ in range(3):
        one, other = whole.train_step(BATCH), parts.train_step(BATCH)
        assert one == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(*(t.trainable.parameters["z"] for t in (whole, parts)), rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_gradient_and_a_cosine_ends_at_rest(model: LlamaForCausalLM, factors: FactorSet) -> None:
    trainer = a_trainer(model, factors, clip=1e-3, schedule="cosine", num_steps=2)
    assert trainer.train_step(BATCH)["gradient_norm"] > 1e-2  # as it was before
    z = trainer.trainable.parameters["z"]
    assert z.grad is not None and float(z.grad.norm()) == pytest.approx(1e-3, rel=1e-3)
    trainer.train_step(BATCH)
    before = z.detach().clone()
    trainer.train_step(BATCH)
    assert torch.equal(z, before)


@pytest.mark.parametrize("kind", ["svf", "lora"])
def test_a_run_that_was_killed_and_resumed_ends_in_the_same_bytes(
    model: LlamaForCausalLM, factors: FactorSet, tmp_path: Path, kind: str
) -> None:
    whole = a_trainer(model, factors, kind=kind)
    for step in range(6):
        whole.train_step(BATCH)
        whole.validate([0.1, 0.5, 0.2, 0.4, 0.5, 0.3][step])

    killed = a_trainer(model, factors, kind=kind)
    for step in range(5):
        killed.train_step(BATCH)
        killed.validate([0.1, 0.5, 0.2, 0.4, 0.5, 0.3][step])
        if step == 2:
            killed.save(tmp_path / "checkpoint.safetensors")
    resumed = a_trainer(model, factors, kind=kind)
    assert resumed.resume(tmp_path / "checkpoint.safetensors")
    assert resumed.step == 3
    while resumed.step < 6:
        resumed.train_step(BATCH)
        resumed.validate([0.1, 0.5, 0.2, 0.4, 0.5, 0.3][resumed.step - 1])
    assert resumed.trainable.adapter().to_bytes() == whole.trainable.adapter().to_bytes()
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    # The best validation was before the kill.
    assert whole.best == resumed.best == (2, 0.5)
    last = whole.trainable.adapter().digest
    whole.take_best()
    resumed.take_best()
    assert whole.trainable.adapter().digest == resumed.trainable.adapter().digest != last


def test_a_checkpoint_of_another_run_and_a_torn_one_are_refused(
    model: LlamaForCausalLM, factors: FactorSet, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    trainer = a_trainer(model, factors)
    assert not trainer.resume(path)
    trainer.train_step(BATCH)
    trainer.save(path)
    with pytest.raises(CorruptArtefact, match="of a run with other options"):
        a_trainer(model, factors, run={"seed": 1}).resume(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptArtefact, match="delete it to start anew"):
        trainer.resume(path)


def test_a_learning_rate_that_breaks_the_model_is_named(model: LlamaForCausalLM, factors: FactorSet) -> None:
    trainer = a_trainer(model, factors, learning_rate=1e37, renormalise=False)
    with pytest.raises(InvalidRequest, match="learning_rate: the loss at step"):
        for _ in range(5):
            trainer.train_step(BATCH)


def test_greedy_answers_of_a_padded_batch_are_those_of_each_prompt_alone(model: LlamaForCausalLM) -> None:
    prompts = [one.prompt for one in BATCH]
    logits, answers = first_logits_and_answers(model, prompts, [1], max_tokens=5)
    for row, prompt in enumerate(prompts):
        sequence = list(prompt)
        alone = model(input_ids=torch.tensor([sequence])).logits[0, -1]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)
        expected: list[int] = []
        while len(expected) < 5:
            token = int(model(input_ids=torch.tensor([sequence])).logits[0, -1].argmax())
            if token == 1:
                break
            expected.append(token)
            sequence.append(token)
        assert list(answers[row]) == expected


def test_last_states_are_those_of_each_prompt_alone(model: LlamaForCausalLM) -> None:
    states = last_states(model, [one.prompt for one in BATCH], layer=1)
    for row, one in enumerate(BATCH):
        alone = model(input_ids=torch.tensor([one.prompt]), output_hidden_states=True).hidden_states[1][0, -1]
        torch.testing.assert_close(torch.tensor(states[row]), alone, rtol=1e-4, atol=1e-5)


def test_positions_count_from_each_rows_own_first_token() -> None:
    padded = left_padded([(5, 6), (7, 8, 9)])
    assert padded["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert padded["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]


def test_the_interval_of_a_paired_gain_is_the_normal_one_for_many_small_groups_and_wider_for_few() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.rand(400, generator=generator) < 0.4).tolist()
    ours = (torch.rand(400, generator=generator) < 0.7).tolist()
    gain, low, high = paired_gain(base, ours, [str(i) for i in range(400)])
    difference = torch.tensor(ours, dtype=torch.double) - torch.tensor(base, dtype=torch.double)
    half = 1.96 * float(difference.std()) / 400**0.5
    assert gain == pytest.approx(float(difference.mean()))
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=0.01)
    same_in_each = [bool(i // 100 % 2) for i in range(400)]
    _, low, high = paired_gain([False] * 400, same_in_each, [str(i // 100) for i in range(400)])
    assert high - low > 0.5
