"""The client against a real socket whose server does everything wrong; both transports where they could differ."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from metasepia.client import (
    AsyncClient,
    BadInput,
    Client,
    NoAnswer,
    NotOurs,
    OutOfTime,
    PartlyDone,
    Refused,
    StreamBroken,
    errors,
)
from tests.endpoint import Endpoint, Http
from tests.serving import free_port

Script = Callable[[int, dict[str, Any]], Http | None]
FAST: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 20.0}


def refusal(status: int, message: str = "no room", param: str | None = None, **headers: str) -> Http:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Http(status, {"error": {"message": message, "type": "x", "param": param, "code": "x"}}, named)


def completion(text: str) -> Http:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return Http(200, {"id": "x", "model": "m", "created": 1, "choices": [choice], "usage": usage})


def labels(body: dict[str, Any]) -> Http:
    results = [{"label": "a", "probabilities": {"a": 1.0, "b": 0.0}} for _ in body["inputs"]]
    return Http(200, {"model": "m", "results": results, "usage": {"prompt_tokens": 1}, "receipt": {}})


def events(*texts: str, end: str = "data: [DONE]\n\n", **more: Any) -> Http:
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    body = "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + end
    return Http(200, body, {"content-type": "text/event-stream"}, **more)


def keys_of(endpoint: Endpoint) -> list[str]:
    return [headers["idempotency-key"] for _, headers, _ in endpoint.requests]


def test_a_busy_server_is_asked_again_and_then_answers():
    with Endpoint(behave=lambda n, body: refusal(429, retry_after="0.05") if n < 2 else completion("hi")) as endpoint:
        with Client(endpoint.url, **FAST) as client:
            assert client.chat("x", model="m").text == "hi"
        assert len(set(keys_of(endpoint))) == 1 and len(endpoint.requests) == 3
        assert endpoint.times[1] - endpoint.times[0] >= 0.05


@pytest.mark.parametrize("broken", [Http(drop=True), Http(200, "{", promised=5000)], ids=["reset", "cut off"])
def test_a_connection_that_breaks_in_mid_answer_is_asked_again_by_the_same_key(broken: Http):
    def behave(count: int, body: dict[str, Any]) -> Http:
        return broken if count == 0 else completion("hi")

    async def soon(url: str) -> str:
        async with AsyncClient(url, **FAST) as client:
            return (await client.chat("x", model="m")).text

    with Endpoint(behave=behave) as endpoint, Client(endpoint.url, **FAST) as client:
        assert client.chat("x", model="m").text == "hi"
        assert len(endpoint.requests) == 2 and len(set(keys_of(endpoint))) == 1
    with Endpoint(behave=behave) as endpoint:
        assert asyncio.run(soon(endpoint.url)) == "hi"
        assert len(endpoint.requests) == 2 and len(set(keys_of(endpoint))) == 1


def test_a_secret_is_not_asked_for_twice_when_the_connection_breaks():
    with Endpoint(behave=lambda n, body: Http(drop=True)) as endpoint, Client(endpoint.url, **FAST) as client:
        with pytest.raises(NoAnswer):
            client.create_key(tenant="a", scopes=["infer"])
        assert len(endpoint.requests) == 1


def test_a_server_that_does_not_answer_is_given_up_at_the_deadline_which_it_was_told():
    async def soon(url: str) -> None:
        async with AsyncClient(url, timeout_s=0.2) as client:
            await client.chat("x", model="m")

    with Endpoint(behave=lambda n, body: Http(delay_s=1.5)) as endpoint:
        for call in (
            lambda: Client(endpoint.url, timeout_s=0.2).chat("x", model="m"),
            lambda: asyncio.run(soon(endpoint.url)),
        ):
            begin = time.monotonic()
            with pytest.raises(OutOfTime, match=r"within 0\.2 s"):
                call()
            assert time.monotonic() - begin < 1.3
        assert [float(headers["x-request-timeout-seconds"]) for _, headers, _ in endpoint.requests] == [0.2, 0.2]


def test_an_answer_that_drips_is_given_up_too():
    def drip(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n")
        try:
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        begin = time.monotonic()
        with pytest.raises(OutOfTime), Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2) as client:
            client.version()
        assert time.monotonic() - begin < 2.0
        thread.join()


def test_nobody_there_and_another_programs_port_are_told_apart_with_the_way_out():
    with pytest.raises(NoAnswer, match=r"is it running\? METASEPIA_URL"):
        Client(f"http://127.0.0.1:{free_port()}", retries=0).health()
    plain = pytest.raises(NotOurs, match="501 text/html")  # a web server that knows no GET
    with Endpoint() as endpoint, Client(endpoint.url, retries=0) as client, plain:
        client.models()


@pytest.mark.parametrize(
    "answer",
    [
        Http(200, "<html>hello</html>"),
        Http(200, "[]"),
        Http(200, "null"),
        Http(200, {"id": 7, "data": [{"embedding": 1}], "model": "m", "results": [{"label": 3}], "usage": {}}),
        Http(200, b"\xff\xfe"),
    ],
    ids=["html", "a list", "null", "wrong types", "bytes"],
)
def test_garbage_is_called_so_and_not_asked_for_again(answer: Http):
    with Endpoint(behave=lambda n, body: answer) as endpoint, Client(endpoint.url, **FAST) as client:
        for call in (
            lambda: client.chat("x", model="m"),
            lambda: client.embed(["x"], model="m"),
            lambda: client.hidden_states(["x"], model="m"),
            lambda: client.classify(["x"], model="ctx-1"),
            lambda: client.compare_tasks(["x"]),
            lambda: client.create_mixture({"a": 1.0}, backbone="m"),
            lambda: list(client.stream_chat("x", model="m")),
        ):
            with pytest.raises(NotOurs):
                call()
        assert len(endpoint.requests) == 7


def test_fewer_answers_than_inputs_are_no_answer():
    fewer = Endpoint(behave=lambda n, body: labels({"inputs": body["inputs"][1:]}))
    with fewer as endpoint, Client(endpoint.url) as client, pytest.raises(NotOurs, match="1 results for 2 inputs"):
        client.classify(["x", "y"], model="ctx-1")


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_that_breaks_off_says_so_keeps_what_came_and_is_not_begun_again():
    async def soon(url: str) -> StreamBroken:
        async with AsyncClient(url, **FAST) as client:
            with pytest.raises(StreamBroken) as broken:
                async for _ in client.stream_chat("x", model="m"):
                    pass
            return broken.value

    for cut in (events("one ", "two", end=""), events("one ", "two", end="", promised=9999)):
        with Endpoint(behave=lambda n, body, cut=cut: cut) as endpoint:
            with Client(endpoint.url, **FAST) as client, pytest.raises(StreamBroken) as broken:
                list(client.stream_chat("x", model="m"))
            assert [broken.value.text, asyncio.run(soon(endpoint.url)).text] == ["one two", "one two"]
            assert len(endpoint.requests) == 2


def test_a_stream_is_begun_again_as_long_as_nothing_of_it_was_seen():
    with Endpoint(behave=lambda n, body: refusal(503) if n == 0 else events("hi")) as endpoint:
        with Client(endpoint.url, **FAST) as client, client.stream_chat("x", model="m") as stream:
            assert [piece.text for piece in stream] == ["hi"]
        assert len(set(keys_of(endpoint))) == 1


def test_an_error_within_a_stream_is_the_servers_own():
    end = f"data: {json.dumps({'error': {'message': 'a part died', 'code': 'unavailable', 'param': None}})}\n\n"
    with Endpoint(behave=lambda n, body: events("one", end=end)) as endpoint, Client(endpoint.url) as client:
        stream = client.stream_chat("x", model="m")
        with pytest.raises(errors.Unavailable, match="a part died"):
            list(stream)
        assert stream.text == "one"


def test_a_stream_that_is_left_closes_its_connection():
    gone = threading.Event()

    def stream(listener: socket.socket) -> None:
        connection = listener.accept()[0]
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        event = {"choices": [{"index": 0, "delta": {"content": "more "}, "finish_reason": None}]}
        try:
            for _ in range(400):
                connection.sendall(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(0.01)
        except OSError:
            gone.set()
        connection.close()

    async def soon(url: str) -> None:
        async with AsyncClient(url) as client, client.stream_chat("x", model="m") as pieces:
            async for _ in pieces:
                break

    def now(url: str) -> None:
        with Client(url) as client:
            for _ in client.stream_chat("x", model="m"):
                break  # dropped, not closed: the iterator's end is the stream's

    for leave in (now, lambda url: asyncio.run(soon(url))):
        gone.clear()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=stream, args=(listener,))
            thread.start()
            leave(f"http://127.0.0.1:{listener.getsockname()[1]}")
            assert gone.wait(2.0)
            thread.join()


# -- large inputs ------------------------------------------------------------------------------------------------------


def test_a_part_that_fails_loses_no_finished_part_and_names_items_of_the_whole_input():
    def behave(count: int, body: dict[str, Any]) -> Http:
        if "bad" in body["inputs"]:
            at = body["inputs"].index("bad")
            return refusal(400, f"inputs[{at}]: the text is empty", f"inputs[{at}]")
        return labels(body)

    texts = ["x"] * 25
    texts[13] = "bad"
    with Endpoint(behave=behave) as endpoint, Client(endpoint.url, **FAST) as client:
        with pytest.raises(PartlyDone) as partly:
            client.classify(texts, model="ctx-1", batch_size=10)
        found = partly.value
        assert found.missing == list(range(10, 20))
        assert found.partial.labels == ["a"] * 10 + [None] * 10 + ["a"] * 5
        error = found.failures[0].error
        assert isinstance(error, Refused) and error.param == "inputs[13]" and "inputs[13]" in str(error)


def test_an_error_that_every_part_would_meet_ends_the_rest_unasked():
    with Endpoint(behave=lambda n, body: refusal(403)) as endpoint:
        with Client(endpoint.url, concurrency=1) as client, pytest.raises(errors.Forbidden):
            client.classify(["x"] * 50, model="ctx-1", batch_size=10)
        assert len(endpoint.requests) == 1


def test_parts_are_halved_until_the_server_reads_them_but_not_for_examples_that_are_too_long():
    def behave(count: int, body: dict[str, Any]) -> Http:
        if len(body["inputs"]) > 7:
            return refusal(400, "20 are too many; this server takes 7 (http.max_inputs): send several", "inputs")
        return labels(body)

    with Endpoint(behave=behave) as endpoint, Client(endpoint.url, **FAST) as client:
        assert len(client.classify(["x"] * 20, model="ctx-1")) == 20
    with Endpoint(behave=lambda n, body: refusal(413)) as endpoint, Client(endpoint.url, **FAST) as client:
        with pytest.raises(errors.Invalid):
            client.classify(["x"] * 20, examples=[("y" * 500, "a"), ("z", "b")])
        assert len(endpoint.requests) == 1


def test_no_more_requests_at_once_than_asked_for():
    def behave(count: int, body: dict[str, Any]) -> Http:
        time.sleep(0.02)
        return labels(body)

    async def soon(url: str) -> int:
        async with AsyncClient(url, concurrency=3) as client:
            return len(await client.classify(["x"] * 40, model="ctx-1", batch_size=2))

    with Endpoint(behave=behave) as endpoint, Client(endpoint.url, concurrency=3) as client:
        assert len(client.classify(["x"] * 40, model="ctx-1", batch_size=2)) == 40
        assert endpoint.most_in_flight == 3
    with Endpoint(behave=behave) as endpoint:
        assert asyncio.run(soon(endpoint.url)) == 40
        assert endpoint.most_in_flight == 3


def test_an_async_call_that_is_cancelled_leaves_nothing_under_way():
    async def leave(url: str) -> None:
        async with AsyncClient(url) as client:
            call = asyncio.create_task(client.classify(["x"] * 40, model="ctx-1", batch_size=2))
            await asyncio.sleep(0.15)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert len(asyncio.all_tasks()) == 1

    with Endpoint(behave=lambda n, body: Http(delay_s=0.4)) as endpoint:
        asyncio.run(leave(endpoint.url))
        assert len(endpoint.requests) <= 4


def test_many_threads_share_one_client():
    with Endpoint(behave=lambda n, body: completion(body["messages"][0]["content"])) as endpoint:
        with Client(endpoint.url, **FAST) as client:
            said: dict[int, str] = {}
            threads = [
                threading.Thread(target=lambda i=i: said.update({i: client.chat(str(i), model="m").text}))
                for i in range(16)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert said == {i: str(i) for i in range(16)}


def test_connections_are_kept_and_used_again():
    accepted: list[object] = []
    with Endpoint(behave=lambda n, body: completion("hi")) as endpoint:
        accept = endpoint._server.get_request

        def count() -> Any:
            accepted.append(None)
            return accept()

        endpoint._server.get_request = count
        with Client(endpoint.url, **FAST) as client:
            for _ in range(5):
                client.chat("x", model="m")
    assert len(accepted) == 1


def test_progress_is_shown_on_a_terminal_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    with Endpoint(behave=lambda n, body: labels(body)) as endpoint, Client(endpoint.url, **FAST) as client:
        client.classify(["x"] * 9, model="ctx-1", batch_size=2)
        assert capfd.readouterr() == ("", "")
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        monkeypatch.setenv("FORCE_COLOR", "1")
        client.classify(["x"] * 9, model="ctx-1", batch_size=2)
        out, error = capfd.readouterr()
        assert out == "" and "classifying" in error
        client.classify(["x"] * 9, model="ctx-1", batch_size=2, progress=False)
        assert capfd.readouterr() == ("", "")


def test_the_key_goes_along_is_never_shown_and_must_be_one():
    with Endpoint(behave=lambda n, body: completion("hi")) as endpoint:
        with Client(endpoint.url, "msk_secret") as client:
            client.chat("x", model="m")
            assert "secret" not in repr(client)
        assert endpoint.requests[0][1]["authorization"] == "Bearer msk_secret"
    for bad in ("msk\nx", "clé", " "):
        with pytest.raises(BadInput, match="printable ASCII"):
            Client(endpoint.url, bad)
