"""The bodies of POST /v1/tasks and /v1/tasks/compare, checked field by field."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field

from cluster.door_settings import HttpSettings
from metasepia.blackbox.prompts import Prompt
from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import MethodName, Space, TaskEmbedding
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings
from metasepia.registry.entries import check_name
from serve.requests.inputs import check_number
from serve.requests.schemas import MAX_SEED, Text, _Body

MAX_REPLY_LEN = 512
"""Tokens that a model may reply with to a probe text."""
_Number = Annotated[float, Field(allow_inf_nan=False)]


class TaskPrompt(_Body):
    """What a model is told with each probe text."""

    template: Text
    labels: dict[str, str] | list[str] | None = None
    """Each label's words, or labels that are their own; None: open replies."""
    system: str | None = None
    max_tokens: int = Field(default=32, ge=1, le=MAX_REPLY_LEN)
    """Of a reply."""
    chat: bool | None = None
    """Whether the template goes through the model's chat template; None: where it has one."""

    def to_json(self) -> dict[str, Any]:
        """As jobs keep it. Raises InvalidRequest for what is no prompt."""
        labels = self.labels
        if isinstance(labels, list):
            twice = next((one for i, one in enumerate(labels) if one in labels[:i]), None)
            if twice is not None:
                raise InvalidRequest("prompt.labels", f"{twice!r} is there twice")
            labels = {one: one for one in labels}
        tree = {
            "template": self.template,
            "labels": labels,
            "system": self.system,
            "max_tokens": self.max_tokens,
            "chat": self.chat,
        }
        prompt_of(tree)
        return tree


def prompt_of(tree: Mapping[str, Any]) -> tuple[Prompt, bool | None]:
    """A prompt as `TaskPrompt.to_json` spells it, and whether it is a chat. Raises InvalidRequest."""
    fields = {name: value for name, value in tree.items() if name != "chat"}
    try:
        return Prompt(**fields), tree["chat"]
    except InvalidSettings as error:
        value = error.value if len(repr(error.value)) <= 80 else repr(error.value)[:77] + "..."
        raise InvalidRequest(f"prompt.{error.field}", f"{value!r} is not allowed; it must be {error.allowed}") from None


class GivenAnswers(_Body):
    """What a client's own model says of the probe texts."""

    probes: Text
    """The digest of the texts that were asked."""
    labels: list[Text] | None = None
    probabilities: list[list[_Number]] | None = None
    """A row a text, a column a label."""
    standard_error: list[list[_Number]] | None = None
    replies: list[str] | None = None

    def read(self, texts: ProbeTexts) -> Answers:
        """Raises InvalidRequest naming the field."""
        if self.probes != texts.digest:
            raise InvalidRequest(
                "answers.probes",
                f"these are answers to the texts {self.probes[:80]}; this server's are {texts.digest}: ask those that "
                "GET /v1/tasks/probes gives",
            )
        if (self.replies is None) == (self.probabilities is None):
            raise InvalidRequest("answers", "must have one of probabilities (with labels) and replies")
        try:
            if self.replies is not None:
                _check_len("replies", len(self.replies), texts)
                if self.labels is not None or self.standard_error is not None:
                    raise InvalidRequest("replies", "have no labels and no standard_error; leave those out")
                return Answers.of_replies(texts.texts, self.replies)
            if self.labels is None:
                raise InvalidRequest("labels", "this field is required beside probabilities")
            if len(set(self.labels)) < len(self.labels):
                raise InvalidRequest("labels", "a label is there twice")
            shape = len(texts), len(self.labels)
            error = None
            if self.standard_error is not None:
                error = _table("standard_error", self.standard_error, shape, texts)
            assert self.probabilities is not None
            table = _table("probabilities", self.probabilities, shape, texts)
            return Answers.of_probabilities(texts.texts, self.labels, table, error)
        except InvalidRequest as wrong:
            raise InvalidRequest(f"answers.{wrong.param}", wrong.message) from None


def _check_len(name: str, num: int, texts: ProbeTexts) -> None:
    if num != len(texts):
        raise InvalidRequest(name, f"{num} of them, and {len(texts)} probe texts; one a text is needed, in their order")


