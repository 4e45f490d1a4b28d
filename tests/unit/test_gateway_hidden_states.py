"""POST /v1/hidden_states at the door: answers in both forms, tasks and their centroids, and every refusal."""

import asyncio
import base64
import io
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from actors.centroids import Seen
from actors.drift_meters import tell_drift
from cluster.door_settings import HttpSettings
from cluster.settings import CentroidSettings
from metasepia.centroids import CentroidFacts
from metasepia.dispatch.centroid import TaskCentroid
from metasepia.errors import Overloaded, Unavailable
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.entries import LOCAL
from metasepia.rows import HiddenStates, Row
from serve.requests.arrow import KEY, MEDIA_TYPE
from serve.states import hidden_states
from tests.doors import DIGEST, EXPERT, INDEX, OTHER, UP, Bench
from tests.unit.test_prompts import write_byte_tokenizer

ARROW = {"accept": MEDIA_TYPE}
SMALL = CentroidSettings(max_tasks=2, max_centroids=5, reference_count=4, window=4, min_count=4, used_by_auto=True)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path), observing=SMALL)


def ask(bench: Bench, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return bench.post("/v1/hidden_states", {"model": "tiny", "input": "abc", **fields}, **(headers or {}))


def answer(bench: Bench, **fields: Any) -> dict[str, Any]:
    response = ask(bench, **fields)
    assert response.status_code == 200, response.text
    return response.json()


Batches = list[tuple[pa.RecordBatch, dict[str, Any] | None]]


def read_stream(content: bytes) -> tuple[dict[str, Any], Batches]:
    """The schema's metadata, and each record batch with its own."""
    reader = pa.ipc.open_stream(io.BytesIO(content))
    batches: Batches = []
    while True:
        try:
            batch = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            break
        own = batch.custom_metadata
        batches.append((batch.batch, None if own is None else json.loads(own[KEY])))
    return json.loads(reader.schema.metadata[KEY.encode()]), batches


def table_of(batches: Batches) -> dict[str, list[Any]]:
    return pa.Table.from_batches([batch for batch, _ in batches]).to_pydict()


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_states_come_by_input_and_layer_with_a_receipt_of_what_was_executed(bench: Bench) -> None:
    got = answer(bench, input=["abc", "de"], layers=[-1, 0])
    assert [(one["index"], one["layer"], one["shape"]) for one in got["data"]] == [
        (index, layer, [4]) for index in (0, 1) for layer in (1, 0)
    ]
    assert [one["states"] for one in got["data"]] == [[3.0] * 4] * 2 + [[2.0] * 4] * 2
    assert (got["receipt"]["backbone"], got["receipt"]["adapter"], got["receipt"]["path"]) == (DIGEST, [], "plain")
    assert got["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert "task" not in got
    assert {(row.want, row.hidden.layers, row.hidden.pooling) for row in bench.backbone.rows} == {
        ("hidden_states", (1, 0), "last")
    }


def test_every_tokens_state_has_its_token_and_both_encodings_agree(bench: Bench) -> None:
    plain, coded = (
        answer(bench, input=[[7, 8, 9], [5]], layers=[0, 1], pooling="none", encoding_format=form)["data"]
        for form in ("float", "base64")
    )
    for one, other in zip(plain, coded, strict=True):
        states = np.frombuffer(base64.b64decode(other["states"]), "<f4").reshape(other["shape"])
        np.testing.assert_array_equal(states, np.array(one["states"], np.float32))
        assert states[:, 0].tolist() == one["token_ids"] == other["token_ids"]
        assert set(states[:, 1]) == {one["layer"]}


def test_rows_of_an_expert_and_of_a_mixture_carry_their_digests(bench: Bench) -> None:
    assert answer(bench, model="tiny:maths")["receipt"]["adapter"] == [[EXPERT, 1.0]]
    mixed = answer(bench, model=f"tiny:mix@{'a' * 64}")["receipt"]["adapter"]
    assert mixed == [[EXPERT, 0.25], [OTHER, 0.75]]
    assert [row.adapter for row in bench.backbone.rows] == [((EXPERT, 1.0),), ((EXPERT, 0.25), (OTHER, 0.75))]


def test_no_single_call_turns_more_than_one_vector_into_text(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, longest = json.dumps, 0

    def watched(tree: Any, **options: Any) -> str:
        nonlocal longest
        text = whole(tree, **options)
        longest = max(longest, text.count("7.0"))
        return text

    monkeypatch.setattr("serve.states.hidden_states.json.dumps", watched)
    states = answer(bench, input=[[7] * 60] * 3, layers=[0, 1], pooling="none")["data"]
    assert [len(one["states"]) for one in states] == [60] * 6
    assert 0 < longest <= 4  # the hidden size: a call holds the interpreter, and so every other request, to its end


@pytest.mark.parametrize("pooling", ["last", "mean", "none"])
def test_an_arrow_stream_holds_what_json_does(bench: Bench, pooling: str) -> None:
    asked: dict[str, Any] = {"input": [[7, 8, 9], [5, 6]], "layers": [1, 0], "pooling": pooling}
    whole, response = answer(bench, **asked), ask(bench, ARROW, **asked)
    assert response.headers["content-type"] == MEDIA_TYPE
    about, batches = read_stream(response.content)
    assert about["receipt"] == whole["receipt"] and about["pooling"] == pooling and about["layers"] == [1, 0]
    assert [own for _, own in batches] == [None, None, {"usage": whole["usage"]}]
    table = table_of(batches)
    states = [state for one in whole["data"] for state in (one["states"] if pooling == "none" else [one["states"]])]
    assert table["state"] == states
    tokens = {"last": [[2], [1]], "mean": [[None], [None]], "none": [[0, 1, 2], [0, 1]]}[pooling]
    ids = {"last": [[9], [6]], "mean": [[None], [None]], "none": [[7, 8, 9], [5, 6]]}[pooling]
    assert list(zip(table["input"], table["layer"], table["token"], table["token_id"], strict=True)) == [
        (index, layer, token, id_)
        for index in (0, 1)
        for layer in (1, 0)
        for token, id_ in zip(tokens[index], ids[index], strict=True)
    ]


def test_a_long_text_is_cut_into_several_record_batches(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.requests.arrow.PIECE_BYTES", 3 * 4 * 4)
    _, batches = read_stream(ask(bench, ARROW, input=[list(range(1, 9))], layers=[0], pooling="none").content)
    assert [batch.num_rows for batch, _ in batches] == [3, 3, 2, 0]
    assert [state[0] for state in table_of(batches)["state"]] == [*range(1, 9)]


def test_a_row_that_was_executed_in_another_way_says_so_in_its_own_batch(bench: Bench) -> None:
    executed = bench.backbone._executed

    def by_length(row: Row) -> Any:
        from dataclasses import replace

        return replace(executed(row), path="materialised" if len(row.token_ids) == 2 else "plain")

    bench.backbone._executed = by_length
    about, batches = read_stream(ask(bench, ARROW, input=["abc", "de", "fgh"]).content)
    assert about["receipt"]["path"] == "plain"
    assert [None if own is None else own["receipt"]["path"] for _, own in batches[:3]] == [None, "materialised", None]


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("application/json, " + MEDIA_TYPE, "application/json"),
        (MEDIA_TYPE + ", */*", MEDIA_TYPE),
        ("application/json;q=0.5, " + MEDIA_TYPE, MEDIA_TYPE),
        (MEDIA_TYPE + ";q=0.1, application/json;q=0.9", "application/json"),
        ("Application/VND.apache.arrow.stream", MEDIA_TYPE),
        ("*/*, application/json;q=0", MEDIA_TYPE),
        ("text/html, application/xhtml+xml, */*;q=0.1", "application/json"),
    ],
)
def test_accept_chooses_the_form(accept: str | None, form: str) -> None:
    assert hidden_states.form_of(accept) == form


def test_many_rows_are_asked_for_a_few_at_a_time_and_answered_in_order(bench: Bench) -> None:
    running = most = 0
    sizes: list[int] = []
    plain = bench.backbone.hidden_states

    async def slow(rows: Sequence[Row]) -> list[HiddenStates]:
        nonlocal running, most
        running, sizes[:] = running + 1, [*sizes, len(rows)]
        most = max(most, running)
        await asyncio.sleep(0.003 if len(sizes) % 2 else 0)  # a later call may be answered before
        running -= 1
        return await plain(rows)

    bench.backbone.hidden_states = slow
    inputs = ["x" * (1 + at % 7) for at in range(300)]
    got = answer(bench, input=inputs)["data"]
    assert [one["states"][0] for one in got] == [float(len(text)) for text in inputs]
    assert most == hidden_states.CALLS_AT_ONCE and max(sizes) == hidden_states.CHUNK_ROWS and sum(sizes) == 300


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"layers": [2]}, 400, "layers[0]", "2 is not there: 0 is the embedding, 1 the last block's output"),
        ({"layers": [0, -3]}, 400, "layers[1]", "-3 is not there: .* -2 to -1 count from the end"),
        ({"layers": [1, -1]}, 400, "layers[1]", r"-1 names the same layer as layers\[0\]"),
        ({"layers": []}, 400, "layers", "at least 1 item"),
        ({"layers": [True]}, 400, "layers[0]", "valid integer"),
        ({"layers": 1}, 400, "layers", "valid list"),
        ({"layers": ["last"]}, 400, "layers[0]", "valid integer"),
        ({"pooling": "max"}, 400, "pooling", "'last', 'mean' or 'none'"),
        ({"input": ""}, 400, "input[0]", "the text is empty"),
        ({"input": []}, 400, "input", "at least 1 item"),
        ({"input": ["a", " "]}, 400, "input[1]", "the text is empty"),
        ({"input": [[]]}, 400, "input[0]", "list of token ids is empty"),
        ({"input": [258]}, 400, "input", "from 0 to 257"),
        ({"input": [[1, -1]]}, 400, "input[0]", "from 0 to 257"),
        ({"input": "x" * 65}, 400, "input", "65 tokens do not fit the window of 64"),
        ({"input": {"text": "x"}}, 400, "input", "valid list"),
        ({"input": [{"image": "AAAA"}]}, 400, None, "as a file for a causal backbone"),
        ({"model": "tiny:nobody"}, 404, "model", "known: tiny"),
        ({"model": "tiny:law"}, 404, "model", "known: tiny"),
        ({"model": "other"}, 404, "model", "known: tiny"),
        ({"model": "minilm-fake"}, 400, None, "hidden states of the encoder minilm-fake"),
        ({"model": "auto"}, 400, None, "hidden states of auto"),
        ({"model": "ctx-" + "0" * 64}, 400, None, "hidden states of ctx-"),
        ({"task": "Maths!"}, 400, "task", "use 1 to 64 of a-z"),
        ({"task": "auto:maths"}, 400, "task", "use 1 to 64 of a-z"),
        ({"task": "a" * 65}, 400, "task", "use 1 to 64 of a-z"),
        ({"task": 7}, 400, "task", "valid string"),
        ({"task": "maths", "pooling": "none"}, 400, "pooling", "use last or mean"),
        ({"observe": False}, 400, "observe", "name the task"),
        ({"layer": [1]}, 400, "layer", "not known here"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "'float' or 'base64'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["json", "arrow"])
def test_a_bad_value_is_refused_by_its_field_before_anything_is_computed(
    bench: Bench, fields: dict[str, Any], status: int, param: str | None, words: str, form: str
) -> None:
    response = ask(bench, ARROW if form == "arrow" else None, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert re.search(words, error["message"]), error["message"]
    assert bench.backbone.rows == []


@pytest.mark.parametrize("accept", ["text/csv", "application/vnd.apache.arrow.file", "application/json;q=0", "*/*;q=x"])
def test_an_answer_in_no_form_of_ours_is_refused(bench: Bench, accept: str) -> None:
    response = ask(bench, {"accept": accept})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "not_supported")
    assert "application/vnd.apache.arrow.stream" in response.json()["error"]["message"]


def test_an_answer_beyond_the_bound_is_refused_and_json_is_told_of_arrow(tmp_path: Path) -> None:
    http = HttpSettings(max_body_mib=0.25, max_states_mib=0.03, max_json_states_mib=0.01)
    bench = Bench(write_byte_tokenizer(tmp_path), http)
    text = {"input": ["x" * 60] * 8, "pooling": "none"}  # 7680 bytes a layer
    assert ask(bench, **text).status_code == 200
    response = ask(bench, layers=[0, 1], **text)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "input")
    assert "0.01 MiB of states and http.max_json_states_mib allows 0.01; let Accept name" in error["message"]
    assert ask(bench, ARROW, layers=[0, 1], **text).status_code == 200
    error = ask(bench, ARROW, layers=[0, 1], **text | {"input": ["x" * 60] * 20}).json()["error"]
    assert "http.max_states_mib allows 0.03; ask for fewer" in error["message"]


