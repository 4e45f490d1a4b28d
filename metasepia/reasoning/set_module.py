"""The set module: a reasoning module over labelled vectors without order, for any width and any number of classes.

Each example is one token, not two. What a token carries is a state for each class; where it stands enters only through
inner products, so the answer does not change when the vectors are rotated, the examples are permuted or the classes
renamed, and a context of k examples costs k tokens. Layers are attention with kernels of those inner products:

- *linear* heads weigh an example by k(x, x_j) itself, in three geometries: as the vectors are, with their leading
  directions compressed (whitened with a floor), and with their small ones suppressed (smoothed). A stack of them can
  step down a loss in context (von Oswald et al., arXiv:2212.07677);
- *soft* heads weigh by softmax_j(beta k(x, x_j)), never the token itself, so that an example's state is told what its
  neighbours say of it, not its own label.

Examples attend to examples; queries to examples only. Unlabelled vectors, where there are some, are tokens without a
label that all may attend to, by heads of their own. The module is trained on synthetic tasks only (`set_training`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

NUM_GEOMETRIES = 3
"""Raw, whitened, smoothed."""
SOFT_GEOMETRIES = (0, 2)
NUM_FACTS = 9
"""Numbers that describe a whole context to each of its tokens."""
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class SetShape:
    """All that must be known to build a set module."""

    width: int
    """Of a state."""
    layers: int
    value_dim: int
    """Numbers that one head carries from a token to another, for each class."""
    soft_heads: int
    """Over examples; even: the first half in the raw geometry, the rest in the smoothed one."""
    mlp: int

    @property
    def heads(self) -> int:
        return NUM_GEOMETRIES + self.soft_heads

    @property
    def unlabelled_heads(self) -> int:
        """One linear and one soft head in each of the two geometries."""
        return 2 * len(SOFT_GEOMETRIES)


@dataclass(frozen=True)
class Scales:
    """What inner products are divided by, measured on the examples (and the unlabelled vectors, `pooled`)."""

    diagonal: Float[Tensor, "batch geometries"]
    """Mean of k(x_i, x_i)."""
    frobenius: Float[Tensor, "batch geometries"]
    """Of the examples' Gram matrix once its mean diagonal is 1."""
    spread: Float[Tensor, "batch geometries"]
    """Root mean square of its entries off the diagonal."""
    pooled: Float[Tensor, " batch"]
    """Frobenius norm of the whole pool's raw Gram matrix, its trace being the number of vectors."""

    @classmethod
    def of(
        cls, grams: Float[Tensor, "batch geometries n n"], present: Float[Tensor, "batch n"], pooled: Tensor
    ) -> "Scales":
        """`present` is 1 for an example and 0 for padding."""
        n = present.sum(1)[:, None]
        pair = present[:, None, :, None] * present[:, None, None, :]
        diagonal = (grams.diagonal(dim1=2, dim2=3) * present[:, None]).sum(2) / n
        diagonal = diagonal.clamp_min(1e-9)
        squares = (grams / diagonal[..., None, None]).square() * pair
        total = squares.sum((2, 3))
        off = (total - squares.diagonal(dim1=2, dim2=3).sum(2)) / (n * (n - 1)).clamp_min(1)
        return cls(diagonal, total.sqrt().clamp_min(1e-6), off.clamp_min(1e-9).sqrt(), pooled)

    def facts(self, num_examples: Tensor, num_pooled: Tensor) -> Float[Tensor, "batch facts"]:
        n, pooled = num_examples.float(), num_pooled.float()
        return torch.stack(
            [
                n.log() / 3,
                pooled.log() / 3,
                (pooled / n).log() / 3,
                *self.spread.log().unbind(1),
                self.frobenius[:, 0].log() / 3,
                self.diagonal[:, 1],
                self.diagonal[:, 2],
            ],
            dim=1,
        )


@dataclass(frozen=True)
class Tokens:
    """Labelled and unlabelled tokens that others attend to, at one layer: what they say."""

    examples: Float[Tensor, "batch heads examples spoken"]
    unlabelled: Float[Tensor, "batch unlabelled_heads unlabelled spoken"] | None
    """`spoken` is classes x value_dim."""


