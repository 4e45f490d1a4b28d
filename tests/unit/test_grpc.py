"""The gRPC door: errors as statuses with details, streams in order, clients that leave, deadlines, health."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.types import Send

from metasepia.errors import DeadlineExceeded, Overloaded, Unavailable
from metasepia.rows import Row, TokenChunk
from serve.grpc_door.exchange import Request, begun
from serve.grpc_door.messages import message_of
from serve.grpc_door.proxy import Context
from serve.protos import metasepia_pb2 as pb
from serve.protos.metasepia_pb2_grpc import MetasepiaStub
from tests.doors import Bench
from tests.grpc_doors import GrpcBench, details_of
from tests.unit.test_gateway_searches import MATHS, a_bench
from tests.unit.test_prompts import write_byte_tokenizer

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 7}
LIST = getattr(health_pb2, "HealthListRequest")()  # noqa: B009 (newer than its types)
NAN = pb.Vector(values=[float("nan")])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path))


@pytest.fixture
def door(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> GrpcBench:
    return GrpcBench(bench, monkeypatch)


# -- errors ------------------------------------------------------------------------------------------------------------


def _refused(door: GrpcBench, name: str, asked: Any, **metadata: str) -> tuple[grpc.aio.AioRpcError, dict[str, Any]]:
    """The error of a call, and its details by kind."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        door.call(name, asked, **metadata)
    return raised.value, details_of(raised.value)


def _chat(**fields: Any) -> pb.ChatCompletionRequest:
    return message_of(pb.ChatCompletionRequest, CHAT | fields)


@pytest.mark.parametrize("name", ["CreateChatCompletion", "StreamChatCompletion"])
def test_an_error_has_the_tables_status_and_says_field_reason_and_request(door: GrpcBench, name: str):
    error, details = _refused(door, name, _chat(temperature=3.0), x_request_id="mine-1")
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in (error.details() or "")
    info = details["ErrorInfo"]
    assert (info.reason, info.domain, info.metadata["param"]) == ("INVALID_VALUE", "metasepia", "temperature")
    assert info.metadata["http_status"] == "400"
    assert [one.field for one in details["BadRequest"].field_violations] == ["temperature"]
    assert details["RequestInfo"].request_id == "mine-1"
    assert dict(error.trailing_metadata())["x-request-id"] == "mine-1"
    error, _ = _refused(door, name, _chat(model="nobody"))
    assert error.code() == grpc.StatusCode.NOT_FOUND and "known: tiny" in (error.details() or "")


@pytest.mark.parametrize(
    ("raised", "code", "delay_s"),
    [
        (Overloaded("the queue", 3.0), grpc.StatusCode.RESOURCE_EXHAUSTED, 3),
        (Unavailable("backbone tiny", 2.2), grpc.StatusCode.UNAVAILABLE, 3),
    ],
)
def test_a_refusal_that_passes_says_when_to_try_again(bench: Bench, door: GrpcBench, raised, code, delay_s):
    bench.says("x")
    bench.backbone.error = raised
    for name in ("CreateChatCompletion", "StreamChatCompletion"):
        error, details = _refused(door, name, _chat())
        assert error.code() == code
        assert details["RetryInfo"].retry_delay.seconds == delay_s
        assert dict(error.trailing_metadata())["retry-after"] == str(delay_s)


def test_a_deadline_that_passes_is_deadline_exceeded_and_no_retry(bench: Bench, door: GrpcBench):
    bench.says("x")
    bench.backbone.error = DeadlineExceeded("the completion", 1.0)
    error, details = _refused(door, "CreateChatCompletion", _chat())
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and "RetryInfo" not in details


def test_a_long_error_fits_the_trailing_metadata(door: GrpcBench):
    error, details = _refused(door, "CreateChatCompletion", _chat(model="é" * 90_000))
    assert error.code() == grpc.StatusCode.NOT_FOUND and (error.details() or "").startswith("no model named 'é")
    error, details = _refused(door, "GetExpert", pb.GetExpertRequest(name="z" * 90_000))
    assert error.code() == grpc.StatusCode.NOT_FOUND and details["ErrorInfo"].reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("name", "asked", "field"),
    [
        ("GetTask", pb.GetTaskRequest(id="map"), "id"),
        ("GetTask", pb.GetTaskRequest(id="post/nearest"), "id"),
        ("GetTask", pb.GetTaskRequest(), "id"),
        ("GetMixture", pb.GetMixtureRequest(digest="search"), "digest"),
        ("GetExpert", pb.GetExpertRequest(name="maths/content"), "name"),
        ("ListContexts", pb.ListContextsRequest(limit=0), "limit"),
        ("Classify", pb.ClassifyRequest(inputs=[pb.Input(vector=NAN)]), "inputs[0].vector[0]"),
        ("Classify", pb.ClassifyRequest(inputs=[pb.Input()]), "examples"),
    ],
)  # fmt: skip
def test_a_field_cannot_be_what_leads_to_another_call_nor_what_json_cannot_say(door: GrpcBench, name, asked, field):
    error, details = _refused(door, name, asked)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details["ErrorInfo"].metadata["param"] == field


