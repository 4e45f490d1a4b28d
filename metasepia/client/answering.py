"""Calls whose inputs may be many: classification, embeddings, hidden states."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from metasepia.client import large, tables
from metasepia.client.calls import ARROW, Answer, Ask, Steps, request
from metasepia.client.errors import BadInput, Failure, NotOurs, PartlyDone, StreamBroken, refused
from metasepia.client.results import Classification, Entity, Explanation, Usage, added
from metasepia.client.trying import envelope_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Protocol = Literal["stream", "vanilla", "loo"]


class ClassifyOptions(TypedDict, total=False):
    """How inputs are classified in a context."""

    vector: str | None
    """Column of vectors, in place of `text`."""
    explain: bool
    """Adds what each answer rests on."""
    abstain_below: float | None
    """From 0 to 1: where the best probability is lower there is no label."""
    prefix: str
    """Of the columns that are put beside a table's."""
    batch_size: int | None
    """Inputs of one request; halved by itself where the server reads fewer. None: 512."""
    progress: bool | None
    """A bar on standard error, where that is a terminal. None: when there is more than one request."""


class ExampleOptions(ClassifyOptions, total=False):
    """The same, and what the context is made of where it has no name."""

    model: str | None
    """`ctx-...`; then nothing below may be given."""
    examples: Any
    """A table with columns of inputs (named as `text` or `vector` says) and labels, pairs, or {"text", "label"}."""
    label: str
    """Column of the examples' labels (`label`)."""
    unlabelled: Any
    """Inputs without labels, which tell where inputs lie."""
    encoder: str | None
    module: str | None
    protocol: Protocol | None
    seed: int | None


def classify(inputs: Any, *, text: str | None = None, **options: Any) -> Steps[Any]:
    """A label and probabilities for each input, by examples given here or by a context.

    `inputs`: a text, texts, vectors, objects, or a table (pandas, Arrow, anything that gives an Arrow stream) with
    `text` naming the column. A table comes back with the columns `label` and `probability_<label>`, its rows, order
    and index as they were; anything else as a Classification. Raises BadInput, Refused, PartlyDone.
    """
    known = {*ClassifyOptions.__annotations__, *ExampleOptions.__annotations__}
    if unknown := set(options) - known:
        raise BadInput(min(unknown), f"is no argument of classify; there are {', '.join(sorted(known))}")
    vector, prefix = options.get("vector"), options.get("prefix", "")
    taken = tables.inputs_of(inputs, text, vector, prefix)
    body: dict[str, Any] = {name: options.get(name) for name in ("model", "encoder", "module", "protocol", "seed")}
    if options.get("examples") is not None:
        body["examples"] = tables.examples_of(options["examples"], text, vector, options.get("label", "label"))
    if options.get("unlabelled") is not None:
        body["unlabelled"] = tables.plain(options["unlabelled"], "unlabelled")
    body |= {"explain": options.get("explain") or None, "abstain_below": options.get("abstain_below")}
    if not taken.items:
        raise BadInput("inputs", "there are none")
    cut = _cut(body, taken.items, options.get("batch_size"))

    def part(begin: int, end: int) -> Steps[_Classified]:
        content = cut.body(begin, end)
        answer: Answer = yield Ask(request("Classify", content=content, content_type=cut.content_type))
        found = _Classified.of(answer.json())
        if len(found.results) != end - begin:
            raise NotOurs(answer.url, f"{len(found.results)} results for {end - begin} inputs")
        if any(one.probabilities.keys() != found.results[0].probabilities.keys() for one in found.results):
            raise NotOurs(answer.url, "results of different labels")
        return found

    finished, failures = yield from large.together(cut, part, options.get("progress"), "classifying")
    found = _classification(len(taken.items), finished)
    whole = taken.put_back(found, prefix)
    if failures:
        raise PartlyDone(whole, failures, len(taken.items))
    return whole


def _cut(body: dict[str, Any], items: list[Any], num_items: int | None) -> large.Cut:
    """Vectors of one width as Arrow, a fifth of their JSON; anything else as JSON."""
    examples: list[dict[str, Any]] = body.get("examples") or []
    contents = [*items, *examples]
    plain = all(
        isinstance(one, dict) and one.keys() <= {"vector", "label"} and len(one.get("vector") or ()) for one in contents
    )
    if not plain or len({len(one["vector"]) for one in contents}) > 1 or body.get("unlabelled"):
        return large.JsonCut(body, "inputs", items, num_items)
    if not all(isinstance(one["label"], str) for one in examples):
        return large.JsonCut(body, "inputs", items, num_items)
    labelled = [(one["vector"], one["label"]) for one in examples]
    rest = {name: value for name, value in body.items() if name != "examples"}
    return large.VectorCut(rest, "inputs", [one["vector"] for one in items], num_items, labelled)


