"""DeepSpeed's tensor parallelism: the process group, the cutting of a model, the all-reduce. The only import of it.

A model is cut while it has no memory (`metasepia.models.loading.skeleton`); each rank then reads its own part of every
weight from the checkpoint. torch and DeepSpeed are imported inside the functions, so a gang's owner needs neither.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.digests import short
from metasepia.errors import CorruptArtefact
from metasepia.models.prepared import PreparedBackbone

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from metasepia.experts.factors import FactorSet
    from metasepia.models.shards import LayerShard


def load() -> None:
    """Imports DeepSpeed, which takes time: part of what a spare has behind it."""
    import deepspeed  # noqa: F401


def join_process_group(
    rank: int, world: int, address: str, port: int, timeout_s: float, device: str, store: Any = None
) -> None:
    """The process group of this gang, with our own timeout, and DeepSpeed's communication over it.

    `store` is rank 0's; the others connect to it. Once a process.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        # Ray shows each process its own GPU only, as number 0.
        "LOCAL_RANK": "0" if device == "cuda" else str(rank),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    if address == "127.0.0.1":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import deepspeed

    # Its own shared-memory all-reduce spins for ever when a peer dies, and leaves 66 MiB a rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        store = dist.TCPStore(address, port, world, is_master=False, timeout=timedelta(seconds=60))
    if device == "cuda":
        torch.cuda.set_device(0)
    # Before DeepSpeed does it: an initialised group is taken over, and its own would wait for 30 minutes.
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False, timeout=timeout)


class _WholeGroup:
    """DeepSpeed's `mpu`: every rank of the process belongs to the one tensor-parallel group."""

    def get_model_parallel_group(self) -> Any:
        import torch.distributed as dist

        return dist.group.WORLD


def load_shard(
    prepared: PreparedBackbone, world: int, dtype: "torch.dtype", device: "torch.device | str"
) -> "PreTrainedModel":
    """This rank's part of a checkpoint, on `device`; of its files it reads nothing else.

    The process group of `world` ranks must be there. The families and what they may be cut into were checked by
    `families.check`, before any process was started; others run whole and are read by transformers. Raises
    CorruptArtefact for files that are not the model's.
    """
    import torch

    from metasepia.models import checkpoints, families, loading
    from metasepia.stored import StoredTensors

    is_whole_on_cpu = world == 1 and torch.device(device).type == "cpu"
    if is_whole_on_cpu or prepared.model_type not in families.FAMILIES:
        assert world == 1, f"{prepared.model_type} cannot be cut"
        return checkpoints.load(prepared, dtype, str(device))  # mapped where it can be: processes share its pages
    directory = Path(prepared.path)
    stored = StoredTensors.of_directory(directory)
    model = loading.skeleton(directory, dtype)
    names = loading.stored_names(model, stored)
    model = cut(model, world, dtype)
    loading.fill(model, stored, names, layer_shards(model), device)
    return model


