"""Bodies: every bad value is refused with its field named, before anything is asked of the graph."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

import pydantic
import pytest

from cluster.door_settings import HttpSettings
from metasepia.errors import BodyTooLarge, InvalidRequest
from serve.requests import bodies, inputs
from serve.requests.failures import unwrap
from serve.requests.schemas import ChatRequest, ClassifyRequest, EmbeddingsRequest

HTTP = HttpSettings()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
CLASSIFY = {"examples": [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}], "inputs": ["z"]}


async def _once(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def _refusal(kind, tree) -> InvalidRequest:
    with pytest.raises((InvalidRequest, pydantic.ValidationError)) as raised:
        body = kind.of(tree)
        body.check() if kind is ChatRequest else body.check(HTTP)
        if kind is ClassifyRequest:
            labelled = inputs.read_labelled(body.examples, body.unlabelled, HTTP)
            inputs.check_classes([one.label for one in labelled.examples], HTTP)
            inputs.read_inputs(body.inputs, "inputs", HTTP, labelled.kind)
    error = unwrap(raised.value)
    assert isinstance(error, InvalidRequest)
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": 2}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temprature": 0.5}, "temprature"),
        ({"model": None}, "model"),
        ({"model": " "}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ],
    ids=str,
)
def test_a_wrong_chat_field_is_refused_by_its_name(change, param):
    assert _refusal(ChatRequest, CHAT | change).param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"examples": []}, "examples"),
        ({"examples": None}, "examples"),
        ({"examples": [{"text": "x", "label": "a"}, {"text": "y", "label": "a"}]}, "examples"),
        ({"examples": [{"text": "x", "label": "a"}, {"text": "y", "label": None}]}, "examples[1].label"),
        ({"examples": [{"text": "x", "label": "a"}, {"text": "y", "label": 1}]}, "examples[1].label"),
        ({"examples": [{"text": "x", "label": "a"}, {"text": "y", "label": ""}]}, "examples[1].label"),
        ({"examples": [{"text": "", "label": "a"}, {"text": "y", "label": "b"}]}, "examples[0].text"),
        ({"examples": [{"label": "a"}, {"text": "y", "label": "b"}]}, "examples[0].text"),
        ({"examples": [{"text": "x", "label": "a", "weight": 2}]}, "examples[0].weight"),
        ({"examples": [{"text": "x", "label": str(i)} for i in range(4097)]}, "examples"),
        ({"examples": [{"text": "x", "label": str(i)} for i in range(513)]}, "examples"),
        ({"examples": [{"text": "x", "label": "a" * 257}]}, "examples[0].label"),
        ({"examples": [{"text": "x" * 50_001, "label": "a"}]}, "examples[0].text"),
        ({"examples": [{"text": "x", "label": "a"}, {"vector": [1], "label": "b"}]}, "examples[1].vector"),
        ({"examples": [{"text": "x", "vector": [1], "label": "a"}]}, "examples[0].vector"),
        ({"examples": [{"vector": [1, "2"], "label": "a"}]}, "examples[0].vector"),
        ({"examples": [{"vector": [1, True], "label": "a"}]}, "examples[0].vector"),
        ({"examples": [{"vector": [1e39], "label": "a"}]}, "examples[0].vector"),
        ({"examples": [{"vector": [], "label": "a"}]}, "examples[0].vector"),
        ({"examples": [{"vector": [0.0] * 8193, "label": "a"}]}, "examples[0].vector"),
        ({"examples": [{"image": "no base64!", "label": "a"}]}, "examples[0].image"),
        ({"examples": ["x"]}, "examples[0]"),
        ({"unlabelled": ["x"] * 4097}, "unlabelled"),
        ({"unlabelled": ["x", " "]}, "unlabelled[1]"),
        ({"unlabelled": [{"vector": [1]}]}, "unlabelled[0].vector"),
        ({"inputs": [{"vector": [1.0]}]}, "inputs[0].vector"),
        ({"abstain_below": 1.1}, "abstain_below"),
        ({"abstain_below": "half"}, "abstain_below"),
        ({"explain": 1}, "explain"),
        ({"protocol": "prompt"}, "protocol"),
        ({"model": "ctx-" + "0" * 64}, "examples"),
        ({"inputs": []}, "inputs"),
        ({"inputs": ["x", "  "]}, "inputs[1]"),
        ({"inputs": ["x", None]}, "inputs[1]"),
        ({"inputs": ["x"] * 2049}, "inputs"),
        ({"encoder": 3}, "encoder"),
        ({"seed": 0.5}, "seed"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_classification_field_is_refused_by_its_name(change, param):
    assert _refusal(ClassifyRequest, CLASSIFY | change).param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": [["a"]]}, "input[0]"),
        ({"input": [1, "a"]}, "input[0]"),
        ({"input": {"text": "a"}}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
    ],
    ids=str,
)
def test_a_wrong_embeddings_field_is_refused_by_its_name(change, param):
    assert _refusal(EmbeddingsRequest, {"model": "m", "input": "a"} | change).param == param


def test_fields_that_ask_for_nothing_are_accepted():
    neutral = {"n": 1, "tools": [], "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "stop": None}
    body = ChatRequest.of(CHAT | neutral | {"logprobs": False, "top_p": None, "response_format": {"type": "text"}})
    assert (body.n, body.stop, body.top_p) == (1, [], 1.0)


def test_content_in_parts_is_their_text_joined():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert ChatRequest.of(CHAT | {"messages": [{"role": "user", "content": parts}]}).messages[0].content == "hello"


def test_the_smaller_of_both_answer_limits_holds():
    body = ChatRequest.of(CHAT | {"max_tokens": 9, "max_completion_tokens": 5})
    assert body.answer_limit == ("max_completion_tokens", 5)


def test_256_examples_and_300_inputs_fit_one_request():
    examples = [{"text": f"text {i}", "label": str(i % 3)} for i in range(256)]
    ClassifyRequest.of({"examples": examples, "inputs": ["x"] * 300}).check(HTTP)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"a": ', "body", "not JSON"),
        (b"", "body", "not JSON"),
        (b'{"a": 1} x', "body", "not JSON"),
        (b'["a"]', "body", "an array"),
        (b"null", "body", "null"),
        (b'{"a": "\xff"}', "body", "not UTF-8"),
        (b"[" * 100_000, "body", "deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "body", "deeper than 64"),
        (b'{"messages": [{"content": NaN}]}', "messages[0].content", "nan"),
        (b'{"temperature": Infinity}', "temperature", "inf"),
        (b'{"temperature": -1e999}', "temperature", "inf"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body", "too many digits"),
        (b'{"inputs": ["ok", "\\ud800"]}', "inputs[1]", "surrogate"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_no_json_object_is_refused_in_words(body, param, words):
    with pytest.raises(InvalidRequest, match=words) as raised:
        bodies.parse(body, max_depth=64)
    assert raised.value.param == param


def test_brackets_inside_strings_do_not_nest():
    tree = {"a": '["' + "[" * 200 + '\\"{'}
    assert bodies.parse(json.dumps(tree).encode(), max_depth=8) == tree


def test_nesting_up_to_the_limit_is_read():
    tree = json.loads('{"a":' + "[" * 63 + "]" * 63 + "}")
    assert bodies.parse(json.dumps(tree).encode(), max_depth=64) == tree


@pytest.mark.parametrize("head", [b'{"a": "', b'"'])
@pytest.mark.parametrize("repeated", [b'\\"[', b'"', b"\\", b'\\"', b'"\\', b"]"])
def test_two_mebibytes_of_anything_are_scanned_in_linear_time(head: bytes, repeated: bytes):
    begin = time.perf_counter()
    with contextlib.suppress(InvalidRequest):
        bodies.parse(head + repeated * ((2 << 20) // len(repeated)), 64)
    assert time.perf_counter() - begin < 5


async def _read(*chunks: bytes, **headers: str) -> bytes:
    return await bodies.read(_once(*chunks), headers, max_mib=1 / 1024)


def test_a_body_beyond_the_limit_is_refused_though_no_length_was_declared():
    assert asyncio.run(_read(b"x" * 512, b"y" * 512)) == b"x" * 512 + b"y" * 512
    with pytest.raises(BodyTooLarge, match="longer than"):
        asyncio.run(_read(b"x" * 512, b"y" * 513))


def test_a_compressed_body_is_refused_by_its_header():
    with pytest.raises(InvalidRequest, match="content-encoding"):
        asyncio.run(_read(b"x", **{"content-encoding": "gzip"}))
