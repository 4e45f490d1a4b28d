"""The adaptation path of in-context reasoning (TART): inputs embedded, then one question to the pool.

The examples come with the request, or are a named context's.
"""

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.labelled import labelled_vectors
from actors.messages import Classified, Classify, Explain, Explained, LabelledVectors, Receipt
from cluster.door_settings import HttpSettings
from metasepia.errors import InvalidRequest
from metasepia.reasoning.named import Content
from serve.contexts.named import Contexts, Stored, positions
from serve.contexts.vectors import ContextVectors
from serve.parts import Reasoning
from serve.requests.deadlines import Deadline
from serve.requests.inputs import read_inputs, read_labelled
from serve.requests.receipts import receipt_json
from serve.requests.schemas import ClassifyRequest

NUM_NEAREST = 5
"""Examples that an explanation names as nearest to an input."""


@dataclass(frozen=True)
class Shown:
    """Examples as an explanation shows them."""

    labels: Sequence[str]
    texts: Sequence[Content] | None
    """None where the request brought them itself."""
    places: Sequence[int]
    """For each number that is shown, its place in the context's own order."""


class Classification:
    """Answers /v1/classify: one embedding of all inputs, one question to the pool."""

    def __init__(self, http: HttpSettings, contexts: Contexts, vectors: ContextVectors, reasoning: Reasoning) -> None:
        self._http, self._contexts, self._vectors, self._reasoning = http, contexts, vectors, reasoning

    async def classify(self, request: ClassifyRequest, request_digest: str, deadline: Deadline) -> dict[str, Any]:
        """The answer's JSON. `model` is the context's id, or `<encoder>+<reasoning module>`.

        Raises UnknownName, DeletedName and Outdated for the context, UnknownName for the encoder or module,
        WindowExceeded and InvalidRequest naming the field.
        """
        if request.model is None:
            return await self._by_examples(request, request_digest, deadline)
        return await self._by_context(request, request.model, request_digest, deadline)

    async def _by_examples(self, request: ClassifyRequest, request_digest: str, deadline: Deadline) -> dict[str, Any]:
        labelled = read_labelled(request.examples or (), request.unlabelled, self._http)
        inputs = read_inputs(request.inputs, "inputs", self._http, labelled.kind)
        named = await self._contexts.name(labelled, request.encoder, request.module, request.protocol, request.seed)
        if request.explain:
            self._check_explained(len(named.examples), len(inputs.contents), len(named.classes))
        shown = Shown(named.labels, None, positions(named))
        encoder = named.encoder.id if named.encoder else named.kind
        name = f"{encoder}+{next(one.name for one in self._reasoning.modules if one.digest == named.module)}"
        contents = (*(one.content for one in named.examples), *named.unlabelled, *inputs.contents)
        async with await self._vectors.place(named.encoder, "the examples", named.kind, contents, deadline):
            embedded = await self._vectors.new(named, labelled, inputs, deadline, request_digest)
            context = labelled_vectors(embedded.context)
            receipt = dataclasses.replace(embedded.receipt, seed=named.seed)
            return await self._answer(
                request, name, named.module, context, embedded.queries, embedded.num_tokens, receipt, shown, deadline
            )

    async def _by_context(
        self, request: ClassifyRequest, model: str, request_digest: str, deadline: Deadline
    ) -> dict[str, Any]:
        stored, again = await self._contexts.find_soon(model)
        try:
            return await self._queried(request, stored, again, request_digest, deadline)
        finally:
            if again is not None:
                again.cancel()

    async def _queried(
        self,
        request: ClassifyRequest,
        stored: Stored,
        again: "asyncio.Task[Stored] | None",
        request_digest: str,
        deadline: Deadline,
    ) -> dict[str, Any]:
        """`again` finds the context anew, if it does."""
        card = stored.card
        inputs = read_inputs(request.inputs, "inputs", self._http)
        shown = None
        if request.explain:
            self._check_explained(card["num_examples"], len(inputs.contents), len(card["classes"]))
            named = (await self._contexts.blob(stored)).named
            texts = [one.content for one in named.examples] if named.kind == "text" else None
            shown = Shown(named.labels, texts, range(len(named.examples)))
        module, digest = card["module"]["digest"], stored.artefact.digest
        async with await self._contexts.place(stored, inputs, deadline):
            found = await self._contexts.embed_queries(stored, inputs, deadline, request_digest)
            if again is not None:
                await again
            receipt = dataclasses.replace(found.receipt, seed=card["seed"])
            return await self._answer(
                request, stored.id, module, digest, found.values, found.num_tokens, receipt, shown, deadline
            )

    async def _answer(
        self,
        request: ClassifyRequest,
        model: str,
        module: str,
        context: LabelledVectors | str,
        queries: np.ndarray,
        num_tokens: int,
        receipt: Receipt,
        shown: Shown | None,
        deadline: Deadline,
    ) -> dict[str, Any]:
        async with deadline.limit("the classification"):
            classified = await self._reasoning.classify(
                Classify(module=module, context=context, queries=queries, deadline_unix_s=deadline.unix_s)
            )
            results = results_json(classified, request.abstain_below)
            if request.explain and shown is not None:
                explained = await self._reasoning.explain(
                    Explain(
                        module=module,
                        context=context,
                        queries=queries,
                        nearest=NUM_NEAREST,
                        deadline_unix_s=deadline.unix_s,
                    )
                )
                for query, result in enumerate(results):
                    result["explain"] = explain_json(explained, query, shown)
        receipt = dataclasses.replace(receipt, context=classified.context, module=classified.module)
        return {
            "model": model,
            "results": results,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "receipt": receipt_json(receipt),
        }

    def _check_explained(self, num_examples: int, num_inputs: int, num_classes: int) -> None:
        """Raises InvalidRequest for more work than one request may ask for."""
        most, limit = self._http.max_explained_examples, self._http.max_explained
        if num_examples > most:
            raise InvalidRequest(
                "explain",
                f"a context of {num_examples} examples; at most {most} (http.max_explained_examples) are left out one "
                "by one: ask without explain, or make a context of fewer examples",
            )
        if num_examples * num_inputs * num_classes > limit:
            at_once = limit // (num_examples * num_classes)
            way_out = f"send at most {at_once} inputs at a time" if at_once else "make a context of fewer examples"
            raise InvalidRequest(
                "explain",
                f"{num_inputs} inputs x {num_examples} examples x {num_classes} classes; at most {limit} influences "
                f"(http.max_explained) are computed for one request: {way_out}",
            )


