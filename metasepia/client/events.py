"""Server-sent events of a completion that streams: bytes in, pieces of text out, and the iterators of both clients.

The stream's end is `data: [DONE]`; one without it was cut off. An error after the first event is an event too, since
the status had left by then.
"""

import codecs
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from metasepia.client.calls import Answer, Ask, Request, Steps
from metasepia.client.errors import NoAnswer, NotOurs, StreamBroken, refused
from metasepia.client.results import Usage
from metasepia.client.transports import Blocking, Looping
from metasepia.client.trying import Options, envelope_of

_STATUS_OF_CODE = {"deadline_exceeded": 504, "unavailable": 503, "overloaded": 429, "quota_exceeded": 429}
"""What an error that comes as an event would have been answered with."""
MAX_CHOICES = 1024


@dataclass(frozen=True)
class Piece:
    """Some characters of one answer."""

    text: str
    index: int
    """Of which answer, where `n` asked for several."""
    finish: str | None
    """`stop` or `length` with the last piece of an answer."""
    raw: dict[str, Any]
    """The event as it came."""


class Lines:
    """Bytes to events' data (the HTML standard's server-sent events; other fields and comments are passed over)."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest, self._data = "", list[str]()

    def feed(self, content: bytes) -> Iterator[str]:
        text = self._rest + self._decode(content)
        *lines, self._rest = text.replace("\r\n", "\n").split("\n")
        for line in lines:
            if line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data.clear()


class Received:
    """What came of a stream so far."""

    def __init__(self, request: Request, url: str) -> None:
        self._request, self._url, self._lines, self._done = request, url, Lines(), False
        self._texts: dict[int, list[str]] = {}
        self.finishes: dict[int, str] = {}
        """Why each answer ended: `stop` or `length`."""
        self.usage: Usage | None = None
        """Tokens; comes with the last event where `usage` was asked for."""
        self.receipt: dict[str, Any] | None = None
        """What was executed, by digests; comes with the last event."""
        self.request_id: str | None = None

    @property
    def text(self) -> str:
        """Of the first answer, so far."""
        return self.texts[0] if self._texts else ""

    @property
    def texts(self) -> list[str]:
        """Of each answer, so far."""
        return ["".join(self._texts.get(index, ())) for index in range(max(self._texts, default=-1) + 1)]

    def _begun(self, answer: Answer) -> None:
        """Raises NotOurs for an answer that is no stream of events."""
        self.request_id = answer.headers.get("x-request-id")
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise NotOurs(self._url, f"{answer.headers.get('content-type')} where events were to come")

    def _pieces(self, content: bytes) -> Iterator[Piece]:
        """Raises Refused for an error of the server's, NotOurs for what is no event of ours."""
        for data in self._lines.feed(content):
            if data == "[DONE]":
                self._done = True
                return
            event = self._event(data)
            error = event.get("error")
            if isinstance(error, dict) and isinstance(error.get("message"), str):
                status = _STATUS_OF_CODE.get(str(error.get("code")), 500)
                raise refused(envelope_of(error, status, self.request_id))
            if event.get("usage"):
                self.usage = Usage.of(event["usage"])
            self.receipt = event.get("receipt", self.receipt)
            for choice in event.get("choices", ()):
                piece = self._piece(choice, event)
                if piece.text or piece.finish:
                    yield piece

    def _event(self, data: str) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not ("error" in event or isinstance(event.get("choices"), list)):
            raise NotOurs(self._url, f"an event that is no completion's: {data[:120]!r}")
        return event

    def _piece(self, choice: dict[str, Any], event: dict[str, Any]) -> Piece:
        try:
            index = int(choice["index"])
            text = str((choice["delta"].get("content") if "delta" in choice else choice["text"]) or "")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise NotOurs(self._url, f"a choice that is no completion's: {str(choice)[:120]!r}") from None
        if not 0 <= index < MAX_CHOICES:
            raise NotOurs(self._url, f"a choice numbered {index}")
        self._texts.setdefault(index, []).append(text)
        finish = choice.get("finish_reason")
        if finish is not None:
            self.finishes[index] = str(finish)
        return Piece(text, index, finish, event)

    def _check_ended(self) -> None:
        if not self._done:
            raise StreamBroken("the server closed the connection without [DONE]", self.text)

    @contextlib.contextmanager
    def _broken(self) -> Iterator[None]:
        try:
            yield
        except NoAnswer as error:
            raise StreamBroken(error.problem, self.text) from None


class Stream(Received):
    """The pieces of an answer, as an iterator. It is asked for when the first piece is; closing it, leaving its `with`
    block or dropping it ends the work on the server too.

    Raises Refused, OutOfTime, StreamBroken (never tried again: some of the text has been seen already).
    """

    def __init__(self, request: Request, by: Blocking, options: Options) -> None:
        super().__init__(request, by.url)
        self._source = self._run(by, options)

    def _run(self, by: Blocking, options: Options) -> Generator[Piece]:
        end = time.monotonic() + options.timeout_s
        answer = by.run(opened(self._request), options)
        try:
            self._begun(answer)
            with self._broken():
                for content in by.pieces(answer.source, end, options.timeout_s):
                    yield from self._pieces(content)
                    if self._done:
                        return
            self._check_ended()
        finally:
            answer.source.close()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._source)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()


class AsyncStream(Received):
    """`Stream` in an event loop: `async with` or `aclose()` where the loop is left early."""

    def __init__(self, request: Request, by: Looping, options: Options) -> None:
        super().__init__(request, by.url)
        self._source = self._run(by, options)

    async def _run(self, by: Looping, options: Options) -> AsyncGenerator[Piece]:
        end = time.monotonic() + options.timeout_s
        answer = await by.run(opened(self._request), options)
        try:
            self._begun(answer)
            with self._broken():
                async with contextlib.aclosing(by.pieces(answer.source, end, options.timeout_s)) as contents:
                    async for content in contents:
                        for piece in self._pieces(content):
                            yield piece
                        if self._done:
                            return
            self._check_ended()
        finally:
            await answer.source.aclose()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        return await anext(self._source)

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._source.aclose()


def opened(request: Request) -> Steps[Answer]:
    """The answer whose body is still to come."""
    return (yield Ask(request))
