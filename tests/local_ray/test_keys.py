"""Keys across processes: made and revoked is durable, and known to every gateway within a second."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import registry
from actors.registry import RegistryClient
from cluster import settings
from cluster.door_settings import KeySettings
from metasepia.access.keys import Key, NewKey, mint
from metasepia.errors import Unauthenticated, UnknownName
from serve.access.authentication import Access


@pytest.fixture
def client(cluster: object, tmp_path: Path) -> Iterator[RegistryClient]:
    yield registry.start(settings.read("laptop", {"METASEPIA_HOME": str(tmp_path), "METASEPIA_REGISTRY__CPUS": "0.01"}))
    registry.stop()


async def make(client: RegistryClient, tenant: str = "acme") -> tuple[str, Key]:
    id_, text, sha256 = mint()
    return text, await client.create_key(NewKey(id=id_, sha256=sha256, tenant=tenant, scopes=("infer",)))


async def kill(client: RegistryClient) -> None:
    """And waits for the next one."""
    before = await client.info()
    os.kill(before.pid, signal.SIGKILL)
    while (await client.info()).pid == before.pid:
        await asyncio.sleep(0.05)


def test_a_key_and_its_revocation_survive_sigkill_of_the_writer_behind_the_acknowledgement(client: RegistryClient):
    async def scenario():
        text, key = await make(client)
        await kill(client)
        access = Access(KeySettings(required=True), client)
        assert (await access.identify(f"Bearer {text}")).id == key.id
        await client.revoke_key(key.id)
        await kill(client)
        await access.exchange()
        with pytest.raises(Unauthenticated, match="revoked"):
            await access.identify(f"Bearer {text}")
        with pytest.raises(UnknownName):
            await client.get_key("0" * 16)
        await access.close()

    asyncio.run(scenario())


def test_two_gateways_learn_of_revocations_and_of_each_others_use_within_a_second_and_nothing_counts_twice(
    client: RegistryClient,
):
    async def scenario():
        text, key = await make(client)
        here, there = (Access(KeySettings(required=True, tokens_per_day=1000), client) for _ in range(2))
        for one in (here, there):
            assert (await one.identify(f"Bearer {text}")).id == key.id
        for _ in range(10):
            here.keyring.charge(key, 10, 0)
            await asyncio.sleep(0.05)
        await kill(client)  # in the middle of reports
        there.keyring.charge(key, 0, 50)
        for one in (here, there, here):
            await one.exchange()
        assert here.keyring.limits(key).remaining_tokens == there.keyring.limits(key).remaining_tokens == 850
        (line,) = await client.usage(0, 10**6, tenant="acme", limit=5)
        assert (line.prompt_tokens, line.completion_tokens) == (100, 50)
        await client.revoke_key(key.id)
        await asyncio.sleep(1.0)
        for one in (here, there):
            with pytest.raises(Unauthenticated, match="revoked"):
                await one.identify(f"Bearer {text}")
            await one.close()

    asyncio.run(scenario())
