from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "total_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("request", "backbone", "factors", "adapter", "context", "module", "encoder", "path", "seed", "dtype", "tp_size", "dispatch", "margin")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    request: str
    backbone: str
    factors: str
    adapter: _containers.RepeatedCompositeFieldContainer[AdapterPart]
    context: str
    module: str
    encoder: str
    path: str
    seed: int
    dtype: str
    tp_size: int
    dispatch: str
    margin: float
    def __init__(self, request: _Optional[str] = ..., backbone: _Optional[str] = ..., factors: _Optional[str] = ..., adapter: _Optional[_Iterable[_Union[AdapterPart, _Mapping]]] = ..., context: _Optional[str] = ..., module: _Optional[str] = ..., encoder: _Optional[str] = ..., path: _Optional[str] = ..., seed: _Optional[int] = ..., dtype: _Optional[str] = ..., tp_size: _Optional[int] = ..., dispatch: _Optional[str] = ..., margin: _Optional[float] = ...) -> None: ...

class AdapterPart(_message.Message):
    __slots__ = ("digest", "weight")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    weight: Weight
    def __init__(self, digest: _Optional[str] = ..., weight: _Optional[_Union[Weight, _Mapping]] = ...) -> None: ...

class Weight(_message.Message):
    __slots__ = ("number", "layers")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    number: float
    layers: Numbers
    def __init__(self, number: _Optional[float] = ..., layers: _Optional[_Union[Numbers, _Mapping]] = ...) -> None: ...

