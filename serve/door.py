"""What stands behind the routes: a body checked, a name resolved, a part asked, an answer with its receipt."""

import asyncio
import importlib.metadata
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.door_settings import HttpSettings
from cluster.settings import CentroidSettings, DispatchMargins, TaskSettings
from metasepia.errors import InvalidRequest, NotSupported, UnknownName
from metasepia.reasoning.named import PREFIX
from serve.access.authentication import Access
from serve.access.principal import current
from serve.access.routes import KeyRoutes
from serve.contexts.classification import Classification
from serve.contexts.named import Contexts, number_of
from serve.contexts.vectors import ContextVectors
from serve.experts.accepting import Fits
from serve.experts.mixtures import Mixtures
from serve.experts.registered import Experts
from serve.experts.searching import Searches, Searching
from serve.job_routes import JobRoutes, submitted_jobs
from serve.load.admission import Admission, estimate
from serve.load.drain import Drain
from serve.models import completion
from serve.models.embedding import Embedding, embeddings_arrow, embeddings_json
from serve.models.names import AUTO, MIXTURE, Names
from serve.models.prompts import Prompts
from serve.models.routing import Routed, Routing
from serve.parts import (
    Backbone,
    Catalogue,
    Mixing,
    Reasoning,
    TextEncoder,
)
from serve.requests import arrow, failures, streaming
from serve.requests.asked import Asked, deadline_of
from serve.requests.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    ContextRequest,
    EmbeddingsRequest,
    MixtureRequest,
    MoreExamplesRequest,
)
from serve.requests.streams import Stream, in_turn
from serve.states.hidden_states import HiddenStatesRoute, form_of
from serve.states.observed_tasks import ObservedTasks
from serve.states.observing import Centroids, Observer
from serve.tasks.part import TaskPart
from serve.tasks.routes import TaskRoutes
from serve.telemetry.gathering import CONTENT_TYPE, Gatherer
from serve.telemetry.health import Health, probe_backbone
from serve.telemetry.metrics import Metrics
from serve.telemetry.status import Status, served_replicas

_BY_ACCEPT = {"vary": "accept"}


