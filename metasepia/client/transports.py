"""The two drivers of a call's steps: `Blocking` with threads, `Looping` in an event loop; both over one httpx client.

Everything that is decided is decided in the steps. A driver sends, waits and runs parts side by side.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeVar

import httpx

from metasepia.client.calls import SKIPPED, Answer, Ask, Pause, Request, Send, Step, Steps, Together
from metasepia.client.errors import BadInput, NoAnswer, NotConnected, OutOfTime
from metasepia.client.trying import Options, tried

T = TypeVar("T")

CONNECT_S = 10.0
"""A host that does not answer to a connection is given up after this."""
GRACE_S = 0.5
"""Longer than the server is told, so that its own words about a deadline can arrive."""


class Connection:
    """What both drivers know of the server."""

    def __init__(self, url: str, key: str | None, options: Options) -> None:
        """Raises BadInput for a URL or key that no request can be sent with."""
        self.url, self.options = checked_url(url), options
        self._headers = {"user-agent": "metasepia-client"}
        if key is not None:
            if not key.isascii() or not key.isprintable() or not key.strip():
                raise BadInput("key", "a key is printable ASCII; was something else pasted with it?")
            self._headers["authorization"] = f"Bearer {key.strip()}"

    def _arguments(self, request: Request, timeout_s: float) -> dict[str, Any]:
        silence_s = timeout_s + GRACE_S
        more: dict[str, Any] = {}
        if request.files:
            more = {
                "data": dict(request.fields),
                "files": {name: (f"{name}.bin", content) for name, content in request.files.items()},
            }
        elif request.content is not None:
            more = {"content": request.content}
        return {
            "method": request.method,
            "url": self.url + request.path,
            "params": dict(request.params) or None,
            "headers": self._headers | dict(request.headers),
            "timeout": httpx.Timeout(silence_s, connect=min(CONNECT_S, silence_s)),
            **more,
        }

    def _answer(self, response: httpx.Response, content: bytes, source: Any = None) -> Answer:
        return Answer(
            status=response.status_code,
            headers={name.lower(): value for name, value in response.headers.items()},
            content=content,
            url=self.url,
            source=source,
        )

    @contextlib.contextmanager
    def told(self, timeout_s: float) -> Iterator[None]:
        """Errors of httpx as ours."""
        try:
            yield
        except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
            raise OutOfTime(self.url, timeout_s) from None
        except httpx.ConnectTimeout:
            raise NotConnected(self.url, f"no connection within {min(CONNECT_S, timeout_s):g} s") from None
        except httpx.ConnectError as error:
            raise NotConnected(self.url, str(error) or "no connection") from None
        except httpx.HTTPError as error:
            raise NoAnswer(self.url, str(error) or type(error).__name__) from None


def checked_url(url: str) -> str:
    """Raises BadInput with the way out."""
    way_out = "it must be http://HOST:PORT or https://HOST"
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, TypeError) as error:
        raise BadInput("url", f"{url!r} is no URL ({error}); {way_out}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BadInput("url", f"{url!r} names no server; {way_out}")
    if parsed.port is not None and not 0 < parsed.port < 65_536:
        raise BadInput("url", f"{url!r} has no port from 1 to 65535; {way_out}")
    if parsed.query or parsed.fragment:
        raise BadInput("url", f"{url!r} has a query; {way_out}")
    return str(parsed).rstrip("/").removesuffix("/v1")


def _limits(options: Options) -> httpx.Limits:
    return httpx.Limits(max_connections=None, max_keepalive_connections=max(16, options.concurrency))


class Blocking(Connection):
    """Carries steps out in the thread that asks; parts side by side in threads of their own. Thread-safe."""

    def __init__(self, url: str, key: str | None, options: Options, transport: httpx.BaseTransport | None = None):
        super().__init__(url, key, options)
        self._http = httpx.Client(transport=transport, limits=_limits(options))

    def close(self) -> None:
        self._http.close()

    def run(self, steps: Steps[T], options: Options | None = None) -> T:
        """Raises what the steps raise."""
        options = options or self.options
        try:
            step = next(steps)
            while True:
                try:
                    outcome = self._outcome(step, options)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    def _outcome(self, step: Step, options: Options) -> Any:
        match step:
            case Ask():
                return self.run(tried(step, self.url, options), options)
            case Send():
                return self._send(step.request, step.timeout_s)
            case Pause():
                return time.sleep(step.seconds)
            case Together():
                return self._together(step, options)

    def _send(self, request: Request, timeout_s: float) -> Answer:
        end = time.monotonic() + timeout_s + GRACE_S
        with self.told(timeout_s):
            response = self._http.send(self._http.build_request(**self._arguments(request, timeout_s)), stream=True)
            if request.streams and response.is_success:
                return self._answer(response, b"", response)
            try:
                parts: list[bytes] = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > end:  # a body that drips would be waited for without end
                        raise OutOfTime(self.url, timeout_s)
            finally:
                response.close()
        return self._answer(response, b"".join(parts))

    def _together(self, step: Together, options: Options) -> list[Any]:
        """In daemon threads: whoever is interrupted here need not wait for answers that nobody reads."""
        outcomes: list[Any] = [SKIPPED] * len(step.parts)
        if len(step.parts) == 1:  # most calls: no thread is worth its start
            try:
                outcomes[0] = self.run(step.parts[0], options)
            except Exception as error:
                outcomes[0] = error
            step.done(0)
            return outcomes
        places, ended = queue.SimpleQueue[int](), queue.SimpleQueue[int | None]()
        for place in range(len(step.parts)):
            places.put(place)
        stopped = threading.Event()

        def work() -> None:
            try:
                while not stopped.is_set():
                    place = places.get_nowait()
                    try:
                        outcomes[place] = self.run(step.parts[place], options)
                    except Exception as error:
                        outcomes[place] = error
                        if not step.goes_on(error):
                            stopped.set()
                    ended.put(place)
            except queue.Empty:
                pass
            finally:
                ended.put(None)

        running = min(options.concurrency, len(step.parts))
        for _ in range(running):
            threading.Thread(target=work, daemon=True, name="metasepia-client").start()
        try:
            while running:
                place = ended.get()
                if place is None:
                    running -= 1
                else:
                    step.done(place)
        finally:
            stopped.set()
        return outcomes

    def pieces(self, source: httpx.Response, end: float, timeout_s: float) -> Iterator[bytes]:
        """A stream's body as it comes in, until `end` by the monotonic clock. Raises NoAnswer and OutOfTime."""
        with self.told(timeout_s):
            for piece in source.iter_bytes():
                yield piece
                if time.monotonic() > end + GRACE_S:
                    raise OutOfTime(self.url, timeout_s)


