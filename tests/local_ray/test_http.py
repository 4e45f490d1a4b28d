"""The whole laptop graph over HTTP, as `make serve` starts it: real SmolLM2, MiniLM and reasoning module."""

import asyncio
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pyarrow as pa
import pytest

from cluster.settings import CentroidSettings
from jobs import export_expert
from metasepia.centroids import OnlineCentroids
from metasepia.experts.peft_files import CONFIG, WEIGHTS
from metasepia.experts.vectors import ExpertVectors
from tests.requests import BACKBONE, BAD_BODIES, CHAT, CLASSIFY, ENCODER, QUESTION, STORY
from tests.serving import EXAMPLES, REVIEWS, ROOT, Served

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_the_three_requests_it_prints_are_answered_as_printed(served: Served):
    lines = [line for line in served.output.splitlines() if line.startswith("curl ")]
    assert len(lines) == 3
    for line in lines:
        answer = json.loads(subprocess.run(shlex.split(line), capture_output=True, timeout=60, check=True).stdout)
        assert "error" not in answer, answer
        assert answer["receipt"]["request"]


def test_the_openai_client_lists_and_retrieves_every_model(client: openai.OpenAI):
    ids = [model.id for model in client.models.list()]
    assert {BACKBONE, ENCODER} <= set(ids)
    assert [client.models.retrieve(id_).id for id_ in ids] == ids


def test_the_openai_client_gets_the_same_chat_whole_and_streamed(client: openai.OpenAI):
    arguments: dict[str, Any] = {"model": BACKBONE, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason == "stop"
    for answer in (whole, chunks[-1]):
        receipt = (answer.model_extra or {})["receipt"]
        assert (receipt["path"], receipt["adapter"], len(receipt["backbone"])) == ("plain", [], 64)


def test_a_seed_decides_the_sample(client: openai.OpenAI):
    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model=BACKBONE, messages=QUESTION, max_tokens=12, temperature=1.5, seed=seed
        )
        return answer.choices[0].message.content

    assert sample(1) == sample(1) != sample(2)


def test_choices_of_one_request_equal_requests_of_their_seeds(client: openai.OpenAI):
    arguments: dict[str, Any] = {"model": BACKBONE, "messages": QUESTION, "max_tokens": 8, "temperature": 1.0}
    both = client.chat.completions.create(**arguments, n=2, seed=10)
    alone = [client.chat.completions.create(**arguments, seed=10 + i) for i in range(2)]
    assert [one.message.content for one in both.choices] == [one.choices[0].message.content for one in alone]


def test_a_plain_completion_continues_its_prompt(client: openai.OpenAI):
    answer = client.completions.create(
        model=BACKBONE, prompt="1, 2, 3, 4, 5, 6,", max_tokens=12, temperature=0, stop=["9"]
    )
    assert answer.choices[0].text == " 7, 8, "
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("model", "width"), [(ENCODER, 384), (BACKBONE, 576)])
def test_embeddings_agree_in_both_formats_and_have_unit_norm(client: openai.OpenAI, model: str, width: int):
    texts = ["a cat on the mat", "a kitten on the rug", "quarterly tax return"]
    coded = client.embeddings.create(model=model, input=texts)  # the client asks for base64 by itself
    floats = client.embeddings.create(model=model, input=texts, encoding_format="float")
    a, b = (np.array([one.embedding for one in answer.data]) for answer in (coded, floats))
    assert a.shape == (3, width)
    np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    assert a[0] @ a[1] > a[0] @ a[2]
    assert floats.usage.prompt_tokens > 0


