"""Whether the fields of a settings dataclass hold what their annotations say: for settings that people write in files.

Without it a number in quotes is found out in the middle of a run, by arithmetic, and a text that stands where a list of
texts belongs is taken for its letters.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from metasepia.errors import InvalidSettings

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "left out"}


def check_kinds(settings: Any) -> None:
    """Raises InvalidSettings naming the first field of a dataclass whose value is of another kind than it declares.

    Known are int (no bool), float, str, bool, None, Literal, tuple[x, ...], mappings, other classes, and unions of
    these; what else is annotated passes. A whole number where a float belongs becomes one: 1 and 1.0 have one digest.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if not _fits(hints[field.name], value):
            raise InvalidSettings(field.name, value, _words(hints[field.name]))
        if hints[field.name] is float:
            object.__setattr__(settings, field.name, float(value))


def _fits(hint: Any, value: object) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(one, value) for one in parts)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(parts[0], one) for one in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_words(one) for one in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"a list, each {_words(parts[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    return _WORDS.get(hint, f"of type {getattr(hint, '__name__', hint)}")
