"""Few-shot searches at the door: asked for, looked at, cancelled. They run in the expert-mixing part, as jobs."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from actors.messages import SearchAsked
from cluster.door_settings import HttpSettings
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidRequest, UnknownName, WindowExceeded
from metasepia.search.fewshot import Shot, split
from metasepia.search.jobs import Example
from metasepia.search.warm_start import Nearness
from serve.access.principal import current
from serve.experts.search_bodies import DEFAULT_ANSWER_LEN, SearchExample, SearchRequest, SearchStart
from serve.models.prompts import Prompts, away
from serve.parts import Backbone, answered
from serve.requests.asked import Asked, deadline_of
from serve.requests.deadlines import Deadline
from serve.requests.failures import unwrap
from serve.tasks.part import TaskPart

PATH = "/v1/mixtures/search"
MAX_NEAR = 256
"""Nearest tasks with an expert that a warm start is made from."""


class Searches(Protocol):
    """The part of the graph that runs searches. Each method raises UnknownName for an id that it has not got."""

    async def submit(self, asked: SearchAsked) -> dict[str, Any]: ...
    async def get(self, owner: str, id_: str) -> dict[str, Any]: ...
    async def listing(self, owner: str) -> list[dict[str, Any]]: ...
    async def trace(self, owner: str, id_: str) -> list[dict[str, Any]]: ...
    async def picture(self, owner: str, id_: str) -> bytes: ...
    async def cancel(self, owner: str, id_: str) -> dict[str, Any]: ...


class ServedSearches:
    """Behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def submit(self, asked: SearchAsked) -> dict[str, Any]:
        return await answered(self._handle.search.remote(asked))

    async def get(self, owner: str, id_: str) -> dict[str, Any]:
        return await answered(self._handle.search_get.remote(owner, id_))

    async def listing(self, owner: str) -> list[dict[str, Any]]:
        return await answered(self._handle.search_listing.remote(owner))

    async def trace(self, owner: str, id_: str) -> list[dict[str, Any]]:
        return await answered(self._handle.search_trace.remote(owner, id_))

    async def picture(self, owner: str, id_: str) -> bytes:
        return await answered(self._handle.search_picture.remote(owner, id_))

    async def cancel(self, owner: str, id_: str) -> dict[str, Any]:
        return await answered(self._handle.search_cancel.remote(owner, id_))


