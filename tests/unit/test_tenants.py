"""Two tenants at one door, call by call: nobody sees, names, lists, counts, moves or deletes what is another's.

A call that names a thing of the other tenant's is answered as one that names nothing: the same status, the same text,
the same headers. What a tenant makes is the same whether or not the other one has made it before.
"""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from metasepia.embedding import probes
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.entries import SHARED
from serve.operations import operations
from tests.doors import DIGEST, INDEX, UP
from tests.keys import KeyedBench, ask
from tests.tasks import PROBES, data_set

EXAMPLES = [{"text": "quokka one", "label": "secretlabel"}, {"text": "dog two", "label": "other"}]
TWIN = [{"text": "cat three", "label": "c"}, {"text": "saw four", "label": "d"}]
MORE = [{"text": "owl five", "label": "other"}]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 7}
UNFINISHED = ("queued", "running")
SEARCH = {
    "backbone": "tiny",
    "examples": [{"prompt": f"question {i}:", "answer": " yes"} for i in range(6)],
    **{"population": 4, "generations": 1, "shots": 3},
}


def an_expert(value: float) -> bytes:
    z = {UP: np.full(4, value, np.float32)}
    return ExpertVectors(backbone=DIGEST, factors=INDEX.digest, z=z).to_bytes()


def digest_of(value: float) -> str:
    return ExpertVectors.from_bytes(an_expert(value)).digest


