"""Messages of `serve/protos/metasepia.proto` as the JSON of the door's bodies, and back, by their descriptors alone.

Google's own mapping (`json_format`) spells 64-bit integers as strings, which the door refuses, and knows no lists of
lists, no unions and no nulls, which the door's bodies have; the proto's head says how those are spelt.
"""

import base64
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

VALUES, BARE = "values", "bare"
_PAIRS = frozenset({"metasepia.v1.AdapterPart"})
_FREE = frozenset({"google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue"})
_EXACT = 2**53
"""Whole numbers below it are exact as doubles."""


@dataclass(frozen=True)
class _Shape:
    """How one kind of message is spelt."""

    fields: Mapping[str, FieldDescriptor]
    values: FieldDescriptor | None
    """The one field that stands for the message."""
    bare: tuple[FieldDescriptor, ...]
    """The oneof that does."""
    is_pair: bool
    is_free: bool


@functools.cache
def _shape(kind: Descriptor) -> _Shape:
    fields = {one.name: one for one in kind.fields}
    bare = kind.oneofs_by_name.get(BARE)
    return _Shape(
        fields,
        fields[VALUES] if list(fields) == [VALUES] else None,
        () if bare is None else tuple(bare.fields),
        kind.full_name in _PAIRS,
        kind.full_name in _FREE,
    )


# -- from messages -----------------------------------------------------------------------------------------------------


def tree_of(message: Message) -> Any:
    """A message in plain values, without what is unset. Files are base64 text."""
    shape = _shape(message.DESCRIPTOR)
    if shape.is_free:
        return _free(message)
    if shape.values is not None:
        return _value(shape.values, getattr(message, VALUES))
    if shape.bare:
        name = message.WhichOneof(BARE)
        return None if name is None else _value(shape.fields[name], getattr(message, name))
    if shape.is_pair:
        return [_value(field, getattr(message, name)) for name, field in shape.fields.items()]
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: Any) -> Any:
    if _is_map(field):
        inner = _in_map(field)
        return {key: _single(inner, value[key]) for key in sorted(value)}  # maps have no order of their own
    if field.is_repeated:
        return list(value) if field.message_type is None else [tree_of(one) for one in value]
    return _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return tree_of(value)
    return base64.b64encode(value).decode("ascii") if field.type == FieldDescriptor.TYPE_BYTES else value


def _free(value: Any) -> Any:
    """What a client put into a Struct; whole numbers come as doubles and leave as whole numbers."""
    if isinstance(value, struct_pb2.Struct):
        return {key: _free(one) for key, one in sorted(value.fields.items())}
    if isinstance(value, struct_pb2.ListValue):
        return [_free(one) for one in value.values]
    kind = value.WhichOneof("kind")
    if kind in ("struct_value", "list_value"):
        return _free(getattr(value, kind))
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) < _EXACT else number
    return getattr(value, kind) if kind in ("string_value", "bool_value") else None


# -- to messages -------------------------------------------------------------------------------------------------------


def message_of(kind: type[M], tree: Any, *, strict: bool = False) -> M:
    """A message of what the door answered. `strict` raises KeyError for a field that the message has not, which is else
    left out. Raises TypeError and ValueError for a value that its field cannot hold.
    """
    message = kind()
    _fill(message, tree, strict)
    return message


def _fill(message: Message, tree: Any, strict: bool) -> None:
    shape = _shape(message.DESCRIPTOR)
    if shape.is_free:
        _fill_free(message, tree)
    elif tree is None:
        return  # in a list, where nothing else can stand for null
    elif shape.values is not None:
        _set(message, shape.values, tree, strict)
    elif shape.bare:
        _set(message, _member(shape.bare, tree), tree, strict)
    else:
        pairs = zip(shape.fields, tree, strict=True) if shape.is_pair else tree.items()
        for name, value in pairs:
            field = shape.fields.get(name)
            if field is not None:
                if value is not None:
                    _set(message, field, value, strict)
            elif strict:
                raise KeyError(f"{message.DESCRIPTOR.full_name} has no {name!r}")


def _set(message: Message, field: FieldDescriptor, value: Any, strict: bool) -> None:
    if _is_map(field):
        found, inner = getattr(message, field.name), _in_map(field)
        for key, one in value.items():
            if inner.message_type is None:
                found[key] = one
            else:
                _fill(found[key], one, strict)
    elif field.is_repeated:
        found = getattr(message, field.name)
        if field.message_type is not None:
            for one in value:
                _fill(found.add(), one, strict)
        elif isinstance(value, str):  # little-endian float32
            found.extend(np.frombuffer(base64.b64decode(value), "<f4").tolist())
        else:
            found.extend(value)
    elif field.message_type is not None:
        inside = getattr(message, field.name)
        inside.SetInParent()
        _fill(inside, value, strict)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        setattr(message, field.name, base64.b64decode(value))
    else:
        setattr(message, field.name, value)


def _member(members: tuple[FieldDescriptor, ...], value: Any) -> FieldDescriptor:
    """The one of a oneof `bare` that a value is for. Raises TypeError."""
    for field in members:
        if field.message_type is None:
            fits = isinstance(value, str if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else int | float)
        else:
            values = _shape(field.message_type).values
            fits = isinstance(value, list if values is not None and not _is_map(values) else dict)
        if fits:
            return field
    raise TypeError(f"{value!r:.80} is none of {', '.join(field.name for field in members)}")


def _fill_free(message: Any, tree: Any) -> None:
    if isinstance(message, struct_pb2.Struct):
        for key, value in tree.items():
            _fill_free(message.fields[key], value)
    elif isinstance(message, struct_pb2.ListValue):
        for value in tree:
            _fill_free(message.values.add(), value)
    elif tree is None:
        message.null_value = 0
    elif isinstance(tree, bool):
        message.bool_value = tree
    elif isinstance(tree, str):
        message.string_value = tree
    elif isinstance(tree, int | float):
        message.number_value = tree
    else:
        kind = "struct_value" if isinstance(tree, dict) else "list_value"
        inside = getattr(message, kind)
        inside.SetInParent()
        _fill_free(inside, tree)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _in_map(field: FieldDescriptor) -> FieldDescriptor:
    assert field.message_type is not None  # a map is a list of messages
    return field.message_type.fields_by_name["value"]
