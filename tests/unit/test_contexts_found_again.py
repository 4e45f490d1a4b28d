"""A context that is asked again: the registry confirms it while its queries are embedded, and is believed."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

EXAMPLES = [{"text": "good one", "label": "a"}, {"text": "a bad one here", "label": "b"}]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")


def test_queries_are_embedded_while_the_registry_is_asked_and_nothing_is_answered_before_it_has_spoken(bench: Bench):
    context = bench.post("/v1/contexts", {"examples": EXAMPLES}).json()["id"]
    body = {"model": context, "inputs": ["some"]}
    assert bench.post("/v1/classify", body).status_code == 200
    spoken = asyncio.Event()
    resolve = bench.catalogue.resolve

    async def slowly(*args: Any, **options: Any) -> Any:
        await spoken.wait()
        return await resolve(*args, **options)

    bench.catalogue.resolve = slowly  # pyright: ignore[reportAttributeAccessIssue]
    bench.encoder.texts.clear()
    bench.reasoning.asked.clear()

    async def talk(client: httpx.AsyncClient) -> int:
        answer = asyncio.create_task(client.post("/v1/classify", json=body))
        async with asyncio.timeout(10):
            while not bench.encoder.texts:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert not answer.done() and not bench.reasoning.asked
        spoken.set()
        return (await answer).status_code

    assert bench.run(talk) == 200


def test_a_context_that_was_deleted_since_is_gone_at_once(bench: Bench):
    context = bench.post("/v1/contexts", {"examples": EXAMPLES}).json()["id"]
    body = {"model": context, "inputs": ["some"]}
    assert bench.post("/v1/classify", body).status_code == 200
    bench.delete(f"/v1/contexts/{context}")
    assert bench.post("/v1/classify", body).status_code == 410
    assert bench.post("/v1/contexts", {"examples": EXAMPLES}).json()["id"] == context
    assert bench.post("/v1/classify", body).status_code == 200
