"""Named contexts at the door: made, listed, extended, deleted, and found again when a request names one.

A context is in the registry before it is acknowledged, and its blob holds the vectors of its inputs, so whatever holds
a compiled copy may lose it at any time.
"""

import asyncio
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.labelled import labelled_vectors
from actors.messages import Build, LabelledVectors, Receipt, SelfChecked
from cluster.door_settings import HttpSettings
from metasepia.digests import short
from metasepia.errors import DeletedName, InvalidRequest, Outdated, UnknownName
from metasepia.reasoning.named import (
    PREFIX,
    EmbeddedContext,
    EncoderName,
    NamedContext,
    Protocol,
    digest_of_name,
)
from metasepia.reasoning.reduction import ReductionRecipe
from metasepia.registry.entries import Artefact
from serve.access.principal import current
from serve.contexts.vectors import ContextVectors, Embedded, Vectors
from serve.load.admission import Place
from serve.models.names import Names
from serve.parts import Catalogue, Reasoning
from serve.requests.deadlines import Deadline
from serve.requests.inputs import Inputs, Labelled, check_classes, check_number, read_labelled
from serve.requests.receipts import receipt_json
from serve.requests.schemas import ContextRequest, MoreExamplesRequest
from serve.shipped import ModuleCard

NUM_PROMPTED = 64
"""Contexts of the protocols vanilla and loo whose examples are kept at hand: their queries are read after them."""
NUM_FOUND = 256
"""Contexts whose cards are kept at hand, the longest unused leave first."""
NUM_KNOWN = 5
"""Contexts that an error about an unknown one names."""


@dataclass(frozen=True)
class Stored:
    """A registered context, as its card tells."""

    artefact: Artefact

    @property
    def id(self) -> str:
        return PREFIX + self.artefact.digest

    @property
    def card(self) -> dict[str, Any]:
        return self.artefact.card


