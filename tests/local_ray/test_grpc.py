"""The laptop's graph over gRPC, by stock clients: generated stubs, grpc.health.v1, reflection."""

import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import psutil
import pyarrow as pa
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from benchmarks import malformed_grpc
from serve.grpc_door.messages import message_of, tree_of
from serve.protos import metasepia_pb2 as pb
from serve.protos.metasepia_pb2_grpc import MetasepiaStub
from tests.grpc_doors import details_of
from tests.local_ray.test_http import _becomes
from tests.requests import BACKBONE, CHAT, CLASSIFY, ENCODER, STORY
from tests.serving import Served

pytestmark = pytest.mark.timeout(600)

SERVICE = "metasepia.v1.Metasepia"
LARGE = [("grpc.max_receive_message_length", 64 << 20)]
TEXTS = [{"text": text} for text in CLASSIFY["inputs"]]


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}", options=LARGE) as made:
        yield made


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Any:
    return MetasepiaStub(channel)


def _chat(body: dict[str, Any], **fields: Any) -> pb.ChatCompletionRequest:
    return message_of(pb.ChatCompletionRequest, body | fields)


def test_a_chat_is_the_same_whole_streamed_and_over_http(served: Served, stub: Any):
    http = served.post("/v1/chat/completions", CHAT).json()
    whole = tree_of(stub.CreateChatCompletion(_chat(CHAT), timeout=60))
    chunks = list(stub.StreamChatCompletion(_chat(CHAT, stream_options={"include_usage": True}), timeout=60))
    text = "".join(one.choices[0].delta.content for one in chunks if one.choices)
    assert text == whole["choices"][0]["message"]["content"] == http["choices"][0]["message"]["content"]
    assert "Paris" in text and len(chunks) > 3
    assert tree_of(chunks[-1].usage) == whole["usage"] == http["usage"]
    for receipt in (whole["receipt"], tree_of(chunks[-1].receipt)):
        assert {
            name: http["receipt"][name] for name in ("backbone", "path", "dtype", "tp_size")
        }.items() <= receipt.items()


def test_vectors_and_states_over_both_doors_are_the_same_numbers(served: Served, stub: Any):
    body: dict[str, Any] = {"model": ENCODER, "input": ["a cat on the mat", "quarterly tax return"]}
    ours = stub.CreateEmbeddings(message_of(pb.EmbeddingsRequest, body), timeout=60)
    http = served.post("/v1/embeddings", body).json()
    assert [list(one.embedding) for one in ours.data] == [one["embedding"] for one in http["data"]]
    asked = message_of(
        pb.HiddenStatesRequest, {"model": BACKBONE, "input": ["one body"], "layers": [3], "pooling": "none"}
    )
    states = stub.CreateHiddenStates(asked, timeout=60).data[0]
    assert list(states.shape) == [len(states.token_ids), 576] and len(states.states) == 576 * len(states.token_ids)
    arrow = b"".join(one.data for one in stub.StreamHiddenStates(asked, timeout=60))
    rows = pa.ipc.open_stream(arrow).read_all()["state"].to_pylist()
    assert [number for row in rows for number in row] == pytest.approx(list(states.states), abs=2e-3, rel=1e-3)


def test_an_expert_goes_up_in_pieces_answers_and_comes_back_in_pieces(stub: Any):
    file = b"".join(one.data for one in stub.GetExpertContent(pb.GetExpertContentRequest(name="noisy"), timeout=60))
    cuts = [file[at : at + 100_000] for at in range(0, len(file), 100_000)]
    assert len(cuts) > 1
    parts = [pb.ExpertUpload(name="up", file=cuts[0]), *(pb.ExpertUpload(file=one) for one in cuts[1:])]
    made = stub.AddExpert(iter(parts), timeout=60)
    try:
        shown = stub.GetExpert(pb.GetExpertRequest(name="noisy"), timeout=60)
        assert made.digest == shown.digest
        answer = stub.CreateChatCompletion(_chat(CHAT, model=made.model), timeout=60)
        assert [one.digest for one in answer.receipt.adapter] == [made.digest]
    finally:
        assert stub.DeleteExpert(pb.DeleteExpertRequest(name="up"), timeout=60).deleted


