"""The door over small fake parts: what is asked of them, what is answered, and that nothing falls through."""

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from actors import meters
from metasepia.dispatch.centroid import TaskCentroid
from metasepia.errors import Overloaded, Unavailable
from metasepia.rows import Executed
from tests.doors import DIGEST, EXPERT, OTHER, Bench
from tests.unit.test_prompts import write_byte_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path))


def _events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_importing_the_gateway_loads_no_torch():
    code = "import sys, serve.gateway; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


def test_a_chat_is_answered_with_text_usage_and_a_receipt_of_what_ran(bench: Bench):
    bench.says("hello €")
    answer = bench.chat(model="tiny:maths", max_tokens=20).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hello €"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["receipt"]["adapter"] == [[EXPERT, 1.0]]
    assert (answer["receipt"]["seed"], answer["model"]) == (7, "tiny:maths")
    assert bench.backbone.rows[0].adapter == ((EXPERT, 1.0),)


def test_the_receipt_tells_what_ran_and_not_what_was_asked(bench: Bench):
    bench.says("x")
    bench.backbone._executed = lambda row: Executed(  # a shard that ignores the adapter
        backbone=DIGEST, factors=None, adapter=(), path="plain", dtype="float32", tp_size=1
    )
    assert bench.chat(model="tiny:maths").json()["receipt"]["adapter"] == []


