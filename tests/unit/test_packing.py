"""Packed linear layers against the plain ones."""

import copy

import pytest
import torch
from torch import nn

from metasepia.packing import PackedLinear, can_pack, pack


def layer(inputs: int = 24, outputs: int = 40, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 5, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_equals_the_plain_one(shape: tuple[int, ...], bias: bool):
    plain, x = layer(bias=bias), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_gelu_within_is_the_one_asked_for(gelu):
    plain, x = layer(), torch.linspace(-3, 3, 10 * 24).view(10, 24)
    nearest, other = (nn.functional.gelu(plain(x), approximate=a) for a in ("none", "tanh"))
    if gelu == "tanh":
        nearest, other = other, nearest
    packed = PackedLinear(plain, gelu=gelu)(x)
    assert (packed - nearest).abs().max() < 1e-5 < 1e-4 < (packed - other).abs().max()


def test_a_view_of_every_second_column_is_read_as_it_stands():
    plain, x = layer(), torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(PackedLinear(plain)(x[:, ::2]), plain(x[:, ::2]), atol=1e-5, rtol=0)


def test_a_packed_layer_in_bfloat16_rounds_once():
    plain, x = layer(96, 40).bfloat16(), torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = PackedLinear(plain)
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    got = packed(x)
    assert got.dtype == torch.bfloat16 and (packed._packed is not None) == can_pack(plain.weight)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2e-3)


def test_an_input_of_another_dtype_than_the_weights_is_refused_as_torch_refuses_it():
    with pytest.raises(RuntimeError, match="dtype"):
        PackedLinear(layer().bfloat16())(torch.ones(2, 24))


def test_weights_of_another_dtype_are_computed_plainly():
    plain = layer().double()
    x = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(PackedLinear(plain)(x), plain(x))


def test_a_copy_packs_its_own_weights():
    packed, x = PackedLinear(layer()), torch.ones(2, 24)
    before = packed(x)
    copied = copy.deepcopy(packed)
    copied.linear.weight.mul_(2)
    assert torch.equal(packed(x), before) and not torch.allclose(copied(x), before)


def test_packing_a_model_takes_in_exact_gelus_and_leaves_other_activations():
    class Half(nn.Module):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.lin1, self.activation, self.lin2 = layer(8, 16), activation, layer(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin2(self.activation(self.lin1(x)))

    x = torch.linspace(-9, 9, 40).view(5, 8)
    for activation in (nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()):
        model = Half(activation)
        plain = model(x)
        assert pack(model) == 2 and not list(model.parameters())
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=0)
        assert isinstance(model.activation, nn.Identity) == (
            isinstance(activation, nn.GELU) and activation.approximate == "none"
        )