def results_json(classified: Classified, abstain_below: float | None = None) -> list[dict[str, Any]]:
    """For each query the likeliest label (the first in order of `classes` at a tie) and all probabilities.

    No label where the best probability is below `abstain_below`.
    """
    best = classified.probabilities.argmax(axis=1)
    results: list[dict[str, Any]] = []
    for at, row in zip(best.tolist(), classified.probabilities.astype(float).tolist(), strict=True):
        label = None if abstain_below is not None and row[at] < abstain_below else classified.classes[at]
        results.append({"label": label, "probabilities": dict(zip(classified.classes, row, strict=True))})
    return results


def explain_json(explained: Explained, query: int, shown: Shown) -> dict[str, Any]:
    """What one answer rests on: each example's influence, in the order shown, and the nearest examples."""
    influences = explained.influences[query].astype(float).round(6).tolist()
    number = {place: at for at, place in enumerate(shown.places)}

    def example(at: int) -> dict[str, Any]:
        place = shown.places[at]
        text = {} if shown.texts is None else {"text": shown.texts[place]}
        return {"example": at, "label": shown.labels[place]} | text

    nearest = zip(explained.nearest[query].tolist(), explained.similarity[query].tolist(), strict=True)
    return {
        "influence": [
            example(at) | {"log_probability": dict(zip(explained.classes, influences[place], strict=True))}
            for at, place in enumerate(shown.places)
        ],
        "nearest": [example(number[place]) | {"similarity": round(cosine, 6)} for place, cosine in nearest],
    }
