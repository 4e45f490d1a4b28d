"""What crosses process borders beside `metasepia.rows`: frozen dataclasses of numpy arrays and plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from metasepia.decoding.inflight import Answer
from metasepia.decoding.leases import Moves
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import MethodName, TaskKind
from metasepia.modalities.media import Modality
from metasepia.rows import Adapter, Executed
from metasepia.search.cross_entropy import SearchSettings
from metasepia.search.fewshot import By
from metasepia.search.jobs import Example, Match
from metasepia.search.warm_start import Nearness


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What answered a request: digests of what was executed, from the shards' `Executed` and not from the request."""

    request: str
    """Digest of the request's body; together with the receipt enough to replay it."""
    backbone: str | None = None
    factors: str | None = None
    adapter: Adapter = ()
    context: str | None = None
    module: str | None = None
    encoder: str | None = None
    path: str | None = None
    seed: int | None = None
    dtype: str | None = None
    tp_size: int | None = None
    dispatch: str | None = None
    """`auto` only: the stage that chose the expert."""
    margin: float | None = None
    """`auto` only: how clear that stage's choice was, in that stage's own unit."""

    @classmethod
    def of(cls, executed: Executed, *, request: str, seed: int | None = None) -> "Receipt":
        return cls(
            request=request,
            backbone=executed.backbone,
            factors=executed.factors,
            adapter=executed.adapter,
            path=executed.path,
            dtype=executed.dtype,
            tp_size=executed.tp_size,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class News:
    """What rank 0's scheduler has for its owner, in order."""

    answers: "tuple[tuple[str, Answer], ...]"
    """By row."""
    moves: tuple[Moves, ...]
    """Of experts."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts for an encoder; answered by one float32 array [texts, width] of unit-norm rows."""

    encoder: str
    """Digest of the encoder that must answer."""
    texts: tuple[str, ...]
    deadline_unix_s: float
    traceparent: str | None = field(default=None, compare=False)
    """Of the span that asks (W3C), as in the messages below."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """Files of pictures or of sounds for an encoder; answered as texts are."""

    encoder: str
    """Digest of the encoder that must answer."""
    items: tuple[bytes, ...]
    deadline_unix_s: float
    traceparent: str | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Which encoder a process holds."""

    id: str
    digest: str
    width: int
    window: int
    """Tokens of the largest item that it takes: of a text with the special tokens, of a sound 50 a second."""
    dtype: str
    device: str
    modality: Modality = "text"
    """What it reads."""


@dataclass(frozen=True, kw_only=True)
class LabelledVectors:
    """A classification context by value: embedded examples and their labels, in any order."""

    digest: str
    """Of the content that the vectors were computed from (`metasepia.reasoning.named`): the context's name."""
    vectors: np.ndarray
    """float32 [examples, width]"""
    labels: tuple[str, ...]
    seed: int = 0
    unlabelled: np.ndarray | None = None
    """float32 [unlabelled, width]: they inform the reduction."""
    reduction: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the reduction's recipe that differ from the defaults, or all of them."""


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Queries against a context."""

    module: str
    """Digest of the reasoning module that must answer."""
    context: LabelledVectors | str
    """A digest alone where the registry has the context: the pool fetches one that it has not got, or no longer."""
    queries: np.ndarray
    """float32 [queries, width]"""
    deadline_unix_s: float
    traceparent: str | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Class probabilities of each query: float32 [queries, classes], rows sum to one; `classes` names the columns."""

    classes: tuple[str, ...]
    probabilities: np.ndarray
    context: str
    module: str
    compiled: Literal["now", "before"]


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Asks what the answers to queries rest on; costs a compiling of the context an example."""

    module: str
    context: LabelledVectors | str
    queries: np.ndarray
    nearest: int
    """Examples to name as nearest to each query."""
    deadline_unix_s: float
    traceparent: str | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Examples are numbered as the context's labels are; of one known by its digest, in the order of its blob."""

    classes: tuple[str, ...]
    influences: np.ndarray
    """float32 [queries, examples, classes]: by how much each example raises the log-probability of each class."""
    nearest: np.ndarray
    """int [queries, count], the nearest first"""
    similarity: np.ndarray
    """float32 [queries, count]: cosines"""


@dataclass(frozen=True, kw_only=True)
class Build:
    """A new context: compile it, keep it, and see how it does on its own examples, left out."""

    module: str
    context: LabelledVectors
    deadline_unix_s: float
    traceparent: str | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class SelfChecked:
    """How a context does on its own examples when they are left out."""

    accuracy: float
    """Share of those that it labels right; from 0 to 1."""
    num_left_out: int
    method: str
    """`leave-one-out`, or `10-fold`."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A context that was compiled, and its self-check."""

    classes: tuple[str, ...]
    num_bytes: int
    """Of the compiled context in memory."""
    self_check: SelfChecked | None
    """None where there was no time for it."""


@dataclass(frozen=True, kw_only=True)
class SearchAsked:
    """A few-shot search as the door hands it on: tokens, and experts by the names that the client gave."""

    backbone: str
    """Digest."""
    owner: str
    experts: tuple[str, ...] | None
    """None: all that can be chosen."""
    base: bool
    examples: tuple[Example, ...]
    num_shots: int
    settings: SearchSettings
    by: By
    match: Match
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    near: Nearness | None = None
    """What a warm start is made from; None: the uniform start."""


@dataclass(frozen=True, kw_only=True)
class TaskAsked:
    """A task embedding as the door hands it on: names are digests, answers are at hand or a black box's to ask for."""

    owner: str
    name: str | None
    """None: the id that its content gives."""
    kind: TaskKind
    method: MethodName | None
    seed: int
    answers: Answers | None
    box: Mapping[str, Any] = field(default_factory=dict)
    """Where there are no answers yet: the model to ask, by digests (`backbone`, `adapter`), and its `prompt`."""
    expert: str | None = None
    """Its name: requests like these go there."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the door knows of where the answers are from, in values that JSON has; `model` is its name."""
    background: bool = False
    """Acknowledged once it is written down, embedded later."""
    leave_out: bool = False
    """Of the answers, texts longer than the surrogate's window are left out; else they are refused."""
    deadline_unix_s: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class RegistryInfo:
    """The writer of the catalogue: its directory, the epoch that it began, its process."""

    root: str
    epoch: int
    pid: int
