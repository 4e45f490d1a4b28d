"""`python -m serve.main` as tests start it: a real process on a free port, with a home of its own."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import psutil

from cluster import settings as settings_of
from cluster.settings import PROFILES
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import SHARED as SHARED_BY_ALL
from serve import prepare, processes
from serve.experts.accepting import Fits

ROOT = Path(__file__).parents[1]
SHARED = ROOT / ".metasepia"
START_TIMEOUT_S = 280.0
REVIEWS = [
    ("The lamp broke after two days", "complaint"),
    ("Thank you for the kind and quick help", "praise"),
    ("I was charged twice for one order", "complaint"),
    ("Lovely packaging and fast delivery", "praise"),
    ("Still waiting for my refund after six weeks", "complaint"),
    ("Best purchase I made this year", "praise"),
]
EXAMPLES = [{"text": text, "label": label} for text, label in REVIEWS]
INPUTS = ["The zip tore the first time I used it", "Such a friendly shop, I will come back"]


def new_home(home: Path) -> Path:
    """A home with the weights and factors that all runs share, and a registry of its own."""
    for prepared in ("backbones", "factors"):
        (SHARED / prepared).mkdir(parents=True, exist_ok=True)
        (home / prepared).symlink_to(SHARED / prepared)
    return home


def put_expert(home: Path, backbone: str, name: str, scale: Callable[[int], np.ndarray]) -> str:
    """An expert of a backbone of the laptop in the registry of `home`, `scale` of the length of each layer's singular
    values; returns its digest.
    """
    settings = settings_of.read("laptop", {"METASEPIA_HOME": str(home)})
    fits = Fits.of(
        next(one for one in settings.backbones if one.id == backbone), prepare.prepare(settings)[backbone], home
    )
    assert fits.index is not None  # others' factors may lie there too
    z = {layer: scale(length).astype(np.float32) for layer, length in fits.index.lengths.items()}
    expert = ExpertVectors(backbone=fits.index.backbone, factors=fits.index.digest, z=z)
    registry = Registry(home / "registry")
    card: dict[str, object] = {"backbone": expert.backbone}
    registry.put("expert", expert.to_bytes(), digest=expert.digest, name=name, owner=SHARED_BY_ALL, card=card)
    registry.close()
    return expert.digest


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any, as Ray's processes do all the time."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Served:
    """One running graph."""

    profile = PROFILES / "laptop.toml"

    def __init__(self, home: Path, **environment: str) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.home, self._log, self.run = home, home / "serve.log", ""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("METASEPIA_", "RAY_"))}
        env |= {"METASEPIA_HOME": str(home), "METASEPIA_HTTP__PORT": str(self.port), "OMP_NUM_THREADS": "1"}
        env["METASEPIA_GRPC__PORT"] = str(self.grpc_port)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve.main"],
                cwd=ROOT, env=env | environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.wait_until_ready()

    @property
    def pid(self) -> int:
        """Of `serve.main`."""
        return self.process.pid

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_until_ready(self) -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        while "ready in" not in self.output:
            if self.process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise AssertionError(f"the graph did not start:\n{self.output}")
            time.sleep(0.3)
        self.run = json.loads((self.home / "serve.json").read_text())["run"]

    def post(
        self, path: str, body: object, timeout_s: float = 60.0, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=timeout_s)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30.0)

    def living(self) -> list[psutil.Process]:
        """Every process of this start but the first."""
        return processes.marked(self.run)

    def stop(self) -> None:
        """SIGINT to the process group, as Ctrl-C sends it; whatever is left after a minute is killed."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if self.run:
            processes.end(self.run, polite_s=0.0)
