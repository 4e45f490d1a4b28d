"""/v1/tasks over a real registry and the real part that embeds tasks: what is one task, what is near, what survives."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from actors import task_jobs
from metasepia.embedding import probes
from metasepia.errors import Overloaded
from metasepia.registry.entries import LOCAL
from serve.task_replica import TaskEmbeddingPart
from serve.tasks.routes import TaskRoutes
from tests.doors import DIGEST, Bench
from tests.tasks import PROBES, SETTINGS, TopicModel, WordEncoder, a_task_bench, data_set, topic_of

PATH = "/v1/tasks"
PROMPT = {"template": "{text}?", "labels": {"animal": "yes", "tool": "no"}}


@pytest.fixture(autouse=True)
def _own_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "shipped", lambda: PROBES)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return a_task_bench(tmp_path)


async def made(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """A task, once it is embedded or has failed."""
    response = await client.post(PATH, json=body)
    assert response.status_code in (200, 202), response.text
    task: dict[str, Any] = response.json()
    assert response.headers["location"] == f"{PATH}/{task['id']}"
    for _ in range(2000):
        if task["status"] not in ("queued", "running"):
            return task
        await asyncio.sleep(0.005)
        task = (await client.get(f"{PATH}/{task['id']}")).json()
    raise AssertionError(f"it is still {task['status']}")


async def cosines(client: httpx.AsyncClient, *tasks: Any) -> list[list[float]]:
    response = await client.post(f"{PATH}/compare", json={"tasks": list(tasks)})
    assert response.status_code == 200, response.text
    return response.json()["cosines"]


def test_one_task_is_near_itself_whatever_its_texts_label_names_and_teller(bench: Bench) -> None:
    """By topic: two halves of a data set, with other label names the other way about, and a prompt on a model."""

    async def talk(client: httpx.AsyncClient) -> None:
        await made(client, name="first", examples=data_set("topic"))
        await made(client, name="second", examples=data_set("topic", names=("x", "1"), seed=5))
        await made(client, name="tones", examples=data_set("tone"))
        prompt = await made(client, name="prompt", model="tiny", prompt=PROMPT)
        assert (prompt["status"], prompt["kind"], prompt["num_texts"]) == ("done", "prompt", len(PROBES))
        table = np.array(await cosines(client, "first", "second", "prompt", "tones"))
        np.testing.assert_allclose(table, table.T, atol=1e-6)
        np.testing.assert_allclose(np.diag(table), 1, atol=1e-6)
        assert table[:3, :3].min() > 0.6 and table[3, :3].max() < 0.3, table
        near = (await client.get(f"{PATH}/first/nearest", params={"k": 2})).json()
        assert {one["id"] for one in near["data"]} == {"second", "prompt"} and near["compared"] == 3
        assert near["data"][0]["cosine"] == max(table[0, 1:3]) >= near["data"][1]["cosine"]
        only = (await client.get(f"{PATH}/first/nearest?kind=data_set")).json()
        assert [one["id"] for one in only["data"]] == ["second", "tones"]

    bench.run(talk)


def test_the_same_request_is_the_same_task_and_computed_once(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        first = await made(client, examples=data_set("topic"))
        assert first["id"].startswith("task-") and not first["cached"]
        asked = len(bench.encoder.texts)
        again = await made(client, examples=data_set("topic"))
        assert again["cached"] and len(bench.encoder.texts) == asked
        assert {**again, "cached": False, "receipt": None} == {**first, "receipt": None}
        other = await made(client, examples=data_set("topic"), seed=1)
        assert other["id"] != first["id"]

    bench.run(talk)


def test_a_task_is_on_disk_before_it_is_acknowledged(bench: Bench) -> None:
    task = bench.run(lambda client: made(client, examples=data_set("tone")))
    stored = bench.real.registry.resolve("embedding", task["id"], LOCAL)
    assert stored.digest == task["digest"] == task["receipt"]["embedding"]
    assert bench.real.registry.get(stored.digest)


def test_a_name_of_another_task_is_taken_until_it_is_deleted(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        await made(client, name="mine", examples=data_set("tone"))
        taken = await client.post(PATH, json={"name": "mine", "examples": data_set("topic")})
        assert (taken.status_code, taken.json()["error"]["param"]) == (409, "name")
        assert "delete it first, or choose another name" in taken.json()["error"]["message"]
        gone = await client.delete(f"{PATH}/mine")
        assert gone.json()["deleted"] and (await client.delete(f"{PATH}/mine")).json() == gone.json()
        shown = await client.get(f"{PATH}/mine")
        assert (shown.status_code, shown.json()["error"]["param"]) == (410, "id")
        assert (await made(client, name="mine", examples=data_set("topic")))["status"] == "done"

    bench.run(talk)


def test_tasks_are_listed_by_pages_and_kinds_and_their_vectors_are_the_same_in_both_forms(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        for seed in range(3):
            await made(client, name=f"set-{seed}", examples=data_set("tone", seed=seed))
        await made(client, name="own", answers=own_answers())
        first = (await client.get(PATH, params={"limit": 2, "kind": "data_set"})).json()
        assert [one["id"] for one in first["data"]] == ["set-0", "set-1"] and first["has_more"]
        rest = (await client.get(PATH, params={"limit": 2, "kind": "data_set", "after": first["last_id"]})).json()
        assert [one["id"] for one in rest["data"]] == ["set-2"] and not rest["has_more"]
        vectors = (await client.get(PATH, params={"include": "vector"})).json()["data"]
        streamed = await client.get(PATH, headers={"accept": "application/vnd.apache.arrow.stream"})
        reader = pa.ipc.open_stream(io.BytesIO(streamed.content))
        about, table = json.loads(reader.schema.metadata[b"metasepia"]), reader.read_all().to_pydict()
        assert table["id"] == [one["id"] for one in vectors] == ["own", "set-0", "set-1", "set-2"]
        np.testing.assert_array_equal(table["vector"], [one["vector"] for one in vectors])
        np.testing.assert_allclose(np.linalg.norm(table["vector"], axis=1), 1, atol=1e-5)
        assert about["spaces"][table["space"][0]] == {k: v for k, v in vectors[0]["space"].items() if k != "digest"}
        one = (await client.get(f"{PATH}/own?include=vector")).json()
        np.testing.assert_allclose(await cosines(client, one, "own"), 1, atol=1e-6)  # inline, as it was answered

    bench.run(talk)


def own_answers(**changes: Any) -> dict[str, Any]:
    rows = [[0.9, 0.1] if topic_of(text) == "animal" else [0.2, 0.8] for text in PROBES.texts]
    return {"probes": PROBES.digest, "labels": ["x", "a"], "probabilities": rows} | changes


def test_the_answers_of_a_clients_own_model_lie_with_the_task_that_it_does(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        told = (await client.get(f"{PATH}/probes")).json()
        assert (tuple(told["texts"]), told["digest"]) == (PROBES.texts, PROBES.digest)
        task = await made(client, name="own", answers=own_answers())
        assert task["kind"] == "model" and task["noise"] is None
        sampled = own_answers(standard_error=[[0.05, 0.05]] * len(PROBES))
        assert (await made(client, name="sampled", answers=sampled))["noise"] > 0
        replies = ["about animals" if topic_of(text) == "animal" else "a thing to work with" for text in PROBES.texts]
        await made(client, name="open", answers={"probes": PROBES.digest, "replies": replies})
        await made(client, name="set", examples=data_set("topic"))
        assert min((await cosines(client, "own", "set", "open", "sampled"))[0]) > 0.6

    bench.run(talk)


def test_a_context_is_a_task_by_what_it_answers(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        context = (await client.post("/v1/contexts", json={"examples": data_set("topic")})).json()
        task = await made(client, name="context", model=context["id"])
        assert (task["kind"], task["model"]) == ("model", context["id"])
        assert task["receipt"]["context"] == context["id"].removeprefix("ctx-") and task["receipt"]["module"]
        await made(client, name="set", examples=data_set("topic", seed=9))
        assert (await cosines(client, "context", "set"))[0][1] > 0.6

    bench.run(talk)


def test_the_receipt_says_what_was_run_and_in_which_space(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        task = await made(client, model="tiny:maths", prompt=PROMPT)
        receipt, maths = task["receipt"], bench.real.registry.resolve("expert", "maths", LOCAL).digest
        assert (receipt["backbone"], receipt["adapter"]) == (DIGEST, [[maths, 1.0]])
        assert (receipt["encoder"], receipt["probes"]) == (bench.encoder.digest, PROBES.digest)
        assert (receipt["method"], receipt["space"]) == ("agreement", task["space"]["digest"])
        assert task["expert"] == "maths"  # what its answers are like, its requests are for
        base = await made(client, model="tiny", prompt=PROMPT)
        assert base["expert"] is None and (await cosines(client, task["id"], base["id"]))[0][1] > 0.9

    bench.run(talk)


def test_a_data_set_may_stand_for_an_experts_requests_and_its_card_says_where_its_texts_lie(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        task = await made(client, name="set", examples=data_set("tone"), expert="maths")
        card = bench.real.registry.resolve("embedding", "set", LOCAL).card
        assert task["expert"] == card["expert"] == "maths" and card["text_region"]
        assert "text_region" not in task
        await made(client, name="other", examples=data_set("topic"))
        near = await bench.task_part.nearest(LOCAL, "other", k=5, with_expert=True)
        assert [one["id"] for one in near] == ["set"]
        same = await bench.task_part.nearest(LOCAL, "set", k=5, with_expert=True)
        assert [(one["id"], one["expert"]) for one in same] == [("set", "maths")] and same[0]["cosine"] > 0.99999
        again = await made(client, name="other", examples=data_set("topic"), expert="maths")
        assert again["cached"] and again["expert"] == "maths"
        assert len(await bench.task_part.nearest(LOCAL, "other", k=5, with_expert=True)) == 2

    bench.run(talk)


@pytest.mark.parametrize("dies_after", [0, 1, 2])
def test_a_job_killed_anywhere_goes_on_by_itself_to_the_same_vector_and_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    monkeypatch.setattr(task_jobs, "TEXTS_A_CHECKPOINT", 8)
    body = {"name": "prompt", "model": "tiny", "prompt": PROMPT}

    async def whole(client: httpx.AsyncClient) -> dict[str, Any]:
        await made(client, **body)
        return (await client.get(f"{PATH}/prompt?include=vector")).json()

    wanted = a_task_bench(tmp_path / "whole").run(whole)
    bench = a_task_bench(tmp_path / "killed")
    model = bench.backbone
    assert isinstance(model, TopicModel)
    asked, score, open_ = list[str](), model.score, asyncio.Event

    async def counted(rows: Any) -> Any:
        if len(asked) >= 8 * dies_after:
            await open_().wait()  # for ever: its process ends here
        answer = await score(rows)
        asked.extend(sorted({model.text(row.token_ids[: row.score_from]) for row in rows}))
        return answer

    async def begin(client: httpx.AsyncClient) -> None:
        response = await client.post(PATH, json=body)
        assert (response.status_code, response.json()["progress"]) == (202, {"answered": 0, "of": len(PROBES)})
        while (await client.get(f"{PATH}/prompt")).json()["progress"]["answered"] < 8 * dies_after:
            await asyncio.sleep(0.005)
        early = await client.get(f"{PATH}/prompt/nearest")
        assert (early.status_code, early.json()["error"]["param"]) == (400, "id")

    bench.backbone.score = counted
    bench.run(begin)  # its tasks end with the event loop, wherever they are
    bench.backbone.score, before = score, len(bench.backbone.rows)
    bench.task_part = TaskEmbeddingPart(SETTINGS, bench.real, bench.encoder, lambda: None, [bench.backbone])  # pyright: ignore[reportArgumentType]

    async def live_again(client: httpx.AsyncClient) -> dict[str, Any]:
        assert await bench.task_part.recover() == 1
        while bench.task_part.num_unfinished:
            await asyncio.sleep(0.005)
        return (await client.get(f"{PATH}/prompt?include=vector")).json()

    again = bench.run(live_again)
    assert again["status"] == "done" and again["vector"] == wanted["vector"]
    assert len(bench.backbone.rows) - before == 2 * (len(PROBES) - 8 * dies_after)  # of two labels


def test_a_model_that_fails_ends_the_job_in_words_and_asking_again_goes_on(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        bench.backbone.error = ValueError("boom")
        task = await made(client, name="prompt", model="tiny", prompt=PROMPT)
        assert task["status"] == "failed" and "ValueError" in task["error"]
        refused = await client.post(f"{PATH}/compare", json={"tasks": ["prompt", "prompt"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tasks[0]")
        bench.backbone.error = None
        assert (await made(client, name="prompt", model="tiny", prompt=PROMPT))["status"] == "done"

    bench.run(talk)


def test_of_two_tasks_that_ask_for_one_name_at_the_same_time_one_is_told(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        same = {"name": "prompt", "model": "tiny", "prompt": PROMPT}
        other = same | {"prompt": PROMPT | {"template": "{text}, then?"}}
        before = len(bench.backbone.rows)
        responses = await asyncio.gather(*(client.post(PATH, json=body) for body in (same, other, same)))
        statuses = [one.status_code for one in responses]
        assert sorted(statuses) in ([202, 202, 409], [202, 409, 409]), [one.text for one in responses]
        jobs = {one.json()["receipt"]["task"] for one in responses if one.status_code == 202}
        task = await made(client, **(other if statuses[1] == 202 else same))
        assert task["status"] == "done" and jobs == {(await client.get(f"{PATH}/prompt")).json()["receipt"]["task"]}
        assert len(bench.backbone.rows) - before == 2 * len(PROBES)  # of two labels, each asked once

    bench.run(talk)


def test_a_job_that_nobody_runs_goes_on_when_it_is_asked_for_again(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        score, gate = bench.backbone.score, asyncio.Event()

        async def wait(rows: Any) -> Any:
            await gate.wait()
            return await score(rows)

        bench.backbone.score = wait
        body = {"name": "prompt", "model": "tiny", "prompt": PROMPT}
        assert (await client.post(PATH, json=body)).status_code == 202
        await bench.task_part.cancel(LOCAL, "prompt")  # a deletion, the rest of which never comes
        gate.set()
        assert (await made(client, **body))["status"] == "done"

    bench.run(talk)


def test_a_deleted_job_ends_and_its_name_is_free(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        bench.backbone.hang = True
        gate = asyncio.Event()

        async def wait(rows: Any) -> Any:
            await gate.wait()

        bench.backbone.score = wait
        response = await client.post(PATH, json={"name": "slow", "model": "tiny", "prompt": PROMPT})
        assert response.status_code == 202
        await asyncio.sleep(0.02)
        assert (await client.delete(f"{PATH}/slow")).status_code == 200
        assert bench.task_part.num_unfinished == 0
        assert (await client.get(f"{PATH}/slow")).status_code == 410

    bench.run(talk)


def test_more_jobs_than_the_settings_allow_are_refused_for_now(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        gate = asyncio.Event()
        score = bench.backbone.score

        async def wait(rows: Any) -> Any:
            await gate.wait()
            return await score(rows)

        bench.backbone.score = wait
        bodies = [{"name": f"job-{i}", "model": "tiny", "prompt": PROMPT} for i in range(4)]
        responses = [await client.post(PATH, json=body) for body in bodies]
        assert [one.status_code for one in responses] == [202, 202, 202, 429]
        assert "retry-after" in responses[-1].headers
        gate.set()
        assert [(await made(client, **body))["status"] for body in bodies] == ["done"] * 4

    bench.run(talk)


def test_texts_longer_than_the_surrogates_window_are_refused_by_their_place_or_left_out(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        examples = data_set("topic")
        long = [{"text": "bad saw " * 9, "label": "b"}]
        refused = await client.post(PATH, json={"examples": [*examples[:7], *long, *examples[7:]]})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == "examples[7].text" and "long_texts" in error["message"]
        body = {"examples": [*examples[:7], *long, *examples[7:], *long], "long_texts": "leave_out"}
        task = await made(client, **body)
        assert task["num_texts"] == len(examples) and task["source"]["left_out"] == 2
        plain = await made(client, examples=examples)
        assert plain["id"] == task["id"]  # what was embedded is the same

    bench.run(talk)


def test_an_encoder_that_stays_full_is_waited_for_and_then_refused_for_now(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        assert isinstance(bench.encoder, WordEncoder)
        bench.encoder.error = Overloaded("the queue of encoder minilm-fake", 1.0)
        headers = {"x-request-timeout-seconds": "1.8"}
        response = await client.post(PATH, json={"examples": EXAMPLES}, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded"), response.text
        assert response.headers["retry-after"] == "1"
        assert (await client.get(PATH)).json()["data"] == []
        bench.encoder.error = None
        assert (await client.post(PATH, json={"examples": EXAMPLES})).status_code == 200

    bench.run(talk)


def test_spaces_never_mix(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        await made(client, name="set", examples=data_set("tone"))
        one = (await client.get(f"{PATH}/set?include=vector")).json()
        other = {**one, "space": {**one["space"], "probes": "0" * 64}}
        refused = await client.post(f"{PATH}/compare", json={"tasks": ["set", other]})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "different_spaces", "tasks")
        assert one["space"]["digest"] in error["message"] and "they differ in probes" in error["message"]
        assert "embed one of the two tasks again" in error["message"]

    bench.run(talk)


def test_the_map_is_a_page_that_names_every_task(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        assert (await client.get(f"{PATH}/map")).json()["error"]["param"] == "method"
        for seed in range(3):
            await made(client, name=f"set-{seed}", examples=data_set("tone", seed=seed))
        page = await client.get(f"{PATH}/map")
        assert page.headers["content-type"].startswith("text/html")
        assert all(f"set-{seed}" in page.text for seed in range(3))
        assert "Left out" not in page.text

    bench.run(talk)


def test_the_map_says_what_it_leaves_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TaskRoutes._within_memory
    monkeypatch.setattr(TaskRoutes, "_within_memory", lambda self, done: kept(self, done)[:2])

    async def talk(client: httpx.AsyncClient) -> None:
        for seed in range(3):
            await made(client, name=f"set-{seed}", examples=data_set("tone", seed=seed))
        assert "Left out: 1 beyond http.max_states_mib of vectors." in (await client.get(f"{PATH}/map")).text

    bench.run(talk)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "shipped", lambda: PROBES)
        return a_task_bench(tmp_path_factory.mktemp("door"))


EXAMPLES = data_set("tone", num=6)
MODEL = {"examples": None, "model": "tiny", "prompt": PROMPT}
OWN = {"examples": None, "answers": own_answers()}
NAN = [[float("nan"), 0.5]] * len(PROBES)


def own(**changes: Any) -> dict[str, Any]:
    return {"examples": None, "answers": own_answers(**changes)}


def prompt(**changes: Any) -> dict[str, Any]:
    return {**MODEL, "prompt": {**PROMPT, **changes}}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"examples": None}, 400, "examples", "none is given"),
        ({"examples": []}, 400, "examples", "there are none"),
        ({"examples": [{"text": "a", "label": "x"}] * 3}, 400, "examples", "every example carries the label 'x'"),
        ({"examples": [{"text": " ", "label": "x"}]}, 400, "examples[0].text", "empty"),
        ({"examples": [{"vector": [1.0], "label": "x"}, {"vector": [2.0], "label": "y"}]}, 400, None, "as vector"),
        ({"examples": EXAMPLES * 50}, 400, "examples", "300 are too many; this server takes 256"),
        ({"answers": own_answers()}, 400, "answers", "examples and answers are given"),
        ({"name": "task-1"}, 400, "name", "reserved"),
        ({"name": "A b"}, 400, "name", "not allowed"),
        ({"name": "probes"}, 400, "name", "reserved"),
        ({"method": "magic"}, 400, "method", "agreement"),
        ({"expert": "law"}, 404, "expert", "no task's expert named 'law'; known: maths"),
        ({"seed": -1}, 400, "seed", "greater"),
        ({"colour": "red"}, 400, "colour", "not known here"),
        ({"long_texts": "cut"}, 400, "long_texts", "refuse"),
        ({"prompt": PROMPT}, 400, "prompt", "is for a model"),
        ({**MODEL, "prompt": None}, 400, "prompt", "required"),
        ({**MODEL, "model": "huge"}, 404, "model", "no model named 'huge'; known: tiny"),
        ({**MODEL, "model": "tiny:law"}, 404, "model", "tiny:maths"),
        ({**MODEL, "model": "auto"}, 400, None, "name the model whose answers are meant"),
        ({**MODEL, "model": "minilm-fake"}, 400, None, "encoder"),
        ({**MODEL, "model": "ctx-" + "0" * 64}, 400, "prompt", "asked without one"),
        ({**MODEL, "model": "ctx-" + "0" * 64, "prompt": None}, 404, "model", "no context named"),
        ({**MODEL, "expert": "maths"}, 400, "expert", "is for a data set"),
        ({**MODEL, "background": False}, 400, "background", "in the background"),
        (prompt(template="no place"), 400, "prompt.template", "exactly once"),
        (prompt(template="{text} {text}"), 400, "prompt.template", "exactly once"),
        (prompt(template="{text}" + "?" * 80), 400, "prompt.template", "do not fit the window"),
        (prompt(labels={"one": "yes"}), 400, "prompt.labels", "two labels or more"),
        (prompt(labels=["a", "a"]), 400, "prompt.labels", "there twice"),
        (prompt(labels={"a": "Yes", "b": "yes "}), 400, "prompt.labels", "the same verbaliser"),
        (prompt(max_tokens=0), 400, "prompt.max_tokens", "greater"),
        (prompt(max_tokens=8), 400, "prompt.max_tokens", "is for open replies"),
        (own(probes="0" * 64), 400, "answers.probes", PROBES.digest),
        (own(probabilities=None), 400, "answers", "one of probabilities (with labels) and replies"),
        (own(labels=None), 400, "answers.labels", "required"),
        (own(labels=["a", "a"]), 400, "answers.labels", "there twice"),
        (own(probabilities=[[0.5, 0.5]]), 400, "answers.probabilities", f"1 of them, and {len(PROBES)} probe texts"),
        (own(probabilities=[[0.5]] * len(PROBES)), 400, "answers.probabilities[0]", "1 numbers for 2 labels"),
        (own(probabilities=[[0.9, 0.9]] * len(PROBES)), 400, "answers.probabilities[0]", "sum to 1"),
        (own(probabilities=[[1.5, -0.5]] * len(PROBES)), 400, "answers.probabilities[0]", "negative"),
        (own(probabilities=[[0.5, 0.5]] * len(PROBES)), 400, "answers", "every text alike"),
        (own(standard_error=[[0.1]] * len(PROBES)), 400, "answers.standard_error[0]", "1 numbers for 2 labels"),
        (own(labels=None, probabilities=None, replies=["a"]), 400, "answers.replies", "1 of them"),
        (own(labels=None, probabilities=None, replies=["a"] * len(PROBES)), 400, "answers", "every text alike"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_refused_by_its_field(
    refusing: Bench, fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    response = refusing.post(PATH, {"examples": EXAMPLES, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert says in error["message"], error
    assert refusing.get(PATH).json()["data"] == []


def test_numbers_that_are_none_and_bodies_that_are_too_long_are_refused(refusing: Bench) -> None:
    body = json.dumps({"answers": own_answers(probabilities=NAN)})
    response = refusing.run(lambda client: client.post(PATH, content=body))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value"), response.text
    million = b'{"examples": [' + b'{"text": "a b", "label": "c"},' * 10_000 + b"{}]}"
    response = refusing.run(lambda client: client.post(PATH, content=million))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("tasks", "status", "param"),
    [
        (["one"], 400, "tasks"),
        (["none", "none"], 404, "id"),
        ([{"vector": [0.0, 0.0], "space": {}}] * 2, 400, "tasks[0].vector"),
        ([{"vector": [1.0, 2.0], "space": {}}] * 2, 400, "tasks[0].space"),
        (["none"] * 300, 400, "tasks"),
    ],
)
def test_what_cannot_be_compared_is_refused(refusing: Bench, tasks: list[Any], status: int, param: str) -> None:
    response = refusing.post(f"{PATH}/compare", {"tasks": tasks})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/none", 404, "id"),
        ("/none/nearest", 404, "id"),
        ("/none/nearest?k=0", 400, "k"),
        ("/none/nearest?kind=expert", 400, "kind"),
        ("?include=all", 400, "include"),
        ("?limit=0", 400, "limit"),
    ],
)
def test_what_is_not_there_to_be_read_is_said_by_its_field(refusing: Bench, path: str, status: int, param: str) -> None:
    response = refusing.get(PATH + path)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_health_and_metrics_tell_of_the_part(bench: Bench) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        bench.says("x")
        assert (await client.get("/health")).json()["parts"]["task embedding"]["ready"]
        assert bench.encoder.texts == []  # a graph that starts embeds no probe texts
        await made(client, examples=data_set("tone"))
        await bench.task_part.check()
        assert (await client.get("/v1/status")).json()["task_embedding"]["batches"] == 2

    bench.run(talk)