def _table(name: str, rows: list[list[float]], shape: tuple[int, int], texts: ProbeTexts) -> np.ndarray:
    _check_len(name, len(rows), texts)
    for place, row in enumerate(rows):
        if len(row) != shape[1]:
            raise InvalidRequest(f"{name}[{place}]", f"{len(row)} numbers for {shape[1]} labels")
    return np.array(rows, np.float64).reshape(shape)


class TaskRequest(_Body):
    """POST /v1/tasks: a data set, a prompt on a model, a context, or the answers of a model of the client's own."""

    name: Text | None = None
    examples: list[Any] | None = None
    model: Text | None = None
    prompt: TaskPrompt | None = None
    answers: GivenAnswers | None = None
    method: MethodName | None = None
    """None: that of the settings."""
    expert: Text | None = None
    """Requests like these texts are for it."""
    background: bool | None = None
    """None: a prompt on a model is asked in the background, everything else is embedded at once."""
    long_texts: Literal["refuse", "leave_out"] = "refuse"
    """Of a data set, texts longer than the surrogate's window."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    def check(self, http: HttpSettings) -> Self:
        """Raises InvalidRequest for what can be seen without reading the examples one by one."""
        given = [name for name in ("examples", "model", "answers") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none is given"
            raise InvalidRequest(
                given[1] if given else "examples",
                f"a task is one of examples (a data set), model (with a prompt, or a context), and answers; {what}",
            )
        if self.name is not None:
            check_task_name(self.name)
        if self.prompt is not None and self.prompt.labels is not None and "max_tokens" in self.prompt.model_fields_set:
            raise InvalidRequest("prompt.max_tokens", "is for open replies; leave it out beside labels")
        if self.model is None and self.prompt is not None:
            raise InvalidRequest("prompt", "is for a model; name it, or leave the prompt out")
        if self.model is not None and self.model.startswith("ctx-") and self.prompt is not None:
            raise InvalidRequest("prompt", "a context is asked without one; leave it out")
        if self.model is not None and not self.model.startswith("ctx-") and self.prompt is None:
            raise InvalidRequest("prompt", "this field is required: a model is asked by a prompt with {text} in it")
        if self.background is False and self.prompt is not None:
            raise InvalidRequest("background", "a model is asked in the background; leave it out")
        if self.examples is None:
            for name in ("expert", "long_texts"):
                if getattr(self, name) not in (None, "refuse"):
                    raise InvalidRequest(name, "is for a data set; leave it out")
            return self
        if not self.examples:
            raise InvalidRequest("examples", "there are none; give texts with their labels, of two labels or more")
        fewer = "a task is told as well by some of them, drawn at random with each label's share kept"
        check_number("examples", len(self.examples), http.max_examples, "max_examples", fewer)
        return self


def check_task_name(name: str) -> None:
    """Raises InvalidRequest for a name that no task may have."""
    check_name(name)
    if name.startswith("task-") or name in ("probes", "compare", "map"):
        raise InvalidRequest("name", f"{name!r} is not allowed; task-..., probes, compare and map are reserved")


class InlineTask(_Body):
    """A task as GET /v1/tasks/{id}?include=vector answers it; its other fields are not read."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    id: str = "inline"
    kind: Literal["data_set", "model", "prompt"] = "data_set"
    vector: list[float]
    space: dict[str, Any]

    def embedding(self, where: str) -> TaskEmbedding:
        """Raises InvalidRequest naming the field."""
        vector = np.array(self.vector, np.float64)
        norm = float(np.linalg.norm(vector)) if vector.size else 0.0
        if not (np.isfinite(vector).all() and 0 < norm < float("inf")):
            raise InvalidRequest(f"{where}.vector", "must be numbers, finite and not all zero")
        try:
            space = Space.from_json(self.space)
        except CorruptArtefact as error:
            raise InvalidRequest(
                f"{where}.space", f"{error.problem}; give the space as GET /v1/tasks/{{id}} answers it"
            ) from None
        unit = (vector / norm).astype(np.float32)
        return TaskEmbedding(space=space, vector=unit, kind=self.kind, name=self.id[:64], source={})


class CompareRequest(_Body):
    """POST /v1/tasks/compare"""

    tasks: list[str | InlineTask] = Field(min_length=2)

    def check(self, max_compared: int) -> Self:
        if len(self.tasks) > max_compared:
            raise InvalidRequest(
                "tasks",
                f"{len(self.tasks)} are too many; this server compares {max_compared} at a time (tasks.max_compared)",
            )
        return self
