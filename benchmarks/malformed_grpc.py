"""Malformed requests to the gRPC door: each must end soon in a status that says what was wrong; the door stays well.

    python -m benchmarks.malformed_grpc --port 9000 --num 3000

Bytes that are no message, messages with broken or foreign fields, messages of the right fields with wild values, wild
metadata, calls that are not there, clients that leave, and bytes on the port that are no HTTP/2. Nothing is asked for
that would change what is registered.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import message_factory, struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from serve.protos import metasepia_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Metasepia"]
CHANGES = ("Create", "Add", "Replace", "Delete", "Extend", "Revoke", "Cancel")
HARMLESS = ("CreateChatCompletion", "CreateCompletion", "CreateEmbeddings", "CreateHiddenStates")
CALLS = [
    one
    for one in SERVICE.methods
    if not one.client_streaming and (one.name in HARMLESS or not one.name.startswith(CHANGES))
]
TIMEOUT_S = 60.0
"""A call that takes longer hangs."""
SILENT_S = 2.0
"""What is no HTTP/2 is waited for so long; the door need not answer it."""
TYPED = frozenset(
    getattr(grpc.StatusCode, name)
    for name in (
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "UNIMPLEMENTED"),
        *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"),
    )
)
"""DEADLINE_EXCEEDED and CANCELLED only where the client asked for them; INTERNAL and UNKNOWN never."""
TEXTS = ("", " ", "x", "é" * 300, "\x00", "🦑\u202e", "../../etc", "ctx-" + "0" * 64, "auto", "a" * 70_000, "${jndi:x}")
NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 7)
REALS = (0.0, -1.0, 1e308, float("nan"), float("inf"), 0.5)


@dataclass
class Tally:
    """What became of them."""

    num: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """By kind and status."""
    wrong: list[str] = field(default_factory=list)
    """In words: no typed status, or no end."""

    def add(self, kind: str, outcome: str, wrong: str = "") -> None:
        self.num += 1
        self.outcomes[f"{kind}: {outcome}"] += 1
        if wrong:
            self.wrong.append(f"{kind}: {wrong}")


def send(host: str, port: int, num: int, seed: int = 0, at_once: int = 16) -> Tally:
    """Sends `num` of them, `at_once` at a time; the same ones for the same seed."""
    return asyncio.run(_send(host, port, num, seed, at_once))


async def _send(host: str, port: int, num: int, seed: int, at_once: int) -> Tally:
    tally, turns, rng = Tally(), asyncio.Semaphore(at_once), random.Random(seed)
    seeds = [rng.getrandbits(64) for _ in range(num)]
    async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:

        async def one(own: int) -> None:
            async with turns:
                draw = random.Random(own)
                await draw.choice(KINDS)(draw, channel, host, port, tally)

        await asyncio.gather(*map(one, seeds))
    return tally


# -- what is sent ------------------------------------------------------------------------------------------------------

Sender = Callable[[random.Random, grpc.aio.Channel, str, int, Tally], Awaitable[None]]


async def _no_message(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    content = draw.randbytes(draw.choice((1, 5, 40, 1000, 100_000)))
    await _call(tally, "no message", channel, draw.choice(CALLS), content)


async def _broken(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    """A message whose bytes are cut, flipped, doubled, or another call's."""
    method = draw.choice(CALLS)
    content = bytearray(_wild(draw, draw.choice((method, draw.choice(CALLS))).input_type).SerializeToString())
    for _ in range(draw.randint(1, 4)):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    await _call(tally, "broken", channel, method, bytes(content[: draw.randint(0, len(content))] * draw.randint(1, 2)))


