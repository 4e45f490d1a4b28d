"""The model `auto` at the door: the chain of stages, in the order asked for, over a real registry."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasepia.dispatch.centroid import TaskCentroid
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.entries import LOCAL
from tests.doors import DIGEST, INDEX, OTHER, UP, Bench
from tests.unit.test_prompts import write_byte_tokenizer


def an_expert(value: float, backbone: str = DIGEST) -> ExpertVectors:
    return ExpertVectors(backbone=backbone, factors=INDEX.digest, z={UP: np.full(4, value, np.float32)})


ONES = np.ones(4, np.float32)
NEAR = TaskCentroid(backbone=DIGEST, layer=-1, pooling="mean", centre=0 * ONES, centroid=ONES, threshold=0.5).to_card()
FAR = {**NEAR, "threshold": 1.5}
MATHS, LAW, ROUTER = an_expert(1.5), an_expert(0.5), an_expert(0.7)
DISPATCHER = {"prompt": "{text}?", "labels": {"m": "maths", "l": "law", "o": None}}


def put(bench: Bench, name: str, expert: ExpertVectors, **card: Any) -> None:
    bench.real.registry.put(
        "expert", expert.to_bytes(), digest=expert.digest, name=name, owner=LOCAL,
        card={"backbone": expert.backbone, **card},
    )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_experts(tmp_path / "registry")
    put(made, "maths", MATHS, description="Adds.", dispatch=FAR)
    put(made, "law", LAW, description="Reads contracts.")
    put(made, "router", ROUTER, description="Dispatches.", dispatch=NEAR, dispatcher=DISPATCHER)
    put(made, "foreign", an_expert(2.0, OTHER), description="Of another backbone.")
    made.says("x")
    made.door.prompts["tiny"].chat = lambda messages: (1, 2, 3)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def label(bench: Bench, text: str) -> None:
    """The dispatch expert finds this label likeliest."""
    tokens = (*bench.door.prompts["tiny"].continuation(text), 257)

    def dislike(row: Any) -> float:
        return 0.01 if row.token_ids[row.score_from :] == tokens else 3.0

    bench.backbone._dislike = dislike


def auto(bench: Bench, *stages: str, **fields: Any) -> dict[str, Any]:
    response = bench.chat(model="auto", dispatch=list(stages), max_tokens=4, **fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("text", "adapter", "model"), [("l", [[LAW.digest, 1.0]], "tiny:law"), ("o", [], "tiny")], ids=str
)
def test_the_dispatch_expert_chooses_and_none_wanted_is_the_base(
    bench: Bench, text: str, adapter: list[Any], model: str
) -> None:
    label(bench, text)
    answer = auto(bench, "classifier", "prompt")
    receipt = answer["receipt"]
    assert (receipt["adapter"], answer["model"], receipt["dispatch"]) == (adapter, model, "classifier")
    assert 0.8 < receipt["margin"] < 1
    scored = [row for row in bench.backbone.rows if row.want == "logprobs"]
    assert {row.adapter for row in scored} == {((ROUTER.digest, 1.0),)} and len(scored) == 3


@pytest.mark.parametrize(("says", "model"), [("\\boxed{law}", "tiny:law"), ("\\boxed{other}", "tiny")])
def test_the_base_models_own_word_chooses(bench: Bench, says: str, model: str) -> None:
    bench.says(says)
    answer = auto(bench, "prompt")
    assert (answer["model"], answer["receipt"]["dispatch"]) == (model, "prompt")
    assert bench.backbone.rows[0].adapter == ()


@pytest.mark.parametrize("says", ["law", "\\boxed{router}", "\\boxed{foreign}"])
def test_what_is_no_target_cannot_be_chosen_and_the_chain_goes_on(bench: Bench, says: str) -> None:
    """Neither the dispatch expert itself nor another backbone's."""
    bench.says(says)
    label(bench, "m")
    assert auto(bench, "prompt")["receipt"]["dispatch"] == "abstained"
    answer = auto(bench, "prompt", "centroid", "classifier")
    assert (answer["model"], answer["receipt"]["dispatch"]) == ("tiny:maths", "classifier")


def test_the_order_of_the_stages_is_the_requests(bench: Bench) -> None:
    bench.says("\\boxed{law}")
    label(bench, "m")
    assert [auto(bench, *stages)["model"] for stages in (("prompt", "classifier"), ("classifier", "prompt"))] == [
        "tiny:law",
        "tiny:maths",
    ]


def test_an_unsure_dispatch_expert_abstains(bench: Bench) -> None:
    bench.backbone._dislike = lambda row: 1.0
    receipt = auto(bench, "classifier")["receipt"]
    assert (receipt["dispatch"], receipt["adapter"], receipt["margin"]) == ("abstained", [], 0)


def test_a_plain_completion_is_not_read_as_a_message(bench: Bench) -> None:
    label(bench, "m")
    body = {"model": "auto", "prompt": "2 + 2 =", "max_tokens": 4, "dispatch": ["classifier", "prompt"]}
    answer = bench.post("/v1/completions", body).json()
    assert answer["receipt"]["dispatch"] == "abstained"
    assert [row.want for row in bench.backbone.rows] == ["tokens"]


def test_the_dispatch_experts_own_centroid_chooses_nothing(bench: Bench) -> None:
    assert auto(bench, "centroid")["receipt"]["dispatch"] == "abstained"


def test_a_broken_dispatcher_is_neither_asked_nor_a_target(bench: Bench) -> None:
    put(bench, "router", ROUTER, description="Dispatches.", dispatcher={"prompt": "no place"})
    bench.says("\\boxed{router}")
    assert auto(bench, "classifier", "prompt")["receipt"]["dispatch"] == "abstained"
    assert all(row.want == "tokens" for row in bench.backbone.rows)
