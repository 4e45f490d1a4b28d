"""Frozen matrices that rows are multiplied by, y = x W^T, in whatever form this machine multiplies by fastest.

On a CPU a matrix is packed for oneDNN when it is first used (`metasepia.packing`), and what follows the product (an
activation, a factor, a summand) is done within it; several weights that share their input are packed as one. Elsewhere,
and wherever gradients are taken, the same is computed by torch's own operators. Results differ by rounding only.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metasepia.packing import can_pack, reordered


class Matrix:
    """One weight, or several one below the other. Packed at its first use, and again when a weight has changed."""

    def __init__(self, *weights: Callable[[], Tensor], parameters: bool = True) -> None:
        """`weights` give the tensors in force. With `parameters` only an nn.Parameter is packed: another tensor in its
        place is there for one call (`torch.func.functional_call`)."""
        self.weights, self._parameters = weights, parameters
        self._packed: Tensor | None = None
        self._packed_from: list[tuple[Tensor, int | None]] = []
        """The weights and their versions; inference tensors have none."""

    @classmethod
    def owning(cls, *weights: Tensor) -> "Matrix":
        """Of tensors that nobody else needs: once packed they are given up."""
        made = cls(*[lambda weight=weight: weight for weight in weights], parameters=False)
        with torch.no_grad():
            if made._pack(weights[0]) is not None:
                packed = made._packed
                assert packed is not None
                made.weights, made._packed_from = (), []
        return made

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        packed = self._pack(x)
        if packed is None:
            return self._linear(x, bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")

    def silu(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """SiLU(x W^T + bias)."""
        packed = self._pack(x)
        if packed is None:
            return F.silu(self._linear(x, bias))
        return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "swish", [], "")

    def times(self, x: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
        """(x W^T + bias) * factor, which broadcasts; rounded to the dtype of x once more where factor has another."""
        packed = self._pack(x)
        if packed is None:
            y = self._linear(x, bias)
            return (y * factor).to(y.dtype)
        if factor.shape[:-1] == x.shape[:-1] and factor.dtype == x.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, factor, packed, bias, "mul")
        y = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return y.mul_(factor)

    def plus(self, x: Tensor, summand: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias + summand, of the same shape; one weight below fp32: rounded once, after the sum."""
        packed = self._pack(x)
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, summand, packed, bias, "add")
        if x.dtype == torch.float32 or len(self.weights) != 1:
            return summand + self._linear(x, bias)
        flat = summand if bias is None else summand + bias
        weight = self.weights[0]()
        return torch.addmm(flat.flatten(0, -2), x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.weights:
            assert self._packed is not None
            return F.linear(x, self._packed.to_dense(), bias)
        if len(self.weights) == 1:
            return F.linear(x, self.weights[0](), bias)
        y = torch.cat([F.linear(x, weight()) for weight in self.weights], dim=-1)
        return y if bias is None else y + bias

    def _pack(self, x: Tensor) -> Tensor | None:
        """The packed matrix; None where it cannot be used for x."""
        if torch.is_grad_enabled():
            return None
        for weight, (packed, version) in zip(self.weights, self._packed_from, strict=False):
            if weight() is not packed or (version is not None and packed._version != version):
                break
        else:
            if self._packed is not None:
                return self._packed if x.dtype == self._packed.dtype and x.is_cpu and x.numel() else None
        return self._packed_anew(x)

    def _packed_anew(self, x: Tensor) -> Tensor | None:
        now = [weight() for weight in self.weights]
        if x.dtype != now[0].dtype or not x.is_cpu or not x.numel() or not all(can_pack(weight) for weight in now):
            return None
        if self._parameters and not all(isinstance(weight, nn.Parameter) for weight in now):
            return None
        whole = now[0].detach() if len(now) == 1 else torch.cat([weight.detach() for weight in now])
        self._packed = reordered(whole.contiguous())
        self._packed_from = [(weight, None if weight.is_inference() else weight._version) for weight in now]
        return self._packed
