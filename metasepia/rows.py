"""The values that a backbone is asked with and answers with. numpy only: they cross process borders.

A row is a pure function of itself: the same row on the same backbone gives the same answer whatever shares its batch,
so it may be run again after any failure.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Weight = float | tuple[float, ...]
"""An expert's share in a mixture: one number, or one a factored layer, in the order of `FactorIndex.lengths`."""

Adapter = tuple[tuple[str, Weight], ...]
"""Expert digests with their weights on the simplex (in each layer); empty means the base weights."""

MAX_TOP_LOGPROBS = 20
"""OpenAI's bound."""

Want = Literal["tokens", "logprobs", "hidden_states"]

Path = Literal["plain", "factors", "truncated", "materialised", "lora"]
"""The arithmetic a row went through: the stored weights, all run-time factors, the stored weights and their leading
factors, one adapter's rebuilt weights, or the stored weights and a low-rank difference."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """0 takes the largest logit; otherwise divides the logits. In [0, 2]."""
    top_p: float = 1.0
    """Smallest probability mass that the choice is limited to. In (0, 1]."""
    max_tokens: int = 16
    """At least 1; prompt and answer together fit the window."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the row; the stop token itself is not part of the answer."""


@dataclass(frozen=True, kw_only=True)
class HiddenStatesWanted:
    """Which hidden states a row asks for."""

    layers: tuple[int, ...] = (-1,)
    """0 is the embedding, n the output of block n, negative counts from the end (-1: last, after the final norm)."""
    pooling: Literal["mean", "last", "none", "spans"] = "mean"
    spans: tuple[tuple[int, int], ...] = ()
    """pooling = spans: the mean over each part [begin, end) of the row's tokens."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence for a backbone, whole: digests instead of names, its own sampling, seed and deadline."""

    request_id: str
    backbone: str
    """Digest of the backbone that must answer; another one refuses."""
    token_ids: tuple[int, ...]
    adapter: Adapter = ()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    """Sampling noise is a function of (seed, position)."""
    deadline_unix_s: float = float("inf")
    priority: int = 0
    """Larger goes first; rows of equal priority in order of arrival. Below 0: background, which gives its place to
    others even after it began, and goes on later where it stopped."""
    want: Want = "tokens"
    score_from: int = 1
    """want = logprobs: the first position whose token is scored given those before it. In [1, number of tokens]."""
    top_logprobs: int = 0
    """Likeliest tokens that are told beside each token chosen or scored. From 0 to MAX_TOP_LOGPROBS."""
    hidden: HiddenStatesWanted = field(default_factory=HiddenStatesWanted)
    prefix: tuple[int, ...] = ()
    """Tokens that other rows begin with too: their keys and values are computed once and kept, and this row takes as
    many as it begins with. It changes what a row costs and not its answer; () where nothing is shared."""
    sent: tuple[int, ...] = ()
    """Tokens of the answer that already left: a row run again prefills them and goes on after them."""
    traceparent: str | None = field(default=None, compare=False)
    """Of the span that asks (W3C); it changes nothing but what is told of the row."""


@dataclass(frozen=True, kw_only=True)
class Executed:
    """What a shard really ran for a row; receipts are made from this and never from the request."""

    backbone: str
    factors: str | None
    adapter: Adapter
    path: Path
    dtype: str
    tp_size: int


@dataclass(frozen=True, kw_only=True)
class TokenChunk:
    """The next tokens of a row, in order."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural log-probability of each token under the untempered distribution."""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Beside each token the row's `top_logprobs` likeliest at its place, (id, log-probability), the likeliest first; ()
    where the row asks for none."""
    finish: Literal["stop", "length"] | None = None
    """Set on the last chunk only."""
    executed: Executed | None = None
    """Set on the last chunk, and on the first: whoever has enough of a row may leave it with its receipt."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Teacher-forced natural log-probabilities of a row's tokens from `score_from` on."""

    request_id: str
    logprobs: np.ndarray
    """float32 [tokens]."""
    executed: Executed
    top_ids: np.ndarray | None = None
    """int64 [tokens, top]: the likeliest tokens at each place, the likeliest first; None where none are asked for."""
    top_logprobs: np.ndarray | None = None
    """float64 [tokens, top]."""


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """A row's hidden states: [layers, hidden] pooled, [layers, tokens, hidden] for pooling "none", [layers, spans,
    hidden] for "spans". float32.
    """

    request_id: str
    states: np.ndarray
    executed: Executed
