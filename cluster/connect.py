"""The only `ray.init`: a cluster of our own on this machine, or one that runs already."""

import os
from pathlib import Path
from typing import Any

import ray

from cluster.settings import RaySettings

ROOT = Path(__file__).parents[1]


def worker_env(threads: int = 1) -> dict[str, str]:
    """Environment of every worker: offline, on loopback, DeepSpeed on its CPU path where there is no GPU."""
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }


def connect(settings: RaySettings, *, log_to_driver: bool = False) -> dict[str, float]:
    """Joins or starts Ray and returns the resources of the cluster.

    Ray 2.60 turns token authentication on by itself for a new local cluster: the mode is always the settings'.
    """
    os.environ["RAY_AUTH_MODE"] = settings.auth_mode
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {
        "namespace": "metasepia",
        "log_to_driver": log_to_driver,
        "runtime_env": {"env_vars": worker_env()},
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
        }
    else:
        options["address"] = settings.address
    if not ray.is_initialized():
        ray.init(**options)
    return dict(ray.cluster_resources())
