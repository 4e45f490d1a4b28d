"""What the door answers of things that are kept: experts, mixtures, tasks, models, jobs, keys, and the graph itself.

As `serve.answers`, to which it belongs.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.answers import Digest, Error, Unix, Weight, _Answer, _Page

# -- experts and mixtures ----------------------------------------------------------------------------------------------


class Expert(_Answer):
    id: str
    object: Literal["expert"]
    created: Unix
    model: str | None = Field(description="Null where its backbone is not served here.")
    digest: Digest
    owner: str
    form: str | None
    backbone: str | None
    backbone_digest: Digest | None
    factors_digest: Digest | None
    renormalise: bool | None
    parameters: int | None
    num_layers: int | None
    rank: int | None
    bytes: int
    description: str | None


class ExpertWithCard(Expert):
    card: dict[str, Any]


class ExpertList(_Page):
    data: list[Expert]


class MixtureWeight(_Answer):
    digest: Digest
    weight: Weight


class Mixture(_Answer):
    id: str
    object: Literal["mixture"]
    created: Unix
    model: str | None
    digest: Digest
    owner: str
    backbone: str | None
    backbone_digest: Digest | None
    experts: list[str] | None
    weights: list[MixtureWeight]


class MixtureWithCard(Mixture):
    card: dict[str, Any]


class MixtureMade(_Answer):
    id: str
    object: Literal["mixture"]
    model: str
    digest: Digest


class MixtureList(_Page):
    data: list[Mixture]


class _Open(BaseModel):
    """A job's answer: what is told here, and what its kind adds as it goes on."""

    model_config = ConfigDict(extra="allow")


class Search(_Open):
    id: str
    object: Literal["mixture.search"]
    checkpoint: Digest
    status: Literal["queued", "running", "done", "failed", "cancelled"]


class SearchList(_Answer):
    object: Literal["list"]
    data: list[Search]


class SearchGeneration(_Open):
    number: int


class SearchTrace(_Answer):
    object: Literal["list"]
    data: list[SearchGeneration]


# -- task embeddings ---------------------------------------------------------------------------------------------------

Space = dict[str, Any]
"""`digest`, and with the vector what it is made of."""


class TaskReceipt(_Answer):
    request: Digest | None
    task: str
    embedding: Digest | None
    space: str | None
    method: str
    encoder: str | None
    probes: str | None
    answers: str | None
    context: str | None
    module: str | None
    seed: int | None
    backbone: str | None
    factors: str | None
    adapter: list[tuple[str, Weight]] | None
    path: str | None
    dtype: str | None
    tp_size: int | None


class TaskFacts(_Answer):
    id: str
    object: Literal["task"]
    created: Unix
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    kind: Literal["data_set", "model", "prompt"]
    method: str
    space: Space
    digest: Digest | None
    dims: int | None
    num_texts: int
    labels: list[str] | None
    noise: float | None
    seed: int
    expert: str | None
    model: str | None
    prompt: dict[str, Any] | None
    source: dict[str, Any]
    notes: list[str]
    progress: dict[str, Any] | None
    error: str | None
    vector: list[float] | None = None


class TaskMade(TaskFacts):
    cached: bool
    receipt: TaskReceipt


class Task(TaskFacts):
    receipt: TaskReceipt


class TaskList(_Page):
    data: list[TaskFacts]


class ProbeList(_Answer):
    object: Literal["task.probes"]
    digest: Digest
    num_texts: int
    texts: list[str]
    genres: list[str]


class TaskComparison(_Answer):
    object: Literal["task.comparison"]
    tasks: list[str]
    kinds: list[str]
    noise: list[float | None]
    space: str
    method: str
    cosines: list[list[float]]


class NearTask(_Answer):
    id: str
    kind: str
    expert: str | None
    cosine: float


class NearestTaskList(_Answer):
    object: Literal["list"]
    id: str
    space: str
    data: list[NearTask]
    compared: int
    elsewhere: dict[str, int] = Field(description="Tasks of other spaces, which are not compared, by their method.")


# -- models, keys and the graph itself ---------------------------------------------------------------------------------


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: Unix
    owned_by: str
    root: str
    parent: str | None
    permission: list[dict[str, Any]]
    x_info: dict[str, Any] = Field(description="What is ours: the kind, digests, an expert's card.")


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class JobProgress(_Answer):
    done: int
    total: int


class Job(_Answer):
    id: str
    object: Literal["job"]
    kind: Literal["ray", "search", "task"]
    name: str
    status: Literal["queued", "running", "succeeded", "failed", "stopped"]
    created_unix_s: float
    started_unix_s: float | None
    ended_unix_s: float | None
    progress: JobProgress | None
    message: str | None


class RayTold(_Answer):
    available: bool
    reason: str | None


class JobList(_Answer):
    object: Literal["list"]
    data: list[Job]
    has_more: bool
    ray: RayTold = Field(description="Whether Ray's dashboard told of its jobs.")


class Key(_Answer):
    id: str
    object: Literal["key"]
    created: Unix
    tenant: str
    scopes: list[str]
    label: str
    status: str
    expires: Unix | None
    revoked: Unix | None
    requests_per_minute: int | None
    tokens_per_day: int | None


class KeyMade(Key):
    key: str = Field(description="The secret; no other answer has it.")


class KeyList(_Page):
    data: list[Key]


class UsageOfDay(_Answer):
    object: Literal["usage"]
    day: str
    key: str
    tenant: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class UsageList(_Answer):
    object: Literal["list"]
    data: list[UsageOfDay]
    has_more: bool


class PartHealth(_Answer):
    ready: bool
    reason: str | None = None
    seconds: float | None = None


class Health(_Answer):
    status: Literal["ready"]
    parts: dict[str, PartHealth]


class NotReady(Error):
    """The envelope, with what each part said."""

    parts: dict[str, PartHealth] = Field(default_factory=dict)
    status: Literal["draining"] | None = None


class Status(_Open):
    object: Literal["status"]
    version: str
    ready: bool


class Version(_Answer):
    version: str