def cut(model: "PreTrainedModel", world: int, dtype: "torch.dtype") -> "PreTrainedModel":
    """This rank's part of `model`, which is on the meta device, cut in place along the tested policy of its family."""
    import importlib
    import logging

    import deepspeed
    import torch
    import torch.distributed as dist

    from metasepia.models import families

    if world == 1:
        return model  # nothing to cut, and init_inference would round the rotary frequencies to dtype
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = model.config.to_dict()
    families.check(config, world)
    family = families.FAMILIES[config["model_type"]]
    block = getattr(importlib.import_module(family.module), family.block)
    # DeepSpeed ends by giving a meta model memory: all of it at once, tied weights twice, buffers without their values.
    model.to_empty = lambda **_: model  # pyright: ignore[reportAttributeAccessIssue]
    shared = deepspeed.init_inference(
        model,
        dtype=dtype,
        # mpu and tp_group both: mpu alone leaves every rank whole, without a word; tp_group alone is overwritten by a
        # group of 30 minutes.
        tensor_parallel={
            "tp_size": world,
            "mpu": _WholeGroup(),
            "tp_group": dist.group.WORLD,
            "tp_grain_size": families.grain(config, world),
        },
        injection_policy={block: family.row_parallel},
    ).module
    del model.to_empty
    if config["model_type"] == "bloom":
        # Without a mask BLOOM builds ALiBi for all its heads, around the method that DeepSpeed replaced.
        def with_mask(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(args[0] if args else kwargs["input_ids"])
            return args, kwargs

        shared.transformer.register_forward_pre_hook(with_mask, with_kwargs=True)
    assert tp_world_size(shared) == world, "DeepSpeed left this rank whole"
    return shared


def choose_all_reduce(
    rank: int, world: int, timeout_s: float, device: str
) -> "tuple[Callable[[torch.Tensor], torch.Tensor], str]":
    """The gang's sum over ranks and its name; DeepSpeed's layers use it from now on."""
    import torch.distributed as dist

    from actors import allreduce

    if world == 1:
        return lambda tensor: tensor, "none"
    shared = allreduce.connect(rank, world, timeout_s) if device == "cpu" else None

    def reduce(tensor: "torch.Tensor") -> "torch.Tensor":
        if shared is not None and shared.takes(tensor):
            return shared(tensor)
        dist.all_reduce(tensor)
        return tensor

    import deepspeed.comm.comm as comm

    comm.cdb.inference_all_reduce = lambda tensor, op=None, group=None: reduce(tensor)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    return reduce, "shared memory" if shared is not None else dist.get_backend()


def _cut_layers(model: "torch.nn.Module") -> "dict[str, Any]":
    return {f"{name}.weight": layer for name, layer in model.named_modules() if hasattr(layer, "_partition_sizes")}


def tp_world_size(model: "torch.nn.Module") -> int:
    """The tensor-parallel size that every cut layer agrees on; 1 if none is cut."""
    sizes = {layer.tp_world_size for layer in _cut_layers(model).values()}
    assert len(sizes) <= 1, f"layers are cut over {sizes} ranks"
    return sizes.pop() if sizes else 1


def group_timeout_s(device: str) -> float:
    """The deadline of a collective, as the default process group itself has it."""
    import torch
    import torch.distributed as dist

    group = dist.distributed_c10d._get_default_group()
    return group._get_backend(torch.device(device)).options._timeout.total_seconds()


def layer_shards(model: "torch.nn.Module") -> "dict[str, LayerShard]":
    """How DeepSpeed cut each layer, by parameter name, from the layer's own record."""
    import deepspeed.module_inject.layers as layers

    from metasepia.models.shards import LayerShard

    return {
        name: LayerShard(
            kind="row" if isinstance(layer, layers.LinearAllreduce) else "column",
            sizes=tuple(layer._partition_sizes),
            rank=layer.tp_index,
        )
        for name, layer in _cut_layers(model).items()
    }


def check_cuts(
    model: "torch.nn.Module", factors: "FactorSet", shards: "dict[str, LayerShard]"
) -> "dict[str, LayerShard]":
    """The shards of the factored layers, after their factors, cut the same way, agreed with each rank's own weight.

    Compared on one random vector in the span of the singular vectors that are kept, where W Vh^T = U diag(s): a wrong
    cut differs everywhere, and rebuilding every matrix would cost a restart seconds. Raises CorruptArtefact when they
    differ.
    """
    import torch

    noise = torch.Generator().manual_seed(0)
    for name, one in factors.factors.items():
        weight, cut = model.get_parameter(name).detach(), shards.get(name)
        u, vh = one.u, one.vh
        if cut is not None and name not in factors.shards:
            rows, columns = cut.part_of(2)
            u, vh = u[rows], vh[:, columns]
        if (len(u), vh.shape[1]) == tuple(weight.shape):
            c = torch.randn(len(vh), generator=noise).to(vh)
            scaled = one.s[: len(c)].to(vh) * c
            if cut is not None and cut.kind == "row":
                want, got = weight.t() @ (u @ c).to(weight), vh.t() @ scaled
            else:
                want, got = weight @ (vh.t() @ c).to(weight), u @ scaled
            tolerance = (1e-4 if weight.dtype == torch.float32 else 3e-2) * float(want.float().norm())
            if float((want.float() - got.to(weight.device).float()).norm()) <= tolerance:
                continue
        raise CorruptArtefact(
            f"factors {short(factors.digest)}", f"{name}, cut as {cut}, does not give back this rank's weight"
        )
    return {name: cut for name, cut in shards.items() if name in factors.factors}
