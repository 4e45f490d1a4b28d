"""LoRA adapters as values and files, and PEFT's directories: what PEFT wrote gives PEFT's logits, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load, save
from transformers import AutoModelForCausalLM

from metasepia.errors import CorruptArtefact, NotSupported
from metasepia.experts.lora import LoraAdapter, linear_shapes, read_adapter
from metasepia.experts.peft_files import CONFIG, PREFIX, WEIGHTS, read_peft, write_peft
from metasepia.experts.vectors import ExpertVectors

BACKBONE = "b" * 64
SHAPES = {"layers.0.up.weight": (3, 4), "layers.0.down.weight": (4, 3)}
TOKENS = torch.arange(1, 9)[None]


def an_adapter(**changes: Any) -> LoraAdapter:
    draw = np.random.default_rng(0)
    a = {n: draw.normal(size=(2, columns)).astype(np.float32) for n, (_, columns) in SHAPES.items()}
    b = {n: draw.normal(size=(rows, 2)).astype(np.float32) for n, (rows, _) in SHAPES.items()}
    return LoraAdapter(**({"backbone": BACKBONE, "a": a, "b": b} | changes))


def test_an_adapter_read_back_is_the_adapter_written_and_is_told_from_an_expert():
    written = an_adapter()
    blob = written.to_bytes()
    read = read_adapter(blob, "x")
    assert isinstance(read, LoraAdapter)
    assert (read.digest, read.to_bytes(), read.rank, read.num_bytes) == (written.digest, blob, 2, 4 * 28)
    read.check_fits(SHAPES)
    expert = ExpertVectors(backbone=BACKBONE, factors="f" * 64, z={"layers.0.up.weight": np.ones(3, np.float32)})
    assert isinstance(read_adapter(expert.to_bytes(), "x"), ExpertVectors)


def test_the_digest_changes_with_everything_that_changes_the_answer():
    one = an_adapter()
    bumped = {n: array + np.float32(1e-3) for n, array in one.b.items()}
    fewer = {n: {k: v for k, v in getattr(one, n).items() if "up" in k} for n in ("a", "b")}
    swapped = {"a": {n: one.a[n][::-1] for n in one.a}, "b": {n: one.b[n][:, ::-1] for n in one.b}}
    others = [an_adapter(backbone="c" * 64), an_adapter(b=bumped), an_adapter(**fewer), an_adapter(**swapped)]
    assert len({one.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t | {"layers.0.up.weight/a": t["layers.0.up.weight/a"].astype(np.float16)}, "must be float32"),
        (lambda t: t | {"layers.0.up.weight/a": t["layers.0.up.weight/a"] * np.float32(np.nan)}, "NaN or infinity"),
        (lambda t: t | {"layers.0.up.weight/a": t["layers.0.up.weight/a"][:1]}, "they must be"),
        (lambda t: t | {"layers.0.up.weight/a": t["layers.0.up.weight/a"][0]}, "they must be"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("up.weight/b")}, "has not both of a and b"),
        (lambda t: t | {"layers.0.up.weight/c": t["layers.0.up.weight/a"]}, "neither a nor b"),
        (lambda t: {"stray": t["layers.0.up.weight/a"]}, "a tensor without a layer"),
    ],
)
def test_a_file_that_is_not_pairs_of_finite_matrices_is_refused(change: Callable[[Any], Any], problem: str):
    blob = an_adapter().to_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    changed = {name: np.ascontiguousarray(array) for name, array in change(load(blob)).items()}
    with pytest.raises(CorruptArtefact, match=problem):
        read_adapter(save(changed, header), "x")


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_a_truncated_file_and_a_pickle_are_refused(cut: int):
    with pytest.raises(CorruptArtefact, match="not a safetensors file"):
        read_adapter(an_adapter().to_bytes()[:cut], "x")
    with pytest.raises(CorruptArtefact, match="not a safetensors file"):
        read_adapter(b"PK\x03\x04" + bytes(200), "x")


def test_a_layer_that_the_backbone_lacks_or_has_in_another_shape_is_named():
    with pytest.raises(CorruptArtefact, match="none of the backbone's 1 linear layers"):
        an_adapter().check_fits({"layers.0.up.weight": (3, 4)})
    with pytest.raises(CorruptArtefact, match=r"for a weight \[3, 4\] and the layer's is \[3, 5\]"):
        an_adapter().check_fits(SHAPES | {"layers.0.up.weight": (3, 5)})


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


def _load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def _written_by_peft(checkpoint: Path, out: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """A random adapter saved by PEFT, and the logits of PEFT's model."""
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | options))
    model: Any = get_peft_model(_load(checkpoint), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        logits = model(TOKENS).logits
    model.save_pretrained(out)
    return out, logits


def _files(directory: Path) -> tuple[bytes, bytes]:
    return (directory / CONFIG).read_bytes(), (directory / WEIGHTS).read_bytes()


@torch.no_grad()
def _logits_with(checkpoint: Path, adapter: LoraAdapter) -> torch.Tensor:
    model = _load(checkpoint)
    for layer, a in adapter.a.items():
        model.get_parameter(layer).add_(torch.tensor(adapter.b[layer]) @ torch.tensor(a))
    return model(TOKENS).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 20, r".*\.down_proj": 3}},
        {"layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "all-linear", "patterns", "one block"],
)
def test_what_peft_wrote_gives_pefts_logits(checkpoint: Path, tmp_path: Path, options: dict[str, Any]):
    directory, logits = _written_by_peft(checkpoint, tmp_path, **options)
    adapter = read_peft(*_files(directory), BACKBONE, linear_shapes(checkpoint))
    base = _load(checkpoint)(TOKENS).logits
    assert float((logits - base).abs().max()) > 1e-2
    torch.testing.assert_close(_logits_with(checkpoint, adapter), logits, atol=1e-5, rtol=1e-4)


