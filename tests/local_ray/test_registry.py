"""The registry across processes: what it acknowledged outlives it, and its errors arrive as themselves."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import ray

from actors import registry
from actors.registry import RegistryClient
from cluster import settings
from cluster.settings import Settings
from metasepia.errors import InvalidRequest, InvalidSettings, Locked, Unavailable, UnknownName
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import Artefact


def settings_of(home: Path) -> Settings:
    return settings.read("laptop", {"METASEPIA_HOME": str(home), "METASEPIA_REGISTRY__CPUS": "0.01"})


@pytest.fixture
def client(cluster: object, tmp_path: Path) -> Iterator[RegistryClient]:
    yield registry.start(settings_of(tmp_path))
    registry.stop()


async def put(client: RegistryClient, name: str, content: bytes, **more) -> Artefact:
    return await client.put("expert", content, digest=sha256(content).hexdigest(), name=name, owner="ann", **more)


def test_an_acknowledged_put_survives_sigkill_of_the_writer(client: RegistryClient):
    async def scenario():
        stored = await put(client, "maths", b"z" * 300_000, card={"seed": 1})
        before = await client.info()
        os.kill(before.pid, signal.SIGKILL)
        assert await client.resolve("expert", "maths", "ann") == stored
        assert await client.get(stored.digest, "ann") == b"z" * 300_000
        after = await client.info()
        assert after.pid != before.pid and after.epoch == before.epoch + 1

    asyncio.run(scenario())


def test_writes_and_deletes_under_way_when_the_writer_dies_are_made_again(client: RegistryClient):
    async def scenario():
        await put(client, "doomed", b"doomed")
        killed = asyncio.get_running_loop().call_later(0.05, os.kill, (await client.info()).pid, signal.SIGKILL)
        began = time.monotonic()
        names = []
        while time.monotonic() < began + 0.5 or not killed.when() < asyncio.get_running_loop().time():
            names.append(f"e{len(names)}")
            await put(client, names[-1], names[-1].encode())
        await client.delete("expert", "doomed", "ann")
        assert {entry.name for entry in await client.list("expert", "ann")} == set(names)

    asyncio.run(scenario())


def test_a_writer_that_was_ended_for_good_is_created_again_with_its_entries(client: RegistryClient):
    async def scenario():
        stored = await put(client, "maths", b"1")
        registry.stop()
        assert await client.resolve("expert", "maths", "ann") == stored

    asyncio.run(scenario())


def test_a_writer_that_does_not_answer_is_unavailable_within_the_deadline(client: RegistryClient):
    async def scenario():
        pid = (await client.info()).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(Unavailable, match="the registry is not available now"):
                await put(client, "maths", b"1", timeout_s=0.5)
            assert time.monotonic() - began < 2
        finally:
            os.kill(pid, signal.SIGCONT)
        await put(client, "maths", b"1")

    asyncio.run(scenario())


def test_a_client_without_a_registry_says_so(cluster: object):
    with pytest.raises(Unavailable, match="nobody has started it"):
        asyncio.run(RegistryClient().resolve("expert", "maths", "ann"))


def test_errors_arrive_as_themselves(client: RegistryClient):
    async def scenario():
        await put(client, "maths", b"1")
        with pytest.raises(UnknownName, match=r"^no expert named 'law'; known: maths$"):
            await client.resolve("expert", "law", "ann")
        with pytest.raises(InvalidRequest, match=r"^name: 'auto' is not allowed"):
            await put(client, "auto", b"1")

    asyncio.run(scenario())


def test_a_client_works_in_another_process(client: RegistryClient):
    @ray.remote(num_cpus=0)
    def name_from_there(client: RegistryClient) -> str:
        return asyncio.run(put(client, "maths", b"from there")).name

    assert ray.get(name_from_there.remote(client)) == "maths"
    assert asyncio.run(RegistryClient().resolve("expert", "maths", "ann")).name == "maths"


def test_a_second_home_is_refused_while_the_first_is_open(client: RegistryClient, tmp_path: Path):
    again = registry.start(settings_of(tmp_path))
    assert asyncio.run(again.info()) == asyncio.run(client.info())
    with pytest.raises(InvalidSettings, match=r"setting home = .*other.* is not allowed; it must be .* stop it first"):
        registry.start(settings_of(tmp_path / "other"))


def test_a_home_that_another_program_has_open_is_refused_until_it_is_free(cluster: object, tmp_path: Path):
    try:
        with Registry(tmp_path / "registry"), pytest.raises(Locked, match=f"is held by process {os.getpid()} on"):
            registry.start(settings_of(tmp_path))
        registry.start(settings_of(tmp_path))
    finally:
        registry.stop()
