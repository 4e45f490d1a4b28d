"""Settings of what is told about a run: traces and logs. Metrics have none but Ray's interval (`RaySettings`).

Every process of the graph needs them, ranks too, and each is started by another hand; so they travel as one variable of
the workers' environment, written by `cluster.connect` and read here.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.tables import between
from metasepia.errors import InvalidSettings

VARIABLE = "METASEPIA_TELEMETRY"
"""In the environment of workers; not a setting by itself."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """OpenTelemetry spans of requests, over all processes. Off where neither an endpoint nor a file is given."""

    endpoint: str = ""
    """Where spans go, as OTLP over HTTP: the whole URL, `http://collector:4318/v1/traces`."""
    file: str = ""
    """A file to which spans are appended, one JSON object a line; the same path on every node."""
    sample_ratio: float = 1.0
    """Share of the requests without a `traceparent` that are traced; one that brings it decides for itself. 0 to 1."""

    @property
    def on(self) -> bool:
        return bool(self.endpoint or self.file)

    def __post_init__(self) -> None:
        between("traces", "sample_ratio", self.sample_ratio, 0, 1)
        if self.endpoint and not self.endpoint.startswith(("http://", "https://")):
            raise InvalidSettings("traces.endpoint", self.endpoint, "a URL that begins with http:// or https://")


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Lines about requests and parts: to each process's standard error, which Ray keeps in `worker-*.err`."""

    format: Literal["json", "text"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"
    """`info` has a line for each request."""
    file: str = ""
    """A file to which they are appended instead; one that is moved away is opened anew (logrotate)."""


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """What the processes of a graph need to know of it."""

    traces: TraceSettings = field(default_factory=TraceSettings)
    logs: LogSettings = field(default_factory=LogSettings)

    @property
    def environment(self) -> dict[str, str]:
        """For workers."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Telemetry":
        """As the environment says; without traces where it says nothing."""
        told = json.loads(environ.get(VARIABLE, "{}"))
        return cls(traces=TraceSettings(**told.get("traces", {})), logs=LogSettings(**told.get("logs", {})))
