"""Linear layers of frozen models on a CPU: weights kept in oneDNN's blocked order, bias and GELU within the product.

`F.linear` in float32 goes to MKL, which takes a slower path on processors that are not Intel's; in both dtypes the
weights are laid out anew in each call. oneDNN compiles its kernels for the instructions that it finds (bfloat16 is
accumulated in float32). Results differ by rounding only.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gelu = Literal["erf", "tanh"]

_TYPICAL_ROWS = 256
"""oneDNN chooses the layout for about so many rows; all others are right too."""


def reordered(weight: Tensor) -> Tensor:
    """The weight in oneDNN's blocked order, a tensor of its own without strides; of one that `can_pack` takes."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)


class PackedLinear:
    """A linear layer, and a GELU after it, without gradients.

    Packed when first called and again once the weight has changed; the layer keeps its own weight too. Weights that
    `can_pack` refuses, and inputs of another dtype, are plainly computed.
    """

    def __init__(self, linear: nn.Linear, *, gelu: Gelu | None = None) -> None:
        self.linear, self.gelu = linear, gelu
        self._packed: Tensor | None = None
        self._packed_from: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        if x.numel() == 0 or x.dtype != weight.dtype or not can_pack(weight):
            y = self.linear(x)
            return y if self.gelu is None else F.gelu(y, approximate="tanh" if self.gelu == "tanh" else "none")
        now = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or self._packed_from != now:
            self._packed = reordered(weight)
            self._packed_from = now
        after = ("none", [], "") if self.gelu is None else ("gelu", [], "tanh" if self.gelu == "tanh" else "none")
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.linear.bias, *after)

    def __getstate__(self) -> dict[str, Any]:
        """Copies, in this process or another, pack for themselves: a packed tensor has no storage to copy."""
        return {"linear": self.linear, "gelu": self.gelu, "_packed": None, "_packed_from": None}


def can_pack(weight: Tensor) -> bool:
    """Whether this torch and this weight take the packed path: float32, or bfloat16 where the processor has AVX-512."""
    return (
        weight.dtype in (torch.float32, torch.bfloat16)
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(model: nn.Module) -> int:
    """Replaces every linear layer inside a frozen model by its packed self, in place; how many there were.

    A layer that its parent follows by an exact GELU (`activations_after`) takes the GELU in.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or not can_pack(child.weight):
                continue
            gelu = None
            if (after := _ACTIVATION_AFTER.get(name)) and _is_exact_gelu(getattr(parent, after, None)):
                gelu = "erf"
                setattr(parent, after, nn.Identity())
            delattr(parent, name)
            setattr(parent, name, PackedLinear(child, gelu=gelu))
            count += 1
    return count


_ACTIVATION_AFTER = {"dense": "intermediate_act_fn", "lin1": "activation"}
"""Attribute of a linear layer in a transformers block, and of the activation that its parent calls on its output."""


def _is_exact_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return type(activation).__name__ == "GELUActivation" and getattr(activation, "act", None) is F.gelu
