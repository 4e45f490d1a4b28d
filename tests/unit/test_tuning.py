from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.svf import ExpertLayers, attach, factors_of
from metasepia.tuning import (
    Answered,
    ExpertTrainer,
    answer_loss,
    first_logits_and_answers,
    last_states,
    left_padded,
    paired_gain,
)

BATCH = [Answered((5, 9, 3), (7, 1)), Answered((4, 2, 8, 6, 5), (11, 12, 1)), Answered((9,), (7, 1))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def a_model(home: Path) -> tuple[LlamaForCausalLM, ExpertLayers]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    factors = factors_of(model, ("mlp.up_proj", "mlp.down_proj"), "b" * 64, home, progress=False)
    return model, attach(model, factors)


def a_trainer(
    home: Path, learning_rate: float = 0.05, renormalise: bool = True, **run: object
) -> tuple[ExpertTrainer, LlamaForCausalLM]:
    model, layers = a_model(home)
    names = list(layers.spans)[2:]
    trainer = ExpertTrainer(
        model, layers, names=names, learning_rate=learning_rate, renormalise=renormalise, run={"seed": 0} | run
    )
    return trainer, model


def test_the_loss_is_the_mean_over_answer_tokens_of_each_row_alone(home: Path) -> None:
    model, _ = a_model(home)
    loss, right = answer_loss(model, BATCH)
    total, num_tokens, rows_right = 0.0, 0, 0
    for one in BATCH:
        logits = model(input_ids=torch.tensor([one.prompt + one.answer])).logits[0]
        predicted = logits[len(one.prompt) - 1 : -1]
        wanted = torch.tensor(one.answer)
        total += float(torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum"))
        num_tokens += len(one.answer)
        rows_right += bool((predicted.argmax(-1) == wanted).all())
    assert float(loss) == pytest.approx(total / num_tokens, rel=1e-5)
    assert right == pytest.approx(rows_right / len(BATCH))


def test_training_lowers_the_loss_and_touches_the_named_layers_only(home: Path) -> None:
    trainer, model = a_trainer(home, learning_rate=0.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = [trainer.train_step(BATCH)["loss"] for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    assert set(trainer.expert().z) == set(list(trainer._layers.spans)[2:])
    assert bool((trainer.z[: trainer._layers.spans[trainer._names[0]].start] == 1).all())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_that_was_killed_and_resumed_ends_in_the_same_bytes(home: Path, tmp_path: Path) -> None:
    whole, _ = a_trainer(home)
    for _ in range(6):
        whole.train_step(BATCH)

    killed, _ = a_trainer(home)
    for step in range(5):
        killed.train_step(BATCH)
        if step == 2:
            killed.save(tmp_path / "checkpoint.safetensors")
    resumed, _ = a_trainer(home)
    assert resumed.resume(tmp_path / "checkpoint.safetensors")
    assert resumed.step == 3
    while resumed.step < 6:
        resumed.train_step(BATCH)
    assert resumed.expert().to_bytes() == whole.expert().to_bytes()
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_a_checkpoint_of_another_run_and_a_torn_one_are_refused(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    trainer, _ = a_trainer(home, seed=0)
    assert not trainer.resume(path)
    trainer.train_step(BATCH)
    trainer.save(path)
    with pytest.raises(CorruptArtefact, match="of a run with other options"):
        a_trainer(home, seed=1)[0].resume(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptArtefact, match="delete it to start anew"):
        trainer.resume(path)


def test_a_learning_rate_that_breaks_the_model_is_named(home: Path) -> None:
    trainer, _ = a_trainer(home, learning_rate=1e37, renormalise=False)
    with pytest.raises(InvalidRequest, match="learning_rate: the loss at step"):
        for _ in range(5):
            trainer.train_step(BATCH)


def test_greedy_answers_of_a_padded_batch_are_those_of_each_prompt_alone(home: Path) -> None:
    model, layers = a_model(home)
    prompts = [one.prompt for one in BATCH]
    logits, answers = first_logits_and_answers(model, layers, (), prompts, [1], max_tokens=5)
    layers.select(())
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


def test_last_states_are_those_of_each_prompt_alone(home: Path) -> None:
    model, layers = a_model(home)
    states = last_states(model, layers, [one.prompt for one in BATCH], layer=1)
    layers.select(())
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
