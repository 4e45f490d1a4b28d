"""The experts in the package: that their papers are true to their files. What they answer is tested over HTTP."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.expert_cards import model_card
from jobs.tasks import make
from jobs.workbench import HELD_OUT_SEED
from metasepia.dispatch.centroid import CentroidTable, TaskCentroid
from metasepia.experts.vectors import ExpertVectors, FactorIndex

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[2] / "metasepia/assets/experts").glob("*/card.json"))
each_expert = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
DISPATCH = "dispatch"
"""The one that chooses among the others."""


def card_of(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


def test_at_least_two_experts_of_one_backbone_and_one_kind_are_shipped_so_that_they_mix() -> None:
    cards = [card_of(folder) for folder in FOLDERS]
    assert len(cards) >= 2
    assert len({(card["backbone"], card["factors"], card["renormalise"]) for card in cards}) == 1
    assert len({card["digest"] for card in cards}) == len(cards)


@each_expert
def test_the_vectors_are_those_of_the_card_and_not_those_of_the_base(folder: Path) -> None:
    card, expert = card_of(folder), ExpertVectors.from_bytes((folder / "expert.safetensors").read_bytes())
    assert (expert.digest, expert.backbone, expert.factors) == (card["digest"], card["backbone"], card["factors"])
    assert expert.factors == FactorIndex.digest_for(card["backbone"], tuple(expert.z))
    assert sum(len(vector) for vector in expert.z.values()) == card["parameters"] == 51_840
    assert max(float(np.abs(vector - 1).max()) for vector in expert.z.values()) > 0.05
    assert card["name"] == folder.name


@each_expert
def test_the_gain_on_held_out_texts_has_an_interval_above_zero(folder: Path) -> None:
    held_out = card_of(folder)["held_out"]
    assert held_out["texts"] >= 90
    for measure in ("choice", "exact"):
        one = held_out[measure]
        assert one["gain"] == pytest.approx(one["expert"] - one["base"], abs=2e-4)
        assert 0 < one["gain_95"][0] <= one["gain"] <= one["gain_95"][1]


@each_expert
def test_the_card_speaks_of_the_task_as_it_stands_in_the_repository(folder: Path) -> None:
    card = card_of(folder)
    task = make(card["task"])
    held_out = task.held_out(card["held_out"]["texts"], HELD_OUT_SEED)
    assert card["labels"] == list(task.labels)
    assert card["description"] == task.about
    assert card["held_out"]["stems"] == len({example.group for example in held_out})
    assert (card["example_prompt"], card["example_answer"]) in [(one.prompt, one.answer) for one in held_out]


@each_expert
def test_the_readme_is_made_from_the_card(folder: Path) -> None:
    assert (folder / "README.md").read_text() == model_card(card_of(folder))


def test_auto_can_tell_the_shipped_tasks_apart_by_one_request_for_hidden_states() -> None:
    cards = {card["digest"]: card for card in map(card_of, FOLDERS) if card["name"] != DISPATCH}
    centroids = {digest: TaskCentroid.of_card(card) for digest, card in cards.items()}
    table = CentroidTable(
        next(iter(cards.values()))["backbone"], {digest: c for digest, c in centroids.items() if c is not None}
    )
    assert len(table) == len(cards)
    (wanted,) = table.wanted
    for digest, centroid in centroids.items():
        assert centroid is not None
        at_its_middle = (centroid.centre + centroid.centroid)[None]
        assert table.choose({wanted: at_its_middle}).expert == digest
        assert table.choose({wanted: centroid.centre[None] * 1.0001}).expert is None


def test_the_dispatch_expert_knows_all_the_others_and_is_none_to_choose() -> None:
    cards = {folder.name: card_of(folder) for folder in FOLDERS}
    dispatcher = cards[DISPATCH]["dispatcher"]
    assert {name for name in dispatcher["labels"].values() if name} == cards.keys() - {DISPATCH}
    assert list(dispatcher["labels"]) == cards[DISPATCH]["labels"]
    assert dispatcher["labels"]["other"] is None
    assert dispatcher["prompt"].count("{text}") == 1
    assert TaskCentroid.of_card(cards[DISPATCH]) is None
    assert not [name for name, card in cards.items() if name != DISPATCH and "dispatcher" in card]