class Numbers(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Number(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: float
    def __init__(self, number: _Optional[float] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Strings(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("content_type", "etag", "data")
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    content_type: str
    etag: str
    data: bytes
    def __init__(self, content_type: _Optional[str] = ..., etag: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Deleted(_message.Message):
    __slots__ = ("id", "object", "deleted", "deleted_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    DELETED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    deleted: bool
    deleted_at: int
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., deleted: _Optional[bool] = ..., deleted_at: _Optional[int] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("text", "vector", "image", "audio")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    text: str
    vector: Vector
    image: bytes
    audio: bytes
    def __init__(self, text: _Optional[str] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., image: _Optional[bytes] = ..., audio: _Optional[bytes] = ...) -> None: ...

class Example(_message.Message):
    __slots__ = ("text", "vector", "image", "audio", "label")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    text: str
    vector: Vector
    image: bytes
    audio: bytes
    label: str
    def __init__(self, text: _Optional[str] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., image: _Optional[bytes] = ..., audio: _Optional[bytes] = ..., label: _Optional[str] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("model", "examples", "inputs", "unlabelled", "encoder", "module", "protocol", "seed", "explain", "abstain_below")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    UNLABELLED_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    ABSTAIN_BELOW_FIELD_NUMBER: _ClassVar[int]
    model: str
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    inputs: _containers.RepeatedCompositeFieldContainer[Input]
    unlabelled: _containers.RepeatedCompositeFieldContainer[Input]
    encoder: str
    module: str
    protocol: str
    seed: int
    explain: bool
    abstain_below: float
    def __init__(self, model: _Optional[str] = ..., examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., inputs: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., unlabelled: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., encoder: _Optional[str] = ..., module: _Optional[str] = ..., protocol: _Optional[str] = ..., seed: _Optional[int] = ..., explain: _Optional[bool] = ..., abstain_below: _Optional[float] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("model", "results", "usage", "receipt")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    model: str
    results: _containers.RepeatedCompositeFieldContainer[ClassificationResult]
    usage: Usage
    receipt: Receipt
    def __init__(self, model: _Optional[str] = ..., results: _Optional[_Iterable[_Union[ClassificationResult, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class ClassificationResult(_message.Message):
    __slots__ = ("label", "probabilities", "explain")
    class ProbabilitiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    label: str
    probabilities: _containers.ScalarMap[str, float]
    explain: Explanation
    def __init__(self, label: _Optional[str] = ..., probabilities: _Optional[_Mapping[str, float]] = ..., explain: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("influence", "nearest")
    INFLUENCE_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    influence: _containers.RepeatedCompositeFieldContainer[Influence]
    nearest: _containers.RepeatedCompositeFieldContainer[Neighbour]
    def __init__(self, influence: _Optional[_Iterable[_Union[Influence, _Mapping]]] = ..., nearest: _Optional[_Iterable[_Union[Neighbour, _Mapping]]] = ...) -> None: ...

class Influence(_message.Message):
    __slots__ = ("example", "label", "text", "log_probability")
    class LogProbabilityEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    example: int
    label: str
    text: str
    log_probability: _containers.ScalarMap[str, float]
    def __init__(self, example: _Optional[int] = ..., label: _Optional[str] = ..., text: _Optional[str] = ..., log_probability: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Neighbour(_message.Message):
    __slots__ = ("example", "label", "text", "similarity")
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    example: int
    label: str
    text: str
    similarity: float
    def __init__(self, example: _Optional[int] = ..., label: _Optional[str] = ..., text: _Optional[str] = ..., similarity: _Optional[float] = ...) -> None: ...

class CreateContextRequest(_message.Message):
    __slots__ = ("examples", "unlabelled", "encoder", "module", "protocol", "seed")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    UNLABELLED_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    unlabelled: _containers.RepeatedCompositeFieldContainer[Input]
    encoder: str
    module: str
    protocol: str
    seed: int
    def __init__(self, examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., unlabelled: _Optional[_Iterable[_Union[Input, _Mapping]]] = ..., encoder: _Optional[str] = ..., module: _Optional[str] = ..., protocol: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class Context(_message.Message):
    __slots__ = ("id", "object", "created", "input", "encoder", "encoder_digest", "module", "module_digest", "protocol", "seed", "width", "classes", "num_examples", "num_unlabelled", "self_check", "usable", "cached", "build_ms", "usage", "receipt")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    ENCODER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    MODULE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_UNLABELLED_FIELD_NUMBER: _ClassVar[int]
    SELF_CHECK_FIELD_NUMBER: _ClassVar[int]
    USABLE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    BUILD_MS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    input: str
    encoder: str
    encoder_digest: str
    module: str
    module_digest: str
    protocol: str
    seed: int
    width: int
    classes: _containers.RepeatedScalarFieldContainer[str]
    num_examples: int
    num_unlabelled: int
    self_check: SelfCheck
    usable: bool
    cached: bool
    build_ms: float
    usage: Usage
    receipt: Receipt
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., input: _Optional[str] = ..., encoder: _Optional[str] = ..., encoder_digest: _Optional[str] = ..., module: _Optional[str] = ..., module_digest: _Optional[str] = ..., protocol: _Optional[str] = ..., seed: _Optional[int] = ..., width: _Optional[int] = ..., classes: _Optional[_Iterable[str]] = ..., num_examples: _Optional[int] = ..., num_unlabelled: _Optional[int] = ..., self_check: _Optional[_Union[SelfCheck, _Mapping]] = ..., usable: _Optional[bool] = ..., cached: _Optional[bool] = ..., build_ms: _Optional[float] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class SelfCheck(_message.Message):
    __slots__ = ("accuracy", "left_out", "method")
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    accuracy: float
    left_out: int
    method: str
    def __init__(self, accuracy: _Optional[float] = ..., left_out: _Optional[int] = ..., method: _Optional[str] = ...) -> None: ...

class ListContextsRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class ContextList(_message.Message):
    __slots__ = ("object", "data", "first_id", "last_id", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Context]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Context, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class GetContextRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteContextRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListContextExamplesRequest(_message.Message):
    __slots__ = ("id", "begin", "limit")
    ID_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    id: str
    begin: int
    limit: int
    def __init__(self, id: _Optional[str] = ..., begin: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ContextExampleList(_message.Message):
    __slots__ = ("object", "context", "data", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    context: str
    data: _containers.RepeatedCompositeFieldContainer[ContextExample]
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., context: _Optional[str] = ..., data: _Optional[_Iterable[_Union[ContextExample, _Mapping]]] = ..., has_more: _Optional[bool] = ...) -> None: ...

class ContextExample(_message.Message):
    __slots__ = ("example", "label", "text")
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    example: int
    label: str
    text: str
    def __init__(self, example: _Optional[int] = ..., label: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ExtendContextRequest(_message.Message):
    __slots__ = ("id", "examples")
    ID_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    id: str
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    def __init__(self, id: _Optional[str] = ..., examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "name")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    name: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class StreamOptions(_message.Message):
    __slots__ = ("include_usage",)
    INCLUDE_USAGE_FIELD_NUMBER: _ClassVar[int]
    include_usage: bool
    def __init__(self, include_usage: _Optional[bool] = ...) -> None: ...

class ChatCompletionRequest(_message.Message):
    __slots__ = ("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stream_options", "dispatch", "logprobs", "top_logprobs")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STREAM_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    model: str
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    temperature: float
    top_p: float
    max_tokens: int
    max_completion_tokens: int
    n: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stream_options: StreamOptions
    dispatch: _containers.RepeatedScalarFieldContainer[str]
    logprobs: bool
    top_logprobs: int
    def __init__(self, model: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., max_completion_tokens: _Optional[int] = ..., n: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stream_options: _Optional[_Union[StreamOptions, _Mapping]] = ..., dispatch: _Optional[_Iterable[str]] = ..., logprobs: _Optional[bool] = ..., top_logprobs: _Optional[int] = ...) -> None: ...

class ChatCompletion(_message.Message):
    __slots__ = ("id", "object", "created", "model", "choices", "usage", "receipt")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    model: str
    choices: _containers.RepeatedCompositeFieldContainer[ChatChoice]
    usage: Usage
    receipt: Receipt
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., model: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[ChatChoice, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class ChatChoice(_message.Message):
    __slots__ = ("index", "message", "logprobs", "finish_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs
    finish_reason: str
    def __init__(self, index: _Optional[int] = ..., message: _Optional[_Union[ChatMessage, _Mapping]] = ..., logprobs: _Optional[_Union[ChatLogprobs, _Mapping]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class ChatLogprobs(_message.Message):
    __slots__ = ("content", "refusal")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    content: _containers.RepeatedCompositeFieldContainer[ChatToken]
    refusal: str
    def __init__(self, content: _Optional[_Iterable[_Union[ChatToken, _Mapping]]] = ..., refusal: _Optional[str] = ...) -> None: ...

class ChatToken(_message.Message):
    __slots__ = ("token", "logprob", "bytes", "top_logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: str
    logprob: float
    bytes: Tokens
    top_logprobs: _containers.RepeatedCompositeFieldContainer[ChatToken]
    def __init__(self, token: _Optional[str] = ..., logprob: _Optional[float] = ..., bytes: _Optional[_Union[Tokens, _Mapping]] = ..., top_logprobs: _Optional[_Iterable[_Union[ChatToken, _Mapping]]] = ...) -> None: ...

class ChatCompletionChunk(_message.Message):
    __slots__ = ("id", "object", "created", "model", "choices", "usage", "receipt")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    model: str
    choices: _containers.RepeatedCompositeFieldContainer[ChatChunkChoice]
    usage: Usage
    receipt: Receipt
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., model: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[ChatChunkChoice, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class ChatChunkChoice(_message.Message):
    __slots__ = ("index", "delta", "logprobs", "finish_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs
    finish_reason: str
    def __init__(self, index: _Optional[int] = ..., delta: _Optional[_Union[ChatMessage, _Mapping]] = ..., logprobs: _Optional[_Union[ChatLogprobs, _Mapping]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: Tokens
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ...) -> None: ...

class CompletionRequest(_message.Message):
    __slots__ = ("model", "prompt", "temperature", "top_p", "max_tokens", "n", "seed", "stop", "stream_options", "dispatch", "logprobs", "echo")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STREAM_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: _containers.RepeatedCompositeFieldContainer[Prompt]
    temperature: float
    top_p: float
    max_tokens: int
    n: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stream_options: StreamOptions
    dispatch: _containers.RepeatedScalarFieldContainer[str]
    logprobs: int
    echo: bool
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., n: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stream_options: _Optional[_Union[StreamOptions, _Mapping]] = ..., dispatch: _Optional[_Iterable[str]] = ..., logprobs: _Optional[int] = ..., echo: _Optional[bool] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("id", "object", "created", "model", "choices", "usage", "receipt")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    model: str
    choices: _containers.RepeatedCompositeFieldContainer[CompletionChoice]
    usage: Usage
    receipt: Receipt
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., model: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[CompletionChoice, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class CompletionChoice(_message.Message):
    __slots__ = ("index", "text", "logprobs", "finish_reason")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    logprobs: CompletionLogprobs
    finish_reason: str
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Union[CompletionLogprobs, _Mapping]] = ..., finish_reason: _Optional[str] = ...) -> None: ...

class CompletionLogprobs(_message.Message):
    __slots__ = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    token_logprobs: _containers.RepeatedCompositeFieldContainer[Number]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[LogprobByToken]
    text_offset: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[str]] = ..., token_logprobs: _Optional[_Iterable[_Union[Number, _Mapping]]] = ..., top_logprobs: _Optional[_Iterable[_Union[LogprobByToken, _Mapping]]] = ..., text_offset: _Optional[_Iterable[int]] = ...) -> None: ...

class LogprobByToken(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("image", "audio")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    audio: bytes
    def __init__(self, image: _Optional[bytes] = ..., audio: _Optional[bytes] = ...) -> None: ...

class EmbeddingInput(_message.Message):
    __slots__ = ("text", "tokens", "file")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: Tokens
    file: File
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., file: _Optional[_Union[File, _Mapping]] = ...) -> None: ...

class EmbeddingsRequest(_message.Message):
    __slots__ = ("model", "input", "dimensions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    input: _containers.RepeatedCompositeFieldContainer[EmbeddingInput]
    dimensions: int
    def __init__(self, model: _Optional[str] = ..., input: _Optional[_Iterable[_Union[EmbeddingInput, _Mapping]]] = ..., dimensions: _Optional[int] = ...) -> None: ...

class EmbeddingList(_message.Message):
    __slots__ = ("object", "data", "model", "created", "usage", "receipt")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Embedding]
    model: str
    created: int
    usage: Usage
    receipt: Receipt
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Embedding, _Mapping]]] = ..., model: _Optional[str] = ..., created: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("object", "index", "embedding")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    object: str
    index: int
    embedding: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, object: _Optional[str] = ..., index: _Optional[int] = ..., embedding: _Optional[_Iterable[float]] = ...) -> None: ...

class HiddenStatesRequest(_message.Message):
    __slots__ = ("model", "input", "layers", "pooling", "task", "observe")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    OBSERVE_FIELD_NUMBER: _ClassVar[int]
    model: str
    input: _containers.RepeatedCompositeFieldContainer[EmbeddingInput]
    layers: _containers.RepeatedScalarFieldContainer[int]
    pooling: str
    task: str
    observe: bool
    def __init__(self, model: _Optional[str] = ..., input: _Optional[_Iterable[_Union[EmbeddingInput, _Mapping]]] = ..., layers: _Optional[_Iterable[int]] = ..., pooling: _Optional[str] = ..., task: _Optional[str] = ..., observe: _Optional[bool] = ...) -> None: ...

class HiddenStatesList(_message.Message):
    __slots__ = ("object", "data", "model", "layers", "pooling", "num_inputs", "created", "usage", "receipt", "task")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NUM_INPUTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[HiddenStates]
    model: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    pooling: str
    num_inputs: int
    created: int
    usage: Usage
    receipt: Receipt
    task: ObservedState
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[HiddenStates, _Mapping]]] = ..., model: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., pooling: _Optional[str] = ..., num_inputs: _Optional[int] = ..., created: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., task: _Optional[_Union[ObservedState, _Mapping]] = ...) -> None: ...

class HiddenStates(_message.Message):
    __slots__ = ("object", "index", "layer", "shape", "token_ids", "states")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    object: str
    index: int
    layer: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    states: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, object: _Optional[str] = ..., index: _Optional[int] = ..., layer: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., states: _Optional[_Iterable[float]] = ...) -> None: ...

class ObservedState(_message.Message):
    __slots__ = ("name", "observed", "reason", "centroids")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CENTROIDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    observed: bool
    reason: str
    centroids: _containers.RepeatedCompositeFieldContainer[Centroid]
    def __init__(self, name: _Optional[str] = ..., observed: _Optional[bool] = ..., reason: _Optional[str] = ..., centroids: _Optional[_Iterable[_Union[Centroid, _Mapping]]] = ...) -> None: ...

class Centroid(_message.Message):
    __slots__ = ("backbone", "expert", "layer", "pooling", "count", "spread", "drift", "drift_by_chance", "separation", "distance")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    DRIFT_BY_CHANCE_FIELD_NUMBER: _ClassVar[int]
    SEPARATION_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    expert: str
    layer: int
    pooling: str
    count: int
    spread: float
    drift: float
    drift_by_chance: float
    separation: float
    distance: float
    def __init__(self, backbone: _Optional[str] = ..., expert: _Optional[str] = ..., layer: _Optional[int] = ..., pooling: _Optional[str] = ..., count: _Optional[int] = ..., spread: _Optional[float] = ..., drift: _Optional[float] = ..., drift_by_chance: _Optional[float] = ..., separation: _Optional[float] = ..., distance: _Optional[float] = ...) -> None: ...

class ListObservedTasksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ObservedTaskList(_message.Message):
    __slots__ = ("object", "data")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[ObservedTask]
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[ObservedTask, _Mapping]]] = ...) -> None: ...

class GetObservedTaskRequest(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: str
    def __init__(self, task: _Optional[str] = ...) -> None: ...

class ObservedTask(_message.Message):
    __slots__ = ("id", "object", "centroids")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CENTROIDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    centroids: _containers.RepeatedCompositeFieldContainer[Centroid]
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., centroids: _Optional[_Iterable[_Union[Centroid, _Mapping]]] = ...) -> None: ...

class DeleteObservedTaskRequest(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: str
    def __init__(self, task: _Optional[str] = ...) -> None: ...

class ExpertUpload(_message.Message):
    __slots__ = ("name", "backbone", "config", "card", "file")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    name: str
    backbone: str
    config: bytes
    card: _struct_pb2.Struct
    file: bytes
    def __init__(self, name: _Optional[str] = ..., backbone: _Optional[str] = ..., config: _Optional[bytes] = ..., card: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., file: _Optional[bytes] = ...) -> None: ...

class Expert(_message.Message):
    __slots__ = ("id", "object", "created", "model", "digest", "owner", "form", "backbone", "backbone_digest", "factors_digest", "renormalise", "parameters", "num_layers", "rank", "bytes", "description", "card")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FACTORS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RENORMALISE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    model: str
    digest: str
    owner: str
    form: str
    backbone: str
    backbone_digest: str
    factors_digest: str
    renormalise: bool
    parameters: int
    num_layers: int
    rank: int
    bytes: int
    description: str
    card: _struct_pb2.Struct
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., model: _Optional[str] = ..., digest: _Optional[str] = ..., owner: _Optional[str] = ..., form: _Optional[str] = ..., backbone: _Optional[str] = ..., backbone_digest: _Optional[str] = ..., factors_digest: _Optional[str] = ..., renormalise: _Optional[bool] = ..., parameters: _Optional[int] = ..., num_layers: _Optional[int] = ..., rank: _Optional[int] = ..., bytes: _Optional[int] = ..., description: _Optional[str] = ..., card: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ListExpertsRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class ExpertList(_message.Message):
    __slots__ = ("object", "data", "first_id", "last_id", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Expert]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Expert, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class GetExpertRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteExpertRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetExpertContentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class CreateMixtureRequest(_message.Message):
    __slots__ = ("backbone", "weights", "name")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Weight
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Weight, _Mapping]] = ...) -> None: ...
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    weights: _containers.MessageMap[str, Weight]
    name: str
    def __init__(self, backbone: _Optional[str] = ..., weights: _Optional[_Mapping[str, Weight]] = ..., name: _Optional[str] = ...) -> None: ...

class Mixture(_message.Message):
    __slots__ = ("id", "object", "created", "model", "digest", "owner", "backbone", "backbone_digest", "experts", "weights", "card")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    model: str
    digest: str
    owner: str
    backbone: str
    backbone_digest: str
    experts: _containers.RepeatedScalarFieldContainer[str]
    weights: _containers.RepeatedCompositeFieldContainer[MixtureWeight]
    card: _struct_pb2.Struct
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., model: _Optional[str] = ..., digest: _Optional[str] = ..., owner: _Optional[str] = ..., backbone: _Optional[str] = ..., backbone_digest: _Optional[str] = ..., experts: _Optional[_Iterable[str]] = ..., weights: _Optional[_Iterable[_Union[MixtureWeight, _Mapping]]] = ..., card: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class MixtureWeight(_message.Message):
    __slots__ = ("digest", "weight")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    weight: Weight
    def __init__(self, digest: _Optional[str] = ..., weight: _Optional[_Union[Weight, _Mapping]] = ...) -> None: ...

class ListMixturesRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class MixtureList(_message.Message):
    __slots__ = ("object", "data", "first_id", "last_id", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Mixture]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Mixture, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class GetMixtureRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class DeleteMixtureRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class SearchExample(_message.Message):
    __slots__ = ("prompt", "messages", "answer")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    answer: str
    def __init__(self, prompt: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., answer: _Optional[str] = ...) -> None: ...

class SearchStart(_message.Message):
    __slots__ = ("kind", "warm")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    kind: str
    warm: WarmStart
    def __init__(self, kind: _Optional[str] = ..., warm: _Optional[_Union[WarmStart, _Mapping]] = ...) -> None: ...

class WarmStart(_message.Message):
    __slots__ = ("task", "temperature", "base", "uniform", "std")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    task: str
    temperature: float
    base: float
    uniform: float
    std: float
    def __init__(self, task: _Optional[str] = ..., temperature: _Optional[float] = ..., base: _Optional[float] = ..., uniform: _Optional[float] = ..., std: _Optional[float] = ...) -> None: ...

class CreateSearchRequest(_message.Message):
    __slots__ = ("backbone", "model", "examples", "experts", "base", "method", "score", "match", "max_tokens", "shots", "per_layer", "population", "elites", "generations", "patience", "max_evaluations", "smoothing", "start", "seed")
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHOTS_FIELD_NUMBER: _ClassVar[int]
    PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    ELITES_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    backbone: str
    model: str
    examples: _containers.RepeatedCompositeFieldContainer[SearchExample]
    experts: _containers.RepeatedScalarFieldContainer[str]
    base: bool
    method: str
    score: str
    match: str
    max_tokens: int
    shots: int
    per_layer: bool
    population: int
    elites: int
    generations: int
    patience: int
    max_evaluations: int
    smoothing: float
    start: SearchStart
    seed: int
    def __init__(self, backbone: _Optional[str] = ..., model: _Optional[str] = ..., examples: _Optional[_Iterable[_Union[SearchExample, _Mapping]]] = ..., experts: _Optional[_Iterable[str]] = ..., base: _Optional[bool] = ..., method: _Optional[str] = ..., score: _Optional[str] = ..., match: _Optional[str] = ..., max_tokens: _Optional[int] = ..., shots: _Optional[int] = ..., per_layer: _Optional[bool] = ..., population: _Optional[int] = ..., elites: _Optional[int] = ..., generations: _Optional[int] = ..., patience: _Optional[int] = ..., max_evaluations: _Optional[int] = ..., smoothing: _Optional[float] = ..., start: _Optional[_Union[SearchStart, _Mapping]] = ..., seed: _Optional[int] = ...) -> None: ...

class Search(_message.Message):
    __slots__ = ("id", "object", "checkpoint", "status", "created_unix_s", "job", "backbone", "experts", "score", "start", "per_layer", "population", "max_generations", "shots", "held_out", "generations", "evaluations", "best", "result", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SHOTS_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    checkpoint: str
    status: str
    created_unix_s: float
    job: str
    backbone: str
    experts: _containers.RepeatedScalarFieldContainer[str]
    score: str
    start: SearchBegan
    per_layer: bool
    population: int
    max_generations: int
    shots: int
    held_out: int
    generations: int
    evaluations: int
    best: SearchBest
    result: SearchResult
    error: str
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., checkpoint: _Optional[str] = ..., status: _Optional[str] = ..., created_unix_s: _Optional[float] = ..., job: _Optional[str] = ..., backbone: _Optional[str] = ..., experts: _Optional[_Iterable[str]] = ..., score: _Optional[str] = ..., start: _Optional[_Union[SearchBegan, _Mapping]] = ..., per_layer: _Optional[bool] = ..., population: _Optional[int] = ..., max_generations: _Optional[int] = ..., shots: _Optional[int] = ..., held_out: _Optional[int] = ..., generations: _Optional[int] = ..., evaluations: _Optional[int] = ..., best: _Optional[_Union[SearchBest, _Mapping]] = ..., result: _Optional[_Union[SearchResult, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

class SearchBegan(_message.Message):
    __slots__ = ("kind", "nearness")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NEARNESS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    nearness: SearchNearness
    def __init__(self, kind: _Optional[str] = ..., nearness: _Optional[_Union[SearchNearness, _Mapping]] = ...) -> None: ...

class SearchNearness(_message.Message):
    __slots__ = ("source", "similarities", "weights", "std")
    class SimilaritiesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Number
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Number, _Mapping]] = ...) -> None: ...
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class StdEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SIMILARITIES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    source: str
    similarities: _containers.MessageMap[str, Number]
    weights: _containers.ScalarMap[str, float]
    std: _containers.ScalarMap[str, float]
    def __init__(self, source: _Optional[str] = ..., similarities: _Optional[_Mapping[str, Number]] = ..., weights: _Optional[_Mapping[str, float]] = ..., std: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SearchBest(_message.Message):
    __slots__ = ("value", "likelihood", "weights")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    value: float
    likelihood: float
    weights: _containers.ScalarMap[str, float]
    def __init__(self, value: _Optional[float] = ..., likelihood: _Optional[float] = ..., weights: _Optional[_Mapping[str, float]] = ...) -> None: ...

class SearchScore(_message.Message):
    __slots__ = ("value", "likelihood")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    value: float
    likelihood: float
    def __init__(self, value: _Optional[float] = ..., likelihood: _Optional[float] = ...) -> None: ...

class SearchScores(_message.Message):
    __slots__ = ("split", "examples", "mixture", "best_single", "base")
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    BEST_SINGLE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    split: str
    examples: int
    mixture: SearchScore
    best_single: SearchScore
    base: SearchScore
    def __init__(self, split: _Optional[str] = ..., examples: _Optional[int] = ..., mixture: _Optional[_Union[SearchScore, _Mapping]] = ..., best_single: _Optional[_Union[SearchScore, _Mapping]] = ..., base: _Optional[_Union[SearchScore, _Mapping]] = ...) -> None: ...

class SearchResult(_message.Message):
    __slots__ = ("model", "mixture", "weights", "best_single", "score", "start", "chosen_on", "measured_on", "stopped", "generations", "evaluations", "seed")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Weight
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Weight, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MIXTURE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BEST_SINGLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_ON_FIELD_NUMBER: _ClassVar[int]
    MEASURED_ON_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    model: str
    mixture: str
    weights: _containers.MessageMap[str, Weight]
    best_single: str
    score: str
    start: SearchBegan
    chosen_on: SearchScores
    measured_on: SearchScores
    stopped: str
    generations: int
    evaluations: int
    seed: int
    def __init__(self, model: _Optional[str] = ..., mixture: _Optional[str] = ..., weights: _Optional[_Mapping[str, Weight]] = ..., best_single: _Optional[str] = ..., score: _Optional[str] = ..., start: _Optional[_Union[SearchBegan, _Mapping]] = ..., chosen_on: _Optional[_Union[SearchScores, _Mapping]] = ..., measured_on: _Optional[_Union[SearchScores, _Mapping]] = ..., stopped: _Optional[str] = ..., generations: _Optional[int] = ..., evaluations: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class ListSearchesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SearchList(_message.Message):
    __slots__ = ("object", "data")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Search]
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Search, _Mapping]]] = ...) -> None: ...

class GetSearchRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetSearchTraceRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class SearchTrace(_message.Message):
    __slots__ = ("object", "data")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[SearchGeneration]
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[SearchGeneration, _Mapping]]] = ...) -> None: ...

class SearchGeneration(_message.Message):
    __slots__ = ("number", "scores", "best", "improved", "weights", "mean", "std", "evaluations", "start")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    IMPROVED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    number: int
    scores: _containers.RepeatedCompositeFieldContainer[Numbers]
    best: int
    improved: bool
    weights: _containers.RepeatedScalarFieldContainer[float]
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: float
    evaluations: int
    start: SearchDraw
    def __init__(self, number: _Optional[int] = ..., scores: _Optional[_Iterable[_Union[Numbers, _Mapping]]] = ..., best: _Optional[int] = ..., improved: _Optional[bool] = ..., weights: _Optional[_Iterable[float]] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[float] = ..., evaluations: _Optional[int] = ..., start: _Optional[_Union[SearchDraw, _Mapping]] = ...) -> None: ...

class SearchDraw(_message.Message):
    __slots__ = ("mean", "std", "similarities", "source")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    SIMILARITIES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    similarities: _containers.RepeatedCompositeFieldContainer[Number]
    source: str
    def __init__(self, mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ..., similarities: _Optional[_Iterable[_Union[Number, _Mapping]]] = ..., source: _Optional[str] = ...) -> None: ...

class GetSearchPictureRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class CancelSearchRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class TaskLabels(_message.Message):
    __slots__ = ("names", "words")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    names: Strings
    words: LabelWords
    def __init__(self, names: _Optional[_Union[Strings, _Mapping]] = ..., words: _Optional[_Union[LabelWords, _Mapping]] = ...) -> None: ...

class LabelWords(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, str]
    def __init__(self, values: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TaskPrompt(_message.Message):
    __slots__ = ("template", "labels", "system", "max_tokens", "chat")
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    template: str
    labels: TaskLabels
    system: str
    max_tokens: int
    chat: bool
    def __init__(self, template: _Optional[str] = ..., labels: _Optional[_Union[TaskLabels, _Mapping]] = ..., system: _Optional[str] = ..., max_tokens: _Optional[int] = ..., chat: _Optional[bool] = ...) -> None: ...

class GivenAnswers(_message.Message):
    __slots__ = ("probes", "labels", "probabilities", "standard_error", "replies")
    PROBES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    probes: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    probabilities: _containers.RepeatedCompositeFieldContainer[Numbers]
    standard_error: _containers.RepeatedCompositeFieldContainer[Numbers]
    replies: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, probes: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., probabilities: _Optional[_Iterable[_Union[Numbers, _Mapping]]] = ..., standard_error: _Optional[_Iterable[_Union[Numbers, _Mapping]]] = ..., replies: _Optional[_Iterable[str]] = ...) -> None: ...

class CreateTaskRequest(_message.Message):
    __slots__ = ("name", "examples", "model", "prompt", "answers", "method", "expert", "background", "long_texts", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    LONG_TEXTS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    model: str
    prompt: TaskPrompt
    answers: GivenAnswers
    method: str
    expert: str
    background: bool
    long_texts: str
    seed: int
    def __init__(self, name: _Optional[str] = ..., examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., model: _Optional[str] = ..., prompt: _Optional[_Union[TaskPrompt, _Mapping]] = ..., answers: _Optional[_Union[GivenAnswers, _Mapping]] = ..., method: _Optional[str] = ..., expert: _Optional[str] = ..., background: _Optional[bool] = ..., long_texts: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class TaskSpace(_message.Message):
    __slots__ = ("digest", "surrogate", "method", "settings", "probes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SURROGATE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    surrogate: str
    method: str
    settings: _struct_pb2.Struct
    probes: str
    def __init__(self, digest: _Optional[str] = ..., surrogate: _Optional[str] = ..., method: _Optional[str] = ..., settings: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., probes: _Optional[str] = ...) -> None: ...

class TaskProgress(_message.Message):
    __slots__ = ("answered", "of")
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    answered: int
    of: int
    def __init__(self, answered: _Optional[int] = ..., of: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "object", "created", "status", "kind", "method", "space", "digest", "dims", "num_texts", "labels", "noise", "seed", "expert", "model", "prompt", "source", "notes", "progress", "error", "cached", "receipt", "vector")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    NUM_TEXTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    status: str
    kind: str
    method: str
    space: TaskSpace
    digest: str
    dims: int
    num_texts: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    noise: float
    seed: int
    expert: str
    model: str
    prompt: TaskPrompt
    source: _struct_pb2.Struct
    notes: _containers.RepeatedScalarFieldContainer[str]
    progress: TaskProgress
    error: str
    cached: bool
    receipt: TaskReceipt
    vector: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., status: _Optional[str] = ..., kind: _Optional[str] = ..., method: _Optional[str] = ..., space: _Optional[_Union[TaskSpace, _Mapping]] = ..., digest: _Optional[str] = ..., dims: _Optional[int] = ..., num_texts: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., noise: _Optional[float] = ..., seed: _Optional[int] = ..., expert: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Union[TaskPrompt, _Mapping]] = ..., source: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., notes: _Optional[_Iterable[str]] = ..., progress: _Optional[_Union[TaskProgress, _Mapping]] = ..., error: _Optional[str] = ..., cached: _Optional[bool] = ..., receipt: _Optional[_Union[TaskReceipt, _Mapping]] = ..., vector: _Optional[_Iterable[float]] = ...) -> None: ...

class TaskReceipt(_message.Message):
    __slots__ = ("request", "task", "embedding", "space", "method", "encoder", "probes", "answers", "context", "module", "seed", "backbone", "factors", "adapter", "path", "dtype", "tp_size")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    FACTORS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    request: str
    task: str
    embedding: str
    space: str
    method: str
    encoder: str
    probes: str
    answers: str
    context: str
    module: str
    seed: int
    backbone: str
    factors: str
    adapter: _containers.RepeatedCompositeFieldContainer[AdapterPart]
    path: str
    dtype: str
    tp_size: int
    def __init__(self, request: _Optional[str] = ..., task: _Optional[str] = ..., embedding: _Optional[str] = ..., space: _Optional[str] = ..., method: _Optional[str] = ..., encoder: _Optional[str] = ..., probes: _Optional[str] = ..., answers: _Optional[str] = ..., context: _Optional[str] = ..., module: _Optional[str] = ..., seed: _Optional[int] = ..., backbone: _Optional[str] = ..., factors: _Optional[str] = ..., adapter: _Optional[_Iterable[_Union[AdapterPart, _Mapping]]] = ..., path: _Optional[str] = ..., dtype: _Optional[str] = ..., tp_size: _Optional[int] = ...) -> None: ...

class ListTasksRequest(_message.Message):
    __slots__ = ("limit", "after", "kind", "include")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    kind: str
    include: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ..., kind: _Optional[str] = ..., include: _Optional[str] = ...) -> None: ...

class TaskList(_message.Message):
    __slots__ = ("object", "data", "first_id", "last_id", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Task]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class ListProbesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeList(_message.Message):
    __slots__ = ("object", "digest", "num_texts", "texts", "genres")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TEXTS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    GENRES_FIELD_NUMBER: _ClassVar[int]
    object: str
    digest: str
    num_texts: int
    texts: _containers.RepeatedScalarFieldContainer[str]
    genres: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, object: _Optional[str] = ..., digest: _Optional[str] = ..., num_texts: _Optional[int] = ..., texts: _Optional[_Iterable[str]] = ..., genres: _Optional[_Iterable[str]] = ...) -> None: ...

class GetTaskMapRequest(_message.Message):
    __slots__ = ("method",)
    METHOD_FIELD_NUMBER: _ClassVar[int]
    method: str
    def __init__(self, method: _Optional[str] = ...) -> None: ...

class ComparedTask(_message.Message):
    __slots__ = ("id", "task")
    ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    id: str
    task: Task
    def __init__(self, id: _Optional[str] = ..., task: _Optional[_Union[Task, _Mapping]] = ...) -> None: ...

class CompareTasksRequest(_message.Message):
    __slots__ = ("tasks",)
    TASKS_FIELD_NUMBER: _ClassVar[int]
    tasks: _containers.RepeatedCompositeFieldContainer[ComparedTask]
    def __init__(self, tasks: _Optional[_Iterable[_Union[ComparedTask, _Mapping]]] = ...) -> None: ...

class TaskComparison(_message.Message):
    __slots__ = ("object", "tasks", "kinds", "noise", "space", "method", "cosines")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    COSINES_FIELD_NUMBER: _ClassVar[int]
    object: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    kinds: _containers.RepeatedScalarFieldContainer[str]
    noise: _containers.RepeatedCompositeFieldContainer[Number]
    space: str
    method: str
    cosines: _containers.RepeatedCompositeFieldContainer[Numbers]
    def __init__(self, object: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., kinds: _Optional[_Iterable[str]] = ..., noise: _Optional[_Iterable[_Union[Number, _Mapping]]] = ..., space: _Optional[str] = ..., method: _Optional[str] = ..., cosines: _Optional[_Iterable[_Union[Numbers, _Mapping]]] = ...) -> None: ...

class GetTaskRequest(_message.Message):
    __slots__ = ("id", "include")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_FIELD_NUMBER: _ClassVar[int]
    id: str
    include: str
    def __init__(self, id: _Optional[str] = ..., include: _Optional[str] = ...) -> None: ...

class DeleteTaskRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class FindNearestTasksRequest(_message.Message):
    __slots__ = ("id", "k", "kind")
    ID_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    id: str
    k: int
    kind: str
    def __init__(self, id: _Optional[str] = ..., k: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class NearestTaskList(_message.Message):
    __slots__ = ("object", "id", "space", "data", "compared", "elsewhere")
    class ElsewhereEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    SPACE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    object: str
    id: str
    space: str
    data: _containers.RepeatedCompositeFieldContainer[NearTask]
    compared: int
    elsewhere: _containers.ScalarMap[str, int]
    def __init__(self, object: _Optional[str] = ..., id: _Optional[str] = ..., space: _Optional[str] = ..., data: _Optional[_Iterable[_Union[NearTask, _Mapping]]] = ..., compared: _Optional[int] = ..., elsewhere: _Optional[_Mapping[str, int]] = ...) -> None: ...

class NearTask(_message.Message):
    __slots__ = ("id", "kind", "expert", "cosine")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    expert: str
    cosine: float
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., expert: _Optional[str] = ..., cosine: _Optional[float] = ...) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("tenant", "scopes", "label", "expires_in_s", "requests_per_minute", "tokens_per_day")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    label: str
    expires_in_s: float
    requests_per_minute: int
    tokens_per_day: int
    def __init__(self, tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., label: _Optional[str] = ..., expires_in_s: _Optional[float] = ..., requests_per_minute: _Optional[int] = ..., tokens_per_day: _Optional[int] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("id", "object", "created", "tenant", "scopes", "label", "status", "expires", "revoked", "requests_per_minute", "tokens_per_day", "key")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    label: str
    status: str
    expires: int
    revoked: int
    requests_per_minute: int
    tokens_per_day: int
    key: str
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., label: _Optional[str] = ..., status: _Optional[str] = ..., expires: _Optional[int] = ..., revoked: _Optional[int] = ..., requests_per_minute: _Optional[int] = ..., tokens_per_day: _Optional[int] = ..., key: _Optional[str] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class KeyList(_message.Message):
    __slots__ = ("object", "data", "first_id", "last_id", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FIRST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Key]
    first_id: str
    last_id: str
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Key, _Mapping]]] = ..., first_id: _Optional[str] = ..., last_id: _Optional[str] = ..., has_more: _Optional[bool] = ...) -> None: ...

class GetKeyRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class GetUsageRequest(_message.Message):
    __slots__ = ("to", "tenant", "limit")
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    to: str
    tenant: str
    limit: int
    def __init__(self, to: _Optional[str] = ..., tenant: _Optional[str] = ..., limit: _Optional[int] = ..., **kwargs) -> None: ...

class UsageList(_message.Message):
    __slots__ = ("object", "data", "has_more")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[UsageOfDay]
    has_more: bool
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[UsageOfDay, _Mapping]]] = ..., has_more: _Optional[bool] = ...) -> None: ...

class UsageOfDay(_message.Message):
    __slots__ = ("object", "day", "key", "tenant", "requests", "prompt_tokens", "completion_tokens", "total_tokens")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DAY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    object: str
    day: str
    key: str
    tenant: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    def __init__(self, object: _Optional[str] = ..., day: _Optional[str] = ..., key: _Optional[str] = ..., tenant: _Optional[str] = ..., requests: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("kind", "limit")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    limit: int
    def __init__(self, kind: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class JobList(_message.Message):
    __slots__ = ("object", "data", "has_more", "ray")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    RAY_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Job]
    has_more: bool
    ray: JobsOfRay
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., has_more: _Optional[bool] = ..., ray: _Optional[_Union[JobsOfRay, _Mapping]] = ...) -> None: ...