def test_a_stock_health_client_sees_the_graph_and_its_service(channel: grpc.Channel):
    health: Any = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", SERVICE):
        assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status == serving
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == serving
    watch.cancel()


def test_a_client_that_has_only_reflection_lists_describes_and_calls(served: Served, channel: grpc.Channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    method = DescriptorPool(database).FindServiceByName(SERVICE).FindMethodByName("Classify")
    asked: Any = message_factory.GetMessageClass(method.input_type)()
    for one in CLASSIFY["examples"]:
        asked.examples.add(text=one["text"], label=one["label"])
    for one in TEXTS:
        asked.inputs.add(text=one["text"])
    answer = message_factory.GetMessageClass(method.output_type)
    call: Any = channel.unary_unary(
        f"/{SERVICE}/Classify",
        request_serializer=type(asked).SerializeToString,
        response_deserializer=answer.FromString,
    )
    http = served.post("/v1/classify", CLASSIFY).json()["results"]
    for one, other in zip(call(asked, timeout=60).results, http, strict=True):
        assert (one.label, dict(one.probabilities)) == (other["label"], pytest.approx(other["probabilities"], abs=1e-6))


def test_the_port_is_open_to_this_machine_only(served: Served):
    listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    found = [one.laddr[0] for one in listening if one.laddr and one.laddr[1] == served.grpc_port]
    assert [one.removeprefix("::ffff:") for one in found] == ["127.0.0.1"]


# -- deadlines and clients that leave ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("name", ["CreateChatCompletion", "StreamChatCompletion"])
def test_a_deadline_ends_an_answer_and_its_row(served: Served, stub: Any, name: str, metadata: bool):
    limit: dict[str, Any] = {"metadata": [("x-request-timeout-seconds", "1")]} if metadata else {"timeout": 1}
    begin = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        answer = getattr(stub, name)(_chat(STORY), **limit)
        assert len(list(answer)) > 0
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    if metadata:
        assert details_of(raised.value)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
    assert time.monotonic() - begin < 4
    assert _becomes(served, num_live=0)


@pytest.mark.parametrize("name", ["CreateChatCompletion", "StreamChatCompletion"])
def test_a_client_that_leaves_takes_its_row_along(served: Served, stub: Any, name: str):
    if name.startswith("Stream"):
        call = stub.StreamChatCompletion(_chat(STORY))
        assert len([next(call) for _ in range(3)]) == 3
    else:
        call = stub.CreateChatCompletion.future(_chat(STORY))
    assert _becomes(served, num_live=1)
    call.cancel()
    assert _becomes(served, num_live=0)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_more_than_can_wait_is_refused_with_the_time_to_come_back(served: Served, stub: Any):
    calls: list[Any] = []
    try:
        while not (refused := [one for one in calls if one.done()]) and len(calls) < 400:
            calls.append(stub.CreateChatCompletion.future(_chat(STORY), timeout=60))
            time.sleep(0.005)
        assert refused[0].code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(refused[0].exception())["RetryInfo"].retry_delay.seconds >= 1
    finally:
        for one in calls:
            one.cancel()
    assert _becomes(served, num_live=0, timeout_s=30)


def _code(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code()


def test_unknown_calls_and_what_is_too_long_have_statuses(channel: grpc.Channel, stub: Any):
    assert _code(lambda: channel.unary_unary(f"/{SERVICE}/Fly")(b"", timeout=20)) == grpc.StatusCode.UNIMPLEMENTED
    long = pb.ClassifyRequest(inputs=[pb.Input(text="x" * (5 << 20))])  # beyond gRPC's usual 4 MiB: refused in words
    with pytest.raises(grpc.RpcError, match="examples: this field is required"):
        stub.Classify(long, timeout=60)
    raw = channel.unary_unary(f"/{SERVICE}/Classify")
    assert _code(lambda: raw(b"\x00" * (65 << 20), timeout=60)) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_few_hundred_malformed_calls_get_typed_refusals_and_leave_the_door_well(served: Served, stub: Any):
    tally = malformed_grpc.send("127.0.0.1", served.grpc_port, num=300, seed=1)
    assert tally.num == 300 and not tally.wrong, tally.wrong
    assert stub.GetHealth(pb.GetHealthRequest(), timeout=30).status == "ready"
    assert httpx.get(f"{served.url}/health", timeout=30).status_code == 200
