"""The OpenAPI 3.1 document of the door, from the table of operations, the models that check bodies, and the answers'.

What the models cannot say of themselves (a validator that also takes a bare text; items that are read one by one;
OpenAI's fields that are taken where they ask for nothing) stands in `_FIELDS`; tests hold it to what is really taken.
"""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.door_settings import HttpSettings
from metasepia.reasoning.named import INPUT_KINDS
from serve import answers
from serve.contracts import CONTRACTS, Contract
from serve.experts.accepting import FIELDS as UPLOADED
from serve.operations import Operation
from serve.requests import arrow, deadlines, idempotency
from serve.requests import ids as request_ids
from serve.requests.schemas import _IGNORED, _NEUTRAL, MAX_CHOICES, MAX_LAYERS, MAX_STOPS

Json = dict[str, Any]

_PLACE = "#/components/schemas/"
_SEGMENT = re.compile(r"\{(\w+)(:path)?\}")

_TEXT: Json = {"type": "string", "pattern": r"\S"}
_BASE64: Json = {"type": "string", "contentEncoding": "base64"}
_NUMBERS: Json = {"type": "array", "items": {"type": "number"}, "minItems": 1}
_TOKENS: Json = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_FILE: Json = {
    "type": "object",
    "properties": {"image": _BASE64, "audio": _BASE64},
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}
_CONTENTS: Json = {"text": _TEXT, "vector": _NUMBERS, "image": _BASE64, "audio": _BASE64}
assert set(_CONTENTS) == set(INPUT_KINDS)


def _object(properties: Json, required: Sequence[str] = ()) -> Json:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _fields(http: HttpSettings) -> dict[str, dict[str, Json]]:
    """By model and field, where the model's own schema says less or more than is taken."""
    item = {"anyOf": [_TEXT, {"$ref": f"{_PLACE}Input"}]}
    examples = {"type": "array", "items": {"$ref": f"{_PLACE}Example"}, "minItems": 1, "maxItems": http.max_examples}
    unlabelled = {"type": "array", "items": item, "maxItems": http.max_unlabelled}
    inputs = {"anyOf": [_TEXT, {"type": "array", "items": item, "minItems": 1, "maxItems": http.max_inputs}]}
    many = {"type": "array", "items": {"anyOf": [_TEXT, _TOKENS, _FILE]}, "minItems": 1, "maxItems": http.max_inputs}
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}}, ["type", "text"])
    part["additionalProperties"] = True
    share = {"type": "number", "minimum": 0, "maximum": 1}
    shares = {"type": "array", "items": share, "minItems": 1, "maxItems": MAX_LAYERS}
    to_embed = {"input": {"anyOf": [_TEXT, _TOKENS, many]}}
    choices = {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES}
    return {
        "ClassifyRequest": {"examples": examples, "inputs": inputs, "unlabelled": unlabelled},
        "ContextRequest": {"examples": examples, "unlabelled": unlabelled},
        "MoreExamplesRequest": {"examples": examples},
        "TaskRequest": {"examples": examples},
        "CompletionRequest": {
            "prompt": {"anyOf": [_TEXT, _TOKENS, {**choices, "items": {"anyOf": [_TEXT, _TOKENS]}}]},
            "stop": _stops(),
        },
        "ChatRequest": {"stop": _stops()},
        "Message": {"content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]}},
        "EmbeddingsRequest": to_embed,
        "HiddenStatesRequest": to_embed,
        "MixtureRequest": {
            "weights": {
                "type": "object",
                "additionalProperties": {"anyOf": [share, shares]},
                "minProperties": 1,
            }
        },
        "SearchRequest": {
            "start": {"anyOf": [{"enum": ["uniform", "nearest"]}, {"$ref": f"{_PLACE}SearchStart"}]},
        },
    }


def _stops() -> Json:
    one = {"type": "string", "minLength": 1}
    return {"anyOf": [one, {"type": "array", "items": one, "maxItems": MAX_STOPS}]}


def document(operations: Sequence[Operation], http: HttpSettings, version: str, *, keys: bool) -> Json:
    """The whole document. `keys`: whether this door asks for one."""
    paths: dict[str, Json] = {}
    for operation in operations:
        contract = CONTRACTS[operation.name]
        path = _SEGMENT.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, contract, keys)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Metasepia",
            "version": version,
            "description": "Classification from examples without training, experts of one frozen backbone, task "
            "embeddings. OpenAI's shapes where they exist. Every call is served over gRPC as well.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": _schemas(http),
            "headers": _HEADERS,
            "responses": {status: _refusal(status, answers.Error) for status in _ERRORS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "parameters": _PARAMETERS,
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(CONTRACTS[one.name].tag for one in operations)],
    }


