"""Named contexts over the real graph: as models, evicted and had again, and after everything was killed."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.serving import EXAMPLES, INPUTS, REVIEWS, Served

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def environment(tiny_checkpoint: Callable[[str], Path]) -> dict[str, str]:
    """A backbone that starts quickly, and room for few compiled contexts."""
    return {
        "METASEPIA_REASONING__CACHE_MIB": "20",
        "METASEPIA_BACKBONES__0__ID": "tiny",
        "METASEPIA_BACKBONES__0__SOURCE": str(tiny_checkpoint("llama")),
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Served]:
    graph = Served(tmp_path_factory.mktemp("served"), **environment)
    yield graph
    graph.stop()


def make(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post("/v1/contexts", {"examples": EXAMPLES} | body)
    assert response.status_code == 200, response.text
    return response.json()


def ask(served: Served, id_: str, inputs: list[Any], **more: Any) -> Any:
    response = served.post("/v1/classify", {"model": id_, "inputs": inputs} | more)
    assert response.status_code == 200, response.text
    return response.json()


def random_vectors(seed: int, num: int = 12, width: int = 24) -> list[dict[str, Any]]:
    """Two classes, apart along the first axis."""
    vectors = np.random.default_rng(seed).standard_normal((num, width))
    vectors[:, 0] += np.where(np.arange(num) % 2, 3, -3)
    return [{"vector": row.tolist(), "label": "ab"[i % 2]} for i, row in enumerate(vectors.round(4))]


def gauge(served: Served, what: str) -> float:
    return served.get("/v1/status").json()["reasoning"][what]


def test_a_context_is_a_model_that_the_openai_client_lists_and_that_answers_as_its_examples_do(served: Served):
    made = make(served, unlabelled=["The box was empty", "Great"])
    assert made["self_check"]["left_out"] == 6 and not made["cached"]
    assert make(served, examples=EXAMPLES[::-1], unlabelled=["Great", "The box was empty"])["cached"]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
    assert made["id"] in [model.id for model in client.models.list()]
    assert client.models.retrieve(made["id"]).id == made["id"]
    by_name = ask(served, made["id"], INPUTS)
    body = {"examples": EXAMPLES, "unlabelled": ["The box was empty", "Great"], "inputs": INPUTS}
    by_examples = served.post("/v1/classify", body).json()
    for one, other in zip(by_name["results"], by_examples["results"], strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    for receipt in (by_name["receipt"], by_examples["receipt"]):
        assert receipt["context"] == made["id"][4:]
        assert receipt["encoder"] == made["encoder_digest"] and receipt["module"] == made["module_digest"]


def test_an_explanation_names_every_example_and_the_nearest(served: Served):
    made = make(served, seed=1)
    told = served.get(f"/v1/contexts/{made['id']}/examples").json()["data"]
    (result,) = ask(served, made["id"], [REVIEWS[0][0]], explain=True, abstain_below=1.0)["results"]
    assert result["label"] is None
    assert [one["text"] for one in result["explain"]["influence"]] == [one["text"] for one in told]
    assert result["explain"]["nearest"][0]["text"] == REVIEWS[0][0]
    assert result["explain"]["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-4)


def test_contexts_on_a_backbones_states_grow_by_examples(served: Served):
    made = make(served, encoder="tiny", examples=EXAMPLES[:4])
    more = served.post(f"/v1/contexts/{made['id']}/examples", {"examples": EXAMPLES[4:]}).json()
    assert make(served, encoder="tiny")["id"] == more["id"]
    assert len(ask(served, more["id"], INPUTS)["receipt"]["backbone"]) == 64


@pytest.mark.parametrize("protocol", ["vanilla", "loo"])
def test_a_prompted_context_answers_by_its_name_as_its_examples_do(served: Served, protocol: str):
    body = {"examples": [{"text": text[:12], "label": label} for text, label in REVIEWS[:4]], "encoder": "tiny"}
    made = make(served, **body, protocol=protocol)
    by_name = ask(served, made["id"], ["The zip", "Such"])
    by_examples = served.post("/v1/classify", body | {"protocol": protocol, "inputs": ["The zip", "Such"]}).json()
    for one, other in zip(by_name["results"], by_examples["results"], strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    assert by_name["receipt"]["context"] == by_examples["receipt"]["context"] == made["id"][4:]
    assert made["id"] != make(served, **body)["id"]


def test_more_contexts_than_the_memory_holds_are_all_answered_the_same_again(served: Served):
    """The paper's module compiles each to eight MiB; there is room for two."""
    ids = [make(served, examples=random_vectors(seed, num=64), module="tart-paper")["id"] for seed in range(6)]
    query = [{"vector": [2.0] + [0.1] * 23}]

    async def all_at_once() -> list[Any]:
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            asks = [client.post("/v1/classify", json={"model": id_, "inputs": query}) for id_ in ids]
            return [answer.json()["results"][0] for answer in await asyncio.gather(*asks)]

    together = asyncio.run(all_at_once())
    assert 0 < gauge(served, "context_bytes") <= 20 * 2**20
    assert gauge(served, "contexts_fetched") >= len(ids) - 2
    alone = [ask(served, id_, query)["results"][0] for id_ in ids]
    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    assert [one["label"] for one in alone].count("b") > 3


def test_what_was_acknowledged_is_there_after_every_process_was_killed(served: Served, environment: dict[str, str]):
    """Last: it replaces the graph."""
    kept, deleted = make(served, seed=7), make(served, seed=8)
    before = ask(served, kept["id"], INPUTS)["results"]
    assert httpx.delete(f"{served.url}/v1/contexts/{deleted['id']}", timeout=30).status_code == 200
    killed = make(served, seed=9)
    for process in (*served.living(), served.process):
        process.kill()
    served.process.wait(10)
    again = Served(served.home, **environment)
    try:
        after = ask(again, kept["id"], INPUTS)["results"]
        for one, other in zip(before, after, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
        ask(again, killed["id"], INPUTS)
        response = again.post("/v1/classify", {"model": deleted["id"], "inputs": INPUTS})
        assert (response.status_code, response.json()["error"]["code"]) == (410, "deleted")
        assert make(again, seed=7)["cached"]
    finally:
        again.stop()