def _hidden(served: Served, **fields: Any) -> dict[str, Any]:
    response = served.post("/v1/hidden_states", {"model": BACKBONE, "input": [text for text, _ in REVIEWS], **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_hidden_states_agree_with_each_other_and_with_the_embedding(served: Served, client: openai.OpenAI):
    every, last, mean = (_hidden(served, pooling=pooling, layers=[12, -1]) for pooling in ("none", "last", "mean"))
    for tokens, end, middle in zip(every["data"], last["data"], mean["data"], strict=True):
        states = np.array(tokens["states"])
        assert states.shape == (len(tokens["token_ids"]), 576)
        np.testing.assert_allclose(states[-1], end["states"], atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(states.mean(0), middle["states"], atol=2e-3, rtol=1e-3)
    vectors = np.array([one["states"] for one in mean["data"] if one["layer"] == 30])
    embedded = client.embeddings.create(model=BACKBONE, input=[text for text, _ in REVIEWS])
    np.testing.assert_allclose(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True), [one.embedding for one in embedded.data], atol=1e-4
    )


def test_an_experts_states_are_its_own_and_come_as_an_arrow_stream_too(served: Served):
    base, ones, noisy = (_hidden(served, model=BACKBONE + name, layers=[20]) for name in ("", ":ones", ":noisy"))
    states = [np.array([one["states"] for one in got["data"]]) for got in (base, ones, noisy)]
    assert np.abs(states[1] - states[0]).max() < 0.02 * np.abs(states[0]).max()
    assert np.abs(states[2] - states[0]).max() > 0.1 * np.abs(states[0]).max()
    assert [got["receipt"]["path"] for got in (base, ones, noisy)] == ["plain", "factors", "factors"]
    body = {"model": f"{BACKBONE}:noisy", "input": [text for text, _ in REVIEWS], "layers": [20]}
    response = served.post("/v1/hidden_states", body, headers={"accept": "application/vnd.apache.arrow.stream"})
    reader = pa.ipc.open_stream(io.BytesIO(response.content))
    assert json.loads(reader.schema.metadata[b"metasepia"])["receipt"]["adapter"] == noisy["receipt"]["adapter"]
    np.testing.assert_allclose(reader.read_all()["state"].to_pylist(), states[2], atol=2e-3, rtol=1e-3)


def test_texts_of_another_kind_move_a_tasks_drift_and_its_gauge(served: Served):
    def drift() -> float:
        line = re.search(r'^metasepia_centroid_drift\{.*task="reviews".*\} (.+)$', served.get("/metrics").text, re.M)
        return float(line[1]) if line else -1.0

    own = [_hidden(served, task="reviews", layers=[20])["task"]["centroids"][0] for _ in range(3)][-1]
    assert own["count"] == 18 and _settles(drift, own["drift"])
    code = [f"def f{i}(x):\n    return x ** {i} + {i}" for i in range(40)]
    moved = _hidden(served, task="reviews", layers=[20], input=code)["task"]["centroids"][0]
    assert _settles(drift, moved["drift"])
    assert moved["drift"] > 3 * own["drift"] + 0.5, (own, moved)


def test_errors_reach_the_openai_client_as_its_own(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match=f"known: {BACKBONE}"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=BACKBONE, messages=QUESTION, temperature=3)
    assert raised.value.param == "temperature"


@pytest.mark.parametrize("encoder", [ENCODER, BACKBONE])
def test_a_classification_answers_each_input_with_a_distribution(served: Served, encoder: str):
    answer = served.post("/v1/classify", CLASSIFY | {"encoder": encoder}).json()
    assert len(answer["results"]) == 2
    for one in answer["results"]:
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].__getitem__)
    receipt = answer["receipt"]
    assert all(len(receipt[part]) == 64 for part in ("request", "context", "module"))
    assert len(receipt["encoder" if encoder == ENCODER else "backbone"]) == 64


def test_256_examples_of_three_labels_and_300_inputs_are_one_request(served: Served):
    body = {
        "examples": [{"text": f"{['red', 'green', 'blue'][i % 3]} thing {i}", "label": str(i % 3)} for i in range(256)],
        "inputs": [f"{['red', 'green', 'blue'][i % 3]} matter {i}" for i in range(300)],
    }
    answer = served.post("/v1/classify", body, timeout_s=120).json()
    assert [set(one["probabilities"]) for one in answer["results"]] == [{"0", "1", "2"}] * 300


def _greedy(client: openai.OpenAI, model: str) -> tuple[str, dict[str, Any]]:
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=12, temperature=0)
    return str(answer.choices[0].message.content), (answer.model_extra or {})["receipt"]


def test_an_expert_of_ones_says_what_the_base_says_by_another_path(client: openai.OpenAI):
    base, _ = _greedy(client, BACKBONE)
    ones, receipt = _greedy(client, f"{BACKBONE}:ones")
    assert ones == base
    assert (receipt["path"], receipt["adapter"][0][1], len(receipt["factors"])) == ("factors", 1.0, 64)


def test_an_expert_changes_the_answer_and_the_receipt_names_it(client: openai.OpenAI):
    listed = {model.id: model for model in client.models.list()}[f"{BACKBONE}:noisy"].model_extra or {}
    noisy, receipt = _greedy(client, f"{BACKBONE}:noisy")
    assert noisy != _greedy(client, BACKBONE)[0]
    assert listed["parent"] == BACKBONE
    assert receipt["adapter"] == [[listed["x_info"]["digest"], 1.0]]


