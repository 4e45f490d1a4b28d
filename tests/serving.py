"""`python -m serve.main` as tests start it: a real process on a free port, with a home of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from serve import processes

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """One running graph."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.home, self._log, self.run = home, home / "serve.log", ""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("METASEPIA_", "RAY_"))}
        env |= {"METASEPIA_HOME": str(home), "METASEPIA_HTTP__PORT": str(self.port), "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve.main"],
                cwd=ROOT, env=env | environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.wait_until_ready()

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
