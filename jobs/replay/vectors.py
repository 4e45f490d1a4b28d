"""Contexts, classifications and embeddings recomputed: what becomes vectors first."""

import asyncio
import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jobs.replay.parts import Parts, plain, tokenizer_of
from jobs.replay.report import Report
from metasepia.backbone import ReferenceBackbone
from metasepia.errors import InvalidRequest
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.named import (
    Content,
    EmbeddedContext,
    EncoderName,
    Example,
    InputKind,
    NamedContext,
    digest_of_name,
    vector_content,
    vectors_of_contents,
)
from metasepia.reasoning.prompted import PromptedEncoder
from metasepia.reasoning.reduction import ReductionRecipe
from metasepia.rows import HiddenStatesWanted, Row

PROBABILITY_TOLERANCE = 1e-3
VECTOR_TOLERANCE = 1e-4


def replay_classification(
    request: dict[str, Any],
    receipt: Mapping[str, Any],
    answered: Mapping[str, Any] | None,
    parts: Parts,
    report: Report,
) -> None:
    model = request.get("model")
    if model is None:
        named = _named(request, receipt)
        report.check("context", receipt["context"], named.digest)
        queries = [_content(one)[1] for one in request["inputs"]]
        embedded, vectors = _embedded(named, queries, receipt, parts)
    else:
        digest = digest_of_name(model)
        if digest is None:
            raise InvalidRequest("model", f"{model!r:.80} is not the id of a context")
        report.check("context", receipt["context"], digest)
        embedded = parts.context(digest)
        queries = [_content(one)[1] for one in request["inputs"]]
        again, vectors = _embedded(embedded.named, queries, receipt, parts)
        report.close("vectors of the context", embedded.vectors, again.vectors, VECTOR_TOLERANCE)
    encoder = embedded.named.encoder
    report.check("encoder", receipt["encoder"] or receipt["backbone"], encoder and encoder.digest)
    report.check("module", receipt["module"], embedded.named.module)
    module = parts.module(receipt["module"])
    compiled = compile_context(_context_of(embedded), module)
    (probabilities,) = answer(module.module, [(compiled, vectors)])
    below = request.get("abstain_below")
    report.recomputed = [_result(compiled.classes, row, below) for row in probabilities]
    if answered is not None:
        told = answered["results"]
        report.answered = [{"label": one["label"], "probabilities": one["probabilities"]} for one in told]
        if [sorted(one["probabilities"]) for one in told] != [sorted(compiled.classes)] * len(probabilities):
            report.check("classes", "of the answer", ", ".join(compiled.classes), False)
            return
        theirs = np.array([[one["probabilities"][name] for name in compiled.classes] for one in told])
        report.close("probabilities", theirs, probabilities, PROBABILITY_TOLERANCE)
        wrong = [i for i, one in enumerate(told) if not _label_fits(one["label"], compiled.classes, theirs[i], below)]
        report.check("labels", "as probable as said", f"input {wrong[0]} is not" if wrong else "all", not wrong)


def replay_context(
    request: dict[str, Any],
    receipt: Mapping[str, Any],
    answered: Mapping[str, Any] | None,
    parts: Parts,
    report: Report,
) -> None:
    """POST /v1/contexts: the id follows from the content, and the stored vectors from the encoder.

    POST /v1/contexts/{id}/examples does not say what it adds to; then the examples are looked for in the result.
    """
    stored = parts.context(receipt["context"])
    if _are_added(request, stored.named):
        named = stored.named
        report.check("examples", "added to a context", "among its examples", True)
    else:
        named = _named(request, receipt)
        report.check("context", receipt["context"], named.digest)
    again, _ = _embedded(named, [], receipt, parts)
    report.close("vectors of the context", stored.vectors, again.vectors, VECTOR_TOLERANCE)
    report.check("module", receipt["module"], parts.module(receipt["module"]).digest)
    report.recomputed = {"id": named.id, "classes": list(named.classes)}
    if answered is not None:
        report.answered = {"id": answered["id"], "classes": answered["classes"]}
        report.check("id and classes", "of the answer", "recomputed", report.answered == report.recomputed)


def _are_added(request: dict[str, Any], named: NamedContext) -> bool:
    """Whether a request of examples alone gives some of a context's, and not all of them."""
    if set(request) != {"examples"} or len(request["examples"]) >= len(named.examples):
        return False
    given = Counter((_content(one)[1], one["label"]) for one in request["examples"])
    return given <= Counter((one.content, one.label) for one in named.examples)


def _named(request: dict[str, Any], receipt: Mapping[str, Any]) -> NamedContext:
    examples = [(*_content(one), one["label"]) for one in request["examples"]]
    digest = receipt["encoder"] or receipt["backbone"]
    return NamedContext.of(
        examples[0][0],
        [Example(content, label) for _, content, label in examples],
        encoder=EncoderName(request.get("encoder") or "", digest) if digest else None,
        module=receipt["module"],
        unlabelled=[_content(one)[1] for one in request.get("unlabelled") or ()],
        seed=request.get("seed") or 0,
        protocol=request.get("protocol") or "stream",
        reduction=asdict(ReductionRecipe()),
    )