def test_a_mixture_answers_by_the_name_that_registering_it_gave(served: Served, client: openai.OpenAI):
    body = {"backbone": BACKBONE, "weights": {"ones": 0.25, "noisy": 0.75}}
    made = served.post("/v1/mixtures", body).json()
    assert served.post("/v1/mixtures", body).json() == made
    _, receipt = _greedy(client, made["model"])
    assert sorted(weight for _, weight in receipt["adapter"]) == [0.25, 0.75]
    assert made["model"] in [model.id for model in client.models.list()]


def _upload(served: Served, method: str, path: str, **parts: bytes | str) -> dict[str, Any]:
    form: dict[str, Any] = {key: (None if isinstance(one, str) else key, one) for key, one in parts.items()}
    response = httpx.request(method, served.url + path, files=form, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_uploaded_expert_answers_at_once_is_replaced_at_once_and_is_gone_at_once(
    served: Served, client: openai.OpenAI
):
    ones, noisy = (served.get(f"/v1/experts/{name}/content").content for name in ("ones", "noisy"))
    made = _upload(served, "POST", "/v1/experts", name="mine", file=ones, card='{"description": "as it is"}')
    assert made["model"] in [model.id for model in client.models.list()]
    said, receipt = _greedy(client, made["model"])
    assert (said, receipt["adapter"]) == (_greedy(client, BACKBONE)[0], [[made["digest"], 1.0]])
    put = _upload(served, "PUT", "/v1/experts/mine", file=noisy)
    assert put["digest"] != made["digest"]
    said, receipt = _greedy(client, made["model"])
    assert (said, receipt["adapter"]) == (_greedy(client, f"{BACKBONE}:noisy")[0], [[put["digest"], 1.0]])
    assert httpx.delete(f"{served.url}/v1/experts/mine", timeout=20).json()["deleted"] is True
    with pytest.raises(openai.APIStatusError, match="was deleted at") as raised:
        _greedy(client, made["model"])
    assert raised.value.status_code == 410
    assert made["model"] not in [model.id for model in client.models.list()]


def test_a_peft_directory_answers_as_the_expert_that_it_was_exported_from(
    served: Served, client: openai.OpenAI, tmp_path: Path
):
    whole = ExpertVectors.from_bytes(served.get("/v1/experts/noisy/content").content)
    few = {layer: z for layer, z in whole.z.items() if layer.split(".")[2] in ("0", "1", "2")}
    expert = ExpertVectors(backbone=whole.backbone, factors=whole.factors, z=few)
    few_made = _upload(served, "POST", "/v1/experts", name="few", file=expert.to_bytes())
    options = ("--format", "peft", "--rank", "576", "--out", str(tmp_path), "--home", str(served.home))
    assert export_expert.main(["few", *options]) == 0
    files = {part: (tmp_path / name).read_bytes() for part, name in (("config", CONFIG), ("file", WEIGHTS))}
    made = _upload(served, "POST", "/v1/experts", name="few-lora", backbone=BACKBONE, **files)
    said, receipt = _greedy(client, made["model"])
    assert (receipt["path"], receipt["adapter"]) == ("lora", [[made["digest"], 1.0]])
    assert said == _greedy(client, few_made["model"])[0] != _greedy(client, BACKBONE)[0]


def test_a_gigabyte_is_refused_before_it_is_sent(served: Served):
    head = f"POST /v1/experts?name=x HTTP/1.1\r\nhost: door\r\ncontent-length: {2**30}\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(f"{head}content-type: application/octet-stream\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_every_shipped_expert_answers_its_cards_example_by_its_name_and_by_auto(client: openai.OpenAI):
    cards = [(model.id, (model.model_extra or {})["x_info"].get("card", {})) for model in client.models.list()]
    shipped = [(id_, card) for id_, card in cards if "example_prompt" in card]
    assert len(shipped) >= 1
    for id_, card in shipped:
        messages: list[Any] = [{"role": "user", "content": card["example_prompt"]}]
        # What chooses among the others is not itself chosen.
        for model in (id_,) if card["task"] == "dispatch" else (id_, "auto"):
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
            receipt = (answer.model_extra or {})["receipt"]
            assert answer.choices[0].message.content == card["example_answer"]
            assert (answer.model, receipt["adapter"]) == (id_, [[card["digest"], 1.0]])
            assert receipt["dispatch"] == ("centroid" if model == "auto" else None)


def test_auto_leaves_a_request_of_no_task_to_the_base(client: openai.OpenAI):
    answer, receipt = _greedy(client, "auto")
    assert answer == _greedy(client, BACKBONE)[0]
    assert (receipt["adapter"], receipt["path"], receipt["dispatch"]) == ([], "plain", "abstained")
    assert receipt["margin"] < 0


def test_by_the_stage_task_auto_finds_every_shipped_expert_and_leaves_what_is_foreign(client: openai.OpenAI):
    def routed(text: str) -> tuple[str, dict[str, Any]]:
        answer = client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": text}], max_tokens=1, extra_body={"dispatch": ["task"]}
        )
        return answer.model, (answer.model_extra or {})["receipt"]

    shown = [(model.id, (model.model_extra or {})["x_info"].get("card", {})) for model in client.models.list()]
    shipped = [(id_, card) for id_, card in shown if "example_prompt" in card and card["task"] != "dispatch"]
    assert len(shipped) == 3
    for id_, card in shipped:
        model, receipt = routed(card["example_prompt"])
        assert (model, receipt["adapter"], receipt["dispatch"]) == (id_, [[card["digest"], 1.0]], "task")
        assert receipt["margin"] > 0
    model, receipt = routed("Who painted the ceiling of the chapel in Rome?")
    assert (model, receipt["adapter"], receipt["dispatch"]) == (BACKBONE, [], "abstained")


