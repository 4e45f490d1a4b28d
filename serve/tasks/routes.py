"""Task embeddings at the door: data sets, prompts on models, contexts and clients' own models, in one space.

Named, compared and listed here; embedded by the part behind `serve.tasks.part`. An id is the name that the client gave,
or `task-` and the beginning of the digest of what was asked: the same request is the same task.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from cluster.door_settings import HttpSettings
from cluster.settings import TaskSettings
from metasepia.embedding.space import KINDS, TaskEmbedding, cosines
from metasepia.errors import DeletedName, InvalidRequest, UnknownName
from metasepia.registry.entries import Artefact
from serve.access.principal import current
from serve.contexts.named import Contexts, number_of
from serve.load.admission import CHARS_A_TOKEN, Admission
from serve.models.names import Names
from serve.models.shelf import page_of
from serve.parts import Catalogue, Reasoning
from serve.requests.arrow import MEDIA_TYPE as ARROW
from serve.requests.asked import Asked, deadline_of
from serve.requests.deadlines import Deadline
from serve.requests.failures import unwrap
from serve.states.hidden_states import JSON, form_of
from serve.tasks.arrow import Batch, stream
from serve.tasks.asking import TaskAsking, in_fields
from serve.tasks.bodies import CompareRequest, InlineTask, TaskRequest
from serve.tasks.part import UNFINISHED, TaskPart, not_done

PATH = "/v1/tasks"
EMBEDDED = "embedded task"
"""What errors call one; `serve.requests.failures` knows the field by it."""
BLOBS_AT_ONCE = 32
MAX_NEAREST = 1000
_ARROW_HEADERS = {"cache-control": "no-store", "vary": "accept"}


class TaskRoutes:
    """Answers the routes of /v1/tasks."""

    def __init__(
        self,
        http: HttpSettings,
        settings: TaskSettings,
        names: Names,
        contexts: Contexts,
        reasoning: Reasoning,
        catalogue: Catalogue,
        part: TaskPart,
        admission: Admission,
    ) -> None:
        self._admission = admission
        self._http, self._settings, self._catalogue, self._part = http, settings, catalogue, part
        self._asking = TaskAsking(http, settings, names, contexts, reasoning, catalogue)

    # -- making --------------------------------------------------------------------------------------------------------

    async def make(self, request: Request) -> Response:
        """POST /v1/tasks"""
        asked = await Asked.of(request, self._http)
        body = TaskRequest.of(asked.tree).check(self._http)
        tokens = asked.num_bytes // CHARS_A_TOKEN
        place = self._admission.admitted(tokens, asked.num_bytes, asked.deadline, part="task embedding")
        async with place, asked.deadline.limit("embedding the task"):
            task = await self._asking.asked(body, asked)
            try:
                artefact, known = await self._part.make(task)
            except Exception as error:
                raise in_fields(unwrap(error), body) from None
        made = task_json(artefact) | {"cached": known, "receipt": _receipt(artefact, asked.digest)}
        status = 202 if artefact.card["status"] in UNFINISHED else 200
        return JSONResponse(made, status, headers={"location": f"{PATH}/{artefact.name}"})

    # -- reading -------------------------------------------------------------------------------------------------------

    async def probes(self, request: Request) -> Response:
        """GET /v1/tasks/probes"""
        texts = self._asking.probe_texts
        return JSONResponse(
            {
                "object": "task.probes",
                "digest": texts.digest,
                "num_texts": len(texts),
                "texts": list(texts.texts),
                "genres": list(texts.genres),
            }
        )

    async def list(self, request: Request) -> Response:
        """GET /v1/tasks"""
        form, with_vector = _form(request)
        query = request.query_params
        limit, kind = number_of(query, "limit", 100, 1, 1000), _kind(query)
        deadline = deadline_of(request, self._http)
        async with deadline.limit("listing the tasks"):
            found, has_more = await self._page(query.get("after", ""), limit, kind)
            page: dict[str, Any] = {
                "object": "list",
                "first_id": found[0].name if found else None,
                "last_id": found[-1].name if found else None,
                "has_more": has_more,
            }
            if form == ARROW:
                return await self._arrow(found, page, deadline)
            data = [task_json(one) for one in found]
            if with_vector:
                self._check_size(found, form)
                for one, artefact in zip(data, found, strict=True):
                    one |= await self._vector(artefact)
            body = await asyncio.to_thread(_page_body, page, data)
        return Response(body, media_type=JSON, headers={"vary": "accept"})

    async def _page(self, after: str, limit: int, kind: str | None) -> "tuple[list[Artefact], bool]":
        found: list[Artefact] = []
        while True:
            page, has_more = await page_of(self._catalogue, "embedding", current().tenant, after, limit)
            found += [one for one in page if kind in (None, one.card.get("kind"))]
            if len(found) > limit or not has_more:
                return found[:limit], has_more or len(found) > limit
            if kind is None:
                return found, has_more
            after = page[-1].name

    async def get(self, request: Request) -> Response:
        """GET /v1/tasks/{id}"""
        form, with_vector = _form(request)
        deadline = deadline_of(request, self._http)
        async with deadline.limit("reading the task"):
            found = await self._find(request.path_params["id"])
            if form == ARROW:
                return await self._arrow([found], {"object": "task"}, deadline)
            shown = task_json(found) | {"receipt": _receipt(found, None)}
            if with_vector:
                shown |= await self._vector(found)
        return JSONResponse(shown, headers={"vary": "accept"})

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/tasks/{id}: its job ends, its name is gone; a second time the same answer."""
        id_ = request.path_params["id"]
        async with deadline_of(request, self._http).limit("deleting the task"):
            try:
                found = await self._find(id_)
                if found.card["status"] in UNFINISHED:
                    await self._part.cancel(current().tenant, found.name)
                when = (await self._catalogue.delete("embedding", found.name, current().tenant)).deleted_unix_s
            except DeletedName as error:
                when = error.deleted_unix_s
        return JSONResponse({"id": id_, "object": "task.deleted", "deleted": True, "deleted_at": int(when or 0)})

    # -- comparing -----------------------------------------------------------------------------------------------------

    async def nearest(self, request: Request) -> Response:
        """GET /v1/tasks/{id}/nearest"""
        query = request.query_params
        k, kind = number_of(query, "k", 10, 1, MAX_NEAREST), _kind(query)
        async with deadline_of(request, self._http).limit("searching the nearest tasks"):
            found = await self._find(request.path_params["id"])
            _check_done(found)
            near = await self._part.search(current().tenant, found.name, k=k, kind=kind)
        return JSONResponse(
            {
                "object": "list",
                "id": found.name,
                "space": found.card["space"],
                "data": [{name: value for name, value in one.items() if name != "name"} for one in near.found],
                "compared": near.compared,
                "elsewhere": dict(near.elsewhere),
            }
        )

    async def compare(self, request: Request) -> Response:
        """POST /v1/tasks/compare"""
        asked = await Asked.of(request, self._http)
        body = CompareRequest.of(asked.tree).check(self._settings.max_compared)
        async with asked.deadline.limit("comparing the tasks"):
            tasks = [await self._compared(one, f"tasks[{place}]") for place, one in enumerate(body.tasks)]
            table = await asyncio.to_thread(lambda: [cosines(one, tasks) for one in tasks])
        return JSONResponse(
            {
                "object": "task.comparison",
                "tasks": [one.name for one in tasks],
                "kinds": [one.kind for one in tasks],
                "noise": [one.noise for one in tasks],
                "space": tasks[0].space.digest,
                "method": tasks[0].space.method,
                "cosines": [[round(float(value), 6) for value in row] for row in table],
            }
        )

    async def _compared(self, task: str | InlineTask, where: str) -> TaskEmbedding:
        if isinstance(task, InlineTask):
            return task.embedding(where)
        found = await self._find(task)
        _check_done(found, where)
        return (await self._embedding(found)).renamed(found.name)

    async def map(self, request: Request) -> Response:
        """GET /v1/tasks/map: all tasks of the settings' method as one HTML page."""
        from metasepia.embedding import task_map

        method = request.query_params.get("method", self._settings.method)
        async with deadline_of(request, self._http).limit("drawing the map"):
            found, has_more = await self._page("", task_map.MAX_POINTS, None)
            of_method = [one for one in found if one.card["method"] == method]
            done = [one for one in of_method if one.card["status"] == "done"]
            if not done:
                raise InvalidRequest("method", f"no task is embedded by {method[:80]}; POST /v1/tasks makes one")
            shown = self._within_memory(done)
            left_out = {
                "by other methods": len(found) - len(of_method),
                "not embedded yet": len(of_method) - len(done),
                "beyond http.max_states_mib of vectors": len(done) - len(shown),
            }
            notes = [f"Left out: {count} {why}." for why, count in left_out.items() if count]
            notes += [f"Only the first {len(found)} tasks by id were looked at."] if has_more else []
            embeddings = [one async for batch in self._batches(shown) for one in batch[2]]
            points = task_map.points_of(embeddings)
            page = await asyncio.to_thread(task_map.render, points, "Tasks", notes=notes)
        return HTMLResponse(page)

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _find(self, id_: str) -> Artefact:
        """Raises UnknownName and DeletedName."""
        try:
            found = await self._catalogue.resolve("embedding", id_, current().tenant, deleted=True)
        except UnknownName as error:
            raise UnknownName(EMBEDDED, id_[:80], error.known) from None
        if found.deleted_unix_s is not None:
            raise DeletedName(EMBEDDED, id_[:80], found.deleted_unix_s)
        return found

    async def _embedding(self, found: Artefact) -> TaskEmbedding:
        return TaskEmbedding.from_bytes(await self._catalogue.get(found.digest))

    async def _vector(self, found: Artefact) -> dict[str, Any]:
        """What `include=vector` adds; null for one that is not done."""
        if found.card["status"] != "done":
            return {"vector": None}
        one = await self._embedding(found)
        return {
            "vector": one.vector.astype(float).tolist(),
            "space": {"digest": one.space.digest, **one.space.to_json()},
        }

    async def _arrow(self, found: Sequence[Artefact], about: Mapping[str, Any], deadline: Deadline) -> Response:
        done = [one for one in found if one.card["status"] == "done"]
        self._check_size(done, ARROW)
        left = [one.name for one in found if one.card["status"] != "done"]
        spaces: dict[str, Any] = {}
        first = {str(one.card["space"]): one for one in reversed(done)}
        for digest, one in first.items():
            spaces[digest] = (await self._embedding(one)).space.to_json()
        facts = {**about, "spaces": spaces, "not_done": left}
        pieces = deadline.over(stream(facts, self._batches(done)), "reading the tasks")  # pyright: ignore[reportArgumentType]
        return StreamingResponse(pieces, media_type=ARROW, headers=_ARROW_HEADERS)

    async def _batches(self, done: Sequence[Artefact]) -> AsyncIterator[Batch]:
        for begin in range(0, len(done), BLOBS_AT_ONCE):
            part = done[begin : begin + BLOBS_AT_ONCE]
            embeddings = await asyncio.gather(*(self._embedding(one) for one in part))
            experts = [_text(one.card.get("expert")) for one in part]
            yield [one.name for one in part], experts, embeddings

    def _within_memory(self, done: Sequence[Artefact]) -> Sequence[Artefact]:
        """The first whose vectors are within what an answer may hold; one at least."""
        left = self._http.max_states_mib * 2**20
        for count, one in enumerate(done):
            left -= _vector_bytes(one)
            if left < 0:
                return done[: max(count, 1)]
        return done

    def _check_size(self, found: Sequence[Artefact], form: str) -> None:
        """Raises InvalidRequest for an answer of more vectors than the settings allow."""
        name = "max_json_states_mib" if form == JSON else "max_states_mib"
        mib, most = sum(map(_vector_bytes, found)) / 2**20, getattr(self._http, name)
        if mib > most:
            way_out = f"let Accept name {ARROW}, or " if form == JSON else ""
            raise InvalidRequest(
                "limit",
                f"the answer would hold {mib:.2f} MiB of vectors and http.{name} allows {most:g}; {way_out}ask for "
                "fewer tasks at a time",
            )


