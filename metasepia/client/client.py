"""`Client` and `AsyncClient`: the same calls, each written once as steps, carried out by threads or an event loop."""

import dataclasses
import functools
import os
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, Unpack, overload

import httpx

from metasepia.client import administering, answering, embedding_tasks, generating, registering
from metasepia.client.answering import ClassifyOptions, ExampleOptions
from metasepia.client.calls import Request, Steps
from metasepia.client.errors import BadInput
from metasepia.client.events import AsyncStream, Stream
from metasepia.client.results import Classification, ContextInfo
from metasepia.client.transports import Blocking, Looping
from metasepia.client.trying import Options

P = ParamSpec("P")
T = TypeVar("T")
Now = TypeVar("Now")
Soon = TypeVar("Soon")
Table = TypeVar("Table")
OneT = TypeVar("OneT", bound="_Client")
ClientT = TypeVar("ClientT", "Client", "AsyncClient")

URL = "http://127.0.0.1:8000"


class Verb(Generic[P, T]):
    """A call of both clients: `client.name(...)` is its answer, or with an `AsyncClient` a coroutine of it."""

    def __init__(self, plan: Callable[P, Steps[T]]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, one: None, kind: type) -> "Verb[P, T]": ...
    @overload
    def __get__(self, one: "Client", kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, one: "AsyncClient", kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, one: "Client | AsyncClient | None", kind: type) -> Any:
        if one is None:
            return self
        plan: Callable[..., Steps[T]] = self._plan
        return functools.wraps(plan)(lambda *args, **named: one.run(plan(*args, **named)))


class StreamVerb(Generic[P]):
    """A call whose answer is an iterator of pieces."""

    def __init__(self, plan: Callable[P, Request]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, one: None, kind: type) -> "StreamVerb[P]": ...
    @overload
    def __get__(self, one: "Client", kind: type) -> Callable[P, Stream]: ...
    @overload
    def __get__(self, one: "AsyncClient", kind: type) -> Callable[P, AsyncStream]: ...
    def __get__(self, one: "Client | AsyncClient | None", kind: type) -> Any:
        if one is None:
            return self
        plan: Callable[..., Request] = self._plan
        return functools.wraps(plan)(lambda *args, **named: one.stream(plan(*args, **named)))


class ContextVerb(Generic[P]):
    """A call whose answer is a context to ask."""

    def __init__(self, plan: Callable[P, Steps[ContextInfo]]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, one: None, kind: type) -> "ContextVerb[P]": ...
    @overload
    def __get__(self, one: "Client", kind: type) -> Callable[P, "Context[Client]"]: ...
    @overload
    def __get__(self, one: "AsyncClient", kind: type) -> Callable[P, Coroutine[Any, Any, "Context[AsyncClient]"]]: ...
    def __get__(self, one: "Client | AsyncClient | None", kind: type) -> Any:
        if one is None:
            return self
        plan: Callable[..., Steps[ContextInfo]] = self._plan
        client: Any = one

        def bound(*args: Any, **named: Any) -> Steps[Context[Any]]:
            return Context(client, (yield from plan(*args, **named)))

        return functools.wraps(plan)(lambda *args, **named: client.run(bound(*args, **named)))


class ClassifyNow(Protocol):
    @overload
    def __call__(self, inputs: Table, *, text: str, **options: Unpack[ExampleOptions]) -> Table: ...
    @overload
    def __call__(self, inputs: Any, **options: Unpack[ExampleOptions]) -> Classification: ...


class ClassifySoon(Protocol):
    @overload
    def __call__(
        self, inputs: Table, *, text: str, **options: Unpack[ExampleOptions]
    ) -> Coroutine[Any, Any, Table]: ...
    @overload
    def __call__(self, inputs: Any, **options: Unpack[ExampleOptions]) -> Coroutine[Any, Any, Classification]: ...


class ClassifyIn(Protocol):
    @overload
    def __call__(self, inputs: Table, *, text: str, **options: Unpack[ClassifyOptions]) -> Table: ...
    @overload
    def __call__(self, inputs: Any, **options: Unpack[ClassifyOptions]) -> Classification: ...


