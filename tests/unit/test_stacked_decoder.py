"""Stacks of decoders against independent modules of one model each, written with torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metasepia.errors import InvalidSettings
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.stacked.block import BlockWeights, batched_block, block, takes_fast_path
from metasepia.stacked.decoder import DecoderShape, StackedDecoder
from metasepia.stacked.regressor import StackedRegressor

SHAPE = DecoderShape(layers=2, width=24, heads=3, tokens=10)
SEEDS = (3, 4, 7)
POINTS, DIMS = 5, 4


class PlainBlock(nn.Module):
    """GPT-2's, by the book: attention spelt out, mask of -inf."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, may: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in self.qkv(self.norm_1(hidden)).chunk(3, 2)
        )
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        shares = scores.masked_fill(~may, -torch.inf).softmax(3)
        hidden = hidden + self.proj((shares @ v).transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norm_2(hidden)), approximate="tanh"))


class PlainDecoder(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(shape.tokens, shape.width))
        self.blocks = nn.ModuleList([PlainBlock(shape.width, shape.heads) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, hidden: Tensor, may: Tensor | None = None) -> Tensor:
        tokens = hidden.shape[1]
        may = torch.ones(tokens, tokens, dtype=torch.bool).tril() if may is None else may
        may = may if may.ndim == 2 else may[:, None]
        hidden = hidden + self.positions[:tokens]
        for one in self.blocks:
            hidden = one(hidden, may)
        return self.norm(hidden)


class PlainRegressor(PlainDecoder):
    """Raventos et al.: tokens of D + 1 numbers, no bias in and out."""

    def __init__(self, shape: DecoderShape, dims: int) -> None:
        super().__init__(shape)
        self.read_in, self.read_out = nn.Linear(dims + 1, shape.width, False), nn.Linear(shape.width, 1, False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        tokens = x.new_zeros(len(x), 2 * x.shape[1], x.shape[2] + 1)
        tokens[:, ::2, 1:], tokens[:, 1::2, 0] = x, y
        return self.read_out(super().forward(self.read_in(tokens)))[:, ::2, 0]


def rough(model: nn.Module) -> None:
    """Weights far from the initial ones, biases and gains included, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def randn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def batch_of(models: int) -> tuple[Tensor, Tensor]:
    return randn(models, 6, POINTS, DIMS), randn(models, 6, POINTS)


def test_each_model_computes_what_a_plain_module_with_its_weights_computes_and_so_do_its_gradients():
    stack = StackedRegressor(SHAPE, DIMS, SEEDS, "separate")
    rough(stack)
    x, y = batch_of(3)
    made = stack(x, y)
    ((made - y) ** 2).mean((1, 2)).sum().backward()
    for i in range(3):
        plain = PlainRegressor(SHAPE, DIMS)
        plain.load_state_dict(stack.model_state(i))
        expected = plain(x[i], y[i])
        torch.testing.assert_close(made[i], expected, rtol=1e-4, atol=1e-5)
        ((expected - y[i]) ** 2).mean().backward()
        of_stack = {name.removeprefix("decoder."): p.grad for name, p in stack.named_parameters()}
        for name, parameter in plain.named_parameters():
            grad, scale = of_stack[name], parameter.grad.abs().max()  # type: ignore[union-attr]
            torch.testing.assert_close(grad[i], parameter.grad, rtol=1e-3, atol=float(1e-5 * scale + 1e-8))  # type: ignore[index]


def test_the_shared_layout_is_the_reasoning_module_weights_and_logits():
    shape = ModuleShape(dims=DIMS, pairs=POINTS, layers=2, width=24, heads=3)
    modules = [ReasoningModule(shape, seed=seed) for seed in SEEDS]
    stack = StackedRegressor(SHAPE, DIMS, SEEDS, "shared")
    for i, module in enumerate(modules):
        rough(module)
        stack.load_model(i, module.state_dict())
    x, y = batch_of(3)
    with torch.no_grad():
        torch.testing.assert_close(
            stack(x, y), torch.stack([m(*one) for m, *one in zip(modules, x, y, strict=True)]), rtol=1e-4, atol=1e-4
        )
        back = ReasoningModule(shape, seed=99)
        back.load_state_dict(stack.model_state(1))
        torch.testing.assert_close(back(x[1], y[1]), modules[1](x[1], y[1]))


def test_initial_weights_are_a_function_of_the_shape_and_the_own_seed():
    one, other = (StackedRegressor(SHAPE, DIMS, seeds, "separate") for seeds in ((3, 4, 7), (9, 3)))
    for name, tensor in one.model_state(0).items():
        assert tensor.equal(other.model_state(1)[name]), name
    assert not one.model_state(0)["read_in.weight"].equal(one.model_state(1)["read_in.weight"])
    weights = one.model_state(2)
    assert weights["blocks.0.up.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["blocks.1.down.weight"].std().item() == pytest.approx(0.02 / 2, rel=0.05)  # sqrt(2 layers) = 2
    assert weights["blocks.0.qkv.bias"].abs().max() == 0 and weights["norm.weight"].equal(torch.ones(24))


def test_in_the_shared_layout_reading_in_and_out_begins_as_a_linear_layer_does():
    weights = StackedRegressor(SHAPE, DIMS, SEEDS, "shared").model_state(0)
    assert 0.95 / 2 < weights["read_in.weight"].abs().max() <= 1 / 2  # uniform within 1 / sqrt(dims)
    assert abs(weights["read_in.weight"].mean()) < 0.1


def batch_mask(tokens: int) -> Tensor:
    may = torch.rand(6, tokens, tokens, generator=torch.Generator().manual_seed(1)) > 0.5
    return (may | torch.eye(tokens, dtype=torch.bool)).tril()


@pytest.mark.parametrize("mask", [batch_mask(8), batch_mask(8)[0]])
def test_a_mask_says_who_may_attend_to_whom(mask: Tensor):
    stack, plain = StackedDecoder(SHAPE, SEEDS), PlainDecoder(SHAPE)
    rough(stack)
    hidden = randn(3, 6, 8, 24)
    made = stack(hidden, mask=mask)
    for i in range(3):
        plain.load_state_dict(stack.model_state(i))
        torch.testing.assert_close(made[i], plain(hidden[i], mask), rtol=1e-4, atol=1e-4)


def test_without_a_mask_no_token_sees_a_later_one():
    stack = StackedDecoder(SHAPE, SEEDS)
    rough(stack)
    hidden = randn(3, 2, 8, 24)
    changed = hidden.clone()
    changed[:, :, 5:] += 1
    assert stack(hidden)[:, :, :5].equal(stack(changed)[:, :, :5])
    assert not stack(hidden)[:, :, 5:].isclose(stack(changed)[:, :, 5:]).all()


def test_kept_states_go_layer_by_layer_to_the_final_ones():
    stack = StackedDecoder(SHAPE, SEEDS)
    rough(stack)
    hidden = randn(3, 2, 8, 24)
    final, states = stack(hidden, keep=True)
    assert len(states) == SHAPE.layers + 1
    assert states[0].equal(hidden + stack.positions[:, None, :8])
    last = F.layer_norm(states[-1], (24,)) * stack.norm.weight[:, None, None] + stack.norm.bias[:, None, None]
    torch.testing.assert_close(final, last)
    assert final.equal(stack(hidden))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_edit_replaces_the_states_after_its_layer_and_all_that_follows_rests_on_them(layer: int):
    stack = StackedDecoder(SHAPE, SEEDS)
    rough(stack)
    hidden, donor = randn(3, 2, 8, 24), randn(3, 2, 8, 24) + 1
    donor_final, donor_states = stack(donor, keep=True)
    seen: list[int] = []

    def edit(at: int, states: Tensor) -> Tensor:
        seen.append(at)
        return donor_states[layer] if at == layer else states

    final, states = stack(hidden, edit=edit, keep=True)
    assert seen == [0, 1, 2]
    assert final.equal(donor_final) and states[layer].equal(donor_states[layer])
    if layer:
        assert not states[layer - 1].equal(donor_states[layer - 1])


@pytest.mark.parametrize("keep", [False, True])
def test_reads_gives_the_final_states_of_these_tokens_alone(keep: bool):
    stack = StackedDecoder(SHAPE, SEEDS)
    rough(stack)
    hidden, mask = randn(3, 6, 8, 24), batch_mask(8)
    whole = stack(hidden, mask=mask)
    for reads in (slice(0, None, 2), slice(-1, None), slice(2, 3)):
        made = stack(hidden, mask=mask, reads=reads, keep=keep)
        torch.testing.assert_close(made[0] if keep else made, whole[:, :, reads])


def block_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, BlockWeights]:
    weights = StackedDecoder(SHAPE, SEEDS)
    rough(weights)
    one = weights.to(dtype).blocks[0].weights
    assert isinstance(one, BlockWeights)
    mask = batch_mask(8)
    mask[2, 3] = False  # a token that may attend to none, not even itself
    return randn(3, 6, 8, 24).to(dtype).requires_grad_(), mask, one


@pytest.mark.parametrize("reads", [None, slice(0, None, 2), slice(-1, None)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_block_for_cpus_agrees_with_the_plain_one_in_double_precision(reads: slice | None, masked: bool):
    results = []
    for dtype, compute in ((torch.float32, block), (torch.float64, batched_block)):
        hidden, mask, weights = block_inputs(dtype)
        assert takes_fast_path(hidden) == (dtype == torch.float32)
        out = compute(hidden, mask if masked else None, SHAPE.heads, reads, weights)
        grads = torch.autograd.grad(out, [hidden, *weights], randn(*out.shape).to(dtype))
        results.append([out, *grads])
    for single, double in zip(*results, strict=True):
        assert bool(single.isfinite().all())
        torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-6 * double.abs().max().item() + 1e-7)


def test_without_gradients_the_block_gives_the_same_bits():
    hidden, mask, weights = block_inputs(torch.float32)
    with torch.no_grad():
        without = block(hidden, mask, SHAPE.heads, None, weights)
    assert without.equal(block(hidden, mask, SHAPE.heads, None, weights))


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("layers", lambda: DecoderShape(layers=0, width=8, heads=2, tokens=4)),
        ("width", lambda: DecoderShape(layers=1, width=-8, heads=2, tokens=4)),
        ("heads", lambda: DecoderShape(layers=1, width=8, heads=3, tokens=4)),
        ("seeds", lambda: StackedDecoder(SHAPE, [])),
        ("dims", lambda: StackedRegressor(SHAPE, 0, [1], "separate")),
        ("tokens", lambda: StackedRegressor(DecoderShape(layers=1, width=8, heads=2, tokens=5), 2, [1], "shared")),
        ("tokens", lambda: StackedDecoder(SHAPE, [1])(torch.zeros(1, 1, 11, 24))),
        ("state", lambda: StackedDecoder(SHAPE, [1]).load_model(0, {})),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(field: str, make):
    with pytest.raises(InvalidSettings) as refusal:
        make()
    assert refusal.value.field == field