class Door:
    """Everything behind the routes. Plain: the parts come in, so tests give their own."""

    def __init__(
        self,
        http: HttpSettings,
        backbones: Sequence[Backbone],
        encoders: Sequence[TextEncoder],
        reasoning: Reasoning,
        mixing: Mixing,
        searches: Searches,
        catalogue: Catalogue,
        dispatch: Sequence[str],
        margins: DispatchMargins,
        fits: Mapping[str, Fits],
        centroids: Centroids,
        observing: CentroidSettings,
        tasks: TaskPart,
        embedding_tasks: TaskSettings,
        admission: Admission,
        access: Access,
    ) -> None:
        self.access, self.keys = access, KeyRoutes(http, access)
        self.admission, self.drain = admission, Drain(admission)
        self.http = self._http = http
        self._mixing = mixing
        self.prompts = {one.id: Prompts(Path(one.prepared.tokenizer_dir), one.id) for one in backbones}
        first = backbones[0]
        observer = Observer(centroids, observing)
        self._routing = Routing(first, catalogue, dispatch, margins, self.prompts[first.id], observer, encoders)
        self.names = Names(backbones, encoders, catalogue, self._routing.is_served)
        embedding = Embedding(self.names, self.prompts)
        self._embedding = embedding
        vectors = ContextVectors(self.names, embedding, self.prompts, admission)
        self._contexts = Contexts(http, self.names, vectors, reasoning, catalogue)
        self._classification = Classification(http, self._contexts, vectors, reasoning)
        self.experts = Experts(http, fits, catalogue)
        self.mixtures = Mixtures(http, self.names.backbones, catalogue)
        self.searching = Searching(http, self.names.backbones, self.prompts, searches, tasks)
        self.jobs = JobRoutes(http, searches, catalogue, submitted_jobs)
        self.metrics = Metrics()
        self.hidden_states = HiddenStatesRoute(
            http, self.names, self.prompts, self._routing, observer, self.metrics.add_tokens, admission
        )
        self.tasks = ObservedTasks(http, self.names.backbones, centroids)
        self.task_embeddings = TaskRoutes(
            http, embedding_tasks, self.names, self._contexts, reasoning, catalogue, tasks, admission
        )
        probes = {f"backbone {one.id}": probe_backbone(one) for one in backbones}
        probes |= {f"encoder {one.id}": one.check for one in encoders}
        self.health_of_parts = Health(probes | {"reasoning pool": reasoning.check, "task embedding": tasks.check})
        self._gatherer = Gatherer()
        asks = {
            "backbones": {one.id: one.load for one in backbones},
            "encoders": {one.id: one.statistics for one in encoders},
            "reasoning": {"": reasoning.statistics},
            "task_embedding": {"": tasks.statistics},
            "admission": {"": admission.told},
            "all_replicas": {"": self._gatherer.totals},
        }
        self.status_of_parts = Status(self.metrics.recent, self.health_of_parts, asks, served_replicas)

    async def classify(self, request: Request) -> Response:
        form = form_of(request.headers.get("accept"))
        asked = await Asked.of(request, self._http, "classify")
        body = ClassifyRequest.of(asked.tree)
        body.check(self._http)
        if form == arrow.MEDIA_TYPE and body.explain:
            raise NotSupported("explanations as an Arrow stream", "let Accept name application/json, or ask without")
        answer = await self._classification.classify(body, asked.digest, asked.deadline)
        self.metrics.add_tokens(answer["usage"]["prompt_tokens"], 0)
        if form == arrow.MEDIA_TYPE:
            return Response(arrow.classification(answer), media_type=form, headers=_BY_ACCEPT)
        return JSONResponse(answer, headers=_BY_ACCEPT)

    async def create_context(self, request: Request) -> Response:
        asked = await Asked.of(request, self._http, "context")
        body = ContextRequest.of(asked.tree)
        body.check(self._http)
        answer = await self._contexts.create(body, asked.digest, asked.deadline)
        self.metrics.add_tokens(answer["usage"]["prompt_tokens"], 0)
        return JSONResponse(answer)

    async def extend_context(self, request: Request) -> Response:
        asked = await Asked.of(request, self._http, "examples")
        body = MoreExamplesRequest.of(asked.tree)
        body.check(self._http)
        answer = await self._contexts.extend(request.path_params["id"], body, asked.digest, asked.deadline)
        self.metrics.add_tokens(answer["usage"]["prompt_tokens"], 0)
        return JSONResponse(answer)

    async def contexts(self, request: Request) -> Response:
        limit = number_of(request.query_params, "limit", 100, 1, 1000)
        async with deadline_of(request, self._http).limit("listing the contexts"):
            return JSONResponse(await self._contexts.listing(request.query_params.get("after"), limit))

    async def context(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("reading the context"):
            return JSONResponse(await self._contexts.get(request.path_params["id"]))

    async def context_examples(self, request: Request) -> Response:
        begin = number_of(request.query_params, "begin", 0, 0, 10**9)
        limit = number_of(request.query_params, "limit", 1000, 1, 10_000)
        async with deadline_of(request, self._http).limit("reading the context"):
            return JSONResponse(await self._contexts.examples(request.path_params["id"], begin, limit))

    async def delete_context(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("deleting the context"):
            return JSONResponse(await self._contexts.delete(request.path_params["id"]))

    async def embeddings(self, request: Request) -> Response:
        form = form_of(request.headers.get("accept"))
        asked = await Asked.of(request, self._http, "input")
        body = EmbeddingsRequest.of(asked.tree)
        body.check(self._http)
        single = isinstance(asked.tree["input"], str) or body.is_one_token_list
        fields = ["input"] if single else [f"input[{index}]" for index in range(len(body.inputs))]
        if body.model not in self.names.encoders and body.model not in self.names.backbones:
            await self.names.resolve(body.model)  # says what is known, unless it is an expert
            raise NotSupported(f"embedding with {body.model}", "use its backbone or an encoder")
        tokens, _ = estimate(body.inputs)
        async with self.admission.admitted(tokens, asked.num_bytes, asked.deadline, part=body.model):
            embedded = await self._embedding.embed(body.model, body.inputs, fields, asked.deadline, asked.digest)
        self.metrics.add_tokens(embedded.num_tokens, 0)
        if form == arrow.MEDIA_TYPE:
            return Response(embeddings_arrow(body, embedded), media_type=form, headers=_BY_ACCEPT)
        return JSONResponse(embeddings_json(body, embedded), headers=_BY_ACCEPT)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest)

    async def complete(self, request: Request) -> Response:
        return await self._complete(request, CompletionRequest)

    async def _complete(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        asked = await Asked.of(request, self._http)
        body = kind.of(asked.tree)
        body.check()
        async with asked.deadline.limit("resolving the model"):
            if body.model == AUTO and await self._routing.is_served():
                backbone = self._routing.backbone
                prompts = self.prompts[backbone.id]
                token_ids = await completion.tokens_of(body, backbone, prompts)
                text = completion.question_of(body)
                cost = len(token_ids[0]), asked.num_bytes
                async with self.admission.admitted(*cost, asked.deadline, part=backbone.id):
                    routed = await self._routing.route(token_ids[0], body.dispatch, asked.deadline, text)
            else:
                routed = Routed(await self.names.resolve(body.model))
                backbone = routed.chosen.backbone
                prompts = self.prompts[backbone.id]
                token_ids = await completion.tokens_of(body, backbone, prompts)
        plan = completion.plan(body, token_ids, routed, asked.digest, asked.deadline, prompts)
        cost, rows = sum(len(row.token_ids) + row.sampling.max_tokens for row in plan.rows), len(plan.rows)
        place = self.admission.admitted(cost, asked.num_bytes, asked.deadline, part=backbone.id, rows=rows)

        def count(prompt: int, answer: int) -> None:
            self.metrics.add_tokens(prompt, answer)
            place.used = (place.used or 0) + prompt + answer

        if not body.stream:
            async with place:
                answer = await completion.whole(plan, prompts)
                count(answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
            return JSONResponse(answer)
        events = in_turn(place, completion.events(plan, prompts, count))
        # The first event decides the status: a refusal must not hide inside a 200.
        first = await anext(events)
        return Stream(_server_sent(first, events), events, "text/event-stream")

    async def mix(self, request: Request) -> Response:
        asked = await Asked.of(request, self._http)
        body = MixtureRequest.of(asked.tree)
        backbone = self.names.backbones.get(body.backbone)
        if backbone is None:
            raise UnknownName("backbone", body.backbone, tuple(self.names.backbones))
        if body.name == "search":
            raise InvalidRequest("name", "'search' is a path of this server; choose another")
        async with asked.deadline.limit("registering the mixture"):
            owner = current().tenant
            digest = await self._mixing.register(backbone.prepared.digest, body.weights, owner, body.name)
        id_ = body.name or digest
        return JSONResponse(
            {"id": id_, "object": "mixture", "model": f"{backbone.id}:{MIXTURE}{id_}", "digest": digest}
        )

    async def models(self, request: Request) -> Response:
        async with deadline_of(request, self._http).limit("listing the models"):
            return JSONResponse({"object": "list", "data": await self.names.listing()})

    async def model(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        async with deadline_of(request, self._http).limit("listing the models"):
            if wanted.startswith(PREFIX):
                stored = await self._contexts.find(wanted, usable=False)
                return JSONResponse(self.names.context(stored.artefact))
            return JSONResponse(await self.names.one(wanted))

    async def health(self, request: Request) -> Response:
        report = await self.health_of_parts.report()
        if report.ready:
            return JSONResponse({"status": "ready", "parts": report.parts})
        answer = failures.envelope(failures.TABLE[failures.errors.Unavailable], report.reason, None, 2.0)
        return JSONResponse(answer.body | {"parts": report.parts}, answer.failure.status, headers=answer.headers)

    async def prometheus(self, request: Request) -> Response:
        return Response(await self._gatherer.text(), media_type=CONTENT_TYPE)

    async def status(self, request: Request) -> Response:
        return JSONResponse(await self.status_of_parts.json())

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": importlib.metadata.version("metasepia")})


async def _server_sent(first: dict[str, Any], events: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events; an error after the first one is an event too, since the status has left."""
    async with aclosing(events):
        yield _event(first)
        try:
            async for event in events:
                yield _event(event)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            streaming.break_off()
            yield _event(failures.answer(error).body)
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
