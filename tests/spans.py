"""Spans that a test may read: traces on, into a file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors import tracing
from cluster.meter_settings import TraceSettings

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER_CLIENT = "00-1bf7651916cd43dd8448eb211c80319c-c7ad6b7169203331-01"


@dataclass(frozen=True)
class Read:
    """One span of a file."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    links: tuple[tuple[str, str], ...]
    """(trace, span) of each."""
    attributes: dict[str, Any]
    process: str
    failed: bool


def read(file: Path) -> list[Read]:
    """In the order in which they ended, process by process."""
    return [_read(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def _read(tree: dict[str, Any]) -> Read:
    return Read(
        name=tree["name"],
        trace_id=tree["context"]["trace_id"].removeprefix("0x"),
        span_id=tree["context"]["span_id"].removeprefix("0x"),
        parent_id=tree["parent_id"] and tree["parent_id"].removeprefix("0x"),
        links=tuple((one["context"]["trace_id"][2:], one["context"]["span_id"][2:]) for one in tree["links"]),
        attributes=tree["attributes"],
        process=tree["resource"]["attributes"]["service.instance.id"],
        failed=tree["status"]["status_code"] == "ERROR",
    )


@contextmanager
def traced(file: Path, **settings: Any) -> Iterator[None]:
    """Traces of this process go to the file, all of them by its end; off afterwards."""
    tracing.configure(TraceSettings(file=str(file), **settings))
    try:
        yield
    finally:
        tracing.flush()
        tracing.configure(TraceSettings())
