"""POST /v1/hidden_states: a backbone's states by layer, pooled or of every token, of any expert's rows; and the tasks
whose running centroids they feed (`serve.states.observing`).

Rows are asked for a few MiB at a time and in order, so that neither this process nor a queue holds a large answer
whole. As an Arrow stream it leaves the same way, record batch by record batch; its end is a record batch of no rows.
"""

import asyncio
import base64
import itertools
import json
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from actors.messages import Receipt
from cluster.door_settings import HttpSettings
from metasepia.centroids import CentroidKey, OnlineCentroids, adapter_digest
from metasepia.errors import InvalidRequest, NotSupported
from metasepia.models.prepared import PreparedBackbone
from metasepia.reasoning.named import PREFIX as CONTEXT
from metasepia.rows import Executed, HiddenStates, HiddenStatesWanted, Row
from serve.access.principal import current
from serve.load.admission import Admission
from serve.models.embedding import sequences_of
from serve.models.names import AUTO, Chosen, Names
from serve.models.prompts import Prompts, away
from serve.models.routing import Routing
from serve.parts import Backbone
from serve.requests import arrow, failures, streaming
from serve.requests.asked import Asked
from serve.requests.deadlines import Deadline
from serve.requests.receipts import receipt_json
from serve.requests.schemas import HiddenStatesRequest
from serve.requests.streams import Stream, in_turn
from serve.states.observed_tasks import facts_json
from serve.states.observing import TIMEOUT_S, Observer

T = TypeVar("T")

CHUNK_BYTES = 4 << 20
CHUNK_ROWS, CHUNK_TOKENS = 64, 4096
"""Of states, of texts and of their tokens asked for in one call; a single text may bring more."""
CALLS_AT_ONCE = 2

JSON, ARROW = "application/json", arrow.MEDIA_TYPE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request about to run."""

    body: HiddenStatesRequest
    chosen: Chosen
    layers: tuple[int, ...]
    """From 0, as they were asked for."""
    rows: tuple[Row, ...]
    request_digest: str
    deadline: Deadline

    @property
    def prepared(self) -> PreparedBackbone:
        return self.chosen.backbone.prepared

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    def num_bytes(self, row: Row) -> int:
        """Of the row's states in float32."""
        num_states = len(row.token_ids) if self.body.pooling == "none" else 1
        return 4 * len(self.layers) * num_states * self.prepared.hidden_size