def test_a_stream_says_the_same_as_the_whole_answer(bench: Bench):
    bench.says("naïve 🦑 end")
    whole = bench.chat().json()
    events = _events(bench.chat(stream=True))
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["choices"][0]["message"]["content"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    digests = ("backbone", "adapter", "path", "seed")
    assert [events[-1]["receipt"][d] for d in digests] == [whole["receipt"][d] for d in digests]
    assert not any("receipt" in event for event in events[:-1])


def test_usage_comes_last_where_the_client_asks_for_it(bench: Bench):
    bench.says("abc")
    last = _events(bench.chat(stream=True, stream_options={"include_usage": True}))[-1]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert last["receipt"]["backbone"] == DIGEST


def test_a_stop_string_ends_the_row_and_is_not_part_of_the_answer(bench: Bench):
    bench.says("one END two")
    answer = bench.chat(stop=["END"]).json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["usage"]["completion_tokens"] == 7
    assert bench.backbone.num_closed == 1


def test_several_choices_are_rows_with_consecutive_seeds(bench: Bench):
    bench.says("ab")
    answer = bench.chat(n=3).json()
    assert [one["message"]["content"] for one in answer["choices"]] == ["ab"] * 3
    assert sorted(row.seed for row in bench.backbone.rows) == [7, 8, 9]
    assert len({row.request_id for row in bench.backbone.rows}) == 3
    events = _events(bench.chat(n=2, stream=True))
    assert sorted(e["choices"][0]["index"] for e in events if e["choices"][0]["finish_reason"]) == [0, 1]


def test_an_error_of_one_choice_ends_all(bench: Bench):
    bench.says("ab")
    bench.backbone.error = Overloaded("the queue", 3.0)
    response = bench.chat(n=3)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert bench.backbone.num_closed == 3


def test_a_refusal_before_the_first_token_is_a_status_also_in_a_stream(bench: Bench):
    bench.says("ab")
    bench.backbone.error = Unavailable("backbone tiny", 5.0)
    response = bench.chat(stream=True)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


def test_an_error_after_the_first_token_is_an_event(bench: Bench):
    bench.says("abc")
    bench.backbone.error, bench.backbone.error_after = Unavailable("backbone tiny", 5.0), 2
    response = bench.chat(stream=True)
    assert response.status_code == 200
    assert _events(response)[-1]["error"]["code"] == "unavailable"


def test_a_deadline_closes_the_row_and_is_a_504(bench: Bench):
    bench.backbone.hang = True
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    response = bench.post("/v1/chat/completions", body, **{"x-request-timeout-seconds": "0.05"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert bench.backbone.num_closed == 1


def test_a_client_that_leaves_closes_its_row(bench: Bench):
    bench.backbone.hang = True

    async def leave(client: httpx.AsyncClient) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.post("/v1/chat/completions", json=body)

    bench.run(leave)
    assert bench.backbone.num_closed == 1


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", "90000"])
def test_a_timeout_that_is_none_is_refused(bench: Bench, timeout: str):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    response = bench.post("/v1/chat/completions", body, **{"x-request-timeout-seconds": timeout})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-seconds")


@pytest.mark.parametrize("model", ["nobody", "tiny:nobody", "tiny:law", "nobody:maths", f"tiny:mix@{OTHER}", "auto"])
def test_an_unknown_model_is_a_404_that_lists_the_known_and_runs_nothing(bench: Bench, model: str):
    bench.says("x")
    response = bench.chat(model=model)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert "known: tiny, tiny:maths, tiny:mix@aaa" in response.json()["error"]["message"]
    assert bench.backbone.rows == []


def test_a_registered_mixture_is_a_row_with_its_weights(bench: Bench):
    bench.says("x")
    assert bench.chat(model="tiny:mix@" + "a" * 64).status_code == 200
    assert bench.backbone.rows[0].adapter == ((EXPERT, 0.25), (OTHER, 0.75))


def _centroid(threshold: float) -> dict[str, object]:
    """Prompts whose states grow along the one direction that the fake backbone's have."""
    ones = np.ones(4, np.float32)
    return TaskCentroid(
        backbone=DIGEST, layer=-1, pooling="mean", centre=0 * ones, centroid=ones, threshold=threshold
    ).to_card()


def test_auto_is_unknown_until_an_expert_has_a_centroid(bench: Bench):
    assert bench.chat(model="auto").status_code == 404
    assert "auto" not in [one["id"] for one in bench.get("/v1/models").json()["data"]]
    bench.catalogue.artefacts[0].card["dispatch"] = _centroid(0.5)
    bench.catalogue.artefacts = (bench.catalogue.artefacts[0],)
    listed = bench.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["tiny", "minilm-fake", "tiny:maths", "auto"]
    assert "dispatch" not in listed[2]["x_info"]["card"]


@pytest.mark.parametrize(
    ("threshold", "adapter", "model", "stage"),
    [(0.5, [[EXPERT, 1.0]], "tiny:maths", "centroid"), (1.5, [], "tiny", "abstained")],
)
def test_auto_runs_the_nearest_expert_or_the_base_and_says_so(bench: Bench, threshold, adapter, model, stage):
    bench.says("x")
    bench.catalogue.artefacts[0].card["dispatch"] = _centroid(threshold)
    answer = bench.chat(model="auto").json()
    assert (answer["receipt"]["adapter"], answer["model"]) == (adapter, model)
    assert (answer["receipt"]["dispatch"], round(answer["receipt"]["margin"], 4)) == (stage, round(1 - threshold, 4))


def test_a_stage_that_is_not_served_is_refused_and_stages_are_for_auto_only(bench: Bench):
    bench.catalogue.artefacts[0].card["dispatch"] = _centroid(0.5)
    refused = bench.chat(model="auto", dispatch=["tarot"])
    assert refused.status_code == 400 and "'task', 'classifier' or 'prompt'" in refused.json()["error"]["message"]
    assert bench.chat(model="tiny", dispatch=["centroid"]).json()["error"]["param"] == "dispatch"


def test_a_mixture_is_registered_and_answers_by_the_name_given_back(bench: Bench):
    bench.says("x")
    made = bench.post("/v1/mixtures", {"backbone": "tiny", "weights": {"maths": 1.0}}).json()
    assert bench.chat(model=made["model"]).json()["receipt"]["adapter"] == [[EXPERT, 0.25], [OTHER, 0.75]]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"backbone": "no"}, 404, "backbone"),
        ({"weights": {"law": 1.0}}, 404, "weights"),
        ({"weights": {"maths": 1.5}}, 400, "weights.maths"),
        ({"weights": {}}, 400, "weights"),
    ],
    ids=str,
)
def test_a_mixture_that_cannot_be_is_refused_by_its_field(bench: Bench, change, status, param):
    response = bench.post("/v1/mixtures", {"backbone": "tiny", "weights": {"maths": 1.0}} | change)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_prompt_beyond_the_window_names_the_messages_and_an_answer_beyond_it_its_limit(bench: Bench):
    bench.says("x")
    long = bench.chat(messages=[{"role": "user", "content": "y" * 64}])
    assert (long.status_code, long.json()["error"]["param"]) == (400, "messages")
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert bench.chat(max_tokens=60).json()["error"]["param"] == "max_tokens"
    assert bench.chat(max_completion_tokens=60).json()["error"]["param"] == "max_completion_tokens"


def test_a_plain_completion_continues_its_prompt(bench: Bench):
    bench.says("!")
    answer = bench.post("/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 4}).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "!")
    assert bench.backbone.rows[0].token_ids == bench.door.prompts["tiny"].plain("hi")


def test_a_classification_answers_each_input_with_probabilities_and_a_receipt(bench: Bench):
    body = {
        "examples": [{"text": "a", "label": "short"}, {"text": "a" * 40, "label": "long"}],
        "inputs": ["b" * 39, "bb"],
    }
    answer = bench.post("/v1/classify", body).json()
    assert [one["label"] for one in answer["results"]] == ["long", "short"]
    assert answer["results"][0]["probabilities"] == {"long": 1.0, "short": 0.0}
    assert answer["model"] == "minilm-fake+nearest"
    receipt = answer["receipt"]
    assert (receipt["encoder"], receipt["module"]) == (OTHER, "d" * 64)


def test_a_backbone_classifies_by_its_hidden_states(bench: Bench):
    body = {"examples": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "inputs": ["c"], "encoder": "tiny"}
    receipt = bench.post("/v1/classify", body).json()["receipt"]
    assert (receipt["backbone"], receipt["encoder"], receipt["path"]) == (DIGEST, None, "plain")


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [("inputs", ["w " * 9], "inputs[0]"), ("examples", [{"text": "w " * 9, "label": "x"}], "examples[1].text")],
)
def test_a_text_beyond_the_encoders_window_is_named_as_the_client_sent_it(bench: Bench, field, value, param):
    body = {"examples": [{"text": "a", "label": "y"}], "inputs": ["c"]}
    body[field] = (body[field] if field == "examples" else []) + value
    if field == "inputs":
        body["examples"].append({"text": "b", "label": "x"})
    response = bench.post("/v1/classify", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_unknown_encoder_is_a_404_that_lists_encoders_and_backbones(bench: Bench):
    body = {"examples": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "inputs": ["c"], "encoder": "no"}
    response = bench.post("/v1/classify", body)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "encoder")
    assert "known: minilm-fake, tiny" in response.json()["error"]["message"]