class JobsOfRay(_message.Message):
    __slots__ = ("available", "reason")
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    available: bool
    reason: str
    def __init__(self, available: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("id", "object", "kind", "name", "status", "created_unix_s", "started_unix_s", "ended_unix_s", "progress", "message")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    kind: str
    name: str
    status: str
    created_unix_s: float
    started_unix_s: float
    ended_unix_s: float
    progress: JobProgress
    message: str
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., status: _Optional[str] = ..., created_unix_s: _Optional[float] = ..., started_unix_s: _Optional[float] = ..., ended_unix_s: _Optional[float] = ..., progress: _Optional[_Union[JobProgress, _Mapping]] = ..., message: _Optional[str] = ...) -> None: ...

class JobProgress(_message.Message):
    __slots__ = ("done", "total")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("object", "data")
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    object: str
    data: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, object: _Optional[str] = ..., data: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "object", "created", "owned_by", "root", "parent", "permission", "x_info")
    ID_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    OWNED_BY_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PERMISSION_FIELD_NUMBER: _ClassVar[int]
    X_INFO_FIELD_NUMBER: _ClassVar[int]
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str
    permission: _containers.RepeatedCompositeFieldContainer[_struct_pb2.Struct]
    x_info: _struct_pb2.Struct
    def __init__(self, id: _Optional[str] = ..., object: _Optional[str] = ..., created: _Optional[int] = ..., owned_by: _Optional[str] = ..., root: _Optional[str] = ..., parent: _Optional[str] = ..., permission: _Optional[_Iterable[_Union[_struct_pb2.Struct, _Mapping]]] = ..., x_info: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class GetHealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Health(_message.Message):
    __slots__ = ("status", "parts")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: HealthOfPart
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[HealthOfPart, _Mapping]] = ...) -> None: ...
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    status: str
    parts: _containers.MessageMap[str, HealthOfPart]
    def __init__(self, status: _Optional[str] = ..., parts: _Optional[_Mapping[str, HealthOfPart]] = ...) -> None: ...

