import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.train_experts import main
from metasepia.dispatch import TaskCentroid
from metasepia.experts import ExpertVectors

STEPS = 8
RESULT = ("expert.safetensors", "log.jsonl", "checkpoint.safetensors")


def arguments(checkpoint: Path, home: Path, out: Path) -> list[str]:
    """A run on a tiny random model that takes seconds."""
    sizes = ["--steps", str(STEPS), "--batch", "4", "--held-out", "8", "--checkpoint-every", "3"]
    return ["--task", "desk", "--backbone", str(checkpoint), "--home", str(home), "--out", str(out), *sizes]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Callable[[str], Path], home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    main(arguments(tiny_checkpoint("llama"), home, out))
    return out


def test_a_run_killed_between_steps_goes_on_to_the_same_bytes(
    whole: Path, tiny_checkpoint: Callable[[str], Path], home: Path, tmp_path: Path
) -> None:
    again = arguments(tiny_checkpoint("llama"), home, tmp_path)
    slowly = "import sys, time, metasepia.tuning as t; from jobs.train_experts import main; step = t.answer_loss\n"
    slowly += "t.answer_loss = lambda *a: (time.sleep(0.3), step(*a))[1]; main(sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", slowly, *again], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        give_up_s = time.monotonic() + 120
        while not (tmp_path / "checkpoint.safetensors").exists():  # written after the third step of eight
            assert child.poll() is None and time.monotonic() < give_up_s
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "expert.safetensors").exists()
    main(again)
    for name in RESULT:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_leaves_an_expert_with_papers_that_agree_with_it(whole: Path) -> None:
    card = json.loads((whole / "card.json").read_text())
    expert = ExpertVectors.from_bytes((whole / "expert.safetensors").read_bytes())
    assert card["digest"] == expert.digest
    assert card["parameters"] == 2 * 3 * 48
    assert len((whole / "log.jsonl").read_text().splitlines()) == card["steps"] == STEPS
    assert TaskCentroid.of_card(card) is not None
    readme = (whole / "README.md").read_text()
    assert f"| {card['held_out']['exact']['base']:.3f} | {card['held_out']['exact']['expert']:.3f} |" in readme
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
