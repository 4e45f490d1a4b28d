"""An endpoint's key is in no log, file, repr, digest, pickle or error, whatever the endpoint does with it."""

import asyncio
import json
import logging
import pickle  # noqa: TID251 (in memory: what crosses process borders)
import traceback
from pathlib import Path
from typing import Any

import pytest

from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.errors import BadAnswer, EndpointRefused, EndpointUnavailable, MissingKey
from metasepia.blackbox.keys import Key
from metasepia.blackbox.openai import OpenAIEndpoint
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.settings import EndpointSettings
from metasepia.errors import InvalidSettings, MetasepiaError
from tests.endpoint import Endpoint, Http

SECRET = "sk-live/7f3a+Zq9$secret-of-tests"
VARIABLE = "METASEPIA_TEST_KEY"
TEXTS = ["text one", "text two", "text three"]
OPEN = Prompt(template="Review: {text}", max_tokens=8)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLE, SECRET)


def settings_of(url: str, **settings: Any) -> EndpointSettings:
    fields: dict[str, Any] = {"backoff_s": 0.01, "max_backoff_s": 0.02, "max_attempts": 2, "patience_s": 3.0}
    fields |= {"base_url": url, "model": "tiny", "key_env": VARIABLE} | settings
    return EndpointSettings(**fields)


def echoing(status: int, kind: str = "application/json") -> Http:
    """An answer that holds the key in every place it can."""
    body = {"error": {"message": f"Incorrect API key provided: {SECRET}. Header was Bearer {SECRET}"}}
    text = json.dumps(body) if kind == "application/json" else f"<html>{SECRET}</html>"
    return Http(status, text, {"content-type": kind, "x-echo": f"Bearer {SECRET}", "location": f"/?key={SECRET}"})


def torn() -> Http:
    return Http(200, '{"error": "' + "x" * 20 + SECRET[:20])


SHAPES = {
    "refused": echoing(401),
    "redirected": echoing(302),
    "away": echoing(500),
    "busy": echoing(429),
    "HTML": echoing(200, "text/html"),
    "an error inside": echoing(200),
    "broken off": Http(200, f'{{"x": "{SECRET}', promised=5000),
    "cut within the key": torn(),
    "a model of that name": Http(200, {"model": 3, "x": SECRET, "choices": [{"message": {"content": "a"}}]}),
}


