"""The layer that asks for keys: who is refused and in which words, scopes, quotas and their headers, the ledger."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from cluster.door_settings import KeySettings
from metasepia.access.keys import Scope, mint
from metasepia.errors import Overloaded, Unavailable
from serve.access.authentication import Access
from serve.access.principal import ANYONE, current
from serve.app import create_app
from serve.operations import operations
from tests.doors import Bench
from tests.keys import Clock, KeyedBench, ask
from tests.unit.test_prompts import write_byte_tokenizer

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 7}
SCOPES: tuple[Scope, ...] = get_args(Scope)


@pytest.fixture
def clock() -> Clock:
    return Clock(1_700_000_000.0 - 1_700_000_000.0 % 86_400 + 10)


@pytest.fixture
def bench(tmp_path: Path, clock: Clock) -> Iterator[KeyedBench]:
    with KeyedBench(tmp_path, clock=clock) as made:
        made.says("x")
        yield made


def test_a_silent_registry_is_asked_once_for_all_who_wait():
    asked: list[int] = []

    class Silent:
        async def exchange_keys(self, *_: object) -> Any:
            asked.append(1)
            await asyncio.sleep(0)
            raise Unavailable("the registry", 1.0)

    async def main() -> list[object]:
        access = Access(KeySettings(required=True), Silent())  # type: ignore[arg-type]
        found = await asyncio.gather(*(access.identify("Bearer x") for _ in range(30)), return_exceptions=True)
        await access.close()
        return [*found]

    assert {type(one) for one in asyncio.run(main())} == {Unavailable}
    assert len(asked) == 2  # and once more at the end, with what was not told


def refusal(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    return response.status_code, error["code"]


# -- who is let in -----------------------------------------------------------------------------------------------------


def test_without_keys_in_the_settings_everybody_is_the_tenant_local(tmp_path: Path) -> None:
    made = Bench(write_byte_tokenizer(tmp_path))
    made.says("x")
    assert current() is ANYONE
    response = made.chat()
    assert response.status_code == 200 and not [name for name in response.headers if name.startswith("x-ratelimit")]
    assert made.post("/v1/chat/completions", CHAT, authorization="Bearer anything").status_code == 200
    assert refusal(made.get("/v1/keys")) == (400, "not_supported")
    assert refusal(made.get("/v1/usage")) == (400, "not_supported")


def test_health_and_version_are_open_and_nothing_else_is(bench: KeyedBench) -> None:
    table = operations(bench.door)
    assert {one.name for one in table if one.scope is None} >= {"GetHealth", "GetVersion"}
    for one in table:
        path = one.path.replace("{model:path}", "x").replace("{", "").replace("}", "")
        response = bench.ask(one.method, path)
        if one.scope is None:
            assert response.status_code == 200, path
        else:
            assert refusal(response) == (401, "invalid_api_key"), path
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert "Authorization: Bearer" in response.json()["error"]["message"]
    assert bench.ask("GET", "/nowhere").status_code == 401
    assert bench.ask("HEAD", "/v1/models").status_code == 401
    assert bench.ask("OPTIONS", "/v1/models").status_code == 401


def test_open_metrics_opens_metrics_and_status_alone(tmp_path: Path) -> None:
    with KeyedBench(tmp_path, KeySettings(required=True, open_metrics=True)) as made:
        assert made.ask("GET", "/metrics").status_code == made.ask("GET", "/v1/status").status_code == 200
        assert made.ask("GET", "/v1/models").status_code == made.ask("GET", "/v1/keys").status_code == 401


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("", "asks for a key"),
        ("Basic dXNlcjpwYXNz", "asks for a key"),
        ("Bearer", "asks for a key"),
        ("Bearer sk-from-somewhere-else", "not known here"),
        ("Bearer " + "x" * 10_000, "not known here"),
        ("Bearer msk_%00_", "not known here"),
    ],
)
def test_what_is_no_key_is_refused_without_saying_it_again(bench: KeyedBench, shown: str, words: str) -> None:
    response = bench.ask("GET", "/v1/models", headers={"authorization": shown})
    assert refusal(response) == (401, "invalid_api_key") and words in response.text
    assert "somewhere" not in response.text and len(response.text) < 400


def test_a_key_opens_by_any_spelling_of_bearer_and_two_keys_open_nothing(bench: KeyedBench) -> None:
    key = bench.key("acme", "infer")
    for scheme in ("Bearer ", "bearer ", "BEARER  "):
        assert bench.ask("GET", "/v1/models", headers={"authorization": scheme + key}).status_code == 200

    async def twice(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/v1/models", headers=[("authorization", f"Bearer {key}")] * 2)

    assert refusal(bench.run(twice)) == (401, "invalid_api_key")


def test_an_expired_and_a_revoked_key_say_so_and_a_wrong_secret_does_not(bench: KeyedBench, clock: Clock) -> None:
    short, long = bench.key("acme", "infer", lifetime_s=30.0), bench.key("acme", "infer")
    assert bench.ask("GET", "/v1/models", short).status_code == 200
    clock.pass_(31)
    assert "has expired" in bench.ask("GET", "/v1/models", short).text
    clock.unix_s -= 3600  # whoever sets the clock back gets nothing by it
    assert "has expired" in bench.ask("GET", "/v1/models", short).text
    bench.store.revoke(long.split("_")[1])
    bench.run(lambda _: bench.access.exchange())
    assert "was revoked" in bench.ask("GET", "/v1/models", long).text
    assert "not known here" in bench.ask("GET", "/v1/models", long[:-3] + "AAA").text


def test_every_call_wants_its_scope_and_no_other_and_admin_may_everything(bench: KeyedBench) -> None:
    keys = {scope: bench.key("acme", scope) for scope in SCOPES}
    for one in operations(bench.door):
        path = one.path.replace("{model:path}", "x").replace("{", "").replace("}", "")
        for scope, key in keys.items():
            if one.name == "CreateKey" and scope == "admin":
                continue  # works: other tests look
            response = bench.ask(one.method, path, key)
            allowed = one.scope in (None, scope) or scope == "admin"
            assert (response.status_code == 403) is not allowed, (one.name, scope, response.text)
            if not allowed:
                assert refusal(response) == (403, "insufficient_scope")
                assert repr(one.scope) in response.json()["error"]["message"] and key[21:] not in response.text


def test_the_table_that_is_asked_first_takes_each_path_where_the_router_takes_it(bench: KeyedBench) -> None:
    layer = bench.app
    while not hasattr(layer, "_fixed"):
        layer = layer._app  # pyright: ignore
    for (method, path), (_, operation) in layer._fixed.items():  # pyright: ignore
        scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        first = next(one for route, one in layer._routes if route.matches(scope)[0].name == "FULL")  # pyright: ignore
        assert first is operation


def test_a_key_is_in_no_log_line_no_answer_and_in_nothing_that_a_route_sees(
    bench: KeyedBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    key, seen = bench.key("acme", "infer", requests_per_minute=3), list[str]()

    async def looks(request: Any) -> Any:
        seen.append(f"{request.headers!r} {request.scope!r} {current()!r}")
        raise RuntimeError("unexpected")

    monkeypatch.setattr(bench.door, "chat", looks)
    bench.app = create_app(bench.door, bench.replays)  # pyright: ignore[reportArgumentType]
    answers = [bench.ask("POST", "/v1/chat/completions", key, CHAT) for _ in range(5)]
    answers.append(bench.ask("GET", "/v1/keys", key))
    assert [one.status_code for one in answers] == [500, 500, 500, 429, 429, 403]
    secret = key.split("_", 2)[2]
    said = caplog.text + "".join(one.text + repr(one.headers) for one in answers) + "".join(seen)
    assert secret not in said and secret[:10] not in said and "acme" in "".join(seen)


# -- quotas ------------------------------------------------------------------------------------------------------------


def test_requests_beyond_the_minutes_are_refused_until_it_ends_with_openais_headers(
    bench: KeyedBench, clock: Clock
) -> None:
    key = bench.key("acme", "infer", requests_per_minute=2)
    first, second, third = (bench.ask("GET", "/v1/models", key) for _ in range(3))
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [one.headers["x-ratelimit-remaining-requests"] for one in (first, second, third)] == ["1", "0", "0"]
    assert first.headers["x-ratelimit-reset-requests"] == "50s" and "x-ratelimit-limit-tokens" not in first.headers
    assert refusal(third) == (429, "quota_exceeded") and third.headers["retry-after"] == "50"
    assert "2 requests of this minute" in third.json()["error"]["message"]
    clock.pass_(50)
    assert bench.ask("GET", "/v1/models", key).status_code == 200


def test_tokens_are_charged_for_what_was_answered_and_refused_requests_cost_nothing(
    bench: KeyedBench, clock: Clock
) -> None:
    key = bench.key("acme", "infer", tokens_per_day=1000)
    answer = bench.ask("POST", "/v1/chat/completions", key, CHAT)
    used = answer.json()["usage"]["total_tokens"]
    assert used > 0
    bench.backbone.error = Overloaded("the queue", 1.0)
    assert bench.ask("POST", "/v1/chat/completions", key, CHAT).status_code == 429
    assert bench.ask("POST", "/v1/chat/completions", key, {**CHAT, "stream": True}).status_code == 429
    assert bench.ask("POST", "/v1/chat/completions", key, {**CHAT, "model": "none"}).status_code == 404
    left = bench.ask("GET", "/v1/models", key)
    assert left.headers["x-ratelimit-remaining-tokens"] == str(1000 - used)
    assert left.headers["x-ratelimit-reset-tokens"] == "23h59m50s"


def test_a_request_is_let_in_while_tokens_are_left_and_answered_whole(bench: KeyedBench, clock: Clock) -> None:
    key = bench.key("acme", "infer", tokens_per_day=1)
    bench.says("a long answer")
    first = bench.ask("POST", "/v1/chat/completions", key, CHAT)
    assert first.json()["usage"]["completion_tokens"] > 1
    second = bench.ask("POST", "/v1/chat/completions", key, CHAT)
    assert refusal(second) == (429, "quota_exceeded") and second.headers["retry-after"] == str(86_400 - 10)
    clock.pass_(86_400)
    assert bench.ask("POST", "/v1/chat/completions", key, CHAT).status_code == 200


def test_a_stream_is_charged_as_it_goes(bench: KeyedBench) -> None:
    text = bench.key("acme", "infer", tokens_per_day=10_000)
    bench.says("four")
    left: list[int] = []
    ring = bench.access.keyring

    async def talk(client: httpx.AsyncClient) -> None:
        generate = bench.backbone.generate

        async def watched(row: Any) -> Any:
            async for chunk in generate(row):
                left.append(ring.limits(ring.identify(text)).remaining_tokens)
                yield chunk

        bench.backbone.generate = watched  # pyright: ignore[reportAttributeAccessIssue]
        response = await ask(client, "POST", "/v1/chat/completions", text, {**CHAT, "stream": True})
        assert response.status_code == 200
        left.append(ring.limits(ring.identify(text)).remaining_tokens)

    bench.run(talk)
    whole = bench.ask("POST", "/v1/chat/completions", text, CHAT).json()["usage"]
    assert left[0] - left[-1] == whole["total_tokens"]
    assert len(set(left)) >= whole["completion_tokens"] > 2  # not all at the end


def test_what_a_part_had_no_room_for_is_not_counted_among_the_minutes_requests(bench: KeyedBench) -> None:
    key = bench.key("acme", "infer", requests_per_minute=5)
    bench.backbone.error = Unavailable("backbone tiny", 1.0)
    for _ in range(8):
        assert bench.ask("POST", "/v1/chat/completions", key, CHAT).status_code == 503
    assert bench.ask("GET", "/v1/models", key).headers["x-ratelimit-remaining-requests"] == "4"


# -- keys over the door ------------------------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_listed_and_revoked(bench: KeyedBench, clock: Clock) -> None:
    admin = bench.key("ops", "admin")
    body = {"tenant": "acme", "scopes": ["infer"], "label": "for tests", "expires_in_s": 3600, "tokens_per_day": 5}
    response = bench.ask("POST", "/v1/keys", admin, body)
    made = response.json()
    assert response.status_code == 200 and response.headers["cache-control"] == "no-store"
    assert made["expires"] == int(clock.unix_s) + 3600 and made["status"] == "active"
    text = made.pop("key")
    assert bench.ask("GET", "/v1/models", text).status_code == 200  # at once
    assert bench.ask("GET", f"/v1/keys/{made['id']}", admin).json() == made
    listed = bench.ask("GET", "/v1/keys", admin)
    assert made in listed.json()["data"] and text.split("_", 2)[2] not in listed.text
    gone = bench.ask("DELETE", f"/v1/keys/{made['id']}", admin)
    assert gone.json()["deleted"] is True and bench.ask("GET", "/v1/models", text).status_code == 401
    assert bench.ask("DELETE", f"/v1/keys/{made['id']}", admin).json() == gone.json()
    assert bench.ask("GET", f"/v1/keys/{made['id']}", admin).json()["status"] == "revoked"
    assert refusal(bench.ask("DELETE", "/v1/keys/0000000000000000", admin))[0] == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tenant": "shared"}, "tenant"),
        ({"tenant": "local"}, "tenant"),
        ({"tenant": "A B"}, "tenant"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes[0]"),
        ({"scopes": "infer"}, "scopes"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": "tomorrow"}, "expires_in_s"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"requests_per_minute": 1.5}, "requests_per_minute"),
        ({"key": "msk_mine"}, "key"),
    ],
)
def test_a_wrong_key_is_refused_by_its_field(bench: KeyedBench, fields: dict[str, Any], param: str) -> None:
    body = {"tenant": "acme", "scopes": ["infer"]} | fields
    response = bench.ask("POST", "/v1/keys", bench.key("ops", "admin"), body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_keys_are_listed_page_by_page(bench: KeyedBench) -> None:
    admin, ids = bench.key("ops", "admin"), list[str]()
    for _ in range(6):
        bench.key("acme", "infer")
    after = ""
    while True:
        page = bench.ask("GET", f"/v1/keys?limit=3&after={after}", admin).json()
        ids += [one["id"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert ids == sorted(ids) and len(ids) == 7


def test_an_answer_with_a_secret_is_kept_for_no_replay(bench: KeyedBench) -> None:
    admin = bench.key("ops", "admin")
    body = {"tenant": "acme", "scopes": ["infer"]}
    first, second = (bench.ask("POST", "/v1/keys", admin, body, {"idempotency-key": "once"}) for _ in range(2))
    assert first.status_code != 200 or first.json()["key"] != second.json()["key"]
    secret = first.json().get("key", "none").split("_")[-1].encode()
    assert not any(secret in path.read_bytes() for path in bench.replays.root.rglob("*.sqlite*"))


def test_a_tenant_reads_its_own_usage_and_admin_everybodys(bench: KeyedBench) -> None:
    mine, theirs, admin = bench.key("acme", "infer"), bench.key("other", "infer"), bench.key("ops", "admin")
    for key in (mine, theirs, theirs):
        used = bench.ask("POST", "/v1/chat/completions", key, CHAT).json()["usage"]
    own = bench.ask("GET", "/v1/usage", mine).json()["data"]
    assert [(one["tenant"], one["key"], one["total_tokens"]) for one in own] == [
        ("acme", mine.split("_")[1], used["total_tokens"])
    ]
    everybody = bench.ask("GET", "/v1/usage", admin).json()["data"]
    assert {one["tenant"]: one["prompt_tokens"] for one in everybody} | {"ops": 0} == {
        "acme": used["prompt_tokens"],
        "other": 2 * used["prompt_tokens"],
        "ops": 0,
    }
    assert [one["tenant"] for one in bench.ask("GET", "/v1/usage?tenant=other", admin).json()["data"]] == ["other"]
    assert refusal(bench.ask("GET", "/v1/usage?tenant=other", mine)) == (403, "insufficient_scope")
    assert bench.ask("GET", "/v1/usage?from=2001-01-01&to=2001-12-31", mine).json()["data"] == []
    assert bench.ask("GET", "/v1/usage?from=yesterday", mine).json()["error"]["param"] == "from"


# -- the registry ------------------------------------------------------------------------------------------------------


def test_a_gateway_that_hears_nothing_of_the_registry_lets_nobody_in_after_a_while(
    bench: KeyedBench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = bench.key("acme", "infer")
    assert bench.ask("GET", "/v1/models", key).status_code == 200

    async def away(*_: Any) -> Any:
        raise Unavailable("the registry", 1.0)

    monkeypatch.setattr(bench.access.part, "exchange_keys", away)
    clock.pass_(29)
    assert bench.ask("GET", "/v1/models", key).status_code == 200
    clock.pass_(2)
    assert refusal(bench.ask("GET", "/v1/models", key)) == (503, "unavailable")
    monkeypatch.undo()
    assert bench.ask("GET", "/v1/models", key).status_code == 200


def test_a_revocation_elsewhere_is_in_force_within_a_second_without_a_request(tmp_path: Path) -> None:
    made = KeyedBench(tmp_path)
    key = made.key("acme", "infer")

    async def talk(client: httpx.AsyncClient) -> None:
        assert (await ask(client, "GET", "/v1/models", key)).status_code == 200
        made.store.revoke(key.split("_")[1])
        made.key("acme", "infer")
        await asyncio.sleep(1.0)
        assert (await ask(client, "GET", "/v1/models", key)).status_code == 401
        assert len(made.access.keyring) == 2

    with made:
        made.run(talk)


def test_an_unknown_key_asks_the_registry_nothing(bench: KeyedBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.ask("GET", "/v1/models", bench.key("acme", "infer"))
    asked: list[object] = []
    monkeypatch.setattr(bench.access, "exchange", lambda: asked.append(1))
    for _ in range(20):
        assert bench.ask("GET", "/v1/models", mint()[1]).status_code == 401
    assert not asked