class Contexts:
    """Makes and finds contexts."""

    def __init__(
        self, http: HttpSettings, names: Names, vectors: ContextVectors, reasoning: Reasoning, catalogue: Catalogue
    ) -> None:
        self._http, self._names, self._vectors = http, names, vectors
        self._reasoning, self._catalogue = reasoning, catalogue
        self._prompted: OrderedDict[str, NamedContext] = OrderedDict()
        self._found: OrderedDict[tuple[str, str], Stored] = OrderedDict()

    # -- making --------------------------------------------------------------------------------------------------------

    async def create(self, body: ContextRequest, request_digest: str, deadline: Deadline) -> dict[str, Any]:
        """Answers POST /v1/contexts. Raises UnknownName, WindowExceeded and InvalidRequest naming the field."""
        began_s = time.monotonic()
        labelled = read_labelled(body.examples, body.unlabelled, self._http)
        named = await self.name(labelled, body.encoder, body.module, body.protocol, body.seed)
        found = await self._live(named.digest)
        if found is not None:
            return self._made_json(found, request_digest, began_s, cached=True)
        contents = (*(one.content for one in named.examples), *named.unlabelled)
        async with await self._vectors.place(named.encoder, "the context", named.kind, contents, deadline):
            embedded = await self._vectors.new(named, labelled, None, deadline, request_digest)
            return await self._register(embedded, request_digest, began_s, deadline)

    async def extend(
        self, id_: str, body: MoreExamplesRequest, request_digest: str, deadline: Deadline
    ) -> dict[str, Any]:
        """Answers POST /v1/contexts/{id}/examples. Raises as `create` and `find` do."""
        began_s = time.monotonic()
        stored = await self.find(id_)
        old = await self.blob(stored)
        labelled = read_labelled(body.examples, (), self._http, kind=old.named.kind)
        num = len(old.named.examples) + len(labelled.examples)
        check_number("examples", num, self._http.max_examples, "max_examples", "make a new context of fewer")
        check_classes([one.label for one in labelled.examples], self._http, old.named.labels)
        named = old.named.extended(labelled.examples)
        found = await self._live(named.digest)
        if found is not None:
            return self._made_json(found, request_digest, began_s, cached=True)
        contents = [one.content for one in labelled.examples]
        async with await self._vectors.place(named.encoder, f"the context {id_}", named.kind, contents, deadline):
            embedded = await self._vectors.more(old, named, labelled, deadline, request_digest)
            return await self._register(embedded, request_digest, began_s, deadline)

    async def name(
        self,
        labelled: Labelled,
        encoder: str | None,
        module: str | None,
        protocol: Protocol | None,
        seed: int | None,
    ) -> NamedContext:
        """What these examples would be called. Raises UnknownName and InvalidRequest naming the field."""
        check_classes([one.label for one in labelled.examples], self._http)
        if labelled.kind == "vector" and encoder is not None:
            raise InvalidRequest("encoder", "vectors need none; leave it out")
        protocol = protocol or "stream"
        chosen = None if labelled.kind == "vector" else await self._vectors.encoder(encoder, labelled.kind)
        if protocol != "stream" and (chosen is None or chosen.id not in self._names.backbones):
            backbones = ", ".join(self._names.backbones)
            raise InvalidRequest(
                "protocol", f"{protocol} reads examples in a prompt; name a backbone as encoder ({backbones})"
            )
        return NamedContext.of(
            labelled.kind,
            labelled.examples,
            encoder=chosen,
            module=self.module(module).digest,
            unlabelled=labelled.unlabelled,
            seed=seed or 0,
            protocol=protocol,
            reduction=dataclasses.asdict(ReductionRecipe()),
        )

    def module(self, name: str | None) -> ModuleCard:
        """Raises UnknownName."""
        modules = self._reasoning.modules
        if name is None or name == "default":
            return modules[0]
        for one in modules:
            if name == one.name:
                return one
        raise UnknownName("reasoning module", name, ("default", *(one.name for one in modules)))

    async def place(self, stored: Stored, queries: Inputs, deadline: Deadline) -> Place:
        """In the queue of what reads queries to the context. Raises Outdated."""
        encoder = stored.card["encoder"] and EncoderName(**stored.card["encoder"])
        what = f"the context {stored.id}"
        return await self._vectors.place(encoder, what, queries.kind, queries.contents, deadline)

    async def embed_queries(self, stored: Stored, queries: Inputs, deadline: Deadline, request_digest: str) -> Vectors:
        """Raises InvalidRequest for queries of another kind or width than the context's."""
        card = stored.card
        if queries.kind != card["input"]:
            raise InvalidRequest(queries.fields[0], f"{queries.kind}; the inputs of {stored.id} are of {card['input']}")
        found = await self._vectors.queries(await self._shell(stored), queries, deadline, request_digest)
        if found.values.shape[1] != card["width"]:
            raise InvalidRequest(
                queries.fields[0], f"{found.values.shape[1]} numbers; the vectors of {stored.id} have {card['width']}"
            )
        return found

    async def _shell(self, stored: Stored) -> NamedContext:
        """As much of a context as decides how queries to it are embedded: of a prompted one, all of it."""
        card, digest = stored.card, stored.artefact.digest
        if card["protocol"] == "stream":
            return NamedContext(
                kind=card["input"],
                examples=(),
                encoder=EncoderName(**card["encoder"]) if card["encoder"] else None,
                module=card["module"]["digest"],
                protocol=card["protocol"],
            )
        if digest not in self._prompted:
            self._prompted[digest] = (await self.blob(stored)).named
            if len(self._prompted) > NUM_PROMPTED:
                self._prompted.popitem(last=False)
        self._prompted.move_to_end(digest)
        return self._prompted[digest]

    # -- finding -------------------------------------------------------------------------------------------------------

    async def find(self, id_: str, *, usable: bool = True) -> Stored:
        """A context by its id. Raises UnknownName, DeletedName, and Outdated where it cannot answer here (`usable`)."""
        digest = digest_of_name(id_)
        if digest is None:
            raise UnknownName("context", id_[:80], await self._known())
        try:
            artefact = await self._catalogue.resolve("context", digest, current().tenant, deleted=True)
        except UnknownName:
            raise UnknownName("context", id_, await self._known()) from None
        if artefact.deleted_unix_s is not None:
            raise DeletedName("context", id_, artefact.deleted_unix_s)
        stored = Stored(artefact)
        if usable:
            await self._check_usable(stored)
        return stored

    async def find_soon(self, id_: str) -> "tuple[Stored, asyncio.Task[Stored] | None]":
        """`find` for a context that may be used again: one that was found before comes at once, with the task that
        finds it anew. What it is never changes; whether it still is there is asked while its queries are embedded, and
        the task is to be awaited before anything is answered.
        """
        key = (current().tenant, id_)
        known = self._found.get(key)
        if known is None:
            known = self._found[key] = await self.find(id_)
            if len(self._found) > NUM_FOUND:
                self._found.popitem(last=False)
            return known, None
        self._found.move_to_end(key)
        again = asyncio.create_task(self.find(id_))
        again.add_done_callback(lambda task: task.cancelled() or task.exception())  # also where nobody awaits it
        return known, again

    async def blob(self, stored: Stored) -> EmbeddedContext:
        blob = await self._catalogue.get(stored.artefact.digest)
        return await asyncio.to_thread(EmbeddedContext.from_bytes, blob, stored.artefact.digest)

    async def get(self, id_: str) -> dict[str, Any]:
        """Answers GET /v1/contexts/{id}; also of a context that cannot answer here now."""
        return await self._context_json(await self.find(id_, usable=False))

    async def listing(self, after: str | None, limit: int) -> dict[str, Any]:
        """Answers GET /v1/contexts: a page in order of id. Raises InvalidRequest for `after` that is no id."""
        behind = "" if after is None else digest_of_name(after)
        if behind is None:
            raise InvalidRequest("after", "must be the id of a context")
        found = await self._catalogue.list("context", current().tenant, after=behind, limit=limit + 1)
        data = [await self._context_json(Stored(one)) for one in found[:limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }

    async def examples(self, id_: str, begin: int, limit: int) -> dict[str, Any]:
        """Answers GET /v1/contexts/{id}/examples: labels and texts, numbered as explanations number them."""
        stored = await self.find(id_, usable=False)
        named = (await self.blob(stored)).named
        data = [
            {"example": begin + i, "label": one.label} | ({"text": one.content} if named.kind == "text" else {})
            for i, one in enumerate(named.examples[begin : begin + limit])
        ]
        has_more = begin + limit < len(named.examples)
        return {"object": "list", "context": id_, "data": data, "has_more": has_more}

    async def delete(self, id_: str) -> dict[str, Any]:
        """Answers DELETE /v1/contexts/{id}; a second time the same."""
        try:
            await self.find(id_, usable=False)
            digest = id_.removeprefix(PREFIX)
            when = (await self._catalogue.delete("context", digest, current().tenant)).deleted_unix_s
        except DeletedName as error:
            when = error.deleted_unix_s
        return {"id": id_, "object": "context.deleted", "deleted": True, "deleted_at": int(when or 0)}

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _register(
        self, embedded: Embedded, request_digest: str, began_s: float, deadline: Deadline
    ) -> dict[str, Any]:
        """Compiled and checked first, so that what cannot be compiled is never registered; then durable."""
        named = embedded.context.named
        labelled: LabelledVectors = labelled_vectors(embedded.context)
        async with deadline.limit("building the context"):
            built = await self._reasoning.build(
                Build(module=named.module, context=labelled, deadline_unix_s=deadline.unix_s)
            )
            blob = await asyncio.to_thread(embedded.context.to_bytes)
            card: dict[str, object] = {
                "input": named.kind,
                "encoder": dataclasses.asdict(named.encoder) if named.encoder else None,
                "module": {"id": self._module_name(named.module), "digest": named.module},
                "protocol": named.protocol,
                "seed": named.seed,
                "width": int(embedded.context.vectors.shape[1]),
                "classes": list(named.classes),
                "num_examples": len(named.examples),
                "num_unlabelled": len(named.unlabelled),
                "self_check": built.self_check and _self_check_json(built.self_check),
            }
            artefact = await self._catalogue.put(
                "context", blob, digest=named.digest, name=None, owner=current().tenant, card=card
            )
        made = self._made_json(Stored(artefact), request_digest, began_s, cached=False)
        made["receipt"] = receipt_json(
            dataclasses.replace(embedded.receipt, context=named.digest, module=named.module, seed=named.seed)
        )
        made["usage"] = {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens}
        return made

    async def _live(self, digest: str) -> Stored | None:
        try:
            return Stored(await self._catalogue.resolve("context", digest, current().tenant))
        except UnknownName:
            return None

    async def _known(self) -> tuple[str, ...]:
        found = await self._catalogue.list("context", current().tenant, limit=NUM_KNOWN + 1)
        names = tuple(PREFIX + one.digest for one in found)
        return names if len(names) <= NUM_KNOWN else (*names[:NUM_KNOWN], "and more (GET /v1/contexts)")

    async def _check_usable(self, stored: Stored) -> None:
        """Raises Outdated for another module or encoder than those of then."""
        module = stored.card["module"]
        served = {one.digest: one.name for one in self._reasoning.modules}
        if module["digest"] not in served:
            raise Outdated(
                f"the context {stored.id}",
                "reasoning module",
                f"{module['id']} ({short(module['digest'])})",
                tuple(f"{name} ({short(digest)})" for digest, name in served.items()),
            )
        encoder = stored.card["encoder"]
        if encoder is not None:
            await self._vectors.served(EncoderName(**encoder), f"the context {stored.id}")

    def _module_name(self, digest: str) -> str:
        return next((one.name for one in self._reasoning.modules if one.digest == digest), short(digest))

    async def _context_json(self, stored: Stored) -> dict[str, Any]:
        try:
            await self._check_usable(stored)
            usable = True
        except Outdated:
            usable = False
        return context_json(stored) | {"usable": usable}

    def _made_json(self, stored: Stored, request_digest: str, began_s: float, *, cached: bool) -> dict[str, Any]:
        card = stored.card
        encoder: dict[str, str] | None = card["encoder"]
        on_backbone = encoder is not None and encoder["digest"] in {
            one.prepared.digest for one in self._names.backbones.values()
        }
        receipt = Receipt(
            request=request_digest,
            backbone=encoder["digest"] if encoder is not None and on_backbone else None,
            encoder=encoder["digest"] if encoder is not None and not on_backbone else None,
            context=stored.artefact.digest,
            module=card["module"]["digest"],
            seed=card["seed"],
        )
        return context_json(stored) | {
            "cached": cached,
            "build_ms": round(1000 * (time.monotonic() - began_s), 1),
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
            "receipt": receipt_json(receipt),
        }


def context_json(stored: Stored) -> dict[str, Any]:
    """A context as every route shows it."""
    card = stored.card
    encoder, module = card["encoder"], card["module"]
    return {
        "id": stored.id,
        "object": "context",
        "created": int(stored.artefact.created_unix_s),
        "input": card["input"],
        "encoder": encoder and encoder["id"],
        "encoder_digest": encoder and encoder["digest"],
        "module": module["id"],
        "module_digest": module["digest"],
        "protocol": card["protocol"],
        "seed": card["seed"],
        "width": card["width"],
        "classes": card["classes"],
        "num_examples": card["num_examples"],
        "num_unlabelled": card["num_unlabelled"],
        "self_check": card["self_check"],
    }


def _self_check_json(checked: SelfChecked) -> dict[str, Any]:
    return {"accuracy": round(checked.accuracy, 6), "left_out": checked.num_left_out, "method": checked.method}


def number_of(query: Any, name: str, default: int, low: int, high: int) -> int:
    """A whole number in the query string. Raises InvalidRequest."""
    text: str | None = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise InvalidRequest(name, f"must be a whole number from {low} to {high}, got {text[:40]!r}")
    return int(text)


def positions(named: NamedContext) -> Sequence[int]:
    """Where each example of the caller's list stands in the context's own order."""
    places = [0] * len(named.given)
    for place, given in enumerate(named.given):
        places[given] = place
    return places
