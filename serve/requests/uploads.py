"""A body that brings files, from bytes on the wire to named parts, bounded before and while it is read.

`multipart/form-data` holds fields and files; `application/octet-stream` is one file, and its fields are the query.
Nothing larger than a mebibyte waits in memory while it comes in: it is spooled to an unnamed file.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from metasepia.errors import BodyTooLarge, InvalidRequest, NotSupported, Overloaded

FILE = "file"
MAX_FIELD_BYTES = 1 << 20
DRAIN_MIB = 64.0
"""So much of what is too long is read and thrown away: a client that writes on would else not see the answer."""
NUM_AT_ONCE = 4
"""Uploads of the greatest length that may come in together."""


@dataclass(frozen=True)
class Upload:
    """What one request brought, by field: texts, and files as bytes."""

    parts: Mapping[str, bytes]

    def text(self, name: str) -> str | None:
        """Raises InvalidRequest for a part that is no UTF-8."""
        part = self.parts.get(name)
        try:
            return None if part is None else part.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(name, "not UTF-8") from None


class Uploads:
    """Reads uploads, a bounded number of bytes at once."""

    def __init__(self, max_mib: float) -> None:
        self._max_mib, self._limit = max_mib, int(max_mib * 2**20)
        self._coming = 0

    async def read(self, request: Request, fields: tuple[str, ...]) -> Upload:
        """The parts, all of which are among `fields` (of an octet stream: `file`, and the query's).

        Raises BodyTooLarge, unread where content-length says so already; Overloaded when too many bytes come in at
        once; InvalidRequest for another or a malformed body; NotSupported for another content type.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("multipart/form-data", "application/octet-stream"):
            raise NotSupported(
                f"an expert as {kind[:80] or 'a body without a content type'}",
                "send multipart/form-data with the file as `file`, or the file itself as application/octet-stream",
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidRequest("content-encoding", "compressed bodies are not read; send the file as it is")
        length = self._length(request)
        with self._room(self._limit if length is None else length):
            if kind == "application/octet-stream":
                query = {name: value.encode() for name, value in request.query_params.items()}
                parts = query | {FILE: b"".join([chunk async for chunk in self._bounded(request)])}
            else:
                parts = await self._form(request, fields)
        for name in parts:
            if name not in fields:
                raise InvalidRequest(name[:80], "this field is not known here; leave it out")
        return Upload(parts)

    def _length(self, request: Request) -> int | None:
        """What content-length says. Raises BodyTooLarge, before anything is read, where nothing could come of it."""
        text = request.headers.get("content-length")
        if text is None or not (text.isascii() and text.isdigit()):
            return None
        waits = request.headers.get("expect", "").lower() == "100-continue"
        if int(text) > self._limit + (0 if waits else int(DRAIN_MIB * 2**20)):
            raise self._too_large()
        return min(int(text), self._limit)

    @contextlib.contextmanager
    def _room(self, num_bytes: int) -> Iterator[None]:
        if self._coming and self._coming + num_bytes > NUM_AT_ONCE * self._limit:
            raise Overloaded("the queue of uploads", 1.0)
        self._coming += num_bytes
        try:
            yield
        finally:
            self._coming -= num_bytes

    async def _bounded(self, request: Request) -> AsyncIterator[bytes]:
        """The body's chunks. Raises BodyTooLarge at the limit, having read on for a while."""
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= self._limit:
                yield chunk
            elif num_bytes > self._limit + DRAIN_MIB * 2**20:
                break
        if num_bytes > self._limit:
            raise self._too_large()

    async def _form(self, request: Request, fields: tuple[str, ...]) -> dict[str, bytes]:
        many = len(fields) + 1  # one more, so that an unknown field can be named
        parser = MultiPartParser(
            request.headers, self._stream(request), max_files=many, max_fields=many, max_part_size=MAX_FIELD_BYTES
        )
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise InvalidRequest("body", f"not multipart/form-data: {error.message}") from None
        parts: dict[str, bytes] = {}
        try:
            for name, value in form.multi_items():
                if name in parts:
                    raise InvalidRequest(name[:80], "this field is given twice")
                parts[name] = await value.read() if isinstance(value, UploadFile) else value.encode()
        finally:
            await form.close()
        return parts

    def _stream(self, request: Request) -> Any:
        return self._bounded(request)

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(self._max_mib, "raise http.max_upload_mib to take larger experts")
