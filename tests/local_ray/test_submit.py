"""Jobs on a real cluster with a dashboard, with and without Ray's token: attached, stopped, killed, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.upper import Upper, serving
from serve import processes
from serve.proxy import envelope as middleware
from tests.serving import ROOT, free_port
from tests.unit import test_batch

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]


@dataclass(frozen=True)
class Head:
    """One cluster of one node."""

    address: str
    env: dict[str, str]
    mark: str

    def submit(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.submit", "batch", "--address", self.address, *words]
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def drivers(self) -> list[psutil.Process]:
        found = [one for one in processes.marked(self.mark) if "jobs.submitted" in " ".join(one.cmdline())]
        return [one for one in found if "python" in one.name()]


@pytest.fixture(params=["disabled", "token"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Head]:
    """By Ray's authentication; `deploy`: none, and every process finds this code, as in an image."""
    mark, port, dashboard = uuid.uuid4().hex, free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "METASEPIA_"))}
    env |= {processes.MARK: mark, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    if request.param == "deploy":
        env |= middleware.ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    if request.param == "token":
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
    words = ["start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2"]
    words += [f"--dashboard-agent-listen-port={free_port()}"]
    words += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    log = (tmp_path / "head.log").open("w")
    process = subprocess.Popen(["ray", *words], env=env, cwd=tmp_path, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    headers = {"authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"} if request.param == "token" else {}
    try:
        give_up_s = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < give_up_s, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield Head(address, env, mark)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        processes.end(mark, polite_s=2.0)


def test_a_job_is_followed_stopped_killed_and_gone_on_with_to_the_bytes_of_an_undisturbed_run(
    head: Head, tmp_path: Path
):
    source = test_batch.write(tmp_path / "in.parquet", 800)
    slow: dict[str, float] = {"s": 0.15}

    def wait(server: Upper, path: str, body: Any) -> None:
        time.sleep(slow["s"])

    with serving(Upper(wait)) as upper:
        given = ["--input", str(source), "--output", "{results}/out.parquet", "--task", "embed", "--model", "m"]
        given += ["--url", upper.url, "--rows-a-part", "8", "--rows-a-request", "4", "--concurrency", "1"]
        words = ["--results", str(tmp_path / "runs"), "--", *given]
        id_ = head.submit("--no-wait", *words).stdout.splitlines()[-1]
        results = tmp_path / "runs" / id_
        parts = results / "out.parquet.parts"
        _until(lambda: len(list(parts.glob("part-*"))) >= 2)
        # A second submitter attaches; it dies, and the job does not care.
        other = subprocess.Popen(
            [sys.executable, "-m", "jobs.submit", "batch", "--address", head.address, *words],
            cwd=ROOT, env=head.env, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert other.stdout is not None
        assert "following it" in other.stdout.readline()
        other.kill()
        other.wait()
        # Stopped: the driver has time to say that it stopped.
        assert "is stopped" in head.submit("--stop", *words).stdout
        assert json.loads((results / "_job.json").read_text())["exit"] == 130
        stored = len(list(parts.glob("part-*")))
        assert 2 <= stored < 90
        # Killed: the driver alone, then gone on with.
        assert "started again" in head.submit("--no-wait", *words).stdout
        _until(lambda: len(list(parts.glob("part-*"))) >= stored + 2)
        (driver,) = head.drivers()
        driver.kill()
        _until(lambda: not head.drivers())
        slow["s"] = 0.0
        last = head.submit(*words)
        if last.returncode == 1:  # it attached before Ray had seen the death
            last = head.submit(*words)
        assert last.returncode == 0, last.stdout + last.stderr
        assert "succeeded" in last.stdout
        assert len(upper.keys) < 2 * len(set(upper.keys))
        once = [*given, "--quiet"]
        once[once.index("{results}/out.parquet")] = str(tmp_path / "once.parquet")
        subprocess.run([sys.executable, "-m", "jobs.batch", *once], cwd=ROOT, check=True)
    assert (results / "out.parquet").read_bytes() == (tmp_path / "once.parquet").read_bytes()
    assert json.loads((results / "_job.json").read_text())["exit"] == 0
    assert "has succeeded already" in head.submit(*words).stdout


def test_ray_job_submit_runs_a_job_as_well(head: Head, tmp_path: Path):
    source = test_batch.write(tmp_path / "in.parquet", 8)
    with serving(Upper()) as upper:
        given = ["--input", str(source), "--output", str(tmp_path / "out.parquet"), "--task", "embed", "--model", "m"]
        words = ["job", "submit", "--address", head.address, "--working-dir", ".", "--", "python", "-m", "jobs.batch"]
        give_up_s = time.monotonic() + 60
        while True:
            done = subprocess.run(
                ["ray", *words, *given, "--url", upper.url],
                cwd=ROOT, env=head.env, capture_output=True, text=True, timeout=200, check=False,
            )  # fmt: skip
            begun = "No available agent" not in done.stderr + done.stdout  # its agents come a little later
            if begun or time.monotonic() > give_up_s:
                break
            time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 8


def _until(reached: Any, timeout_s: float = 90.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < give_up_s
        time.sleep(0.2)