class Searching:
    """Answers the routes under /v1/mixtures/search."""

    def __init__(
        self,
        http: HttpSettings,
        backbones: Mapping[str, Backbone],
        prompts: Mapping[str, Prompts],
        searches: Searches,
        tasks: TaskPart | None = None,
    ) -> None:
        """`tasks` None: no search starts warm."""
        self._http, self._backbones, self._prompts, self._searches = http, backbones, prompts, searches
        self._tasks = tasks

    async def create(self, request: Request) -> Response:
        read = await Asked.of(request, self._http)
        asked, deadline = SearchRequest.of(read.tree).check(self._http), read.deadline
        backbone = self._backbones.get(asked.backbone_id)
        if backbone is None:
            raise UnknownName("backbone", asked.backbone_id, tuple(self._backbones))
        settings = asked.settings()
        chars = sum(len(_text_of(one)) for one in asked.examples)
        examples = await away(chars, lambda: self._tokenise(asked.examples, backbone))
        longest = max(len(one.answer) for one in examples)
        max_tokens = max(longest, DEFAULT_ANSWER_LEN) if asked.max_tokens is None else asked.max_tokens
        if asked.score == "accuracy":
            self._check_answers_fit(examples, max_tokens, backbone, asked.max_tokens)
        near = None if asked.start is None else await self._near(asked, asked.start, examples, deadline)
        async with deadline.limit("queueing the search"):
            job = await self._searches.submit(
                SearchAsked(
                    backbone=backbone.prepared.digest,
                    owner=current().tenant,
                    experts=None if asked.experts is None else tuple(asked.experts),
                    base=asked.base,
                    examples=examples,
                    num_shots=asked.shots,
                    settings=settings,
                    by=asked.score,
                    match=asked.match,
                    max_tokens=max_tokens,
                    stop_token_ids=backbone.prepared.eos_token_ids,
                    near=near,
                )
            )
        return JSONResponse(job, 202 if job["status"] == "queued" else 200, headers={"location": f"{PATH}/{job['id']}"})

    async def list(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("listing the searches"):
            return JSONResponse({"object": "list", "data": await self._searches.listing(current().tenant)})

    async def get(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("reading the search"):
            return JSONResponse(await self._searches.get(current().tenant, _id(request)))

    async def trace(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("reading the search"):
            return JSONResponse({"object": "list", "data": await self._searches.trace(current().tenant, _id(request))})

    async def picture(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("drawing the search"):
            return Response(await self._searches.picture(current().tenant, _id(request)), media_type="image/svg+xml")

    async def cancel(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("cancelling the search"):
            return JSONResponse(await self._searches.cancel(current().tenant, _id(request)))

    async def _near(
        self, asked: SearchRequest, warm: SearchStart, examples: Sequence[Example], deadline: Deadline
    ) -> Nearness:
        """How near the tasks that have an expert are to the one at hand: a registered one, or the shots themselves. The
        held-out examples are not looked at.

        Raises UnknownName for a task that is not there, and InvalidRequest naming `start`.
        """
        settings = warm.settings()
        if self._tasks is None:
            raise InvalidRequest("start", "this server embeds no tasks; leave it out, or send uniform")
        async with deadline.limit("comparing the task with those of experts"):
            try:
                if warm.task is not None:
                    source = f"task {warm.task}"
                    found = await self._tasks.nearest(current().tenant, warm.task, k=MAX_NEAR, with_expert=True)
                else:
                    source = "the shots"
                    answers, until = _answers_of(asked, examples), deadline.unix_s
                    found = await self._tasks.nearest_of(
                        current().tenant, answers, k=MAX_NEAR, with_expert=True, deadline_unix_s=until
                    )
            except Exception as error:
                raise _of_start(unwrap(error)) from None
        if not found:
            raise InvalidRequest(
                "start", "no task with an expert is registered in this space (POST /v1/tasks); start uniform"
            )
        experts = tuple((str(one["expert"]), float(one["cosine"])) for one in found)
        return Nearness(experts=experts, source=source, settings=settings)

    def _tokenise(self, examples: Sequence[SearchExample], backbone: Backbone) -> tuple[Example, ...]:
        """Raises WindowExceeded naming the example, and what `Prompts.chat` raises."""
        prompts, window = self._prompts[backbone.id], backbone.prepared.window
        made: list[Example] = []
        for place, one in enumerate(examples):
            field = f"examples[{place}]"
            if prompts.at_least(_text_of(one)) >= window:
                raise WindowExceeded(field, prompts.at_least(_text_of(one)), window)
            if one.messages is None:
                assert one.prompt is not None
                prompt, end = prompts.plain(one.prompt), ()
            else:
                messages = [
                    {"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in one.messages
                ]
                prompt, end = prompts.chat(messages), backbone.prepared.eos_token_ids[:1]
            answer = (*prompts.continuation(one.answer), *end)
            if len(prompt) + len(answer) > window:
                raise WindowExceeded(field, len(prompt) + len(answer), window)
            if not prompt:
                raise InvalidRequest(f"{field}.prompt", "it has no tokens")
            made.append(Example(prompt=prompt, answer=answer, text=one.answer))
        return tuple(made)

    def _check_answers_fit(
        self, examples: Sequence[Example], max_tokens: int, backbone: Backbone, asked: int | None
    ) -> None:
        longest, window = max(len(one.prompt) for one in examples), backbone.prepared.window
        if longest + max_tokens > window:
            raise WindowExceeded("examples" if asked is None else "max_tokens", longest + max_tokens, window)


def _answers_of(asked: SearchRequest, examples: Sequence[Example]) -> Answers:
    """The shots as a data set: what was asked last, and the answer. Answers that hardly repeat are open ones.

    Raises InvalidRequest for shots that are all answered alike, and what `split` raises.
    """
    shots = [Shot(prompt=one.prompt, answer=one.answer) for one in examples]
    chosen = {shot.id for shot in split(shots, asked.shots, asked.seed)[0]}
    pairs = [
        (_question_of(one), one.answer.strip())
        for one, shot in zip(asked.examples, shots, strict=True)
        if shot.id in chosen
    ]
    texts, answers = [text for text, _ in pairs], [answer for _, answer in pairs]
    if 2 * len(set(answers)) > len(answers) > 2:
        return Answers.of_replies(texts, answers)
    return Answers.of_labelled(texts, answers)


def _question_of(example: SearchExample) -> str:
    if example.prompt is not None:
        return example.prompt
    assert example.messages  # one of the two, and never empty
    asked = [one.content for one in example.messages if one.role == "user"]
    return asked[-1] if asked else example.messages[-1].content


def _of_start(error: BaseException) -> BaseException:
    """A complaint about the task as one about the field that asked for it."""
    if isinstance(error, UnknownName):
        return UnknownName("task to start from", error.name, error.known)
    if isinstance(error, InvalidRequest) and not str(error.param).startswith("examples"):
        return InvalidRequest("start", f"the task has no embedding: {error.param}: {error.message}")
    return error


def _text_of(example: SearchExample) -> str:
    messages = example.messages or ()
    return "".join([example.prompt or "", *(message.content for message in messages), example.answer])


def _id(request: Request) -> str:
    return request.path_params["id"][:80]
