import json

import numpy as np
import pytest

from metasepia.dispatch.centroid import CentroidTable, TaskCentroid
from metasepia.errors import CorruptArtefact
from metasepia.rows import HiddenStatesWanted

BACKBONE = "b" * 64
WIDTH = 32


def cloud(direction: int, count: int, seed: int) -> np.ndarray:
    """States around a common offset, as a causal model's are, some way along one axis (-1: along none)."""
    states = 50 + np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    if direction >= 0:
        states[:, direction] += 12
    return states


def centroid(direction: int, layer: int = 20) -> TaskCentroid:
    return TaskCentroid.calibrate(
        cloud(direction, 60, seed=direction), cloud(-1, 60, seed=99), backbone=BACKBONE, layer=layer, pooling="last"
    )


TABLE = CentroidTable(BACKBONE, {"maths": centroid(0), "law": centroid(1)})
WANTED = HiddenStatesWanted(layers=(20,), pooling="last")


def test_fresh_prompts_of_each_task_choose_its_expert_and_others_none() -> None:
    for direction, expert in [(0, "maths"), (1, "law"), (-1, None), (5, None)]:
        for state in cloud(direction, 40, seed=7 + direction):
            assert TABLE.choose({WANTED: state[None]}).expert == expert


def test_the_margin_is_positive_exactly_when_an_expert_is_chosen_and_falls_towards_another_task() -> None:
    clear = cloud(0, 1, seed=3)[0]
    between = clear.copy()
    between[1] += 9
    margins = [TABLE.choose({WANTED: state[None]}).margin for state in (clear, between, cloud(-1, 1, seed=3)[0])]
    assert margins[0] > margins[1]
    assert margins[1] > 0 >= margins[2]


def test_a_centroid_through_a_card_decides_as_before() -> None:
    card = json.loads(json.dumps({"dispatch": centroid(0).to_card()}))
    read = TaskCentroid.of_card(card)
    assert read is not None
    for state in cloud(0, 20, seed=8):
        assert read.cosine(state) == pytest.approx(centroid(0).cosine(state), abs=1e-3)


def test_centroids_of_another_backbone_are_left_out_and_an_empty_table_abstains() -> None:
    table = CentroidTable("c" * 64, {"maths": centroid(0)})
    assert len(table) == 0
    assert table.wanted == ()
    assert table.choose({}).expert is None


def test_one_request_carries_all_layers_that_the_experts_were_calibrated_on() -> None:
    table = CentroidTable(BACKBONE, {"maths": centroid(0, layer=20), "law": centroid(1, layer=12)})
    (wanted,) = table.wanted
    assert wanted == HiddenStatesWanted(layers=(12, 20), pooling="last")
    states = np.stack([cloud(1, 1, seed=4)[0], cloud(-1, 1, seed=5)[0]])
    assert table.choose({wanted: states}).expert == "law"


@pytest.mark.parametrize(
    "change",
    [{"pooling": "sum"}, {"centroid": [1.0]}, {"threshold": None}, {"centre": ["x"]}, {"threshold": float("nan")}],
)
def test_a_broken_card_is_refused_in_words(change: dict[str, object]) -> None:
    with pytest.raises(CorruptArtefact, match="mine cannot be used: its card's dispatch entry"):
        TaskCentroid.of_card({"dispatch": centroid(0).to_card() | change}, "mine")


def test_a_card_without_an_entry_is_never_chosen() -> None:
    assert TaskCentroid.of_card({"about": "anything"}) is None
