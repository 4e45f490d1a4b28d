"""`python -m serve.main` for benchmarks: started on a free port, its processes by their work, ended by a signal."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from cluster import settings as settings_of
from cluster.settings import Settings
from serve import processes

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Graph:
    """A running graph."""

    url: str
    process: "subprocess.Popen[str]"
    settings: Settings
    parts: dict[str, float]
    """Seconds of each part of its start."""
    ready_s: float
    """From command to ready."""

    @property
    def run(self) -> str:
        return json.loads((self.settings.home / "serve.json").read_text())["run"]

    @property
    def ray_address(self) -> str:
        """Of its own cluster, as its raylet was told."""
        for process in processes.marked(self.run):
            for argument in process.cmdline():
                if argument.startswith("--gcs-address="):
                    return argument.partition("=")[2]
        raise LookupError("no raylet of this graph")

    def processes(self) -> dict[str, psutil.Process]:
        """By what they do: ranks and replicas by name, Ray's daemons; workers that wait for work are left out."""
        found: dict[str, psutil.Process] = {}
        for process in processes.marked(self.run):
            with contextlib.suppress(psutil.Error):
                if name := _work_of(process):
                    found[name if name not in found else f"{name} {process.pid}"] = process
        return found


def _free_port() -> int:
    """Below those that the kernel gives to whoever asks for any, as Ray's processes do all the time."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _work_of(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    if found := re.match(r"ray::(?:ServeReplica:[^:]*:)?([A-Za-z0-9_.-]+)", title):
        return None if found[1] in ("IDLE", "IDLE_SpillWorker", "IDLE_RestoreWorker") else found[1]
    for name in ("raylet", "gcs_server"):
        if re.search(rf"/{name}(\s|$)", title):
            return name
    return "serve.main" if "serve.main" in title else None


@contextlib.contextmanager
def running(**environment: str) -> Iterator[Graph]:
    """A graph of the laptop profile, with a registry of its own and the weights and factors that all share."""
    settings = settings_of.read("laptop")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="metasepia-bench-") as home:
        for prepared in ("backbones", "factors"):
            (settings.home / prepared).mkdir(parents=True, exist_ok=True)
            (Path(home) / prepared).symlink_to(settings.home / prepared)
        port, grpc_port = _free_port(), _free_port()
        env = {
            "METASEPIA_HOME": home,
            "METASEPIA_HTTP__PORT": str(port),
            "METASEPIA_GRPC__PORT": str(grpc_port),
            **environment,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.main"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env=os.environ | env,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            parts = _wait_until_ready(process.stdout)
            read = settings_of.read("laptop", env)
            yield Graph(f"http://127.0.0.1:{port}", process, read, parts, time.perf_counter() - begin)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=120)


def _wait_until_ready(output: IO[str]) -> dict[str, float]:
    parts: dict[str, float] = {}
    lines: list[str] = []
    for line in output:
        lines.append(line)
        if found := re.fullmatch(r"(.+): ([\d.]+) s\s*", line):
            parts[found[1]] = float(found[2])
        if line.startswith("ready"):
            return parts
    sys.exit("the graph did not start:\n" + "".join(lines[-20:]))
