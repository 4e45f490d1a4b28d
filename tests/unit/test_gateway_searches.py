"""/v1/mixtures/search over a real registry and real mixing: what is taken, what is refused by its field."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.entries import LOCAL
from serve.experts.search_bodies import SearchRequest
from tests.doors import DIGEST, HTTP, INDEX, OTHER, UP, Bench
from tests.unit.test_prompts import write_byte_tokenizer

PATH = "/v1/mixtures/search"
EXAMPLES = [{"prompt": f"question {i}:", "answer": " yes"} for i in range(6)]
QUICK = {"population": 12, "generations": 4, "shots": 3}


def an_expert(value: float, **changes: Any) -> ExpertVectors:
    z = {UP: np.full(4, value, np.float32)}
    return ExpertVectors(**({"backbone": DIGEST, "factors": INDEX.digest, "z": z} | changes))


MATHS, LAW = an_expert(1.5), an_expert(0.5)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return a_bench(tmp_path)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """For requests that leave nothing behind."""
    return a_bench(tmp_path_factory.mktemp("door"))


def a_bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_experts(tmp_path / "registry")
    made.backbone.likes = (MATHS.digest, 0.75)
    a, b = ({UP: np.ones((1, 4), np.float32)}, {UP: np.ones((6, 1), np.float32)})
    stored: dict[str, tuple[ExpertVectors | LoraAdapter, dict[str, Any]]] = {
        "maths": (MATHS, {}),
        "law": (LAW, {}),
        "foreign": (an_expert(0.5, backbone=OTHER), {}),
        "renormalised": (an_expert(0.5, renormalise=True), {}),
        "lora": (LoraAdapter(backbone=DIGEST, a=a, b=b), {}),
        "router": (an_expert(0.7), {"dispatcher": {"prompt": "{text}", "labels": {"a": "maths"}}}),
    }
    for name, (expert, facts) in stored.items():
        card: dict[str, object] = {"backbone": expert.backbone, **facts}
        made.real.registry.put("expert", expert.to_bytes(), digest=expert.digest, name=name, owner=LOCAL, card=card)
    return made


def _tokens(bench: Bench, text: str) -> tuple[int, ...]:
    return bench.door.prompts["tiny"].continuation(text)


async def searched(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Asks for a search and waits for its end."""
    body = {"backbone": "tiny", "examples": EXAMPLES, "experts": ["maths", "law"], **QUICK, **fields}
    response = await client.post(PATH, json=body)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["location"] == f"{PATH}/{job['id']}"
    while job["status"] in ("queued", "running"):
        await asyncio.sleep(0.01)
        job = (await client.get(f"{PATH}/{job['id']}")).json()
    return job


def test_a_search_ends_as_a_mixture_that_answers_under_its_model_name(bench: Bench) -> None:
    bench.says("x")

    async def talk(client: httpx.AsyncClient) -> None:
        job = await searched(client, seed=3)
        assert job["status"] == "done" and abs(job["result"]["weights"]["maths"] - 0.75) < 0.2
        model = job["result"]["model"]
        listed = (await client.get("/v1/mixtures")).json()["data"]
        assert [one["model"] for one in listed] == [model]
        shown = (await client.get(f"/v1/mixtures/{job['result']['mixture']}")).json()
        assert shown["card"]["search"]["id"] == job["id"]
        assert shown["card"]["search"]["chosen_on"]["examples"] == 3
        chat = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        answer = await client.post("/v1/chat/completions", json=chat)
        adapter = dict(answer.json()["receipt"]["adapter"])
        assert adapter[MATHS.digest] == job["result"]["weights"]["maths"]

    bench.run(talk)


