"""The stage `task`: that its level of abstention is what it says, and what it chooses between data sets."""

import json

import numpy as np
import pytest

from metasepia.dispatch.task import KEY, MAX_HELD_OUT, RegionTable, TextRegion, describe
from metasepia.errors import CorruptArtefact, InvalidRequest

ENCODER = "e" * 64
WIDTH = 48


def texts(topic: int, count: int, seed: int, *, away: int | None = None, spread: float = 1.0) -> np.ndarray:
    """Unit vectors of a data set of three kinds of text; `away`: all of them moved along one more axis."""
    rng = np.random.default_rng([topic, seed])
    vectors = spread * rng.normal(size=(count, WIDTH)) / np.sqrt(WIDTH)
    vectors[np.arange(count), 4 * topic + rng.integers(3, size=count)] += 1.2
    if away is not None:
        vectors[:, away] += 0.8
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def a_region(topic: int, count: int = 400, seed: int = 0) -> TextRegion:
    return describe(texts(topic, count, seed), encoder=ENCODER, seed=seed)


def table(*regions: tuple[str, TextRegion], level: float = 0.05, margin: float = 0.0) -> RegionTable:
    return RegionTable(ENCODER, regions, level=level, margin=margin)


def share_outside(region: TextRegion, vectors: np.ndarray, level: float) -> float:
    chooses = table(("own", region), level=level)
    return float(np.mean([chooses.choose(one).expert is None for one in vectors]))


@pytest.mark.parametrize("level", [0.02, 0.05, 0.2])
def test_of_texts_like_those_held_out_a_share_of_level_is_taken_for_foreign(level: float) -> None:
    """Over the drawing of the calibration set, as the guarantee is: 60 regions with 200 held-out texts each."""
    shares = [share_outside(a_region(0, seed=seed), texts(0, 200, 1000 + seed), level) for seed in range(60)]
    promised = np.floor(level * 201) / 201
    error = np.sqrt(promised * (1 - promised) * (1 / 200 + 1 / 200) / len(shares))  # of the texts, and of the threshold
    assert abs(np.mean(shares) - promised) < 4 * error


@pytest.mark.parametrize("count", [12, 24, 60])
def test_a_small_data_set_has_about_the_level_too_or_the_least_that_its_texts_allow(count: int) -> None:
    shares = [share_outside(a_region(0, count, seed), texts(0, 100, 1000 + seed), 0.05) for seed in range(80)]
    promised = max(0.05, 1 / (count + 1))
    error = np.sqrt(promised / count / len(shares))
    assert np.mean(shares) < promised + 4 * error
    assert np.mean(shares) > promised / 4


def test_foreign_texts_are_left_to_others_almost_always() -> None:
    chooses = table(("own", a_region(0)))
    assert np.mean([chooses.choose(one).expert is None for one in texts(3, 400, 5)]) > 0.98


def test_texts_held_out_by_their_kind_keep_the_level_where_new_texts_are_of_new_kinds() -> None:
    """Templated texts: new ones lie further away than a random half of the old ones says."""
    split, by_kind = [], []
    for seed in range(20):
        old, new = texts(0, 300, seed), texts(0, 200, 700 + seed, away=40)
        split.append(share_outside(describe(old, encoder=ENCODER, seed=seed), new, 0.05))
        calibrated = describe(old, encoder=ENCODER, held_out=texts(0, 200, 300 + seed, away=40), seed=seed)
        by_kind.append(share_outside(calibrated, new, 0.05))
    assert np.mean(split) > 0.3
    assert abs(np.mean(by_kind) - 0.05) < 0.02


def test_the_nearest_of_several_data_sets_gives_its_expert() -> None:
    chooses = table(*((name, a_region(topic)) for topic, name in enumerate(("maths", "law", "art"))))
    for topic, name in enumerate(("maths", "law", "art")):
        chosen = [chooses.choose(one).expert for one in texts(topic, 200, 77)]
        assert set(chosen) <= {name, None} and chosen.count(name) > 180


def test_between_two_experts_it_abstains_and_between_two_data_sets_of_one_expert_it_does_not() -> None:
    regions = [a_region(0), a_region(0, seed=1)]
    vectors = texts(0, 100, 50)
    two = table(("maths", regions[0]), ("law", regions[1]), margin=0.05)
    one = table(("maths", regions[0]), ("maths", regions[1]), margin=0.05)
    assert np.mean([two.choose(v).expert is None for v in vectors]) > 0.9
    assert np.mean([one.choose(v).expert == "maths" for v in vectors]) > 0.9


