"""What calls answer, as frozen dataclasses. Fields that a newer server adds are in `raw`, its answer as it came."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from metasepia.client.errors import NotOurs

OneT = TypeVar("OneT", bound="Entity")


@dataclass(frozen=True, kw_only=True)
class Entity:
    """Something that the server shows."""

    raw: dict[str, Any] = field(repr=False)
    """The server's answer as it came."""

    @classmethod
    def of(cls: type[OneT], tree: Any) -> OneT:
        """Raises NotOurs for an answer that lacks a field, or has one of another type."""
        if not isinstance(tree, dict):
            raise NotOurs("the server", f"{_shown(tree)} where a {cls.__name__.lower()} was to come")
        found: dict[str, Any] = {"raw": tree}
        for name, (kind, required) in _fields(cls).items():
            if name in tree:
                found[name] = _value(kind, tree[name], f"{cls.__name__.lower()}.{name}")
            elif required:
                raise NotOurs("the server", f"a {cls.__name__.lower()} without {name}")
        return cls(**found)


@functools.cache
def _fields(cls: type[Entity]) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        one.name: (hints[one.name], one.default is missing and one.default_factory is missing)
        for one in dataclasses.fields(cls)
        if one.name != "raw"
    }


def _value(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kinds = [one for one in inner if one is not type(None)]
        fitting = [one for one in kinds if _fits(one, value)]
        return _value((fitting or kinds)[0], value, where)
    if origin is list and isinstance(value, list):
        return [_value(inner[0], one, where) for one in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(inner[1], one, where) for key, one in value.items()}
    if isinstance(kind, type) and issubclass(kind, Entity):
        return kind.of(value)
    if not _fits(kind, value):
        raise NotOurs("the server", f"{_shown(value)} as {where}")
    return float(value) if kind is float else value


def _fits(kind: Any, value: Any) -> bool:
    kind = typing.get_origin(kind) or kind
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, dict if isinstance(kind, type) and issubclass(kind, Entity) else kind)


def _shown(value: Any) -> str:
    return repr(value)[:80]


@dataclass(frozen=True, kw_only=True)
class Usage(Entity):
    """Tokens of a call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice(Entity):
    """One answer of a completion."""

    index: int
    text: str
    finish_reason: str | None = None
    """`stop` or `length`."""
    logprobs: dict[str, Any] | None = None

    @classmethod
    def of(cls: type[OneT], tree: Any) -> OneT:
        message = tree.get("message") if isinstance(tree, dict) else None
        if isinstance(message, dict):
            tree = {**tree, "text": message.get("content") or ""}
        return super().of(tree)


@dataclass(frozen=True, kw_only=True)
class Completion(Entity):
    """A chat's or a prompt's continuation."""

    id: str
    model: str
    """That answered; for `auto` the expert that it chose."""
    created: int
    """Unix seconds."""
    choices: list[Choice]
    usage: Usage
    receipt: dict[str, Any] = field(default_factory=dict)
    """What was executed, by digests."""

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, kw_only=True)
class SelfCheck(Entity):
    """How a context does on its own examples, each labelled by a context without it."""

    accuracy: float
    """From 0 to 1."""
    left_out: int
    """Examples that it was counted on."""
    method: str
    """`leave-one-out` or `10-fold`."""


@dataclass(frozen=True, kw_only=True)
class ContextInfo(Entity):
    """A classifier made of labelled examples."""

    id: str
    """`ctx-...`, made of its content."""
    created: int
    """Unix seconds."""
    input: str
    """`text`, `vector`, `image` or `audio`."""
    classes: list[str]
    num_examples: int
    num_unlabelled: int = 0
    encoder: str | None = None
    encoder_digest: str | None = None
    module: str
    module_digest: str
    protocol: str
    seed: int
    width: int
    """Numbers of each vector inside."""
    self_check: SelfCheck | None = None
    usable: bool = True
    """False where it was made with a part that is served in another version now."""
    cached: bool = False
    """It was there already; nothing was computed."""


@dataclass(frozen=True, kw_only=True)
class Expert(Entity):
    """An expert vector or a LoRA."""

    id: str
    """Its name."""
    created: int
    model: str | None
    """What to name in a request; None where its backbone is not served here."""
    digest: str
    owner: str
    form: str | None
    """`svf` or `lora`."""
    backbone: str | None
    parameters: int | None = None
    num_layers: int | None = None
    rank: int | None = None
    bytes: int
    description: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    """Of one asked for alone."""


@dataclass(frozen=True, kw_only=True)
class Mixture(Entity):
    """Weights on experts of one backbone."""

    id: str
    """Its digest or name."""
    model: str | None
    digest: str
    created: int | None = None
    owner: str | None = None
    backbone: str | None = None
    experts: list[str] | None = None
    """Their names at that time."""
    weights: list[dict[str, Any]] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Search(Entity):
    """A few-shot search for a mixture: a job."""

    id: str
    status: str
    """`queued`, `running`, `done`, `failed` or `cancelled`."""
    generations: int = 0
    max_generations: int | None = None
    evaluations: int = 0
    score: str | None = None
    best: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    error: str | None = None

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "running")


@dataclass(frozen=True, kw_only=True)
class Task(Entity):
    """A task's embedding, or the job that makes it."""

    id: str
    status: str
    """`queued`, `running`, `done` or `failed`."""
    kind: str
    """`data_set`, `model` or `prompt`."""
    method: str
    digest: str | None = None
    dims: int | None = None
    num_texts: int | None = None
    labels: list[str] | None = None
    noise: float | None = None
    """Expected 1 - cosine between two redraws of sampled answers; None for exact ones."""
    expert: str | None = None
    model: str | None = None
    progress: dict[str, Any] | None = None
    """`answered` of `of` probe texts."""
    error: str | None = None
    vector: list[float] | None = None
    """Of unit norm, where it was asked for."""

    @property
    def is_over(self) -> bool:
        return self.status not in ("queued", "running")


