"""One GPT-2 block of a stack, forward and backward, two ways with one result up to rounding.

`batched_block` is plain torch, all models in each product: for accelerators, other dtypes and as the definition.
`BlockOnCpu` goes model by model through one block with its gradient written out, so that what passes between two
products is still in the core's cache. Its products are oneDNN's: `F.linear` and `bmm` in float32 go to MKL, which on
processors that are not Intel's computes at half their speed. GELU (tanh) is u sigmoid(2 sqrt(2/pi) (u + 0.044715 u^3)),
the same function by a cheaper road, and leaves its slope for the backward pass in the same sweep over memory.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

LN_EPS = 1e-5
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR
_TILE = 1 << 16
"""Numbers an elementwise sweep takes at once: four such arrays fit a second-level cache of 1 MiB."""


class BlockWeights(NamedTuple):
    """Of all models [models, ...] or of one; linear weights are [out, in], as nn.Linear's."""

    norm_1_weight: Tensor
    norm_1_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    norm_2_weight: Tensor
    norm_2_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def takes_fast_path(hidden: Tensor) -> bool:
    """Whether `BlockOnCpu` can compute these states: float32 on a CPU for which torch was built with oneDNN."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def block(hidden: Tensor, mask: Tensor | None, heads: int, reads: slice | None, weights: BlockWeights) -> Tensor:
    """[models, batch, tokens, width] to the same, or to the tokens `reads` alone.

    `mask` [tokens, tokens] or [batch, tokens, tokens], True where a token may attend; None is causal. A token that may
    attend to none gets no value.
    """
    if takes_fast_path(hidden):
        hidden = hidden.contiguous()
        if torch.is_grad_enabled() and any(one.requires_grad for one in (hidden, *weights)):
            return BlockOnCpu.apply(hidden, mask, heads, reads, *weights)  # type: ignore[no-any-return]
        return _all_forward(hidden, mask, heads, reads, weights, None)
    return batched_block(hidden, mask, heads, reads, weights)


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [models, ..., in] by weight [models, out, in]: each model's own linear layer."""
    if takes_fast_path(x):
        made: Tensor = LinearOnCpu.apply(x.flatten(1, -2), weight, bias)  # type: ignore[assignment]
        return made.unflatten(1, x.shape[1:-1])
    rows, of_model = x.flatten(1, -2), weight.transpose(1, 2)
    y = torch.bmm(rows, of_model) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, of_model)
    return y.unflatten(1, x.shape[1:-1])


def stacked_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis of [models, batch, tokens, width], gain and shift [models, width]."""
    if takes_fast_path(x):
        return NormOnCpu.apply(x.contiguous(), weight, bias)  # type: ignore[no-any-return]
    return torch.addcmul(bias[:, None, None], F.layer_norm(x, x.shape[-1:], eps=LN_EPS), weight[:, None, None])


def batched_block(
    hidden: Tensor, mask: Tensor | None, heads: int, reads: slice | None, weights: BlockWeights
) -> Tensor:
    """`block` in plain torch operations, whose gradient is torch's."""
    models, batch = hidden.shape[:2]
    w = weights
    qkv = stacked_linear(stacked_norm(hidden, w.norm_1_weight, w.norm_1_bias), w.qkv_weight, w.qkv_bias)
    q, k, v = qkv.flatten(0, 1).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if reads is not None:
        q, hidden = q[:, :, reads], hidden[:, :, reads]
    may = causal(k.shape[2], k.device) if mask is None else mask
    may = may if reads is None else may[..., reads, :]
    may = may if may.ndim == 2 else may.unsqueeze(1).repeat(models, 1, 1, 1)
    # Spelt out: the fused kernels' gradients add up in any order on a GPU, and a resumed run must end in the same bits.
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~may, torch.finfo(q.dtype).min)
    shares = scores.softmax(3)
    attended = (shares if mask is None else shares * may.any(-1, keepdim=True)) @ v
    attended = attended.transpose(1, 2).flatten(2).unflatten(0, (models, batch))
    hidden = hidden + stacked_linear(attended, w.proj_weight, w.proj_bias)
    up = stacked_linear(stacked_norm(hidden, w.norm_2_weight, w.norm_2_bias), w.up_weight, w.up_bias)
    return hidden + stacked_linear(F.gelu(up, approximate="tanh"), w.down_weight, w.down_bias)