class ClassifyInSoon(Protocol):
    @overload
    def __call__(
        self, inputs: Table, *, text: str, **options: Unpack[ClassifyOptions]
    ) -> Coroutine[Any, Any, Table]: ...
    @overload
    def __call__(self, inputs: Any, **options: Unpack[ClassifyOptions]) -> Coroutine[Any, Any, Classification]: ...


class Typed(Generic[Now, Soon]):
    """A Verb whose answer's type depends on its arguments, so that its two signatures are spelt out."""

    def __init__(self, plan: Callable[..., Steps[Any]]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, one: None, kind: type) -> "Typed[Now, Soon]": ...
    @overload
    def __get__(self, one: "Client | Context[Client]", kind: type) -> Now: ...
    @overload
    def __get__(self, one: "AsyncClient | Context[AsyncClient]", kind: type) -> Soon: ...
    def __get__(self, one: Any, kind: type) -> Any:
        if one is None:
            return self
        first = (one.id,) if isinstance(one, Context) else ()
        client = one.client if isinstance(one, Context) else one
        return functools.wraps(self._plan)(lambda *args, **named: client.run(self._plan(*first, *args, **named)))


class _OfContext(Generic[P, T]):
    """A call of a context: a plan whose first argument is the context's id."""

    def __init__(self, plan: Callable[Concatenate[str, P], Steps[T]]) -> None:
        self._plan = plan
        self.__doc__ = plan.__doc__

    @overload
    def __get__(self, one: None, kind: type) -> "_OfContext[P, T]": ...
    @overload
    def __get__(self, one: "Context[Client]", kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, one: "Context[AsyncClient]", kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, one: "Context[Any] | None", kind: type) -> Any:
        if one is None:
            return self
        plan: Callable[..., Steps[T]] = self._plan
        return functools.wraps(plan)(lambda *args, **named: one.client.run(plan(one.id, *args, **named)))


def _classify_in(id: str, inputs: Any, *, text: str | None = None, **options: Any) -> Steps[Any]:
    return answering.classify(inputs, text=text, model=id, **options)


class Context(Generic[ClientT]):
    """A context of the server, to be asked: of a `Client` at once, of an `AsyncClient` by await."""

    def __init__(self, client: ClientT, info: ContextInfo) -> None:
        self.client, self.info = client, info

    @property
    def id(self) -> str:
        """`ctx-...`"""
        return self.info.id

    def __repr__(self) -> str:
        return f"Context({self.id!r}, classes={self.info.classes}, num_examples={self.info.num_examples})"

    classify = Typed[ClassifyIn, ClassifyInSoon](_classify_in)
    examples = _OfContext(registering.context_examples)
    delete = _OfContext(registering.delete_context)
    extended = _OfContext(registering.extend_context)


class Calls:
    """Every call of the server."""

    classify = Typed[ClassifyNow, ClassifySoon](answering.classify)
    embed = Verb(answering.embed)
    hidden_states = Verb(answering.hidden_states)

    chat = Verb(generating.chat)
    complete = Verb(generating.complete)
    stream_chat = StreamVerb(generating.chat_stream)
    stream_complete = StreamVerb(generating.prompt_stream)

    create_context = ContextVerb(registering.create_context)
    extend_context = ContextVerb(registering.extend_context)
    context = ContextVerb(registering.context)
    contexts = Verb(registering.contexts)
    context_examples = Verb(registering.context_examples)
    delete_context = Verb(registering.delete_context)

    add_expert = Verb(registering.add_expert)
    replace_expert = Verb(registering.replace_expert)
    experts = Verb(registering.experts)
    expert = Verb(registering.expert)
    expert_content = Verb(registering.expert_content)
    download_expert = Verb(registering.download_expert)
    delete_expert = Verb(registering.delete_expert)

    create_mixture = Verb(registering.create_mixture)
    mixtures = Verb(registering.mixtures)
    mixture = Verb(registering.mixture)
    delete_mixture = Verb(registering.delete_mixture)

    create_search = Verb(registering.create_search)
    wait_for_search = Verb(registering.wait_for_search)
    searches = Verb(registering.searches)
    search = Verb(registering.get_search)
    search_trace = Verb(registering.search_trace)
    search_picture = Verb(registering.search_picture)
    cancel_search = Verb(registering.cancel_search)

    create_task = Verb(embedding_tasks.create_task)
    wait_for_task = Verb(embedding_tasks.wait_for_task)
    tasks = Verb(embedding_tasks.tasks)
    task = Verb(embedding_tasks.get_task)
    nearest_tasks = Verb(embedding_tasks.nearest_tasks)
    compare_tasks = Verb(embedding_tasks.compare_tasks)
    delete_task = Verb(embedding_tasks.delete_task)
    probes = Verb(embedding_tasks.probes)
    task_map = Verb(embedding_tasks.task_map)
    observed_tasks = Verb(embedding_tasks.observed_tasks)
    observed_task = Verb(embedding_tasks.observed_task)
    delete_observed_task = Verb(embedding_tasks.delete_observed_task)

    models = Verb(administering.models)
    model = Verb(administering.model)
    health = Verb(administering.health)
    version = Verb(administering.version)
    metrics = Verb(administering.metrics)

    status = Verb(administering.status)
    jobs = Verb(administering.jobs)
    job = Verb(administering.job)
    create_key = Verb(administering.create_key)
    keys = Verb(administering.keys)
    key = Verb(administering.key)
    revoke_key = Verb(administering.revoke_key)
    usage = Verb(administering.usage)

    json = Verb(administering.json_of)
    everything = Verb(administering.everything_of)