class HiddenStatesRoute:
    """Answers POST /v1/hidden_states."""

    def __init__(
        self,
        http: HttpSettings,
        names: Names,
        prompts: dict[str, Prompts],
        routing: Routing,
        observer: Observer,
        add_tokens: Callable[[int, int], None],
        admission: Admission,
    ) -> None:
        self._admission = admission
        self._http, self._names, self._prompts = http, names, prompts
        self._routing, self._observer, self._add_tokens = routing, observer, add_tokens

    async def post(self, request: Request) -> Response:
        """POST /v1/hidden_states"""
        form = form_of(request.headers.get("accept"))
        asked = await Asked.of(request, self._http, "input")
        body = HiddenStatesRequest.of(asked.tree)
        body.check(self._http)
        plan = await self._plan(asked, body)
        limit = ("max_states_mib", "max_json_states_mib")[form == JSON]
        check_size(plan, getattr(self._http, limit), f"http.{limit}", form)
        await self._check_room(plan)
        part = plan.chosen.backbone.id
        place = self._admission.admitted(plan.num_tokens, asked.num_bytes, asked.deadline, part=part)
        if form == ARROW:
            events = in_turn(place, self._arrow(plan))
            first = await anext(events)  # decides the status: a refusal must not hide inside a 200
            return Stream(_bytes(first, events), events, ARROW, {"vary": "accept"})
        async with place:
            return Response(await self._json(plan), media_type=JSON, headers={"vary": "accept"})

    # -- what is asked -------------------------------------------------------------------------------------------------

    async def _plan(self, asked: Asked, body: HiddenStatesRequest) -> Plan:
        async with asked.deadline.limit("resolving the model"):
            chosen = await self._resolve(body.model)
        prepared = chosen.backbone.prepared
        layers = layers_of(body.layers, prepared.num_layers)
        single = isinstance(asked.tree["input"], str) or body.is_one_token_list
        fields = ["input"] if single else [f"input[{index}]" for index in range(len(body.inputs))]
        prompts, items = self._prompts[chosen.backbone.id], body.inputs
        sequences = await away(sum(len(item) for item in items), lambda: sequences_of(items, fields, prepared, prompts))
        id_ = f"hidden-{uuid.uuid4().hex}"
        rows = tuple(
            Row(
                request_id=f"{id_}-{index}",
                backbone=prepared.digest,
                token_ids=token_ids,
                adapter=chosen.adapter,
                deadline_unix_s=asked.deadline.unix_s,
                want="hidden_states",
                hidden=HiddenStatesWanted(layers=layers, pooling=body.pooling),
            )
            for index, token_ids in enumerate(sequences)
        )
        return Plan(
            body=body,
            chosen=chosen,
            layers=layers,
            rows=rows,
            request_digest=asked.digest,
            deadline=asked.deadline,
        )

    async def _resolve(self, model: str) -> Chosen:
        """Raises UnknownName, DeletedName, and NotSupported for a name that has no one model's states."""
        if model in self._names.encoders:
            raise NotSupported(f"hidden states of the encoder {model}", "its vectors are at /v1/embeddings")
        if model == AUTO or model.startswith(CONTEXT):
            raise NotSupported(f"hidden states of {model[:80]}", "name a backbone, an expert or a mixture")
        return await self._names.resolve(model)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _answers(self, plan: Plan, seen: OnlineCentroids) -> AsyncGenerator[list[HiddenStates]]:
        """Chunk by chunk, in order and within the deadline; what a task needs of them is added up in `seen`."""
        backbone = plan.chosen.backbone
        registered = await self._registered(plan)
        answers = plan.deadline.over(ask(backbone, chunks(plan)), "the hidden states")
        async with aclosing(answers):
            async for chunk in answers:
                if plan.body.task is not None:
                    for key, place in _keys(plan, chunk[0].executed):
                        states = np.stack([one.states[place] for one in chunk])
                        seen.observe(key, states, registered.get(key))
                yield chunk
        self._add_tokens(plan.num_tokens, 0)

    async def _json(self, plan: Plan) -> bytes:
        seen, found = self._observer.adding_up(), list[HiddenStates]()
        async with aclosing(self._answers(plan, seen)) as answers:
            async for chunk in answers:
                found += chunk
        task = await self._told(plan, seen)
        num_chars = sum(plan.num_bytes(row) for row in plan.rows)
        return await away(num_chars, lambda: _body(plan, found, task))

    async def _arrow(self, plan: Plan) -> AsyncGenerator[bytes]:
        """The stream in pieces; an error after the first is its last record batch, since the status has left."""
        seen = self._observer.adding_up()
        writer: arrow.StatesWriter | None = None
        row_of = {row.request_id: (index, row) for index, row in enumerate(plan.rows)}
        try:
            async with aclosing(self._answers(plan, seen)) as answers:
                async for chunk in answers:
                    if writer is None:
                        writer = arrow.StatesWriter(plan.prepared.hidden_size, _about(plan, chunk[0].executed))
                    for one in chunk:
                        index, row = row_of[one.request_id]
                        about = plan.layers, row.token_ids, plan.body.pooling
                        for piece in writer.add(index, *about, one.states, _receipt(plan, one.executed)):
                            yield piece
            assert writer is not None  # a request has a row
            end: dict[str, Any] = {"usage": _usage(plan)}
            if (task := await self._told(plan, seen)) is not None:
                end["task"] = task
            yield writer.end(end)
        except Exception as error:
            if writer is None:
                raise
            streaming.break_off()
            yield writer.end(failures.answer(error).body)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    async def _check_room(self, plan: Plan) -> None:
        """Raises InvalidRequest before anything is computed for a task that there is no room for."""
        if plan.body.task is None or not plan.body.observe:
            return
        keys = [key for key, _ in _keys(plan, None)]
        try:
            await _soon(plan, self._observer.part.check_room(current().tenant, keys))
        except Exception as error:
            if isinstance(failures.unwrap(error), InvalidRequest):
                raise
            # It is away: the states can be had all the same, and the answer says that nobody observed them.

    async def _registered(self, plan: Plan) -> dict[CentroidKey, np.ndarray]:
        """The centroid on the card of the expert that the task is named after."""
        if plan.body.task is None or plan.chosen.backbone is not self._routing.backbone:
            return {}
        try:
            found = await _soon(plan, self._routing.registered(plan.body.task))
        except Exception:
            return {}  # the registry is away, and drift is counted from what was known before
        return {} if found is None else {found[0]: found[1]}

    async def _told(self, plan: Plan, seen: OnlineCentroids) -> dict[str, Any] | None:
        """Tells the states to the part that keeps centroids; how the task stands then, for the answer.

        Never raises: an observation is no reason to keep the states from the client.
        """
        if plan.body.task is None:
            return None
        told: dict[str, Any] = {"name": plan.body.task, "observed": False, "centroids": []}
        try:
            part = self._observer.part
            if plan.body.observe:
                facts = await _soon(plan, part.absorb(current().tenant, tuple(seen)))
                told["centroids"] = [facts_json(one) for one in facts]
                told["observed"] = len(facts) == len(seen)
                if not told["observed"]:
                    told["reason"] = "there is no room for another task or centroid any more"
            else:
                compared = await _soon(plan, part.compare(current().tenant, tuple(seen)))
                told["centroids"] = [facts_json(one) | {"distance": distance} for one, distance in compared]
        except Exception as error:
            told["reason"] = f"the part that keeps centroids did not answer ({type(failures.unwrap(error)).__name__})"
        return told