class HealthOfPart(_message.Message):
    __slots__ = ("ready", "reason", "seconds")
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    reason: str
    seconds: float
    def __init__(self, ready: _Optional[bool] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class GetMetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("object", "version", "ready", "gateway", "unix_s", "uptime_s", "checked_ago_s", "parts", "backbones", "encoders", "reasoning", "admission", "task_embedding", "running", "rates", "latency", "history", "all_replicas")
    class RatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class LatencyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Latency
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Latency, _Mapping]] = ...) -> None: ...
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    CHECKED_AGO_S_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BACKBONES_FIELD_NUMBER: _ClassVar[int]
    ENCODERS_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    TASK_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    ALL_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    object: str
    version: str
    ready: bool
    gateway: str
    unix_s: float
    uptime_s: float
    checked_ago_s: float
    parts: _containers.RepeatedCompositeFieldContainer[StatusOfPart]
    backbones: _struct_pb2.Struct
    encoders: _struct_pb2.Struct
    reasoning: _struct_pb2.Struct
    admission: _struct_pb2.Struct
    task_embedding: _struct_pb2.Struct
    running: int
    rates: _containers.ScalarMap[str, float]
    latency: _containers.MessageMap[str, Latency]
    history: StatusHistory
    all_replicas: _struct_pb2.Struct
    def __init__(self, object: _Optional[str] = ..., version: _Optional[str] = ..., ready: _Optional[bool] = ..., gateway: _Optional[str] = ..., unix_s: _Optional[float] = ..., uptime_s: _Optional[float] = ..., checked_ago_s: _Optional[float] = ..., parts: _Optional[_Iterable[_Union[StatusOfPart, _Mapping]]] = ..., backbones: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., encoders: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., reasoning: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., admission: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., task_embedding: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., running: _Optional[int] = ..., rates: _Optional[_Mapping[str, float]] = ..., latency: _Optional[_Mapping[str, Latency]] = ..., history: _Optional[_Union[StatusHistory, _Mapping]] = ..., all_replicas: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class StatusOfPart(_message.Message):
    __slots__ = ("name", "ready", "reason", "replicas")
    NAME_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    ready: bool
    reason: str
    replicas: _struct_pb2.Struct
    def __init__(self, name: _Optional[str] = ..., ready: _Optional[bool] = ..., reason: _Optional[str] = ..., replicas: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("p50_ms", "p99_ms", "count")
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    p50_ms: float
    p99_ms: float
    count: int
    def __init__(self, p50_ms: _Optional[float] = ..., p99_ms: _Optional[float] = ..., count: _Optional[int] = ...) -> None: ...

class StatusHistory(_message.Message):
    __slots__ = ("step_s", "series")
    class SeriesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Series
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Series, _Mapping]] = ...) -> None: ...
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    SERIES_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    series: _containers.MessageMap[str, Series]
    def __init__(self, step_s: _Optional[float] = ..., series: _Optional[_Mapping[str, Series]] = ...) -> None: ...

class Series(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Number]
    def __init__(self, values: _Optional[_Iterable[_Union[Number, _Mapping]]] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Version(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...