@dataclass
class World:
    """Tenant `anna` has one of everything, tenant `bert` has nothing; `one` and `two` are shared."""

    bench: KeyedBench
    anna: str = ""
    bert: str = ""
    ops: str = ""
    made: dict[str, str] = field(default_factory=dict)
    """What anna has: by kind its id or digest."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ask(self, key: str, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.bench.ask(method, path, key, body)

    def bert_asks(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return self.ask(self.bert, method, path, body)

    def seen_by_anna(self) -> dict[str, str]:
        """All that she can read."""
        paths = [
            "/v1/contexts", f"/v1/contexts/{self.made['context']}", f"/v1/contexts/{self.made['context']}/examples",
            "/v1/experts", "/v1/experts/quokka", "/v1/mixtures", "/v1/mixtures/quokkamix", "/v1/mixtures/search",
            f"/v1/mixtures/search/{self.made['search']}", "/v1/tasks", "/v1/tasks/quokkatask",
            "/v1/tasks/quokkatask/nearest", "/v1/hidden_states/tasks", "/v1/models", "/v1/jobs",
        ]  # fmt: skip
        return {path: self.ask(self.anna, "GET", path).text for path in paths}

    def secrets(self) -> list[str]:
        """Words that stand in no answer to bert, unless he said them himself."""
        return ["quokka", "secretlabel", "anna", *(one.removeprefix("ctx-") for one in self.made.values())]


async def _make(world: World, client: httpx.AsyncClient) -> None:
    async def post(path: str, body: Any) -> dict[str, Any]:
        response = await ask(client, "POST", path, world.anna, body)
        assert response.status_code in (200, 202), (path, response.text)
        return response.json()

    context = await post("/v1/contexts", {"examples": EXAMPLES})
    expert = await post("/v1/experts", {"name": "quokka", "file": an_expert(1.5)})
    mixture = await post(
        "/v1/mixtures", {"backbone": "tiny", "weights": {"quokka": 0.5, "one": 0.5}, "name": "quokkamix"}
    )
    task = await post("/v1/tasks", {"name": "quokkatask", "examples": data_set("tone"), "expert": "quokka"})
    hidden = await post(
        "/v1/hidden_states", {"model": "tiny", "input": [[1, 2]] * 3, "task": "quokkaseen", "layers": [1]}
    )
    search = await post("/v1/mixtures/search", SEARCH | {"experts": ["quokka", "one"]})
    path = f"/v1/mixtures/search/{search['id']}"
    while (job := (await ask(client, "GET", path, world.anna)).json())["status"] in UNFINISHED:
        await asyncio.sleep(0.02)
    assert job["status"] == "done", job
    world.made = {
        "context": context["id"], "expert": expert["digest"], "mixture": mixture["digest"], "task": task["digest"],
        "search": search["id"], "found": job["result"]["mixture"],
    }  # fmt: skip
    world.answers = {"context": context, "expert": expert, "mixture": mixture, "task": task, "hidden": hidden}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, _bench(tmp_path_factory.mktemp("two"), patch) as bench:
        yield from _world(bench)


def _bench(tmp_path: Path, patch: pytest.MonkeyPatch) -> KeyedBench:
    patch.setattr(probes, "shipped", lambda: PROBES)
    bench = KeyedBench(tmp_path)
    bench.says("x")
    for name, value in (("one", 1.2), ("two", 0.7)):
        card: dict[str, object] = {"backbone": DIGEST}
        bench.real.registry.put("expert", an_expert(value), digest=digest_of(value), name=name, owner=SHARED, card=card)
    return bench


def _world(bench: KeyedBench) -> Iterator[World]:
    world = World(bench)
    world.anna, world.bert = (bench.key(one, "infer", "contexts", "experts:write") for one in ("anna", "bert"))
    world.ops = bench.key("ops", "admin")
    bench.run(lambda client: _make(world, client))
    bench.ray_jobs = [{"id": "quokkajob", "object": "job", "created_unix_s": 1.0, "tenant": "anna"}]
    before = world.seen_by_anna()
    yield world
    after = world.seen_by_anna()  # whatever bert did below
    assert {path: after[path] for path in after if after[path] != before[path]} == {}


def same_as_nothing(world: World, method: str, path: str, body: Any, theirs: str, nothing: str) -> None:
    """Bert naming what anna has, and what nobody has: the answers differ in the name that he gave alone."""

    def asked(name: str) -> tuple[int, str, dict[str, str]]:
        filled = _filled(body, name)
        response = world.bert_asks(method, path.replace("NAME", name), filled)
        told = re.sub(r'"(id|receipt|request)": ?"[^"]*"', "", response.text.replace(name, "NAME"))
        headers = {
            one: value for one, value in response.headers.items() if one not in ("x-request-id", "content-length")
        }
        return response.status_code, told, headers

    mine, other = asked(theirs), asked(nothing)
    assert mine == other
    assert mine[0] in (400, 404), mine


def _filled(body: Any, name: str) -> Any:
    if isinstance(body, dict):
        return {_filled(key, name): _filled(value, name) for key, value in body.items()}
    if isinstance(body, list):
        return [_filled(one, name) for one in body]
    return body.replace("NAME", name) if isinstance(body, str) else body


def nothing_told(world: World, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
    response = world.ask(key or world.bert, method, path, body)
    assert response.status_code == 200, response.text
    for secret in world.secrets():
        assert secret not in response.text, (path, secret)
    return response


DIGESTS = ("0" * 64, "ctx-" + "0" * 64)

HIDDEN: dict[str, list[tuple[str, str, Any, str, str]]] = {
    # operation: (method, path, body, what anna has, what nobody has); "context" and the like stand for digests
    "Classify": [("POST", "/v1/classify", {"model": "NAME", "inputs": ["cat"]}, "context", DIGESTS[1])],
    "GetContext": [("GET", "/v1/contexts/NAME", None, "context", DIGESTS[1])],
    "DeleteContext": [("DELETE", "/v1/contexts/NAME", None, "context", DIGESTS[1])],
    "ListContextExamples": [("GET", "/v1/contexts/NAME/examples", None, "context", DIGESTS[1])],
    "ExtendContext": [("POST", "/v1/contexts/NAME/examples", {"examples": MORE}, "context", DIGESTS[1])],
    "CreateChatCompletion": [
        ("POST", "/v1/chat/completions", CHAT | {"model": "tiny:NAME"}, "quokka", "numbat"),
        ("POST", "/v1/chat/completions", CHAT | {"model": "tiny:NAME"}, "expert", DIGESTS[0]),
        ("POST", "/v1/chat/completions", CHAT | {"model": "tiny:mix@NAME"}, "mixture", DIGESTS[0]),
        ("POST", "/v1/chat/completions", CHAT | {"model": "tiny:mix@NAME"}, "quokkamix", "numbatmix"),
    ],
    "CreateCompletion": [
        ("POST", "/v1/completions", {"model": "tiny:NAME", "prompt": "a"}, "quokka", "numbat"),
        ("POST", "/v1/completions", {"model": "tiny:mix@NAME", "prompt": "a"}, "found", DIGESTS[0]),
    ],
    "CreateEmbeddings": [("POST", "/v1/embeddings", {"model": "tiny:NAME", "input": "a"}, "quokka", "numbat")],
    "CreateHiddenStates": [
        ("POST", "/v1/hidden_states", {"model": "tiny:NAME", "input": "a"}, "quokka", "numbat"),
        ("POST", "/v1/hidden_states", {"model": "tiny:mix@NAME", "input": "a"}, "mixture", DIGESTS[0]),
    ],
    "GetObservedTask": [("GET", "/v1/hidden_states/tasks/NAME", None, "quokkaseen", "numbatseen")],
    "DeleteObservedTask": [("DELETE", "/v1/hidden_states/tasks/NAME", None, "quokkaseen", "numbatseen")],
    "GetExpert": [("GET", "/v1/experts/NAME", None, one, other) for one, other in (
        ("quokka", "numbat"), ("expert", DIGESTS[0]),
    )],
    "GetExpertContent": [("GET", "/v1/experts/NAME/content", None, one, other) for one, other in (
        ("quokka", "numbat"), ("expert", DIGESTS[0]),
    )],
    "DeleteExpert": [("DELETE", "/v1/experts/NAME", None, one, other) for one, other in (
        ("quokka", "numbat"), ("expert", DIGESTS[0]),
    )],
    "CreateMixture": [
        ("POST", "/v1/mixtures", {"backbone": "tiny", "weights": {"NAME": 0.5, "one": 0.5}}, "quokka", "numbat"),
        ("POST", "/v1/mixtures", {"backbone": "tiny", "weights": {"NAME": 0.5, "one": 0.5}}, "expert", DIGESTS[0]),
    ],
    "CreateSearch": [
        ("POST", "/v1/mixtures/search", SEARCH | {"experts": ["NAME", "one"]}, "quokka", "numbat"),
        ("POST", "/v1/mixtures/search", SEARCH | {"experts": ["NAME", "one"]}, "expert", DIGESTS[0]),
        ("POST", "/v1/mixtures/search", SEARCH | {"start": {"task": "NAME"}}, "quokkatask", "numbattask"),
    ],
    "GetSearch": [("GET", "/v1/mixtures/search/NAME", None, "search", "search-0000000000000000")],
    "GetSearchTrace": [("GET", "/v1/mixtures/search/NAME/trace", None, "search", "search-0000000000000000")],
    "GetSearchPicture": [("GET", "/v1/mixtures/search/NAME/picture", None, "search", "search-0000000000000000")],
    "CancelSearch": [("DELETE", "/v1/mixtures/search/NAME", None, "search", "search-0000000000000000")],
    "GetMixture": [("GET", "/v1/mixtures/NAME", None, one, other) for one, other in (
        ("quokkamix", "numbatmix"), ("mixture", DIGESTS[0]), ("found", DIGESTS[0]),
    )],
    "DeleteMixture": [("DELETE", "/v1/mixtures/NAME", None, one, other) for one, other in (
        ("quokkamix", "numbatmix"), ("mixture", DIGESTS[0]),
    )],
    "CreateTask": [
        ("POST", "/v1/tasks", {"examples": data_set("topic"), "expert": "NAME"}, "quokka", "numbat"),
        ("POST", "/v1/tasks", {"model": "NAME"}, "context", DIGESTS[1]),
        ("POST", "/v1/tasks", {"model": "tiny:NAME", "prompt": {"template": "{text}?"}}, "quokka", "numbat"),
    ],
    "CompareTasks": [("POST", "/v1/tasks/compare", {"tasks": ["NAME", "NAME"]}, "quokkatask", "numbattask")],
    "GetTask": [("GET", "/v1/tasks/NAME", None, one, other) for one, other in (
        ("quokkatask", "numbattask"), ("task", DIGESTS[0]),
    )],
    "DeleteTask": [("DELETE", "/v1/tasks/NAME", None, "quokkatask", "numbattask")],
    "FindNearestTasks": [("GET", "/v1/tasks/NAME/nearest", None, "quokkatask", "numbattask")],
    "GetJob": [
        ("GET", "/v1/jobs/NAME", None, "search", "search-0000000000000000"),
        ("GET", "/v1/jobs/NAME", None, "quokkatask", "numbattask"),
        ("GET", "/v1/jobs/NAME", None, "quokkajob", "numbatjob"),
    ],
    "GetModel": [("GET", "/v1/models/NAME", None, one, other) for one, other in (
        ("context", DIGESTS[1]), ("tiny:quokka", "tiny:numbat"), ("tiny:mix@quokkamix", "tiny:mix@numbatmix"),
    )],
}  # fmt: skip
"""Calls that name a thing."""

LISTED = {
    "ListContexts": "/v1/contexts",
    "ListObservedTasks": "/v1/hidden_states/tasks",
    "ListExperts": "/v1/experts",
    "ListMixtures": "/v1/mixtures",
    "ListSearches": "/v1/mixtures/search",
    "ListTasks": "/v1/tasks?include=vector",
    "ListProbes": "/v1/tasks/probes",
    "ListModels": "/v1/models",
    "GetUsage": "/v1/usage",
    "ListJobs": "/v1/jobs",
    "GetHealth": "/health",
    "GetVersion": "/version",
}
"""Calls that tell what there is."""

FOR_OPERATORS = {"CreateKey", "ListKeys", "GetKey", "RevokeKey", "GetMetrics", "GetStatus"}
"""Scope `admin`: whoever runs the door sees all keys, and of the rest sums alone."""

MADE = {"CreateContext", "AddExpert", "ReplaceExpert", "CreateMixture", "CreateTask", "CreateHiddenStates"}
"""Calls that make a thing which the other tenant may have made before: tests of their own, below."""

OWN_TESTS = {"GetTaskMap"}


def test_every_call_has_a_case_here(world: World) -> None:
    table = {one.name for one in operations(world.bench.door)}
    assert table == set(HIDDEN) | set(LISTED) | FOR_OPERATORS | MADE | OWN_TESTS


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in HIDDEN.items() for case in cases], ids=lambda one: str(one)[:40]
)
def test_what_is_another_tenants_is_answered_as_what_nobody_has(
    world: World, name: str, case: tuple[str, str, Any, str, str]
) -> None:
    method, path, body, theirs, nothing = case
    same_as_nothing(world, method, path, body, world.made.get(theirs, theirs), nothing)
    operation = next(one for one in operations(world.bench.door) if one.name == name)
    assert operation.method == method


@pytest.mark.parametrize("name", LISTED)
def test_lists_have_nothing_of_another_tenant(world: World, name: str) -> None:
    response = nothing_told(world, "GET", LISTED[name])
    if name in ("ListContexts", "ListObservedTasks", "ListJobs", "ListMixtures", "ListSearches", "ListTasks"):
        assert response.json()["data"] == []
    if name in ("ListExperts", "ListModels"):
        assert '"one"' in response.text or "tiny:one" in response.text  # what is shared is everybody's


@pytest.mark.parametrize("name", sorted(FOR_OPERATORS))
def test_what_is_for_operators_is_refused_to_tenants_and_names_no_thing_of_theirs(world: World, name: str) -> None:
    operation = next(one for one in operations(world.bench.door) if one.name == name)
    path = operation.path.replace("{id}", world.anna.split("_")[1])
    assert world.bert_asks(operation.method, path, {}).status_code == 403
    if name in ("GetMetrics", "GetStatus"):
        nothing_told(world, "GET", path, key=world.ops)


def test_the_map_shows_no_other_tenants_tasks(world: World) -> None:
    refused = world.bert_asks("GET", "/v1/tasks/map")
    assert refused.status_code == 400 and "no task is embedded" in refused.text and "quokka" not in refused.text
    assert "quokkatask" in world.ask(world.anna, "GET", "/v1/tasks/map").text


def _told(answer: dict[str, Any]) -> dict[str, Any]:
    """Without moments and durations."""
    kept = {name: value for name, value in answer.items() if name not in ("created", "build_ms", "owner")}
    return kept | ({"receipt": {**kept["receipt"], "request": None}} if kept.get("receipt") else {})


def test_the_same_context_is_new_to_the_tenant_who_had_it_not(world: World) -> None:
    made = world.bert_asks("POST", "/v1/contexts", {"examples": EXAMPLES}).json()
    assert made["cached"] is False and made["usage"]["prompt_tokens"] > 0
    assert _told(made) == _told(world.answers["context"])
    assert world.bert_asks("POST", "/v1/contexts", {"examples": EXAMPLES}).json()["cached"] is True
    assert world.bert_asks("DELETE", f"/v1/contexts/{made['id']}").status_code == 200
    again = world.ask(world.anna, "POST", "/v1/classify", {"model": made["id"], "inputs": ["cat"]})
    assert again.status_code == 200 and world.bert_asks("GET", f"/v1/contexts/{made['id']}").status_code == 410


def test_the_same_expert_under_the_same_name_is_new_to_the_tenant_who_had_it_not(world: World) -> None:
    upload = {"name": "quokka", "file": an_expert(1.5)}
    made = world.bert_asks("POST", "/v1/experts", upload)
    assert made.status_code == 200 and _told(made.json()) == _told(world.answers["expert"])
    other = world.bert_asks("PUT", "/v1/experts/quokka", {"file": an_expert(0.25)})
    assert other.json()["digest"] == digest_of(0.25)
    assert world.ask(world.anna, "GET", "/v1/experts/quokka").json()["digest"] == digest_of(1.5)
    assert world.bert_asks("DELETE", "/v1/experts/quokka").status_code == 200
    assert world.ask(world.anna, "GET", "/v1/experts/quokka/content").content == an_expert(1.5)


def test_a_tenants_expert_hides_a_shared_one_from_itself_alone(world: World) -> None:
    assert world.bert_asks("POST", "/v1/experts", {"name": "two", "file": an_expert(0.3)}).status_code == 200
    assert world.bert_asks("GET", "/v1/experts/two").json()["digest"] == digest_of(0.3)
    assert world.ask(world.anna, "GET", "/v1/experts/two").json()["digest"] == digest_of(0.7)
    assert world.bert_asks("DELETE", "/v1/experts/two").status_code == 200


def test_the_same_mixture_under_the_same_name_is_new_to_the_tenant_who_had_it_not(world: World) -> None:
    body = {"backbone": "tiny", "weights": {"one": 0.25, "two": 0.75}, "name": "quokkamix"}
    assert world.bert_asks("POST", "/v1/mixtures", body).status_code == 200
    assert world.bert_asks("DELETE", "/v1/mixtures/quokkamix").status_code == 200
    assert world.ask(world.anna, "GET", "/v1/mixtures/quokkamix").json()["digest"] == world.made["mixture"]


def test_a_search_over_all_experts_is_over_those_that_the_tenant_sees(world: World) -> None:
    job = world.bert_asks("POST", "/v1/mixtures/search", SEARCH).json()
    assert set(job["experts"]) == {"base", "one", "two"}
    world.bert_asks("DELETE", f"/v1/mixtures/search/{job['id']}")


def test_the_same_task_is_new_to_the_tenant_who_had_it_not_and_has_no_neighbours_of_others(world: World) -> None:
    body = {"name": "quokkatask", "examples": data_set("tone")}
    made = world.bert_asks("POST", "/v1/tasks", body).json()
    assert made["cached"] is False and made["digest"] == world.made["task"]
    near = world.bert_asks("GET", "/v1/tasks/quokkatask/nearest").json()
    assert (near["data"], near["compared"], near["elsewhere"]) == ([], 0, {})
    other = {"name": "quokkatask", "examples": data_set("topic")}
    assert world.bert_asks("POST", "/v1/tasks", other).status_code == 409  # his own
    assert world.bert_asks("DELETE", "/v1/tasks/quokkatask").status_code == 200


def test_what_one_tenant_observes_under_a_name_moves_no_other_tenants_centroid(world: World) -> None:
    body = {"model": "tiny", "input": [[1, 2]], "task": "quokkaseen", "layers": [1]}
    task = world.bert_asks("POST", "/v1/hidden_states", body).json()["task"]
    assert [one["count"] for one in task["centroids"]] == [1]
    assert world.bert_asks("DELETE", "/v1/hidden_states/tasks/quokkaseen").status_code == 200


def test_an_idempotency_key_of_another_tenant_replays_nothing(world: World) -> None:
    body = CHAT | {"model": "tiny", "seed": 1}
    path, headers = "/v1/contexts", {"idempotency-key": "the same"}
    first = world.bench.ask("POST", path, world.anna, {"examples": TWIN}, headers)
    other = world.bench.ask("POST", path, world.bert, {"examples": MORE + TWIN}, headers)
    assert first.status_code == other.status_code == 200 and body
    assert first.json()["id"] != other.json()["id"]
    for key, one in ((world.anna, first), (world.bert, other)):
        assert world.ask(key, "DELETE", f"/v1/contexts/{one.json()['id']}").status_code == 200


def test_searches_and_tasks_of_every_tenant_go_on_when_their_part_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list[str]()
    task = {"name": "later", "examples": data_set("tone"), "background": True}
    with _bench(tmp_path, monkeypatch) as bench:
        keys += [bench.key(one, "infer", "contexts", "experts:write") for one in ("anna", "bert")]
        bench.part._turn = bench.task_part._turns.embedding = asyncio.Semaphore(0)  # nothing gets on
        for key in keys:
            assert bench.ask("POST", "/v1/mixtures/search", key, SEARCH).status_code == 202
            assert bench.ask("POST", "/v1/tasks", key, task).status_code == 202
        bench.real.registry.close()
        bench.store.close()

    async def recovered(client: httpx.AsyncClient) -> None:
        assert await again.part.recover() == 2 and await again.task_part.recover() == 2
        for key in keys:
            for path in ("/v1/mixtures/search", "/v1/tasks"):
                while (one := (await ask(client, "GET", path, key)).json()["data"][0])["status"] in UNFINISHED:
                    await asyncio.sleep(0.02)
                assert one["status"] == "done", one

    with KeyedBench(tmp_path) as again:
        again.run(recovered)
