"""One local Ray for the whole session, and an event loop that outlives a test, for groups that serve several."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.connect import connect
from cluster.settings import RaySettings

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
