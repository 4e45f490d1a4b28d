"""The body of POST /v1/mixtures/search, checked field by field."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field

from cluster.door_settings import HttpSettings
from metasepia.errors import InvalidRequest
from metasepia.search.cross_entropy import SearchSettings
from metasepia.search.fewshot import By
from metasepia.search.jobs import Match
from metasepia.search.warm_start import WarmStartSettings
from serve.requests.inputs import check_number
from serve.requests.schemas import MAX_SEED, Message, Text, _Body

MAX_ROWS = 16_384
"""Mixtures of a generation times shots."""
DEFAULT_SHOTS = 10
DEFAULT_ANSWER_LEN = 64
_SEARCH = SearchSettings()
_WARM = WarmStartSettings()


class SearchExample(_Body):
    """A question, as /v1/completions or /v1/chat/completions would be asked it, and the answer wanted."""

    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    answer: Text


class SearchStart(_Body):
    """A search that begins near the experts whose tasks are nearest to the task at hand."""

    task: Text | None = None
    """A registered task embedding, by its id or name. None: the shots themselves are embedded."""
    temperature: Annotated[float, Field(allow_inf_nan=False)] = _WARM.temperature
    base: Annotated[float, Field(allow_inf_nan=False)] = _WARM.base
    uniform: Annotated[float, Field(allow_inf_nan=False)] = _WARM.uniform
    std: Annotated[float, Field(allow_inf_nan=False)] = _WARM.std

    def settings(self) -> WarmStartSettings:
        """Raises InvalidRequest naming the field."""
        return WarmStartSettings(temperature=self.temperature, base=self.base, uniform=self.uniform, std=self.std)


def _start(value: object) -> object:
    if value is None or isinstance(value, dict):
        return value
    if value in ("uniform", "nearest"):
        return None if value == "uniform" else {}
    raise ValueError('must be "uniform", "nearest" or an object like {"task": "<id>"}')


class SearchRequest(_Body):
    """POST /v1/mixtures/search: a mixture of experts for a task, found by a few of its questions with answers."""

    backbone: Text | None = None
    model: Text | None = None
    """Another name for `backbone`."""
    examples: list[SearchExample]
    experts: list[Text] | None = None
    """None: every expert of the backbone that can be chosen."""
    base: bool = True
    """Whether the backbone itself is among the candidates."""
    method: Literal["cross-entropy"] = "cross-entropy"
    score: By = "likelihood"
    match: Match = "exact"
    """score = accuracy: when an answer is right."""
    max_tokens: int | None = Field(default=None, ge=1)
    """score = accuracy: the longest answer that is generated. None: as long as the longest given one needs."""
    shots: int = Field(default=DEFAULT_SHOTS, ge=1)
    """Examples that mixtures are compared on; the others are only measured, at the end."""
    per_layer: bool = False
    population: int = _SEARCH.population
    elites: int | None = None
    """None: a fifth of the population."""
    generations: int = _SEARCH.generations
    patience: int = _SEARCH.patience
    max_evaluations: int | None = None
    smoothing: Annotated[float, Field(allow_inf_nan=False)] = _SEARCH.smoothing
    start: Annotated[SearchStart | None, BeforeValidator(_start)] = None
    """`uniform`, `nearest`, or an object; None: uniform."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    def check(self, http: HttpSettings) -> Self:
        """Raises InvalidRequest for what can be seen without tokens and experts."""
        if (self.backbone is None) == (self.model is None):
            raise InvalidRequest("backbone", "this field is required; or model, which is another name for it")
        if not self.examples:
            raise InvalidRequest("examples", "there are none; give questions with their answers, two or more")
        check_number("examples", len(self.examples), http.max_examples, "max_examples", "send the most telling ones")
        for place, one in enumerate(self.examples):
            if (one.prompt is None) == (one.messages is None):
                raise InvalidRequest(f"examples[{place}]", "must have one of prompt and messages")
        if self.experts is not None and not self.experts:
            raise InvalidRequest("experts", "there are none; name some, or leave the field out for all")
        if self.experts is not None and len(set(self.experts)) < len(self.experts):
            raise InvalidRequest("experts", "an expert is named twice")
        rows = self.population * min(self.shots, len(self.examples))
        if rows > MAX_ROWS:
            raise InvalidRequest("population", f"times shots is {rows}; at most {MAX_ROWS} rows make a generation")
        return self

    @property
    def backbone_id(self) -> str:
        name = self.backbone or self.model
        assert name is not None  # `check` has seen to it
        return name

    def settings(self) -> SearchSettings:
        """Raises InvalidRequest naming the field."""
        population = self.population
        return SearchSettings(
            population=population,
            elites=max(1, population // 5) if self.elites is None else self.elites,
            generations=self.generations,
            patience=self.patience,
            max_evaluations=10**6 if self.max_evaluations is None else self.max_evaluations,
            smoothing=self.smoothing,
            per_layer=self.per_layer,
            seed=self.seed,
        )
