"""Bodies as an Arrow stream: columns in place of lists, and what is no column as JSON in the schema's metadata.

What comes out is the tree that a JSON body would have been, so that one set of checks holds both. Taken are plain
columns: `text` (string), `vector` (a list of floats), `token_ids` (a list of whole numbers), `label` (string); each of
a size that its own bytes bear out. Refused in words, before anything is unpacked: compressed batches, dictionaries,
views and other kinds whose rows may share bytes, since a small body would be a large one then. pyarrow is loaded when
somebody sends one.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metasepia.errors import InvalidRequest
from serve.requests import bodies
from serve.requests.arrow import KEY

Shape = Literal["classify", "context", "examples", "input"]
"""How rows become fields: `classify`: those with a label are examples, the others inputs; `context`: the others are
unlabelled; `examples`: every row is one; `input`: every row is a text or a list of token ids."""

MAX_COLUMNS = 16
_COLUMNS: Mapping[Shape, tuple[str, ...]] = {
    "classify": ("text", "vector", "label"),
    "context": ("text", "vector", "label"),
    "examples": ("text", "vector", "label"),
    "input": ("text", "token_ids"),
}


@dataclass(frozen=True)
class ArrowLimits:
    """Of one body."""

    max_rows: int
    max_depth: int
    """Of the JSON in its metadata."""


def parse(body: bytes, shape: Shape, limits: ArrowLimits) -> dict[str, Any]:
    """The tree of a stream's body. Raises InvalidRequest naming the column, or `body` for what is no such stream."""
    import pyarrow as pa

    try:
        names, rows, options = _read(pa, body, shape, limits)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError, OSError) as error:
        raise InvalidRequest("body", f"not an Arrow stream: {str(error).splitlines()[0][:200]}") from None
    except (UnicodeDecodeError, OverflowError, MemoryError):
        raise InvalidRequest("body", "not an Arrow stream: its columns do not hold what they say") from None
    made = _fields(names, rows, shape)
    bodies.check_values(made)
    for name in made:
        if name in options:
            raise InvalidRequest(name, "is given by the rows; leave it out of the schema's metadata")
    return options | made


def _read(
    pa: Any, body: bytes, shape: Shape, limits: ArrowLimits
) -> tuple[tuple[str, ...], list[tuple[Any, ...]], dict[str, Any]]:
    _check_messages(pa, body)
    rows: list[tuple[Any, ...]] = []
    with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
        schema = reader.schema
        names = _check_schema(pa, schema, shape)
        options = _options(schema.metadata, limits.max_depth)
        num_rows = 0
        for batch in reader:
            num_rows += batch.num_rows  # before anything looks into the columns: a row may take no bytes
            if num_rows > limits.max_rows:
                raise InvalidRequest("body", f"more than {limits.max_rows} rows; send several requests")
            batch.validate(full=True)
            rows += zip(*(column.to_pylist() for column in batch.columns), strict=True)
    return names, rows, options


def _check_messages(pa: Any, body: bytes) -> None:
    """Looks at the messages' heads alone: neither a dictionary nor a compressed batch is unpacked."""
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
        if message.type == "dictionary":
            raise InvalidRequest("body", "columns by dictionary are not read; send them decoded")
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise InvalidRequest("body", "compressed batches are not read; send them plain")


def _check_schema(pa: Any, schema: Any, shape: Shape) -> tuple[str, ...]:
    taken = _COLUMNS[shape]
    if len(schema) > MAX_COLUMNS:
        raise InvalidRequest("body", f"{len(schema)} columns; taken are {', '.join(taken)}")
    names = tuple(schema.names)
    for place, name in enumerate(names):
        if name not in taken:
            raise InvalidRequest(name[:80] or "body", f"this column is not known here; taken are {', '.join(taken)}")
        if name in names[:place]:
            raise InvalidRequest(name, "this column is there twice")
        kind = schema.field(place).type
        if name in ("text", "label"):
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InvalidRequest(name, f"must be a column of strings (utf8), not {str(kind)[:80]}")
            continue
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        is_number = pa.types.is_floating if name == "vector" else pa.types.is_integer
        if not is_list or not is_number(kind.value_type):
            wanted = "floats" if name == "vector" else "whole numbers"
            raise InvalidRequest(name, f"must be a column of lists of {wanted}, not {str(kind)[:80]}")
        if pa.types.is_fixed_size_list(kind) and kind.list_size < 1:
            raise InvalidRequest(name, "a list of no numbers is no input")
    contents = [name for name in names if name != "label"]
    if len(contents) != 1:
        wanted = " or ".join(name for name in taken if name != "label")
        raise InvalidRequest(contents[1] if contents else "body", f"there must be one column {wanted}")
    return names


def _options(metadata: Mapping[bytes, bytes] | None, max_depth: int) -> dict[str, Any]:
    found = (metadata or {}).get(KEY.encode())
    return {} if found is None else bodies.parse(found, max_depth)


def _fields(names: tuple[str, ...], rows: list[tuple[Any, ...]], shape: Shape) -> dict[str, Any]:
    (content,) = (name for name in names if name != "label")
    at, label = names.index(content), names.index("label") if "label" in names else None
    if shape == "input":
        return {"input": [row[at] for row in rows]}
    labelled = [row for row in rows if shape == "examples" or (label is not None and row[label] is not None)]
    examples = [{content: row[at], "label": None if label is None else row[label]} for row in labelled]
    if shape == "examples":
        return {"examples": examples}
    others = [{content: row[at]} for row in rows if label is None or row[label] is None]
    rest = "inputs" if shape == "classify" else "unlabelled"
    return ({"examples": examples} if examples or shape == "context" else {}) | {rest: others}


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch's message says how its body is compressed (Message.fbs: RecordBatch.compression).

    The message has been verified by the reader that gave it; whatever cannot be followed counts as compressed.
    """
    try:
        message = struct.unpack_from("<I", metadata, 0)[0]
        header = _field(metadata, message, 2)
        if header is None:
            return True
        batch = header + struct.unpack_from("<I", metadata, header)[0]
        return _field(metadata, batch, 3) is not None
    except struct.error:
        return True


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a flatbuffer table's field lies; None where it is not there."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    length = struct.unpack_from("<H", data, vtable)[0]
    place = 4 + 2 * number
    if place + 2 > length:
        return None
    offset = struct.unpack_from("<H", data, vtable + place)[0]
    return table + offset if offset else None