def _vector_bytes(found: Artefact) -> int:
    """Of its vector in float32; 0 while it has none."""
    dims = found.card.get("dims")
    return 4 * dims if isinstance(dims, int) else 0


def _page_body(page: Mapping[str, Any], data: Sequence[Mapping[str, Any]]) -> bytes:
    """One call of `json.dumps` holds the interpreter, and all other requests, until it returns: one a task."""
    tasks = ",".join([json.dumps(one, ensure_ascii=False, allow_nan=False) for one in data])
    return f'{json.dumps(page)[:-1]}, "data": [{tasks}]}}'.encode()


def task_json(found: Artefact) -> dict[str, Any]:
    """A task as every route shows it, without its vector."""
    card: dict[str, Any] = found.card
    done = card["status"] == "done"
    return {
        "id": found.name,
        "object": "task",
        "created": int(found.created_unix_s),
        "status": card["status"],
        "kind": card["kind"],
        "method": card["method"],
        "space": {"digest": card["space"]},
        "digest": found.digest if done else None,
        "dims": card.get("dims"),
        "num_texts": card["num_texts"],
        "labels": card["labels"],
        "noise": card["noise"],
        "seed": card["seed"],
        "expert": card["expert"],
        "model": card["model"],
        "prompt": card["prompt"],
        "source": card["source"],
        "notes": card.get("notes", []),
        "progress": card.get("progress"),
        "error": card["error"],
    }


