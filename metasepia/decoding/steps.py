"""What a decoder is told and what it answers, step by step. numpy only: plans cross to each rank of a gang."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from metasepia.errors import MetasepiaError
from metasepia.rows import Adapter, Executed, HiddenStatesWanted, Sampling


@dataclass(frozen=True, kw_only=True)
class NewRow:
    """A row on its way into the decoder: everything that a rank must know of it."""

    key: int
    """Names the row in plans and results; never used twice by a scheduler."""
    token_ids: tuple[int, ...]
    """Prompt, and the part of the answer that was sent before."""
    adapter: Adapter
    want: Literal["tokens", "logprobs", "hidden_states", "prefix"]
    """prefix: nothing; its keys and values are kept under `key` until they are dropped, for rows that `reuse` them."""
    sampling: Sampling
    seed: int
    score_from: int
    top_logprobs: int = 0
    hidden: HiddenStatesWanted
    reuse: tuple[int, int] | None = None
    """Key of a kept prefix with the same adapter, and how many of its first tokens this row begins with; at least one
    token is left to read."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Opens a group of new rows whose prompts are read together, `Advance` by `Advance`."""

    group: int
    rows: tuple[NewRow, ...]
    """All want the same; hidden states: of the same layers and pooling."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """Reads the next `num_columns` of a group's left-padded prompts, after those that every row takes from a prefix."""

    group: int
    num_columns: int


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step, in this order: forget, learn, drop, feed, begin, advance. The same value on each rank."""

    step: int
    forget: tuple[str, ...] = ()
    """Digests of experts that leave every rank's table: of rows that go on, none uses them."""
    learn: tuple[str, ...] = ()
    """Digests of experts that every rank has aside, and that enter its table."""
    drop: tuple[int, ...] = ()
    """Keys of rows that leave, live or still being read, and of kept prefixes; one that left already is ignored."""
    feed: tuple[tuple[int, int], ...] = ()
    """(key, token) of every live row: the token chosen for it last. Empty: no decoding in this step."""
    begin: tuple[Begin, ...] = ()
    advance: tuple[Advance, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The next token of a row and its natural log-probability under the untempered distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there, as many as the row asks for, the likeliest first."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave, by key. numpy and plain values only."""

    step: int
    chosen: dict[int, Chosen] = field(default_factory=dict)
    """Each row fed, and each row whose prompt was read to its end (it is live from now on)."""
    arrays: dict[int, np.ndarray] = field(default_factory=dict)
    """Log-probabilities or hidden states of rows that wanted them; these have left. Log-probabilities are float32
    [tokens], or float64 [tokens, 1 + 2 top] of a row that asks for the likeliest: its own, their ids, theirs."""
    executed: dict[int, Executed] = field(default_factory=dict)
    """What was run, for each key in `chosen` or `arrays`."""
    failed: dict[int, MetasepiaError] = field(default_factory=dict)
    """Rows that cannot go on: an adapter that this shard does not hold, logits that are not finite. Drop them next."""