def test_what_we_write_peft_loads_with_the_same_logits_ranks_filled_up(checkpoint: Path, tmp_path: Path):
    directory, logits = _written_by_peft(checkpoint, tmp_path / "theirs", rank_pattern={"down_proj": 2})
    adapter = read_peft(*_files(directory), BACKBONE, linear_shapes(checkpoint))
    ours = tmp_path / "ours"
    ours.mkdir()
    config, weights = write_peft(adapter, "base")
    (ours / CONFIG).write_bytes(config)
    (ours / WEIGHTS).write_bytes(weights)
    assert {len(one) for name, one in load(weights).items() if "lora_A" in name} == {4}
    loaded: Any = PeftModel.from_pretrained(_load(checkpoint), str(ours))
    torch.testing.assert_close(loaded(TOKENS).logits, logits, atol=1e-5, rtol=1e-4)


def test_adapters_in_half_precision_are_read(checkpoint: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    directory, _ = _written_by_peft(checkpoint, tmp_path)
    exact = read_peft(*_files(directory), BACKBONE, linear_shapes(checkpoint))
    for dtype, close in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        halved = {name: one.to(dtype) for name, one in load_file(directory / WEIGHTS).items()}
        save_file(halved, tmp_path / "half.safetensors")
        read = read_peft(
            _files(directory)[0], (tmp_path / "half.safetensors").read_bytes(), BACKBONE, _shapes_of(exact)
        )
        for layer, a in read.a.items():
            np.testing.assert_allclose(a, exact.a[layer], rtol=close)


def _shapes_of(adapter: LoraAdapter) -> dict[str, tuple[int, int]]:
    return {layer: (len(adapter.b[layer]), a.shape[1]) for layer, a in adapter.a.items()}


def _small(**config: Any) -> tuple[bytes, bytes, str, dict[str, tuple[int, int]]]:
    adapter = an_adapter()
    written, weights = write_peft(adapter, "base")
    return json.dumps(json.loads(written) | config).encode(), weights, BACKBONE, SHAPES


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [1]}, "embeddings"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"layer_replication": [[0, 1]]}, "repeats layers"),
        ({"alora_invocation_tokens": [3]}, "aLoRA"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"invented_next_year": {"x": 1}}, "invented_next_year"),
        ({"rank_pattern": {"(a+)+b": 2}}, "at most two"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_kinds_of_adapter_that_are_not_a_sum_are_refused_by_name(config: dict[str, Any], words: str):
    with pytest.raises(NotSupported, match=words):
        read_peft(*_small(**config))


@pytest.mark.parametrize("config", [{"r": 3}, {"r": 0}, {"r": True}, {"lora_alpha": None}, {"lora_alpha": -1}], ids=str)
def test_a_config_that_contradicts_the_file_or_has_no_numbers_is_refused(config: dict[str, Any]):
    with pytest.raises(CorruptArtefact, match=r"rank|must be a number"):
        read_peft(*_small(**config))


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        (PREFIX + "layers.0.emb.lora_embedding_A", NotSupported, "embeddings"),
        (PREFIX + "layers.0.up.lora_magnitude_vector.weight", NotSupported, "DoRA"),
        (PREFIX + "layers.0.up.lora_B.bias", NotSupported, "lora_B.bias"),
        ("layers.0.up.lora_A.weight", CorruptArtefact, "no tensor of a LoRA"),
        (PREFIX + "layers.0.gate.lora_A.weight", CorruptArtefact, "has not both"),
    ],
)
def test_tensors_that_a_sum_would_leave_out_are_refused_by_name(key: str, error: type[Exception], words: str):
    config, weights, backbone, shapes = _small()
    tensors = load(weights) | {key: np.ones((2, 4), np.float32)}
    with pytest.raises(error, match=words):
        read_peft(config, save(tensors), backbone, shapes)