@pytest.mark.parametrize("form", [{}, ARROW], ids=["json", "arrow"])
def test_a_backbone_that_refuses_decides_the_status_in_either_form(bench: Bench, form: dict[str, str]) -> None:
    bench.backbone.error = Overloaded("the queue", 3.0)
    response = ask(bench, form)
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_an_error_after_the_first_batch_is_the_last_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "CHUNK_ROWS", 1)
    plain = bench.backbone.hidden_states

    async def second_fails(rows: Sequence[Row]) -> list[HiddenStates]:
        if len(rows[0].token_ids) == 2:
            raise Unavailable("backbone tiny", 2.0)
        return await plain(rows)

    bench.backbone.hidden_states = second_fails
    response = ask(bench, ARROW, input=["abc", "de", "fgh"], task="maths")
    assert response.status_code == 200
    _, batches = read_stream(response.content)
    assert [batch.num_rows for batch, _ in batches] == [1, 0]
    assert batches[-1][1] is not None and batches[-1][1]["error"]["code"] == "unavailable"
    assert bench.get("/v1/hidden_states/tasks").json()["data"] == []  # half a request is no observation


@pytest.mark.parametrize("form", [{}, ARROW], ids=["json", "arrow"])
def test_a_deadline_ends_the_request_and_its_rows(bench: Bench, form: dict[str, str]) -> None:
    bench.backbone.hang = True
    response = ask(bench, form | {"x-request-timeout-seconds": "0.5"}, input=["a"] * 200)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert bench.backbone.num_closed == hidden_states.CALLS_AT_ONCE


