"""The bodies that clients send, checked field by field. OpenAI's shapes where they exist.

Every complaint names its field (`examples[3].label`). Unknown fields are refused. A field of OpenAI's that we do not
serve is accepted with a value that asks for nothing (`n: 1`, `tools: []`, any field null) and refused in words with any
other: a client that asks for tools must not get an answer that ignored them.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cluster.door_settings import HttpSettings
from cluster.settings import DispatchStage
from metasepia.errors import InvalidRequest
from metasepia.reasoning.named import Protocol
from metasepia.registry.entries import check_name
from metasepia.rows import MAX_TOP_LOGPROBS
from serve.requests.inputs import check_number, read_file

MAX_CHOICES = 64
"""Of one request: prompts times `n`."""
MAX_STOPS = 16
MAX_SEED = 2**63 - 1
MAX_LAYERS = 4096
DEFAULT_ANSWER_LEN = 256
"""Tokens of an answer whose request names no limit, where the window leaves as many."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields of OpenAI's that we do not serve, with the values that ask for nothing."""

_IGNORED = ("user", "metadata")
"""Fields that never change an answer."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Self:
        """The body. Raises InvalidRequest for a field that is not served, pydantic's ValidationError for the rest."""
        kept: dict[str, Any] = {}
        for name, value in tree.items():
            if name in cls.model_fields:
                if value is not None or cls.model_fields[name].is_required():
                    kept[name] = value
            elif name in _NEUTRAL:
                if value is not None and not _is_among(value, _NEUTRAL[name]):
                    raise InvalidRequest(name, "is not supported here; leave it out")
            elif name not in _IGNORED:
                kept[name] = value
        return cls.model_validate(kept)


def _is_among(value: object, neutral: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text_parts(value: object) -> object:
    """`content` as plain text: a string, or a list of {"type": "text", "text": ...}."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'part {index} must be {{"type": "text", "text": "..."}}; only text is read here')
        texts.append(part["text"])
    return "".join(texts)


def _not_blank(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("the text is empty")
    return value


Text = Annotated[str, BeforeValidator(_not_blank)]


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_parts)]
    name: str | None = None


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Sampled(_Body):
    model: Text
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stop: Annotated[list[str], BeforeValidator(_one_or_many), Field(max_length=MAX_STOPS)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    dispatch: list[DispatchStage] | None = None
    """For the model `auto`: these stages in place of the settings'."""

    def check(self) -> None:
        if self.dispatch is not None and self.model != "auto":
            raise InvalidRequest("dispatch", "is for the model auto only; leave it out")
        if "" in self.stop:
            raise InvalidRequest("stop", "a stop string is empty")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "is for streams only; set stream to true or leave it out")


