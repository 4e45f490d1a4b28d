"""The OpenAPI document is true: it names every call, and what the door really answers is what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from cluster.door_settings import HttpSettings
from serve.contracts import CONTRACTS
from serve.operations import operations
from serve.pages.openapi import document
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

EXAMPLES = [{"text": "aa", "label": "x"}, {"text": "bbbb", "label": "y"}]
ECHO = {"model": "tiny", "prompt": "a", "logprobs": 1, "echo": True}
BASE64 = {"model": "tiny", "input": [1], "encoding_format": "base64"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")
    made.says("ok")
    return made


@pytest.fixture
def told(bench: Bench) -> dict[str, Any]:
    return bench.get("/openapi.json").json()


def test_every_operation_has_a_contract_and_no_contract_is_of_none(bench: Bench):
    assert {one.name for one in operations(bench.door)} == set(CONTRACTS)


def test_the_document_names_every_call_once(bench: Bench, told: dict[str, Any]):
    named = {(method.upper(), path): one for path, methods in told["paths"].items() for method, one in methods.items()}
    assert {one["operationId"] for one in named.values()} == {one.name for one in operations(bench.door)}
    assert len(named) == len(operations(bench.door))
    for one in named.values():
        assert one["summary"].endswith((".", "same."))


def test_every_reference_leads_somewhere_and_every_schema_is_one(told: dict[str, Any]):
    def references(tree: Any) -> Iterator[str]:
        if isinstance(tree, dict):
            for name, value in tree.items():
                if name == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(tree, list):
            for one in tree:
                yield from references(one)

    for reference in references(told):
        found: Any = told
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
    for schema in told["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def _conforms(told: dict[str, Any], operation: str, answer: httpx.Response) -> None:
    """The answer, by what the document says of its status and content type."""
    methods = [one for every in told["paths"].values() for one in every.values()]
    (found,) = [one for one in methods if one["operationId"] == operation]
    response = found["responses"][str(answer.status_code)]
    if "$ref" in response:
        response = told["components"]["responses"][response["$ref"].rpartition("/")[2]]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in response["content"], (operation, kind)
    assert "x-request-id" in answer.headers
    if kind == "application/json":
        schema = {**response["content"][kind]["schema"], "components": told["components"]}
        jsonschema.validate(answer.json(), schema, jsonschema.Draft202012Validator)


def test_real_answers_are_what_the_document_says(bench: Bench, told: dict[str, Any]):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    made = bench.post("/v1/contexts", {"examples": EXAMPLES})
    context = made.json()["id"]
    asked: list[tuple[str, httpx.Response]] = [
        ("CreateContext", made),
        ("CreateContext", bench.post("/v1/contexts", {"examples": EXAMPLES})),
        ("ExtendContext", bench.post(f"/v1/contexts/{context}/examples", {"examples": EXAMPLES[:1]})),
        ("ListContexts", bench.get("/v1/contexts")),
        ("GetContext", bench.get(f"/v1/contexts/{context}")),
        ("ListContextExamples", bench.get(f"/v1/contexts/{context}/examples")),
        ("Classify", bench.post("/v1/classify", {"examples": EXAMPLES, "inputs": "a"})),
        ("Classify", bench.post("/v1/classify", {"model": context, "inputs": ["a"], "explain": True})),
        ("CreateChatCompletion", bench.post("/v1/chat/completions", chat)),
        ("CreateChatCompletion", bench.post("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2})),
        ("CreateChatCompletion", bench.post("/v1/chat/completions", {**chat, "stream": True})),
        (
            "CreateCompletion",
            bench.post("/v1/completions", ECHO),
        ),
        ("CreateEmbeddings", bench.post("/v1/embeddings", {"model": "minilm-fake", "input": "a"})),
        (
            "CreateEmbeddings",
            bench.post("/v1/embeddings", BASE64),
        ),
        ("CreateHiddenStates", bench.post("/v1/hidden_states", {"model": "tiny", "input": ["ab"], "task": "mail"})),
        ("CreateHiddenStates", bench.post("/v1/hidden_states", {"model": "tiny", "input": [1, 2], "pooling": "none"})),
        ("ListObservedTasks", bench.get("/v1/hidden_states/tasks")),
        ("GetObservedTask", bench.get("/v1/hidden_states/tasks/mail")),
        ("DeleteObservedTask", bench.delete("/v1/hidden_states/tasks/mail")),
        ("ListModels", bench.get("/v1/models")),
        ("GetModel", bench.get("/v1/models/tiny")),
        ("GetModel", bench.get(f"/v1/models/{context}")),
        ("GetHealth", bench.get("/health")),
        ("GetStatus", bench.get("/v1/status")),
        ("GetVersion", bench.get("/version")),
        ("GetMetrics", bench.get("/metrics")),
        ("DeleteContext", bench.delete(f"/v1/contexts/{context}")),
    ]
    for operation, answer in asked:
        assert answer.status_code == 200, (operation, answer.text)
        _conforms(told, operation, answer)
    refused = [
        ("GetContext", bench.get(f"/v1/contexts/{context}"), 410),
        ("GetContext", bench.get("/v1/contexts/ctx-none"), 404),
        ("Classify", bench.post("/v1/classify", {"inputs": []}), 400),
        ("ListKeys", bench.get("/v1/keys"), 400),
    ]
    for operation, answer, status in refused:
        assert answer.status_code == status, (operation, answer.text)
        _conforms(told, operation, answer)


def test_what_the_schema_of_a_body_refuses_is_refused(bench: Bench, told: dict[str, Any]):
    """And each reason alone: a schema that refuses nothing would pass the test of answers."""
    schema = {"$ref": "#/components/schemas/ClassifyRequest", "components": told["components"]}
    good = {"examples": EXAMPLES, "inputs": ["a"]}
    for change in (
        {"inputs": []}, {"inputs": 1}, {"inputs": [1]}, {"inputs": [{"text": 1}]}, {"inputs": [{"txt": "a"}]},
        {"examples": [{"text": "a"}]}, {"examples": "a"}, {"seed": -1}, {"explain": 1}, {"abstain_below": 2},
        {"protocol": "other"}, {"unlabelled": "a"}, {"n": 2}, {"tools": [{}]}, {"nonsense": 1},
    ):  # fmt: skip
        body = good | change
        assert not jsonschema.Draft202012Validator(schema).is_valid(body), change
        assert bench.post("/v1/classify", body).status_code == 400, change
    for change in ({}, {"seed": None}, {"user": "me"}, {"tools": []}, {"inputs": "a"}, {"inputs": [{"text": "a"}]}):
        body = good | change
        assert jsonschema.Draft202012Validator(schema).is_valid(body), change
        assert bench.post("/v1/classify", body).status_code == 200, change


def test_the_document_says_which_scope_a_key_needs_where_the_door_asks_for_keys(bench: Bench):
    with_keys, without = (document(operations(bench.door), HttpSettings(), "1", keys=keys) for keys in (True, False))
    assert with_keys["paths"]["/v1/experts"]["post"]["security"] == [{"key": ["experts:write"]}]
    assert with_keys["paths"]["/version"]["get"]["security"] == []
    assert without["paths"]["/v1/experts"]["post"]["security"] == []


def test_the_page_asks_nobody_else_and_is_not_framed(bench: Bench):
    page = bench.get("/docs")
    assert page.status_code == 200
    for path in ("/docs", "/docs/docs.css", "/docs/docs.js"):
        answer = bench.get(path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text and "https://" not in answer.text
    assert bench.get("/docs/other").status_code == 404
    tag = bench.get("/openapi.json").headers["etag"]
    again = bench.run(lambda client: client.get("/openapi.json", headers={"if-none-match": tag}))
    assert again.status_code == 304
