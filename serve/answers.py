"""What the door answers, as JSON, operation by operation: the schemas of the OpenAPI document.

Handlers build plain dictionaries; tests hold what they really answer to these models, which forbid every other field.
A field that is only sometimes there has a default here and stands in the schema as not required.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from metasepia.reasoning.named import InputKind, Protocol

Digest = Annotated[str, Field(description="A content digest: 64 hex digits.", pattern="^[0-9a-f]{64}$")]
Unix = Annotated[int, Field(description="Seconds since 1970.")]
Weight = float | list[float]
"""Of an expert; a list has a weight for each factored layer."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(_Answer):
    message: str
    type: str
    param: str | None = Field(description="The field of the request that is meant.")
    code: str = Field(description="For programs: stays the same where the message is worded anew.")


class Error(_Answer):
    """OpenAI's envelope, on every answer of 400 and above."""

    error: ErrorBody


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class Receipt(_Answer):
    """What answered: digests of what was executed, enough to replay it."""

    request: Digest | None = Field(description="Of the request's body.")
    backbone: Digest | None
    factors: Digest | None
    adapter: list[tuple[str, Weight]] = Field(description="Digests of experts with their weights.")
    context: Digest | None
    module: Digest | None
    encoder: Digest | None
    path: str | None
    seed: int | None
    dtype: str | None
    tp_size: int | None
    dispatch: str | None = Field(description="Model `auto`: the stage that chose.")
    margin: float | None


class Deleted(_Answer):
    id: str
    object: str
    deleted: Literal[True]
    deleted_at: Unix | None = None


class _Page(_Answer):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


# -- classification and contexts ---------------------------------------------------------------------------------------


class Influence(_Answer):
    example: int
    label: str
    text: str | None = None
    log_probability: dict[str, float]


class Neighbour(_Answer):
    example: int
    label: str
    text: str | None = None
    similarity: float


class Explanation(_Answer):
    influence: list[Influence]
    nearest: list[Neighbour]


class ClassificationResult(_Answer):
    label: str | None = Field(description="Null where no probability reaches `abstain_below`.")
    probabilities: dict[str, float]
    explain: Explanation | None = None


class Classification(_Answer):
    model: str
    results: list[ClassificationResult]
    usage: Usage
    receipt: Receipt


class SelfCheck(_Answer):
    accuracy: float
    left_out: int
    method: str


class ContextFacts(_Answer):
    id: str
    object: Literal["context"]
    created: Unix
    input: InputKind
    encoder: str | None
    encoder_digest: Digest | None
    module: str
    module_digest: Digest
    protocol: Protocol
    seed: int
    width: int
    classes: list[str]
    num_examples: int
    num_unlabelled: int
    self_check: SelfCheck | None


class Context(ContextFacts):
    usable: bool = Field(description="False where the encoder or module that it was made with is not served.")


class ContextMade(ContextFacts):
    cached: bool = Field(description="It was there before.")
    build_ms: float
    usage: Usage
    receipt: Receipt


class ContextList(_Page):
    data: list[Context]


class ContextExample(_Answer):
    example: int
    label: str
    text: str | None = None


class ContextExampleList(_Answer):
    object: Literal["list"]
    context: str
    data: list[ContextExample]
    has_more: bool


# -- completions and embeddings, OpenAI's shapes -----------------------------------------------------------------------

Finish = Literal["stop", "length"]


class ChatTopLogprob(_Answer):
    token: str
    logprob: float | None
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(_Answer):
    content: list[ChatTokenLogprob]
    refusal: None


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatAnswer(_Answer):
    role: Literal["assistant"]
    content: str


class ChatChoice(_Answer):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class _Completed(_Answer):
    id: str
    created: Unix
    model: str


class ChatCompletion(_Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    receipt: Receipt


class ChatDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(_Completed):
    """One event of a stream; the last but `[DONE]` has the receipt."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    receipt: Receipt | None = None


class TextChoice(_Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextChunkChoice(_Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class Completion(_Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    receipt: Receipt


class CompletionChunk(_Completed):
    """One event of a stream; the last but `[DONE]` has the receipt."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None
    receipt: Receipt | None = None


class Embedding(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="A text is the float32 numbers, little-endian, in base64.")


class EmbeddingList(_Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    created: Unix
    usage: Usage
    receipt: Receipt


# -- hidden states and the tasks observed in them ----------------------------------------------------------------------


class HiddenState(_Answer):
    object: Literal["hidden_states"]
    index: int
    layer: int
    shape: list[int]
    token_ids: list[int] | None = None
    states: list[float] | list[list[float]] | str


class Centroid(_Answer):
    expert: str | None
    layer: int
    pooling: str
    count: int
    spread: float | None
    drift: float | None
    drift_by_chance: float | None
    separation: float | None
    distance: float | None = None


class TaskCentroid(Centroid):
    backbone: str | None


class Observed(_Answer):
    name: str
    observed: bool
    reason: str | None = None
    centroids: list[Centroid]


class HiddenStatesList(_Answer):
    object: Literal["list"]
    data: list[HiddenState]
    model: str
    layers: list[int]
    pooling: Literal["last", "mean", "none"]
    num_inputs: int
    created: Unix
    usage: Usage
    receipt: Receipt
    task: Observed | None = None


class ObservedTask(_Answer):
    id: str
    object: Literal["hidden_states.task"]
    centroids: list[TaskCentroid]


class ObservedTaskList(_Answer):
    object: Literal["list"]
    data: list[ObservedTask]