class ChatRequest(_Sampled):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name for `max_tokens`; the smaller one holds where both are given."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs", "is for answers with logprobs; set logprobs to true or leave it out")
        for index, message in enumerate(self.messages):
            if message.role == "user" and not message.content.strip():
                raise InvalidRequest(f"messages[{index}].content", "the text is empty")

    @property
    def answer_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its limit in tokens."""
        given = {"max_tokens": self.max_tokens, "max_completion_tokens": self.max_completion_tokens}
        limits = {name: limit for name, limit in given.items() if limit is not None}
        name = min(limits, key=limits.__getitem__, default="max_tokens")
        return name, limits.get(name)

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told beside each; None: no log-probabilities at all."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Sampled):
    """POST /v1/completions"""

    prompt: Annotated[list[Any], BeforeValidator(_one_or_many)] = Field(min_length=1)
    """A text, texts, one list of token ids, or lists of token ids; `prompts` sorts them."""
    max_tokens: int | None = Field(default=None, ge=0)
    """0 only together with `echo`: the prompt alone."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Log-probabilities of the tokens and of as many likeliest ones beside each."""
    echo: bool = False
    """The prompt stands before the answer, with its log-probabilities where they are asked for."""

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens", "must be at least 1 without echo: nothing would be answered")
        if len(self.prompts) * self.n > MAX_CHOICES:
            number = f"{len(self.prompts)} prompts with {self.n} choices each"
            raise InvalidRequest("prompt", f"{number} are more than {MAX_CHOICES}; send several requests")
        if len(self.prompts) > 1 and self.model == "auto":
            raise InvalidRequest("prompt", "auto chooses for one prompt; send one a request, or name the model")
        for index, one in enumerate(self.prompts):
            where = "prompt" if len(self.prompts) == 1 else f"prompt[{index}]"
            if isinstance(one, str):
                if not one.strip():
                    raise InvalidRequest(where, "the text is empty")
            elif not isinstance(one, list) or not all(type(token) is int for token in one):
                raise InvalidRequest(where, "must be a text or a list of token ids")
            elif not one:
                raise InvalidRequest(where, "the list of token ids is empty")

    @cached_property
    def prompts(self) -> list[str | list[int]]:
        """Once checked: each a text or token ids."""
        return [self.prompt] if all(type(one) is int for one in self.prompt) else self.prompt

    @property
    def answer_limit(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class ClassifyRequest(_Body):
    """POST /v1/classify: a label for each input, by examples in the request or by a context (`model`) made before."""

    model: Text | None = None
    """`ctx-...`; then nothing that belongs to a context may be given."""
    examples: list[Any] | None = None
    inputs: Annotated[list[Any], BeforeValidator(_one_or_many), Field(min_length=1)]
    unlabelled: list[Any] = Field(default_factory=list)
    encoder: Text | None = None
    """An encoder's id, or a backbone's, whose mean-pooled last hidden states are the embedding. None: the first."""
    module: Text | None = None
    """A reasoning module's name. None: the first."""
    protocol: Protocol | None = None
    """How texts become vectors. None: `stream`."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """Shuffles the examples before the module reads them. None: 0."""
    explain: bool = False
    abstain_below: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """A result whose best probability is lower has no label."""

    def check(self, http: HttpSettings) -> None:
        """Raises InvalidRequest for what can be seen without reading examples and inputs one by one."""
        check_number("inputs", len(self.inputs), http.max_inputs, "max_inputs", "send several requests")
        if self.model is not None:
            for name in ("examples", "unlabelled", "encoder", "module", "protocol", "seed"):
                if getattr(self, name):
                    raise InvalidRequest(name, f"is part of the context {self.model[:80]}; leave it out")
        elif self.examples is None:
            raise InvalidRequest("examples", "this field is required, or model with the id of a context")
        else:
            check_examples(self.examples, self.unlabelled, http)


class ContextRequest(_Body):
    """POST /v1/contexts: labelled examples become a model with a name. Nothing is trained."""

    examples: list[Any]
    unlabelled: list[Any] = Field(default_factory=list)
    encoder: Text | None = None
    module: Text | None = None
    protocol: Protocol | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)

    def check(self, http: HttpSettings) -> None:
        check_examples(self.examples, self.unlabelled, http)


class MoreExamplesRequest(_Body):
    """POST /v1/contexts/{id}/examples"""

    examples: list[Any]

    def check(self, http: HttpSettings) -> None:
        check_examples(self.examples, (), http)


def check_examples(examples: Sequence[Any], unlabelled: Sequence[Any], http: HttpSettings) -> None:
    """Raises InvalidRequest for no examples, or too many of either."""
    if not examples:
        raise InvalidRequest("examples", "there are none; give examples of two labels or more")
    fewer = "a context answers best from its most telling examples; send fewer"
    check_number("examples", len(examples), http.max_examples, "max_examples", fewer)
    check_number("unlabelled", len(unlabelled), http.max_unlabelled, "max_unlabelled", "send fewer, drawn at random")


class _Inputs(_Body):
    """Texts and files to embed."""

    model: Text
    input: Annotated[list[Any], BeforeValidator(_one_or_many)] = Field(min_length=1)
    """A text, texts, one list of token ids, lists of token ids, or objects with a file; `inputs` sorts them."""
    encoding_format: Literal["float", "base64"] = "float"

    def check(self, http: HttpSettings) -> None:
        if not self.is_one_token_list:
            check_number("input", len(self.input), http.max_inputs, "max_inputs", "send several requests")
        for index, item in enumerate(self.inputs):
            where = "input" if self.is_one_token_list else f"input[{index}]"
            if isinstance(item, str):
                if not item.strip():
                    raise InvalidRequest(where, "the text is empty")
            elif isinstance(item, bytes):
                continue
            elif not isinstance(item, list) or not all(type(token) is int for token in item):
                raise InvalidRequest(where, "must be a text, a list of token ids, or an object with a file")
            elif not item:
                raise InvalidRequest(where, "the list of token ids is empty")

    @cached_property
    def inputs(self) -> list[str | list[int] | bytes]:
        """Raises InvalidRequest naming the item whose file is not base64."""
        if self.is_one_token_list:
            return [self.input]
        return [read_file(one, f"input[{i}]") if isinstance(one, dict) else one for i, one in enumerate(self.input)]

    @property
    def is_one_token_list(self) -> bool:
        return all(type(item) is int for item in self.input)


class EmbeddingsRequest(_Inputs):
    """POST /v1/embeddings"""

    dimensions: int | None = Field(default=None, ge=1)
    """The first so many numbers of each vector, brought to unit norm again. None: all. Only encoders trained for it
    lose little by that."""


class HiddenStatesRequest(_Inputs):
    """POST /v1/hidden_states"""

    layers: list[int] = Field(default=[-1], min_length=1, max_length=MAX_LAYERS)
    """0 the embedding, n the output of block n; negative ones count from the end."""
    pooling: Literal["last", "mean", "none"] = "last"
    """`last`: the last token's state; `mean`: over the tokens; `none`: every token's."""
    task: str | None = None
    """Under which the graph keeps a running centroid of these states."""
    observe: bool = True
    """false: the states are compared with the task's centroid, which stays as it is."""

    def check(self, http: HttpSettings) -> None:
        super().check(http)
        if self.task is None:
            if not self.observe:
                raise InvalidRequest("observe", "is about a task's centroid; name the task, or leave it out")
            return
        check_name(self.task, "task")
        if self.pooling == "none":
            raise InvalidRequest("pooling", "a task's centroid is of one state a text; use last or mean")


def _mixture_weight(value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if not 0 < len(numbers) <= MAX_LAYERS or not all(type(one) in (int, float) and 0 <= one <= 1 for one in numbers):
        raise ValueError("must be a number from 0 to 1, or a list of them with one for each factored layer")
    return [float(one) for one in numbers] if isinstance(value, list) else value


class MixtureRequest(_Body):
    """POST /v1/mixtures: weights on experts of one backbone, on the simplex."""

    backbone: Text
    weights: dict[str, Annotated[float | list[float], BeforeValidator(_mixture_weight)]] = Field(min_length=1)
    """By expert, `base` for the backbone itself; a list has a weight for each factored layer."""
    name: Text | None = None
    """A name beside the digest: `<backbone>:mix@<name>`."""
