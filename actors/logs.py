"""Log lines of our own loggers in every process: one JSON object each, or text, as the settings say.

Only in processes that a graph started: they have the settings in their environment (`cluster/meter_settings.py`).
"""

import datetime
import json
import logging
import logging.handlers
import os
from contextvars import ContextVar
from typing import Any

from actors import tracing
from cluster.meter_settings import VARIABLE, LogSettings, Telemetry

LOGGERS = ("metasepia", "cluster", "actors", "serve", "jobs")
"""And all below them."""

ABOUT: ContextVar[dict[str, Any]] = ContextVar("about", default={})  # noqa: B039  never changed in place
"""Fields of every line that this task and those it starts write: the request's id."""
FACTS = "facts"
"""`logger.info("...", extra={FACTS: {...}})`: fields beside the message."""


def begin() -> None:
    """Sets our loggers up, where this process is a graph's. Calling it again does nothing."""
    if VARIABLE in os.environ:
        set_up(Telemetry.of().logs)


def set_up(settings: LogSettings) -> None:
    """As `begin`, whatever the environment says."""
    if any(isinstance(one, _Handler) for one in logging.getLogger(LOGGERS[0]).handlers):
        return
    where, refused = _where(settings.file)
    where.setFormatter(_Json() if settings.format == "json" else _Text())
    handler = _Handler(where)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(settings.level.upper())
        logger.propagate = False  # Ray and Serve have handlers of their own on the root
    if refused is not None:
        logging.getLogger(__name__).error("log lines go to standard error: %s", refused)


def _where(file: str) -> tuple[logging.Handler, OSError | None]:
    """The file, where it can be written; a log is no reason for a part not to start."""
    if file:
        try:
            return logging.handlers.WatchedFileHandler(file), None
        except OSError as error:
            return logging.StreamHandler(), error
    return logging.StreamHandler(), None


class _Handler(logging.Handler):
    """Ours, to be known again."""

    def __init__(self, where: logging.Handler) -> None:
        super().__init__()
        self._where = where

    def emit(self, record: logging.LogRecord) -> None:
        self._where.handle(record)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = ABOUT.get() | getattr(record, FACTS, {})
    if "trace_id" not in found and (trace_id := tracing.trace_id()) is not None:
        found["trace_id"] = trace_id
    return found


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        told = " ".join(f"{name}={value}" for name, value in _facts(record).items())
        text = super().format(record)
        return f"{text} {told}" if told else text
