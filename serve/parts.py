"""The parts of the graph as the gateway sees them, and how they are reached through Serve's handles.

A request that ends early, whatever ends it (deadline, stop string, client gone), cancels what it asked of other parts.
One whose replica ends is asked again (`serve.load.retries`), a row with the tokens that it has already sent.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from actors import tracing
from actors.messages import Build, Built, Classified, Classify, EncoderInfo, Explain, Explained, Media, Texts
from metasepia.models.prepared import PreparedBackbone
from metasepia.registry.entries import Artefact, Changes, Kind
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk
from serve.load.retries import Retries, persistently
from serve.shipped import ModuleCard

T = TypeVar("T")
M = TypeVar("M", bound=Row | Texts | Media | Classify | Build | Explain)
ASSIGN_S = 10.0
"""A call that nobody wants any more waits for a replica for so long, to be cancelled there."""
Weights = Mapping[str, float | list[float]]
"""Of a mixture by expert; a list has a weight for each factored layer."""


class Backbone(Protocol):
    """One frozen model, somewhere else."""

    id: str
    prepared: PreparedBackbone

    def generate(self, row: Row) -> AsyncGenerator[TokenChunk]: ...
    async def score(self, rows: Sequence[Row]) -> list[Scores]: ...
    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]: ...
    async def load(self) -> dict[str, float]:
        """Gauges of its queue by name."""
        ...


class TextEncoder(Protocol):
    """One encoder of texts, or of pictures or sounds, somewhere else."""

    id: str

    async def info(self) -> EncoderInfo: ...
    async def embed(self, items: Texts | Media) -> tuple[np.ndarray, int]:
        """Unit-norm vectors, and the tokens read.

        Raises WindowExceeded and InvalidRequest naming `texts[i]`, or `items[i]` of media.
        """
        ...

    async def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        ...

    async def check(self) -> None:
        """One real forward."""
        ...


class Reasoning(Protocol):
    """The pool of reasoning modules."""

    modules: Sequence[ModuleCard]
    """The first one answers those who name none."""

    async def classify(self, classify: Classify) -> Classified: ...
    async def build(self, build: Build) -> Built: ...
    async def explain(self, explain: Explain) -> Explained: ...
    async def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        ...

    async def check(self) -> None:
        """One real forward."""
        ...


class Mixing(Protocol):
    """Registers mixtures of experts."""

    async def register(self, backbone: str, weights: Weights, owner: str, name: str | None) -> str:
        """The mixture's digest. `backbone` is a digest too; `name` None: it is found by its digest alone."""
        ...


class Catalogue(Protocol):
    """The registry, as far as the door asks it."""

    async def put(
        self,
        kind: Kind,
        blob: bytes,
        *,
        digest: str,
        name: str | None,
        owner: str,
        card: dict[str, object],
        replace: bool = True,
    ) -> Artefact: ...
    async def changes(self, kind: Kind, owner: str, since: tuple[int, int] | None) -> Changes: ...
    async def resolve(self, kind: Kind, name: str, owner: str, *, deleted: bool = False) -> Artefact: ...
    async def list(self, kind: Kind, owner: str, *, after: str = "", limit: int = 1000) -> Sequence[Artefact]: ...
    async def get(self, digest: str) -> bytes: ...
    async def delete(self, kind: Kind, name: str, owner: str) -> Artefact: ...


def traced(message: M) -> M:
    """With the span of this task in it, where there is one and the message has none yet."""
    span = tracing.traceparent()
    return message if span is None or message.traceparent else dataclasses.replace(message, traceparent=span)


_assigning: "set[asyncio.Future[Any]]" = set()