class _Client(Calls):
    def __init__(
        self,
        url: str | None,
        key: str | None,
        options: Options,
        driver: Callable[[str, str | None, Options], Any],
    ) -> None:
        url = url or os.environ.get("METASEPIA_URL") or URL
        key = key or os.environ.get("METASEPIA_KEY") or None
        self._by = driver(url, key, options)
        self.options = options
        """How this client asks."""

    @property
    def url(self) -> str:
        """Of the server."""
        return self._by.url

    def with_options(self: OneT, **changes: Any) -> OneT:
        """The same connections, asked in another way: fields of `Options`. Raises BadInput."""
        known = [one.name for one in dataclasses.fields(Options)]
        if unknown := set(changes) - set(known):
            raise BadInput(min(unknown), f"is no option; there are {', '.join(known)}")
        made = object.__new__(type(self))
        made._by, made.options = self._by, dataclasses.replace(self.options, **changes)
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class Client(_Client):
    """Asks a server and waits for the answer. One client may be used by many threads; connections are kept and reused.

        with Client() as client:
            print(client.chat("Name the capital of France.", model="smollm2-135m").text)

    `url` None: METASEPIA_URL, or http://127.0.0.1:8000. `key` None: METASEPIA_KEY, or none. Every call raises what
    `metasepia.client.errors` lists.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = Options.timeout_s,
        retries: int = Options.retries,
        concurrency: int = Options.concurrency,
        backoff_s: float = Options.backoff_s,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`transport`: httpx's, for proxies, client certificates, or a server in this process."""
        options = Options(timeout_s=timeout_s, retries=retries, concurrency=concurrency, backoff_s=backoff_s)
        super().__init__(url, key, options, lambda at, key, options: Blocking(at, key, options, transport))

    def run(self, steps: Steps[T]) -> T:
        """Carries out the steps of a call."""
        return self._by.run(steps, self.options)

    def stream(self, request: Request) -> Stream:
        """The pieces of a completion's request."""
        return Stream(request, self._by, self.options)

    def close(self) -> None:
        """Closes the connections."""
        self._by.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Client):
    """`Client` in an event loop: every call is awaited, streams are iterated by `async for`."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        timeout_s: float = Options.timeout_s,
        retries: int = Options.retries,
        concurrency: int = Options.concurrency,
        backoff_s: float = Options.backoff_s,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        options = Options(timeout_s=timeout_s, retries=retries, concurrency=concurrency, backoff_s=backoff_s)
        super().__init__(url, key, options, lambda at, key, options: Looping(at, key, options, transport))

    async def run(self, steps: Steps[T]) -> T:
        """Carries out the steps of a call."""
        return await self._by.run(steps, self.options)

    def stream(self, request: Request) -> AsyncStream:
        """The pieces of a completion's request."""
        return AsyncStream(request, self._by, self.options)

    async def close(self) -> None:
        """Closes the connections."""
        await self._by.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
