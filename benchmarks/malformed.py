"""Malformed requests at both doors of a real graph: what they are answered, whether anything hangs, what memory does.

    python -m benchmarks.malformed --json benchmarks/results/malformed.json
    python -m benchmarks.malformed --num 2000 --seed 7

Of `--num` requests: three tenths JSON of wild shapes and values at every path, a fifth what schemathesis makes of the
OpenAPI document (valid and not), a fifth raw bytes on sockets (cut bodies, lying lengths, chunked nonsense, smuggling,
pipelines, upgrades, no HTTP at all), a tenth Arrow streams with bytes changed, a fifth over gRPC (`malformed_grpc`).
Then 1,000 connections that say nothing, heads that come byte by byte, and heads without an end, while others ask.
A first tenth of each warms the graph; memory is each process's own (USS), from then to the middle and the end.
"""

import asyncio
import contextlib
import io
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks import graph, malformed_grpc, report
from benchmarks.graph import Graph
from serve.contracts import CONTRACTS
from serve.requests.arrow import MEDIA_TYPE as ARROW

HANGS_S = 60.0
"""Whatever is not at its end by then hangs: requests bring a deadline of 20 s, a head has 15 s."""
DEADLINE_S = "20"
SILENT_S = 1.0
"""A raw connection that is answered nothing for so long is left; the server need not answer what is no request."""
AT_ONCE = 16
NUM_IDLE = 1000
NUM_SLOW = 40
ENVELOPE = {"message", "type", "param", "code"}

EXAMPLES = [{"text": "broke at once", "label": "bad"}, {"text": "thank you", "label": "good"}]
CHAT = {"model": "smollm2-135m", "max_tokens": 1, "temperature": 0, "seed": 1, "n": 1, "stop": ["x"], "stream": False}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/classify": {"examples": EXAMPLES, "inputs": ["a kind letter"], "seed": 0, "explain": False},
    "/v1/contexts": {"examples": EXAMPLES, "unlabelled": ["a"], "seed": 0},
    "/v1/contexts/ctx-0/examples": {"examples": EXAMPLES},
    "/v1/chat/completions": {**CHAT, "messages": [{"role": "user", "content": "hi"}], "logprobs": True},
    "/v1/completions": {**CHAT, "prompt": ["hi"], "logprobs": 1, "echo": True},
    "/v1/embeddings": {"model": "minilm-l6", "input": ["a"], "encoding_format": "float", "dimensions": 8},
    "/v1/hidden_states": {"model": "smollm2-135m", "input": ["a"], "layers": [-1], "pooling": "mean", "task": "t"},
    "/v1/mixtures": {"backbone": "smollm2-135m", "weights": {"base": 1.0}, "name": "m"},
    "/v1/mixtures/search": {"backbone": "none", "examples": [{"prompt": "a", "answer": "b"}], "population": 2},
    "/v1/tasks": {"examples": [*EXAMPLES, *EXAMPLES], "name": "t", "seed": 0, "long_texts": "refuse"},
    "/v1/tasks/compare": {"tasks": ["a", {"vector": [1.0, 2.0], "space": {}}]},
}
"""Bodies that would be answered, or nearly: what is sent is these, changed here and there."""
FIELDS = (
    *("model", "examples", "inputs", "input", "unlabelled", "encoder", "module", "protocol", "seed", "explain"),
    *("messages", "prompt", "n", "stop", "stream", "stream_options", "temperature", "top_p", "logprobs", "echo"),
    *("tools", "dispatch", "layers", "pooling", "task", "backbone", "weights", "experts", "tasks", "answers", "text"),
    *("label", "vector", "image", "role", "content", "name", "method", "dimensions", "encoding_format"),
)
TEXTS = (
    "",
    " ",
    "a",
    "smollm2-135m",
    "minilm-l6",
    "auto",
    "\x00",
    "\ud83e\udd91",
    "ctx-" + "0" * 64,
    "../..",
    "é" * 99,
)
NUMBERS = (0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, -0.0, 1e-300)


@dataclass
class Tally:
    """What became of them, by kind."""

    num: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def take(self, other: "Tally") -> None:
        self.num, self.outcomes = self.num + other.num, self.outcomes + other.outcomes
        self.wrong, self.slowest_s = self.wrong + other.wrong, max(self.slowest_s, other.slowest_s)

    def add(self, kind: str, outcome: str, seconds: float, wrong: str = "") -> None:
        self.num += 1
        self.outcomes[f"{kind}: {outcome}"] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if wrong:
            self.wrong.append(f"{kind}: {wrong}")