def test_a_client_that_leaves_takes_its_rows_along(bench: Bench) -> None:
    bench.backbone.hang = True

    async def leave(client: httpx.AsyncClient) -> None:
        body = {"model": "tiny", "input": ["a"] * 200}
        asking = asyncio.create_task(client.post("/v1/hidden_states", json=body))
        while not bench.backbone.rows:
            await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert bench.backbone.num_closed == hidden_states.CALLS_AT_ONCE

    bench.run(leave)


def test_a_client_that_leaves_a_stream_takes_the_rest_of_its_rows_along(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states, "CHUNK_ROWS", 1)
    plain, started, ended = bench.backbone.hidden_states, [0], [0]

    async def only_the_first(rows: Sequence[Row]) -> list[HiddenStates]:
        started[0] += 1
        if started[0] == 1:
            return await plain(rows)
        try:
            await asyncio.sleep(3600)
        finally:
            ended[0] += 1
        raise AssertionError

    bench.backbone.hidden_states = only_the_first

    async def leave() -> None:
        body = json.dumps({"model": "tiny", "input": ["a"] * 9}).encode()
        came, gone = [{"type": "http.request", "body": body}], asyncio.Event()

        async def receive() -> Any:
            if came:
                return came.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                gone.set()

        headers = [(b"accept", MEDIA_TYPE.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/hidden_states", "headers": headers, "query_string": b""}
        await asyncio.wait_for(bench.app(scope, receive, send), 20)
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert started[0] - 1 == ended[0] == hidden_states.CALLS_AT_ONCE


# -- tasks -------------------------------------------------------------------------------------------------------------


def gauges(bench: Bench, name: str) -> dict[str, float]:
    """As the part that keeps centroids sets them."""
    tell_drift(asyncio.run(bench.centroids.facts(LOCAL)), {DIGEST: "tiny"})
    lines = re.sub(r',replica="[^"]*"', "", bench.get("/metrics").text).splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith(name + "{")}


def test_texts_of_another_kind_under_one_name_move_the_drift_and_its_gauge(bench: Bench) -> None:
    noise = np.random.default_rng(0)
    bench.backbone.state_of = lambda tokens: (10 * (tokens[0] == 9) + noise.normal(size=4)).astype(np.float32)
    first = answer(bench, input=[[1, 1]] * 3, task="mail", layers=[1, 0])["task"]
    assert (first["name"], first["observed"]) == ("mail", True)
    assert [(one["layer"], one["count"], one["drift"]) for one in first["centroids"]] == [(0, 3, None), (1, 3, None)]
    later = [answer(bench, input=[[1, 1]] * 3, task="mail", layers=[1, 0])["task"]["centroids"] for _ in range(8)]
    same = later[-1]
    assert all(one["drift"] < 1.5 and one["count"] == 27 for one in same)
    label = 'backbone="tiny",expert="base",layer="1",pooling="last",task="mail"'
    name = f"metasepia_centroid_drift{{{label}}}"
    assert gauges(bench, "metasepia_centroid_drift")[name] == pytest.approx(same[1]["drift"])
    moved = answer(bench, input=[[9, 9]] * 20, task="mail", layers=[1, 0])["task"]["centroids"]
    assert all(one["drift"] > 5 and one["count"] == 47 for one in moved)
    assert gauges(bench, "metasepia_centroid_drift")[name] == pytest.approx(moved[1]["drift"])
    assert gauges(bench, "metasepia_centroid_states")[f"metasepia_centroid_states{{{label}}}"] == 47


def test_comparing_tells_the_distance_and_changes_nothing(bench: Bench) -> None:
    noise = np.random.default_rng(0)
    bench.backbone.state_of = lambda tokens: (10 * (tokens[0] == 9) + noise.normal(size=4)).astype(np.float32)
    answer(bench, input=[[1, 1]] * 20, task="mail")
    near, far = (answer(bench, input=[text] * 5, task="mail", observe=False)["task"] for text in ([1, 2], [9, 9]))
    assert near["centroids"][0]["distance"] < 1 < 5 < far["centroids"][0]["distance"]
    assert not near["observed"] and "reason" not in near
    assert far["centroids"][0]["count"] == 20
    assert answer(bench, task="unheard", observe=False, layers=[0, 1])["task"]["centroids"] == []
    assert [one["id"] for one in bench.get("/v1/hidden_states/tasks").json()["data"]] == ["mail"]


def test_an_arrow_stream_observes_too_and_its_end_says_how_the_task_stands(bench: Bench) -> None:
    _, batches = read_stream(ask(bench, ARROW, input=["abc"] * 70, task="mail").content)
    end = batches[-1][1]
    assert end is not None and end["task"]["observed"] and end["task"]["centroids"][0]["count"] == 70


def test_experts_and_poolings_of_a_task_are_kept_apart_by_what_was_executed(bench: Bench) -> None:
    for fields in ({}, {"model": "tiny:maths"}, {"pooling": "mean"}):
        answer(bench, task="mail", **fields)
    one = bench.get("/v1/hidden_states/tasks/mail").json()
    kinds = [(c["backbone"], c["expert"], c["pooling"], c["count"]) for c in one["centroids"]]
    assert kinds == [("tiny", None, "last", 1), ("tiny", None, "mean", 1), ("tiny", EXPERT, "last", 1)]


def test_two_tasks_give_the_layer_a_quality_and_one_does_not(bench: Bench) -> None:
    bench.backbone.state_of = lambda tokens: np.array([tokens[0] == 9, 0, 0, len(tokens)], np.float32) * 3
    answer(bench, input=[[1, 2], [1, 2, 3]], task="mail")
    assert gauges(bench, "metasepia_cluster_quality") == {}
    answer(bench, input=[[9, 2], [9, 2, 3]], task="chat")
    ((name, value),) = gauges(bench, "metasepia_cluster_quality").items()
    assert 'layer="1"' in name and 'source="requests"' in name
    assert value == pytest.approx(1 - np.sqrt(2.25 / (2.25 + 9)))  # scatter 2 * 1.5^2 of two states, 3 apart


def test_a_task_beyond_the_bound_is_refused_before_anything_is_computed(bench: Bench) -> None:
    for task in ("a", "b"):
        answer(bench, task=task)
    num_rows = len(bench.backbone.rows)
    response = ask(bench, task="c")
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "task", "invalid_value")
    assert "centroids.max_tasks is 2" in error["message"] and len(bench.backbone.rows) == num_rows
    assert bench.delete("/v1/hidden_states/tasks/a").json()["deleted"] is True
    assert answer(bench, task="c")["task"]["observed"]


