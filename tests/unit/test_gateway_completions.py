"""What OpenAI's clients ask of completions beyond text: log-probabilities, several prompts, echo, shorter vectors."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.doors import EXPERT, Bench
from tests.unit.test_prompts import write_byte_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path))


def complete(bench: Bench, **fields: Any) -> httpx.Response:
    return bench.post("/v1/completions", {"model": "tiny", "prompt": "ab", "max_tokens": 20, "seed": 7} | fields)


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["param"]


def test_a_chat_tells_each_token_its_bytes_and_the_likeliest_beside_it(bench: Bench):
    bench.says("a€")
    choice = bench.chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    told = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in told) == "a€".encode()
    assert [one["logprob"] for one in told] == [-0.5] * 4
    assert told[0]["token"] == "a" and told[1]["token"] == "\ufffd"
    assert [(one["token"], one["logprob"]) for one in told[0]["top_logprobs"]] == [("a", -0.5), ("a", -1.0)]
    assert bench.backbone.rows[0].top_logprobs == 2
    assert bench.chat().json()["choices"][0]["logprobs"] is None


def test_a_stream_tells_the_same_tokens_as_the_whole_answer(bench: Bench):
    bench.says("naïve 🦑 END of it")
    fields = {"logprobs": True, "top_logprobs": 1, "stop": ["END"]}
    whole = bench.chat(**fields).json()["choices"][0]
    assert whole["message"]["content"] == "naïve 🦑 "
    streamed = events(bench.chat(**fields, stream=True))
    parts = [event["choices"][0]["logprobs"] for event in streamed]
    assert [one for part in parts if part for one in part["content"]] == whole["logprobs"]["content"]
    told = b"".join(bytes(one["bytes"]) for one in whole["logprobs"]["content"])
    assert told == "naïve 🦑 ".encode()  # nothing of what the stop string cut off


def test_a_plain_completion_tells_tokens_in_the_older_shape(bench: Bench):
    bench.says("xy€")
    logprobs = complete(bench, logprobs=3).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["x", "y", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert logprobs["token_logprobs"] == [-0.5] * 5
    assert logprobs["top_logprobs"][0] == {"x": -0.5, "a": -1.0, "b": -2.0}
    assert logprobs["text_offset"] == [0, 1, 2, 2, 2]
    bench.says("z")
    assert complete(bench, logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"] == [{}]


def test_several_prompts_are_choices_in_their_order_each_with_its_own_seed(bench: Bench):
    bench.says("!")
    answer = complete(bench, prompt=["one", "three", [97, 98]], n=2, model="tiny:maths").json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    rows = sorted(bench.backbone.rows, key=lambda row: row.seed)
    assert [len(row.token_ids) for row in rows] == [3, 3, 5, 5, 2, 2]
    assert [row.seed for row in rows] == list(range(7, 13))
    assert all(row.adapter == ((EXPERT, 1.0),) for row in rows)
    assert answer["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}


def test_an_echoed_prompt_stands_before_its_answer_with_its_own_logprobs(bench: Bench):
    bench.says("!")
    choice = complete(bench, prompt="abc", echo=True, logprobs=2).json()["choices"][0]
    assert choice["text"] == "abc!"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "!"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.75, -1.75, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"a": 0.0, "b": -1.75}]
    streamed = events(complete(bench, prompt="abc", echo=True, logprobs=2, stream=True))
    parts = [event["choices"][0] for event in streamed]
    assert "".join(part["text"] for part in parts) == "abc!"
    offsets = [at for part in parts if part["logprobs"] for at in part["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3]
    plain = complete(bench, prompt=["abc", "de"], echo=True).json()["choices"]
    assert [one["text"] for one in plain] == ["abc!", "de!"] and plain[0]["logprobs"] is None


def test_no_tokens_and_echo_is_the_prompt_alone_with_a_receipt(bench: Bench):
    answer = complete(bench, prompt="abc", echo=True, logprobs=1, max_tokens=0).json()
    assert answer["choices"][0]["text"] == "abc" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0 and answer["receipt"]["path"] == "plain"
    assert [row.want for row in bench.backbone.rows] == ["logprobs"]
    last = events(complete(bench, prompt="abc", echo=True, max_tokens=0, stream=True))[-1]
    assert last["choices"][0]["finish_reason"] == "length" and last["receipt"]["path"] == "plain"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", " "]}, "prompt[1]"),
        ({"prompt": [[97], []]}, "prompt[1]"),
        ({"prompt": [[97], ["a"]]}, "prompt[1]"),
        ({"prompt": [97, -1]}, "prompt"),
        ({"prompt": [97, 258]}, "prompt"),
        ({"prompt": [97, 1.5]}, "prompt[0]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [[97] * 64]}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
        ({"prompt": ["a", "b"], "model": "auto"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": 63}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
    ids=str,
)
def test_what_a_completion_cannot_do_is_refused_by_its_field(bench: Bench, fields: dict[str, Any], param: str):
    assert refusal(complete(bench, **fields)) == (400, param)


def test_tools_are_refused_in_words(bench: Bench):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    error = bench.chat(tools=[tool]).json()["error"]
    assert error["param"] == "tools" and "leave it out" in error["message"]


def test_shorter_vectors_are_the_first_numbers_at_unit_norm(bench: Bench):
    body = {"model": "minilm-fake", "input": ["a", "bb"]}
    whole = [one["embedding"] for one in bench.post("/v1/embeddings", body).json()["data"]]
    width = len(whole[0])
    short = bench.post("/v1/embeddings", body | {"dimensions": 1, "encoding_format": "base64"}).json()["data"]
    vectors = np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in short])
    cut = np.array(whole)[:, :1]
    np.testing.assert_allclose(vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), rtol=1e-6)
    assert bench.post("/v1/embeddings", body | {"dimensions": width}).json()["data"][0]["embedding"] == whole[0]
    assert refusal(bench.post("/v1/embeddings", body | {"dimensions": width + 1})) == (400, "dimensions")
    assert refusal(bench.post("/v1/embeddings", body | {"dimensions": 0})) == (400, "dimensions")