def form_of(accept: str | None) -> Literal["application/json", "application/vnd.apache.arrow.stream"]:
    """The answer's media type by an Accept header (RFC 9110, 12.5.1); among equals the one that it names.

    Raises NotSupported for a header that allows neither.
    """
    quality = {JSON: 0.0, ARROW: 0.0}
    named = {JSON: -1, ARROW: -1}
    for part in (accept or "*/*").split(","):
        range_, *parameters = (one.strip().lower() for one in part.split(";"))
        q = next((one[2:] for one in parameters if one.startswith("q=")), "1")
        try:
            weight = float(q)
        except ValueError:
            weight = 0.0
        for media in quality:
            how = 2 if range_ == media else 1 if range_ == "application/*" else 0 if range_ == "*/*" else -1
            if how > named[media]:
                named[media], quality[media] = how, weight
    if not max(quality.values()) > 0:
        raise NotSupported(f"an answer as {(accept or '')[:80]}", f"let Accept name {JSON} or {ARROW}")
    return ARROW if (quality[ARROW], named[ARROW]) > (quality[JSON], named[JSON]) else JSON


def layers_of(asked: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Counted from 0, negative ones from the end. Raises InvalidRequest for one that is not there, or twice."""
    found: dict[int, int] = {}
    for place, layer in enumerate(asked):
        if not -num_layers - 1 <= layer <= num_layers:
            raise InvalidRequest(
                f"layers[{place}]",
                f"{layer} is not there: 0 is the embedding, {num_layers} the last block's output after the final "
                f"norm, and -{num_layers + 1} to -1 count from the end",
            )
        number = layer % (num_layers + 1)
        if number in found:
            raise InvalidRequest(f"layers[{place}]", f"{layer} names the same layer as layers[{found[number]}]")
        found[number] = place
    return tuple(found)


def check_size(plan: Plan, max_mib: float, setting: str, form: str) -> None:
    """Raises InvalidRequest for an answer of more states than the setting allows."""
    mib = sum(plan.num_bytes(row) for row in plan.rows) / 2**20
    if mib > max_mib:
        way_out = f"let Accept name {ARROW}, or " if form == JSON else ""
        raise InvalidRequest(
            "input",
            f"the answer would hold {mib:.2f} MiB of states and {setting} allows {max_mib:g}; {way_out}ask for fewer "
            "layers, pool the tokens, or send several requests",
        )


def chunks(plan: Plan) -> Iterator[list[Row]]:
    """The rows in order, each chunk of bounded size where its rows are."""
    chunk, num_bytes, num_tokens = list[Row](), 0, 0
    for row in plan.rows:
        num_bytes += plan.num_bytes(row)
        num_tokens += len(row.token_ids)
        if chunk and (num_bytes > CHUNK_BYTES or num_tokens > CHUNK_TOKENS or len(chunk) == CHUNK_ROWS):
            yield chunk
            chunk, num_bytes, num_tokens = [], plan.num_bytes(row), len(row.token_ids)
        chunk.append(row)
    yield chunk


async def ask(backbone: Backbone, asked: Iterator[list[Row]]) -> AsyncGenerator[list[HiddenStates]]:
    """The chunks' answers in order, few asked for ahead. However this ends, what was asked for is cancelled."""
    calls: deque[asyncio.Task[list[HiddenStates]]] = deque()
    try:
        while True:
            for chunk in itertools.islice(asked, CALLS_AT_ONCE - len(calls)):
                calls.append(asyncio.create_task(_answer(backbone, chunk)))
            if not calls:
                return
            yield await calls[0]
            calls.popleft()
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def _answer(backbone: Backbone, rows: list[Row]) -> list[HiddenStates]:
    return await backbone.hidden_states(rows)


async def _bytes(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


def _keys(plan: Plan, executed: Executed | None) -> list[tuple[CentroidKey, int]]:
    """A key for each layer, with its place in the answer's states; by what was executed where that is known."""
    assert plan.body.task is not None
    pooling = plan.body.pooling
    assert pooling != "none"  # the body's check has seen to it
    adapter = adapter_digest(plan.chosen.adapter if executed is None else executed.adapter)
    return [
        (
            CentroidKey(
                backbone=plan.prepared.digest, task=plan.body.task, adapter=adapter, layer=layer, pooling=pooling
            ),
            place,
        )
        for place, layer in enumerate(plan.layers)
    ]


async def _soon(plan: Plan, answer: Coroutine[Any, Any, T]) -> T:
    """What another part says of tasks, within the deadline too. Raises TimeoutError."""
    return await asyncio.wait_for(answer, min(TIMEOUT_S, max(0.0, plan.deadline.unix_s - time.time())))


def _receipt(plan: Plan, executed: Executed) -> dict[str, Any]:
    return receipt_json(Receipt.of(executed, request=plan.request_digest))


def _usage(plan: Plan) -> dict[str, int]:
    return {"prompt_tokens": plan.num_tokens, "total_tokens": plan.num_tokens}


def _about(plan: Plan, executed: Executed) -> dict[str, Any]:
    """What is known before the end: the stream's schema metadata."""
    return {
        "model": plan.body.model,
        "layers": list(plan.layers),
        "pooling": plan.body.pooling,
        "num_inputs": len(plan.rows),
        "created": int(time.time()),
        "receipt": _receipt(plan, executed),
    }


def _body(plan: Plan, answers: Sequence[HiddenStates], task: dict[str, Any] | None) -> bytes:
    """The JSON answer. One call of `json.dumps` holds the interpreter until it returns, a second for 8 MiB of states,
    and with it all other requests, whatever thread it is in: so each call has one vector.
    """
    every = plan.body.pooling == "none"
    data: list[str] = []
    for index, (row, answer) in enumerate(zip(plan.rows, answers, strict=True)):
        for place, layer in enumerate(plan.layers):
            states = np.ascontiguousarray(answer.states[place], dtype="<f4")
            entry: dict[str, Any] = {"object": "hidden_states", "index": index, "layer": layer}
            entry["shape"] = list(states.shape)
            if every:
                entry["token_ids"] = list(row.token_ids)
            if plan.body.encoding_format == "base64":
                numbers = f'"{base64.b64encode(states.tobytes()).decode("ascii")}"'
            elif every:
                numbers = f"[{','.join([_dumped(one.tolist()) for one in states])}]"
            else:
                numbers = _dumped(states.tolist())
            data.append(f'{_dumped(entry)[:-1]},"states":{numbers}}}')
    about = _about(plan, answers[0].executed)
    receipt = about.pop("receipt")
    rest = {**about, "usage": _usage(plan), "receipt": receipt} | ({} if task is None else {"task": task})
    return f'{{"object":"list","data":[{",".join(data)}],{_dumped(rest)[1:]}'.encode()


def _dumped(tree: Any) -> str:
    return json.dumps(tree, separators=(",", ":"))
