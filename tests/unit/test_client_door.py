"""The client over the door itself, in this process: every call, and inputs as people hold them."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from starlette.routing import compile_path

from actors.messages import Classify
from cluster.door_settings import HttpSettings
from metasepia.client import AsyncClient, BadInput, Client, PartlyDone, Refused, errors
from metasepia.client.calls import CALLS, ONCE, Ask, Request
from metasepia.client.client import Calls
from serve.operations import operations
from tests.doors import Bench
from tests.keys import KeyedBench
from tests.listening import listening
from tests.unit.test_gateway_experts import an_expert
from tests.unit.test_prompts import write_byte_tokenizer

EXAMPLES = [("aaaa", "long"), ("a", "short")]
TEXTS = ["aaaaaa", "b", "cccc", "d"]
LABELS = ["long", "short", "long", "short"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")


def talk(bench: Bench, say: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        transport = httpx.ASGITransport(app=bench.app)
        async with AsyncClient("http://door", transport=transport, **options) as client:
            return await say(client)

    return asyncio.run(main())


# -- every call --------------------------------------------------------------------------------------------------------

ID: dict[str, Any] = {"id": "x"}
NAME: dict[str, Any] = {"name": "x"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "classify": {"inputs": ["x"], "model": "ctx-x"},
    "embed": {"inputs": ["x"], "model": "x"},
    "hidden_states": {"inputs": ["x"], "model": "x"},
    "chat": {"messages": "x", "model": "x"},
    "complete": {"prompt": "x", "model": "x"},
    "stream_chat": {"messages": "x", "model": "x"},
    "stream_complete": {"prompt": "x", "model": "x"},
    "create_context": {"examples": EXAMPLES},
    "extend_context": ID | {"examples": EXAMPLES},
    "context": ID, "context_examples": ID, "delete_context": ID,
    "add_expert": NAME, "replace_expert": NAME, "expert": NAME, "expert_content": NAME, "delete_expert": NAME,
    "download_expert": NAME | {"directory": "unused"},
    "create_mixture": {"weights": {"base": 1.0}, "backbone": "x"},
    "mixture": ID, "delete_mixture": ID,
    "create_search": {"examples": [], "backbone": "x"},
    "wait_for_search": {"search": "x"}, "search": ID, "search_trace": ID, "search_picture": ID, "cancel_search": ID,
    "create_task": {"model": "ctx-x"}, "wait_for_task": {"task": "x"}, "task": ID, "nearest_tasks": ID,
    "compare_tasks": {"tasks": ["x", "y"]}, "delete_task": ID,
    "observed_task": {"task": "x"}, "delete_observed_task": {"task": "x"},
    "model": ID, "key": ID, "revoke_key": ID, "create_key": {"tenant": "x", "scopes": ["infer"]}, "job": ID,
    "json": {"method": "GET", "path": "/version"}, "everything": {"path": "/v1/experts"},
}  # fmt: skip
"""Of the verbs that need some."""


def first_request(verb: str, expert: Path) -> Request:
    arguments = dict(ARGUMENTS.get(verb, {}))
    if verb in ("add_expert", "replace_expert"):
        arguments["path"] = expert
    made = Calls.__dict__[verb]._plan(**arguments)
    if isinstance(made, Request):
        return made
    step = next(made)
    while not isinstance(step, Ask):  # a large input's parts, carried out together
        step = next(step.parts[0])
    return step.request


def test_the_table_of_calls_is_the_servers(bench: Bench):
    table = operations(bench.door)
    assert {one.name: (one.method, one.path) for one in table} == dict(CALLS)
    assert {one.name for one in table if not one.replayed} == set(ONCE)


def test_every_call_of_the_server_is_reached_by_a_method(tmp_path: Path):
    expert = tmp_path / "expert.safetensors"
    expert.write_bytes(an_expert().to_bytes())
    verbs = [name for name, one in Calls.__dict__.items() if hasattr(one, "_plan")]
    reached: set[str] = set()
    for verb in verbs:
        asked = first_request(verb, expert)
        for name, (method, path) in CALLS.items():
            if method == asked.method and compile_path(path)[0].match(asked.path):
                reached.add(name)
                break
    assert reached == set(CALLS)


# -- classification ----------------------------------------------------------------------------------------------------


def test_a_frame_comes_back_with_its_order_its_index_and_its_columns(bench: Bench):
    frame = pd.DataFrame({"n": [3, 1, 2, 0], "review": TEXTS}, index=["w", "a", "z", "b"])
    found = talk(
        bench, lambda client: client.classify(frame, text="review", examples=_frame_of_examples(), batch_size=1)
    )
    assert list(found.columns) == ["n", "review", "label", "probability_long", "probability_short"]
    assert list(found.index) == ["w", "a", "z", "b"] and found["label"].tolist() == LABELS
    pd.testing.assert_frame_equal(found[["n", "review"]], frame)
    np.testing.assert_allclose(found.filter(like="probability").sum(axis=1), 1.0)
    assert "label" not in frame


def _frame_of_examples() -> pd.DataFrame:
    return pd.DataFrame({"review": [text for text, _ in EXAMPLES], "label": [label for _, label in EXAMPLES]})


def test_an_index_with_duplicates_and_several_levels_is_kept(bench: Bench):
    for index in (pd.Index([7, 7, 7, 7]), pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["x", "y"])):
        frame = pd.DataFrame({"review": TEXTS}, index=index)
        found = talk(bench, lambda client, frame=frame: client.classify(frame, text="review", examples=EXAMPLES))
        assert found.index.equals(index) and found["label"].tolist() == LABELS


def test_arrow_tables_series_arrays_and_lists_are_read_alike(bench: Bench):
    table = pa.table({"review": TEXTS, "n": [1, 2, 3, 4]})
    found = talk(bench, lambda client: client.classify(table, text="review", examples=EXAMPLES))
    assert found.schema.names == ["review", "n", "label", "probability_long", "probability_short"]
    assert found["label"].to_pylist() == LABELS and found.select(["review", "n"]).equals(table)
    for inputs in (
        TEXTS,
        pd.Series(TEXTS),
        pa.array(TEXTS),
        np.array(TEXTS),
        tuple(TEXTS),
        [{"text": t} for t in TEXTS],
    ):
        answer = talk(bench, lambda client, inputs=inputs: client.classify(inputs, examples=EXAMPLES))
        assert answer.labels == LABELS and answer.classes == ("long", "short")
    assert talk(bench, lambda client: client.classify("b", examples=EXAMPLES)).labels == ["short"]


def test_vectors_are_inputs_too(bench: Bench):
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]], np.float32)
    examples = [(vectors[0], "x"), (vectors[1], "y")]
    assert talk(bench, lambda client: client.classify(vectors, examples=examples)).labels == ["x", "y", "x"]
    frame = pd.DataFrame({"v": list(vectors), "label": ["x", "y", "x"]})
    asked: Any = {"vector": "v", "examples": frame[:2], "prefix": "found_"}
    assert talk(bench, lambda client: client.classify(frame, **asked))["found_label"].tolist() == ["x", "y", "x"]


def test_vectors_travel_as_arrow_and_are_answered_as_those_in_json(bench: Bench):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((700, 300)).astype(np.float32)
    examples = [(vectors[0], "x"), (vectors[1], "y")]
    asked: list[httpx.Request] = []

    async def say(client: AsyncClient) -> Any:
        client._by._http.event_hooks["request"] = [lambda request: _noted(asked, request)]
        return await client.classify(vectors, examples=examples), await client.classify(
            [{"vector": one.tolist()} for one in vectors], examples=examples, unlabelled=[vectors[2]]
        )

    by_arrow, by_json = talk(bench, say)
    assert by_arrow.labels == by_json.labels and by_arrow.probabilities == by_json.probabilities
    assert [one.headers["content-type"].split("/")[1][:4] for one in asked][:2] == ["vnd.", "vnd."]
    assert asked[-1].headers["content-type"] == "application/json"
    vectors[5, 7] = np.inf
    with pytest.raises(BadInput, match=r"inputs\[5\]: a number of the vector is not finite"):
        talk(bench, lambda client: client.classify(vectors, examples=examples))


async def _noted(asked: list[httpx.Request], request: httpx.Request) -> None:
    asked.append(request)


@pytest.mark.parametrize(
    ("inputs", "options", "complaint"),
    [
        (["x", None], {}, r"inputs\[1\]: there is no text \(None\)"),
        (["x", float("nan")], {}, r"inputs\[1\]: there is no text \(nan\)"),
        (pd.DataFrame({"t": ["x", None]}, index=["p", "q"]), {"text": "t"}, r"t\[q\]: there is no text"),
        (pd.DataFrame({"t": ["x"]}), {"text": "review"}, r"no column 'review'; there are 't'"),
        (pd.DataFrame({"t": ["x"]}), {}, "name the column that holds the inputs; there are 't'"),
        (pd.DataFrame([["x", "y"]], columns=["t", "t"]), {"text": "t"}, "2 columns are named 't'"),
        (pd.DataFrame({"t": [1]}), {"text": "t"}, r"t\[0\]"),
        (pd.DataFrame({"t": ["x"], "label": ["y"]}), {"text": "t"}, "a column 'label' is there already"),
        (pa.table({"t": pa.array(["x", None])}), {"text": "t"}, r"t\[1\]: there is no text"),
        ([], {}, "there are none"),
        (7, {}, "int is no list of inputs"),
        (["x"], {"text": "t"}, "the inputs are no table"),
        (["x"], {"exemples": []}, "exemples: is no argument of classify"),
        ({"text": "x"}, {}, "must be a list"),
    ],
)
def test_inputs_that_nothing_can_be_asked_with_are_named_before_anything_is_sent(
    bench: Bench, inputs: Any, options: dict[str, Any], complaint: str
):
    asked: dict[str, Any] = {"examples": EXAMPLES} | options
    with pytest.raises(BadInput, match=complaint):
        talk(bench, lambda client: client.classify(inputs, **asked))
    assert bench.reasoning.asked == []


def test_labels_that_are_numbers_are_named_with_the_way_out(bench: Bench):
    frame = pd.DataFrame({"text": ["aaaa", "a"], "stars": [5, 1]})
    with pytest.raises(BadInput, match=r"stars\[0\]: 5.*labels as texts"):
        talk(bench, lambda client: client.create_context(frame, text="text", label="stars"))


def test_a_context_is_made_asked_extended_and_deleted(bench: Bench):
    async def say(client: AsyncClient) -> None:
        context = await client.create_context(_frame_of_examples(), text="review")
        assert context.info.self_check is not None and context.info.classes == ["long", "short"]
        frame = pd.DataFrame({"t": TEXTS})
        assert (await context.classify(frame, text="t"))["label"].tolist() == LABELS
        found = await context.classify(["b"], explain=True, abstain_below=1.0)
        assert found.explanations[0] is not None and len(found.explanations[0].influence) == 2
        assert {(one["text"], one["label"]) for one in await context.examples()} == set(EXAMPLES)
        more = await client.extend_context(context.id, [("cccccccc", "longer")])
        assert more.info.num_examples == 3 and more.id != context.id
        assert {one.id for one in await client.contexts()} == {context.id, more.id}
        assert (await context.delete()).deleted
        with pytest.raises(errors.Deleted):
            await context.classify(["b"])

    talk(bench, say)


def test_a_request_without_confidence_abstains(bench: Bench):
    bench.reasoning.certainty = 0.6
    found = talk(bench, lambda client: client.classify(TEXTS, examples=EXAMPLES, abstain_below=0.7))
    assert found.labels == [None] * 4 and found.confidences == pytest.approx([0.6] * 4)


def test_parts_beyond_the_servers_limits_are_halved(tmp_path: Path):
    http = HttpSettings(max_inputs=300, max_body_mib=0.05)
    bench = Bench(write_byte_tokenizer(tmp_path), http).with_contexts(tmp_path / "registry")
    found = talk(bench, lambda client: client.classify(["b" * 150] * 1000, examples=EXAMPLES, batch_size=1000))
    assert len(found) == 1000 and set(found.labels) == {"long"}
    assert max(len(one.queries) for one in bench.reasoning.asked if isinstance(one, Classify)) <= 300


def test_a_bad_text_among_many_loses_its_part_alone(bench: Bench):
    texts = ["b"] * 10
    texts[7] = "word " * 9  # beyond the encoder's window
    with pytest.raises(PartlyDone, match="8 of 10 items are done") as partly:
        talk(bench, lambda client: client.classify(texts, examples=EXAMPLES, batch_size=2))
    error = partly.value.failures[0].error
    assert isinstance(error, Refused) and (error.code, error.param) == ("context_length_exceeded", "inputs[7]")
    assert partly.value.partial.labels == ["short"] * 6 + [None, None] + ["short"] * 2
    frame = pd.DataFrame({"t": texts})
    with pytest.raises(PartlyDone) as partly:
        talk(bench, lambda client: client.classify(frame, text="t", examples=EXAMPLES, batch_size=2))
    assert partly.value.partial["label"].isna().tolist() == [False] * 6 + [True, True] + [False] * 2


# -- vectors and states ------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_one_request_however_they_are_cut(bench: Bench):
    whole = talk(bench, lambda client: client.embed(TEXTS, model="minilm-fake"))
    cut = talk(
        bench, lambda client: client.embed(pd.DataFrame({"t": TEXTS}), text="t", model="minilm-fake", batch_size=1)
    )
    np.testing.assert_array_equal(whole.vectors, cut.vectors)
    assert whole.vectors.dtype == np.float32 and len(cut.receipts) == 4
    lengths = np.array([len(text) for text in TEXTS])
    np.testing.assert_allclose(whole.vectors[:, 0] / whole.vectors[:, 1], lengths, rtol=1e-6)
    assert whole.to_arrow().to_pylist() == whole.vectors.tolist()
    by_ids = talk(bench, lambda client: client.embed([[1, 2, 3], [4]], model="tiny"))
    assert by_ids.vectors.shape == (2, 4)


def test_hidden_states_of_parts_are_numbered_in_the_whole(bench: Bench):
    def ask(**more: Any) -> Any:
        return talk(bench, lambda client: client.hidden_states(TEXTS, model="tiny", layers=[0, -1], **more))

    whole, cut = ask(), ask(batch_size=1)
    assert cut.table.equals(whole.table) and cut.layers == [0, 1] and len(cut.receipts) == 4
    np.testing.assert_array_equal(cut.to_numpy()[:, 0, 0], [len(text) for text in TEXTS])
    every = ask(pooling="none", batch_size=3)
    assert every.to_pandas().groupby("input").size().tolist() == [2 * len(text) for text in TEXTS]
    with pytest.raises(BadInput, match="every token has its states"):
        every.to_numpy()


def test_an_error_at_the_end_of_an_arrow_stream_is_an_error(bench: Bench):
    texts = ["b"] * 80
    asked = 0
    state_of = bench.backbone.state_of

    def fail(tokens: Any) -> np.ndarray:
        nonlocal asked
        asked += 1
        if asked > 70:
            raise errors.ServerFailed(errors.Envelope(500, "x", "x"))
        return state_of(tokens)

    bench.backbone.state_of = fail
    with pytest.raises(errors.ServerFailed):
        talk(bench, lambda client: client.hidden_states(texts, model="tiny"), retries=0)


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_whole_answer_in_pieces(bench: Bench):
    bench.says("hello")

    async def say(client: AsyncClient) -> None:
        whole = await client.chat("hi", model="tiny", seed=3)
        async with client.stream_chat("hi", model="tiny", seed=3) as pieces:
            texts = [piece.text async for piece in pieces]
        assert "".join(texts) == pieces.text == whole.text == "hello" and len(texts) > 1
        assert pieces.usage == whole.usage and pieces.finishes == {0: "stop"}
        assert pieces.receipt is not None and pieces.receipt["backbone"] == whole.receipt["backbone"]
        two = await client.complete("hi", model="tiny", n=2, stop=("l",), max_tokens=5)
        assert [one.text for one in two.choices] == ["he", "he"]

    talk(bench, say)


def test_refusals_carry_what_the_server_said(bench: Bench):
    with pytest.raises(errors.NotFound, match="no model named 'gpt'; known: tiny") as refused:
        talk(bench, lambda client: client.chat("hi", model="gpt"))
    error = refused.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert error.request_id is not None and error.request_id in str(error)
    with pytest.raises(errors.Invalid, match="temperature"):
        talk(bench, lambda client: client.chat("hi", model="tiny", temperature=9.0))
    with pytest.raises(errors.Invalid, match="this field is not known here"):
        talk(bench, lambda client: client.chat("hi", model="tiny", extra={"typo": 1}))


def test_a_call_sent_twice_under_one_key_is_answered_once(bench: Bench):
    bench.says("hello")

    async def say(client: AsyncClient) -> None:
        mine = client.with_options(idempotency_key="mine")
        first, again = await mine.chat("hi", model="tiny"), await mine.chat("hi", model="tiny")
        assert first.id == again.id
        assert (await client.chat("hi", model="tiny")).id != first.id
        with pytest.raises(errors.Conflict):
            await mine.chat("something else", model="tiny")

    talk(bench, say)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_made_used_told_apart_by_its_scopes_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = KeyedBench(tmp_path)
    boss = bench.key("ops", "admin")
    transport = httpx.ASGITransport(app=bench.app)

    async def say() -> None:
        with pytest.raises(errors.Unauthenticated, match="asks for a key"):
            await AsyncClient("http://door", transport=transport).models()
        with pytest.raises(errors.Unauthenticated):
            await AsyncClient("http://door", "msk_nonsense", transport=transport).models()
        async with AsyncClient("http://door", boss, transport=transport) as admin:
            made = await admin.create_key(tenant="anna", scopes=["infer"], label="for a test")
            assert made.key is not None and made.key not in repr(made)
            monkeypatch.setenv("METASEPIA_KEY", made.key)
            anna = AsyncClient("http://door", transport=transport)
            assert "tiny" in [one.id for one in await anna.models()]
            with pytest.raises(errors.Forbidden, match="scope") as forbidden:
                await anna.create_context(EXAMPLES)
            assert (forbidden.value.status, forbidden.value.code) == (403, "insufficient_scope")
            with pytest.raises(errors.Forbidden):
                await anna.keys()
            assert {one.tenant for one in await anna.usage()} <= {"anna"}
            assert (await admin.key(made.id)).status == "active" and len(await admin.keys()) == 2
            assert (await admin.revoke_key(made.id)).deleted
            with pytest.raises(errors.Unauthenticated):
                await anna.models()

    asyncio.run(say())


def test_a_quota_that_is_spent_is_not_waited_for_beyond_the_deadline(tmp_path: Path):
    bench = KeyedBench(tmp_path)
    key = bench.key("anna", "infer", requests_per_minute=1)

    async def say() -> None:
        async with AsyncClient("http://door", key, transport=httpx.ASGITransport(app=bench.app), timeout_s=0.5) as anna:
            await anna.models()
            with pytest.raises(errors.QuotaExceeded) as spent:
                await anna.models()
            assert spent.value.retry_after_s is not None and 0.5 < spent.value.retry_after_s <= 60

    asyncio.run(say())


# -- by threads --------------------------------------------------------------------------------------------------------


def test_experts_and_mixtures_go_in_and_come_back_by_the_blocking_client(tmp_path: Path):
    bench = Bench(write_byte_tokenizer(tmp_path)).with_experts(tmp_path / "registry", HttpSettings(max_upload_mib=1.0))
    expert = an_expert(1.25)
    (tmp_path / "expert.safetensors").write_bytes(expert.to_bytes())
    with listening(bench.app) as url, Client(url) as client:
        added = client.add_expert("maths", tmp_path, card={"description": "sums"})
        assert (added.model, added.digest, added.description) == ("tiny:maths", expert.digest, "sums")
        assert client.download_expert("maths", tmp_path / "out").digest == expert.digest
        assert (tmp_path / "out" / "expert.safetensors").read_bytes() == expert.to_bytes()
        assert json.loads((tmp_path / "out" / "card.json").read_text())["description"] == "sums"
        mixed = client.create_mixture({"maths": 0.5, "base": 0.5}, backbone="tiny", name="half")
        assert client.mixture("half").digest == mixed.digest and [one.id for one in client.experts()] == ["maths"]
        search = client.create_search(
            [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)],
            backbone="tiny", experts=["maths"], shots=2, population=4, generations=2,
        )  # fmt: skip
        looks: list[str] = []
        done = client.wait_for_search(search, tell=lambda one: looks.append(one.status), poll_s=0.02)
        assert done.status == "done" and done.result is not None and set(looks) <= {"queued", "running"}
        assert len(client.search_trace(search.id)) == done.generations
        assert client.search_picture(search.id).startswith(b"<")
        assert client.delete_mixture("half").deleted and client.delete_expert("maths").deleted
        with pytest.raises(BadInput, match="holds no adapter_model"):
            client.add_expert("x", tmp_path / "registry")