def test_it_is_listed_traced_and_drawn(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        job = await searched(client)
        assert [one["id"] for one in (await client.get(PATH)).json()["data"]] == [job["id"]]
        trace = (await client.get(f"{PATH}/{job['id']}/trace")).json()["data"]
        assert len(trace) == job["generations"] and len(trace[0]["scores"]) == 12
        picture = await client.get(f"{PATH}/{job['id']}/picture")
        assert picture.headers["content-type"] == "image/svg+xml" and picture.text.startswith("<svg")
        assert (await client.delete(f"{PATH}/{job['id']}")).json() == job  # it is finished

    bench.run(talk)


def test_all_experts_of_the_form_that_can_be_mixed_are_candidates_by_default_but_no_dispatcher(bench: Bench) -> None:
    job = bench.run(lambda client: searched(client, experts=None))
    assert job["experts"] == ["base", "law", "maths"]


def test_weights_are_searched_by_layer_where_that_is_asked_for(bench: Bench) -> None:
    job = bench.run(lambda client: searched(client, per_layer=True))
    assert len(job["result"]["weights"]["maths"]) == len(INDEX.lengths)


def test_messages_end_with_the_token_that_ends_an_answer_and_prompts_do_not(bench: Bench) -> None:
    messages = [{"messages": [{"role": "user", "content": str(i)}], "answer": "ok"} for i in range(6)]
    bench.run(lambda client: searched(client, examples=messages))
    assert {row.token_ids[-3:] for row in bench.backbone.rows} == {(*_tokens(bench, "ok"), 257)}
    bench.backbone.rows.clear()
    bench.run(lambda client: searched(client))
    assert {row.token_ids[-4:] for row in bench.backbone.rows} == {_tokens(bench, " yes")}


def test_asked_again_it_is_the_same_search_and_answered_at_once(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        job = await searched(client)
        body = {"model": "tiny", "examples": EXAMPLES, "experts": ["law", "maths"], **QUICK}
        again = await client.post(PATH, json=body)
        assert (again.status_code, again.json()) == (200, job)

    bench.run(talk)


def test_more_searches_than_the_settings_allow_are_refused_for_now(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        bodies = [{"backbone": "tiny", "examples": EXAMPLES, "generations": 1000, "seed": seed} for seed in range(4)]
        responses = [await client.post(PATH, json={"patience": 1000, **body}) for body in bodies]
        assert [one.status_code for one in responses] == [202, 202, 202, 429]
        assert "retry-after" in responses[-1].headers
        for one in responses[:3]:
            cancelled = (await client.delete(f"{PATH}/{one.json()['id']}")).json()
            assert cancelled["status"] == "cancelled"
        assert (await client.post(PATH, json=bodies[3] | {"patience": 1})).status_code == 202

    bench.run(talk)


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"examples": []}, 400, "examples", "there are none"),
        ({"examples": EXAMPLES[:1]}, 400, "examples", "two examples or more"),
        ({"examples": [*EXAMPLES, EXAMPLES[2]]}, 400, "examples[6]", "asks the same as examples[2]"),
        ({"examples": [{"prompt": "a", "answer": " "}, EXAMPLES[0]]}, 400, "examples[0].answer", "empty"),
        ({"examples": [{"answer": "a"}, EXAMPLES[0]]}, 400, "examples[0]", "one of prompt and messages"),
        ({"examples": [{"prompt": "q" * 70, "answer": "a"}, EXAMPLES[0]]}, 400, "examples[0]", "do not fit the window"),
        ({"score": "accuracy", "max_tokens": 60}, 400, "max_tokens", "do not fit the window"),
        ({"experts": ["art"]}, 404, "experts", "no candidate expert named 'art'; known: "),
        ({"experts": []}, 400, "experts", "there are none"),
        ({"experts": ["law"], "base": False}, 400, "experts", "two candidates or more"),
        ({"experts": ["law", "law"]}, 400, "experts", "named twice"),
        ({"experts": ["law", LAW.digest]}, 400, "experts", "the same expert"),
        ({"experts": ["law", "foreign"]}, 400, "experts", "made for backbone ffff"),
        ({"experts": ["law", "renormalised"]}, 400, "experts", "choose one kind"),
        ({"experts": ["law", "lora"], "base": False}, 400, "experts", "choose one kind"),
        ({"backbone": "huge"}, 404, "backbone", "no backbone named 'huge'"),
        ({"backbone": None}, 400, "backbone", "required"),
        ({"method": "grid"}, 400, "method", "cross-entropy"),
        ({"score": "vibes"}, 400, "score", "likelihood"),
        ({"population": 1}, 400, "population", "from 2 to 1024"),
        ({"population": 1024, "shots": 100, "examples": None}, 400, "examples", ""),
        ({"elites": 40}, 400, "elites", "from 1 to 12"),
        ({"generations": 0}, 400, "generations", "from 1 to 1000"),
        ({"shots": 0}, 400, "shots", "greater than or equal to 1"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"smoothing": 1.0}, 400, "smoothing", "from 0 to 0.99"),
        ({"colour": "red"}, 400, "colour", "not known here"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_by_its_field(
    refusing: Bench, fields: dict[str, Any], status: int, param: str, says: str
) -> None:
    body = {"backbone": "tiny", "examples": EXAMPLES, "experts": ["maths", "law"], **QUICK, **fields}
    response = refusing.post(PATH, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert says in error["message"] and "search" not in response.headers.get("location", "")
    assert refusing.get(PATH).json()["data"] == [] and refusing.backbone.rows == []


@pytest.mark.parametrize("path", ["", "/trace", "/picture"])
def test_an_unknown_search_is_a_404_by_its_id(bench: Bench, path: str) -> None:
    response = bench.get(f"{PATH}/search-none{path}")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "id")


def test_a_generation_of_too_many_rows_is_refused() -> None:
    examples = [{"prompt": str(i), "answer": "a"} for i in range(40)]
    body = SearchRequest.of({"backbone": "tiny", "examples": examples, "population": 1024, "shots": 40})
    with pytest.raises(ValueError, match="16384 rows"):
        body.check(HTTP)
