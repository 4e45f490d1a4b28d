"""Idempotency-Key: the same request is answered once, whatever dies or leaves meanwhile; others are told apart."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from metasepia.errors import Unavailable
from metasepia.registry.replays import KeptAnswer, ReplayStore
from serve.access.principal import Principal, asking
from serve.requests import idempotency
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
EXAMPLES = [{"text": "aa", "label": "x"}, {"text": "bbbb", "label": "y"}]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")
    made.says("ok")
    return made


def _chat(bench: Bench, key: str, **fields: Any) -> httpx.Response:
    return bench.post("/v1/chat/completions", CHAT | fields, **{"idempotency-key": key})


def test_the_same_request_is_answered_once(bench: Bench):
    first, again, other = _chat(bench, "a"), _chat(bench, "a"), _chat(bench, "b")
    assert first.json() == again.json()  # its id too, which each answer has of its own
    assert first.json()["id"] != other.json()["id"]
    assert len(bench.backbone.rows) == 2
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert first.headers["x-request-id"] != again.headers["x-request-id"]


def test_an_answer_outlives_its_gateway(bench: Bench, tmp_path: Path):
    first = _chat(bench, "a")
    bench.replays.store.close()
    after = Bench(write_byte_tokenizer(tmp_path))  # says nothing yet: a new answer would be another one
    assert _chat(after, "a").json() == first.json()


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_tokens": 1}])
def test_another_body_under_the_key_is_a_conflict(bench: Bench, change: dict[str, Any]):
    _chat(bench, "a")
    answer = _chat(bench, "a", **change)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_the_same_body_on_another_path_or_for_another_kind_of_answer_is_a_conflict(bench: Bench):
    body = {"model": "tiny", "input": ["ab"]}
    assert bench.post("/v1/hidden_states", body, **{"idempotency-key": "a"}).status_code == 200
    arrow = {"accept": "application/vnd.apache.arrow.stream"}
    for path, headers in (("/v1/embeddings", {}), ("/v1/hidden_states", arrow), ("/v1/hidden_states?x=1", {})):
        assert bench.post(path, body, **{"idempotency-key": "a"}, **headers).status_code == 409


def test_tenants_have_keys_of_their_own(bench: Bench):
    def ask_as(tenant: str) -> str:
        with asking(Principal(tenant, frozenset({"infer"}))):
            return _chat(bench, "a").json()["id"]

    ours, theirs = ask_as("ours"), ask_as("theirs")
    assert ours != theirs
    assert (ask_as("ours"), ask_as("theirs")) == (ours, theirs)


def test_while_the_first_runs_the_second_is_told_to_wait(bench: Bench):
    bench.backbone.hang, bench.backbone.answer, answer = True, [], bench.backbone.answer

    async def both(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"idempotency-key": "a"}
        first = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=headers))
        while not bench.backbone.rows:
            await asyncio.sleep(0.01)
        second = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        bench.backbone.hang, bench.backbone.answer = False, answer
        third = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert third.status_code == 200, third.text  # who left holds nothing
        return second

    second = bench.run(both)
    assert (second.status_code, second.json()["error"]["code"]) == (409, "in_progress")
    assert int(second.headers["retry-after"]) >= 1


def test_a_claim_of_a_gateway_that_died_ends_by_itself(tmp_path: Path):
    now = [0.0]
    store = ReplayStore(tmp_path, max_bytes=1 << 20, keep_s=60.0, monotonic=lambda: now[0])
    assert store.claim("t", "k", "dead", 15.0).is_taken
    now[0] = 14.0
    assert store.claim("t", "k", "next", 15.0).busy_s == pytest.approx(1)
    now[0] = 15.5
    assert store.claim("t", "k", "next", 15.0).is_taken
    late = KeptAnswer(digest="d", status=200, headers=(), body=b"late")
    assert not store.keep("t", "k", "dead", late, True)  # its answer is not the one that the second will give


@pytest.mark.parametrize("status", [429, 503, 504])
def test_an_answer_that_asks_to_be_tried_again_is_not_kept(bench: Bench, status: int):
    from metasepia.errors import DeadlineExceeded, Overloaded

    errors = {429: Overloaded("q", 1.0), 503: Unavailable("part", 1.0), 504: DeadlineExceeded("it", 1.0)}
    bench.backbone.error = errors[status]
    assert _chat(bench, "a").status_code == status
    bench.backbone.error = None
    assert _chat(bench, "a").status_code == 200


def test_a_client_that_leaves_while_it_asks_again_ends_the_request(bench: Bench):
    body = json.dumps(CHAT).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http", "server": ("door", 80),
        "headers": [(b"idempotency-key", b"a"), (b"content-type", b"application/json")],
    }  # fmt: skip

    async def ask(*messages: dict[str, Any]) -> list[dict[str, Any]]:
        left, sent = list(messages), []

        async def receive() -> Any:
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(bench.app(dict(scope), receive, send), 5)
        return sent

    async def both() -> None:
        assert (await ask({"type": "http.request", "body": body}))[0]["status"] == 200
        assert await ask({"type": "http.request", "body": body[:5], "more_body": True}) == []
        replayed = await ask({"type": "http.request", "body": body})
        assert (b"idempotent-replayed", b"true") in replayed[0]["headers"]

    asyncio.run(both())


def test_a_refusal_of_the_request_itself_is_kept(bench: Bench):
    assert _chat(bench, "a", temperature=9).status_code == 400
    again = _chat(bench, "a", temperature=9)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (400, "true")


def test_a_stream_is_replayed_whole_and_one_that_broke_off_is_not_kept(bench: Bench):
    first = _chat(bench, "a", stream=True)
    again = _chat(bench, "a", stream=True)
    assert again.content == first.content and again.headers["content-type"] == first.headers["content-type"]
    bench.backbone.error, bench.backbone.error_after = Unavailable("part", 1.0), 1
    broken = _chat(bench, "b", stream=True)
    assert '"unavailable"' in broken.text
    bench.backbone.error = None
    assert '"unavailable"' not in _chat(bench, "b", stream=True).text


def test_an_answer_beyond_the_bound_is_given_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = Bench(write_byte_tokenizer(tmp_path))
    object.__setattr__(bench.door.http, "max_replayed_mib", 1e-5)
    try:
        bench.says("ok")
        assert _chat(bench, "a").json()["id"] != _chat(bench, "a").json()["id"]
    finally:
        object.__setattr__(bench.door.http, "max_replayed_mib", 16.0)


def test_a_change_whose_answer_was_lost_is_not_made_twice(bench: Bench):
    """The client leaves while its context is being built; what it left is carried to its end, and its answer kept."""
    waiting, go_on = asyncio.Event(), asyncio.Event()
    build = bench.reasoning.build

    async def slow(asked: Any) -> Any:
        waiting.set()
        await go_on.wait()
        return await build(asked)

    bench.reasoning.build = slow  # type: ignore[method-assign]
    headers = {"idempotency-key": "a"}

    async def talk(client: httpx.AsyncClient) -> httpx.Response:
        first = asyncio.create_task(client.post("/v1/contexts", json={"examples": EXAMPLES}, headers=headers))
        await waiting.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = await client.post("/v1/contexts", json={"examples": EXAMPLES}, headers=headers)
        assert second.json()["error"]["code"] == "in_progress"
        go_on.set()
        while True:
            answer = await client.post("/v1/contexts", json={"examples": EXAMPLES}, headers=headers)
            if answer.status_code != 409:
                return answer
            await asyncio.sleep(0.01)

    answer = bench.run(talk)
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true")
    assert len([one for one in bench.reasoning.asked if type(one).__name__ == "Build"]) == 1


def test_without_the_store_changes_are_refused_and_questions_answered(bench: Bench):
    bench.replays.error = Unavailable("the registry", 1.0)
    assert _chat(bench, "a").status_code == 200
    headers = {"idempotency-key": "a"}
    assert bench.post("/v1/contexts", {"examples": EXAMPLES}, **headers).status_code == 503
    assert bench.get("/v1/contexts").json()["data"] == []


def test_a_full_disk_costs_the_replay_and_not_the_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> bool:
        raise Unavailable("the registry (its disk is full)", 60.0)

    monkeypatch.setattr(bench.replays.store, "keep", full)
    assert bench.post("/v1/contexts", {"examples": EXAMPLES}, **{"idempotency-key": "a"}).status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\xe9", "a\x7f"])
def test_a_key_that_is_none_is_refused_in_words(bench: Bench, key: str):
    answer = bench.run(
        lambda client: client.post(
            "/v1/chat/completions", json=CHAT, headers=[(b"idempotency-key", key.encode("latin-1"))]
        )
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key")
    assert "printable" in answer.json()["error"]["message"]


def test_reading_heeds_no_key(bench: Bench):
    first = bench.run(lambda client: client.get("/version", headers={"idempotency-key": "x" * 999}))
    assert first.status_code == 200


def test_each_try_of_a_form_may_have_its_own_boundary(tmp_path: Path):
    bench = Bench(write_byte_tokenizer(tmp_path)).with_experts(tmp_path / "registry")
    answers = []
    for _ in range(2):  # httpx draws a boundary for each
        files = {"file": ("x", b"no expert" * 1000), "name": (None, "mine")}
        answers.append(
            bench.run(lambda client: client.post("/v1/experts", files=files, headers={"idempotency-key": "a"}))  # noqa: B023
        )
    assert answers[0].request.headers["content-type"] != answers[1].request.headers["content-type"]
    assert [one.status_code for one in answers] == [400, 400]
    assert answers[1].headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize("seed", range(5))
def test_a_digest_of_a_form_does_not_depend_on_how_its_body_comes_in(seed: int):
    noise = np.random.default_rng(seed)

    def digest(boundary: str) -> str:
        body = b"--%b\r\nabc\r\n--%b--" % (boundary.encode(), boundary.encode())
        scope = {
            "method": "POST",
            "path": "/",
            "headers": [(b"content-type", f"multipart/form-data; boundary={boundary}".encode())],
        }
        taken = idempotency._Digest(scope)
        cuts = [0, *sorted(noise.integers(0, len(body), 4).tolist()), len(body)]
        for begin, end in itertools.pairwise(cuts):
            taken.add({"type": "http.request", "body": body[begin:end], "more_body": end < len(body)})
        return taken.value()

    assert digest("x" * 20) == digest("boundary-of-another-try")


def test_beyond_its_bytes_the_tenant_that_takes_most_loses_its_oldest(tmp_path: Path):
    now = [0.0]
    store = ReplayStore(tmp_path, max_bytes=5100, keep_s=100.0, wall=lambda: now[0])

    def keep(tenant: str, key: str) -> None:
        now[0] += 1
        store.claim(tenant, key, "h", 5.0)
        assert store.keep(tenant, key, "h", KeptAnswer(digest="d", status=200, headers=(), body=b"x" * 1000), False)

    def has(tenant: str, key: str) -> bool:
        found = store.claim(tenant, key, "looks", 5.0)
        store.let_go(tenant, key, "looks")
        return found.answer is not None

    keep("small", "s")
    for i in range(5):
        keep("large", f"l{i}")
    assert store.num_bytes <= 5100
    assert has("small", "s")
    assert [has("large", f"l{i}") for i in range(5)] == [False, False, True, True, True]
    now[0] += 101
    assert not has("small", "s")  # by its age
    keep("small", "t")
    assert store.num_bytes < 1300  # what is too old is gone, not only hidden
