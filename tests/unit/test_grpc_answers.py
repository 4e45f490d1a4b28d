"""Both doors answer alike: every call over HTTP and over gRPC, on two doors that have seen the same."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import message_factory

from metasepia.embedding import probes
from serve.grpc_door.messages import message_of, tree_of
from serve.grpc_door.methods import SERVICE, VARIANTS
from serve.operations import operations
from serve.protos import generate
from serve.protos import metasepia_pb2 as pb
from serve.protos.metasepia_pb2_grpc import MetasepiaStub
from tests.doors import Bench
from tests.grpc_doors import GrpcBench
from tests.tasks import PROBES, a_task_bench, data_set
from tests.unit.test_gateway_searches import EXAMPLES, MATHS, QUICK, a_bench
from tests.unit.test_prompts import write_byte_tokenizer

ROOT = Path(__file__).parents[2]
METHODS = {one.name: one for one in SERVICE.methods}
Ask = Callable[..., Awaitable[Any]]

REVIEWS = [("it broke", "bad"), ("so very kind", "good"), ("charged", "bad"), ("fast, lovely, kind", "good")]
LABELLED = [{"text": text, "label": label} for text, label in REVIEWS]
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 7}
VOLATILE = ("created", "build_ms", "deleted_at", "created_unix_s", "unix_s", "uptime_s", "checked_ago_s", "seconds")
"""Clocks; and `request`, the digest of a body, which the two doors spell in different ways."""


def _plain(tree: Any) -> Any:
    """Without clocks, and without what protobuf does not tell from unset: nulls, zeros, empty texts and lists."""
    if isinstance(tree, dict):
        kept = {key: _plain(value) for key, value in tree.items() if key not in (*VOLATILE, "request")}
        return {key: value for key, value in kept.items() if value not in (None, 0, "", [], {})} or None
    if isinstance(tree, list):
        return [_plain(one) for one in tree]
    if isinstance(tree, tuple):  # a file, and the clock in an Arrow stream's metadata
        return tree[0], re.sub(rb'"created": \d+', b"", tree[1])
    return tree.partition("-")[0] if isinstance(tree, str) and tree.startswith(("chatcmpl-", "cmpl-")) else tree


def _over_http(bench: Bench, client: httpx.AsyncClient) -> Ask:
    table = {one.name: one for one in operations(bench.door)}

    async def ask(name: str, /, **fields: Any) -> Any:
        variant = VARIANTS.get(name)
        operation = table[variant.of if variant else name]
        path = operation.path.replace(":path", "").format(**fields)
        rest = {key: value for key, value in fields.items() if f"{{{key}" not in operation.path}
        sent: dict[str, Any] = {"json": rest | dict(variant.body if variant else {})}
        if "file" in rest:
            sent = {"files": {key: (None if isinstance(one, str) else key, one) for key, one in rest.items()}}
        elif operation.method in ("GET", "DELETE"):
            sent = {"params": rest}
        accept = {"accept": variant.accept} if variant else None
        answer = await client.request(operation.method, path, headers=accept, **sent)
        assert answer.status_code < 300, answer.text
        if METHODS[name].output_type is pb.Content.DESCRIPTOR:
            return answer.headers["content-type"], answer.content
        kind = message_factory.GetMessageClass(METHODS[name].output_type)
        if METHODS[name].server_streaming:
            lines = answer.text.strip().split("\n\n")
            assert lines.pop() == "data: [DONE]"
            trees = [json.loads(line.removeprefix("data: ")) for line in lines]
        else:
            trees = [answer.json()]
        for tree in trees:
            message_of(kind, tree, strict=True)  # there is a field for all of it
        return trees if METHODS[name].server_streaming else trees[0]

    return ask


def _over_grpc(channel: grpc.aio.Channel) -> Ask:
    stub = MetasepiaStub(channel)

    async def ask(name: str, /, **fields: Any) -> Any:
        method = METHODS[name]
        if method.client_streaming:
            card, file = json.loads(fields.pop("card", "null")), fields.pop("file")
            first = pb.ExpertUpload(file=file[:10], **fields)
            if card is not None:
                first.card.update(card)
            parts = [first, *(pb.ExpertUpload(file=file[at : at + 100]) for at in range(10, len(file), 100))]
            return tree_of(await getattr(stub, name)(iter(parts)))
        asked = message_of(message_factory.GetMessageClass(method.input_type), fields, strict=True)
        call = getattr(stub, name)(asked, timeout=20)
        if not method.server_streaming:
            return tree_of(await call)
        messages = [one async for one in call]
        if method.output_type is pb.Content.DESCRIPTOR:
            return messages[0].content_type, b"".join(one.data for one in messages)
        return [tree_of(one) for one in messages]

    return ask


async def _contexts(ask: Ask) -> list[Any]:
    made = await ask("CreateContext", examples=LABELLED, unlabelled=[{"text": "well"}], seed=2**60)
    more = await ask("ExtendContext", id=made["id"], examples=LABELLED[:1])
    inputs = [{"text": "so kind"}, {"text": "it is broken"}]
    return [
        made,
        more,
        await ask("ListContexts", limit=1),
        await ask("GetContext", id=made["id"]),
        await ask("ListContextExamples", id=made["id"], begin=1, limit=2),
        await ask("Classify", model=made["id"], inputs=inputs, explain=True, abstain_below=1.0),
        await ask("Classify", examples=LABELLED, inputs=inputs, explain=False, seed=0),
        await ask("Classify", examples=[{"vector": [1, -2], "label": "a"}, {"vector": [0.5, 3], "label": "b"}],
                  inputs=[{"vector": [1, 0]}]),
        await ask("GetModel", model=made["id"]),
        await ask("DeleteContext", id=made["id"]),
    ]  # fmt: skip


async def _answers(ask: Ask) -> list[Any]:
    tokens = {"layers": [0, -1], "input": ["ab", [97, 98, 99]]}
    return [
        await ask("CreateChatCompletion", **CHAT, temperature=0, n=2, stop=["zz"]),
        await ask("CreateChatCompletion", **CHAT, logprobs=True, top_logprobs=2, max_tokens=9),
        await ask("StreamChatCompletion", **CHAT, stream_options={"include_usage": True}, logprobs=True),
        await ask("StreamChatCompletion", **CHAT | {"model": "tiny:maths"}),
        await ask("CreateCompletion", model="tiny", prompt=["hi", [97]], logprobs=2, max_tokens=9, seed=1),
        await ask("CreateCompletion", model="tiny", prompt=["hi"], echo=True, logprobs=0, max_tokens=9, seed=1),
        await ask("StreamCompletion", model="tiny", prompt=["hi"], seed=3),
        await ask("CreateEmbeddings", model="minilm-fake", input=["one", "two three"]),
        await ask("CreateEmbeddings", model="tiny", input=[[97, 98]], dimensions=2),
        await ask("CreateHiddenStates", model="tiny", task="reviews", **tokens),
        await ask("CreateHiddenStates", model="tiny", task="reviews", observe=False, pooling="mean", input=["x"]),
        await ask("StreamHiddenStates", model="tiny", input=["one"]),
        await ask("ListObservedTasks"),
        await ask("GetObservedTask", task="reviews"),
        await ask("DeleteObservedTask", task="reviews"),
        await ask("ListModels"),
        await ask("GetModel", model="tiny:mix@" + "a" * 64),
        await ask("CreateMixture", backbone="tiny", weights={"maths": 0.25}),
        await ask("ListJobs", kind="search", limit=3),
        await ask("GetHealth"),
        (await ask("GetMetrics"))[0],  # its numbers are all of this process
        sorted(await ask("GetStatus")),
        await ask("GetVersion"),
    ]


async def _experts(ask: Ask) -> list[Any]:
    card = json.dumps({"description": "sums", "facts": {"runs": [1, 2.5, None, True]}})
    job = await ask("CreateSearch", backbone="tiny", examples=EXAMPLES, experts=["maths", "law"], base=False, **QUICK)
    done = job
    while done["status"] in ("queued", "running"):
        await asyncio.sleep(0.01)
        done = await ask("GetSearch", id=job["id"])
    return [
        job["id"],
        done,
        await ask("ListSearches"),
        await ask("ListJobs", kind="search"),
        await ask("GetJob", id=job["id"]),
        await ask("GetSearchTrace", id=job["id"]),
        await ask("GetSearchPicture", id=job["id"]),
        await ask("CancelSearch", id=job["id"]),
        await ask("AddExpert", name="sums", file=MATHS.to_bytes(), card=card),
        await ask("ReplaceExpert", name="sums", file=MATHS.to_bytes()),
        await ask("ListExperts", limit=2, after="law"),
        await ask("GetExpert", name="sums"),
        await ask("GetExpertContent", name="sums"),
        await ask("CreateMixture", backbone="tiny", weights={"maths": [0.25, 0.5], "base": [0.75, 0.5]}, name="both"),
        await ask("ListMixtures"),
        await ask("GetMixture", digest="both"),
        await ask("DeleteMixture", digest="both"),
        await ask("DeleteExpert", name="sums"),
    ]


async def _tasks(ask: Ask) -> list[Any]:
    prompt = {"template": "{text}?", "labels": {"tool": "no", "animal": "yes"}}
    asked = await ask("CreateTask", name="asked", model="tiny", prompt=prompt)
    while asked["status"] in ("queued", "running"):
        await asyncio.sleep(0.01)
        asked = await ask("GetTask", id="asked")
    shown = await ask("GetTask", id="asked", include="vector")
    return [
        asked,
        shown,
        await ask("CreateTask", name="topics", examples=data_set("topic"), method="agreement"),
        await ask("ListTasks", limit=5, include="vector"),
        await ask("ListProbes"),
        await ask("GetTaskMap", method="agreement"),
        await ask("CompareTasks", tasks=["topics", shown]),
        await ask("FindNearestTasks", id="topics", k=3, kind="prompt"),
        await ask("DeleteTask", id="topics"),
    ]


Scenario = tuple[Callable[[Path], Bench], Callable[[Ask], Awaitable[list[Any]]]]


def _answering(root: Path) -> Bench:
    made = Bench(write_byte_tokenizer(root))
    made.says("hello €")
    return made


SCENARIOS: dict[str, Scenario] = {
    "contexts": (lambda root: Bench(write_byte_tokenizer(root)).with_contexts(root / "registry"), _contexts),
    "answers": (_answering, _answers),
    "experts": (a_bench, _experts),
    "tasks": (a_task_bench, _tasks),
}


ELSEWHERE = {"CreateKey", "ListKeys", "GetKey", "RevokeKey", "GetUsage"}
"""`test_grpc_keys`: a door without keys refuses them."""


def test_no_call_is_left_out():
    asked = set(ELSEWHERE)
    for _, scenario in SCENARIOS.values():
        asked |= set(scenario.__code__.co_consts)
    assert set(METHODS) <= asked


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_doors_answer_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "shipped", lambda: PROBES)
    make, scenario = SCENARIOS[name]
    benches = [make(_folder(tmp_path / side)) for side in ("http", "grpc")]
    http = benches[0].run(lambda client: scenario(_over_http(benches[0], client)))
    ours = GrpcBench(benches[1], monkeypatch).run(lambda channel: scenario(_over_grpc(channel)))
    assert len(http) == len(ours) > 1
    for one, other in zip(http, ours, strict=True):
        assert _plain(other) == _plain(one)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_service_has_every_operation_of_the_table_under_its_name(tmp_path: Path):
    table = {one.name for one in operations(_answering(tmp_path).door)}
    assert set(METHODS) - set(VARIANTS) == table
    assert {one.of for one in VARIANTS.values()} <= table


def test_each_field_of_a_path_is_a_field_of_the_request(tmp_path: Path):
    for one in operations(_answering(tmp_path).door):
        named = {part.strip("{}").partition(":")[0] for part in one.path.split("/") if part.startswith("{")}
        assert named <= set(METHODS[one.name].input_type.fields_by_name), one.name


def test_what_is_committed_is_what_the_compiler_writes(tmp_path: Path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools has the compiler")
    generate.generate(tmp_path)
    for name in generate.WRITTEN:
        assert (tmp_path / "serve/protos" / name).read_text() == (ROOT / "serve/protos" / name).read_text(), name