class Looping(Connection):
    """Carries steps out in the running event loop. A cancellation of the caller ends what is under way."""

    def __init__(self, url: str, key: str | None, options: Options, transport: httpx.AsyncBaseTransport | None = None):
        super().__init__(url, key, options)
        self._http = httpx.AsyncClient(transport=transport, limits=_limits(options))

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, steps: Steps[T], options: Options | None = None) -> T:
        """Raises what the steps raise."""
        options = options or self.options
        try:
            step = next(steps)
            while True:
                try:
                    outcome = await self._outcome(step, options)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    async def _outcome(self, step: Step, options: Options) -> Any:
        match step:
            case Ask():
                return await self.run(tried(step, self.url, options), options)
            case Send():
                return await self._send(step.request, step.timeout_s)
            case Pause():
                return await asyncio.sleep(step.seconds)
            case Together():
                return await self._together(step, options)

    async def _send(self, request: Request, timeout_s: float) -> Answer:
        with self.told(timeout_s):
            async with asyncio.timeout(timeout_s + GRACE_S):
                prepared = self._http.build_request(**self._arguments(request, timeout_s))
                response = await self._http.send(prepared, stream=True)
                if request.streams and response.is_success:
                    return self._answer(response, b"", response)
                try:
                    content = await response.aread()
                finally:
                    await response.aclose()
        return self._answer(response, content)

    async def _together(self, step: Together, options: Options) -> list[Any]:
        outcomes: list[Any] = [SKIPPED] * len(step.parts)
        places = iter(range(len(step.parts)))
        stopped = False

        async def work() -> None:
            nonlocal stopped
            for place in places:
                if stopped:
                    return
                try:
                    outcomes[place] = await self.run(step.parts[place], options)
                except Exception as error:
                    outcomes[place] = error
                    stopped |= not step.goes_on(error)
                step.done(place)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(options.concurrency, len(step.parts))):
                group.create_task(work())
        return outcomes

    async def pieces(self, source: httpx.Response, end: float, timeout_s: float) -> AsyncGenerator[bytes]:
        """A stream's body as it comes in, until `end` by the monotonic clock. Raises NoAnswer and OutOfTime."""
        last = asyncio.get_running_loop().time() + end - time.monotonic() + GRACE_S
        body = aiter(source.aiter_bytes())
        with self.told(timeout_s):
            while True:
                async with asyncio.timeout_at(last):
                    try:
                        piece = await anext(body)
                    except StopAsyncIteration:
                        return
                yield piece
