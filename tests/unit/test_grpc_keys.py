"""Keys over gRPC: the same keys, scopes, quotas and tenants as over HTTP, by the metadata `authorization`."""

from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.door_settings import KeySettings
from serve.grpc_door.messages import message_of, tree_of
from serve.protos import metasepia_pb2 as pb
from serve.protos.metasepia_pb2_grpc import MetasepiaStub
from tests.grpc_doors import GrpcBench, details_of
from tests.keys import KeyedBench

CONTEXT = {"examples": [{"text": "good cat", "label": "a"}, {"text": "bad saw", "label": "b"}]}


def _shown(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


async def _refused(call: Any) -> tuple[grpc.StatusCode, dict[str, Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), details_of(raised.value)


def test_a_key_is_asked_for_and_says_what_may_be_done_and_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with KeyedBench(tmp_path) as bench:
        ours, theirs, admin = bench.key("us", "contexts"), bench.key("them", "contexts"), bench.key("us", "admin")

        async def talk(channel: grpc.aio.Channel) -> None:
            stub = MetasepiaStub(channel)
            asked = message_of(pb.CreateContextRequest, CONTEXT, strict=True)
            code, details = await _refused(stub.CreateContext(asked))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")
            code, details = await _refused(stub.ListModels(pb.ListModelsRequest(), metadata=_shown(ours)))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.PERMISSION_DENIED, "INSUFFICIENT_SCOPE")
            made = await stub.CreateContext(asked, metadata=_shown(ours))
            mine = pb.GetContextRequest(id=made.id)
            assert (await stub.GetContext(mine, metadata=_shown(admin))).id == made.id
            code, _ = await _refused(stub.GetContext(mine, metadata=_shown(theirs)))
            assert code == grpc.StatusCode.NOT_FOUND
            assert (await stub.GetVersion(pb.GetVersionRequest())).version  # open to everyone

        GrpcBench(bench, monkeypatch).run(talk)


def test_a_quota_that_is_spent_is_resource_exhausted_with_the_time_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with KeyedBench(tmp_path, KeySettings(required=True, requests_per_minute=2)) as bench:
        key = bench.key("us", "infer")

        async def talk(channel: grpc.aio.Channel) -> None:
            stub = MetasepiaStub(channel)
            for _ in range(2):
                await stub.ListExperts(pb.ListExpertsRequest(), metadata=_shown(key))
            code, details = await _refused(stub.ListExperts(pb.ListExpertsRequest(), metadata=_shown(key)))
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert details["RetryInfo"].retry_delay.seconds >= 1

        GrpcBench(bench, monkeypatch).run(talk)


def test_keys_are_made_listed_used_and_revoked_and_both_doors_tell_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with KeyedBench(tmp_path) as bench:
        admin = bench.key("us", "admin")

        async def talk(channel: grpc.aio.Channel) -> None:
            stub, shown = MetasepiaStub(channel), _shown(admin)
            wanted = pb.CreateKeyRequest(tenant="them", scopes=["infer"], label="ci", tokens_per_day=2**40)
            made = await stub.CreateKey(wanted, metadata=shown)
            assert (made.tenant, made.tokens_per_day) == ("them", 2**40)
            await stub.ListExperts(pb.ListExpertsRequest(), metadata=_shown(made.key))
            one, every = pb.GetKeyRequest(id=made.id), pb.ListKeysRequest(limit=5)
            shapes = {
                "/v1/usage": await stub.GetUsage(pb.GetUsageRequest(tenant="them", limit=3), metadata=shown),
                "/v1/keys": await stub.ListKeys(every, metadata=shown),
                f"/v1/keys/{made.id}": await stub.GetKey(one, metadata=shown),
            }
            assert shapes["/v1/usage"].data[0].requests == 1
            transport = httpx.ASGITransport(app=bench.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://door", headers=dict(shown)) as client:
                for path, ours in shapes.items():
                    http = (await client.get(path, params={"tenant": "them"} if "usage" in path else None)).json()
                    assert message_of(type(ours), http, strict=True) == ours, tree_of(ours)
            assert (await stub.RevokeKey(pb.RevokeKeyRequest(id=made.id), metadata=shown)).deleted
            code, _ = await _refused(stub.ListExperts(pb.ListExpertsRequest(), metadata=_shown(made.key)))
            assert code == grpc.StatusCode.UNAUTHENTICATED

        GrpcBench(bench, monkeypatch).run(talk)