_PARAMETERS: dict[str, Json] = {
    "RequestId": {
        "name": request_ids.HEADER,
        "in": "header",
        "description": "Comes back with the answer, and stands in logs and traces. Another is made in place of none, "
        f"of several words, or of more than {request_ids.MAX_CHARS} characters.",
        "schema": {"type": "string"},
    },
    "Timeout": {
        "name": deadlines.HEADER,
        "in": "header",
        "description": "Answered by then, one way or the other (504).",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": deadlines.MAX_TIMEOUT_S},
    },
    "IdempotencyKey": {
        "name": idempotency.HEADER,
        "in": "header",
        "description": "The same key with the same request is answered once: asked again, the first answer comes back. "
        "With another request it is a conflict (409).",
        "schema": {"type": "string", "pattern": "^[ -~]+$", "maxLength": idempotency.MAX_KEY_CHARS, "minLength": 1},
    },
}

_HEADERS: dict[str, Json] = {
    "x-request-id": {"description": "The request's own, or one made for it.", "schema": {"type": "string"}},
    "retry-after": {"description": "Whole seconds.", "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"}},
    "idempotent-replayed": {"description": "This answer was given before.", "schema": {"type": "string"}},
    "location": {"description": "Where the job can be looked at.", "schema": {"type": "string"}},
}

_ERRORS: dict[str, str] = {
    "400": "The request is not right; `param` names the field.",
    "401": "No key, or one that is not known, revoked or expired.",
    "403": "The key's scopes do not allow it.",
    "404": "Nothing has this name.",
    "409": "The name is taken, the Idempotency-Key means another request or one that still runs, or what is meant has "
    "changed.",
    "410": "It was deleted.",
    "413": "The body is too large.",
    "429": "A queue is full, or a quota is spent; `retry-after` says when to come back.",
    "499": "The client left.",
    "500": "An error that was not expected.",
    "503": "A part of the graph is away; `retry-after` says when to come back.",
    "504": "Not done by the deadline.",
}


def _operation(operation: Operation, contract: Contract, keys: bool) -> Json:
    of_path: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name, _ in _SEGMENT.findall(operation.path)
    ]
    of_query: list[Json] = [
        {"name": one.name, "in": "query", "schema": dict(one.schema), "description": one.says} for one in contract.query
    ]
    shared = ["RequestId", "Timeout"]
    if operation.method != "GET" and operation.replayed:
        shared.append("IdempotencyKey")
    told: Json = {
        "operationId": operation.name,
        "summary": contract.says,
        "tags": [contract.tag],
        "parameters": [*of_path, *of_query, *({"$ref": f"#/components/parameters/{one}"} for one in shared)],
        "responses": _responses(operation, contract),
        "security": [{"key": [operation.scope]}] if keys and operation.scope else [],
    }
    if contract.uploads:
        told["requestBody"] = _upload(operation)
    elif contract.body is not None:
        content: Json = {"application/json": {"schema": _ref(contract.body)}}
        if contract.arrow_in:
            content[arrow.MEDIA_TYPE] = {"schema": {"type": "string", "contentMediaType": arrow.MEDIA_TYPE}}
        told["requestBody"] = {"required": True, "content": content}
    return told


