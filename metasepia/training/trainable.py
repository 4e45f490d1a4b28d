"""What training changes of a frozen causal model: singular values (SVF, arXiv:2501.06252) or low-rank products (LoRA).

Both stand on a twin of the model, which shares its weights and has its own modules, so that the model itself stays what
it was. Nothing but the few trained numbers has a gradient: of SVF not even a layer's dW is built, the gradient reaches
z through y = U ((n s z) * (Vh x)).
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasepia.errors import InvalidSettings
from metasepia.experts.factors import FactorSet, SingularFactors, compose, expert_layers_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors

Form = Literal["paper", "reference"]
"""How the trained numbers give z: themselves, from 1 (paper); sigmoid(p), each layer's nuclear norm kept (reference).

The reference's z lies in (0, 1) and starts near 0.525 everywhere: harmless only because n = sum(s) / sum(s z) takes a
constant factor out again. Without it the same start multiplies every weight by 0.525, which no model survives. Where
only leading singular values are trained the others keep z = 1, so there z = sigmoid(p) / sigmoid(0.1).
"""
REFERENCE_MEAN, REFERENCE_SPREAD = 0.1, 0.01
"""Of the reference's p at the start: 0.1 + 0.01 N(0, 1)."""


def twin(model: nn.Module) -> Any:
    """A copy of a model that shares its parameters and buffers: modules can be replaced in one and not the other."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def names_in_blocks(names: Sequence[str], first: int, end: int | None) -> list[str]:
    """The layers in the transformer blocks [first, end), by the first number in their names; all blocks by default.

    Raises InvalidSettings where that leaves none.
    """
    blocks = {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names}
    chosen = [name for name in names if first <= blocks[name] and (end is None or blocks[name] < end)]
    if not chosen:
        raise InvalidSettings("blocks", (first, end), f"a range that meets the blocks 0 to {max(blocks.values())}")
    return chosen


class SingularLinear(nn.Module):
    """A linear layer whose leading `rank` singular values are multiplied by `z`; None: the stored weight alone."""

    def __init__(self, inner: nn.Module, factors: SingularFactors, rank: int | None, renormalise: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter = inner.weight  # pyright: ignore[reportAttributeAccessIssue]
        self.bias: nn.Parameter | None = getattr(inner, "bias", None)
        self.rank = len(factors.s) if rank is None else min(rank, len(factors.s))
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.u = factors.u[:, : self.rank].to(**like).contiguous()
        self.vh = factors.vh[: self.rank].to(**like)
        self.s = factors.s.to(self.weight.device)
        self._renormalise = renormalise
        # Rounded factors do not multiply back to W: below fp32, as where singular values are left out, W stays and
        # the difference is added.
        self._whole = self.rank == len(factors.s) and self.weight.dtype in (torch.float32, torch.float64)
        self.scale: Tensor | None = None
        self.norm: Tensor | None = None

    def set_z(self, z: Float[Tensor, " rank"] | None) -> None:
        self.scale = self.norm = None
        if z is None:
            return
        all_z = torch.cat([z, z.new_ones(len(self.s) - self.rank)])
        scaled = compose(self.s, all_z, self._renormalise)
        if self._whole:
            self.scale = scaled
            return
        leading = self.s[: self.rank]
        norm = self.s.sum() / (self.s * all_z).sum() if self._renormalise else None
        # n W + U diag(n s (z - 1)) Vh
        self.scale = scaled[: self.rank] - (leading if norm is None else norm * leading)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return nn.functional.linear(x, self.weight, self.bias)
        h = nn.functional.linear(x, self.vh)
        h = (h * self.scale).to(h.dtype)
        if self._whole:
            return nn.functional.linear(h, self.u, self.bias)
        y = nn.functional.linear(x, self.weight)
        y = y if self.norm is None else (y * self.norm).to(h.dtype)
        y = y + nn.functional.linear(h, self.u)
        return y if self.bias is None else y + self.bias


class SingularValues:
    """Expert vectors z being trained on the layers named."""

    def __init__(
        self,
        model: nn.Module,
        factors: FactorSet,
        names: Sequence[str],
        *,
        form: Form = "paper",
        renormalise: bool = False,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """`rank`: so many leading singular values a layer; None: all. `seed` draws the reference form's start.

        Raises InvalidSettings for a rank below 1 and for the reference form without its renormalisation.
        """
        if rank is not None and rank < 1:
            raise InvalidSettings("rank", rank, "at least 1")
        if form == "reference" and not renormalise:
            raise InvalidSettings("renormalise", renormalise, "on with the reference's form, which starts at z = 0.525")
        self.model = twin(model)
        self._factors, self._form, self._renormalise = factors, form, renormalise
        self._layers: dict[str, SingularLinear] = {}
        for name in names:
            path = name.removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            layer = SingularLinear(self.model.get_submodule(path), factors[name], rank, renormalise)
            setattr(self.model.get_submodule(parent), leaf, layer)
            self._layers[name] = layer.train(self.model.training)
        num = sum(layer.rank for layer in self._layers.values())
        if form == "paper":
            start = torch.ones(num)
        else:
            noise = torch.randn(num, generator=torch.Generator().manual_seed(seed))
            start = REFERENCE_MEAN + REFERENCE_SPREAD * noise
        truncated = any(layer.rank < len(layer.s) for layer in self._layers.values())
        self._unit = 1 / (1 + float(np.exp(-REFERENCE_MEAN))) if truncated else 1.0
        self._parameter = nn.Parameter(start.to(next(iter(self._layers.values())).s.device))
        self.renew()

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return {"z": self._parameter}

    @property
    def num_parameters(self) -> int:
        return self._parameter.numel()

    @property
    def z(self) -> dict[str, Float[Tensor, " rank"]]:
        """By layer; differentiable in the parameter."""
        flat = self._parameter if self._form == "paper" else torch.sigmoid(self._parameter) / self._unit
        parts = flat.split([layer.rank for layer in self._layers.values()])
        return dict(zip(self._layers, parts, strict=True))

    def renew(self) -> None:
        """Puts the parameters as they are now into the model, differentiably."""
        for name, z in self.z.items():
            self._layers[name].set_z(z)

    @contextmanager
    def base(self) -> Iterator[None]:
        """In which the model is the base model."""
        for layer in self._layers.values():
            layer.set_z(None)
        try:
            yield
        finally:
            self.renew()

    def adapter(self) -> ExpertVectors:
        z = {name: one.detach().float().cpu().numpy().copy() for name, one in self.z.items()}
        factors = self._factors
        return ExpertVectors(backbone=factors.backbone, factors=factors.digest, z=z, renormalise=self._renormalise)

    @property
    def largest_change(self) -> float:
        """Of a multiplier, the nuclear norm's factor included if it is kept: max |n z - 1|."""
        changes: list[float] = []
        for name, z in self.z.items():
            s = self._layers[name].s
            z = torch.cat([z.detach(), z.new_ones(len(s) - len(z))])
            norm = float(s.sum() / (s * z).sum()) if self._renormalise else 1.0
            changes.append(float((norm * z - 1).abs().max()))
        return max(changes)


