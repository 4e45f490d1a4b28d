"""The protocols `vanilla` and `loo` at the door: which rows a backbone is asked for, and what becomes of them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasepia.reasoning.named import EmbeddedContext
from metasepia.rows import Row
from tests.doors import DIGEST, Bench
from tests.unit.test_prompts import write_byte_tokenizer

EXAMPLES = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
PROMPT_LEN = 2 * len("Sentence: x\nLabel: a\n")
QUERY_LEN = len("Sentence: z")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")


def make(bench: Bench, protocol: str, **body: Any) -> dict[str, Any]:
    response = bench.post("/v1/contexts", {"examples": EXAMPLES, "encoder": "tiny", "protocol": protocol} | body)
    assert response.status_code == 200, response.text
    return response.json()


def spanned(bench: Bench, row: Row) -> list[str]:
    text = bench.door.prompts["tiny"].text
    return [text(row.token_ids[begin:end]).strip() for begin, end in row.hidden.spans]


def test_vanilla_reads_all_examples_in_one_prompt_and_a_query_after_it(bench: Bench):
    made = make(bench, "vanilla")
    (row,) = bench.backbone.rows
    assert len(row.token_ids) == PROMPT_LEN and sorted(spanned(bench, row)) == ["x", "y"]
    bench.backbone.rows.clear()
    answer = bench.post("/v1/classify", {"model": made["id"], "inputs": ["z", "w"]}).json()
    for query, text in zip(bench.backbone.rows, "zw", strict=True):
        assert query.token_ids[:PROMPT_LEN] == row.token_ids == query.prefix
        assert len(query.token_ids) == PROMPT_LEN + QUERY_LEN and spanned(bench, query) == [text]
    assert (answer["receipt"]["backbone"], answer["usage"]["prompt_tokens"]) == (DIGEST, 2 * (PROMPT_LEN + QUERY_LEN))


def test_loo_reads_each_example_last_and_never_with_its_own_label(bench: Bench):
    make(bench, "loo")
    assert len(bench.backbone.rows) == 2
    for row in bench.backbone.rows:
        (text,) = spanned(bench, row)
        whole = bench.door.prompts["tiny"].text(row.token_ids)
        assert whole.endswith(f"Sentence: {text}") and f"Label: {'a' if text == 'x' else 'b'}" not in whole
        assert len(row.prefix) == PROMPT_LEN


@pytest.mark.parametrize("protocol", ["vanilla", "loo"])
def test_vectors_belong_to_their_examples_whatever_order_they_came_in(bench: Bench, protocol: str):
    made = make(bench, protocol, unlabelled=["v"])
    assert make(bench, protocol, examples=EXAMPLES[::-1], unlabelled=["v"])["cached"]
    assert bench.catalogue.registry is not None
    stored = EmbeddedContext.from_bytes(bench.catalogue.registry.get(made["id"][4:]), made["id"][4:])
    assert stored.unlabelled is not None and stored.unlabelled.shape == (1, 4)
    bytes_of = {"x": ord("x"), "y": ord("y")}
    ratio = stored.vectors[:, 0] / stored.vectors[:, 2]  # the mean token, whatever the norm
    tokens = [bench.door.prompts["tiny"].plain(str(one.content))[0] for one in stored.named.examples]
    np.testing.assert_allclose(ratio, tokens, rtol=1e-5)
    assert {one.content for one in stored.named.examples} == set(bytes_of)


def test_one_request_with_its_examples_asks_for_what_a_named_context_asks_for(bench: Bench):
    made = make(bench, "loo")
    by_name = bench.post("/v1/classify", {"model": made["id"], "inputs": ["z"]}).json()
    body = {"examples": EXAMPLES, "encoder": "tiny", "protocol": "loo", "inputs": ["z"]}
    by_examples = bench.post("/v1/classify", body).json()
    assert by_examples["results"] == by_name["results"]
    assert by_examples["receipt"]["context"] == by_name["receipt"]["context"] == made["id"][4:]


def test_more_examples_are_all_read_again(bench: Bench, tmp_path: Path):
    bench.backbone.prepared = dataclasses.replace(bench.backbone.prepared, window=128)
    made = make(bench, "loo")
    bench.backbone.rows.clear()
    response = bench.post(f"/v1/contexts/{made['id']}/examples", {"examples": [{"text": "w", "label": "a"}]})
    assert response.status_code == 200, response.text
    assert sorted(spanned(bench, row)[0] for row in bench.backbone.rows) == ["w", "x", "y"]


def test_a_prompt_beyond_the_window_is_refused_with_the_way_out(bench: Bench):
    body = {"examples": [*EXAMPLES, {"text": "w", "label": "a"}, {"text": "v", "label": "a"}], "encoder": "tiny"}
    error = bench.post("/v1/contexts", body | {"protocol": "loo"}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "examples")
    assert "stream" in error["message"]
    made = make(bench, "loo")
    error = bench.post("/v1/classify", {"model": made["id"], "inputs": ["z", "z" * 20]}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "inputs[1]")
