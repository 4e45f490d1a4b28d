"""Memory plans: what they count is what models and files have, profiles quote them, and what they advise is enough."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import plan as plan_command
from cluster import settings as settings_of
from cluster.settings import BackboneSettings, ModelShapes
from metasepia.errors import InvalidSettings, NotSupported
from metasepia.experts.factors import factors_of_backbone
from metasepia.experts.vectors import found_factors
from metasepia.models import checkpoints, loading, planning
from metasepia.models.planning import GIB, Need
from tests import tiny

LARGE = ("llama-3-8b", "mistral-7b", "llama-3-70b")
NEED = Need(
    device="cuda",
    dtype="bfloat16",
    tp_size=1,
    expert_layers=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    expert_rank=0,
    max_rows=128,
    max_batch_tokens=131_072,
    max_prefix_tokens=8192,
    max_expert_bytes=512 << 20,
)


def config_of(profile: str) -> dict[str, Any]:
    shapes = settings_of.read(profile, {}).backbones[0].shapes
    assert shapes is not None
    return dataclasses.asdict(shapes)


def part(config: dict[str, Any], what: str, **changed: Any) -> int:
    parts = planning.plan(config, dataclasses.replace(NEED, **changed)).parts
    return next((one.num_bytes for one in parts if one.what == what), 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_tensors_planned_are_the_parameters_of_the_model(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    model = loading.skeleton(tiny_checkpoint(family), torch.float32)
    want = {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert planning.tensors_of(tiny.config_of(family).to_dict()) == want


@pytest.mark.parametrize(("profile", "billions"), [("llama-3-8b", 8.03), ("mistral-7b", 7.25), ("llama-3-70b", 70.55)])
def test_known_models_have_the_parameters_they_are_known_for(profile: str, billions: float) -> None:
    count = sum(math.prod(shape) for shape in planning.tensors_of(config_of(profile)).values())
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("profile", LARGE)
def test_a_profile_quotes_the_plan_that_the_command_prints(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command.main([profile]) == 0
    printed = capsys.readouterr().out.splitlines()
    text = (settings_of.PROFILES / f"{profile}.toml").read_text()
    quoted = text.split(f"# Memory, as `python -m cluster.plan {profile}` prints it:\n")[1].split("\ndispatch")[0]
    assert [line.removeprefix("# ") for line in quoted.splitlines()] == printed


@pytest.mark.parametrize("rank", [0, 7])
def test_the_factors_planned_on_disk_are_those_that_are_made(
    rank: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path)
    factors = factors_of_backbone(prepared, NEED.expert_layers, tmp_path, rank=rank, progress=False)
    need = dataclasses.replace(NEED, expert_rank=rank)
    planned = planning.plan(tiny.config_of("llama").to_dict(), need).factors_on_disk
    path = found_factors(factors.digest, tmp_path, rank)
    assert path is not None
    header_len = int.from_bytes(path.read_bytes()[:8], "little")
    assert planned == path.stat().st_size - 8 - header_len


def test_a_cut_layer_keeps_one_of_its_factors_whole() -> None:
    config = config_of("llama-3-70b")
    hidden, inner, singular, layers = 8192, 28_672, 8192, 80
    assert part(config, "factors", tp_size=8) == 2 * layers * singular * 3 * (inner // 8 + hidden)
    assert part(config, "factors", tp_size=8, expert_rank=64) == 2 * layers * 64 * 3 * (inner // 8 + hidden)
    assert part(config, "factors", tp_size=8, expert_layers=()) == 0


def test_keys_and_values_are_cut_by_heads_down_to_one() -> None:
    config = config_of("llama-3-70b")
    whole = part(config, "keys and values")
    assert part(config, "keys and values", tp_size=8) == pytest.approx(whole / 8)
    with pytest.raises(InvalidSettings, match="from 1 to 8, the key/value heads"):
        planning.plan(config, dataclasses.replace(NEED, tp_size=16))


@pytest.mark.parametrize(("profile", "memory_gib"), [("llama-3-8b", 40), ("llama-3-8b", 20), ("llama-3-70b", 79)])
def test_every_remedy_is_enough(profile: str, memory_gib: int) -> None:
    config, memory = config_of(profile), memory_gib * GIB
    assert planning.plan(config, NEED).num_bytes > memory
    remedies = planning.remedies(config, NEED, memory)
    assert remedies
    for remedy in remedies:
        changes = {name: int(value) for name, value in (one.split(" = ") for one in remedy.split(" with "))}
        assert planning.plan(config, dataclasses.replace(NEED, **changes)).num_bytes <= memory  # pyright: ignore[reportArgumentType]


def test_what_no_setting_mends_has_no_remedy() -> None:
    assert planning.remedies(config_of("llama-3-70b"), dataclasses.replace(NEED, expert_layers=()), 2 * GIB) == []


def test_the_command_fails_and_advises_where_a_rank_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METASEPIA_BACKBONES__0__RANK_MEMORY_GIB", "40")
    assert plan_command.main(["llama-3-70b"]) == 1
    assert "It does not fit. Enough would be max_batch_tokens = 131072" in capsys.readouterr().out


def test_a_start_that_would_not_fit_is_refused_with_what_to_change() -> None:
    backbone = dataclasses.replace(settings_of.read("llama-3-8b", {}).backbones[0], rank_memory_gib=40.0)
    with pytest.raises(InvalidSettings, match=r"rank_memory_gib = 40\.0 .*at least 62\.7.*or change tp_size = 2"):
        plan_command.check(backbone, config_of("llama-3-8b"))


def test_a_checkpoint_of_other_shapes_than_the_profile_expects_is_refused() -> None:
    backbone = settings_of.read("llama-3-8b", {}).backbones[0]
    with pytest.raises(InvalidSettings, match=r"shapes\.hidden_size = 4096 .*8192, as the checkpoint"):
        plan_command.check(backbone, config_of("llama-3-70b"))


def test_a_family_without_a_plan_is_named_with_those_that_have_one() -> None:
    with pytest.raises(NotSupported, match=r"'mamba'.*bloom, gpt_neox, llama, mistral, qwen2"):
        planning.plan({"model_type": "mamba"}, NEED)


def test_shapes_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidSettings, match="num_hidden_layers"):
        ModelShapes(**{**config_of("llama-3-8b"), "num_hidden_layers": 0})


def test_a_small_backbone_on_this_machine_is_planned_from_its_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = BackboneSettings(id="tiny", source=str(tiny_checkpoint("qwen2")))
    assert plan_command.config_of(backbone, tmp_path)["model_type"] == "qwen2"
