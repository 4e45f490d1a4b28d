"""The official OpenAI clients for Python and Node, and curl, unchanged, against the real graph."""

import base64
import json
import math
import shutil
import subprocess
from typing import Any

import numpy as np
import openai
import pytest

from tests.requests import BACKBONE, ENCODER, QUESTION
from tests.serving import ROOT, Served

pytestmark = pytest.mark.timeout(600)
NODE = ROOT / "tests" / "node"
ASKED: dict[str, Any] = {"model": BACKBONE, "messages": QUESTION, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_logprobs_of_a_chat_are_those_of_its_tokens_whole_and_streamed(client: openai.OpenAI):
    choice = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = choice.logprobs.content
    assert b"".join(bytes(one.bytes or []) for one in told).decode() == choice.message.content
    for one in told:  # greedy: what was chosen is the likeliest
        assert one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob <= 0
        assert sum(math.exp(other.logprob) for other in one.top_logprobs) <= 1 + 1e-6
    chunks = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    streamed = [one for part in parts if part for one in part.content or []]
    assert [one.token for one in streamed] == [one.token for one in told]
    np.testing.assert_allclose([one.logprob for one in streamed], [one.logprob for one in told], atol=1e-3)


def test_a_stop_string_ends_an_answer_early_and_later_tokens_are_not_told(client: openai.OpenAI):
    whole = client.chat.completions.create(**ASKED)
    text = whole.choices[0].message.content or ""
    stop = text.split()[2]
    cut = client.chat.completions.create(**ASKED, stop=[stop], logprobs=True)
    choice = cut.choices[0]
    assert choice.message.content == text[: text.index(stop)] and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content
    told = ["".join(one.token for one in choice.logprobs.content[:end]) for end in (-1, None)]
    assert len(told[0]) < len(choice.message.content) <= len(told[1])  # the last one told has begun before the cut
    assert whole.usage is not None and cut.usage is not None
    assert cut.usage.completion_tokens < whole.usage.completion_tokens


def test_an_echoed_prompt_is_scored_as_it_was_generated(client: openai.OpenAI):
    first = client.completions.create(
        model=BACKBONE, prompt="The capital of France is", max_tokens=6, temperature=0, logprobs=1
    ).choices[0]
    assert first.logprobs is not None
    again = client.completions.create(
        model=BACKBONE, prompt="The capital of France is" + first.text, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert again.logprobs is not None and again.text.endswith(first.text)
    assert again.logprobs.token_logprobs is not None and first.logprobs.token_logprobs is not None
    number = len(first.logprobs.token_logprobs)
    assert (again.logprobs.tokens or [])[-number:] == first.logprobs.tokens
    np.testing.assert_allclose(again.logprobs.token_logprobs[-number:], first.logprobs.token_logprobs, atol=1e-3)


def test_several_prompts_answer_as_each_alone(client: openai.OpenAI):
    prompts = ["One, two,", "Red, green,"]
    arguments: dict[str, Any] = {"model": BACKBONE, "max_tokens": 5, "temperature": 0}
    both = client.completions.create(**arguments, prompt=prompts)
    alone = [client.completions.create(**arguments, prompt=one).choices[0].text for one in prompts]
    assert [one.text for one in both.choices] == alone


def test_embeddings_in_fewer_dimensions_are_the_first_ones(client: openai.OpenAI):
    whole = np.array(client.embeddings.create(model=ENCODER, input="one body").data[0].embedding)
    short = np.array(client.embeddings.create(model=ENCODER, input="one body", dimensions=16).data[0].embedding)
    np.testing.assert_allclose(short, whole[:16] / np.linalg.norm(whole[:16]), rtol=1e-5)


def test_refusals_are_the_clients_own_errors(client: openai.OpenAI):
    nobody: dict[str, Any] = {**ASKED, "model": "nobody"}
    endless: dict[str, Any] = {**ASKED, "max_tokens": 10**6}
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**nobody)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="leave it out"):
        client.chat.completions.create(**ASKED, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**endless)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(not (NODE / "node_modules" / "openai").is_dir(), reason="npm ci did not run in tests/node")
def test_the_node_client_is_answered_like_the_python_one(served: Served, client: openai.OpenAI):
    command = ["node", "client.mjs", served.url, BACKBONE, ENCODER]
    done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    text = client.chat.completions.create(**ASKED).choices[0].message.content
    assert said["text"] == said["streamed"] == "".join(said["tokens"]) == text
    assert set(said["models"]) == {one.id for one in client.models.list()} and said["retrieved"] == BACKBONE
    assert set(said["top"]) == {2} and said["receipt"] == "plain"
    assert said["usage"]["completion_tokens"] > 0 and said["choices"] == [0, 1, 2, 3]
    assert said["width"] == 384 and said["short"] == 8
    np.testing.assert_allclose(said["norms"], 1, atol=1e-5)
    assert said["errors"] == [
        ["NotFoundError", 404, "model_not_found", "model"],
        ["BadRequestError", 400, "invalid_value", "max_tokens"],
        ["BadRequestError", 400, "invalid_value", "tools"],
    ]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams_and_embeds(served: Served):
    def curl(path: str, body: dict[str, Any]) -> str:
        command = ["curl", "-sSN", "--max-time", "60", f"{served.url}{path}", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    lines = [line for line in curl("/v1/chat/completions", ASKED | {"stream": True}).split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[-2].removeprefix("data: "))["receipt"]["path"] == "plain"
    answer = json.loads(curl("/v1/embeddings", {"model": ENCODER, "input": "a", "encoding_format": "base64"}))
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert vector.shape == (384,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