def _locals_of(error: BaseException) -> list[str]:
    """What a tool that prints local variables would print of our frames."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if "blackbox/" in frame.f_code.co_filename]
    assert len(ours) > 2
    return [f"{name} = {value!r}" for frame in ours for name, value in frame.f_locals.items()]


@pytest.mark.parametrize("trouble", SHAPES.values(), ids=SHAPES)
def test_an_endpoint_that_echoes_the_key_gets_it_nowhere(
    trouble: Http, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with Endpoint(behave=lambda count, body: trouble) as endpoint, AnswerCache(tmp_path / "answers.sqlite") as cache:
        box = OpenAIEndpoint(settings_of(endpoint.url), OPEN, cache)
        with pytest.raises(MetasepiaError) as raised:
            asyncio.run(box.answer(TEXTS, told=lambda progress: told.append(f"{progress} {progress!r}")))
        assert endpoint.requests[0][1]["authorization"] == f"Bearer {SECRET}"
        seen = "\n".join(
            [
                caplog.text,
                *capfd.readouterr(),
                *told,
                repr(box),
                repr(box.settings),
                repr(vars(box)),
                json.dumps(box.source()),
                str(raised.value),
                repr(raised.value.args),
                *traceback.format_exception(raised.value),
                *_locals_of(raised.value),
            ]
        )
    assert "HTTP Request" in caplog.text or "broke" in str(raised.value)
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for spelling in (SECRET, SECRET[:20]):
        assert spelling not in seen
        assert spelling.encode() not in files
    assert raised.value.__cause__ is None
    assert (
        not isinstance(raised.value.__context__, Exception) or "httpx" not in type(raised.value.__context__).__module__
    )


def test_an_answer_that_holds_the_key_is_kept_without_it(tmp_path: Path):
    with (
        Endpoint(say=lambda before, seed: f"your key is {SECRET}", model=lambda count: f"m-{SECRET}") as endpoint,
        AnswerCache(tmp_path / "answers.sqlite") as cache,
    ):
        box = OpenAIEndpoint(settings_of(endpoint.url), OPEN, cache)
        answers = asyncio.run(box.answer(TEXTS))
        source = json.dumps(box.source())
    assert set(answers.replies) == {"your key is [key]"}
    assert SECRET not in source
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_that_may_be_a_word_is_not_taken_out_of_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "none")
    with Endpoint(say=lambda before, seed: "none of these") as endpoint:
        box = OpenAIEndpoint(settings_of(endpoint.url), OPEN)
        assert set(asyncio.run(box.answer(TEXTS)).replies) == {"none of these"}


def test_a_black_box_crosses_process_borders_without_its_key():
    settings = settings_of("http://127.0.0.1:1/v1")
    assert SECRET.encode() not in pickle.dumps(settings)
    assert SECRET.encode() not in pickle.dumps(Key(VARIABLE, "http://a"))


def test_a_missing_key_is_told_by_its_variable_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE)
    with (
        Endpoint() as endpoint,
        pytest.raises(MissingKey, match=f"{VARIABLE}, .* is not set; set it in the environment"),
    ):
        asyncio.run(OpenAIEndpoint(settings_of(endpoint.url), OPEN).answer(TEXTS))
    assert not endpoint.requests


def test_texts_that_are_all_answered_need_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with Endpoint() as endpoint, AnswerCache(tmp_path / "answers.sqlite") as cache:
        box = OpenAIEndpoint(settings_of(endpoint.url), OPEN, cache)
        first = asyncio.run(box.answer(TEXTS))
        monkeypatch.delenv(VARIABLE)
        again = asyncio.run(OpenAIEndpoint(settings_of(endpoint.url), OPEN, cache).answer(TEXTS))
    assert first.digest == again.digest
    assert len(endpoint.requests) == len(TEXTS)


@pytest.mark.parametrize("value", ["two words of text", "caf\u00e9-key", "line\nbreak", "   "])
def test_what_no_header_can_carry_is_refused_without_being_shown(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, value)
    with Endpoint() as endpoint, pytest.raises(MissingKey) as raised:
        asyncio.run(OpenAIEndpoint(settings_of(endpoint.url), OPEN).answer(TEXTS))
    assert not value.strip() or value.strip() not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"key_env": SECRET},
        {"base_url": f"https://user:{SECRET}@host/v1"},
        {"base_url": f"https://{SECRET}@host/v1"},
        {"base_url": f"https://host/v1?api-key={SECRET}"},
        {"base_url": f"https://host/v1#{SECRET}"},
        {"base_url": f"https://host:{SECRET}/v1"},
        {"key_header": f"x: {SECRET}"},
    ],
)
def test_settings_that_hold_a_key_are_refused_without_showing_it(fields: dict[str, Any]):
    given: dict[str, Any] = {"base_url": "https://host/v1", "model": "m"} | fields
    with pytest.raises(InvalidSettings) as raised:
        EndpointSettings(**given)
    assert SECRET not in f"{raised.value} {raised.value.args}"


@pytest.mark.parametrize(
    "fields", [{"base_url": f"http://127.0.0.1:1/{SECRET}/v1"}, {"extra": {"token": SECRET}}, {"model": SECRET}]
)
def test_a_key_that_stands_in_other_settings_is_refused(fields: dict[str, Any]):
    settings = settings_of("http://127.0.0.1:1/v1", **fields)
    with pytest.raises(InvalidSettings, match="stands nowhere else") as raised:
        OpenAIEndpoint(settings, OPEN)
    assert SECRET not in f"{raised.value} {raised.value.args}"


def test_another_header_carries_the_key_alone():
    with Endpoint() as endpoint:
        asyncio.run(OpenAIEndpoint(settings_of(endpoint.url, key_header="api-key"), OPEN).answer(TEXTS))
    headers = endpoint.requests[0][1]
    assert headers["api-key"] == SECRET
    assert "authorization" not in headers


def test_each_kind_of_error_has_been_tried_with_the_key():
    """The parametrised test above would pass for one kind alone."""
    kinds = set()
    for trouble in SHAPES.values():
        with Endpoint(behave=lambda count, body, trouble=trouble: trouble) as endpoint:
            box = OpenAIEndpoint(settings_of(endpoint.url), OPEN)
            try:
                asyncio.run(box.answer(TEXTS))
            except MetasepiaError as error:
                kinds.add(type(error))
    assert kinds == {BadAnswer, EndpointRefused, EndpointUnavailable}