@dataclass(frozen=True, kw_only=True)
class NearTask(Entity):
    """A task near another one."""

    id: str
    kind: str
    cosine: float
    expert: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Entity):
    """Cosines of tasks with one another."""

    tasks: list[str]
    cosines: list[list[float]]
    """A row a task."""
    noise: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Probes(Entity):
    """The texts by whose answers models are told."""

    digest: str
    texts: list[str]


@dataclass(frozen=True, kw_only=True)
class Model(Entity):
    """Anything that a request can name as its model."""

    id: str
    created: int
    parent: str | None = None
    """The backbone of an expert or mixture."""
    x_info: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """`backbone`, `encoder`, `expert`, `mixture`, `context` or `auto`."""
        return self.x_info.get("kind")


@dataclass(frozen=True, kw_only=True)
class ObservedTask(Entity):
    """A task whose hidden states the graph keeps centroids of."""

    name: str
    centroids: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Deletion(Entity):
    """What was taken away."""

    id: str
    deleted: bool
    deleted_at: int | None = None
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class Key(Entity):
    """A key of a tenant; `key`, the secret, is in the answer of its making alone."""

    id: str
    tenant: str
    scopes: list[str]
    created: int
    """Unix seconds."""
    status: str
    """`active`, `expired` or `revoked`."""
    label: str = ""
    expires: int | None = None
    """Unix seconds; None: never."""
    revoked: int | None = None
    requests_per_minute: int | None = None
    """None: no limit."""
    tokens_per_day: int | None = None
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class UsageOfDay(Entity):
    """What one key used on one day."""

    day: str
    """2026-01-31, UTC."""
    key: str
    tenant: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, kw_only=True)
class Job(Entity):
    """Something that the server, or its cluster, works at."""

    id: str
    kind: str
    """`ray`, `search` or `task`."""
    name: str
    status: str
    """`queued`, `running`, `succeeded`, `failed` or `stopped`."""
    created_unix_s: float
    started_unix_s: float | None = None
    ended_unix_s: float | None = None
    progress: dict[str, Any] | None = None
    """`done` of `total`."""
    message: str | None = None


@dataclass(frozen=True, kw_only=True)
class Version(Entity):
    """Of the server."""

    version: str


@dataclass(frozen=True, kw_only=True)
class Health(Entity):
    """Whether every part answers."""

    status: str
    parts: Any = None


@dataclass(frozen=True, kw_only=True)
class Explanation(Entity):
    """What one classification rests on."""

    influence: list[dict[str, Any]]
    """Of each example on each label's log-probability."""
    nearest: list[dict[str, Any]]
    """The five nearest examples, the nearest first."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Labels of inputs, in their order."""

    labels: list[str | None]
    """None: below `abstain_below`, or without an answer (`PartlyDone`)."""
    classes: tuple[str, ...]
    """The context's labels, sorted."""
    probabilities: list[list[float]]
    """[inputs, classes]; a row of NaN where there is no answer."""
    model: str
    """The context's id, or `<encoder>+<module>`."""
    explanations: list[Explanation | None]
    usage: Usage
    """Of all requests together."""
    receipts: list[dict[str, Any]]
    """One a request."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def confidences(self) -> list[float]:
        """The best probability of each."""
        return [max(row) for row in self.probabilities]

    def columns(self, prefix: str = "") -> dict[str, list[Any]]:
        """`label`, and `probability_<label>` for each."""
        rows = list(zip(*self.probabilities, strict=True)) if self.probabilities else [()] * len(self.classes)
        return {f"{prefix}label": self.labels} | {
            f"{prefix}probability_{name}": list(row) for name, row in zip(self.classes, rows, strict=True)
        }


def added(usages: list[Usage]) -> Usage:
    """The sum."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    sums: Mapping[str, int] = {name: sum(getattr(one, name) for one in usages) for name in names}
    return Usage(raw=dict(sums), **sums)