def _classification(num_items: int, finished: "Sequence[tuple[int, int, _Classified]]") -> Classification:
    classes = tuple(finished[0][2].results[0].probabilities)
    labels: list[str | None] = [None] * num_items
    probabilities = [[math.nan] * len(classes) for _ in range(num_items)]
    explanations: list[Explanation | None] = [None] * num_items
    for begin, _, answer in finished:
        for place, result in enumerate(answer.results, begin):
            labels[place] = result.label
            probabilities[place] = [result.probabilities.get(name, math.nan) for name in classes]
            explanations[place] = result.explain
    answers = [one[2] for one in finished]
    return Classification(
        labels=labels,
        classes=classes,
        probabilities=probabilities,
        model=answers[0].model,
        explanations=explanations,
        usage=added([one.usage for one in answers]),
        receipts=[one.receipt for one in answers],
    )


@dataclass(frozen=True, kw_only=True)
class _Result(Entity):
    label: str | None
    probabilities: dict[str, float]
    explain: Explanation | None = None


@dataclass(frozen=True, kw_only=True)
class _Classified(Entity):
    model: str
    results: list[_Result]
    usage: Usage
    receipt: dict[str, Any]


# -- embeddings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Vectors of inputs, in their order."""

    vectors: "np.ndarray"
    """float32 [inputs, width], of unit norm; a row of NaN where there is no answer (`PartlyDone`)."""
    model: str
    usage: Usage
    """Of all requests together."""
    receipts: list[dict[str, Any]]
    """One a request."""

    def to_arrow(self) -> "pa.Array":
        """A fixed-size list of float32 for each input."""
        import pyarrow as pa

        return pa.FixedSizeListArray.from_arrays(pa.array(self.vectors.reshape(-1)), self.vectors.shape[1])


def embed(
    inputs: Any,
    *,
    model: str,
    text: str | None = None,
    dimensions: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Steps[Embeddings]:
    """Vectors of texts, token ids, or objects with a file, by an encoder or a backbone; base64 on the wire.

    `inputs` may be a table with `text` naming the column. Raises BadInput, Refused, PartlyDone.
    """
    items = _texts(inputs, text)
    body = {"model": model, "encoding_format": "base64", "dimensions": dimensions}
    cut = large.JsonCut(body, "input", items, batch_size)

    def part(begin: int, end: int) -> Steps[tuple["np.ndarray", dict[str, Any]]]:
        answer: Answer = yield Ask(request("CreateEmbeddings", content=cut.body(begin, end)))
        return _vectors(answer, end - begin)

    finished, failures = yield from large.together(cut, part, progress, "embedding")
    import numpy as np

    vectors = np.full((len(items), finished[0][2][0].shape[1]), np.nan, np.float32)
    for begin, end, (rows, _) in finished:
        vectors[begin:end] = rows
    trees = [one[2][1] for one in finished]
    found = Embeddings(
        vectors=vectors,
        model=str(trees[0].get("model", model)),
        usage=added([Usage.of(tree.get("usage", {})) for tree in trees]),
        receipts=[tree.get("receipt", {}) for tree in trees],
    )
    if failures:
        raise PartlyDone(found, failures, len(items))
    return found


def _vectors(answer: Answer, count: int) -> tuple["np.ndarray", dict[str, Any]]:
    """Raises NotOurs."""
    import numpy as np

    tree = answer.json()
    try:
        spelt = [one["embedding"] for one in sorted(tree["data"], key=lambda one: one["index"])]
        rows = [np.frombuffer(base64.b64decode(one), "<f4") if isinstance(one, str) else one for one in spelt]
        found = np.asarray(rows, np.float32)
    except (KeyError, TypeError, ValueError):
        raise NotOurs(answer.url, answer.shown) from None
    if found.ndim != 2 or len(found) != count:
        raise NotOurs(answer.url, f"{len(found)} vectors for {count} inputs")
    return found, tree


# -- hidden states -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """States of a backbone by layer."""

    table: "pa.Table"
    """Columns `input`, `layer`, `token`, `token_id` (int32; the last two null for means) and `state` (float32s)."""
    layers: list[int]
    """Counted from 0."""
    pooling: str
    num_inputs: int
    model: str
    task: dict[str, Any] | None
    """How the task's centroids stand after the last request, where one was named."""
    usage: Usage
    receipts: list[dict[str, Any]]
    """One a request."""

    def to_numpy(self) -> "np.ndarray":
        """Pooled states, float32 [inputs, layers, hidden], of those inputs that are in the table.

        Raises BadInput for the pooling `none`.
        """
        if self.pooling == "none":
            raise BadInput("pooling", "every token has its states: read .table")
        states = self.table.column("state").combine_chunks()
        flat = states.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, len(self.layers), states.type.list_size)

    def to_pandas(self) -> Any:
        """The table as a pandas frame."""
        return self.table.to_pandas()


