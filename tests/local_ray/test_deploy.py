"""`serve deploy` of the committed example onto a cluster that runs, with a tiny model: it answers a request."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.local_ray.test_submit import Head, head
from tests.serving import EXAMPLES, INPUTS, ROOT, free_port

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]
__all__ = ["head"]


@pytest.mark.parametrize("head", ["deploy"], indirect=True)
def test_the_committed_example_answers_on_a_cluster_that_runs(
    head: Head, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
):
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    config["grpc_options"]["port"] = free_port()
    (app,) = config["applications"]
    app["args"]["settings"] |= {
        "home": str(tmp_path / "home"),
        "backbones": [{"id": "tiny", "source": str(tiny_checkpoint("llama")), "rank_cpus": 0.5}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["serve", "deploy", str(tmp_path / "config.yaml"), "-a", head.address]
    done = subprocess.run(command, cwd=ROOT, env=head.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    url, give_up_s, last = f"http://127.0.0.1:{port}", time.monotonic() + 200, ""
    while True:
        try:
            answer = httpx.get(f"{url}/health", timeout=15)
            if answer.status_code == 200:
                break
            last = answer.text
        except httpx.HTTPError as error:
            last = str(error)
        assert time.monotonic() < give_up_s, f"{last}\n{_status(head)}"
        time.sleep(1)
    names = [one["id"] for one in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]]
    assert "tiny" in names
    classified = httpx.post(f"{url}/v1/classify", json={"examples": EXAMPLES, "inputs": INPUTS}, timeout=60)
    assert [one["label"] for one in classified.json()["results"]]
    said = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 4}, timeout=60)
    assert said.status_code == 200, said.text
    # The cluster has a dashboard, so the door lists Ray's jobs too.
    assert httpx.get(f"{url}/v1/jobs?kind=ray", timeout=60).json()["ray"]["available"] is True


def _status(head: Head) -> str:
    told = httpx.get(f"{head.address}/api/serve/applications/", timeout=30)
    return json.dumps(told.json().get("applications", {}), indent=1)[-3000:]