@pytest.mark.parametrize("method", ["get", "delete"])
def test_an_unknown_task_lists_the_known_ones(bench: Bench, method: str) -> None:
    answer(bench, task="mail")
    response = getattr(bench, method)("/v1/hidden_states/tasks/male")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (404, "task")
    assert "no task named 'male'; known: mail" in error["message"]
    assert bench.delete("/v1/hidden_states/tasks/MAIL").status_code == 400


def test_states_are_answered_while_the_part_that_keeps_centroids_is_away(bench: Bench) -> None:
    async def away(*_: object) -> Any:
        raise Unavailable("expert mixing", 2.0)

    for name in ("check_room", "absorb", "facts"):
        setattr(bench.centroids, name, away)
    got = answer(bench, task="mail")
    assert got["data"] and got["task"]["observed"] is False and "did not answer (Unavailable)" in got["task"]["reason"]
    assert bench.get("/metrics").status_code == 200
    assert bench.get("/v1/hidden_states/tasks").status_code == 503


# -- auto --------------------------------------------------------------------------------------------------------------


def put(bench: Bench, name: str, value: float, **card: Any) -> str:
    expert = ExpertVectors(backbone=DIGEST, factors=INDEX.digest, z={UP: np.full(4, value, np.float32)})
    bench.real.registry.put(
        "expert", expert.to_bytes(), digest=expert.digest, name=name, owner=LOCAL, card={"backbone": DIGEST, **card}
    )
    return expert.digest