def hidden_states(
    inputs: Any,
    *,
    model: str,
    text: str | None = None,
    layers: Sequence[int] = (-1,),
    pooling: Literal["last", "mean", "none"] = "last",
    task: str | None = None,
    observe: bool = True,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Steps[HiddenStates]:
    """States of texts by layer, of the base or of any expert; Arrow on the wire.

    Large inputs are several requests, and a named task observes each. Raises BadInput, Refused, StreamBroken; and
    PartlyDone, whose `partial` has the inputs that are finished under their own numbers.
    """
    items = _texts(inputs, text)
    asked: dict[str, Any] = {"model": model, "layers": list(layers), "pooling": pooling}
    if task is not None:
        asked |= {"task": task, "observe": observe}
    cut = large.JsonCut(asked, "input", items, batch_size)

    def part(begin: int, end: int) -> Steps[tuple["pa.Table", dict[str, Any], dict[str, Any]]]:
        content = cut.body(begin, end)
        answer: Answer = yield Ask(request("CreateHiddenStates", content=content, accept=ARROW))
        return _states(answer, begin)

    finished, failures = yield from large.together(cut, part, progress, "reading states")
    return _hidden_states(len(items), finished, failures)


def _hidden_states(
    num_items: int, finished: Sequence[tuple[int, int, Any]], failures: Sequence[Failure]
) -> HiddenStates:
    import pyarrow as pa

    heads = [one[2][1] for one in finished]
    ends = [one[2][2] for one in finished]
    found = HiddenStates(
        table=pa.concat_tables([one[2][0] for one in finished]),
        layers=[int(one) for one in heads[0]["layers"]],
        pooling=str(heads[0]["pooling"]),
        num_inputs=num_items,
        model=str(heads[0]["model"]),
        task=ends[-1].get("task"),
        usage=added([Usage.of(one.get("usage", {})) for one in ends]),
        receipts=[one.get("receipt", {}) for one in heads],
    )
    if failures:
        raise PartlyDone(found, failures, num_items)
    return found


def _states(answer: Answer, begin: int) -> tuple["pa.Table", dict[str, Any], dict[str, Any]]:
    """Rows with inputs counted from `begin`, the head and the end. Raises Refused, StreamBroken, NotOurs."""
    import pyarrow as pa

    key = b"metasepia"
    batches: list[Any] = []
    end: dict[str, Any] = {}
    try:
        with pa.ipc.open_stream(io.BytesIO(answer.content)) as reader:
            schema = reader.schema.remove_metadata()
            head = json.loads((reader.schema.metadata or {})[key])
            for batch, metadata in reader.iter_batches_with_custom_metadata():
                batches.append(batch.replace_schema_metadata(None))
                end = json.loads(metadata[key]) if metadata is not None and batch.num_rows == 0 else end
    except (pa.ArrowInvalid, KeyError, ValueError, OSError):
        raise NotOurs(answer.url, answer.shown) from None
    if isinstance(end.get("error"), Mapping):
        raise refused(envelope_of(end["error"], 500, answer.headers.get("x-request-id")))
    if "usage" not in end:
        raise StreamBroken("the stream of states has no end", "")
    table = pa.Table.from_batches(batches, schema)
    moved = pa.array(table.column("input").to_numpy() + begin, pa.int32())
    return table.set_column(0, "input", moved), head, end


def _texts(inputs: Any, text: str | None) -> list[Any]:
    """Texts, token ids or objects. Raises BadInput."""
    if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes) and len(inputs):
        if all(type(one) is int for one in inputs):
            inputs = [inputs]
        if all(isinstance(one, list | tuple) and one and all(type(token) is int for token in one) for one in inputs):
            return [list(one) for one in inputs]
    items = tables.inputs_of(inputs, text, None, "").items if text is not None else tables.texts_of(inputs)
    if not items:
        raise BadInput("inputs", "there are none")
    return items
