"""What endpoints send, checked: the shapes of OpenAI's answers, which others keep more or less."""

import math
from collections.abc import Mapping
from typing import Any

SLACK = 1e-3
"""By which a log-probability may be above zero: rounding."""
_NOTHING = object()


class WrongShape(ValueError):
    """JSON that is not what the request asks for; the words say where."""


class NotServed(WrongShape):
    """An answer as it should be, except that it lacks what only some endpoints give."""


def choices_of(body: Mapping[str, Any], count: int | None) -> list[Mapping[str, Any]]:
    """The choices in order of their index; exactly `count` where that is given."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(one, dict) for one in choices):
        raise WrongShape("no list `choices`")
    if count is not None and len(choices) != count:
        raise WrongShape(f"{len(choices)} choices where {count} were asked for")
    indices = [one.get("index", place) for place, one in enumerate(choices)]
    if not all(isinstance(one, int) for one in indices) or sorted(indices) != list(range(len(choices))):
        raise WrongShape("`choices` without an index each")
    return [choice for _, choice in sorted(zip(indices, choices, strict=True), key=lambda pair: pair[0])]


def reply_of(choice: Mapping[str, Any]) -> str:
    """What a choice says; an answer without content (a refusal, a call of a tool) is an empty one."""
    message = choice.get("message", choice)
    if not isinstance(message, dict):
        raise WrongShape("choices[].message is no object")
    content = message.get("content", message.get("text", _NOTHING))
    if content is _NOTHING or not (content is None or isinstance(content, str)):
        raise WrongShape("choices[] has neither message.content nor text")
    return (content or "").encode(errors="replace").decode()


def log_probability(value: object) -> float:
    """A natural log-probability; minus infinity, which JSON has no word for, as its servers spell it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > SLACK:
        raise WrongShape(f"{str(value)[:40]} is no log-probability")
    return min(max(float(value), -9999.0), 0.0)