def test_the_margin_is_the_distance_to_the_threshold_or_to_the_nearest_other_expert() -> None:
    near = TextRegion(encoder=ENCODER, centroids=np.eye(2, dtype=np.float32)[:1], held_out=np.full(39, 0.6))
    far = TextRegion(encoder=ENCODER, centroids=np.eye(2, dtype=np.float32)[1:], held_out=np.full(39, 0.5))
    vector = np.array([0.8, 0.6], np.float32)
    assert table(("near", near)).choose(vector).margin == pytest.approx(0.2)
    chosen = table(("near", near), ("far", far), margin=0.1).choose(vector)
    assert (chosen.expert, chosen.stage) == ("near", "task") and chosen.margin == pytest.approx(0.2)
    outside = table(("near", near)).choose(np.array([0.1, -0.9], np.float32))
    assert outside.expert is None and outside.margin == pytest.approx(-0.5)
    strict = table(("near", near), ("far", far), margin=0.25).choose(vector)
    assert strict.abstains and strict.margin == pytest.approx(0.2)


def test_a_text_lies_outside_exactly_when_its_p_value_is_at_most_the_level() -> None:
    region = a_region(0)
    similarities = region.similarities(np.concatenate([texts(0, 300, 9), texts(2, 50, 9)]))
    for level in (0.01, 0.05, 0.25):
        np.testing.assert_array_equal(region.p_values(similarities) <= level, similarities < region.threshold(level))


def test_a_level_of_nought_takes_every_text_and_a_level_finer_than_the_texts_leaves_out_the_furthest() -> None:
    region = a_region(0, 12)
    assert table(("own", region), level=0.0).choose(-texts(0, 1, 3)[0]).expert == "own"
    assert region.threshold(0.001) == region.held_out[0]


def test_through_a_card_it_decides_as_before() -> None:
    region = a_region(1, 5000)
    card = json.loads(json.dumps({KEY: region.to_card()}))
    read = TextRegion.of_card(card)
    assert read is not None and len(region.held_out) == MAX_HELD_OUT
    vectors = texts(1, 50, 3)
    np.testing.assert_array_equal(read.similarities(vectors), region.similarities(vectors))
    assert read.threshold(0.05) == region.threshold(0.05)
    assert len(json.dumps(card)) < 12_000


def test_the_same_texts_and_seed_give_the_same_bytes_and_another_seed_does_not() -> None:
    assert a_region(0).to_card() == a_region(0).to_card()
    vectors = texts(0, 400, 0)
    assert describe(vectors, encoder=ENCODER, seed=1).to_card() != describe(vectors, encoder=ENCODER, seed=2).to_card()


def test_texts_that_are_all_one_text_are_described_too() -> None:
    region = describe(np.repeat(texts(0, 1, 0), 100, axis=0), encoder=ENCODER)
    assert share_outside(region, texts(0, 1, 0), 0.05) == 0
    assert share_outside(region, texts(2, 20, 0), 0.05) == 1


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (texts(0, 7, 0), "8 texts or more, got 7"),
        (np.full((20, 4), np.nan), "not finite"),
        (np.zeros((20, 4)), "no direction"),
    ],
)
def test_what_cannot_be_described_is_refused_in_words(vectors: np.ndarray, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        describe(vectors, encoder=ENCODER)


def test_regions_of_another_encoder_are_left_out_and_an_empty_table_abstains() -> None:
    other = RegionTable("f" * 64, [("own", a_region(0))], level=0.05, margin=0.0)
    assert len(other) == 0 and other.choose(texts(0, 1, 0)[0]).abstains


@pytest.mark.parametrize(
    "change",
    [
        {"width": 5}, {"width": "x"}, {"centroids": "!"}, {"centroids": ""}, {"held_out": []}, {"held_out": ["x"]},
        {"held_out": [float("nan")]}, {"held_out": [7.0]}, {"centroids": "AAAAAA==", "width": 2}, {"held_out": None},
    ],
)  # fmt: skip
def test_a_broken_card_is_refused_in_words(change: dict[str, object]) -> None:
    card = {KEY: a_region(0).to_card() | change}
    with pytest.raises(CorruptArtefact, match="mine cannot be used: its card's text_region"):
        TextRegion.of_card(card, "mine")


def test_a_card_without_a_region_has_none() -> None:
    assert TextRegion.of_card({"description": "anything"}) is None
