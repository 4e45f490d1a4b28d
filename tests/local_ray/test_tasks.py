"""Task embeddings over the real graph: made, compared, and a model's that goes on after its part was killed."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.serving import EXAMPLES, Served, new_home

pytestmark = pytest.mark.timeout(600)

LABELS = {"good": "yes, it is", "bad": "no, never", "neither": "not quite so", "both": "in a way both"}
PROMPT = {"template": "{text}\nIs it good? ", "labels": LABELS, "chat": False}
NUM_PROBES = 512
OTHERS = [
    {"text": "The chair arrived with a broken leg", "label": "bad"},
    {"text": "I love this kettle, thank you so much", "label": "fine"},
    {"text": "Nobody answers my complaint about the refund", "label": "bad"},
    {"text": "Quick delivery and such friendly people", "label": "fine"},
    {"text": "It stopped working on the first day", "label": "bad"},
    {"text": "A wonderful gift, beautifully packed", "label": "fine"},
]
"""The same task as that of EXAMPLES, with other texts and label names."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Iterator[Served]:
    """A backbone that starts quickly and decodes few rows at a time."""
    graph = Served(
        new_home(tmp_path_factory.mktemp("served")),
        METASEPIA_BACKBONES__0__ID="tiny",
        METASEPIA_BACKBONES__0__SOURCE=str(tiny_checkpoint("llama")),
        METASEPIA_BACKBONES__0__MAX_ROWS="4",
        METASEPIA_TASKS__NUM_PROBES=str(NUM_PROBES),
    )
    yield graph
    graph.stop()


def make(served: Served, **body: Any) -> dict[str, Any]:
    response = served.post("/v1/tasks", body)
    assert response.status_code in (200, 202), response.text
    return response.json()


def show(served: Served, id_: str) -> dict[str, Any]:
    return served.get(f"/v1/tasks/{id_}?include=vector").json()


def ended(served: Served, id_: str, timeout_s: float = 120.0) -> dict[str, Any]:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        response = served.get(f"/v1/tasks/{id_}?include=vector")
        if response.status_code == 200 and response.json()["status"] not in ("queued", "running"):
            return response.json()
        time.sleep(0.2)
    raise AssertionError(f"{id_} did not end: {response.text}")  # pyright: ignore[reportPossiblyUnboundVariable]


def part(served: Served) -> psutil.Process:
    found = [one for one in served.living() if "task-embedding" in " ".join(one.cmdline())]
    assert len(found) == 1, found
    return found[0]


def test_a_data_set_is_embedded_at_once_and_near_one_of_the_same_task(served: Served) -> None:
    made = [make(served, name=f"half-{i}", examples=examples) for i, examples in enumerate((EXAMPLES, OTHERS))]
    assert [one["status"] for one in made] == ["done", "done"]
    compared = served.post("/v1/tasks/compare", {"tasks": ["half-0", "half-1", show(served, "half-0")]}).json()
    table = np.array(compared["cosines"])
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-5)
    assert table[0, 2] == pytest.approx(1, abs=1e-5) and table[0, 1] > 0.2
    near = served.get("/v1/tasks/half-0/nearest").json()
    assert near["data"][0]["id"] == "half-1"


def test_a_models_task_goes_on_after_its_part_was_killed_to_the_vector_of_one_that_was_not(served: Served) -> None:
    body = {"model": "tiny", "prompt": PROMPT}
    make(served, name="whole", **body)
    whole = ended(served, "whole")
    assert whole["status"] == "done", whole
    assert whole["receipt"]["backbone"] and whole["receipt"]["path"] == "plain"

    queued = make(served, name="killed", **body)
    assert queued["status"] == "queued" and queued["progress"]["of"] == NUM_PROBES
    give_up = time.monotonic() + 60
    while (now := show(served, "killed"))["status"] == "queued" or not now["progress"]["answered"]:
        assert now["status"] in ("queued", "running") and time.monotonic() < give_up, now
        time.sleep(0.02)
    part(served).kill()
    now = show(served, "killed")  # the registry has it
    assert now["status"] == "running" and 0 < now["progress"]["answered"] < NUM_PROBES
    killed = ended(served, "killed")
    assert killed["status"] == "done", killed
    np.testing.assert_allclose(killed["vector"], whole["vector"], atol=1e-4)
    near = served.get("/v1/tasks/killed/nearest?kind=prompt").json()["data"]
    assert near[0]["id"] == "whole" and near[0]["cosine"] > 0.999


def test_a_method_with_gradients_embeds_in_a_space_of_its_own(served: Served) -> None:
    task = make(served, name="tuned", examples=EXAMPLES, method="fisher", background=True)
    assert task["status"] in ("queued", "running", "done")
    tuned = ended(served, "tuned", 240)
    assert tuned["status"] == "done", tuned
    assert tuned["method"] == "fisher" and np.linalg.norm(tuned["vector"]) == pytest.approx(1, abs=1e-4)
    refused = served.post("/v1/tasks/compare", {"tasks": ["tuned", "half-0"]})
    assert refused.json()["error"]["code"] == "different_spaces", refused.text


def test_after_all_this_every_part_answers_and_what_was_deleted_is_gone(served: Served) -> None:
    give_up = time.monotonic() + 60
    while (health := served.get("/health")).status_code != 200 and time.monotonic() < give_up:
        time.sleep(0.5)
    assert health.json()["parts"]["task embedding"]["ready"]
    assert httpx.delete(f"{served.url}/v1/tasks/tuned", timeout=20).json()["deleted"]
    assert served.get("/v1/tasks/tuned").status_code == 410
    assert [one["id"] for one in served.get("/v1/tasks").json()["data"]] == ["half-0", "half-1", "killed", "whole"]
