"""A backbone that keeps the leading singular vectors alone serves truncated experts as a whole one does; no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.tensor_parallel import check_cuts
from cluster.settings import BackboneSettings
from metasepia.errors import CorruptArtefact, NotSupported
from metasepia.experts.factors import cut_factors, factors_of_backbone
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.shards import LayerShard
from serve.experts import accepting

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
RANK = 12


@pytest.mark.parametrize("renormalise", [False, True])
@torch.inference_mode()
def test_truncated_experts_are_served_alike_from_the_leading_factors_and_from_all(
    renormalise: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path)
    whole = factors_of_backbone(prepared, MLP, tmp_path, progress=False)
    leading = cut_factors(whole.digest, whole.backbone, tmp_path, {}, rank=RANK)
    draw = np.random.default_rng(0)
    z = {name: draw.uniform(0.4, 1.8, len(one.s)).astype(np.float32) for name, one in whole.factors.items()}
    full = ExpertVectors(backbone=prepared.digest, factors=whole.digest, z=z, renormalise=renormalise)
    short = full.truncated(RANK, whole.index)
    ids = torch.arange(9)[None]
    logits = []
    for factors in (whole, leading):
        model = AutoModelForCausalLM.from_pretrained(prepared.path).eval()
        base = model(ids).logits
        experts = attach(model, factors)
        experts.put(short.digest, short)
        experts.select([((short.digest, 1.0),)])
        logits.append(model(ids).logits)
    assert (logits[0] - base).abs().max() > 0.01 * base.abs().max()
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4 * float(base.abs().max()), rtol=0)
    with pytest.raises(NotSupported, match=f"leading {RANK}; truncate"):
        experts.put(full.digest, full)


def test_the_door_refuses_an_expert_longer_than_what_is_kept(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path)
    index = factors_of_backbone(prepared, MLP, tmp_path, rank=RANK, progress=False).index
    settings = BackboneSettings(id="tiny", source=str(tiny_checkpoint("llama")), expert_layers=MLP, expert_rank=RANK)
    fits = accepting.Fits.of(settings, prepared, tmp_path)
    assert fits.index == index and fits.s is not None
    for length in (RANK, RANK + 1):
        z = {name: np.ones(length, np.float32) for name in index.lengths}
        expert = ExpertVectors(backbone=prepared.digest, factors=index.digest, z=z)
        if length == RANK:
            accepting._check(expert, fits)
        else:
            with pytest.raises(CorruptArtefact, match=r"keeps the leading 12 \(expert_rank\); truncate it"):
                accepting._check(expert, fits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [0, RANK])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_factors_cut_otherwise_than_the_weight_are_found_out(
    kind: Literal["column", "row"],
    kept: int,
    dtype: torch.dtype,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path)
    whole = factors_of_backbone(prepared, MLP, tmp_path, progress=False)
    name = "model.layers.0.mlp.up_proj.weight" if kind == "column" else "model.layers.0.mlp.down_proj.weight"
    mine = LayerShard(kind, (48, 48), 1)
    model = AutoModelForCausalLM.from_pretrained(prepared.path, dtype=dtype)
    owner = model.get_submodule(name.removesuffix(".weight"))
    owner.weight = torch.nn.Parameter(model.get_parameter(name)[mine.part_of(2)].detach().clone())
    for shard in (mine, LayerShard(kind, (48, 48), 0)):
        read = cut_factors(whole.digest, whole.backbone, tmp_path, {name: shard}, rank=kept, dtype=dtype)
        for factors in (read, whole):
            if shard == mine:
                assert check_cuts(model, factors, {name: mine}) == {name: mine}
            else:
                with pytest.raises(CorruptArtefact, match="does not give back this rank's weight"):
                    check_cuts(model, factors, {name: shard})
