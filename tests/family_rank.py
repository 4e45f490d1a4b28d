"""One rank of a small gang without Ray: cuts each family's tiny model and compares it with the whole one.

    python -m tests.family_rank WORLD RANK PORT DIRECTORY FAMILY...

DIRECTORY holds one checkpoint a family; the findings go to DIRECTORY/rank<RANK>of<WORLD>.json. All families in one
process: they share the gang, and only importing DeepSpeed takes time.
"""

import copy
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors import tensor_parallel
from metasepia.experts.factors import cut_factors, factors_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints

EXPERT_LAYERS = {
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.query_key_value"),
    "bloom": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.query_key_value"),
}
GROUP_TIMEOUT_S = 37.0


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


@torch.inference_mode()
def examine(directory: Path, family: str, world: int, rank: int) -> dict[str, Any]:
    whole = AutoModelForCausalLM.from_pretrained(directory / family, dtype=torch.float32).eval()
    backbone = hashlib.sha256(family.encode()).hexdigest()
    noise = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (3, 19), generator=noise)
    want = whole(ids, output_hidden_states=True)
    factors = factors_of(whole, EXPERT_LAYERS.get(family, EXPERT_LAYERS["llama"]), backbone, directory, progress=False)
    prepared = checkpoints.prepare(str(directory / family), directory / f"home{rank}")
    cut = tensor_parallel.load_shard(prepared, world, torch.float32, "cpu")
    # gloo first: a shared-memory sum that agreed with itself only would show.
    without_mask = cut(ids, output_hidden_states=True)
    reduce, all_reduce = tensor_parallel.choose_all_reduce(rank, world, 10.0, "cpu")
    masked = cut(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    shards = tensor_parallel.layer_shards(cut)
    shapes = {name: list(cut.get_parameter(name).shape) for name in shards}
    own = cut_factors(factors.digest, backbone, directory, {n: s for n, s in shards.items() if n in factors.factors})
    assert tensor_parallel.check_cuts(cut, factors, shards) == own.shards  # the whole factors, cut as they are used
    experts = attach(cut, own, tensor_parallel.check_cuts(cut, own, shards), reduce)

    draw = np.random.default_rng(1)
    vectors = [
        ExpertVectors(
            backbone=backbone,
            factors=factors.digest,
            z={name: draw.uniform(0.5, 1.5, len(f.s)).astype(np.float32) for name, f in factors.factors.items()},
        )
        for _ in range(2)
    ]
    ones = ExpertVectors(
        backbone=backbone,
        factors=factors.digest,
        z={name: np.ones(len(f.s), np.float32) for name, f in factors.factors.items()},
    )
    for one in (*vectors, ones):
        experts.put(one.digest, one)
    adapters = [((one.digest, 1.0),) for one in (*vectors, ones)]
    experts.select(adapters)
    mixed = cut(ids).logits
    materialised = []
    for row, one in enumerate(vectors):
        scaled = copy.deepcopy(whole)
        for name, z in one.z.items():
            scaled.get_parameter(name).copy_(factors[name].scaled(torch.from_numpy(z)))
        materialised.append(scaled(ids[row : row + 1]).logits[0])
    return {
        "world": tensor_parallel.tp_world_size(cut),
        "all_reduce": all_reduce,
        "sizes": {name: list(one.sizes) for name, one in shards.items()},
        "kinds": {name: one.kind for name, one in shards.items()},
        "shapes": shapes,
        "whole": sorted(name for name, _ in whole.named_parameters(remove_duplicate=False)),
        "bytes": sum(one.nbytes for one in cut.parameters()),
        "logits": max(far(got.logits, want.logits) for got in (without_mask, masked)),
        "same_choice": bool((masked.logits.argmax(-1) == want.logits.argmax(-1)).all()),
        "hidden": max(far(a, b) for a, b in zip(masked.hidden_states, want.hidden_states, strict=True)),
        "experts": max(far(mixed[row], one) for row, one in enumerate(materialised)),
        "experts_same_choice": all(
            bool((mixed[row].argmax(-1) == one.argmax(-1)).all()) for row, one in enumerate(materialised)
        ),
        "experts_moved": min(far(one, want.logits[row]) for row, one in enumerate(materialised)),
        "ones": far(mixed[2], want.logits[2]),
    }


def main() -> None:
    world, rank, port = (int(text) for text in sys.argv[1:4])
    directory, families = Path(sys.argv[4]), sys.argv[5:]
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if world > 1:
        from datetime import timedelta

        store = torch.distributed.TCPStore(
            "127.0.0.1", port, world, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False
        )
        tensor_parallel.join_process_group(rank, world, "127.0.0.1", port, GROUP_TIMEOUT_S, "cpu", store=store)
        found["timeout_s"] = tensor_parallel.group_timeout_s("cpu")
    for family in families:
        found[family] = examine(directory, family, world, rank)
    if world > 1:
        reduce, _ = tensor_parallel.choose_all_reduce(rank, world, 10.0, "cpu")
        found["sums"] = sums(reduce, rank)
        torch.distributed.barrier()
        found["silence_s"] = silence(rank, world)
    (directory / f"rank{rank}of{world}.json").write_text(json.dumps(found))
    torch.distributed.barrier() if world > 1 else None
    os._exit(0)  # gloo's threads may abort an ordinary exit


def sums(reduce: Any, rank: int) -> list[float]:
    """Errors of many sums of uneven sizes, one after another, against torch's own."""
    noise = torch.Generator().manual_seed(rank)
    errors = []
    for size in (1, 576, 4 * 576, 262_144, 262_145, 700_001, *range(1, 300)):
        part = torch.randn(size, generator=noise)
        want = part.clone()
        torch.distributed.all_reduce(want)
        errors.append(float((reduce(part) - want).abs().max()))
    strided = torch.randn(6, 4, generator=noise).t()
    want = strided.contiguous()
    torch.distributed.all_reduce(want)
    errors.append(float((reduce(strided.contiguous()) - want).abs().max()))
    return errors


def silence(rank: int, world: int) -> float:
    """How long rank 0 waits for a peer that never comes, with a deadline of half a second."""
    from actors import allreduce

    shared = allreduce.connect(rank, world, 0.5)
    if shared is None or rank != 0:
        return 0.0
    begin = time.monotonic()
    try:
        shared(torch.ones(3))
    except TimeoutError:
        return time.monotonic() - begin
    return -1.0


if __name__ == "__main__":
    main()
