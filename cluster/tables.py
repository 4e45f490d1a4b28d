"""From TOML tables to frozen dataclasses: every field by its annotation, every wrong one named with where it stands."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from metasepia.errors import InvalidSettings


def override(tree: dict[str, Any], key: str, steps: list[str], text: str) -> None:
    """Sets one value of the tree: `steps` are field names, and indices into lists. `key` is what errors call it."""
    node: Any = tree
    for step in steps[:-1]:
        if isinstance(node, list):
            if not step.isdigit() or int(step) >= len(node):
                raise InvalidSettings(key, text, f"an index below {len(node)} where it says {step!r}")
            node = node[int(step)]
        else:
            node = node.setdefault(step, {})
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node[steps[-1]] = value


def build(kind: type, tree: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass `kind` from a table, its fields converted and its own checks run. `where` begins their names."""
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in hints:
            raise InvalidSettings(where + name, tree[name], f"one of the fields {', '.join(sorted(hints))}")
    for one in dataclasses.fields(kind):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in tree:
            raise InvalidSettings(where + one.name, None, "given; it has no default")
    return kind(**{name: _convert(hints[name], value, where + name) for name, value in tree.items()})


def tree_of(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as tables that JSON and TOML can say, such that `build` gives it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items() if one is not None}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(settings))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`: tables are merged, anything else, a list too, takes the old one's place."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InvalidSettings(where, value, "a table")
        return build(typing.cast(type, hint), value, where + ".")
    if origin is tuple:
        if not isinstance(value, list):
            raise InvalidSettings(where, value, "a list")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise InvalidSettings(where, value, "one of " + ", ".join(map(repr, typing.get_args(hint))))
        return value
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if value is None else _convert(inner, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise InvalidSettings(where, value, f"of type {hint.__name__}")
    return value


def between(owner: str, name: str, value: float, low: float, high: float) -> None:
    """Raises InvalidSettings where `value` is outside, NaN too."""
    if not low <= value <= high:  # written so that NaN fails too
        raise InvalidSettings(f"{owner}.{name}", value, f"from {low:g} to {high:g}")
