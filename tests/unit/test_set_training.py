import dataclasses
from pathlib import Path

import pytest
import torch

from jobs import train_reasoning
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.reasoning import shipped
from metasepia.reasoning.set_training import SET_PRESETS, SetTrainingRun, loss_of
from metasepia.synthetic.embeddings import EmbeddingLikeTasks
from metasepia.synthetic.tasks import Seeds


def train(out: Path, *more: str) -> int:
    return train_reasoning.main(["--preset", "set-tiny", "--out", str(out), "--steps", "120", *more])


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bytes(tmp_path: Path):
    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "cut", "--max-seconds", "0") == 3
    assert train(tmp_path / "cut") == 0
    for name in ("model.safetensors", "checkpoint.safetensors", "loss.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    loaded = shipped.load(str(tmp_path / "whole"))
    assert loaded.card["kind"] == "set"
    run = SetTrainingRun(dataclasses.replace(SET_PRESETS["set-tiny"], num_steps=120))
    run.restore(tmp_path / "whole" / "checkpoint.safetensors")
    for name, mean in run.mean.named_parameters():  # the running mean is what is exported, not the last weights
        torch.testing.assert_close(loaded.module.get_parameter(name), mean)


def test_another_recipe_is_refused_by_the_checkpoint_of_the_first(tmp_path: Path):
    run = SetTrainingRun(SET_PRESETS["set-tiny"])
    run.save(tmp_path / "checkpoint.safetensors")
    assert train(tmp_path, "--learning-rate", "0.5") == 2
    with pytest.raises(InvalidSettings, match="setting module_seed"):
        SetTrainingRun(dataclasses.replace(run.recipe, module_seed=3)).restore(tmp_path / "checkpoint.safetensors")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptArtefact, match="checkpoint"):
        run.restore(path)


@pytest.mark.parametrize("change", [["--alphas", "1"], ["--cooldown-steps", "3"], ["--precision", "bfloat16"]])
def test_what_a_set_module_does_not_have_is_refused_by_name(
    tmp_path: Path, change: list[str], capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path, *change) == 2
    assert change[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err


def test_a_batch_is_a_function_of_the_seeds_and_the_step():
    tasks = EmbeddingLikeTasks(states=500)
    first, again = (tasks.batch(Seeds(), 7) for _ in range(2))
    assert torch.equal(first.x, again.x) and torch.equal(first.hidden_labels, again.hidden_labels)
    other = tasks.batch(Seeds(), 8)
    assert other.x.shape != first.x.shape or not torch.equal(other.x, first.x)
    redrawn = [tasks.batch(dataclasses.replace(Seeds(), noise=99), step) for step in range(8)]
    assert not all(torch.equal(tasks.batch(Seeds(), step).y, other.y) for step, other in enumerate(redrawn))


def test_batches_keep_to_their_ranges_and_every_kind_occurs():
    tasks = EmbeddingLikeTasks(states=300)
    batches = [tasks.batch(Seeds(), step) for step in range(120)]
    for batch in batches:
        assert 4 <= batch.x.shape[1] <= (320 if batch.num_classes < 13 else 480) and 40 <= batch.x.shape[2] <= 512
        assert 2 <= batch.num_classes <= min(160, max(2, batch.x.shape[1] // 2))
        assert int(batch.y.min()) >= 0 and int(batch.y.max()) < batch.num_classes
        assert bool(batch.x.isfinite().all()) and batch.queries.shape[1] == 48
        beside = 0 if batch.unlabelled is None else batch.unlabelled.shape[1]
        assert batch.hidden_labels.shape[1] == beside + 48
    assert 40 < sum(batch.num_classes == 2 for batch in batches) < 90
    assert 20 < sum(batch.unlabelled is not None for batch in batches) < 65
    assert max(batch.num_classes for batch in batches) > 12
    counts = [torch.stack([one.bincount(minlength=batch.num_classes) for one in batch.y]) for batch in batches]
    balanced = sum(bool((count.amax(1) - count.amin(1) <= 1).all()) for count in counts)
    assert 40 < balanced < 100


def test_training_learns_and_begins_at_a_guess():
    tasks = EmbeddingLikeTasks(dims=(4, 6), examples=(20, 40), distance=(4.0, 8.0), states=3000)
    recipe = dataclasses.replace(SET_PRESETS["set-tiny"], tasks=tasks, num_steps=150)
    run = SetTrainingRun(recipe)
    fresh = [EmbeddingLikeTasks.batch(recipe.tasks, Seeds(task=50), step) for step in range(20)]

    def judge() -> float:
        with torch.no_grad():
            losses = [loss_of(run.module(b.x, b.y, b.queries, b.num_classes, b.unlabelled), b) for b in fresh]
        return float(torch.stack(losses).mean())

    before = judge()
    for _ in range(recipe.num_steps):
        run.advance()
    assert 0.8 < before < 1.5  # 1 is a guess
    assert judge() < 0.8


def test_a_run_may_begin_with_the_weights_of_another_and_its_card_says_so(tmp_path: Path):
    assert train(tmp_path / "first", "--stop-after", "50") == 0
    first = shipped.load(str(tmp_path / "first"))
    assert first.card["step"] == first.card["num_steps"] == 50
    begin = ["--warm-start", str(tmp_path / "first")]
    assert train(tmp_path / "second", *begin, "--seed", "5", "--max-seconds", "0") == 3
    assert train(tmp_path / "second", *begin, "--seed", "5") == 0  # resumes, and does not begin again
    assert train(tmp_path / "whole", *begin, "--seed", "9") == 0
    second = shipped.load(str(tmp_path / "second"))
    source = second.card["began_from"]
    assert isinstance(source, dict) and source["digest"] == first.digest
    whole = shipped.load(str(tmp_path / "whole"))
    assert second.digest == whole.digest  # seeds of initial weights do not matter after a warm start
    assert second.digest != first.digest