def test_a_data_set_registered_for_an_expert_routes_to_it_and_starts_searches_near_it(served: Served):
    rooms = ("kitchen", "cellar", "attic", "hall", "bathroom", "garage")
    texts = [f"{what} in the {room}" for room in rooms for what in ("It smells of gas", "The lamp went out")]
    examples = [{"text": text, "label": "gas" if "gas" in text else "power"} for text in texts]
    made = served.post("/v1/tasks", {"name": "emergencies", "examples": examples, "expert": "ones"})
    assert (made.status_code, made.json()["status"]) == (200, "done"), made.text
    chat = {"model": "auto", "max_tokens": 1, "dispatch": ["task"]}
    body = {**chat, "messages": [{"role": "user", "content": "It smells of gas in the bedroom"}]}
    answer = served.post("/v1/chat/completions", body).json()
    assert (answer["model"], answer["receipt"]["dispatch"]) == (f"{BACKBONE}:ones", "task"), answer
    job = _ended(served, _search(served, start={"task": "emergencies"}, generations=1))
    assert job["status"] == "done", job
    assert job["start"]["similarities"] == {"ones": pytest.approx(1, abs=1e-3), "noisy": None, "base": None}
    assert job["result"]["start"] == job["start"]
    assert httpx.delete(f"{served.url}/v1/tasks/emergencies", timeout=20).status_code == 200
    assert served.post("/v1/chat/completions", body).json()["receipt"]["dispatch"] == "abstained"


def test_what_auto_routed_above_is_counted_in_its_experts_centroids(served: Served):
    give_up = time.monotonic() + 10
    while not (counted := [one for one in _tasks(served) if one["id"].startswith("auto:")]):
        assert time.monotonic() < give_up
        time.sleep(0.2)
    assert {one["expert"] for task in counted for one in task["centroids"]} == {None}


def _tasks(served: Served) -> list[dict[str, Any]]:
    return served.get("/v1/hidden_states/tasks").json()["data"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"), [c[1:] for c in BAD_BODIES], ids=[c[0] for c in BAD_BODIES]
)
def test_bad_input_is_refused_in_the_envelope_by_its_field(served: Served, path, body, status, param):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(served.url + path, content=content, timeout=20)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    if status == 404:
        assert "known: " in error["message"]


