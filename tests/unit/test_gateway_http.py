"""HTTP as a stranger's tools meet it: ids, methods, paths; and what a tool makes of the OpenAPI document by itself."""

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.contracts import CONTRACTS
from serve.requests import ids as request_ids
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

TYPED = (503, 504)
CHECKS: list[CheckFunction] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("home")
    made = Bench(write_byte_tokenizer(home)).with_contexts(home / "registry")
    made.says("ok")
    return made


def _ask(bench: Bench, method: str, path: str, **rest: Any) -> httpx.Response:
    return bench.run(lambda client: client.request(method, path, **rest))


def test_an_id_is_on_every_answer_and_known_inside(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    seen: list[str | None] = []
    real = bench.door.names.listing

    async def listing() -> list[dict[str, Any]]:
        seen.append(request_ids.current())
        return await real()

    monkeypatch.setattr(bench.door.names, "listing", listing)
    own = {"x-request-id": "abc-123"}
    assert _ask(bench, "GET", "/v1/models", headers=own).headers.get_list("x-request-id") == ["abc-123"]
    made = _ask(bench, "GET", "/v1/models").headers["x-request-id"]
    assert seen == ["abc-123", made] and made.startswith("req_")
    for path, status in (("/nowhere", 404), ("/v1/models/nobody", 404)):
        answer = _ask(bench, "GET", path, headers=own)
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "abc-123")
    assert request_ids.current() is None


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "a\x7f", "caf\xe9"])
def test_an_id_that_is_not_one_sane_word_is_replaced(bench: Bench, given: str):
    headers = [(b"x-request-id", given.encode("latin-1"))]
    assert _ask(bench, "GET", "/version", headers=headers).headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path", ["/v1/contexts", "/v1/models/tiny", "/health", "/v1/classify", "/v1/tasks/x"])
def test_options_and_a_method_that_is_not_served_name_those_that_are(bench: Bench, path: str):
    told = bench.get("/openapi.json").json()["paths"]
    named = {"/v1/models/tiny": "/v1/models/{model}", "/v1/tasks/x": "/v1/tasks/{id}"}.get(path, path)
    served = {method.upper() for method in told[named]} | {"OPTIONS"}
    for method in ("OPTIONS", "PATCH", "TRACE"):
        answer = _ask(bench, method, path)
        assert answer.status_code == (204 if method == "OPTIONS" else 405)
        assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == served
        if method != "OPTIONS":
            assert answer.json()["error"]["code"] == "method_not_allowed"


def test_head_says_what_get_would_without_a_body(bench: Bench):
    got, head = _ask(bench, "GET", "/version"), _ask(bench, "HEAD", "/version")
    assert head.status_code == 200 and head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize(
    "path",
    ["//", "/v1//models", "/v1/models/", "/v1/classify/", "/%2e%2e/etc/passwd", "/%00", "/v1/contexts/%00", "/\u00e9",
     "/v1/models/" + "a" * 5000, "/v1/contexts/" + "/".join("a" * 999), "/v1/contexts?limit=%00", "/v1/contexts?limit",
     "/v1/contexts?" + "&".join(f"a{i}=b" for i in range(999)), "/v1/contexts?after=%ff%fe", "/%", "/%zz"],
    ids=range(16),
)  # fmt: skip
def test_absurd_paths_are_answered_in_the_envelope(bench: Bench, path: str):
    answer = _ask(bench, "GET", path)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.text) < 2000


def test_a_parameter_that_nobody_knows_is_not_looked_at(bench: Bench):
    """As OpenAI does: tools add their own."""
    assert _ask(bench, "GET", "/v1/models?utm_source=x").status_code == 200


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "", "1e9", "1 2"])
def test_a_deadline_that_is_none_is_refused_everywhere(bench: Bench, seconds: str):
    headers = {"x-request-timeout-seconds": seconds}
    for method, path, body in (("GET", "/v1/models", None), ("POST", "/v1/classify", {"inputs": "a"})):
        answer = _ask(bench, method, path, headers=headers, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-seconds")


@pytest.fixture(scope="module")
def api(bench: Bench) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", bench.app)


@pytest.mark.parametrize("name", CONTRACTS)
def test_what_a_tool_makes_of_the_document_is_answered_as_it_says(api: Any, name: str):
    operation = api.find_operation_by_id(name)

    @given(case=st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)))
    @settings(QUICK, max_examples=4)
    def ask(case: Any) -> None:
        answer = case.call()
        assert answer.status_code < 500 or answer.status_code in TYPED, answer.text
        # A body beyond its schema is refused; a parameter that nobody knows is not looked at.
        refuses = [negative_data_rejection] if CONTRACTS[name].body is not None else []
        case.validate_response(answer, checks=[*CHECKS, *refuses])

    ask()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "inputs", "examples", "input", "messages", "prompt", "stream", "n", "stop", "seed", "temperature",
     "max_tokens", "tools", "logprobs", "unlabelled", "encoder", "weights", "backbone", "tasks", "answers", "layers"]
)  # fmt: skip
PATHS = ["/v1/classify", "/v1/contexts", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
         "/v1/hidden_states", "/v1/mixtures", "/v1/mixtures/search", "/v1/tasks", "/v1/tasks/compare"]  # fmt: skip


@given(path=st.sampled_from(PATHS), body=st.dictionaries(FIELDS, JSON, max_size=5) | JSON)
@settings(QUICK, max_examples=150)
def test_whatever_json_says_it_is_answered_in_words(bench: Bench, path: str, body: Any):
    answer = _ask(bench, "POST", path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 202, 400, 404, 409, 410, 413, 429), answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200), kind=st.sampled_from(
    ["application/json", "text/plain", "multipart/form-data; boundary=x", "application/vnd.apache.arrow.stream", "\xff"]
))  # fmt: skip
@settings(QUICK, max_examples=100)
def test_whatever_bytes_say_they_are_refused_in_words(bench: Bench, path: str, body: bytes, kind: str):
    answer = _ask(bench, "POST", path, content=body, headers=[(b"content-type", kind.encode("latin-1"))])
    assert answer.status_code == 400, answer.text