def test_embeddings_are_the_same_in_floats_and_base64(bench: Bench):
    body = {"model": "minilm-fake", "input": ["a", "bbb"]}
    floats = bench.post("/v1/embeddings", body).json()
    coded = bench.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()
    decoded = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4").tolist() for one in coded["data"]]
    assert decoded == [one["embedding"] for one in floats["data"]]
    assert floats["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


def test_backbone_embeddings_have_unit_norm_and_take_token_ids(bench: Bench):
    answer = bench.post("/v1/embeddings", {"model": "tiny", "input": [[1, 2, 3], "ab"]}).json()
    assert [np.linalg.norm(one["embedding"]) for one in answer["data"]] == pytest.approx([1, 1])
    assert answer["usage"]["prompt_tokens"] == 5
    single = bench.post("/v1/embeddings", {"model": "tiny", "input": [1, 258]})
    assert (single.status_code, single.json()["error"]["param"]) == (400, "input")


def test_models_are_listed_with_their_parents_and_each_can_be_had(bench: Bench):
    listed = {one["id"]: one for one in bench.get("/v1/models").json()["data"]}
    assert list(listed) == ["tiny", "minilm-fake", "tiny:maths", "tiny:mix@" + "a" * 64]
    assert listed["tiny:maths"]["parent"] == "tiny"
    for id_, one in listed.items():
        assert bench.get(f"/v1/models/{id_}").json() == one
    assert bench.get("/v1/models/nobody").status_code == 404


def test_health_is_503_with_the_reason_until_every_part_answers(bench: Bench):
    bench.says("x")
    bench.backbone.error = Unavailable("backbone tiny", 5.0)
    sick = bench.get("/health")
    assert sick.status_code == 503
    assert "backbone tiny is not available" in sick.json()["error"]["message"]
    bench.backbone.error = None
    assert bench.get("/health").status_code == 200


def test_a_full_queue_is_not_ill_health_once_the_part_has_answered(bench: Bench):
    bench.says("x")
    bench.backbone.error = Overloaded("the queue", 3.0)
    assert bench.get("/health").status_code == 503
    bench.backbone.error = None
    assert bench.get("/health").status_code == 200
    bench.backbone.error = Overloaded("the queue", 3.0)
    bench.door.health_of_parts._last = None  # as if time had passed
    assert bench.get("/health").status_code == 200


def test_health_is_bounded_in_time(bench: Bench):
    bench.backbone.hang = True
    bench.door.health_of_parts._timeout_s = 0.05
    assert "no answer within 0.05 s" in bench.get("/health").json()["error"]["message"]


def test_metrics_count_requests_by_route_and_status(bench: Bench):
    for one in (meters.REQUESTS, meters.FAILURES, meters.TOKENS_DONE):
        one.clear()  # the process's, of other tests too
    bench.says("x")
    bench.chat()
    bench.chat(model="nobody")
    bench.get("/nowhere")
    text = bench.get("/metrics").text
    assert 'metasepia_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'metasepia_requests_total{route="/v1/chat/completions",status="404"} 1.0' in text
    assert 'metasepia_requests_total{route="unmatched",status="404"} 1.0' in text
    assert 'metasepia_request_failures_total{reason="model_not_found",route="/v1/chat/completions"} 1.0' in text
    assert 'metasepia_request_failures_total{reason="not_found",route="unmatched"} 1.0' in text
    assert 'metasepia_tokens_total{kind="answer"} 1.0' in text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/classify", 405)])
def test_a_path_that_is_not_served_is_refused_in_the_envelope(bench: Bench, method, path, status):
    response = bench.run(lambda client: client.request(method, path))
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_beyond_the_limit_is_a_413_that_names_it(bench: Bench):
    response = bench.run(lambda client: client.post("/v1/classify", content=b" " * 2**20))
    assert (response.status_code, response.json()["error"]["param"]) == (413, "body")