async def assigned(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
    """Returns when a replica has the call. A caller that leaves before cancels it then, or after ASSIGN_S.

    Cancelled in the very moment in which a replica takes it, a call would be lost to Serve (2.60) and run to its end:
    the router has sent it, and whoever could cancel it has not been given it yet.
    """
    assigning = asyncio.ensure_future(response._fetch_future_result_async())
    try:
        await asyncio.shield(assigning)
    except asyncio.CancelledError:
        timer = asyncio.get_running_loop().call_later(ASSIGN_S, response.cancel)

        def withdraw(done: "asyncio.Future[Any]") -> None:
            _assigning.discard(done)
            timer.cancel()
            if done.cancelled() or done.exception() is None:
                response.cancel()

        _assigning.add(assigning)  # the loop itself keeps no reference
        assigning.add_done_callback(withdraw)
        raise


async def answered(response: DeploymentResponse[T] | DeploymentResponseGenerator[T]) -> T:
    """The answer; a caller that stops waiting cancels the call."""
    assert isinstance(response, DeploymentResponse)
    await assigned(response)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class ServedBackbone:
    """A backbone behind a Serve handle."""

    def __init__(self, id_: str, prepared: PreparedBackbone, handle: DeploymentHandle[Any]) -> None:
        self.id, self.prepared, self._handle = id_, prepared, handle
        self._streaming = handle.options(stream=True)
        self._context = contextvars.copy_context()
        self._dropping: set[asyncio.Task[None]] = set()

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        retries, sent = Retries(f"backbone {self.id}", row.deadline_unix_s), list(row.sent)
        while True:
            chunks = self._streaming.generate.remote(dataclasses.replace(traced(row), sent=tuple(sent)))
            assert isinstance(chunks, DeploymentResponseGenerator)
            try:
                await assigned(chunks)
            except asyncio.CancelledError:
                self._drop(row.request_id)
                raise
            except Exception as error:
                await retries.after(error)
                continue
            ended = False
            try:
                async for chunk in chunks:
                    ended = chunk.finish is not None
                    yield chunk
                    if ended:
                        return
                    sent.extend(chunk.token_ids)
                return
            except Exception as error:
                ended = True
                await retries.after(error)
            finally:
                chunks.cancel()  # nothing happens where the row has ended by itself
                if not ended:
                    self._drop(row.request_id)

    def _drop(self, request_id: str) -> None:
        """Tells the replicas that nobody waits for a row any more: Serve's cancellation does not always arrive."""

        async def tell() -> None:
            with contextlib.suppress(Exception):  # it is away, and the row with it
                await self._handle.broadcast("drop", request_id).results_async(timeout_s=ASSIGN_S)

        # Not in this task's name: Ray cancels what a cancelled task has called.
        task = asyncio.get_running_loop().create_task(tell(), context=self._context)
        self._dropping.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._dropping.discard)

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        asked = [traced(row) for row in rows]
        return await self._ask(asked, lambda: answered(self._handle.score.remote(asked)))

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        asked = [traced(row) for row in rows]
        return await self._ask(asked, lambda: answered(self._handle.hidden_states.remote(asked)))

    async def _ask(self, rows: Sequence[Row], ask: Callable[[], Awaitable[T]]) -> T:
        deadline_unix_s = min((row.deadline_unix_s for row in rows), default=float("inf"))
        return await persistently(f"backbone {self.id}", deadline_unix_s, ask)

    async def load(self) -> dict[str, float]:
        return await answered(self._handle.load.remote())


class ServedEncoder:
    """An encoder behind a Serve handle."""

    def __init__(self, id_: str, handle: DeploymentHandle[Any]) -> None:
        self.id, self._handle = id_, handle
        self._info: EncoderInfo | None = None

    async def info(self) -> EncoderInfo:
        info = self._info or await answered(self._handle.info.remote())
        self._info = info
        return info

    async def embed(self, items: Texts | Media) -> tuple[np.ndarray, int]:
        asked = traced(items)
        return await persistently(
            f"encoder {self.id}",
            asked.deadline_unix_s,
            lambda: answered(self._handle.embed_counted.remote(asked)),
        )

    async def statistics(self) -> dict[str, float]:
        return await answered(self._handle.statistics.remote())

    async def check(self) -> None:
        await answered(self._handle.check.remote())


class ServedReasoning:
    """The reasoning pool behind a Serve handle."""

    def __init__(self, modules: Sequence[ModuleCard], handle: DeploymentHandle[Any]) -> None:
        self.modules, self._handle = modules, handle

    async def classify(self, classify: Classify) -> Classified:
        return await self._ask(self._handle.classify, classify)

    async def build(self, build: Build) -> Built:
        return await self._ask(self._handle.build, build)

    async def explain(self, explain: Explain) -> Explained:
        return await self._ask(self._handle.explain, explain)

    async def _ask(self, method: Any, message: Classify | Build | Explain) -> Any:
        asked = traced(message)
        return await persistently("the reasoning pool", asked.deadline_unix_s, lambda: answered(method.remote(asked)))

    async def statistics(self) -> dict[str, float]:
        return await answered(self._handle.statistics.remote())

    async def check(self) -> None:
        await answered(self._handle.check.remote())


class ServedMixing:
    """The expert-mixing part behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def register(self, backbone: str, weights: Weights, owner: str, name: str | None) -> str:
        return await answered(self._handle.register.remote(backbone, dict(weights), owner, name))
