"""The job on tiny random models: one of equal shape and other weights, and a narrower, deeper one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.transfer_expert import main, read_source, readme
from metasepia.errors import UnknownName
from metasepia.experts.factors import factors_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from tests import tiny

LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[[str], Path], home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert's directory."""
    checkpoint = tiny_checkpoint("llama")
    prepared = checkpoints.prepare(str(checkpoint), home)
    index = factors_of(checkpoints.load(prepared, torch.float32, "cpu"), LAYERS, prepared.digest, home).index
    rng = np.random.default_rng(0)
    z = {name: (1 + 0.3 * rng.standard_normal(length)).astype(np.float32) for name, length in index.lengths.items()}
    folder = tmp_path_factory.mktemp("expert")
    expert = ExpertVectors(backbone=prepared.digest, factors=index.digest, z=z)
    (folder / "expert.safetensors").write_bytes(expert.to_bytes())
    card = {"name": "odd", "task": "desk", "description": "Odd.", "backbone_source": str(checkpoint)}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def moved(source: Path, target: Path, home: Path, out: Path, *more: str) -> tuple[ExpertVectors, dict]:
    main([str(source), "--to", str(target), "--out", str(out), "--home", str(home), "--held-out", "8", *more])
    card = json.loads((out / "card.json").read_text())
    assert (out / "README.md").read_text() == readme(card)
    return ExpertVectors.from_bytes((out / "expert.safetensors").read_bytes()), card


def test_onto_equal_shape_the_vectors_go_in_order_and_the_card_says_where_they_came_from(
    source: Path, home: Path, tmp_path: Path
) -> None:
    target = tiny.save("llama", tmp_path / "other", weights_seed=1)
    expert, card = moved(source, target, home, tmp_path / "out")
    origin = ExpertVectors.from_bytes((source / "expert.safetensors").read_bytes())
    assert card["transferred"]["mode"] == "ordered" and card["transferred"]["from_expert"] == origin.digest
    assert card["transferred"]["from_backbone"] == origin.backbone != card["backbone"] == expert.backbone
    assert all((expert.z[name] == origin.z[name]).all() for name in origin.z)
    assert set(card["held_out"]) == {"task", "questions", "seed", "base", "ordered", "shuffled"}
    assert card["held_out"]["base"]["gain"] == 0 and card["held_out"]["questions"] == 8


def test_a_transferred_expert_is_an_ordinary_expert_of_another_shape_and_mixes_with_one_of_its_own(
    source: Path, home: Path, tmp_path: Path
) -> None:
    target = tiny.save("llama", tmp_path / "narrow", hidden_size=36, intermediate_size=60, num_hidden_layers=3)
    expert, card = moved(source, target, home, tmp_path / "out")
    assert card["transferred"]["mode"] == "interpolated" and "2 blocks and the other 3" in card["transferred"]["shapes"]
    prepared = checkpoints.prepare(str(target), home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    layers = attach(model, factors_of(model, LAYERS, prepared.digest, home))
    own = ExpertVectors(
        backbone=expert.backbone, factors=expert.factors, z={name: 2 - vector for name, vector in expert.z.items()}
    )
    for one in (expert, own):
        layers.put(one.digest, one)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        layers.select([()])
        base = model(ids).logits
        layers.select([((expert.digest, 1.0),)])
        assert (model(ids).logits - base).abs().max() > 1e-2
        layers.select([tuple(sorted(((expert.digest, 0.5), (own.digest, 0.5))))])  # their mean is z = 1
        torch.testing.assert_close(model(ids).logits, base, atol=1e-4, rtol=1e-4)


def test_the_control_can_be_written_and_is_no_other_than_the_one_measured(
    source: Path, home: Path, tmp_path: Path
) -> None:
    target = tiny.save("llama", tmp_path / "other", weights_seed=1)
    expert, card = moved(source, target, home, tmp_path / "out", "--mode", "shuffled", "--seed", "3")
    assert card["transferred"]["mode"] == "shuffled" and card["transferred"]["seed"] == 3
    assert {"base", "shuffled", "ordered"} <= set(card["held_out"])
    again, _ = moved(source, target, home, tmp_path / "again", "--mode", "shuffled", "--seed", "3")
    assert again.digest == expert.digest


def test_what_cannot_be_transferred_is_refused_in_words(
    source: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tiny.save("llama", tmp_path / "narrow", hidden_size=36)
    for given, words in (
        ([str(source), "--to", str(target), "--mode", "ordered"], "choose interpolated"),
        ([str(source), "--to", str(tmp_path / "nowhere")], "nowhere"),
        (["nobody", "--to", str(target)], "no expert named 'nobody'; known: desk"),
        ([str(source), "--to", str(target), "--task", "chess"], "no task named 'chess'"),
    ):
        with pytest.raises(SystemExit):
            main([*given, "--home", str(home), "--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().err
    with pytest.raises(UnknownName):
        read_source(str(tmp_path))
