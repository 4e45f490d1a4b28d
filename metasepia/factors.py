"""Weight matrices factored once, W = U diag(s) Vh, and the file that all processes share.

The file is keyed by backbone and layer names (DESIGN 5). It is made once and never once a replica, because near-equal
singular values rotate between runs, and an expert's multipliers follow their order. Factored in fp64 and stored in
fp32, so that two machines differ by rounding only.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metasepia.digests import short
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported
from metasepia.experts import FactorIndex, factors_path, index_path


@dataclass(frozen=True)
class SingularFactors:
    """A weight matrix W = U diag(s) Vh, factored once and kept; s descends, singular = min(out, in)."""

    u: Float[Tensor, "out singular"]
    s: Float[Tensor, " singular"]
    vh: Float[Tensor, "singular in"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"]) -> "SingularFactors":
        """In the weight's own precision if fp32 or fp64, else fp32."""
        weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
        return cls(*torch.linalg.svd(weight, full_matrices=False))

    def scaled(self, z: Float[Tensor, " leading"], renormalise: bool = False) -> Float[Tensor, "out in"]:
        """The weight with each singular value multiplied by the expert vector: n U diag(s * z) Vh.

        z = 1 gives back the original weight; a shorter z counts as 1 beyond its end. `renormalise` keeps the nuclear
        norm: n = sum(s) / sum(s z), else n = 1.
        """
        z = torch.cat([z, z.new_ones(len(self.s) - len(z))])
        return (self.u * compose(self.s, z, renormalise)) @ self.vh


def compose(
    s: Float[Tensor, " singular"], z: Float[Tensor, "*batch singular"], renormalise: bool
) -> Float[Tensor, "*batch singular"]:
    """n s z; differentiable in z."""
    scaled = s * z
    return scaled * (s.sum() / scaled.sum(-1, keepdim=True)) if renormalise else scaled


@dataclass(frozen=True)
class FactorSet:
    """The factors of one backbone's expert layers, by full parameter name (`model.layers.0.mlp.up_proj.weight`)."""

    digest: str
    backbone: str
    factors: Mapping[str, SingularFactors]

    def __getitem__(self, name: str) -> SingularFactors:
        return self.factors[name]

    @cached_property
    def index(self) -> FactorIndex:
        return FactorIndex(
            digest=self.digest, backbone=self.backbone, lengths={name: len(f.s) for name, f in self.factors.items()}
        )

    @property
    def num_singular(self) -> int:
        """Parameters of one expert: the sum of min(out, in) over the layers."""
        return sum(len(f.s) for f in self.factors.values())


def expert_layers_of(model: nn.Module, suffixes: Sequence[str]) -> dict[str, Tensor]:
    """The weights of the linear layers whose module name ends in one of `suffixes`, by parameter name.

    Raises InvalidSettings for a suffix that no layer has, naming the ends of names that this model does have, and
    NotSupported for a layer that stores its weight transposed.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    }
    found: dict[str, nn.Module] = {}
    for suffix in suffixes:
        matches = {name: module for name, module in linear.items() if f".{name}".endswith(f".{suffix}")}
        if not matches:
            ends = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise InvalidSettings("expert_layers", suffix, f"the end of a linear layer's name, here: {', '.join(ends)}")
        found |= matches
    for name, module in found.items():
        if type(module).__name__ == "Conv1D":
            raise NotSupported(f"layer {name} with a transposed weight", "experts act on torch.nn.Linear layers")
    return {f"{name}.weight": linear[name].weight for name in linear if name in found}  # pyright: ignore[reportReturnType]


def factors_of(
    model: nn.Module, suffixes: Sequence[str], backbone: str, home: Path, *, progress: bool = True
) -> FactorSet:
    """The factors of the layers that end in `suffixes`, mapped from `home/factors/<digest>.safetensors`.

    Missing ones are computed once, whole and unsharded, under a file lock: other processes wait and then share the
    file. A cached file that is not what it should be is computed anew. `backbone` is the backbone's digest.
    """
    layers = expert_layers_of(model, suffixes)
    shapes = {name: tuple(weight.shape) for name, weight in layers.items()}
    digest = FactorIndex.digest_for(backbone, tuple(layers))
    path = factors_path(digest, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        cached = _read(path, digest, backbone, shapes)
        if cached is not None:
            return cached
        computed = FactorSet(digest, backbone, _factor(layers, progress))
        _write(path, computed, home)
    cached = _read(path, digest, backbone, shapes)
    if cached is None:
        raise CorruptArtefact(f"factors {short(digest)}", "they changed on disk while they were read; start again")
    return cached


def _factor(layers: Mapping[str, Tensor], progress: bool) -> dict[str, SingularFactors]:
    from rich.progress import track

    factors: dict[str, SingularFactors] = {}
    with torch.no_grad():
        for name in track(list(layers), "Factoring the expert layers (once)", disable=not progress):
            exact = SingularFactors.of(layers[name].detach().double())
            factors[name] = SingularFactors(exact.u.float(), exact.s.float(), exact.vh.float())
    return factors


def _read(path: Path, digest: str, backbone: str, shapes: Mapping[str, tuple[int, ...]]) -> FactorSet | None:
    """None for a file that is missing, torn or of other layers: the caller computes it."""
    if not path.is_file() or not index_path(digest, path.parents[1]).is_file():
        return None
    try:
        tensors = load_file(path)
        factors = {n: SingularFactors(tensors[f"{n}/u"], tensors[f"{n}/s"], tensors[f"{n}/vh"]) for n in shapes}
    except (SafetensorError, KeyError):
        return None
    for name, (rows, columns) in shapes.items():
        f, singular = factors[name], min(rows, columns)
        if (f.u.shape, f.s.shape, f.vh.shape) != ((rows, singular), (singular,), (singular, columns)):
            return None
    return FactorSet(digest, backbone, factors)


def _write(path: Path, computed: FactorSet, home: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, f in computed.factors.items():
        tensors |= {f"{name}/u": f.u, f"{name}/s": f.s, f"{name}/vh": f.vh}
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch)
    scratch.chmod(0o644)  # safetensors writes 0600, and other users of this home may serve from it
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    scratch.replace(path)
    index = index_path(computed.digest, home)
    scratch = index.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(computed.index.to_json())
    scratch.replace(index)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the close, and by the kernel if this process dies
        yield
