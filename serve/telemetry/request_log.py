"""One line a request, when it ends: who asked what, how it went, what answered. Never texts, never keys.

What is told is noted where it is known, by whoever serves the request's task: `note(prompt_tokens=12)`. The layer that
measures requests opens a story and closes it (`serve/telemetry/metrics.py`).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from actors.logs import ABOUT, FACTS

logger = logging.getLogger("serve.request")

Facts = dict[str, Any]

_RECEIPT = ("backbone", "factors", "adapter", "context", "module", "encoder", "path", "dispatch")
"""What of a receipt is told: digests, the arithmetic, the stage of `auto`."""

_told: ContextVar[Facts | None] = ContextVar("request", default=None)


@contextmanager
def story(request_id: str | None) -> Iterator[Facts]:
    """What is noted inside, in this task and in those that it starts; their other log lines carry the id too."""
    facts: Facts = {}
    about = {} if request_id is None else {"request_id": request_id}
    tokens = _told.set(facts), ABOUT.set(about)
    try:
        yield facts
    finally:
        _told.reset(tokens[0])
        ABOUT.reset(tokens[1])


def note(**facts: Any) -> None:
    """Adds to the story of the request that this task serves; nothing outside of requests. None says nothing."""
    if (told := _told.get()) is not None:
        told.update({name: value for name, value in facts.items() if value is not None})


def note_receipt(receipt: Mapping[str, Any]) -> None:
    """What answered, as receipts say it."""
    note(**{name: receipt[name] or None for name in _RECEIPT})


def add_tokens(prompt: int, answer: int) -> None:
    """Tokens read and written, to those before."""
    if (told := _told.get()) is not None:
        for name, count in (("prompt_tokens", prompt), ("answer_tokens", answer)):
            told[name] = told.get(name, 0) + count


def write(facts: Mapping[str, Any], quiet: bool = False) -> None:
    """The line. A request that failed by our fault is an error, one that was refused is not."""
    level = logging.ERROR if facts["status"] == 500 else logging.DEBUG if quiet else logging.INFO
    logger.log(level, "%s %s %s", facts["method"], facts["route"], facts["status"], extra={FACTS: facts})