def _embedded(
    named: NamedContext, queries: Sequence[Content], receipt: Mapping[str, Any], parts: Parts
) -> tuple[EmbeddedContext, np.ndarray]:
    """The context with its vectors, computed again, and those of the queries."""
    contents = [one.content for one in named.examples]
    others = [*named.unlabelled, *queries]
    if named.kind == "vector":
        vectors = vectors_of_contents([*contents, *others])
    elif named.protocol == "stream" and receipt["encoder"]:
        vectors = parts.encoder(receipt["encoder"]).embed([*contents, *others])
    else:
        prepared, reference = parts.backbone(receipt["backbone"]), parts.reference(receipt["backbone"])
        if named.protocol == "stream":
            vectors = _hidden(reference, [plain(prepared, str(one)) for one in (*contents, *others)])
        else:
            prompted = PromptedEncoder(reference.model, tokenizer_of(prepared), prepared.window)
            shown = prompted.examples(named.protocol, [str(one) for one in contents], named.labels, seed=named.seed)
            vectors = np.concatenate([shown.vectors, shown.embed([str(one) for one in others])])
    begin, end = len(contents), len(contents) + len(named.unlabelled)
    return EmbeddedContext(named, vectors[:begin], vectors[begin:end] if end > begin else None), vectors[end:]


def _context_of(embedded: EmbeddedContext) -> Context:
    named = embedded.named
    recipe = ReductionRecipe(**named.reduction)
    return Context.of(embedded.vectors, named.labels, seed=named.seed, recipe=recipe, unlabelled=embedded.unlabelled)


def _content(item: Any) -> tuple[InputKind, Content]:
    """A text, or an object with a text, a vector, or media in base64."""
    if isinstance(item, str):
        return "text", item
    if "text" in item:
        return "text", item["text"]
    if "vector" in item:
        return "vector", vector_content(item["vector"], "vector")
    kind: InputKind = "image" if "image" in item else "audio"
    return kind, base64.b64decode(item[kind].rpartition(",")[2], validate=True)


def _result(classes: Sequence[str], probabilities: np.ndarray, below: float | None) -> dict[str, Any]:
    best = int(probabilities.argmax())
    label = None if below is not None and probabilities[best] < below else classes[best]
    return {"label": label, "probabilities": dict(zip(classes, probabilities.astype(float).tolist(), strict=True))}


def _label_fits(label: str | None, classes: Sequence[str], told: np.ndarray, below: float | None) -> bool:
    """Whether a label follows from the probabilities told beside it."""
    if label is None:
        return below is not None and bool(told.max() < below)
    return label in classes and told[classes.index(label)] == told.max() and (below is None or told.max() >= below)


def replay_embeddings(
    request: dict[str, Any],
    receipt: Mapping[str, Any],
    answered: Mapping[str, Any] | None,
    parts: Parts,
    report: Report,
) -> None:
    given = request["input"]
    items = [given] if isinstance(given, str) or all(isinstance(one, int) for one in given) else list(given)
    if receipt["encoder"]:
        vectors = parts.encoder(receipt["encoder"]).embed(items)
        report.check("encoder", receipt["encoder"], receipt["encoder"])
    else:
        prepared, reference = parts.backbone(receipt["backbone"]), parts.reference(receipt["backbone"])
        report.check("backbone", receipt["backbone"], prepared.digest)
        vectors = _hidden(reference, [plain(prepared, one) if isinstance(one, str) else tuple(one) for one in items])
    if request.get("dimensions"):
        vectors = vectors[:, : request["dimensions"]]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    report.recomputed = _shown(vectors)
    if answered is not None:
        told = np.stack([_vector(one["embedding"]) for one in answered["data"]])
        report.answered = _shown(told)
        report.close("vectors", told, vectors, VECTOR_TOLERANCE)


def _vector(embedding: list[float] | str) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.array(embedding, np.float32)


def _shown(vectors: np.ndarray) -> list[str]:
    return [f"[{', '.join(f'{x:.4f}' for x in row[:4])}, ... {len(row)} numbers]" for row in vectors[:8]]


def _hidden(reference: ReferenceBackbone, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Mean-pooled last hidden states, unit norm."""
    wanted = HiddenStatesWanted(layers=(-1,), pooling="mean")
    rows = [
        Row(request_id=str(i), backbone=reference.digest, token_ids=ids, want="hidden_states", hidden=wanted)
        for i, ids in enumerate(sequences)
    ]
    vectors = np.stack([asyncio.run(reference.hidden_states(row)).states[0] for row in rows])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