def judged(status: int, content_type: str, body: bytes) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if status < 400:
        return ""
    try:
        error = json.loads(body)["error"]
        typed = set(error) == ENVELOPE
    except (ValueError, KeyError, TypeError):
        return f"{status} without the envelope ({content_type}): {body[:200]!r}"
    if not typed:
        return f"{status} with another envelope: {body[:200]!r}"
    if status >= 500 and (status, error["code"]) not in ((503, "unavailable"), (504, "deadline_exceeded")):
        return f"{status} {error}"
    return ""


class Sender:
    """Sends malformed requests at one graph's HTTP door."""

    def __init__(self, url: str, tally: Tally) -> None:
        self._url, self._tally = url, tally
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def all_of(self, kind: Callable[[random.Random, httpx.AsyncClient], Awaitable[None]], draws: Sequence[int]):
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=self._url, timeout=HANGS_S, limits=limits) as client:

            async def one(own: int) -> None:
                async with self._turns:
                    await kind(random.Random(own), client)

            await asyncio.gather(*map(one, draws))

    async def bodies(self, draw: random.Random, client: httpx.AsyncClient) -> None:
        """JSON of wild shapes, now and then cut or with bytes changed."""
        path = draw.choice(list(GOOD))
        fields: dict[str, Any] = {name: _changed(draw, value) for name, value in GOOD[path].items()}
        if draw.random() < 0.3:
            fields |= {name: _wild(draw) for name in draw.sample(FIELDS, draw.randint(1, 4))}
        if "max_tokens" in GOOD[path]:
            fields |= {"max_tokens": draw.choice((1, 2, 0, -1, "1", 2.5))}  # no long stories
        content = bytearray(json.dumps(fields if draw.random() < 0.95 else _wild(draw)).encode())
        if draw.random() < 0.2:
            content = content[: draw.randrange(len(content) + 1)]
        if content and draw.random() < 0.2:
            content[draw.randrange(len(content))] = draw.randrange(256)
        kind = draw.choice((*["application/json"] * 8, "text/plain", "", ARROW, "multipart/form-data"))
        await self._ask(client, "JSON", "POST", path, {"content-type": kind}, bytes(content))

    async def columns(self, draw: random.Random, client: httpx.AsyncClient) -> None:
        content = bytearray(_stream(draw))
        for _ in range(draw.randint(0, 6)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        if draw.random() < 0.3:
            content = content[: draw.randrange(len(content))]
        path = draw.choice(("/v1/classify", "/v1/contexts", "/v1/embeddings", "/v1/hidden_states"))
        await self._ask(client, "Arrow", "POST", path, {"content-type": ARROW}, bytes(content))

    async def _ask(
        self, client: httpx.AsyncClient, kind: str, method: str, path: str, headers: dict[str, str], content: bytes
    ) -> None:
        headers = headers | {"x-request-timeout-seconds": DEADLINE_S}
        begin = time.monotonic()
        try:
            answer = await client.request(method, path, content=content, headers=headers)
        except httpx.LocalProtocolError:
            self._tally.add(kind, "not sent: no client would", 0.0)
            return
        except httpx.HTTPError as error:
            wrong = f"{method} {path}: {type(error).__name__} {error}"
            self._tally.add(kind, type(error).__name__, time.monotonic() - begin, wrong)
            return
        wrong = judged(answer.status_code, answer.headers.get("content-type", ""), answer.content)
        said = f"{method} {path} {content[:200]!r}: {wrong}" if wrong else ""
        self._tally.add(kind, str(answer.status_code), time.monotonic() - begin, said)

    async def case(self, client: httpx.AsyncClient, asked: "Asked") -> None:
        async with self._turns:
            await self._ask(client, "schema", asked.method, asked.path, asked.headers, asked.content)

    async def sockets(self, draw: random.Random, client: httpx.AsyncClient) -> None:
        """Bytes, as they are. Silence and a closed connection are answers too."""
        begin, got, outcome = time.monotonic(), b"", "closed"
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(_bytes(draw))
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                if draw.random() < 0.3:
                    writer.write_eof()
                while piece := await asyncio.wait_for(reader.read(65536), SILENT_S):
                    got += piece
            finally:
                writer.close()
        except TimeoutError:
            outcome = "silent"
        except OSError as error:
            outcome = type(error).__name__
        wrong = "the port is closed" if outcome == "ConnectionRefusedError" else ""
        if got:
            head, _, body = got.partition(b"\r\n\r\n")
            outcome = head.split(b" ")[1].decode("ascii", "replace") if head.startswith(b"HTTP/") else "no HTTP"
            length = re.search(rb"content-length: *(\d+)", head.lower())
            if outcome.isdigit() and length and len(body) >= int(length[1]):
                wrong = judged(int(outcome), "", body[: int(length[1])])
        self._tally.add("bytes", outcome, time.monotonic() - begin, wrong)

    async def idle(self) -> tuple[float, int]:
        """The slowest of twenty good requests while NUM_IDLE connections say nothing and NUM_SLOW dribble; and how many
        of those had been ended by the server after a head's time.
        """
        streams = [await asyncio.open_connection(self._host, self._port) for _ in range(NUM_IDLE)]
        slow = [asyncio.create_task(self._dribble(i)) for i in range(NUM_SLOW)]
        slowest_s = 0.0
        async with httpx.AsyncClient(base_url=self._url, timeout=HANGS_S) as client:
            for _ in range(20):
                begin = time.monotonic()
                (await client.get("/v1/models")).raise_for_status()
                slowest_s = max(slowest_s, time.monotonic() - begin)
        ended = 0
        for reader, writer in streams:
            with contextlib.suppress(TimeoutError, ConnectionError):
                ended += await asyncio.wait_for(reader.read(1), HANGS_S) == b""
            writer.close()
        await asyncio.gather(*slow)
        return slowest_s, ended

    async def _dribble(self, number: int) -> None:
        """A head byte by byte, or one that never ends; over when the server says so."""
        begin, outcome = time.monotonic(), "not ended"
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(b"GET /version HTTP/1.1\r\nhost: x\r\n")
            piece = b"a" if number % 2 else b"x: " + b"a" * 4000 + b"\r\n"
            while time.monotonic() - begin < HANGS_S:
                writer.write(piece)
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    if answer := await asyncio.wait_for(reader.read(65536), 0.3):
                        outcome = answer.split(b" ")[1].decode()
                    else:
                        outcome = "closed"
                    break
        except ConnectionError:
            outcome = "closed"
        finally:
            writer.close()
        wrong = "" if outcome in ("408", "431", "closed") else f"a head that never ends: {outcome}"
        self._tally.add("dribbled" if number % 2 else "endless head", outcome, 0.0, wrong)


# -- what is sent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request of schemathesis's."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes


def of_document(url: str, num: int, seed: int) -> list[Asked]:
    """What schemathesis makes of the document: valid requests and others, in turn over all operations."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from schemathesis.generation import GenerationMode

    slow = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
    quick = settings(database=None, deadline=None, phases=[Phase.generate], suppress_health_check=slow)
    found: list[Asked] = []
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [document.find_operation_by_id(name) for name in CONTRACTS]
    each = -(-num // (len(operations) * 2))
    for operation in operations:
        for mode in GenerationMode:

            @seeded(seed)
            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(quick, max_examples=each)
            def gather(case: Any) -> None:
                with contextlib.suppress(Exception):  # a header or URL that no client would send
                    made = httpx.Request(**_as_httpx(case, url))
                    if made.headers.get("content-length", "0") != "0" or not made.content:
                        found.append(Asked(made.method, made.url.raw_path.decode(), _sent(made), made.read()))

            gather()
    random.Random(seed).shuffle(found)
    return found[:num]


def _as_httpx(case: Any, url: str) -> dict[str, Any]:
    asked = case.as_transport_kwargs(base_url=url)
    names = ("method", "url", "params", "headers", "json", "files", "data", "content")
    return {name: asked[name] for name in names if asked.get(name) is not None}


def _sent(made: httpx.Request) -> dict[str, str]:
    return {name: value for name, value in made.headers.items() if name not in ("host", "content-length", "connection")}


def _wild(draw: random.Random, depth: int = 0) -> Any:
    roll = draw.random()
    if depth > 4 or roll < 0.45:
        return draw.choice((None, True, False, draw.choice(TEXTS), draw.choice(NUMBERS)))
    if roll < 0.7:
        return [_wild(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    return {draw.choice(FIELDS): _wild(draw, depth + 1) for _ in range(draw.randint(0, 4))}


def _changed(draw: random.Random, good: Any) -> Any:
    """The same with now and then another value, a field less, or an item more."""
    if draw.random() < 0.12:
        return _wild(draw, 3)
    if isinstance(good, dict):
        return {name: _changed(draw, value) for name, value in good.items() if draw.random() < 0.95}
    if isinstance(good, list):
        items = [_changed(draw, value) for value in good if draw.random() < 0.95]
        return items * draw.choice((1, 1, 1, 1, 7)) + ([_wild(draw)] if draw.random() < 0.05 else [])
    return good


def _stream(draw: random.Random) -> bytes:
    import pyarrow as pa

    num = draw.randint(0, 6)
    columns: dict[str, Any] = {"text": [draw.choice(("a", "b c", "")) for _ in range(num)]}
    if draw.random() < 0.3:
        columns = {"vector": pa.array([[draw.random()] * 3] * num, pa.list_(pa.float32(), 3))}
    columns["label"] = pa.array([draw.choice(("x", "y", None)) for _ in range(num)], pa.string())
    table = pa.table(columns).replace_schema_metadata({"metasepia": json.dumps({"seed": draw.choice((1, -1, "x"))})})
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=draw.choice((None, None, "zstd")))
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _bytes(draw: random.Random) -> bytes:
    body = json.dumps({"inputs": ["a"], "examples": [{"text": "b", "label": "c"}]}).encode()
    methods = (*b"POST POST POST GET GET HEAD OPTIONS TRACE PUT BREW post CONNECT".split(), b"")
    paths = (
        *(
            b"/v1/classify",
            b"/v1/classify",
            b"/version",
            b"/",
            b"//",
            b"/%00",
            b"/%zz",
            b"*",
            b"",
            b"/\xff",
            b"/-/routes",
        ),
        *(b"/v1/models/" + b"a" * 9000, b"http://x/version", b"/v1/contexts?limit=%ff", b"/../../etc/passwd"),
        *(b"/v1/experts/%2e%2e", b"/docs/..%2fx"),
    )
    versions = (*[b"HTTP/1.1"] * 6, b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"http/1.1")
    line = b" ".join(map(draw.choice, (methods, paths, versions))) + b"\r\n"
    heads = draw.sample((
        b"host: x", b"host: x", b"host: a\r\nhost: b", b"content-type: application/json", b"expect: 100-continue",
        b"content-length: %d" % len(body), b"content-length: 5", b"content-length: 99999999999999999999",
        b"content-length: -1", b"content-length: 7\r\ncontent-length: 8", b"content-length: +5", b"connection: close",
        b"transfer-encoding: chunked", b"transfer-encoding: chunked, identity", b"transfer-encoding: xchunked",
        b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: AAAA\r\nsec-websocket-version: 13",
        b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAAA", b"content-encoding: gzip",
        b"bad header", b": empty", b"na\x00me: x", b"folded: a\r\n b", b"x: \xff\xfe", b"x-request-timeout-seconds: x",
        b"idempotency-key: " + b"k" * 300, b"x-request-id: a\tb", b"authorization: " + b"x" * 9000, b"range: bytes=0-",
    ), draw.choice((0, 1, 1, 2, 2, 3, 6)))  # fmt: skip
    content = draw.choice((
        body, body[: len(body) // 2], b"", b"ZZ\r\n" + body, b"5\r\nabcde\r\n0\r\n\r\n", b"ffffffffffffffff\r\na",
        b"0\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\n\r\n", draw.randbytes(300), b"-1\r\n", body + body,
        b"5;ext=" + b"a" * 9000 + b"\r\nabcde\r\n0\r\ntrailer: x\r\n\r\n",
    ))  # fmt: skip
    made = line + b"".join(head + b"\r\n" for head in heads) + draw.choice((b"\r\n", b"\r\n", b"", b"\n\n")) + content
    whole = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
    return draw.choice((
        made, made, made, made, whole * draw.randint(2, 40), whole + made, draw.randbytes(draw.randint(1, 2000)),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(100), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        made[: draw.randint(0, len(made))],
    ))  # fmt: skip


# -- one run -----------------------------------------------------------------------------------------------------------


async def _http(url: str, num: int, seed: int, tally: Tally) -> None:
    rng, sender = random.Random(seed), Sender(url, tally)
    counts = {sender.bodies: 3 * num // 10, sender.columns: num // 10, sender.sockets: num // 5}
    for kind, count in counts.items():
        await sender.all_of(kind, [rng.getrandbits(64) for _ in range(count)])
    cases = await asyncio.to_thread(of_document, url, num // 5, seed)
    async with httpx.AsyncClient(base_url=url, timeout=HANGS_S, limits=httpx.Limits(max_connections=AT_ONCE)) as client:
        await asyncio.gather(*(sender.case(client, one) for one in cases))


def sent(url: str, num: int, seed: int) -> Tally:
    """What became of those of `num` that go over HTTP."""
    tally = Tally()
    asyncio.run(_http(url, num, seed, tally))
    return tally


def _memory_mib(running: Graph) -> dict[str, float]:
    """By process; Ray's own titles change with what a process does, so its class alone names it."""
    found: dict[str, float] = {}
    for name, process in running.processes().items():
        with contextlib.suppress(psutil.Error):
            found[f"{name.split('.')[0]} {process.pid}"] = process.memory_full_info().uss / 2**20
    return found


def measured(num: int, seed: int) -> tuple[list[report.Row], list[str]]:
    """The rows, and what went wrong in words."""
    with graph.running() as running:
        settings = running.settings
        sent(running.url, num // 10, seed + 1)
        malformed_grpc.send(settings.grpc_host, settings.grpc.port, num // 50, seed + 1)
        time.sleep(3)
        before, begin = _memory_mib(running), time.monotonic()
        tally, grpc, middle = Tally(), malformed_grpc.Tally(), before
        for half in range(2):
            middle = _memory_mib(running) if half else before
            tally.take(sent(running.url, num // 2, seed + 2 + half))
            more = malformed_grpc.send(settings.grpc_host, settings.grpc.port, num // 10, seed + 2 + half)
            grpc.num, grpc.outcomes, grpc.wrong = (
                grpc.num + more.num,
                grpc.outcomes + more.outcomes,
                grpc.wrong + more.wrong,
            )
        slowest_s, ended = asyncio.run(Sender(running.url, tally).idle())
        took_s = time.monotonic() - begin
        healthy = httpx.get(f"{running.url}/health", timeout=60).status_code == 200
        time.sleep(3)
        after = _memory_mib(running)
    wrong = tally.wrong + grpc.wrong + ([] if healthy else ["the graph is not healthy afterwards"])
    outcomes = dict(sorted((tally.outcomes + grpc.outcomes).items()))
    grew = {name: after[name] - before[name] for name in before if name in after}
    most = max(grew, key=lambda name: grew[name])
    gone = [name for name in before if name not in after]
    rows = [
        report.figure("sent", "malformed requests, HTTP and gRPC", tally.num + grpc.num, "requests",
                      f"in {took_s:.0f} s, {AT_ONCE} at once", extra={"outcomes": outcomes}),
        report.figure("wrong", "5xx but typed 503 and 504, answers without the envelope, connections that broke",
                      len(wrong), "requests", "; ".join(wrong)[:300]),
        report.figure("slowest", "the longest that any took to its end", tally.slowest_s, "s",
                      f"their deadline is {DEADLINE_S} s"),
        report.figure("idle", f"slowest of 20 good requests beside {NUM_IDLE} silent connections and {NUM_SLOW} slow "
                      "heads", 1000 * slowest_s, "ms", f"{ended} of the silent were ended by the server"),
        report.figure("memory_second_half", "growth of all processes' own memory over the second half",
                      sum(after[name] - middle[name] for name in middle if name in after), "MiB"),
        report.figure("memory", "growth of all processes' own memory", sum(grew.values()), "MiB",
                      f"{sum(before.values()):.0f} before; most: {most} {grew[most]:+.1f}; gone: {gone or 'none'}",
                      extra={"grew_mib": {name: round(mib, 2) for name, mib in sorted(grew.items())}}),
    ]  # fmt: skip
    return rows, wrong


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started_on = report.machine()
    rows, wrong = measured(options.num, options.seed)
    report.publish("malformed", rows, json_file=options.json, started_on=started_on)
    for one in wrong[:40]:
        print("WRONG", one)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