class SetLayer(nn.Module):
    def __init__(self, shape: SetShape) -> None:
        super().__init__()
        self.shape = shape
        width, all_heads = shape.width, shape.heads + shape.unlabelled_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.value = nn.Linear(width, shape.heads * shape.value_dim)
        self.unlabelled_value = nn.Linear(width, shape.unlabelled_heads * shape.value_dim)
        self.out = nn.Linear(all_heads * shape.value_dim, width)
        self.sharpness = nn.Parameter(torch.linspace(0.0, 1.2, shape.soft_heads))
        self.sharpness_of = nn.Linear(NUM_FACTS, shape.soft_heads)
        self.unlabelled_sharpness = nn.Parameter(torch.full((len(SOFT_GEOMETRIES),), 1.0))
        self.says = nn.Linear(width, 1)
        self.up, self.mixed = nn.Linear(width + 2, shape.mlp), nn.Linear(width, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, width)

    def spoken(self, hidden: Float[Tensor, "batch tokens classes width"], heads: int) -> Tensor:
        """What each of these tokens says: [batch, heads, tokens, classes * value_dim]."""
        batch, tokens, classes, _ = hidden.shape
        linear = self.value if heads == self.shape.heads else self.unlabelled_value
        values = linear(self.norm_1(hidden)).view(batch, tokens, classes, heads, self.shape.value_dim)
        return values.permute(0, 3, 1, 2, 4).reshape(batch, heads, tokens, -1)

    def sharpnesses(self, facts: Float[Tensor, "batch facts"]) -> Float[Tensor, "batch soft_heads"]:
        return (self.sharpness + self.sharpness_of(facts)).clamp(-4, 5).exp()

    def finish(
        self, hidden: Float[Tensor, "batch tokens classes width"], heard: Float[Tensor, "batch heads tokens spoken"]
    ) -> Float[Tensor, "batch tokens classes width"]:
        """The states after what they heard: each class of a token for itself, then beside the mean of all classes."""
        batch, tokens, classes, _ = hidden.shape
        heard = heard.view(batch, -1, tokens, classes, self.shape.value_dim).permute(0, 2, 3, 1, 4)
        hidden = hidden + self.out(heard.reshape(batch, tokens, classes, -1))
        normed = self.norm_2(hidden)
        chance = torch.softmax(self.says(hidden).squeeze(-1), dim=2)
        seen = torch.stack([chance, (chance * classes).clamp_min(1e-4).log()], dim=-1)
        up = self.up(torch.cat([normed, seen], dim=-1)) + self.mixed(normed.mean(2, keepdim=True))
        return hidden + self.down(F.gelu(up, approximate="tanh"))


