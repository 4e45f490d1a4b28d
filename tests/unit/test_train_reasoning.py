import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs import train_reasoning
from metasepia.errors import CorruptArtefact, InvalidSettings, UnknownName
from metasepia.reasoning import shipped
from metasepia.reasoning.module import Block
from metasepia.reasoning.training import PRESETS, Recipe, TrainingRun, loss_of


def train(out: Path, *more: str) -> int:
    return train_reasoning.main(["--preset", "tiny", "--out", str(out), "--steps", "120", *more])


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bytes(tmp_path: Path):
    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "cut", "--max-seconds", "0") == 3
    assert train(tmp_path / "cut", "--max-seconds", "0") == 3
    with (tmp_path / "cut" / "loss.jsonl").open("a") as log:  # a line that a killed process wrote after its checkpoint
        log.write('{"step": 110, "loss": 9.0, "pairs": 9, "dims": 2}\n')
    assert train(tmp_path / "cut") == 0
    for name in ("model.safetensors", "checkpoint.safetensors", "loss.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_another_recipe_is_refused_by_the_checkpoint_of_the_first(tmp_path: Path):
    run = TrainingRun(PRESETS["tiny"])
    run.save(tmp_path / "checkpoint.safetensors")
    assert train(tmp_path, "--learning-rate", "0.5") == 2
    other = train_reasoning.recipe_of(train_reasoning.parser().parse_args(["--preset", "tiny", "--alphas", "1"]))
    assert isinstance(other, Recipe)
    with pytest.raises(InvalidSettings, match="setting task"):
        TrainingRun(other).restore(tmp_path / "checkpoint.safetensors")


def test_a_torn_checkpoint_is_called_corrupt(tmp_path: Path):
    path = tmp_path / "checkpoint.safetensors"
    TrainingRun(PRESETS["tiny"]).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptArtefact, match="checkpoint"):
        TrainingRun(PRESETS["tiny"]).restore(path)


def test_padding_to_a_few_lengths_changes_no_loss():
    plain, padded = TrainingRun(PRESETS["tiny"]), TrainingRun(PRESETS["tiny"], lengths=(6, 9))
    for _ in range(12):
        torch.testing.assert_close(plain.advance(), padded.advance(), atol=1e-5, rtol=1e-5)


def test_the_first_loss_is_near_that_of_a_guess():
    recipe = PRESETS["small"]
    run = TrainingRun(recipe)
    batch = recipe.batch_at(0)
    assert 0.6 < float(loss_of(run.module(batch.x, batch.y), batch.y).detach()) < 0.9  # ln 2 = 0.693 is a guess at 1/2


def test_the_papers_curriculum_is_full_from_step_8000():
    curriculum = PRESETS["paper"].curriculum
    sizes = [(curriculum.dims.at(s), curriculum.pairs.at(s)) for s in (0, 999, 1000, 3000, 7999, 8000, 35_000)]
    assert sizes == [(4, 18), (4, 18), (8, 48), (16, 108), (16, 228), (16, 258), (16, 258)]
    assert curriculum.pairs.first_full_step == 8000


def test_an_exported_module_loads_with_the_digest_of_its_stored_tensors(tmp_path: Path):
    run = TrainingRun(PRESETS["tiny"])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        digest = shipped.export(run.module, tmp_path / str(dtype), {}, dtype=dtype)
        loaded = shipped.load(str(tmp_path / str(dtype)))
        assert loaded.digest == digest
        for name, parameter in loaded.module.named_parameters():
            torch.testing.assert_close(parameter, run.module.get_parameter(name).to(dtype).float())


def test_a_module_whose_weights_are_not_its_cards_is_refused(tmp_path: Path):
    run = TrainingRun(PRESETS["tiny"])
    shipped.export(run.module, tmp_path, {})
    card = json.loads((tmp_path / "card.json").read_text())
    with torch.no_grad():
        run.module.positions[0, 0] += 1.0
    shipped.export(run.module, tmp_path, {})
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(CorruptArtefact, match="its card says"):
        shipped.load(str(tmp_path))


def test_an_unknown_module_names_the_shipped_ones(tmp_path: Path):
    shipped.export(TrainingRun(PRESETS["tiny"]).module, tmp_path / "one", {})
    with pytest.raises(UnknownName, match="no reasoning module named 'two'; known: one"):
        shipped.load("two", folder=tmp_path)


def test_large_weights_are_cut_into_files_that_load_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shipped, "_SHARD_BYTES", 10_000)
    run = TrainingRun(PRESETS["tiny"])
    digest = shipped.export(run.module, tmp_path, {})
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1 and all(len(load_file(f)) for f in files)
    assert shipped.load(str(tmp_path)).digest == digest


def test_a_compiler_that_fails_is_told_of_and_training_goes_on_without_it(tmp_path: Path, monkeypatch, capsys):
    def no_compiler(self: torch.nn.Module, **_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(Block, "compile", no_compiler)
    assert train(tmp_path, "--compile") == 0
    assert "runs uncompiled: RuntimeError: no C++ compiler" in capsys.readouterr().out


def test_exported_weights_alone_go_on_from_their_step(tmp_path: Path, capsys):
    assert train(tmp_path / "first", "--max-seconds", "0") == 3
    step = json.loads((tmp_path / "first" / "card.json").read_text())["step"]
    assert train(tmp_path / "second", "--warm-start", str(tmp_path / "first")) == 0
    assert f"goes on from step {step} of" in capsys.readouterr().out
    assert json.loads((tmp_path / "second" / "card.json").read_text())["step"] == 120