class LowRank:
    """LoRA as Hugging Face PEFT trains it, on the layers named; B starts at 0, so the start is the base model."""

    def __init__(
        self, model: nn.Module, backbone: str, names: Sequence[str], *, rank: int = 16, alpha: float = 32, seed: int = 0
    ) -> None:
        """`seed` draws A. Raises InvalidSettings for a rank below 1, and where PEFT is not installed."""
        if rank < 1:
            raise InvalidSettings("rank", rank, "at least 1")
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise InvalidSettings("adapter", "lora", "installed: pip install metasepia[train]") from error
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            target_modules=[name.removesuffix(".weight") for name in names],
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.peft: Any = get_peft_model(twin(model), config).eval()
        self._backbone, self._names, self._scaling = backbone, tuple(names), alpha / rank
        self.model = self.peft
        self._parameters = {
            f"{name}/{part}": getattr(self._layer(name), f"lora_{part}")["default"].weight
            for name in names
            for part in ("A", "B")
        }

    def _layer(self, name: str) -> Any:
        return self.peft.base_model.model.get_submodule(name.removesuffix(".weight"))

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    @property
    def num_parameters(self) -> int:
        return sum(one.numel() for one in self._parameters.values())

    def renew(self) -> None:
        """Nothing to do: PEFT's layers hold the parameters."""

    def base(self) -> Any:
        return self.peft.disable_adapter()

    def adapter(self) -> LoraAdapter:
        def values(name: str, part: str, factor: float) -> np.ndarray:
            return (self._parameters[f"{name}/{part}"].detach().float().cpu() * factor).numpy().copy()

        return LoraAdapter(
            backbone=self._backbone,
            a={name: values(name, "A", 1.0) for name in self._names},
            b={name: values(name, "B", self._scaling) for name in self._names},
        )

    @property
    def largest_change(self) -> float:
        """Of a number in B, which is 0 at the start."""
        parts = (one for name, one in self._parameters.items() if name.endswith("/B"))
        return max(float(one.detach().abs().max()) for one in parts)

    def save_pretrained(self, directory: str, source: str) -> None:
        """A PEFT directory: adapter_config.json and adapter_model.safetensors. `source` names the base model."""
        self.peft.peft_config["default"].base_model_name_or_path = re.sub(r"^package:", "", source)
        self.peft.save_pretrained(directory, safe_serialization=True)


Trainable = SingularValues | LowRank
"""Both have: `model`, whose forward is of the trained model, after `renew` where the parameters changed; `base()`, in
which it is the base model; `parameters`; and `adapter()`, what would be served.
"""


def linear_layers(model: nn.Module, suffixes: Sequence[str]) -> list[str]:
    """Full parameter names of the layers that end in `suffixes`; raises as `expert_layers_of` does."""
    return list(expert_layers_of(model, suffixes))
