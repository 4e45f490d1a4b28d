"""Arrow in and out: the same answers as JSON's, by columns; whatever is no plain stream is refused in words."""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from metasepia.errors import InvalidRequest
from serve.requests.arrow import MEDIA_TYPE
from serve.requests.arrow_bodies import ArrowLimits, parse
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

LIMITS = ArrowLimits(max_rows=1000, max_depth=16)
EXAMPLES = [{"text": "aa", "label": "x"}, {"text": "bbbb", "label": "y"}]
INPUTS = ["a", "ccccc"]
TEXTS = ["aa", "bbbb", *INPUTS]
LABELS = ["x", "y", None, None]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")
    made.says("ok")
    return made


def _stream(
    columns: dict[str, Any], about: dict[str, Any] | None = None, batches: int = 1, options: Any = None
) -> bytes:
    table = pa.table(columns)
    if about is not None:
        table = table.replace_schema_metadata({"metasepia": json.dumps(about)})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=-(-max(1, table.num_rows) // batches)):
            writer.write_batch(batch)
    return sink.getvalue()


def _post(bench: Bench, path: str, body: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": MEDIA_TYPE, **headers}
    return bench.run(lambda client: client.post(path, content=body, headers=headers))


def _read(answer: httpx.Response) -> tuple[pa.Table, dict[str, Any]]:
    assert answer.headers["content-type"] == MEDIA_TYPE, answer.text
    table = pa.ipc.open_stream(answer.content).read_all()
    return table, json.loads(table.schema.metadata[b"metasepia"])


@pytest.mark.parametrize("batches", [1, 3])
def test_a_classification_by_columns_is_the_one_by_json(bench: Bench, batches: int):
    wanted = bench.post("/v1/classify", {"examples": EXAMPLES, "inputs": [{"text": one} for one in INPUTS]}).json()
    got = _post(bench, "/v1/classify", _stream({"text": TEXTS, "label": LABELS}, batches=batches)).json()
    assert got == wanted  # the receipt too: the request's digest is of the same tree


def test_vectors_are_read_as_json_reads_them(bench: Bench):
    vectors = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 3)
    examples = [
        {"vector": row.tolist(), "label": one} for row, one in zip(vectors[:2].astype(float), "xy", strict=True)
    ]
    body = {"examples": examples, "inputs": [{"vector": row.tolist()} for row in vectors[2:].astype(float)]}
    got = _post(bench, "/v1/classify", _stream({"vector": column, "label": LABELS}))
    assert got.json() == bench.post("/v1/classify", body).json()
    assert got.status_code == 200


def test_a_classification_comes_as_columns_too(bench: Bench):
    body = {"examples": EXAMPLES, "inputs": INPUTS, "abstain_below": 0.5}
    json_answer = bench.post("/v1/classify", body).json()
    table, about = _read(bench.post("/v1/classify", body, accept=MEDIA_TYPE))
    assert about["receipt"] == json_answer["receipt"] and about["usage"] == json_answer["usage"]
    assert table["label"].to_pylist() == [one["label"] for one in json_answer["results"]]
    told = [dict(zip(about["classes"], row, strict=True)) for row in table["probabilities"].to_pylist()]
    assert told == [pytest.approx(one["probabilities"]) for one in json_answer["results"]]
    explained = bench.post("/v1/classify", body | {"explain": True}, accept=MEDIA_TYPE)
    assert (explained.status_code, explained.json()["error"]["code"]) == (400, "not_supported")


def test_a_context_by_columns_is_the_same_context(bench: Bench):
    json_made = bench.post("/v1/contexts", {"examples": EXAMPLES, "unlabelled": INPUTS, "seed": 3}).json()
    made = _post(bench, "/v1/contexts", _stream({"text": TEXTS, "label": LABELS}, {"seed": 3})).json()
    assert (made["id"], made["cached"]) == (json_made["id"], True)
    more = _stream({"text": ["dd"], "label": ["x"]})
    extended = _post(bench, f"/v1/contexts/{made['id']}/examples", more).json()
    assert extended["num_examples"] == 3
    answer = _post(bench, "/v1/classify", _stream({"text": ["a"]}, {"model": made["id"]}))
    assert answer.json()["model"] == made["id"]


def test_embeddings_in_and_out_are_jsons(bench: Bench):
    body = _stream({"text": INPUTS}, {"model": "minilm-fake"})
    wanted = bench.post("/v1/embeddings", {"model": "minilm-fake", "input": INPUTS}).json()
    table, about = _read(_post(bench, "/v1/embeddings", body, accept=MEDIA_TYPE))
    np.testing.assert_allclose(table["embedding"].to_pylist(), [one["embedding"] for one in wanted["data"]], rtol=1e-6)
    assert (about["usage"], about["receipt"]) == (wanted["usage"], wanted["receipt"])
    tokens = _stream({"token_ids": [[1, 2], [3]]}, {"model": "tiny"})
    states = _post(bench, "/v1/hidden_states", tokens).json()
    assert states["data"] == bench.post("/v1/hidden_states", {"model": "tiny", "input": [[1, 2], [3]]}).json()["data"]


def test_where_no_rows_are_read_arrow_is_refused_in_words(bench: Bench):
    answer = _post(bench, "/v1/chat/completions", _stream({"text": ["a"]}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_supported")


def _refused(body: bytes, limits: ArrowLimits = LIMITS) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        parse(body, "classify", limits)
    return raised.value


TEXT = pa.array(["aa", "b"])


@pytest.mark.parametrize(
    ("columns", "param", "says"),
    [
        ({"text": TEXT.dictionary_encode()}, "body", "dictionary"),
        ({"text": pa.array(["a"], pa.string_view())}, "text", "strings"),
        ({"text": pa.array([b"a"])}, "text", "strings"),
        ({"text": pa.array([1])}, "text", "strings"),
        ({"text": pa.nulls(1)}, "text", "strings"),
        ({"vector": pa.array([1.0])}, "vector", "lists of floats"),
        ({"vector": pa.array([[1]], pa.list_(pa.int64()))}, "vector", "lists of floats"),
        ({"vector": pa.array([], pa.list_(pa.float32(), 0))}, "vector", "no numbers"),
        ({"vector": pa.array([[[1.0]]])}, "vector", "lists of floats"),
        ({"text": TEXT, "vector": pa.array([[1.0], [2.0]])}, "vector", "one column"),
        ({"label": TEXT}, "body", "one column"),
        ({"text": TEXT, "colour": TEXT}, "colour", "not known"),
        ({}, "body", "one column"),
        ({f"c{i}": TEXT for i in range(99)}, "body", "99 columns"),
    ],
    ids=lambda value: None,
)
def test_columns_that_are_not_taken_are_refused_by_name(columns: dict[str, Any], param: str, says: str):
    error = _refused(_stream(columns))
    assert error.param == param and says in error.message, error


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_by_its_place(number: float):
    error = _refused(_stream({"vector": pa.array([[1.0, 2.0], [3.0, number]]), "label": ["x", None]}))
    assert error.param == "inputs[0].vector[1]"


def test_a_column_twice_and_options_twice_are_refused():
    table = pa.Table.from_arrays([TEXT, TEXT], names=["text", "text"])
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert "twice" in _refused(sink.getvalue()).message
    assert _refused(_stream({"text": TEXT}, {"inputs": ["b"]})).param == "inputs"


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_batch_is_refused_before_it_is_unpacked(codec: str):
    body = _stream({"text": pa.array(["a" * 2**20] * 50)}, options=pa.ipc.IpcWriteOptions(compression=codec))
    assert len(body) < 2**20  # fifty times as much, once unpacked
    before = pa.total_allocated_bytes()
    assert "compressed" in _refused(body).message
    assert pa.total_allocated_bytes() - before < 2**20


def test_more_rows_than_are_taken_are_refused_before_they_are_made():
    assert (
        "more than 10 rows" in _refused(_stream({"text": ["a"] * 11}), ArrowLimits(max_rows=10, max_depth=16)).message
    )


@pytest.mark.parametrize("about", [b"{", b"[1]", b"\xff", b"[" * 99])
def test_metadata_that_are_no_json_object_are_refused(about: bytes):
    table = pa.table({"text": TEXT}).replace_schema_metadata({"metasepia": about})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    _refused(sink.getvalue())


def test_bytes_that_are_no_stream_are_refused_whatever_they_are():
    """Cut anywhere, with bytes changed anywhere, with lengths that lie: an error in words or a tree, and no more."""
    whole = _stream({"text": TEXTS, "label": LABELS}, {"seed": 1}, batches=2)
    noise = np.random.default_rng(0)
    bodies = [b"", b"ARROW1\0\0", b"\xff" * 64, b"{}", *(whole[:cut] for cut in range(0, len(whole), 13))]
    for _ in range(400):
        changed = bytearray(whole)
        for place in noise.integers(0, len(whole), noise.integers(1, 8)):
            changed[place] = noise.integers(256)
        bodies.append(bytes(changed))
    for length in (-1, 2**31 - 1, 2**20):
        bodies.append(b"\xff\xff\xff\xff" + struct.pack("<i", length) + whole[8:])
    read = 0
    for body in bodies:
        try:
            read += _is_tree(parse(body, "classify", LIMITS))
        except InvalidRequest:
            continue
    assert read > 0  # changes in the padding change nothing


def _is_tree(tree: dict[str, Any]) -> bool:
    rows: Sequence[Any] = [*tree.get("examples", ()), *tree["inputs"]]
    return all(isinstance(one, dict) for one in rows)
