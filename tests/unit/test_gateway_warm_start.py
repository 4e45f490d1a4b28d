"""Searches that start near the experts of the nearest tasks, at the door: over a real registry and real mixing."""

from pathlib import Path
from typing import Any

import pytest

from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidRequest, UnknownName
from tests.doors import HTTP, Bench, NearSearches, NoTasks
from tests.unit.test_gateway_searches import PATH, QUICK, a_bench, searched

EXAMPLES = [{"prompt": f"question {i}:", "answer": " yes" if i % 2 else " no"} for i in range(6)]
BODY = {"backbone": "tiny", "examples": EXAMPLES, "experts": ["maths", "law"], **QUICK}


class KnownTasks(NoTasks):
    """Tasks whose cosines are known, whatever they are compared with."""

    def __init__(self, **cosines: float) -> None:
        self.cosines, self.answers = cosines, list[Answers]()

    async def nearest(
        self, owner: str, id_: str, *, k: int, with_expert: bool = False, **_: Any
    ) -> tuple[dict[str, Any], ...]:
        if id_ != "reviews":
            raise UnknownName("embedded task", id_, ("reviews",))
        return self._found(k, with_expert)

    async def nearest_of(
        self, owner: str, answers: Answers, *, k: int, with_expert: bool = False, **_: Any
    ) -> tuple[dict[str, Any], ...]:
        self.answers.append(answers)
        if any(len(text) > 40 for text in answers.texts):
            raise InvalidRequest("texts[0]", "is too long")
        return self._found(k, with_expert)

    def _found(self, k: int, with_expert: bool) -> tuple[dict[str, Any], ...]:
        assert with_expert and k >= 64
        ranked = sorted(self.cosines, key=lambda one: -self.cosines[one])
        return tuple({"id": one, "cosine": self.cosines[one], "expert": one.partition("-")[0]} for one in ranked)


def with_tasks(bench: Bench, tasks: KnownTasks) -> Bench:
    bench._open(HTTP, (), bench.part, bench.real, NearSearches(bench.part), ("centroid",), tasks)
    return bench


@pytest.fixture
def tasks() -> KnownTasks:
    return KnownTasks(**{"maths-a": 0.2, "maths-b": 0.8, "law-a": 0.3, "gone-a": 0.9})


@pytest.fixture
def bench(tmp_path: Path, tasks: KnownTasks) -> Bench:
    return with_tasks(a_bench(tmp_path), tasks)


def test_a_search_starts_near_the_experts_of_the_nearest_tasks_and_says_so_everywhere(bench: Bench) -> None:
    async def talk(client: Any) -> None:
        job = await searched(client, examples=EXAMPLES, start={"task": "reviews"})
        start = job["start"]
        assert start["similarities"] == {"maths": 0.8, "law": 0.3, "base": None}
        assert start["weights"]["maths"] > start["weights"]["law"] and start["weights"]["base"] == 0.5
        assert start["source"] == "task reviews" and job["result"]["start"] == start
        trace = (await client.get(f"{PATH}/{job['id']}/trace")).json()["data"]
        assert trace[0]["start"]["source"] == "task reviews" and "start" not in trace[1]
        shown = (await client.get(f"/v1/mixtures/{job['result']['mixture']}")).json()
        assert shown["card"]["search"]["start"] == start
        assert abs(job["result"]["weights"]["maths"] - 0.75) < 0.2

    bench.run(talk)


def test_it_is_another_job_than_the_uniform_one_and_asked_again_the_same(bench: Bench) -> None:
    async def talk(client: Any) -> None:
        warm = await searched(client, examples=EXAMPLES, start="nearest")
        uniform = await searched(client, examples=EXAMPLES, start="uniform")
        assert warm["id"] != uniform["id"] and uniform["start"] == "uniform"
        assert (await client.post(PATH, json=BODY)).json()["id"] == uniform["id"]
        again = await client.post(PATH, json={**BODY, "start": {}})
        assert (again.status_code, again.json()["id"]) == (200, warm["id"])
        other = await searched(client, examples=EXAMPLES, start={"temperature": 0.5})
        assert other["id"] != warm["id"]
        assert other["start"]["weights"]["maths"] > warm["start"]["weights"]["maths"]

    bench.run(talk)


def test_the_shots_alone_are_embedded_and_no_held_out_example(bench: Bench, tasks: KnownTasks) -> None:
    bench.run(lambda client: searched(client, examples=EXAMPLES, start="nearest", shots=4))
    (answers,) = tasks.answers
    assert answers.num_texts == 4 and answers.labels == ("no", "yes")
    tokens = {one["prompt"]: bench.door.prompts["tiny"].plain(one["prompt"]) for one in EXAMPLES}
    first_asked = [row.token_ids for row in bench.backbone.rows[:24]]  # the first generation has but shots
    assert set(answers.texts) == {p for p, ids in tokens.items() if any(row[: len(ids)] == ids for row in first_asked)}


def test_of_a_chat_the_users_last_message_is_the_text_and_answers_that_never_repeat_are_open(
    bench: Bench, tasks: KnownTasks
) -> None:
    examples = [
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": f"q{i}"}],
            "answer": f"a{i}",
        }
        for i in range(6)
    ]
    bench.run(lambda client: searched(client, examples=examples, start="nearest", shots=4))
    (answers,) = tasks.answers
    assert answers.is_open and set(answers.replies) <= {f"a{i}" for i in range(6)}
    assert {text[0] for text in answers.texts} == {"q"}


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"start": "warm"}, 400, "start", 'must be "uniform", "nearest"'),
        ({"start": ["nearest"]}, 400, "start", 'must be "uniform", "nearest"'),
        ({"start": {"colour": 1}}, 400, "start.colour", "not known here"),
        ({"start": {"std": 0.1}}, 400, "start.std", "from 0.2 to 1"),
        ({"start": {"temperature": 0}}, 400, "start.temperature", "from 0.1 to 100"),
        ({"start": {"base": 1.0}}, 400, "start.base", "from 0 to 0.9"),
        ({"start": {"task": "unknown"}}, 404, "start.task", "no task to start from named 'unknown'; known: reviews"),
        ({"start": {"task": " "}}, 400, "start.task", "empty"),
        ({"start": "nearest", "examples": [{**one, "answer": "x"} for one in EXAMPLES]}, 400, "start", "two labels"),
        ({"start": "nearest", "examples": [{**one, "prompt": one["prompt"] + "q" * 30} for one in EXAMPLES]}, 400,
         "start", "texts[0]: is too long"),
    ],
)  # fmt: skip
def test_a_start_that_cannot_be_had_is_refused_by_its_field(
    bench: Bench, fields: dict[str, Any], status: int, param: str, says: str
) -> None:
    response = bench.post(PATH, {**BODY, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert says in error["message"]
    assert bench.get(PATH).json()["data"] == [] and bench.backbone.rows == []


@pytest.mark.parametrize(
    ("cosines", "says"), [({}, "no task with an expert is registered"), ({"gone-a": 0.9}, "nothing is known of any")]
)
def test_without_an_experts_task_there_is_no_warm_start(tmp_path: Path, cosines: dict[str, float], says: str) -> None:
    bench = with_tasks(a_bench(tmp_path), KnownTasks(**cosines))
    response = bench.post(PATH, {**BODY, "start": "nearest"})
    assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "start"
