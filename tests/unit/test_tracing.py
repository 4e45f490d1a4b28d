"""Spans: of one request over its parts, of batches over their requests, and none at no cost while they are off."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from actors import tracing
from actors.encoder import Encoder
from actors.messages import Classify, LabelledVectors, Texts
from actors.reasoning_pool import ReasoningPool
from actors.row_meters import RowMeters
from cluster.meter_settings import VARIABLE, LogSettings, Telemetry, TraceSettings
from cluster.settings import BackboneSettings, EncoderSettings, ReasoningSettings
from metasepia.decoding.scheduling import Scheduler
from metasepia.errors import InvalidSettings
from metasepia.rows import Row
from serve.parts import traced as with_span
from tests.doors import Bench
from tests.spans import CLIENT, OTHER_CLIENT, read, traced
from tests.unit.test_prompts import write_byte_tokenizer
from tests.unit.test_scheduling import LIMITS, PREPARED, CountingDecoder, row

TRACE, OTHER_TRACE = (one.split("-")[1] for one in (CLIENT, OTHER_CLIENT))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    write_byte_tokenizer(tmp_path)
    return Bench(tmp_path)


def test_nothing_is_made_while_traces_are_off(bench: Bench):
    assert tracing.traceparent() is None and tracing.trace_id() is None
    assert tracing.span("a") is tracing.span("b") is tracing.request_span("c", CLIENT)
    assert tracing.record("a", CLIENT, 1.0, 2.0) is None and tracing.batch("a", [CLIENT], 1.0, 2.0) is None
    assert with_span(message := row("a")) is message
    bench.says("x")
    assert "traceresponse" not in bench.chat().headers and bench.backbone.rows[-1].traceparent is None


def test_a_request_goes_on_in_its_clients_trace_and_its_rows_carry_it(bench: Bench, tmp_path: Path):
    bench.says("x")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with traced(tmp_path / "spans"):
        response = bench.post("/v1/chat/completions", body, traceparent=CLIENT)
        bench.post("/v1/chat/completions", {**body, "model": "nobody"}, traceparent=OTHER_CLIENT)
    spans = read(tmp_path / "spans")
    one, refused = (span for span in spans if span.name.startswith("POST"))
    resolves = [span for span in spans if span.name == "resolve"]
    assert [(span.trace_id, span.failed) for span in resolves] == [(TRACE, False), (OTHER_TRACE, True)]
    assert "nobody" not in (tmp_path / "spans").read_text()  # errors are told by their class
    assert (one.name, one.trace_id, one.parent_id) == ("POST /v1/chat/completions", TRACE, CLIENT.split("-")[2])
    assert one.attributes["status"] == 200 and one.attributes["answer_tokens"] == 1
    assert response.headers["traceresponse"] == f"00-{TRACE}-{one.span_id}-01"
    assert (refused.trace_id, refused.attributes["reason"], refused.failed) == (OTHER_TRACE, "model_not_found", False)


def test_messages_carry_the_span_that_sends_them_and_are_equal_without_it(tmp_path: Path):
    with traced(tmp_path / "spans"), tracing.request_span("request", CLIENT):
        with tracing.span("inner"):
            sent = with_span(row("a"))
            assert sent.traceparent == tracing.traceparent()
        assert with_span(sent) is sent and sent == row("a")
    inner, outer = read(tmp_path / "spans")
    assert sent.traceparent == f"00-{TRACE}-{inner.span_id}-01" and inner.parent_id == outer.span_id


def test_a_share_of_the_requests_is_traced_and_those_that_ask_for_it(bench: Bench, tmp_path: Path):
    bench.says("x")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with traced(tmp_path / "spans", sample_ratio=0.0):
        for _ in range(5):
            assert "traceresponse" not in bench.post("/v1/chat/completions", body).headers
        bench.post("/v1/chat/completions", body, traceparent=CLIENT)
        bench.post("/v1/chat/completions", body, traceparent=CLIENT[:-1] + "0")  # the client: not this one
    assert [span.trace_id for span in read(tmp_path / "spans") if span.name.startswith("POST")] == [TRACE]


@pytest.mark.parametrize("header", ["", "garbage", "00-zz-1-01", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "x" * 5000])
def test_a_traceparent_that_makes_no_sense_begins_a_new_trace(bench: Bench, tmp_path: Path, header: str):
    with traced(tmp_path / "spans"):
        assert bench.run(lambda client: client.get("/v1/models", headers={"traceparent": header})).status_code == 200
    (span,) = (one for one in read(tmp_path / "spans") if one.name == "GET /v1/models")
    assert span.parent_id is None and span.trace_id != TRACE


def test_pages_that_machines_ask_for_again_and_again_are_not_traced(bench: Bench, tmp_path: Path):
    with traced(tmp_path / "spans"):
        for path in ("/health", "/metrics", "/version", "/v1/status"):
            bench.run(lambda client, path=path: client.get(path, headers={"traceparent": CLIENT}))
    assert read(tmp_path / "spans") == []


def test_a_batch_of_the_encoder_is_linked_to_all_its_requests(tmp_path: Path):
    encoder = Encoder(EncoderSettings(id="slow", source="none", cache_mib=0), _Slow())  # pyright: ignore[reportArgumentType]
    try:

        async def ask(traceparent: str | None) -> np.ndarray:
            texts = Texts(encoder="e" * 64, texts=("a", "bb"), deadline_unix_s=2e9, traceparent=traceparent)
            return await encoder.embed(texts)

        async def main() -> None:
            first = asyncio.create_task(ask(None))  # the others wait behind it, and go together
            await asyncio.sleep(0.05)
            await asyncio.gather(first, ask(CLIENT), ask(OTHER_CLIENT), ask(None))

        with traced(tmp_path / "spans"):
            asyncio.run(main())
    finally:
        encoder.stop()
    spans = read(tmp_path / "spans")
    (batch,) = (one for one in spans if one.name == "encoder batch")
    assert {trace for trace, _ in batch.links} == {TRACE, OTHER_TRACE}
    assert batch.attributes["items"] == 6 and batch.trace_id not in (TRACE, OTHER_TRACE)
    own = [one for one in spans if one.name == "encoder"]
    assert {one.trace_id for one in own} == {TRACE, OTHER_TRACE}
    assert all(one.links == ((batch.trace_id, batch.span_id),) for one in own)
    assert sorted(one.trace_id for one in spans if one.name == "encoder queue") == [TRACE, OTHER_TRACE]


class _Slow:
    """An encoder of texts whose forward takes a while."""

    digest, width, window, dtype, device, max_batch_tokens = "e" * 64, 2, 8, "float32", "cpu", 64

    def tokenize(self, items: tuple[str, ...]) -> list[list[int]]:
        return [[1] * len(one) for one in items]

    def plan(self, lengths: list[int]) -> list[list[int]]:
        return [list(range(len(lengths)))] if lengths else []

    def forward(self, prepared: list[list[int]]) -> np.ndarray:
        threading.Event().wait(0.15)
        return np.ones((len(prepared), 2), np.float32)


def test_a_batch_is_traced_where_one_of_its_requests_is_whatever_the_ratio(tmp_path: Path):
    with traced(tmp_path / "spans", sample_ratio=0.0):
        made = tracing.batch("encoder", [None, CLIENT], 1.0, 2.0)
    assert made is not None
    batch, own = read(tmp_path / "spans")
    assert (own.trace_id, own.links) == (TRACE, ((batch.trace_id, batch.span_id),))


def test_queries_of_two_requests_are_one_batch_of_the_pool(tmp_path: Path):
    pool = ReasoningPool(ReasoningSettings(modules=("default",)))
    vectors = np.eye(4, 8, dtype=np.float32)
    labelled = LabelledVectors(digest="c" * 64, vectors=vectors, labels=("a", "b", "a", "b"))

    async def ask(traceparent: str) -> None:
        asked = Classify(
            module=pool.digest, context=labelled, queries=vectors[:2], deadline_unix_s=2e9, traceparent=traceparent
        )
        await pool.classify(asked)

    async def main() -> None:
        await asyncio.gather(ask(CLIENT), ask(OTHER_CLIENT))

    try:
        with traced(tmp_path / "spans"):
            asyncio.run(main())
    finally:
        pool.stop()
    spans = read(tmp_path / "spans")
    linked = {trace for one in spans if one.name == "reasoning batch" for trace, _ in one.links}
    assert linked == {TRACE, OTHER_TRACE}
    assert {one.trace_id for one in spans if one.name == "reasoning"} == linked
    assert sum(one.name == "compile context" for one in spans) == 1


def test_a_row_is_followed_through_its_queue_its_prompt_and_its_batches(tmp_path: Path):
    decoder = CountingDecoder(seconds_per_token=0.01)
    watcher = RowMeters(BackboneSettings(id="tiny", source="none"))
    scheduler = Scheduler(decoder.run, LIMITS, PREPARED, watcher=watcher, clock=lambda: decoder.now)
    watcher.follow(scheduler)
    with traced(tmp_path / "spans"):
        for name, header, tokens in (("a", CLIENT, 4), ("b", OTHER_CLIENT, 6), ("c", None, 6)):
            asked = row(name, max_tokens=tokens)
            scheduler.submit(Row(**{**vars(asked), "traceparent": header}), lambda _: None)
        while scheduler.step():
            pass
    spans = read(tmp_path / "spans")
    (prefill,) = (one for one in spans if one.name == "prefill batch")
    assert {trace for trace, _ in prefill.links} == {TRACE, OTHER_TRACE} and prefill.attributes["rows"] == 3
    batches = {(one.trace_id, one.span_id): one for one in spans if one.name == "decode batch"}
    assert [len(one.links) for one in batches.values()] == [2, 1]  # a left, b went on
    decodes = {one.trace_id: one for one in spans if one.name == "decode"}
    assert set(decodes[TRACE].links) < set(decodes[OTHER_TRACE].links) == set(batches)
    assert (decodes[TRACE].attributes["tokens"], decodes[TRACE].attributes["outcome"]) == (4, "length")
    assert {one.trace_id for one in spans if one.name == "queued"} == {TRACE, OTHER_TRACE}
    assert watcher._batches == {} and watcher._batch is None


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP collector over HTTP: its URL, and what it was sent."""
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
    server.shutdown()


