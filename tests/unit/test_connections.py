"""What connections may take: a real uvicorn with our protocol, without Ray, and clients that are raw sockets."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from cluster.door_settings import HttpSettings
from serve.proxy import connections
from serve.proxy.connections import BoundedProtocol, Bounds
from serve.proxy.envelope import Envelope
from tests.serving import free_port

BOUNDS = Bounds(max_head_kib=8.0, head_timeout_s=0.6, max_connections=20)


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what came; /early before the body has."""
    body = b""
    while scope["path"] != "/early":
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            break
    answer = json.dumps({"method": scope["method"], "path": scope["path"], "bytes": len(body)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    BoundedProtocol.bounds = BOUNDS
    number = free_port()
    options: dict[str, Any] = {"lifespan": "off", "log_level": "critical", "timeout_keep_alive": 2}
    server = uvicorn.Server(uvicorn.Config(Envelope(_echo), port=number, http=BoundedProtocol, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield number
    server.should_exit = True
    thread.join(10)
    BoundedProtocol.bounds = None


def _talk(port: int, *pieces: bytes, pause_s: float = 0.0, wait_s: float = 3.0) -> bytes:
    """Everything that is answered until the other side closes, or says nothing for `wait_s`."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        return _rest(connection)


def _rest(connection: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while piece := connection.recv(65536):
            got += piece
    return got


def _refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head and b"connection: close" in head, answer[:300]
    return int(head.split()[1]), json.loads(body)["error"]["code"]


GOOD = b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\nab",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffffff\r\nab",
        b"GET / HTTP/1.1\r\nhost: x\r\nbad header: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nname: a\x00b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_envelope_or_the_connection_ends(port: int, request_: bytes):
    answer = _talk(port, request_)
    assert not answer or _refusal(answer) == (400, "malformed_request"), answer


def test_a_request_is_answered_with_one_id(port: int):
    assert _talk(port, GOOD).startswith(b"HTTP/1.1 200")
    assert _talk(port, GOOD).count(b"x-request-id") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nnever-ends: " + b"a" * 1_000_000,
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(500)) + b"\r\n",
    ],
    ids=["one header", "without an end", "path", "many headers"],
)
def test_a_head_beyond_its_bound_is_refused(port: int, head: bytes):
    answer = _talk(port, *(head[at : at + 4000] for at in range(0, len(head), 4000)), pause_s=0.0)
    assert answer == b"" or _refusal(answer) == (431, "head_too_large"), answer


def test_a_head_that_comes_byte_by_byte_is_given_up(port: int):
    begin = time.monotonic()
    answer = _talk(port, *(GOOD[at : at + 1] for at in range(20)), pause_s=0.05)
    assert _refusal(answer) == (408, "head_timeout")
    assert time.monotonic() - begin < 2.5


def test_the_second_request_of_a_connection_has_its_own_time_and_is_given_up_too(port: int):
    first = GOOD.replace(b"close", b"keep-alive")
    with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
        connection.sendall(first)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(0.8)  # longer than a head may take: it has not begun
        connection.sendall(first)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(first[:10])
        assert _refusal(_rest(connection)) == (408, "head_timeout")


def test_who_says_nothing_is_let_go(port: int):
    begin = time.monotonic()
    assert _talk(port) == b""
    assert time.monotonic() - begin < 2


def test_a_body_may_take_longer_than_a_head(port: int):
    head = b"POST /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 4\r\n\r\n"
    assert b'"bytes": 4' in _talk(port, head, b"a", b"b", b"c", b"d", pause_s=0.25)


def test_more_connections_than_are_taken_are_refused_and_the_others_answered(port: int):
    with contextlib.ExitStack() as stack:
        for _ in range(BOUNDS.max_connections):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=3))
        time.sleep(0.1)
        answer = _talk(port, GOOD)
        assert not answer or _refusal(answer) == (503, "unavailable")
    time.sleep(0.2)
    assert _talk(port, GOOD).startswith(b"HTTP/1.1 200")


def test_requests_in_one_piece_are_answered_one_after_another(port: int):
    several = GOOD.replace(b"close", b"keep-alive") * 30 + GOOD
    assert _talk(port, several).count(b"HTTP/1.1 200") == 31


def test_an_upgrade_is_not_made_and_the_request_answered(port: int):
    upgrade = (
        b"GET /a HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    )
    answer = _talk(port, upgrade + b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", wait_s=1.0)
    assert answer.startswith(b"HTTP/1.1 200")


def test_who_goes_on_sending_behind_the_answer_is_cut_off(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "LINGER_S", 0.3)
    head = b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionError):
            while time.monotonic() - begin < 4:
                connection.sendall(b"x")
                time.sleep(0.02)
    assert time.monotonic() - begin < 3


def test_a_connection_whose_body_came_behind_its_answer_is_used_again(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "LINGER_S", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"abcde")
        time.sleep(0.5)
        connection.sendall(GOOD)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_no_more_connections_are_taken_than_the_process_may_have_files(monkeypatch: pytest.MonkeyPatch):
    set_: list[tuple[int, int]] = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1024, 2000))
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, limits: set_.append(limits))
    assert Bounds.told().max_connections == 2000 - connections.OTHER_FILES
    assert set_ == [(2000, 2000)]


def test_bounds_reach_the_proxy_by_its_environment(monkeypatch: pytest.MonkeyPatch):
    for name, value in connections.environment(HttpSettings(max_head_kib=9.0, max_connections=77)).items():
        monkeypatch.setenv(name, value)
    assert Bounds.told() == Bounds(max_head_kib=9.0, head_timeout_s=15.0, max_connections=77)