def causal(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


class LinearOnCpu(torch.autograd.Function):
    """`stacked_linear` of [models, rows, in], model by model: a model's bits do not hang on how many there are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        biases = [None] * len(x) if bias is None else bias.unbind(0)
        return torch.stack([_linear(*of_model) for of_model in zip(x, weight, biases, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.stack([_linear(g, w.t()) for g, w in zip(grad, weight, strict=True)])
        grad_weight = torch.stack([_linear(g.t(), one.t()) for g, one in zip(grad, x, strict=True)])
        return (
            grad_x,
            grad_weight,
            torch.stack([g.sum(0) for g in grad]) if ctx.needs_input_grad[2] else None,
        )


class NormOnCpu(torch.autograd.Function):
    """`stacked_norm`, model by model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, means, deviations = zip(*(_norm(*of_model) for of_model in zip(x, weight, bias, strict=True)), strict=True)
        ctx.save_for_backward(x, weight, bias)
        ctx.of_models = list(zip(means, deviations, strict=True))
        return torch.stack(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        grad, into = grads[0].contiguous(), tuple(torch.empty_like(one) for one in (x, weight, bias))
        for model, made in enumerate(ctx.of_models):
            into[0][model], into[1][model], into[2][model] = torch.ops.aten.native_layer_norm_backward(
                grad[model], x[model], [x.shape[-1]], *made, weight[model], bias[model], [True, True, True]
            )
        return into


class _Kept(NamedTuple):
    """What one model's backward pass needs of its forward pass."""

    norm_1: tuple[Tensor, Tensor, Tensor]
    """The normalised states, the means and the inverse deviations."""
    qkv: Tensor
    shares: Tensor
    """Attention weights, [heads, batch, queries, tokens]."""
    attended: Tensor
    between: Tensor
    """The states after attention."""
    norm_2: tuple[Tensor, Tensor, Tensor]
    activated: Tensor
    slope: Tensor


class BlockOnCpu(torch.autograd.Function):
    """`batched_block` for float32 on a CPU."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, mask: Tensor | None, heads: int, reads: slice | None, *weights: Tensor
    ) -> Tensor:
        kept: list[_Kept] = []
        out = _all_forward(hidden, mask, heads, reads, weights, kept)
        _keep(ctx, hidden, weights, kept, heads, reads)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weights, kept, heads, reads = _kept(ctx)
        grad_out = grads[0].contiguous()
        grad_hidden = torch.empty_like(hidden)
        of_models = [BlockWeights(*of_model) for of_model in zip(*(w.unbind(0) for w in weights), strict=True)]
        made = [
            _backward(*each, heads, reads) for each in zip(grad_out, hidden, kept, of_models, grad_hidden, strict=True)
        ]
        return grad_hidden, None, None, None, *(torch.stack(of_field) for of_field in zip(*made, strict=True))


def _all_forward(
    hidden: Tensor,
    mask: Tensor | None,
    heads: int,
    reads: slice | None,
    weights: Sequence[Tensor],
    keep_in: list[_Kept] | None,
) -> Tensor:
    """Every model through the block; what the way back needs goes to `keep_in`, where there is one."""
    may = causal(hidden.shape[2], hidden.device) if mask is None else mask
    may = may if reads is None else may[..., reads, :]
    # A finite low number, not -inf: where nothing may be attended the softmax must not be 0 / 0.
    bias = torch.zeros(may.shape).masked_fill_(~may, torch.finfo(torch.float32).min)
    some = None if mask is None or bool(may.any(-1).all()) else may.any(-1, keepdim=True).float()
    out = torch.empty((hidden if reads is None else hidden[:, :, reads]).shape)
    for one, into, *of_model in zip(hidden, out, *(w.unbind(0) for w in weights), strict=True):
        kept = _forward(one, BlockWeights(*of_model), into, bias, some, heads, reads, keep_in is not None)
        if keep_in is not None:
            keep_in.append(kept)
    return out


def _keep(
    ctx: Any, hidden: Tensor, weights: Sequence[Tensor], kept: Sequence[_Kept], heads: int, reads: slice | None
) -> None:
    """Inputs go through autograd, which notices when they were changed in place; what is ours is kept as it is."""
    ctx.save_for_backward(hidden, *weights)
    ctx.of_models, ctx.heads, ctx.reads = kept, heads, reads


def _kept(ctx: Any) -> tuple[Tensor, tuple[Tensor, ...], Sequence[_Kept], int, slice | None]:
    hidden, *weights = ctx.saved_tensors
    return hidden, tuple(weights), ctx.of_models, ctx.heads, ctx.reads


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] by weight [out, in]. Both may be transposed views: x is then copied, weight read as it lies."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, [x.shape[-1]], weight, bias, LN_EPS)


def _forward(
    hidden: Tensor,
    w: BlockWeights,
    into: Tensor,
    bias: Tensor,
    some: Tensor | None,
    heads: int,
    reads: slice | None,
    needs_slope: bool,
) -> _Kept:
    """One model's states [batch, tokens, width] through the block, written to `into`; what the way back needs."""
    batch, tokens, width = hidden.shape
    norm_1 = _norm(hidden.view(-1, width), w.norm_1_weight, w.norm_1_bias)
    qkv = _linear(norm_1[0], w.qkv_weight, w.qkv_bias)
    qkv = qkv.view(batch, tokens, 3, heads, -1).permute(2, 3, 0, 1, 4).contiguous()  # [3, heads, batch, tokens, dim]
    q, k, v = (one.flatten(0, 1) for one in qkv.unbind(0))
    q = q if reads is None else q[:, reads]
    scores = torch.bmm(q, k.transpose(1, 2)).view(heads, batch, -1, tokens)
    shares = torch.softmax(scores.mul_(1 / math.sqrt(q.shape[-1])).add_(bias), -1)
    if some is not None:
        shares.mul_(some)
    attended = torch.bmm(shares.flatten(0, 1), v).view(heads, batch, -1, width // heads)
    attended = attended.permute(1, 2, 0, 3).reshape(-1, width)
    start = hidden if reads is None else hidden[:, reads]
    between = _linear(attended, w.proj_weight, w.proj_bias).add_(start.reshape(-1, width))
    norm_2 = _norm(between, w.norm_2_weight, w.norm_2_bias)
    activated, slope = _gelu(_linear(norm_2[0], w.up_weight, w.up_bias), needs_slope)
    torch.add(_linear(activated, w.down_weight, w.down_bias), between, out=into.view(-1, width))
    return _Kept(norm_1, qkv, shares, attended, between, norm_2, activated, slope)


def _backward(
    grad_end: Tensor,
    hidden: Tensor,
    kept: _Kept,
    w: BlockWeights,
    grad_hidden: Tensor,
    heads: int,
    reads: slice | None,
) -> BlockWeights:
    """One model's gradients: the states' are written to `grad_hidden`, the weights' returned."""
    batch, _, width = hidden.shape
    grad_end = grad_end.view(-1, width)
    grad_up, *of_down = _through_linear(grad_end, kept.activated, w.down_weight)
    grad_norm, *of_up = _through_linear(grad_up.mul_(kept.slope), kept.norm_2[0], w.up_weight)
    grad_between, *of_norm_2 = _through_norm(grad_norm, kept.between, kept.norm_2, w.norm_2_weight, w.norm_2_bias)
    grad_between.add_(grad_end)

    grad, *of_proj = _through_linear(grad_between, kept.attended, w.proj_weight)
    grad = grad.view(batch, -1, heads, width // heads).permute(2, 0, 1, 3).contiguous().flatten(0, 1)
    q, k, v = (one.flatten(0, 1) for one in kept.qkv.unbind(0))
    shares = kept.shares.flatten(0, 1)
    grad_qkv = torch.empty_like(kept.qkv)
    grad_q, grad_k, grad_v = (one.flatten(0, 1) for one in grad_qkv.unbind(0))
    torch.bmm(shares.transpose(1, 2), grad, out=grad_v)
    grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), shares, -1, torch.float32)
    grad_scores.mul_(1 / math.sqrt(q.shape[-1]))
    if reads is None:
        torch.bmm(grad_scores, k, out=grad_q)
        torch.bmm(grad_scores.transpose(1, 2), q, out=grad_k)
    else:
        grad_q.zero_()
        grad_q[:, reads] = torch.bmm(grad_scores, k)
        torch.bmm(grad_scores.transpose(1, 2), q[:, reads], out=grad_k)
    grad_qkv = grad_qkv.permute(2, 3, 0, 1, 4).reshape(-1, 3 * width)

    grad_norm, *of_qkv = _through_linear(grad_qkv, kept.norm_1[0], w.qkv_weight)
    grad_start, *of_norm_1 = _through_norm(
        grad_norm, hidden.view(-1, width), kept.norm_1, w.norm_1_weight, w.norm_1_bias
    )
    if reads is None:
        torch.add(grad_start, grad_between, out=grad_hidden.view(-1, width))
    else:
        grad_hidden.copy_(grad_start.view_as(hidden))
        grad_hidden[:, reads] += grad_between.view(batch, -1, width)
    return BlockWeights(*of_norm_1, *of_qkv, *of_proj, *of_norm_2, *of_up, *of_down)


def _through_linear(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a linear layer's input, weight and bias."""
    # The first operand is copied: better the smaller one.
    of_weight = _linear(grad.t(), x.t()) if grad.shape[1] <= x.shape[1] else _linear(x.t(), grad.t()).t()
    return _linear(grad, weight.t()), of_weight, grad.sum(0)


def _through_norm(
    grad: Tensor, x: Tensor, made: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a LayerNorm's input, gain and shift."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.shape[-1]], made[1], made[2], weight, bias, [True, True, True]
    )


def _gelu(u: Tensor, needs_slope: bool) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of u and its derivative, the latter empty if not needed; u is used up.

    With t = a + b u^2, z = u t and s = sigmoid(z), GELU is u s and its derivative s + (3 z - 2 a u) s (1 - s).
    """
    flat = u.view(-1)
    slope = torch.empty_like(u) if needs_slope else u.new_empty(0)
    size = min(_TILE, flat.numel())
    a, z, s = u.new_tensor(_GELU_LINEAR), u.new_empty(size), u.new_empty(size)
    activated = torch.empty_like(u)
    for first in range(0, flat.numel(), _TILE):
        one, out = flat[first : first + _TILE], activated.view(-1)[first : first + _TILE]
        z_one, s_one = z[: len(one)], s[: len(one)]
        torch.addcmul(a, one, one, value=_GELU_CUBIC, out=z_one).mul_(one)
        torch.sigmoid(z_one, out=s_one)
        torch.mul(one, s_one, out=out)
        if needs_slope:
            torch.sub(z_one, one, alpha=2 / 3 * _GELU_LINEAR, out=z_one)
            slopes = slope.view(-1)[first : first + _TILE]
            torch.ops.aten.sigmoid_backward.grad_input(z_one, s_one, grad_input=slopes)
            torch.add(s_one, slopes, alpha=3, out=slopes)
    return activated, slope