def test_bytes_that_are_no_message_are_refused_in_words(door: GrpcBench):
    async def talk(channel: grpc.aio.Channel) -> None:
        for path, kind in (("Classify", channel.unary_unary), ("StreamCompletion", channel.unary_stream)):
            for garbage in (b"\xff" * 40, b"\x0a\x05ab", b"\x0a\x02\xff\xfe", b"\x00" * 1000):
                call: Any = kind(f"/metasepia.v1.Metasepia/{path}")(garbage, timeout=10)
                with pytest.raises(grpc.aio.AioRpcError, match=r"these bytes are no metasepia\.v1") as raised:
                    _ = [one async for one in call] if hasattr(call, "__aiter__") else await call
                assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    door.run(talk)


def test_what_the_proxy_says_by_itself_is_typed_too(door: GrpcBench):
    door.proxy.error = RuntimeError("the actor died")
    for name in ("CreateChatCompletion", "StreamChatCompletion"):
        error, details = _refused(door, name, _chat())
        assert (error.code(), details["RetryInfo"].retry_delay.seconds) == (grpc.StatusCode.UNAVAILABLE, 2)
        assert "actor" not in (error.details() or "")


def test_an_unknown_method_is_unimplemented(door: GrpcBench):
    async def talk(channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/metasepia.v1.Metasepia/Fly")(b"", timeout=10)
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED

    door.run(talk)


# -- streams, deadlines, clients that leave ----------------------------------------------------------------------------


def test_an_error_after_the_first_tokens_comes_behind_them_as_the_status(bench: Bench, door: GrpcBench):
    bench.says("abcdef")
    bench.backbone.error, bench.backbone.error_after = Unavailable("backbone tiny", 5.0), 3

    async def talk(channel: grpc.aio.Channel) -> None:
        text, call = "", MetasepiaStub(channel).StreamChatCompletion(_chat(), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for chunk in call:
                assert chunk.choices  # none is empty
                text += chunk.choices[0].delta.content
        assert (text, raised.value.code()) == ("abc", grpc.StatusCode.UNAVAILABLE)

    door.run(talk)


async def _until(what: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    give_up = time.monotonic() + timeout_s
    while not what() and time.monotonic() < give_up:
        await asyncio.sleep(0.01)
    return what()


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("name", ["CreateChatCompletion", "StreamChatCompletion"])
def test_a_client_that_leaves_takes_its_row_along(
    bench: Bench, door: GrpcBench, monkeypatch: pytest.MonkeyPatch, name: str, num_tokens: int
):
    bench.says("abcdef")
    generate = bench.backbone.generate

    async def hanging(row: Row) -> AsyncGenerator[TokenChunk]:
        async with aclosing(generate(row)) as chunks:
            for _ in range(num_tokens):
                yield await anext(chunks)
            await anext(chunks)
            await asyncio.sleep(3600)

    monkeypatch.setattr(bench.backbone, "generate", hanging)

    async def talk(channel: grpc.aio.Channel) -> None:
        call = getattr(MetasepiaStub(channel), name)(_chat(max_tokens=50))
        if name.startswith("Stream") and num_tokens:
            await call.read()
        else:
            assert await _until(lambda: bool(bench.backbone.rows))
        assert bench.backbone.num_closed == 0
        call.cancel()
        assert await _until(lambda: bench.backbone.num_closed == 1)

    door.run(talk)


def test_the_clients_deadline_is_the_rows(bench: Bench, door: GrpcBench):
    bench.says("x")

    async def talk(channel: grpc.aio.Channel) -> None:
        stub = MetasepiaStub(channel)
        await stub.CreateChatCompletion(_chat(), timeout=7)
        await stub.CreateChatCompletion(_chat(), timeout=60, metadata=[("x-request-timeout-seconds", "5")])
        await stub.CreateChatCompletion(_chat(), metadata=[("x-request-timeout-seconds", "9")])
        await stub.CreateChatCompletion(_chat(), timeout=10**6)
        with pytest.raises(grpc.aio.AioRpcError, match="x-request-timeout-seconds: must be seconds"):
            await stub.CreateChatCompletion(_chat(), timeout=60, metadata=[("x-request-timeout-seconds", "soon")])

    begin = time.time()
    door.run(talk)
    for row, seconds in zip(bench.backbone.rows, (7, 5, 9, 86_400), strict=True):
        assert row.deadline_unix_s - begin == pytest.approx(seconds, abs=2)


def test_metadata_reach_the_application_but_for_those_that_frame_a_body(bench: Bench, door: GrpcBench):
    seen: list[dict[bytes, bytes]] = []
    inner = bench.app

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        assert scope["scheme"] == "grpc" and scope["client"][0] == "127.0.0.1"
        await inner(scope, receive, send)

    door.proxy.gateway._calls._app = app
    bench.says("x")
    given = {"authorization": "Bearer k", "idempotency_key": "once", "content_encoding": "gzip", "accept": "text/html"}
    answer, told = door.told("CreateChatCompletion", _chat(), **given)
    assert seen[0][b"authorization"] == b"Bearer k" and seen[0][b"idempotency-key"] == b"once"
    assert seen[0][b"accept"] == b"application/json" and b"content-encoding" not in seen[0]
    assert told["x-request-id"] == seen[0][b"x-request-id"].decode()
    again, told = door.told("CreateChatCompletion", _chat(), **given)
    assert again == answer and len(bench.backbone.rows) == 1  # replayed


def test_an_upload_that_is_cut_off_registers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = a_bench(tmp_path)
    door, blob = GrpcBench(bench, monkeypatch), MATHS.to_bytes()

    async def talk(channel: grpc.aio.Channel) -> None:
        stub = MetasepiaStub(channel)

        async def cut() -> Any:
            yield pb.ExpertUpload(name="cut", file=blob[:50])
            await asyncio.sleep(0.2)
            call.cancel()
            await asyncio.sleep(3600)

        call = stub.AddExpert(cut())
        with pytest.raises(asyncio.CancelledError):
            await call
        for parts in (
            [],
            [pb.ExpertUpload(name="x")],
            [pb.ExpertUpload(name="x", file=blob), pb.ExpertUpload(name="y")],
        ):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.AddExpert(iter(parts))
            assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT, raised.value.details()
        listed = await stub.ListExperts(pb.ListExpertsRequest())
        assert not {"cut", "x", "y"} & {one.id for one in listed.data}

    door.run(talk)


# -- health ------------------------------------------------------------------------------------------------------------


def test_health_is_checked_listed_and_watched(bench: Bench, door: GrpcBench, monkeypatch: pytest.MonkeyPatch):
    bench.says("x")
    monkeypatch.setattr("serve.grpc_door.health.LOOK_S", 0.02)
    monkeypatch.setattr("serve.telemetry.health.FRESH_S", 0.0)
    kinds = health_pb2.HealthCheckResponse
    good, ill, unknown = kinds.SERVING, kinds.NOT_SERVING, kinds.SERVICE_UNKNOWN

    def asked(service: str = "") -> health_pb2.HealthCheckRequest:
        return health_pb2.HealthCheckRequest(service=service)

    async def talk(channel: grpc.aio.Channel) -> None:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(asked())).status == good
        assert (await stub.Check(asked("metasepia.v1.Metasepia"))).status == good
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Check(asked("other"))
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        assert {one.status for one in (await stub.List(LIST)).statuses.values()} == {good}
        watch, lost = stub.Watch(asked()), stub.Watch(asked("other"))
        assert (await watch.read()).status == good
        assert (await lost.read()).status == unknown
        with pytest.raises(grpc.aio.AioRpcError, match="max_watchers") as raised:
            _ = [one async for one in stub.Watch(asked())]
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        bench.backbone.error = Unavailable("backbone tiny", 5.0)
        assert (await watch.read()).status == ill
        bench.backbone.error = None
        assert (await watch.read()).status == good
        lost.cancel()
        assert await _until(lambda: door.proxy.gateway._watchers == 1)
        bench.door.drain.begun = True
        assert (await watch.read()).status == ill
        assert not await watch.read()  # the end

    door.run(talk)


def test_a_stream_that_is_cancelled_behind_the_door_ends_for_its_reader():
    async def app(_scope: object, _receive: object, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def main() -> None:
        async with asyncio.timeout(5), begun(app, Request(method="POST", path="/")) as answer:
            await anext(answer.chunks)

    with pytest.raises(ConnectionError, match="cancelled behind the door"):
        asyncio.run(main())


class _EndingCall:
    """A call that must not be asked for its peer once it has ended: grpc itself would read freed memory."""

    ended = False

    def peer(self) -> str:
        assert not self.ended
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> None:
        return None


def test_a_call_that_has_ended_is_not_asked_for_its_peer():
    call = _EndingCall()
    seen = Context(call)
    call.ended = True
    assert seen.peer() == "ipv4:127.0.0.1:1"