def test_a_large_body_without_a_length_is_refused(served: Served):
    response = httpx.post(f"{served.url}/v1/classify", content=(b"x" * 2**20 for _ in range(12)), timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_an_answer_and_its_row(served: Served, stream: bool):
    body = CHAT | {
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": 2000,
        "stream": stream,
    }
    begin = time.monotonic()
    response = served.post("/v1/chat/completions", body, headers={"x-request-timeout-seconds": "1"})
    assert time.monotonic() - begin < 4
    if stream:
        last = response.text.split("\n\n")[-3]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert _becomes(served, num_live=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_row_along(served: Served, stream: bool):
    body = CHAT | {
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": 2000,
        "stream": stream,
    }
    url = f"{served.url}/v1/chat/completions"
    with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=1) as response:
        for _ in response.iter_lines():
            assert _becomes(served, num_live=1)
            raise httpx.ReadTimeout("enough")
    assert _becomes(served, num_live=0)


def _settles(told: Callable[[], float], wanted: float, timeout_s: float = 15.0) -> bool:
    """Metrics are as old as Ray's report interval."""
    give_up = time.monotonic() + timeout_s
    while told() != pytest.approx(wanted) and time.monotonic() < give_up:
        time.sleep(0.2)
    return told() == pytest.approx(wanted)


def _becomes(served: Served, timeout_s: float = 5.0, **wanted: float) -> bool:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        load = served.get("/v1/status").json()["backbones"][BACKBONE]
        if all(load.get(what) == value for what, value in wanted.items()):
            return True
        time.sleep(0.1)
    return False


def test_many_clients_at_once_get_the_answers_that_each_gets_alone(served: Served):
    bodies = [CLASSIFY | {"inputs": [f"{text}, number {i}"]} for i, (text, _) in enumerate(REVIEWS * 4)]
    alone = [served.post("/v1/classify", body).json()["results"][0] for body in bodies[:6]]

    async def all_at_once() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            chats = [client.post("/v1/chat/completions", json=CHAT) for _ in range(4)]
            answers = await asyncio.gather(*(client.post("/v1/classify", json=body) for body in bodies), *chats)
            assert [answer.status_code for answer in answers] == [200] * len(answers)
            return [answer.json()["results"][0] for answer in answers[:6]]

    together = asyncio.run(all_at_once())
    for one, other in zip(alone, together, strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)


def test_beyond_the_queue_clients_are_told_when_to_come_back(served: Served):
    body, headers = STORY | {"max_tokens": 1000}, {"x-request-timeout-seconds": "8"}

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
            asks = [client.post("/v1/chat/completions", json=body, headers=headers) for _ in range(150)]
            return await asyncio.gather(*asks)

    answers = asyncio.run(flood())
    refused = [one for one in answers if one.status_code == 429]
    assert {one.status_code for one in answers} <= {200, 429, 504}
    assert len(refused) >= 150 - 65_536 // 1000 - 16  # those that wait, and those that decode
    assert all(int(one.headers["retry-after"]) >= 1 and one.json()["error"]["code"] == "overloaded" for one in refused)
    assert _becomes(served, num_live=0, num_waiting=0)


def test_metrics_are_prometheus_text_and_count_what_was_asked(served: Served):
    assert served.post("/v1/classify", {"inputs": []}).status_code == 400
    time.sleep(3)  # the shared graph's metrics_every_s, and more
    text = served.get("/metrics").text
    assert re.search(r'metasepia_requests_total\{route="/v1/classify",status="200",node="[^"]+"\} \d+', text)
    assert re.search(r'metasepia_requests_total\{route="/v1/classify",status="400",node="[^"]+"\} \d+', text)
    assert not re.search(r'status="5(?!04)\d\d"', text), "something above was answered with a 5xx"


def test_after_all_this_every_part_still_answers(served: Served):
    health = served.get("/health")
    assert health.status_code == 200, health.text
    assert set(health.json()["parts"]) == {
        "backbone smollm2-135m",
        "encoder minilm-l6",
        "encoder pixels",
        "reasoning pool",
        "task embedding",
    }


def test_a_gateway_that_is_killed_comes_back_and_until_then_clients_get_the_envelope(served: Served):
    key = {"idempotency-key": "before-and-after-its-death"}
    before = served.post("/v1/contexts", {"examples": EXAMPLES}, headers=key)
    assert before.status_code == 200, before.text
    gateways = [one for one in served.living() if "ServeReplica:metasepia:gateway" in " ".join(one.cmdline())]
    assert len(gateways) == 1
    gateways[0].kill()
    give_up, num_answered = time.monotonic() + 60, 0
    while num_answered < 5:
        assert time.monotonic() < give_up
        response = served.get("/v1/models")
        num_answered = num_answered + 1 if response.status_code == 200 else 0
        if response.status_code != 200:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
        time.sleep(0.2)
    after = served.post("/v1/contexts", {"examples": EXAMPLES}, headers=key)
    assert (after.json(), after.headers["idempotent-replayed"]) == (before.json(), "true")
    other = served.post("/v1/contexts", {"examples": EXAMPLES[:-1]}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def _search(served: Served, **fields: Any) -> dict[str, Any]:
    examples = [
        {"messages": [{"role": "user", "content": f"Say {word}."}], "answer": word} for word in ("no", "yes", "hm")
    ]
    body = {"backbone": BACKBONE, "examples": examples, "shots": 2, "population": 5, "generations": 4, "patience": 4}
    response = served.post("/v1/mixtures/search", {**body, "experts": ["ones", "noisy"], **fields})
    assert response.status_code == 202, response.text
    return response.json()


def _ended(served: Served, job: dict[str, Any]) -> dict[str, Any]:
    give_up = time.monotonic() + 240
    while job.get("status") in ("queued", "running", None):
        assert time.monotonic() < give_up, job
        time.sleep(0.3)
        response = served.get(f"/v1/mixtures/search/{job['id']}")
        job = response.json() if response.status_code == 200 else {"id": job["id"]}
    return job


def test_a_search_goes_on_by_itself_after_its_part_is_killed_and_ends_with_the_same_mixture(served: Served):
    whole = _ended(served, _search(served))
    assert whole["status"] == "done" and whole["generations"] == 4, whole
    model = whole["result"]["model"]
    answer = served.post("/v1/chat/completions", {"model": model, "messages": QUESTION, "max_tokens": 2}).json()
    assert {weight for _, weight in answer["receipt"]["adapter"]} <= set(whole["result"]["weights"].values())
    # Another job that goes the same way: where only likelihood counts, max_tokens changes its digest and nothing else.
    job = _search(served, max_tokens=99)
    give_up = time.monotonic() + 120
    while served.get(f"/v1/mixtures/search/{job['id']}").json()["generations"] < 1:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    parts = [one for one in served.living() if "ServeReplica:metasepia:expert-mixing" in " ".join(one.cmdline())]
    assert len(parts) == 1
    parts[0].kill()
    resumed = _ended(served, job)
    assert resumed["status"] == "done", resumed
    # By its digest. Scores may differ in their last digit: the batches were other ones, on a real model.
    ends = ("mixture", "weights", "stopped", "generations", "evaluations")
    assert [resumed["result"][name] for name in ends] == [whole["result"][name] for name in ends]
    assert served.get(f"/v1/mixtures/search/{job['id']}/picture").text.startswith("<svg")


def test_centroids_that_were_saved_survive_the_death_of_the_part_that_keeps_them(served: Served):
    told = _hidden(served, task="kept", layers=[12, 20])["task"]
    assert told["observed"]
    file, limits = str(served.home / "centroids" / "online.safetensors"), CentroidSettings().limits

    def saved() -> int:
        facts = OnlineCentroids.of_file(file, limits).facts() if Path(file).exists() else ()
        return sum(one.count for one in facts if one.key.task == "kept")

    give_up = time.monotonic() + 20
    while saved() < 2 * len(REVIEWS):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    (part,) = [one for one in served.living() if "ServeReplica:metasepia:expert-mixing" in " ".join(one.cmdline())]
    part.kill()
    give_up = time.monotonic() + 120
    while (response := _asked_anew(served, "kept")) is None:
        assert time.monotonic() < give_up
        time.sleep(0.3)
    assert response["centroids"] == [{"backbone": BACKBONE} | one for one in told["centroids"]]


def _asked_anew(served: Served, task: str) -> dict[str, Any] | None:
    """None while the part is away; a request that came before that was noticed may wait for it."""
    response = httpx.get(f"{served.url}/v1/hidden_states/tasks/{task}", timeout=100)
    return response.json() if response.status_code == 200 else None


def test_a_port_in_use_is_said_in_words_at_start(served: Served):
    done = subprocess.run(
        [sys.executable, "-m", "serve.main"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={"METASEPIA_HTTP__PORT": str(served.port), "PATH": ""},
    )  # fmt: skip
    assert done.returncode != 0
    assert f"setting http.port = {served.port} is not allowed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_ctrl_c_lets_what_is_under_way_finish_and_ends_every_process_within_a_minute(ending: Served):
    served = ending
    assert len(served.living()) > 5
    body = {"model": BACKBONE, "prompt": "Once upon a time", "max_tokens": 48, "stream": True, "temperature": 0}
    began = threading.Event()

    def stream() -> list[str]:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                began.set()
            return lines

    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(stream)
        assert began.wait(30)
        begin = time.monotonic()
        served.stop()
        assert time.monotonic() - begin < 60
    lines = [line for line in under_way.result() if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[-2].removeprefix("data: "))["receipt"]  # it ended whole
    assert served.process.returncode == 0, served.output
    assert served.living() == []
    assert not (served.home / "serve.json").exists()
