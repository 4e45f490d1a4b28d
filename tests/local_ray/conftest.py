"""One local Ray for the whole session, an event loop that outlives a test, and one served graph of the laptop.

Tests of the shared graph (`served`) run before all others, and it ends with the last of them: two Rays at once would
slow each other.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.connect import connect
from cluster.settings import RaySettings
from tests.requests import BACKBONE
from tests.serving import Served, new_home, put_expert

NUM_CPUS = 8.0
"""Logical: they are only counted."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, float]]:
    """A Ray of our own, with eight logical CPUs."""
    os.environ["OMP_NUM_THREADS"] = "1"
    yield connect(RaySettings(num_cpus=NUM_CPUS, object_store_gib=0.2))
    ray.shutdown()


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[..., Any]]:
    """`run(coroutine, timeout_s)`: its result, from one event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run_in_loop(work: Coroutine[Any, Any, Any], timeout_s: float = 120.0) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    yield run_in_loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where prepared backbones and factors of this session are kept."""
    return tmp_path_factory.mktemp("home")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the shared graph, then the test that ends it, then the others, in their own order."""

    def turn(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        if "ending" in names:
            return 1
        shared = "served" in names and not hasattr(getattr(item, "module", None), "served")  # a graph of its own
        return 0 if shared else 2

    items.sort(key=turn)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The laptop's graph as `make serve` starts it, with two experts more: `ones`, which changes nothing, and `noisy`.

    Shared by every test that names it: leave it as it was found.
    """
    home = new_home(tmp_path_factory.mktemp("served"))
    noise = np.random.default_rng(0)
    put_expert(home, BACKBONE, "ones", np.ones)
    put_expert(home, BACKBONE, "noisy", lambda length: noise.uniform(0.2, 1.8, length))
    told = {  # of the requests that bring a traceparent
        "METASEPIA_TRACES__FILE": str(home / "spans.jsonl"),
        "METASEPIA_TRACES__SAMPLE_RATIO": "0",
        "METASEPIA_LOGS__FILE": str(home / "log.jsonl"),
        "METASEPIA_RAY__METRICS_EVERY_S": "1",
    }
    graph = Served(home, METASEPIA_CENTROIDS__SAVE_EVERY_S="0.5", METASEPIA_CENTROIDS__REFERENCE_COUNT="6", **told)
    yield graph
    graph.stop()


@pytest.fixture
def ending(served: Served) -> Iterator[Served]:
    """The shared graph for the one test that ends it, after all others that use it."""
    yield served
    served.stop()
