"""Experts for other programs: as a low-rank adapter of a chosen rank, and merged into a checkpoint's weights.

An expert's difference is W' - W = U diag(d) Vh with d = s (n z - 1), so its singular values are |d|: the best
approximation of rank R keeps the R largest (Eckart and Young), and how much is lost is known without multiplying
anything. Low-rank adapters and their mixtures are cut in the same way, by the SVD of their product.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasepia.errors import InvalidRequest, InvalidSettings
from metasepia.experts.factors import FactorSet, SingularFactors
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import loading
from metasepia.models.checkpoints import TEXT_FILES
from metasepia.models.prepared import PreparedBackbone
from metasepia.stored import INDEX, StoredTensors, weight_files


@dataclass(frozen=True, kw_only=True)
class LayerLoss:
    """What one layer lost by the cut to a rank. Squared Frobenius norms."""

    rank: int
    """Kept; less than was asked for where the difference has no more."""
    exact_rank: int
    """Of the whole difference."""
    lost: float
    difference: float
    """Of W' - W."""
    weight: float | None = None
    """Of W; None for low-rank adapters, which come without it."""

    @property
    def relative(self) -> float:
        """||(W' - W) - kept|| / ||W' - W||: 0 is exact, 1 keeps nothing."""
        return math.sqrt(self.lost / self.difference) if self.difference else 0.0


def total_loss(losses: Mapping[str, LayerLoss]) -> LayerLoss:
    """All layers as one matrix."""
    weights = [one.weight for one in losses.values() if one.weight is not None]
    return LayerLoss(
        rank=max((one.rank for one in losses.values()), default=0),
        exact_rank=max((one.exact_rank for one in losses.values()), default=0),
        lost=sum(one.lost for one in losses.values()),
        difference=sum(one.difference for one in losses.values()),
        weight=sum(weights) if len(weights) == len(losses) else None,
    )


@dataclass(frozen=True)
class Difference:
    """W' - W = left diag(d) right of one layer, its singular values |d| in no order."""

    left: Float[Tensor, "out many"]
    d: Float[Tensor, " many"]
    right: Float[Tensor, "many in"]

    @property
    def matrix(self) -> Float[Tensor, "out in"]:
        return (self.left * self.d) @ self.right

    def cut(self, rank: int, weight: float | None) -> tuple[Tensor, Tensor, LayerLoss]:
        """(b, a) of the best rank, each with half of the singular value, and what is lost."""
        order = self.d.abs().argsort(descending=True, stable=True)
        exact = int((self.d != 0).sum())
        kept = order[: min(rank, exact)]
        root = self.d[kept].abs().sqrt()
        b, a = self.left[:, kept] * (root * self.d[kept].sign()), root[:, None] * self.right[kept]
        squares = self.d.double().square()
        lost = float(squares[order[len(kept) :]].sum())
        return (
            b,
            a,
            LayerLoss(rank=len(kept), exact_rank=exact, lost=lost, difference=float(squares.sum()), weight=weight),
        )


def difference_of_expert(factors: SingularFactors, z: Float[Tensor, " leading"], renormalise: bool) -> Difference:
    """Of an expert vector; a shorter z counts as 1 beyond its end."""
    s = factors.s.double()
    whole = torch.cat([z.double(), s.new_ones(len(s) - len(z))])
    d = s * whole - s
    if renormalise:
        d = s * whole * (s.sum() / (s * whole).sum()) - s
    kept = factors.u.shape[1]
    if kept < len(s) and bool(d[kept:].any()):
        raise InvalidSettings("rank", kept, f"{len(s)}: the factors on disk keep {kept} singular vectors of this layer")
    d = torch.where(d.abs() <= 1e-7 * s, 0.0, d)  # rounding of z = 1 is no change
    return Difference(factors.u, d[:kept].float(), factors.vh)


