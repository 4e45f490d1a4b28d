"""Recomputes an answer from its receipt and its request, and says what differs.

    python -m jobs.replay --receipt answer.json --request request.json

ANSWER is what the server sent (an answer with a receipt in it, or a stream as it came), or the receipt alone; then
nothing is compared but digests. Contexts, classifications, embeddings and completions are recomputed here, in one
process, from what the digests name: the registry's blobs, the settings' backbones, encoders and modules. Exit status:
0 where everything is as the receipt says, 1 where something differs or cannot be found, 2 for files that are no answer.

A token is the same where its score (logits over temperature, plus the noise of seed and position) is within a tolerance
of the largest: another machine rounds otherwise, and text after a near tie goes its own way.
"""

import argparse
import asyncio
import base64
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cluster import settings as settings_of
from jobs.replay_parts import Parts
from metasepia.backbone import ReferenceBackbone
from metasepia.digests import digest_of, short
from metasepia.errors import CorruptArtefact, InvalidRequest, MetasepiaError, NotSupported
from metasepia.generation import choose, scores_of
from metasepia.prepared import PreparedBackbone
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
from metasepia.rows import Adapter, HiddenStatesWanted, Row, Sampling

PROBABILITY_TOLERANCE = 1e-3
VECTOR_TOLERANCE = 1e-4
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""By the dtype that answered, as a share of the largest logit; the reference computes in float32."""
DEFAULT_ANSWER_LEN = 256


@dataclass
class Report:
    """What was compared, one line each."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)
    answered: Any = None
    recomputed: Any = None

    @property
    def same(self) -> bool:
        return all(ok for *_, ok in self.rows)

    def check(self, what: str, told: object, found: object, ok: bool | None = None) -> None:
        told, found = (short(one) if isinstance(one, str) and len(one) == 64 else one for one in (told, found))
        self.rows.append((what, str(told), str(found), told == found if ok is None else ok))

    def close(self, what: str, told: np.ndarray, found: np.ndarray, tolerance: float) -> None:
        """The largest difference of two arrays."""
        if told.shape != found.shape:
            self.check(what, list(told.shape), list(found.shape))
        else:
            most = float(np.abs(told - found).max(initial=0.0))
            self.check(what, f"within {tolerance:g}", f"{most:.2g}", most <= tolerance)

    def missing(self, what: str, error: MetasepiaError) -> None:
        self.check(what, "", str(error), False)


def replay(given: Mapping[str, Any], request: dict[str, Any], parts: Parts) -> Report:
    """`given` is an answer or a receipt. Raises InvalidRequest for what is neither, or for no such request."""
    receipt = given.get("receipt", given)
    answered = given if "receipt" in given else None
    if not isinstance(receipt, Mapping) or not isinstance(receipt.get("request"), str):
        raise InvalidRequest("receipt", "no receipt: an object with the digest of a request, or an answer that has one")
    report = Report()
    report.check("request", receipt["request"], digest_of(request))
    try:
        if "messages" in request or "prompt" in request:
            _completion(request, receipt, answered, parts, report)
        elif "inputs" in request:
            _classification(request, receipt, answered, parts, report)
        elif "input" in request:
            _embeddings(request, receipt, answered, parts, report)
        elif "examples" in request:
            _context(request, receipt, answered, parts, report)
        else:
            raise InvalidRequest("request", "it has none of messages, prompt, inputs, input and examples")
    except InvalidRequest:
        raise
    except MetasepiaError as error:
        report.missing("recomputing", error)
    return report


# -- classification and contexts ---------------------------------------------------------------------------------------