def _upload(operation: Operation) -> Json:
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    fields = {name: file if name in ("file", "config") else {"type": "string"} for name in UPLOADED}
    if operation.method == "PUT":
        del fields["name"]
    required = ["file"] if operation.method == "PUT" else ["name", "file"]
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _object(fields, required)},
            "application/octet-stream": {"schema": file},
        },
    }


def _responses(operation: Operation, contract: Contract) -> Json:
    headers: Json = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
    content: Json = {}
    if isinstance(contract.answer, str):
        content[contract.answer] = {"schema": {"type": "string"}}
    else:
        content["application/json"] = {"schema": _ref(contract.answer)}
    if contract.arrow_out:
        content[arrow.MEDIA_TYPE] = {"schema": {"type": "string", "contentMediaType": arrow.MEDIA_TYPE}}
    if contract.events is not None:
        content["text/event-stream"] = {
            "schema": {"type": "string"},
            "x-event": {"anyOf": [_ref(contract.events), _ref(answers.Error)]},
        }
    good = dict(headers)
    if operation.method != "GET" and operation.replayed:
        good["idempotent-replayed"] = {"$ref": "#/components/headers/idempotent-replayed"}
    if contract.other_status is not None:
        good["location"] = {"$ref": "#/components/headers/location"}
    found: Json = {"200": {"description": "Done.", "headers": good, "content": content}}
    if contract.other_status is not None:
        found[str(contract.other_status)] = {"description": "Queued as a job.", "headers": good, "content": content}
    found |= {status: {"$ref": f"#/components/responses/{status}"} for status in _ERRORS}
    if contract.unready is not None:
        found["503"] = _refusal("503", contract.unready)
    return found


def _refusal(status: str, model: type[BaseModel]) -> Json:
    names = ("x-request-id", "retry-after") if status in ("429", "503") else ("x-request-id",)
    return {
        "description": _ERRORS[status],
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {"application/json": {"schema": _ref(model)}},
    }


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _PLACE + model.__name__}


def _schemas(http: HttpSettings) -> dict[str, Json]:
    bodies = {one.body for one in CONTRACTS.values() if one.body is not None}
    told = {answers.Error}
    for one in CONTRACTS.values():
        told |= {model for model in (one.answer, one.events, one.unready) if isinstance(model, type)}
    asked = [(model, "validation") for model in sorted(bodies | told, key=_name)]
    _, found = models_json_schema(asked, ref_template=_PLACE + "{model}")  # pyright: ignore[reportArgumentType]
    schemas: dict[str, Json] = found["$defs"]
    contents = {name: _or_null(schema) for name, schema in _CONTENTS.items()}
    one_of = "One of text, vector, image and audio; all of a request are of one kind."
    schemas["Input"] = {**_object(contents), "description": one_of}
    label = {**_TEXT, "maxLength": http.max_label_chars}
    schemas["Example"] = {**_object({**contents, "label": label}, ["label"]), "description": one_of}
    for name, fields in _fields(http).items():
        for field, schema in fields.items():
            kept = {key: schemas[name]["properties"][field][key] for key in ("description", "default")
                    if key in schemas[name]["properties"][field]}  # fmt: skip
            schemas[name]["properties"][field] = schema | kept
    for model in bodies:
        _take_what_asks_for_nothing(schemas[model.__name__])
    return schemas


def _take_what_asks_for_nothing(schema: Json) -> None:
    """`_Body.of`: null for every field that need not be there, and OpenAI's fields with the values that are neutral."""
    required, properties = schema.get("required", ()), schema["properties"]
    for name, one in properties.items():
        if name not in required and {"type": "null"} not in one.get("anyOf", ()):
            kept = {key: one.pop(key) for key in ("default", "description", "title") if key in one}
            properties[name] = _or_null(one) | kept
    for name, values in _NEUTRAL.items():
        if name not in properties:
            asks_nothing = "Taken where it asks for nothing; refused else."
            properties[name] = {"enum": [None, *values], "description": asks_nothing, "deprecated": True}
    for name in _IGNORED:
        properties.setdefault(name, {"description": "Not looked at."})


def _name(model: type[BaseModel]) -> str:
    return model.__name__
