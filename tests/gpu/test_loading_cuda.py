"""Weights and factors read by shard straight onto a GPU. Needs a CUDA device: `pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors import tensor_parallel
from metasepia.experts.factors import cut_factors, factors_of_backbone
from metasepia.models import checkpoints
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_read_onto_the_gpu_has_the_bits_that_transformers_loads(
    family: str, dtype: torch.dtype, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = checkpoints.prepare(str(tiny_checkpoint(family)), tmp_path)
    mine = tensor_parallel.load_shard(prepared, 1, dtype, "cuda")
    its = AutoModelForCausalLM.from_pretrained(prepared.path, dtype=dtype)
    for kind in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(mine, kind)()), dict(getattr(its, kind)())
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].device.type == "cuda"
            assert torch.equal(one[name].cpu(), other[name]), name


def test_factors_made_on_the_gpu_rebuild_the_weights_and_are_read_onto_it(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path)
    made = factors_of_backbone(prepared, ("mlp.down_proj",), tmp_path, device="cuda", progress=False)
    model = tensor_parallel.load_shard(prepared, 1, torch.float32, "cuda")
    mine = cut_factors(made.digest, made.backbone, tmp_path, {}, device="cuda")
    assert tensor_parallel.check_cuts(model, mine, {}) == {}
    for name, one in mine.factors.items():
        torch.testing.assert_close(one.scaled(torch.ones_like(one.s)), model.get_parameter(name).data)
