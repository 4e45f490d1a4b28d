"""Tasks embedded on real processes: the same bytes for any number of workers and after kills, nothing paid twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import BertConfig, BertModel

from jobs import embed_tasks
from metasepia.embedding import store
from tests import tiny
from tests.endpoint import Endpoint, Http

ROOT = Path(__file__).parents[2]
RULES = '''
import os, pathlib, time

HERE = pathlib.Path(__file__).parent

def parity(texts):
    return ["yes" if len(text) % 2 else "no" for text in texts]

def deadly(texts):
    """Ends its process at the first call, as one that is out of memory does."""
    once = HERE / "died"
    if not once.exists():
        once.touch()
        os._exit(9)
    return ["yes" if "a" in text.split() else "no" for text in texts]
'''
SPEC = """
title = "On processes"
encoder = "encoder"
[probes]
number = 16
[[method]]
name = "agreement"
settings = {{ dims = 64 }}
[[data_set]]
path = "good.csv"
[[data_set]]
path = "empty.csv"
[[model]]
callable = "ray_rules:parity"
labels = ["no", "yes"]
[[model]]
callable = "ray_rules:deadly"
labels = ["no", "yes"]
[[model]]
name = "local"
backbone = "model"
[[model]]
name = "served"
endpoint = "{url}"
model = "tiny-1"
way = "sampling"
num_samples = 2
concurrency = 2
[[prompt]]
name = "a"
template = "A? {{text}}"
labels = {{ x = "good", y = "bad" }}
[[prompt]]
name = "b"
template = "B: {{text}}"
labels = {{ x = "good", y = "bad" }}
[[prompt]]
name = "open"
template = "Say {{text}}"
max_tokens = 3
models = ["local"]
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a causal model of random weights."""
    folder = tmp_path_factory.mktemp("parts")
    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, intermediate_size=24, initializer_range=0.3)).save_pretrained(folder / "encoder")
    tiny.tokenizer().save_pretrained(folder / "encoder")
    tiny.save("llama", folder / "model")
    return folder


@pytest.fixture
def folder(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("encoder", "model"):
        (tmp_path / name).symlink_to(parts / name)
    (tmp_path / "ray_rules.py").write_text(RULES)
    rows = [f"{'good' if i % 2 else 'bad'} film number {i},{'yes' if i % 2 else 'no'}" for i in range(30)]
    (tmp_path / "good.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "empty.csv").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    return tmp_path


def words(folder: Path, out: str, *more: str) -> list[str]:
    spec, home = str(folder / "spec.toml"), str(folder / "home")
    return [spec, "--out", str(folder / out), "--home", home, "--quiet", *more]


def embeddings(folder: Path, out: str) -> bytes:
    return (folder / out / "embeddings.parquet").read_bytes()


@pytest.mark.timeout(900)  # three runs, each with a Ray of its own
def test_bytes_are_the_same_for_any_number_of_workers_and_after_kills(folder: Path):
    slow = [False]

    def behave(count: int, body: dict[str, Any]) -> Http | None:
        time.sleep(0.1 if slow[0] else 0)
        return None

    with Endpoint(behave=behave) as endpoint:
        (folder / "spec.toml").write_text(SPEC.format(url=endpoint.url))
        job = [sys.executable, "-m", "jobs.embed_tasks"]
        assert subprocess.run([*job, *words(folder, "two", "--workers", "2")], cwd=ROOT, timeout=240).returncode == 1
        assert (folder / "died").exists(), "a process died on the way"
        found = store.read(str(folder / "two" / "embeddings.parquet"))
        assert [one.name for one in found] == [
            *("good", "parity", "deadly", "local/a", "local/b", "local/open", "served/a", "served/b")
        ]
        paid = sum(endpoint.answered.values())
        assert max(endpoint.answered.values()) == 1

        # Killed in the middle of paying, it goes on, on one worker, to the same bytes.
        endpoint.answered.clear()
        slow[0] = True
        process = subprocess.Popen([*job, *words(folder, "one", "--workers", "1")], cwd=ROOT)
        end = time.monotonic() + 200
        while sum(endpoint.answered.values()) < paid // 2:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while endpoint.in_flight:
            time.sleep(0.02)
        slow[0] = False
        before = sum(endpoint.answered.values())
        assert before < paid
        assert subprocess.run([*job, *words(folder, "one", "--workers", "1")], cwd=ROOT, timeout=240).returncode == 1
        assert sum(endpoint.answered.values()) <= paid + 2, "at most what was in flight is paid for again"
    assert embeddings(folder, "one") == embeddings(folder, "two")


def test_an_interrupted_run_leaves_no_process_and_says_so(folder: Path):
    with Endpoint(behave=lambda count, body: time.sleep(0.3)) as endpoint:
        (folder / "spec.toml").write_text(SPEC.format(url=endpoint.url))
        command = [sys.executable, "-m", "jobs.embed_tasks", *words(folder, "out", "--workers", "1")]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 200
        while len(endpoint.requests) < 6:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == embed_tasks.INTERRUPTED
        assert f"the same command goes on with what is kept in {folder / 'out'}" in said
        gone, alive = psutil.wait_procs(started, timeout=30)
        assert gone and not alive