ONES = np.ones(4, np.float32)
CARD = TaskCentroid(backbone=DIGEST, layer=-1, pooling="mean", centre=0 * ONES, centroid=ONES, threshold=0.5).to_card()


@pytest.fixture
def auto(tmp_path: Path) -> Callable[[CentroidSettings], Bench]:
    def made(observing: CentroidSettings) -> Bench:
        bench = Bench(write_byte_tokenizer(tmp_path), observing=observing).with_experts(tmp_path / "registry")
        bench.says("x")
        bench.door.prompts["tiny"].chat = lambda messages: (1, 2, 3)  # pyright: ignore[reportAttributeAccessIssue]
        return bench

    return made


async def chat(client: httpx.AsyncClient) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "dispatch": ["centroid"]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["receipt"]


def soon(check: Callable[[], Awaitable[bool]]) -> Awaitable[None]:
    async def wait() -> None:
        give_up = asyncio.get_running_loop().time() + 10
        while not await check():
            assert asyncio.get_running_loop().time() < give_up
            await asyncio.sleep(0.02)

    return wait()


def test_what_auto_routes_is_told_once_for_many_requests_and_costs_no_forward_more(
    auto: Callable[[CentroidSettings], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.states.observing.FLUSH_S", 0.1)
    bench = auto(CentroidSettings(reference_count=4))
    put(bench, "maths", 1.5, dispatch=CARD)
    told: list[Seen] = []
    absorb = bench.centroids.absorb

    async def counted(owner: str, seen: Seen) -> tuple[CentroidFacts, ...]:
        told.append(seen)
        return await absorb(owner, seen)

    bench.centroids.absorb = counted

    async def talk(client: httpx.AsyncClient) -> None:
        for _ in range(6):
            assert (await chat(client))["dispatch"] == "centroid"

        async def told_all() -> bool:
            return sum(one.total.count for seen in told for _, one in seen) == 6

        await soon(told_all)
        (fact,) = await bench.centroids.facts(LOCAL)
        assert (fact.key.task, fact.key.layer, fact.key.pooling, fact.key.adapter) == ("auto:maths", 1, "mean", "")
        # Counted from the card's centroid, ones: the states are threes, and constant.
        assert fact.count == 6 and fact.drift is not None and fact.drift > 1000
        (listed,) = (await client.get("/v1/hidden_states/tasks")).json()["data"]
        assert listed["id"] == "auto:maths"
        assert (await client.delete("/v1/hidden_states/tasks/auto:maths")).status_code == 200

    bench.run(talk)
    assert len(told) < 6
    assert [row.want for row in bench.backbone.rows].count("hidden_states") == 6


@pytest.mark.parametrize("used", [True, False])
def test_only_where_the_operator_wishes_do_requests_move_what_auto_chooses(
    auto: Callable[[CentroidSettings], Bench], monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    monkeypatch.setattr("serve.states.observing.FLUSH_S", 0.05)
    bench = auto(CentroidSettings(reference_count=4, min_count=4, used_by_auto=used))
    put(bench, "maths", 1.5, dispatch=CARD)
    sports = put(bench, "sports", 0.5)  # its card says nothing
    noise = np.random.default_rng(1)

    def state_of(tokens: Sequence[int]) -> np.ndarray:
        at = int(tokens[0] == 2)  # a chat's prompt begins with 1, as texts of sports do
        return (np.eye(4)[at] * 9 + 0.1 * noise.normal(size=4)).astype(np.float32)

    bench.backbone.state_of = state_of

    async def talk(client: httpx.AsyncClient) -> None:
        assert (await chat(client))["dispatch"] == "abstained"
        for task, token in (("sports", 1), ("other", 2)):
            body = {"model": "tiny", "input": [[token]] * 5, "task": task, "pooling": "mean"}
            assert (await client.post("/v1/hidden_states", json=body)).json()["task"]["observed"]

        async def chosen() -> bool:
            return (await chat(client))["adapter"] == [[sports, 1.0]]

        if used:
            await soon(chosen)
        else:
            await asyncio.sleep(0.2)
            assert not await chosen()

    bench.run(talk)


def test_a_card_whose_layer_is_counted_from_the_end_learns_as_well(
    auto: Callable[[CentroidSettings], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.states.observing.FLUSH_S", 0.05)
    bench = auto(CentroidSettings(reference_count=4, min_count=4, used_by_auto=True))
    maths = put(bench, "maths", 1.5, dispatch=CARD)
    assert CARD["layer"] == -1
    bench.backbone.state_of = lambda _: np.array([9, -9, 0, 0], np.float32)  # across from the card's centroid, ones

    async def talk(client: httpx.AsyncClient) -> None:
        assert (await chat(client))["dispatch"] == "abstained"
        body = {"model": "tiny", "input": [[1]] * 5, "task": "maths", "pooling": "mean"}
        assert (await client.post("/v1/hidden_states", json=body)).json()["task"]["observed"]

        async def chosen() -> bool:
            return (await chat(client))["adapter"] == [[maths, 1.0]]

        await soon(chosen)

    bench.run(talk)