async def _values(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    method = draw.choice(CALLS)
    await _call(tally, "wild values", channel, method, _wild(draw, method.input_type).SerializeToString())


async def _metadata(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    text = draw.choice(("", "-1", "nan", "1e999", "soon", "~" * 3000, "Bearer " + "k" * 200, "00-" + "z" * 60))
    names = (
        "x-request-timeout-seconds",
        "idempotency-key",
        "authorization",
        "x-request-id",
        "traceparent",
        "content-type",
    )
    metadata: list[tuple[str, str | bytes]] = [
        (draw.choice((*names, "accept", "content-length", "x" * 200)), text) for _ in range(draw.randint(1, 4))
    ]
    metadata += [("some-bin", draw.randbytes(50))] * draw.randint(0, 3)
    asked = pb.GetModelRequest(model="no-such-model").SerializeToString()
    await _call(tally, "metadata", channel, SERVICE.methods_by_name["GetModel"], asked, metadata=metadata)


async def _nowhere(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    path = draw.choice(
        ("/metasepia.v1.Metasepia/__init__", "/metasepia.v1.Metasepia/", "/a/b", "/metasepia.v1.Metasepia/é", "/")
    )
    await _call(tally, "no such call", channel, path, draw.randbytes(10))


async def _leaving(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    """Clients of a stream or a chat that wait for a moment only."""
    method = SERVICE.methods_by_name[draw.choice(("StreamCompletion", "CreateChatCompletion", "GetStatus", "Classify"))]
    asked = _wild(draw, method.input_type).SerializeToString()
    await _call(tally, "leaving", channel, method, asked, timeout_s=draw.choice((0.001, 0.01, 0.05)))


async def _no_http2(draw: random.Random, channel: grpc.aio.Channel, host: str, port: int, tally: Tally) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    content = draw.choice(
        (
            draw.randbytes(200),
            b"GET / HTTP/1.1\r\nhost: door\r\n\r\n",
            preface[: draw.randint(1, len(preface))],
            preface + draw.randbytes(draw.choice((9, 100, 20_000))),
            preface
            + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
            + b"\x00\xff\xff\x01\x04\x00\x00\x00\x01"
            + draw.randbytes(500),
        )
    )
    outcome = "silent"
    try:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(content)
            while await asyncio.wait_for(reader.read(65_536), SILENT_S):
                outcome = "answered"
            outcome = "closed"
        finally:
            writer.close()
    except TimeoutError:
        pass
    except ConnectionError as error:
        outcome = type(error).__name__
    tally.add("no HTTP/2", outcome, "the port is closed" if outcome == "ConnectionRefusedError" else "")


KINDS: tuple[Sender, ...] = (_no_message, _broken, _values, _metadata, _nowhere, _leaving, _no_http2)


def _wild(draw: random.Random, kind: Descriptor, depth: int = 0) -> Message:
    """A message with some of its fields, of values within and beyond what they may be."""
    message: Any = message_factory.GetMessageClass(kind)()
    if isinstance(message, struct_pb2.Struct):
        message.update({draw.choice(TEXTS): draw.choice(REALS[:2])})
        return message
    for one in kind.fields:
        if draw.random() < 0.5 or depth > 6:
            continue
        if one.message_type is not None and one.message_type.GetOptions().map_entry:
            inner = one.message_type.fields_by_name["value"]
            if inner.message_type is None:
                getattr(message, one.name)[draw.choice(TEXTS)] = _single(draw, inner)
        elif one.message_type is not None:
            made = [_wild(draw, one.message_type, depth + 1) for _ in range(draw.randint(1, 3))]
            if one.is_repeated:
                getattr(message, one.name).extend(made)
            else:
                getattr(message, one.name).CopyFrom(made[0])
        elif one.is_repeated:
            getattr(message, one.name).extend(_single(draw, one) for _ in range(draw.randint(0, 4)))
        else:
            setattr(message, one.name, _single(draw, one))
    if "max_tokens" in kind.fields_by_name and depth == 0:
        message.max_tokens = draw.choice((-1, 0, 1, 2))  # no long stories
    return message


def _single(draw: random.Random, one: FieldDescriptor) -> Any:
    values: dict[int, tuple[Any, ...]] = {
        FieldDescriptor.CPPTYPE_STRING: TEXTS,
        FieldDescriptor.CPPTYPE_BOOL: (True, False),
        FieldDescriptor.CPPTYPE_INT32: NUMBERS,
        FieldDescriptor.CPPTYPE_INT64: (*NUMBERS, 2**63 - 1, -(2**63)),
        FieldDescriptor.CPPTYPE_FLOAT: REALS[:2],
        FieldDescriptor.CPPTYPE_DOUBLE: REALS,
    }
    return draw.randbytes(30) if one.type == FieldDescriptor.TYPE_BYTES else draw.choice(values[one.cpp_type])


# -- what comes back ---------------------------------------------------------------------------------------------------


async def _call(
    tally: Tally,
    kind: str,
    channel: grpc.aio.Channel,
    method: MethodDescriptor | str,
    content: bytes,
    metadata: list[tuple[str, str | bytes]] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    path = method if isinstance(method, str) else f"/{SERVICE.full_name}/{method.name}"
    streams = not isinstance(method, str) and method.server_streaming
    try:
        call: Any = (channel.unary_stream if streams else channel.unary_unary)(path)(
            content, metadata=metadata, timeout=timeout_s
        )
        if streams:
            async for _ in call:
                pass
        else:
            await call
        code, text = grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError as error:
        code, text = error.code(), error.details() or ""
    except (grpc.aio.UsageError, ValueError, TypeError) as error:
        tally.add(kind, f"refused by the client ({type(error).__name__})")
        return
    in_time = code == grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s < TIMEOUT_S
    wrong = "" if code in TYPED or in_time else f"{path} was answered {code.name}: {text[:200]}"
    tally.add(kind, code.name, wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--num", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tally = send(options.host, options.port, options.num, options.seed)
    for outcome, count in sorted(tally.outcomes.items()):
        print(f"{count:6d}  {outcome}")
    for one in tally.wrong:
        print(f"WRONG  {one}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
