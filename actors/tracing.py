"""Spans of one request over all processes (OpenTelemetry), off unless the settings give them a place to go.

A request's span begins at the gateway, with the client's W3C `traceparent` where it brings one. Messages carry the
traceparent of the span that sent them, so the spans of other processes are its children. A batch is a span of its own
trace, linked to the spans of all its requests; each of these has a child that is linked back. While traces are off, or
a request is not sampled, `traceparent()` is None and nothing is made of it anywhere.
"""

import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cluster.meter_settings import Telemetry, TraceSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import Link, Span, Tracer

logger = logging.getLogger(__name__)

Value = str | bool | int | float
P = ParamSpec("P")
T = TypeVar("T")

MAX_LINKS = 128
"""Of one span, the newest: OpenTelemetry keeps no more."""
_FLUSH_MS = 1000
_EXPORT_S = 2.0
"""Tries of one export, all together; then its spans are lost."""


class _Nothing:
    """Stands for a span where there is none."""

    traceparent: str | None = None

    def set(self, **attributes: Value) -> None: ...

    def rename(self, name: str) -> None: ...

    def failed(self, reason: str) -> None: ...

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None: ...


NOTHING = _Nothing()


class Spanning:
    """A span that is open; the current one of this task while it is entered."""

    def __init__(self, span: "Span") -> None:
        self._span = span
        self.traceparent = _header(span)

    def set(self, **attributes: Value) -> None:
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def failed(self, reason: str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, reason)


Opened = contextlib.AbstractContextManager[Spanning | _Nothing]


def span(name: str, **attributes: Value) -> Opened:
    """A child of this task's current span; nothing where there is none."""
    if (tracer := _tracer()) is None or traceparent() is None:
        return NOTHING
    return _opened(tracer, name, None, attributes)


def spanned(name: str) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
    """Each call of a coroutine function is a `span` of this name."""

    def wrap(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @functools.wraps(function)
        async def called(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return await function(*args, **kwargs)

        return called

    return wrap


def request_span(name: str, traceparent: str | None, **attributes: Value) -> Opened:
    """The first span of a request here: a child of the client's, by its header, or the root of a trace."""
    if (tracer := _tracer()) is None:
        return NOTHING
    return _opened(tracer, name, _context(traceparent), attributes)


def record(
    name: str,
    parent: str | None,
    begin_unix_s: float,
    end_unix_s: float,
    links: Iterable[str | None] = (),
    **attributes: Value,
) -> str | None:
    """A span that has ended, a child of a message's; its traceparent. Nothing where `parent` is None."""
    if parent is None or (tracer := _tracer()) is None:
        return None
    return _recorded(tracer, name, parent, begin_unix_s, end_unix_s, links, attributes)


def linked_span(
    name: str, traceparents: Iterable[str | None], begin_unix_s: float, end_unix_s: float, **attributes: Value
) -> str | None:
    """A batch that has ended: a trace of its own, linked to the spans of all its requests; nothing where none of them
    is traced.
    """
    traced = [one for one in traceparents if one is not None]
    if not traced or (tracer := _tracer()) is None:
        return None
    return _recorded(tracer, name, None, begin_unix_s, end_unix_s, traced, attributes)


def batch(
    name: str, traceparents: Iterable[str | None], begin_unix_s: float, end_unix_s: float, **attributes: Value
) -> str | None:
    """`linked_span`, and in the trace of each of its requests a child that is linked back."""
    traced = {one: None for one in traceparents if one is not None}
    made = linked_span(f"{name} batch", traced, begin_unix_s, end_unix_s, **attributes)
    if made is not None:
        for one in traced:
            record(name, one, begin_unix_s, end_unix_s, [made])
    return made


def traceparent() -> str | None:
    """Of this task's current span, as messages and headers carry it; None where it has none or is not sampled."""
    if _tracer() is None:
        return None
    from opentelemetry import trace

    return _header(trace.get_current_span())


def trace_id() -> str | None:
    """Of this task's current span, for logs."""
    header = traceparent()
    return None if header is None else header.split("-")[1]


def flush() -> None:
    """Sends what is kept; for ends of processes and tests."""
    if (provider := _provider()) is not None:
        provider.force_flush()


def configure(settings: TraceSettings) -> None:
    """In place of what the environment says; before the first span, or in tests."""
    with contextlib.suppress(KeyError):
        if (provider := _made.pop("provider")) is not None:
            provider.shutdown()
    _made["provider"] = _make(settings)
    _tracer.cache_clear()


_made: dict[str, "TracerProvider | None"] = {}


def _provider() -> "TracerProvider | None":
    if "provider" not in _made:
        _made["provider"] = _make(Telemetry.of().traces)
    return _made["provider"]


@functools.cache
def _tracer() -> "Tracer | None":
    provider = _provider()
    return None if provider is None else provider.get_tracer("metasepia")


def _make(settings: TraceSettings) -> "TracerProvider | None":
    if not settings.on:
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    from actors.recording import replica

    exporters: list[SpanExporter] = []
    if settings.endpoint:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporters.append(OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT_S))
    if settings.file:
        try:
            lines = open(settings.file, "a", buffering=1)  # noqa: SIM115  as long as the process lives
        except OSError as error:  # traces are no reason for a part not to start
            logger.error("no spans are written: %s", error)
        else:
            exporters.append(ConsoleSpanExporter(out=lines, formatter=lambda one: one.to_json(indent=None) + "\n"))
    if not exporters:
        return None
    provider = TracerProvider(
        sampler=_sampler(settings.sample_ratio),
        resource=Resource.create({"service.name": "metasepia", "service.instance.id": replica()}),
    )
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_FLUSH_MS))
    return provider