class SetModule(nn.Module):
    """Predicts the labels of queries from labelled vectors; weights are learned on synthetic tasks only."""

    def __init__(self, shape: SetShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.read_in = nn.Linear(4 + NUM_FACTS, shape.width)
        self.layers = nn.ModuleList([SetLayer(shape) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)
        self.read_normed, self.read_out = nn.Linear(shape.width, 1), nn.Linear(shape.width, 1)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Linear layers U(+-1/sqrt(in)); residual projections N(0, 0.3 / sqrt(in)).

        A sharpness begins as a constant of its head.
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            bound = 1 / math.sqrt(module.in_features)
            if name.endswith((".out", ".down")):
                module.weight.normal_(0, 0.3 * bound, generator=generator)
                module.bias.zero_()
            elif name.endswith("sharpness_of"):
                module.weight.zero_()
                module.bias.zero_()
            else:
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.read_in.weight.device

    def begin(
        self, share: Float[Tensor, "batch classes"], facts: Float[Tensor, "batch facts"], tokens: int, asks: bool
    ) -> Float[Tensor, "batch tokens classes inputs"]:
        """What a token without a label knows at first; `asks`: it is a query or unlabelled, not an example.

        `share` is each class's part of the examples.
        """
        batch, classes = share.shape
        known = share.new_zeros(batch, tokens, classes, 4 + NUM_FACTS)
        known[..., 1] = float(asks)
        known[..., 2] = (share * classes).clamp(1e-2, 8).log()[:, None]
        known[..., 3] = math.log(classes) / 2
        known[..., 4:] = facts[:, None, None]
        return known

    def begin_examples(
        self, one_hot: Float[Tensor, "batch examples classes"], share: Tensor, facts: Tensor
    ) -> Float[Tensor, "batch examples classes inputs"]:
        known = self.begin(share, facts, one_hot.shape[1], False)
        known[..., 0] = one_hot * 2 - 1
        return known

    def logits_of(self, hidden: Float[Tensor, "batch queries classes width"]) -> Float[Tensor, "batch queries classes"]:
        return (self.read_normed(self.norm(hidden)) + self.read_out(hidden)).squeeze(-1)

    def forward(
        self,
        x: Float[Tensor, "batch examples dims"],
        y: Int[Tensor, "batch examples"],
        queries: Float[Tensor, "batch queries dims"],
        num_classes: int,
        unlabelled: Float[Tensor, "batch unlabelled dims"] | None = None,
    ) -> Float[Tensor, "batch _ classes"]:
        """Logits of the unlabelled vectors, where given, then of the queries; with gradients, the training's way.

        Every context of the batch has as many examples and unlabelled vectors. `sets` compiles and asks to the same
        answers.
        """
        n, u = x.shape[1], 0 if unlabelled is None else unlabelled.shape[1]
        keys = x if unlabelled is None else torch.cat([x, unlabelled], 1)
        grams, pooled = geometries(torch.cat([keys, queries], 1), n + u)
        scales = Scales.of(grams[:, :, :n, :n], x.new_ones(x.shape[:2]), pooled)
        count = torch.full((len(x),), float(n), device=x.device)
        facts = scales.facts(count, count + u)
        grams = grams / scales.diagonal[..., None, None]
        linear = grams[..., :n] / scales.frobenius[..., None, None]
        soft = grams[:, SOFT_GEOMETRIES] / scales.spread[:, SOFT_GEOMETRIES, None, None]
        itself = torch.zeros(soft.shape[2:], device=x.device)
        itself[: n + u].fill_diagonal_(-1e4)
        soft = soft + itself

        one_hot = F.one_hot(y, num_classes).to(x.dtype)
        share = one_hot.mean(1)
        others = self.begin(share, facts, u + queries.shape[1], True)
        hidden = self.read_in(torch.cat([self.begin_examples(one_hot, share, facts), others], 1))
        half = self.shape.soft_heads // 2
        for layer in self.layers:
            assert isinstance(layer, SetLayer)
            said = layer.spoken(hidden[:, :n], self.shape.heads)
            sharpness = layer.sharpnesses(facts)[..., None, None]
            shared = torch.cat(
                [soft[:, :1, :, :n].expand(-1, half, -1, -1), soft[:, 1:, :, :n].expand(-1, half, -1, -1)], 1
            )
            weights = torch.cat([linear, torch.softmax(shared * sharpness, -1)], 1)
            heard = weights @ said
            if u:
                said = layer.spoken(hidden[:, n : n + u], self.shape.unlabelled_heads)
                straight = grams[:, SOFT_GEOMETRIES][..., n:] / pooled[:, None, None, None]
                sharp = torch.softmax(soft[..., n:] * layer.unlabelled_sharpness.exp()[:, None, None], -1)
                heard = torch.cat([heard, torch.cat([straight, sharp], 1) @ said], 1)
            else:
                heard = F.pad(heard, (0, 0, 0, 0, 0, self.shape.unlabelled_heads))
            hidden = layer.finish(hidden, heard)
        return self.logits_of(hidden[:, n:])


def geometries(
    vectors: Float[Tensor, "batch tokens dims"], num_keys: int
) -> tuple[Float[Tensor, "batch geometries tokens keys"], Float[Tensor, " batch"]]:
    """Inner products of all vectors with the first `num_keys`, whose mean and covariance S set the geometries.

    About the keys' mean and over trace(S): raw x'y; whitened x'(I + S/m)^-1 y with the floor m = |S|^2 / trace(S), the
    mean eigenvalue weighted by itself; smoothed, the difference of the two. Also |G| of the keys' raw Gram matrix.
    """
    keys = vectors[:, :num_keys]
    mean = keys.mean(1, keepdim=True)
    vectors, keys = vectors - mean, keys - mean
    wide = vectors.shape[2] >= num_keys
    second = keys @ keys.transpose(1, 2) if wide else keys.transpose(1, 2) @ keys  # the same eigenvalues, n S
    second = second / num_keys
    trace = second.diagonal(dim1=1, dim2=2).sum(1).clamp_min(_TINY)
    squares = second.square().sum((1, 2))
    floor = (squares / trace).clamp_min(_TINY)[:, None, None]
    eye = torch.eye(second.shape[1], device=vectors.device)
    lower = torch.linalg.cholesky(second / floor + eye)
    raw = vectors @ keys.transpose(1, 2)
    if wide:  # (I + S/m)^-1 = I - K' (n m I + K K')^-1 K
        solved = torch.linalg.solve_triangular(lower, raw.transpose(1, 2), upper=False)
        smoothed = solved.transpose(1, 2) @ solved[..., :num_keys] / (num_keys * floor)
        whitened = raw - smoothed
    else:
        solved = torch.linalg.solve_triangular(lower, vectors.transpose(1, 2), upper=False)
        whitened = solved.transpose(1, 2) @ solved[..., :num_keys]
        smoothed = raw - whitened
    grams = torch.stack([raw, whitened, smoothed], 1) / trace[:, None, None, None]
    return grams, (squares.sqrt() / trace * num_keys).clamp_min(1e-6)