def difference_of_low_rank(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"]) -> Difference:
    """By two small QR factorisations; exact, the product is never built."""
    q_left, r_left = torch.linalg.qr(b.double())
    q_right, r_right = torch.linalg.qr(a.double().T)
    u, d, vh = torch.linalg.svd(r_left @ r_right.T)
    d = torch.where(d <= 1e-7 * d.max(), 0.0, d)
    return Difference((q_left @ u).float(), d.float(), (vh @ q_right.T).float())


Differences = Mapping[str, Callable[[], Difference]]
"""By parameter name; each is made when it is asked for, so that one layer at a time is in memory."""


def differences(adapter: ExpertVectors | LoraAdapter, factors: FactorSet | None) -> Differences:
    """The layers that an adapter changes. Raises CorruptArtefact for an expert that does not fit the factors."""
    if isinstance(adapter, LoraAdapter):
        return {
            layer: lambda a=a, b=adapter.b[layer]: difference_of_low_rank(torch.tensor(b), torch.tensor(a))
            for layer, a in adapter.a.items()
        }
    assert factors is not None  # whoever has an expert vector has its factors
    adapter.check_fits(factors.index)
    of, renormalise = factors.factors, adapter.renormalise
    return {
        layer: lambda layer=layer, z=z: difference_of_expert(of[layer], torch.tensor(z), renormalise)
        for layer, z in adapter.z.items()
    }


def low_rank(
    adapter: ExpertVectors | LoraAdapter, factors: FactorSet | None, rank: int
) -> tuple[LoraAdapter, dict[str, LayerLoss]]:
    """The best adapter of that rank, and by layer what it lost. Layers that are not changed are left out.

    Raises InvalidRequest for a rank below 1, and for an expert that changes nothing.
    """
    if rank < 1:
        raise InvalidRequest("rank", f"must be at least 1, got {rank}")
    a, b = {}, {}
    losses: dict[str, LayerLoss] = {}
    for layer, make in differences(adapter, factors).items():
        weight = None
        if factors is not None and isinstance(adapter, ExpertVectors):
            weight = float(factors[layer].s.double().square().sum())
        up, down, loss = make().cut(rank, weight)
        if loss.rank:
            losses[layer] = loss
            b[layer], a[layer] = up.contiguous().numpy(), down.contiguous().numpy()
    if not losses:
        raise InvalidRequest("expert", "it changes no weight: serve the backbone itself")
    return LoraAdapter(backbone=adapter.backbone, a=a, b=b), losses


def mixed_low_rank(parts: Sequence[tuple[float, LoraAdapter]]) -> LoraAdapter:
    """sum_k w_k b_k a_k as one adapter, exact: ranks add up."""
    layers = sorted({layer for _, one in parts for layer in one.a})
    a = {layer: torch.cat([torch.tensor(one.a[layer]) for _, one in parts if layer in one.a]) for layer in layers}
    b = {
        layer: torch.cat([w * torch.tensor(one.b[layer]) for w, one in parts if layer in one.b], dim=1)
        for layer in layers
    }
    return LoraAdapter(
        backbone=parts[0][1].backbone,
        a={layer: one.numpy() for layer, one in a.items()},
        b={layer: one.numpy() for layer, one in b.items()},
    )


def merge(
    prepared: PreparedBackbone, adapter: ExpertVectors | LoraAdapter, factors: FactorSet | None, directory: Path
) -> None:
    """Writes the backbone with the adapter merged in, as a Hugging Face directory: weights, config, tokenizer.

    File by file as the checkpoint has them, in its own dtype; no more than one file's tensors are in memory. Raises
    NotSupported for a checkpoint that transformers transforms while loading, InvalidSettings where a changed weight is
    stored for two parameters.
    """
    source = Path(prepared.path)
    stored = StoredTensors.of_directory(source)
    names = loading.stored_names(loading.skeleton(source, torch.float32), stored)
    changed = differences(adapter, factors)
    by_stored = {names[layer]: layer for layer in changed}
    for layer in changed:
        shared = [name for name, own in names.items() if own == names[layer] and name != layer]
        if shared:
            raise InvalidSettings("expert", layer, f"a weight of its own; {shared[0]} has the same")
    directory.mkdir(parents=True, exist_ok=True)
    for path in weight_files(source):
        tensors = load_file(path)
        for name in tensors.keys() & by_stored.keys():
            weight = tensors[name]
            tensors[name] = (weight.double() + changed[by_stored[name]]().matrix.double()).to(weight.dtype).contiguous()
        save_file(tensors, directory / path.name, metadata={"format": "pt"})
        (directory / path.name).chmod(0o644)
    for name in ("config.json", INDEX, *TEXT_FILES):
        for folder in (source, Path(prepared.tokenizer_dir)):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, directory / name)
                break