def _receipt(found: Artefact, request_digest: str | None) -> dict[str, Any]:
    """What made the vector, by digests; `executed` is what a shard ran for the answers that were asked for."""
    card: dict[str, Any] = found.card
    executed: dict[str, Any] = card["executed"] or {}
    names = ("backbone", "factors", "adapter", "path", "dtype", "tp_size")
    return {
        "request": request_digest,
        "task": card["job"],
        "embedding": found.digest if card["status"] == "done" else None,
        "space": card["space"],
        "method": card["method"],
        "encoder": card["surrogate"],
        "probes": card["probes"],
        "answers": card.get("answers"),
        "context": card["source"].get("context"),
        "module": card["source"].get("module"),
        "seed": card["seed"],
        **{name: executed.get(name) for name in names},
    }


def _check_done(found: Artefact, param: str = "id") -> None:
    if found.card["status"] != "done":
        raise InvalidRequest(param, not_done(found).message)


def _kind(query: Mapping[str, str]) -> str | None:
    kind = query.get("kind")
    if kind is not None and kind not in KINDS:
        raise InvalidRequest("kind", f"must be one of {', '.join(KINDS)}, got {kind[:40]!r}")
    return kind


def _form(request: Request) -> tuple[str, bool]:
    """The answer's media type, and whether vectors are wanted. Raises InvalidRequest, NotSupported."""
    include = request.query_params.get("include")
    if include not in (None, "vector"):
        raise InvalidRequest("include", f"must be vector, got {include[:40]!r}")
    return form_of(request.headers.get("accept")), include is not None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
