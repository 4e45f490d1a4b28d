"""The only `ray.init`: a cluster of our own on this machine, or one that runs already."""

import os
import platform
import queue
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.settings import RaySettings
from metasepia.errors import InvalidSettings, Unavailable

ROOT = Path(__file__).parents[1]
BOUNDS_OF_GCS = {
    "task_events_max_num_task_in_gcs": 2_000,
    "task_events_max_dropped_task_attempts_tracked_per_job_in_gcs": 2_000,
}
"""Calls that have ended and are kept for `ray list tasks`. Ray keeps 100,000 of them, and the names of a million that
it has forgotten: its memory grows for hours, by 5 MiB with 1,000 of our requests."""


@dataclass(frozen=True, kw_only=True)
class RayVersions:
    """What a cluster runs, or this process."""

    ray: str
    python: str

    def __str__(self) -> str:
        return f"Ray {self.ray} on Python {self.python}"


def worker_env(threads: int = 1) -> dict[str, str]:
    """Environment of every worker: offline, on loopback, DeepSpeed on its CPU path where there is no GPU."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        # oneDNN keeps the kernels of so many shapes of a product; each takes about a third of a MiB, and ranks and
        # encoders meet thousands of shapes.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        # Ray's threads, and ours, would each leave holes in a heap of their own.
        "MALLOC_ARENA_MAX": "2",
    }


def connect(
    settings: RaySettings, *, log_to_driver: bool = False, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Joins or starts Ray and returns the resources of the cluster. `environment`: more variables for its workers.

    Ray 2.60 turns token authentication on by itself for a new local cluster: its mode is always the settings'. Raises
    as `check_cluster` does.
    """
    if settings.address == "local" or settings.auth_mode != "disabled":
        os.environ["RAY_AUTH_MODE"] = settings.auth_mode
    else:
        os.environ.setdefault("RAY_AUTH_MODE", settings.auth_mode)  # a job of a cluster knows that cluster's mode
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if settings.address == "local":  # `python`, as submitted jobs call it, is this one, also where nobody activated it
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # Ray's own processes too
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    options: dict[str, Any] = {
        "namespace": "metasepia",
        "log_to_driver": log_to_driver,
        "runtime_env": {"env_vars": {**worker_env(), **(environment or {})}},
        "logging_level": "warning",
    }
    if settings.address == "local":
        options |= {
            "address": "local",
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "object_store_memory": int(settings.object_store_gib * 2**30),
            "include_dashboard": settings.dashboard,
            "dashboard_host": "127.0.0.1",
            "_node_ip_address": "127.0.0.1",
            "_system_config": {
                "metrics_report_interval_ms": int(1000 * settings.metrics_every_s),
                **BOUNDS_OF_GCS,
            },
        }
    else:
        options["address"] = settings.address
    if not ray.is_initialized():
        check_cluster(settings.address)
        ray.init(**options)
    return dict(ray.cluster_resources())


def our_versions() -> RayVersions:
    return RayVersions(ray=ray.__version__, python=platform.python_version())


def cluster_versions(address: str, timeout_s: float = 5.0) -> RayVersions:
    """What the cluster at `address` (`auto`, or host:port) runs, as its head wrote it down; Ray is not joined.

    Raises Unavailable where nobody answers within `timeout_s`, or what answers is no Ray that lets us in.
    """
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

    try:
        found = canonicalize_bootstrap_address(address)
        host, _, port = str(found).rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except (OSError, ValueError) as error:  # ConnectionError where `auto` finds none
        raise Unavailable(f"a Ray cluster at {address} ({error})", timeout_s) from None

    answers: queue.SimpleQueue[dict[str, str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(get_cluster_metadata(GcsClient(address=found)))
        except Exception as error:
            answers.put(error)

    # A daemon: the client waits far longer than anyone would for a port that speaks something else.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        answer = TimeoutError("what listens there does not answer as Ray")
    if isinstance(answer, Exception):
        raise Unavailable(f"a Ray cluster at {address} ({answer})", timeout_s)
    return RayVersions(ray=answer["ray_version"], python=answer["python_version"])


def check_cluster(address: str, ours: RayVersions | None = None) -> RayVersions | None:
    """Raises InvalidSettings where the cluster to join runs another Ray or Python than this process, and Unavailable
    where there is none. None where a cluster of our own is meant, or the address is a Ray client's (it checks itself).
    """
    if address == "local" or address.startswith("ray://"):
        return None
    ours, theirs = ours or our_versions(), cluster_versions(address)
    if theirs != ours:
        allowed = (
            f"a cluster of {ours}, as in this environment; that one runs {theirs}. Start it from the same image or "
            "requirements.lock, or run this command there"
        )
        raise InvalidSettings("ray.address", address, allowed)
    return theirs
