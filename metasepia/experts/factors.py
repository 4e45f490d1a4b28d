"""Weight matrices factored once, W = U diag(s) Vh, and the file that all processes share.

The file is keyed by backbone and layer names (DESIGN 5). It is made once and never once a replica, because near-equal
singular values rotate between runs, and an expert's multipliers follow their order. Factored in fp64 and stored in
fp32, so that two machines differ by rounding only. A file may hold the leading singular vectors alone, with all the
singular values: what truncated experts need, and all that a large backbone has room for.
"""

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metasepia.digests import short
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported
from metasepia.experts.factor_files import FactorFile
from metasepia.experts.vectors import FactorIndex, factors_path, found_factors, index_path
from metasepia.models.prepared import PreparedBackbone
from metasepia.models.shards import LayerShard
from metasepia.stored import StoredTensors

ONE_THREAD = 1024
"""Singular values of a matrix up to which one thread factors it."""


@dataclass(frozen=True)
class SingularFactors:
    """A weight matrix W = U diag(s) Vh, factored once and kept; s descends, singular = min(out, in).

    Of u and vh the leading vectors alone may be kept; s is always whole.
    """

    u: Float[Tensor, "out kept"]
    s: Float[Tensor, " singular"]
    vh: Float[Tensor, "kept in"]

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
    shards: Mapping[str, LayerShard] = field(default_factory=dict)
    """How `factors` are cut already; a layer that is not named is whole."""
    rank: int = 0
    """Leading singular vectors that `factors` have, of each layer that has more; 0: all of them. s is always whole."""

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
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in layers.items()}
    return _made(shapes, lambda name: layers[name].detach(), backbone, home, 0, "cpu", progress)


def factors_of_backbone(
    prepared: PreparedBackbone,
    suffixes: Sequence[str],
    home: Path,
    *,
    rank: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> FactorSet:
    """As `factors_of`, with the model left on disk: one weight at a time is read, factored on `device` and written.

    What is written stays: a process that was ended in between goes on where it stopped. `rank` keeps the leading
    singular vectors alone, in a file of their own unless the whole factors are there.
    """
    from metasepia.models import checkpoints, loading

    directory = Path(prepared.path)
    model = loading.skeleton(directory, torch.float32)
    layers = expert_layers_of(model, suffixes)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in layers.items()}
    stored = StoredTensors.of_directory(directory)
    try:
        names = loading.stored_names(model, stored)
    except NotSupported:  # transformers makes its parameters out of several tensors
        whole = expert_layers_of(checkpoints.load(prepared, torch.float32, "cpu"), suffixes)
        return _made(shapes, lambda name: whole[name].detach(), prepared.digest, home, rank, device, progress)
    return _made(
        shapes, lambda name: stored.load(names[name], torch.float32), prepared.digest, home, rank, device, progress
    )


