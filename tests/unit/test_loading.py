"""Weights read by shard: the same numbers as transformers gives, and no more of them than a rank's share."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from metasepia import stored
from metasepia.digests import digest_of_safetensors
from metasepia.errors import CorruptArtefact
from metasepia.models import checkpoints, loading
from metasepia.models.shards import LayerShard
from metasepia.stored import StoredTensors
from tests import tiny

Checkpoint = Callable[[str], Path]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def filled(directory: Path, dtype: torch.dtype) -> Any:
    tensors = StoredTensors.of_directory(directory)
    model = loading.skeleton(directory, dtype)
    loading.fill(model, tensors, loading.stored_names(model, tensors), {}, "cpu")
    return model


def in_several_files(directory: Path, where: Path) -> Path:
    """The same checkpoint as transformers saves a large one: several files and an index."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    shutil.copytree(directory, where, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(where, max_shard_size="40KB")
    assert len(list(where.glob("*.safetensors"))) > 2
    return where


def assert_same(mine: nn.Module, its: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        one, other = (dict(getattr(m, kind)()) for m in (mine, its))
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_filled_skeleton_has_the_bits_that_transformers_loads(
    family: str, dtype: torch.dtype, tiny_checkpoint: Checkpoint
) -> None:
    directory = tiny_checkpoint(family)
    assert_same(filled(directory, dtype), AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))


def test_scaled_rotary_frequencies_are_computed_as_transformers_does(tmp_path: Path) -> None:
    directory = tiny.save("llama", tmp_path, rope_parameters=LLAMA3_ROPE)
    its = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_config(tiny.config_of("llama"))
    assert not torch.equal(its.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert_same(filled(directory, torch.bfloat16), its)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_a_checkpoint_in_several_files_is_the_same_checkpoint(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = tiny_checkpoint(family)
    several = in_several_files(directory, tmp_path / "several")
    assert_same(filled(several, torch.float32), filled(directory, torch.float32))
    files = [stored.weight_files(one) for one in (directory, several)]
    assert digest_of_safetensors({}, files[0]) == digest_of_safetensors({}, files[1])
    (several / "consolidated.safetensors").write_bytes(b"another form of the same weights, not in the index")
    one, other = (checkpoints.prepare(str(where), tmp_path / "home") for where in (directory, several))
    assert one.digest == other.digest


@pytest.mark.parametrize("family", ["bloom", "gpt_neox"])
def test_names_without_the_base_models_prefix_are_found(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As the published BLOOM checkpoints spell them."""
    directory = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "bare"))
    tensors = load_file(directory / "model.safetensors")
    prefix = {"bloom": "transformer.", "gpt_neox": "gpt_neox."}[family]
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(bare, directory / "model.safetensors", {"format": "pt"})
    assert_same(filled(directory, torch.float32), filled(tiny_checkpoint(family), torch.float32))


RECTANGLES = [
    (slice(None), slice(None)),
    (slice(3, 11), slice(None)),
    (slice(None), slice(2, 5)),  # parts of rows too short to be read one by one
    (slice(5, 29), slice(600, 1500)),
    (slice(7, 7), slice(None)),
]


@pytest.mark.parametrize("buffer_bytes", [1, 9000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), RECTANGLES)
def test_a_rectangle_is_read_as_it_would_be_sliced(
    rows: slice, columns: slice, dtype: torch.dtype, buffer_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BUFFER_BYTES", buffer_bytes)
    whole = torch.randn(31, 1537, generator=torch.Generator().manual_seed(0))
    save_file({"other": torch.zeros(3), "w": whole.to(torch.bfloat16)}, tmp_path / "a.safetensors")
    want = whole.to(torch.bfloat16)[rows, columns].to(dtype)
    got = torch.empty_like(want)
    StoredTensors([tmp_path / "a.safetensors"]).read("w", got, rows, columns)
    assert torch.equal(got, want)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator makes off the meta device."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


def cut(model: Any, rank: int, world: int) -> dict[str, LayerShard]:
    """Cuts the feed-forward layers of a skeleton by hand."""
    shards: dict[str, LayerShard] = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in ("gate_proj", "up_proj", "down_proj"):
            kind = "row" if leaf == "down_proj" else "column"
            side = module.weight.shape[1 if kind == "row" else 0]
            shard = LayerShard(kind, (side // world,) * world, rank)
            module.weight = nn.Parameter(module.weight[shard.part_of(2)], requires_grad=False)
            shards[f"{name}.weight"] = shard
    return shards


def test_a_rank_reads_and_allocates_its_share_and_never_a_whole_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1}
    directory = tiny.save("llama", tmp_path, **sizes)
    tensors = StoredTensors.of_directory(directory)
    model = loading.skeleton(directory, torch.float32)
    names = loading.stored_names(model, tensors)
    shards = cut(model, 1, 4)
    monkeypatch.setattr(stored, "BUFFER_BYTES", 1 << 16)
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    with Largest() as largest:
        loading.fill(model, tensors, names, shards, "cpu")
    share = sum(p.nbytes for p in model.parameters())
    assert sum(read) == share < 0.6 * tensors.num_bytes
    assert largest.num_bytes == max(p.nbytes for p in model.parameters()) < 4 * 768 * 3072
    whole = load_file(directory / "model.safetensors")
    for name, shard in shards.items():
        assert torch.equal(model.get_parameter(name), whole[name][shard.part_of(2)])


def spoilt(directory: Path, how: str) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if how == "missing":
        del tensors["model.norm.weight"]
    elif how == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    elif how == "untied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    elif how == "index":
        index = {"weight_map": {name: "model-00001-of-00002.safetensors" for name in tensors}}
        (directory / stored.INDEX).write_text(json.dumps(index))
    elif how == "outside":
        (directory / stored.INDEX).write_text(json.dumps({"weight_map": {"w": "../model.safetensors"}}))
    elif how == "unknown":
        tensors = {name: tensor.to(torch.complex64) for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    if how == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "twice":
        shutil.copy(file, directory / "again.safetensors")


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("missing", r"lacks the tensors model\.norm\.weight"),
        ("shape", r"does not fit"),
        ("untied", r"ties lm_head\.weight to model\.embed_tokens\.weight and they differ"),
        ("index", r"names model-00001-of-00002\.safetensors, which is not there"),
        ("outside", r"names model\.safetensors, which is not there"),
        ("unknown", r"is stored as C64"),
        ("torn", r"ends inside tensor"),
        ("twice", r"is in again\.safetensors too"),
    ],
)
def test_files_that_are_not_the_models_are_refused_in_words(
    how: str, problem: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "spoilt"))
    spoilt(directory, how)
    with pytest.raises(CorruptArtefact, match=problem):
        filled(directory, torch.float32)


def test_a_head_that_is_tied_and_stored_too_is_one_tensor(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "both"))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model = filled(directory, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_files_are_read_ahead_unless_they_would_fill_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1000)}, file)
    assert stored.read_ahead([file])
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1)
    assert not stored.read_ahead([file])
