"""A request's body, from bytes to plain values, with every bound checked before the work that it bounds.

Length before reading on, nesting before parsing, and then the two things that JSON parsers let through and that break
later code: numbers that are not finite, and lone surrogates, which no encoder can write.
"""

import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from metasepia.errors import BodyTooLarge, InvalidRequest

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A string, or one that never closes up to the end: trying again inside it would take quadratic time."""
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_DRAIN_MIB = 64.0


async def read(chunks: AsyncIterator[bytes], headers: Mapping[str, str], max_mib: float) -> bytes:
    """The whole body. Raises BodyTooLarge beyond `max_mib`, whatever content-length says or does not say.

    A body that is too long is read on for a while and thrown away: a client that is still writing would otherwise see a
    broken connection in place of the answer.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("content-encoding", "compressed bodies are not read; send plain JSON")
    limit = int(max_mib * 2**20)
    parts: list[bytes] = []
    num_bytes = 0
    async for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes <= limit:
            parts.append(chunk)
        elif num_bytes > limit + _DRAIN_MIB * 2**20:
            break
        else:
            parts.clear()
    if num_bytes > limit:
        raise BodyTooLarge(max_mib)
    return b"".join(parts)


def parse(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `body`. Raises InvalidRequest, naming the field where there is one to name.

    Refused: invalid UTF-8, more than `max_depth` brackets inside each other, anything but an object at the top, NaN and
    the infinities (which Python's parser would accept), numbers that overflow, and lone surrogates.
    """
    _check_depth(body, max_depth)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("body", f"not UTF-8: byte {error.start} does not belong there") from None
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidRequest("body", f"not JSON: {error.msg} at {where}") from None
    except ValueError:
        raise InvalidRequest("body", "it holds an integer of too many digits") from None
    if not isinstance(tree, dict):
        raise InvalidRequest("body", f"must be a JSON object, not {_kind(tree)}")
    check_values(tree)
    return tree


def _check_depth(body: bytes, max_depth: int) -> None:
    """Counts brackets outside strings. A string that never closes hides the rest: the parser stops at it anyway."""
    depth = 0
    for bracket in _STRING.sub(b"", body).translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise InvalidRequest("body", f"nests deeper than {max_depth} levels")


def check_values(value: Any, where: str = "") -> None:
    """Raises InvalidRequest, naming the place, for numbers that are not finite and for halves of surrogate pairs."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(where, f"{value} is not a number that JSON or this server knows")
    elif isinstance(value, str):
        if _SURROGATE.search(value):
            raise InvalidRequest(where, "the text holds half of a surrogate pair, which is not a character")
    elif isinstance(value, list):
        if set(map(type, value)) <= {float} and all(map(math.isfinite, value)):
            return  # a vector, perhaps one of thousands
        for index, item in enumerate(value):
            if not isinstance(item, int):
                check_values(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_values(key, where or "body")
            check_values(item, f"{where}.{key}" if where else key)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", str: "a string", list: "an array", int: "a number", float: "a number"}
    return names[type(value)]