def _sampler(ratio: float) -> "Sampler":
    """By the client's word, or by chance; a batch where one of its requests is traced."""
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBasedTraceIdRatio, Sampler, SamplingResult

    class Sampled(Sampler):
        def __init__(self) -> None:
            self._requests = ParentBasedTraceIdRatio(ratio)

        def should_sample(
            self,
            parent_context: Any,
            trace_id: int,
            name: str,
            kind: Any = None,
            attributes: Any = None,
            links: Any = None,
            trace_state: Any = None,
        ) -> SamplingResult:
            by = ALWAYS_ON if links else self._requests
            return by.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

        def get_description(self) -> str:
            return f"requests: {self._requests.get_description()}; batches: by their links"

    return Sampled()


@contextlib.contextmanager
def _opened(
    tracer: "Tracer", name: str, context: "Context | None", attributes: Mapping[str, Value]
) -> Iterator[Spanning]:
    """An error is told by its class alone: its text may hold what a client sent."""
    with tracer.start_as_current_span(
        name, context, attributes=dict(attributes), record_exception=False, set_status_on_exception=False
    ) as opened:
        spanning = Spanning(opened)
        try:
            yield spanning
        except Exception as error:
            spanning.failed(type(error).__name__)
            raise


def _recorded(
    tracer: "Tracer",
    name: str,
    parent: str | None,
    begin_unix_s: float,
    end_unix_s: float,
    links: Iterable[str | None],
    attributes: Mapping[str, Value],
) -> str | None:
    made = tracer.start_span(
        name,
        _context(parent),
        links=_links([one for one in links if one is not None][-MAX_LINKS:]),
        start_time=int(begin_unix_s * 1e9),
        attributes=dict(attributes),
    )
    made.end(int(end_unix_s * 1e9))
    return _header(made)


def _context(header: str | None) -> "Context":
    """Of a header; an empty one, so a new trace, where it is None or makes no sense."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": header} if header else {}, Context())


def _links(headers: Iterable[str]) -> "list[Link]":
    from opentelemetry import trace

    return [trace.Link(trace.get_current_span(_context(one)).get_span_context()) for one in headers]


def _header(one: "Span") -> str | None:
    context = one.get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