def cut_factors(
    digest: str,
    backbone: str,
    home: Path,
    shards: Mapping[str, LayerShard],
    *,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FactorSet:
    """A rank's part of factors that are on disk: each layer is read when it is asked for, and is not kept.

    Of a layer that `shards` names only this rank's rows of u or columns of vh are read, and of every layer the
    leading `rank` singular vectors. Raises CorruptArtefact for factors that are missing or not what their index says.
    """
    index = FactorIndex.read(digest, home)
    path = found_factors(digest, home, rank)
    if path is None:
        raise CorruptArtefact(f"factors {short(digest)}", "they are not there; run `python -m jobs.factor_backbone`")
    parts = _Parts(StoredTensors([path]), tuple(index.lengths), shards, rank, dtype, device)
    return FactorSet(digest, backbone, parts, shards=dict(shards), rank=rank)


class _Parts(Mapping[str, SingularFactors]):
    """Reads one layer's factors, cut, whenever they are asked for."""

    def __init__(
        self,
        stored: StoredTensors,
        names: tuple[str, ...],
        shards: Mapping[str, LayerShard],
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._stored, self._names, self._shards, self._rank = stored, names, shards, rank
        self._dtype, self._device = dtype, device

    def __getitem__(self, name: str) -> SingularFactors:
        if name not in self._names:
            raise KeyError(name)
        rows, columns = self._shards.get(name, LayerShard()).part_of(2)
        leading = slice(self._rank or None)
        try:
            return SingularFactors(
                u=self._read(f"{name}/u", rows, leading, self._dtype),
                s=self._read(f"{name}/s", slice(None), slice(None), torch.float32),
                vh=self._read(f"{name}/vh", leading, columns, self._dtype),
            )
        except KeyError as error:
            raise CorruptArtefact("the factors", f"they lack {error}; delete them and start again") from error

    def _read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        shape = self._stored[name].shape
        sides = [len(range(*part.indices(side))) for part, side in zip((rows, columns), shape, strict=False)]
        part = torch.empty(sides, dtype=dtype, device=self._device)
        self._stored.read(name, part, rows, columns)
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _made(
    shapes: Mapping[str, tuple[int, int]],
    weight: Callable[[str], Tensor],
    backbone: str,
    home: Path,
    rank: int,
    device: str,
    progress: bool,
) -> FactorSet:
    """The factors of the named weights, from disk; what is missing is made first, each weight in its turn."""
    from rich.progress import track

    digest = FactorIndex.digest_for(backbone, tuple(shapes))
    lengths = {name: min(shape) for name, shape in shapes.items()}
    directory = factors_path(digest, home).parent
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / f"{digest}.lock"):
        cached = _read(digest, backbone, home, shapes, rank)
        if cached is not None:
            return cached
        file = FactorFile(factors_path(digest, home, rank), shapes, rank)
        what = "Factoring the expert layers (once)"
        with _threads(max(lengths.values())):
            for name in track(file.missing(), what, disable=not progress, total=len(shapes), completed=file.num_done):
                with torch.no_grad():
                    exact = SingularFactors.of(weight(name).to(device).double())
                file.put(name, exact.u.float().cpu(), exact.s.float().cpu(), exact.vh.float().cpu())
        file.finish()
        index = index_path(digest, home)
        scratch = index.with_suffix(".tmp")
        scratch.write_text(FactorIndex(digest=digest, backbone=backbone, lengths=lengths).to_json())
        scratch.replace(index)
    cached = _read(digest, backbone, home, shapes, rank)
    if cached is None:
        raise CorruptArtefact(f"factors {short(digest)}", "they changed on disk while they were read; start again")
    return cached


@contextmanager
def _threads(length: int) -> Iterator[None]:
    """One where the matrices are small: LAPACK's threads wait for each other all the time, and beside other work two
    took 20 times as long as one (matrices of 576, two busy cores)."""
    before = torch.get_num_threads()
    if length <= ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(digest: str, backbone: str, home: Path, shapes: Mapping[str, tuple[int, int]], rank: int) -> FactorSet | None:
    """None for a file that is missing, torn or of other layers: the caller computes it."""
    path = found_factors(digest, home, rank)
    if path is None or not index_path(digest, home).is_file():
        return None
    try:
        tensors = load_file(path)
        factors = {n: SingularFactors(tensors[f"{n}/u"], tensors[f"{n}/s"], tensors[f"{n}/vh"]) for n in shapes}
    except (SafetensorError, KeyError):
        return None
    for name, (rows, columns) in shapes.items():
        f, singular = factors[name], min(rows, columns)
        kept = f.u.shape[1]
        if (f.u.shape, f.s.shape, f.vh.shape) != ((rows, kept), (singular,), (kept, columns)):
            return None
        if kept < min(rank or singular, singular):
            return None
        if rank and kept > rank:
            factors[name] = SingularFactors(f.u[:, :rank], f.s, f.vh[:rank])
    return FactorSet(digest, backbone, factors, rank=rank)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the close, and by the kernel if this process dies
        yield
