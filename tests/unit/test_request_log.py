"""The one line a request, and the lines of everything else."""

import asyncio
import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import logs
from cluster.meter_settings import LogSettings
from serve.telemetry.metrics import Measured, Metrics
from tests.doors import DIGEST, Bench
from tests.spans import CLIENT, traced
from tests.unit.test_prompts import write_byte_tokenizer

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    write_byte_tokenizer(tmp_path)
    return Bench(tmp_path)


@pytest.fixture
def set_up() -> Iterator[Callable[..., None]]:
    """Sets the loggers up, and takes that back."""
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in logs.LOGGERS}
    yield lambda **fields: logs.set_up(LogSettings(**fields))
    for name, (level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers = [one for one in logger.handlers if not isinstance(one, logs._Handler)]
        logger.level, logger.propagate = level, propagate
    logging.Logger.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def lines(set_up: Callable[..., None], tmp_path: Path) -> Lines:
    """What was logged, as JSON."""
    set_up(file=str(tmp_path / "log"))
    return lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_a_request_is_one_line_that_says_who_asked_what_and_what_answered(bench: Bench, lines: Lines):
    bench.says("a secret answer")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a secret question"}]}
    bench.post("/v1/chat/completions", body, authorization="Bearer msk_secret", **{"x-request-id": "mine"})
    (line,) = lines()
    wanted = {"logger": "serve.request", "level": "info", "request_id": "mine", "door": "http", "method": "POST"}
    wanted |= {"route": "/v1/chat/completions", "status": 200, "reason": None, "tenant": "local", "backbone": DIGEST}
    assert wanted.items() <= line.items()
    assert line["prompt_tokens"] > 5 and line["answer_tokens"] == len("a secret answer") and line["duration_ms"] > 0
    assert "secret" not in json.dumps(line)


def test_a_refusal_says_why_and_is_no_error(bench: Bench, lines: Lines):
    bench.chat(model="nobody")
    bench.get("/nowhere/with/secret")
    refused, lost = lines()
    assert (refused["status"], refused["reason"], refused["level"]) == (404, "model_not_found", "info")
    assert (lost["route"], lost["reason"]) == ("unmatched", "not_found") and "secret" not in json.dumps(lost)


def test_our_own_mistake_is_an_error_whose_line_has_the_requests_id(bench: Bench, lines: Lines):
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("our mistake")

    bench.door.names.resolve = broken  # pyright: ignore[reportAttributeAccessIssue]
    bench.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
        **{"x-request-id": "id-1"},
    )
    told, line = lines()
    assert (told["logger"], told["level"], told["request_id"]) == ("serve.requests.failures", "error", "id-1")
    assert "ZeroDivisionError: our mistake" in told["exception"]
    assert (line["status"], line["level"], line["request_id"]) == (500, "error", "id-1")


def test_a_stream_is_told_at_its_end_with_all_its_tokens(bench: Bench, lines: Lines):
    bench.says("four")
    bench.chat(stream=True)
    (line,) = lines()
    assert (line["status"], line["answer_tokens"], line["path"]) == (200, 4, "plain")


@pytest.mark.parametrize(("started", "status"), [(True, 200), (False, 499)])
def test_a_client_that_leaves_is_the_requests_reason_also_in_the_middle_of_a_stream(
    lines: Lines, started: bool, status: int
):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def send(_: Any) -> None: ...

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
        asking = asyncio.create_task(Measured(app, Metrics(), lambda: None)(scope, send, send))  # pyright: ignore
        await asyncio.sleep(0.05)
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking

    asyncio.run(main())
    (line,) = lines()
    assert (line["status"], line["reason"]) == (status, "client_left")


def test_a_line_knows_its_trace(bench: Bench, lines: Lines, tmp_path: Path):
    with traced(tmp_path / "spans"):
        bench.run(lambda client: client.get("/v1/models", headers={"traceparent": CLIENT}))
    assert lines()[-1]["trace_id"] == CLIENT.split("-")[1]


def test_probes_are_not_told(bench: Bench, lines: Lines):
    bench.says("x")
    for path in ("/health", "/metrics", "/version", "/v1/status"):
        assert bench.get(path).status_code == 200
    assert lines() == []


def test_text_is_for_people(set_up: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    set_up(format="text", level="warning")
    logging.getLogger("metasepia.gang").info("not this")
    logging.getLogger("metasepia.gang").warning("gang %s: replacing it", "tiny", extra={logs.FACTS: {"rows": 3}})
    (line,) = stderr.getvalue().splitlines()
    assert line.endswith("WARNING metasepia.gang: gang tiny: replacing it rows=3")


def test_a_file_that_cannot_be_written_sends_the_lines_to_standard_error(
    set_up: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    set_up(file="/nowhere/at/all.log")
    logging.getLogger("metasepia.gang").error("still heard")
    told = [json.loads(line)["message"] for line in stderr.getvalue().splitlines()]
    assert "/nowhere/at/all.log" in told[0] and told[1] == "still heard"


def test_nothing_is_set_up_outside_of_a_graph():
    logs.begin()
    assert not any(isinstance(one, logs._Handler) for one in logging.getLogger("serve").handlers)