def _classification(
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


def _context(
    request: dict[str, Any],
    receipt: Mapping[str, Any],
    answered: Mapping[str, Any] | None,
    parts: Parts,
    report: Report,
) -> None:
    """POST /v1/contexts: the id follows from the content, and the stored vectors from the encoder."""
    named = _named(request, receipt)
    report.check("context", receipt["context"], named.digest)
    stored = parts.context(receipt["context"])
    again, _ = _embedded(named, [], receipt, parts)
    report.close("vectors of the context", stored.vectors, again.vectors, VECTOR_TOLERANCE)
    report.check("module", receipt["module"], parts.module(receipt["module"]).digest)
    report.recomputed = {"id": named.id, "classes": list(named.classes)}
    if answered is not None:
        report.answered = {"id": answered["id"], "classes": answered["classes"]}
        report.check("id and classes", "of the answer", "recomputed", report.answered == report.recomputed)


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
            vectors = _hidden(reference, [_plain(prepared, str(one)) for one in (*contents, *others)])
        else:
            prompted = PromptedEncoder(reference.model, _tokenizer(prepared), prepared.window)
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


# -- embeddings --------------------------------------------------------------------------------------------------------


def _embeddings(
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
        vectors = _hidden(reference, [_plain(prepared, one) if isinstance(one, str) else tuple(one) for one in items])
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


# -- completions -------------------------------------------------------------------------------------------------------


def _completion(
    request: dict[str, Any],
    receipt: Mapping[str, Any],
    answered: Mapping[str, Any] | None,
    parts: Parts,
    report: Report,
) -> None:
    adapter: Adapter = tuple((digest, float(weight)) for digest, weight in receipt["adapter"])
    if request["model"] != "auto":
        wanted = "an expert" if ":" in request["model"] else "the base"
        report.check("adapter", wanted, "an expert" if adapter else "the base")
    prepared = parts.backbone(receipt["backbone"])
    reference = parts.reference(receipt["backbone"], adapter)
    report.check("backbone", receipt["backbone"], prepared.digest)
    for digest, _ in adapter:
        report.check("expert", digest, parts.expert(digest).digest)
    if adapter and reference.factors is not None:
        report.check("factors", receipt["factors"], reference.factors.digest)
    prompt = _prompt(request, prepared)
    limits = [request[name] for name in ("max_tokens", "max_completion_tokens") if request.get(name) is not None]
    sampling = Sampling(
        temperature=float(_or(request.get("temperature"), 1.0)),
        top_p=float(_or(request.get("top_p"), 1.0)),
        max_tokens=min(limits) if limits else min(DEFAULT_ANSWER_LEN, prepared.window - len(prompt)),
        stop_token_ids=prepared.eos_token_ids,
    )
    stops = request.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    told = _choices(answered) if answered is not None else {}
    if answered is not None and answered.get("usage"):
        report.check("prompt tokens", answered["usage"]["prompt_tokens"], len(prompt))
    tolerance = LOGIT_TOLERANCE[receipt["dtype"]]
    report.answered, report.recomputed = {}, {}
    for index in range(_or(request.get("n"), 1)):
        row = Row(
            request_id=str(index),
            backbone=prepared.digest,
            token_ids=prompt,
            adapter=adapter,
            sampling=sampling,
            seed=(receipt["seed"] + index) % 2**63,
        )
        choice = told.get(index)
        follows = choice is not None and not stops and _follows(choice, row, reference, prepared)
        text = choice.text if choice is not None and follows else _generated(row, reference, prepared, stops)
        report.recomputed[index] = text
        if choice is not None:
            report.answered[index] = choice.text
            if text == choice.text:
                report.check(f"choice {index}", "a text", "the same", True)
            else:
                gap = _gap(choice, row, reference, prepared)
                report.check(f"choice {index}", f"tokens within {tolerance:g}", f"{gap:.2g}", gap <= tolerance)


@dataclass(frozen=True)
class Choice:
    text: str
    finish: str | None


def _choices(answered: Mapping[str, Any]) -> dict[int, Choice]:
    return {
        one["index"]: Choice(one["message"]["content"] if "message" in one else one["text"], one["finish_reason"])
        for one in answered["choices"]
    }


def _follows(choice: Choice, row: Row, reference: ReferenceBackbone, prepared: PreparedBackbone) -> bool:
    """Whether the reference would choose just these tokens: one forward over all of them says so, without a step each.

    False also where the text does not tell its tokens, or how it ended.
    """
    tokens = _tokens(choice, prepared)
    chosen = _chosen(row, tokens, reference)
    if tuple(chosen[:-1]) != tokens:
        return False
    if choice.finish == "length":
        return len(tokens) == row.sampling.max_tokens
    return chosen[-1] in row.sampling.stop_token_ids


def _chosen(row: Row, tokens: tuple[int, ...], reference: ReferenceBackbone) -> list[int]:
    """What the reference chooses after each of the tokens, and before the first."""
    logits = reference.logits((*row.token_ids, *tokens), row.adapter)[len(row.token_ids) - 1 :]
    positions = [len(row.token_ids) + i for i in range(len(logits))]
    many = [row.sampling] * len(logits), [row.seed] * len(logits)
    return [one.token_id for one in choose(logits, *many, positions)]


def _gap(choice: Choice, row: Row, reference: ReferenceBackbone, prepared: PreparedBackbone) -> float:
    """By how much the told tokens' scores fall short of the largest, at worst, as a share of the largest logit."""
    tokens = _tokens(choice, prepared)
    logits = reference.logits((*row.token_ids, *tokens), row.adapter)[len(row.token_ids) - 1 :]
    worst = 0.0
    for i, token in enumerate(tokens):
        scores = scores_of(logits[i], row.sampling, row.seed, len(row.token_ids) + i)
        short_of = float(scores.max() - scores[token]) * (row.sampling.temperature or 1.0)
        worst = max(worst, short_of / float(logits[i].abs().max()))
    return worst


def _generated(row: Row, reference: ReferenceBackbone, prepared: PreparedBackbone, stops: Sequence[str]) -> str:
    """The reference's own answer, cut at the first stop string."""

    async def collect() -> str:
        tokens: list[int] = []
        tokenizer = _tokenizer(prepared)
        async for chunk in reference.generate(row):
            tokens += chunk.token_ids
            if any(stop in tokenizer.decode(tokens, skip_special_tokens=True) for stop in stops):
                break
        return tokenizer.decode(tokens, skip_special_tokens=True)

    text = asyncio.run(collect())
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _prompt(request: dict[str, Any], prepared: PreparedBackbone) -> tuple[int, ...]:
    if "prompt" in request:
        return _plain(prepared, request["prompt"])
    messages = [
        {"role": "system" if one["role"] == "developer" else one["role"], "content": _joined(one["content"])}
        for one in request["messages"]
    ]
    template = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    text = template.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(_tokenizer(prepared).encode(str(text), add_special_tokens=False).ids)


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _plain(prepared: PreparedBackbone, text: str) -> tuple[int, ...]:
    return tuple(_tokenizer(prepared).encode(text).ids)


def _tokens(choice: Choice, prepared: PreparedBackbone) -> tuple[int, ...]:
    return tuple(_tokenizer(prepared).encode(choice.text, add_special_tokens=False).ids)


def _tokenizer(prepared: PreparedBackbone) -> Tokenizer:
    return Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


# -- files and screen --------------------------------------------------------------------------------------------------


def read_answer(path: Path) -> dict[str, Any]:
    """An answer, a receipt, or a stream of server-sent events put together. Raises CorruptArtefact for what is none."""
    text = path.read_text()
    try:
        tree = _of_stream(text) if text.lstrip().startswith("data:") else json.loads(text)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(str(path), f"it is neither JSON nor a stream ({error})") from error
    if not isinstance(tree, dict):
        raise CorruptArtefact(str(path), "it is not a JSON object")
    return tree


def _of_stream(text: str) -> dict[str, Any]:
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    texts: dict[int, list[str]] = {}
    finishes: dict[int, str | None] = {}
    for event in events:
        for one in event.get("choices", ()):
            piece = one["delta"].get("content") if "delta" in one else one["text"]
            texts.setdefault(one["index"], []).append(piece or "")
            finishes[one["index"]] = one["finish_reason"] or finishes.get(one["index"])
    receipts = [event["receipt"] for event in events if event.get("receipt")]
    if not receipts:
        raise ValueError("the stream ended without a receipt")
    choices = [{"index": i, "text": "".join(parts), "finish_reason": finishes[i]} for i, parts in texts.items()]
    return {"choices": choices, "usage": events[-1].get("usage"), "receipt": receipts[-1]}


def print_report(report: Report, console: Console) -> None:
    table = Table("what", "receipt or answer", "found here", "")
    for what, told, found, ok in report.rows:
        table.add_row(what, told, found, "same" if ok else "DIFFERS", style=None if ok else "bold red")
    console.print(table)
    for name, value in (("answered", report.answered), ("recomputed", report.recomputed)):
        if value is not None:
            console.print(f"{name}:", style="bold")
            console.print(json.dumps(value, ensure_ascii=False, indent=1), markup=False, highlight=False)
    differ = [what for what, *_, ok in report.rows if not ok]
    console.print("everything is as the receipt says" if report.same else f"differs: {', '.join(differ)}")


def main(argv: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m jobs.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--receipt", type=Path, required=True, help="the answer, as JSON or as a stream; or its receipt")
    p.add_argument("--request", type=Path, required=True, help="the body that was sent")
    p.add_argument("--profile", help="settings: laptop, gpu, or a path")
    arguments = p.parse_args(argv)
    try:
        given, request = read_answer(arguments.receipt), read_answer(arguments.request)
        report = replay(given, request, parts or Parts(settings_of.read(arguments.profile)))
    except (MetasepiaError, OSError, KeyError, TypeError, NotSupported) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print_report(report, Console(soft_wrap=True))
    return 0 if report.same else 1


if __name__ == "__main__":
    sys.exit(main())