def test_spans_go_to_a_collector_as_otlp(collector: tuple[str, list[ExportTraceServiceRequest]]):
    url, got = collector
    tracing.configure(TraceSettings(endpoint=url))
    with tracing.request_span("request", CLIENT) as opened:
        opened.rename("POST /v1/classify")
        tracing.batch("encoder", [tracing.traceparent()], 1.0, 2.0, items=3)
    tracing.flush()
    tracing.configure(TraceSettings())
    spans = [
        span for one in got for resource in one.resource_spans for scope in resource.scope_spans for span in scope.spans
    ]
    assert {one.name for one in spans} == {"POST /v1/classify", "encoder batch", "encoder"}
    batch = next(one for one in spans if one.name == "encoder batch")
    assert [one.trace_id.hex() for one in batch.links] == [TRACE]
    assert batch.end_time_unix_nano - batch.start_time_unix_nano == 10**9


def test_a_collector_that_is_away_costs_no_request(bench: Bench):
    tracing.configure(TraceSettings(endpoint="http://127.0.0.1:1/v1/traces"))
    try:
        bench.says("x")
        assert bench.chat().status_code == 200
    finally:
        tracing.configure(TraceSettings())


def test_a_file_that_cannot_be_written_is_told_and_costs_no_request(bench: Bench, caplog: pytest.LogCaptureFixture):
    with traced(Path("/nowhere/at/all.spans")):
        bench.says("x")
        assert bench.chat().status_code == 200 and tracing.traceparent() is None
    assert "/nowhere/at/all.spans" in caplog.text


def test_workers_are_told_by_their_environment():
    told = Telemetry(traces=TraceSettings(file="/tmp/spans", sample_ratio=0.5), logs=LogSettings(format="text"))
    assert Telemetry.of(told.environment) == told
    assert json.loads(told.environment[VARIABLE])["traces"]["sample_ratio"] == 0.5
    assert Telemetry.of({}) == Telemetry() and not Telemetry.of({}).traces.on


@pytest.mark.parametrize(
    "fields", [{"sample_ratio": 1.1}, {"sample_ratio": float("nan")}, {"endpoint": "collector:4318"}]
)
def test_settings_of_traces_have_ranges(fields: dict[str, object]):
    with pytest.raises(InvalidSettings, match="traces"):
        TraceSettings(**fields)  # pyright: ignore[reportArgumentType]
