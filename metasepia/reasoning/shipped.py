"""Trained modules on disk: a folder with `model*.safetensors`, `card.json`, a README and a picture of the loss.

`assets/modules/default.json` names the one that settings mean by "default".
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metasepia.digests import digest_of
from metasepia.errors import CorruptArtefact, UnknownName
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.set_module import SetModule, SetShape
from metasepia.reasoning.training import write_tensors

MODULES = Path(__file__).parents[1] / "assets" / "modules"
_SHARD_BYTES = 15 << 20
_SHAPES: dict[str, type[ModuleShape] | type[SetShape]] = {"causal": ModuleShape, "set": SetShape}


@dataclass(frozen=True)
class LoadedModule:
    """A module ready to answer, with its identity."""

    name: str
    digest: str
    """Over the shape and the tensors as stored."""
    module: ReasoningModule | SetModule
    card: dict[str, object]


def names(folder: Path = MODULES) -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in folder.glob("*/card.json")))


def folder_of(name: str, folder: Path = MODULES) -> Path:
    """Where a module lies: "default", a shipped name, or a path to a folder or to its safetensors file.

    Raises UnknownName, which lists the shipped ones.
    """
    if name == "default":
        name = json.loads((folder / "default.json").read_text())["module"]
    if (folder / name / "card.json").is_file():
        return folder / name
    path = Path(name)
    path = path.parent if path.suffix == ".safetensors" else path
    if (path / "card.json").is_file():
        return path
    raise UnknownName("reasoning module", name, names(folder))


def load(name: str = "default", *, folder: Path = MODULES, device: torch.device | str = "cpu") -> LoadedModule:
    """The module in float32, in eval mode, its weights frozen.

    Raises UnknownName, and CorruptArtefact when weights and card disagree or a value is not finite.
    """
    path = folder_of(name, folder)
    card = json.loads((path / "card.json").read_text())
    tensors: dict[str, Tensor] = {}
    try:
        for shard in sorted(path.glob("model*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptArtefact(str(path), str(error)) from error
    shape = _SHAPES[card["kind"]](**card["shape"])
    digest = _digest(shape, tensors)
    if card.get("digest") != digest:
        raise CorruptArtefact(str(path), f"its weights have the digest {digest}, its card says {card.get('digest')}")
    module = SetModule(shape) if isinstance(shape, SetShape) else ReasoningModule(shape)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CorruptArtefact(str(path), str(error)) from error
    if not all(bool(p.isfinite().all()) for p in module.parameters()):
        raise CorruptArtefact(str(path), "a weight is not finite")
    return LoadedModule(path.name, digest, module.to(device).eval().requires_grad_(False), card)


def export(
    module: ReasoningModule | SetModule, path: Path, card: dict[str, object], *, dtype: torch.dtype = torch.float32
) -> str:
    """Writes weights (files of at most 15 MiB) and card; returns the digest."""
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("model*.safetensors"):
        old.unlink()
    tensors = {name: p.detach().to("cpu", dtype) for name, p in module.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        num_bytes = sum(t.numel() * t.element_size() for t in shards[-1].values())
        if shards[-1] and num_bytes + tensor.numel() * tensor.element_size() > _SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    for i, shard in enumerate(shards):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1}-of-{len(shards)}.safetensors"
        write_tensors(path / file_name, shard, {"format": "pt"})
    digest = _digest(module.shape, tensors)
    shape = dataclasses.asdict(module.shape)
    whole = {
        "digest": digest,
        "kind": _kind(module.shape),
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        **card,
    }
    (path / "card.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    return digest


def _kind(shape: ModuleShape | SetShape) -> str:
    return next(kind for kind, of in _SHAPES.items() if isinstance(shape, of))


def _digest(shape: ModuleShape | SetShape, tensors: Mapping[str, Tensor]) -> str:
    header = {"kind": f"module/{_kind(shape)}", "shape": dataclasses.asdict(shape)}
    return digest_of(header, {key: _as_bytes(tensor) for key, tensor in tensors.items()})


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor for a digest; numpy has no bfloat16, whose bits stand for it."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
