"""Examples and inputs as clients send them, to content: texts, vectors, images and sounds.

    "a text"   {"text": "..."}   {"vector": [0.1, ...]}   {"image": "<base64>"}   {"audio": "<base64>"}

and an example is one of the objects with a `label`. All inputs of a request, and all of a context's, are of one kind.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.door_settings import HttpSettings
from metasepia.errors import InvalidRequest
from metasepia.reasoning.named import INPUT_KINDS, Content, Example, InputKind, check_labels, vector_content

_KINDS = ", ".join(INPUT_KINDS[:-1]) + f" or {INPUT_KINDS[-1]}"


@dataclass(frozen=True)
class Inputs:
    """Contents of one kind, with the fields of the request that they came in."""

    kind: InputKind
    contents: tuple[Content, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Labelled:
    """Examples and unlabelled inputs of one kind, in the order given."""

    kind: InputKind
    examples: tuple[Example, ...]
    fields: tuple[str, ...]
    unlabelled: tuple[Content, ...]
    unlabelled_fields: tuple[str, ...]


def read_inputs(items: Sequence[Any], name: str, http: HttpSettings, kind: InputKind | None = None) -> Inputs:
    """The items of the list `name`. Raises InvalidRequest naming the item, also for one of another kind."""
    contents: list[Content] = []
    fields: list[str] = []
    for index, item in enumerate(items):
        where = f"{name}[{index}]"
        if isinstance(item, str):
            found, field, content = "text", where, _text(item, where, http)
        else:
            found, field, content = _content(item, where, http, ())
        kind = kind or found
        _check_kind(found, kind, field)
        contents.append(content)
        fields.append(field)
    return Inputs(kind or "text", tuple(contents), tuple(fields))


def read_labelled(
    examples: Sequence[Any], unlabelled: Sequence[Any], http: HttpSettings, *, kind: InputKind | None = None
) -> Labelled:
    """Raises InvalidRequest naming the item; whether there are two classes is not looked at."""
    found: list[Example] = []
    fields: list[str] = []
    for index, item in enumerate(examples):
        where = f"examples[{index}]"
        one, field, content = _content(item, where, http, ("label",))
        kind = kind or one
        _check_kind(one, kind, field)
        found.append(Example(content, _label(item.get("label"), f"{where}.label", http)))
        fields.append(field)
    rest = read_inputs(unlabelled, "unlabelled", http, kind)
    return Labelled(kind or "text", tuple(found), tuple(fields), rest.contents, rest.fields)


def read_file(item: Any, where: str) -> bytes:
    """The bytes of {"image": "<base64>"} or {"audio": "<base64>"}. Raises InvalidRequest naming the field."""
    if isinstance(item, dict) and len(item) == 1 and (name := next(iter(item))) in ("image", "audio"):
        return _media(item[name], f"{where}.{name}")
    raise InvalidRequest(where, 'an object must be {"image": "<base64>"} or {"audio": "<base64>"}')


def check_classes(labels: Sequence[str], http: HttpSettings, known: Sequence[str] = ()) -> None:
    """Raises InvalidRequest for fewer than two classes, too many, or labels that only look different."""
    check_labels(labels, known)
    num = len({*labels, *known})
    if num > http.max_classes:
        raise InvalidRequest(
            "examples",
            f"{num} different labels; a context has at most {http.max_classes} (http.max_classes): merge labels, or "
            "ask a first context for the group and another for the label within it",
        )


def check_number(name: str, num: int, limit: int, setting: str, way_out: str) -> None:
    """Raises InvalidRequest naming the limit, the setting and the way out."""
    if num > limit:
        raise InvalidRequest(
            name, f"{num} are too many; this server takes {limit} (http.{setting}): {way_out}, or raise the setting"
        )


def _content(item: Any, where: str, http: HttpSettings, beside: tuple[str, ...]) -> tuple[InputKind, str, Content]:
    if not isinstance(item, dict):
        raise InvalidRequest(where, f"must be an object with {_KINDS}" + (" and a label" if beside else ", or a text"))
    for name in item:
        if name not in INPUT_KINDS and name not in beside:
            raise InvalidRequest(f"{where}.{name}", "this field is not known here; leave it out")
    given = [name for name in INPUT_KINDS if item.get(name) is not None]
    if not given:
        raise InvalidRequest(f"{where}.text", f"this field is required, or another of {_KINDS}")
    if len(given) > 1:
        raise InvalidRequest(f"{where}.{given[1]}", f"an input is one of {_KINDS}; {given[0]} is given too")
    field, value = f"{where}.{given[0]}", item[given[0]]
    if given[0] == "text":
        return "text", field, _text(value, field, http)
    if given[0] == "vector":
        return "vector", field, _vector(value, field, http)
    return ("image" if given[0] == "image" else "audio"), field, _media(value, field)


def _text(value: Any, field: str, http: HttpSettings) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, "must be a text")
    if not value.strip():
        raise InvalidRequest(field, "the text is empty")
    if len(value) > http.max_text_chars:
        raise InvalidRequest(
            field, f"{len(value)} characters; at most {http.max_text_chars} (http.max_text_chars) are read: shorten it"
        )
    return value


def _vector(value: Any, field: str, http: HttpSettings) -> bytes:
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        raise InvalidRequest(field, "must be a list of numbers")
    if not 0 < len(value) <= http.max_vector_width:
        limit = f"1 to {http.max_vector_width} (http.max_vector_width)"
        raise InvalidRequest(field, f"{len(value)} numbers; a vector has {limit}: project longer ones first")
    return vector_content(value, field)


def _media(value: Any, field: str) -> bytes:
    """Base64, bare or as a data URL; white space in it does not count."""
    if isinstance(value, str):
        head, comma, body = value.partition(",")
        if comma and head.startswith("data:") and head.endswith(";base64"):
            value = body
        try:
            content = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            content = b""
        if content:
            return content
    raise InvalidRequest(field, "must be the bytes of a file in base64, bare or as data:<type>;base64,<...>")


def _label(value: Any, field: str, http: HttpSettings) -> str:
    if value is None:
        raise InvalidRequest(field, "this field is required")
    if not isinstance(value, str):
        raise InvalidRequest(field, f"must be a text, got {value!r:.60}")
    if not value.strip():
        raise InvalidRequest(field, "the label is empty")
    if len(value) > http.max_label_chars:
        limit = f"at most {http.max_label_chars} (http.max_label_chars)"
        raise InvalidRequest(field, f"{len(value)} characters; {limit}: use a shorter name for the class")
    return value


def _check_kind(found: InputKind, wanted: InputKind, field: str) -> None:
    if found != wanted:
        raise InvalidRequest(field, f"{found} among {wanted}; all inputs of a context are of one kind")
