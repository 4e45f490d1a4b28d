"""The gang on one GPU, tp_size 1: the same code, other kernels. Several GPUs (NCCL) take `tp_size` and were not run."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.connect import connect
from cluster.settings import BackboneSettings, RaySettings
from metasepia.models import checkpoints
from tests import gangs

pytestmark = pytest.mark.gpu

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of the largest value: CUDA sums in another order; bfloat16 keeps eight bits."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["OMP_NUM_THREADS"] = "1"
    connect(RaySettings(num_cpus=8.0, num_gpus=1.0, object_store_gib=0.5))
    yield
    ray.shutdown()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_a_gang_on_a_gpu_agrees_with_the_reference_on_the_cpu(
    cluster: None, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, dtype: str
) -> None:
    layers = ("mlp.up_proj", "mlp.down_proj") if family == "llama" else ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    settings = BackboneSettings(
        id="tiny",
        source=str(tiny_checkpoint(family)),
        device="cuda",
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        rank_gpus=0.5,
        expert_layers=layers,
    )
    prepared = checkpoints.prepare(settings.source, tmp_path)
    oracle = gangs.Oracle.of(prepared, settings, tmp_path)
    rows = gangs.rows(prepared, oracle.adapters, max_tokens=8)

    async def ask() -> tuple[list[list[int]], list[np.ndarray], list[np.ndarray]]:
        async with gangs.started(settings, prepared, tmp_path, fetch=oracle.fetch) as group:
            tokens = await asyncio.gather(*(gangs.tokens_of(group, row) for row in rows))
            states = await asyncio.gather(*(group.hidden_states(row) for row in rows))
            want = [await oracle.reference.hidden_states(row) for row in rows]
            return tokens, [one.states for one in states], [one.states for one in want]

    tokens, states, want = asyncio.run(ask())
    for row, emitted in zip(rows, tokens, strict=True):
        assert oracle.regret(row, emitted) < TOLERANCES[dtype]
    for mine, its in zip(states, want, strict=True):
        np.testing.assert_allclose(mine, its, atol=TOLERANCES[dtype] * float(np.abs(its).max()), rtol=0)
