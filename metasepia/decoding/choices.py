"""How a row's next token is chosen from its logits.

Sampling adds Gumbel noise, a function of (seed, position, vocabulary size) alone, to the tempered logits of the nucleus
and takes the largest: `scores_of` says so token by token, and `choose` finds the same token while looking only at those
that can win.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.decoding.steps import Chosen
from metasepia.rows import Sampling


def choose(
    logits: Float[Tensor, "rows vocab"],
    sampling: Sequence[Sampling],
    seeds: Sequence[int],
    positions: Sequence[int],
    tops: Sequence[int] = (),
) -> list[Chosen]:
    """The next token of each row: the largest logit at temperature 0, else a draw from the tempered nucleus.

    A row draws the same in any batch and after any restart; `positions` are those of the tokens chosen, in the whole
    sequence. `tops`: how many of the likeliest are told for each row; empty: none. Logits that are not finite give a
    logprob that is not.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    tokens = logits.argmax(-1)
    for i, one in enumerate(sampling):
        if one.temperature > 0:
            tokens[i] = draw(logits[i], one, seeds[i], positions[i])
    of_tokens = logprobs.gather(-1, tokens[:, None])[:, 0]
    likeliest: list[tuple[tuple[int, float], ...]] = [()] * len(logits)
    for i, number in enumerate(tops):
        if number:
            values, ids = top(logprobs[i], number)
            likeliest[i] = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    pairs = zip(tokens.tolist(), of_tokens.tolist(), likeliest, strict=True)
    return [Chosen(token_id=token, logprob=logprob, top=best) for token, logprob, best in pairs]


def top(logprobs: Float[Tensor, "*places vocab"], number: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the largest, both [*places, number]; the smaller id first where two are equal."""
    number = min(number, logprobs.shape[-1])
    ids = logprobs.topk(number, dim=-1).indices.sort(dim=-1).values
    values, order = logprobs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def draw(logits: Float[Tensor, " vocab"], sampling: Sampling, seed: int, position: int) -> int:
    """argmax of `scores_of`, without computing most scores."""
    uniform = _uniform(seed, position, len(logits))
    if sampling.top_p < 1:
        scores = logits.double() / sampling.temperature
        probabilities = scores.softmax(-1)
        # What lies below weighs less than 1 - top_p together, so the nucleus is above.
        able = (probabilities >= 0.5 * (1 - sampling.top_p) / len(logits)).nonzero()[:, 0]
        own, order = probabilities[able].sort(descending=True, stable=True)
        able = able[order[own.cumsum(-1) - own < sampling.top_p]].sort().values
        tempered = scores[able]
    else:
        # No noise is above `most`: whoever is further below the best logit than that and its noise cannot win.
        best = int(logits.argmax())
        most, of_best = _gumbel(np.array([uniform.max(), uniform[best]]))
        least = float(logits[best]) - (most - of_best + 1e-3) * sampling.temperature
        able = (logits.double() >= least).nonzero()[:, 0]
        tempered = logits[able].double() / sampling.temperature
    if not len(able):  # not finite
        return int(logits.argmax())
    tokens = able.cpu().numpy()
    return int(tokens[(tempered.cpu().numpy() + _gumbel(uniform[tokens])).argmax()])


def scores_of(logits: Float[Tensor, " vocab"], sampling: Sampling, seed: int, position: int) -> Float[Tensor, " vocab"]:
    """What the choice of a token maximises: the logits, or tempered, cut to the nucleus and with noise. float64."""
    scores = logits.double()
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
        if sampling.top_p < 1:
            scores = _nucleus(scores, sampling.top_p)
        noise = gumbel(seed, position, len(scores))
        scores = scores + torch.from_numpy(noise).to(scores.device)
    return scores


def _nucleus(logits: Float[Tensor, " vocab"], top_p: float) -> Float[Tensor, " vocab"]:
    """The logits of the most probable tokens that together reach `top_p`; the others -inf. Never empty."""
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    return logits.index_fill(-1, order[before >= top_p], -torch.inf)


def gumbel(seed: int, position: int, num_values: int) -> np.ndarray:
    """Gumbel noise, float64 [num_values], from Philox's raw stream: counter-based, and the same in every numpy."""
    return _gumbel(_uniform(seed, position, num_values))


def _uniform(seed: int, position: int, num_values: int) -> np.ndarray:
    """In (0, 1), float64."""
    generator = np.random.Philox(key=seed % 2**128, counter=[0, position, 0, 0])
    return ((generator.random_raw(num_values) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _gumbel(uniform: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(uniform))
