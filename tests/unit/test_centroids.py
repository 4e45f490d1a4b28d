"""Running centroids against the plain formulas over all states, and where they are kept."""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from actors.centroids import BROKEN, FILE, Centroids
from cluster.settings import CentroidSettings
from metasepia.centroids import CentroidKey, CentroidLimits, OnlineCentroids, adapter_digest
from metasepia.dispatch.centroid import CentroidTable, TaskCentroid
from metasepia.dispatch.observed import routable
from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.mixing import mixture_digest
from metasepia.rows import HiddenStatesWanted

LIMITS = CentroidLimits(max_tasks=4, max_centroids=12, reference_count=50, window=20)
KEY = CentroidKey(backbone="b" * 64, task="maths", adapter="", layer=3, pooling="last")
WIDTH = 24


def cloud(seed: int, count: int, at: int | None = None, away: float = 8.0) -> np.ndarray:
    """States around a common offset, as a causal model's are, `away` along one axis."""
    states = 50 + np.random.default_rng(seed).normal(size=(count, WIDTH))
    if at is not None:
        states[:, at] += away
    return states.astype(np.float32)


def kept(*blocks: np.ndarray, limits: CentroidLimits = LIMITS) -> OnlineCentroids:
    centroids = OnlineCentroids(limits)
    for block in blocks:
        centroids.observe(KEY, block)
    return centroids


def same(one: OnlineCentroids, other: OnlineCentroids) -> None:
    assert [key for key, _ in one] == [key for key, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert (a.total.count, a.recent.count) == (b.total.count, b.recent.count)
        np.testing.assert_allclose(a.total.mean, b.total.mean, rtol=1e-12)
        np.testing.assert_allclose(a.recent.mean, b.recent.mean, rtol=1e-12)
        pairs = [
            (a.total.scatter, b.total.scatter),
            (a.recent.weight, b.recent.weight),
            (a.recent.squares, b.recent.squares),
        ]
        assert all(x == pytest.approx(y, rel=1e-9) for x, y in pairs)


def test_mean_and_spread_are_those_of_all_states_however_they_came() -> None:
    states = cloud(0, 137, at=2)
    for cuts in ([], [1], [5, 6, 90], list(range(1, 137))):
        total = kept(*np.split(states, cuts))[KEY].total
        np.testing.assert_allclose(total.mean, states.astype(np.float64).mean(0), rtol=1e-13)
        assert total.spread == pytest.approx(math.sqrt(states.astype(np.float64).var(0, ddof=1).sum()), rel=1e-10)


def test_a_large_common_offset_costs_no_digits_of_the_spread() -> None:
    states = cloud(1, 300).astype(np.float64) + 1e6
    blocks = np.split(states, 60)
    assert kept(*blocks)[KEY].total.spread == pytest.approx(math.sqrt(states.var(0, ddof=1).sum()), rel=1e-9)


def test_the_recent_mean_is_the_weighted_sum_over_all_states() -> None:
    states = cloud(2, 90)
    states[60:] += 3
    weights = LIMITS.decay ** np.arange(89, -1, -1.0)
    for cuts in ([], [1, 2, 40], list(range(1, 90))):
        recent = kept(*np.split(states, cuts))[KEY].recent
        np.testing.assert_allclose(recent.mean, weights @ states.astype(np.float64) / weights.sum(), rtol=1e-12)
    long = kept(cloud(3, 2000))[KEY].recent
    assert long.worth == pytest.approx(LIMITS.window, rel=1e-6)


def test_merging_is_associative_and_equals_seeing_it_all_in_that_order() -> None:
    parts = [kept(cloud(seed, count, at=seed % 3)) for seed, count in enumerate((40, 7, 1, 66))]

    def merged(*some: OnlineCentroids) -> OnlineCentroids:
        whole = OnlineCentroids(replace(LIMITS, reference_count=10**9))
        for one in some:
            assert whole.merge((key, replace(value, reference=None)) for key, value in one) == 0
        return whole

    a, b, c, d = parts
    left = merged(merged(merged(a, b), c), d)
    same(left, merged(a, merged(b, merged(c, d))))
    same(left, merged(merged(a, b), merged(c, d)))
    states = [cloud(seed, count, at=seed % 3) for seed, count in enumerate((40, 7, 1, 66))]
    same(left, kept(*states, limits=replace(LIMITS, reference_count=10**9)))
    assert left.to_bytes() == merged(merged(merged(a, b), c), d).to_bytes()
    totals = [merged(*order)[KEY].total for order in ((a, b), (b, a))]
    assert totals[0].mean.tobytes() == totals[1].mean.tobytes() and totals[0].scatter == totals[1].scatter


def test_drift_stays_at_chance_for_one_kind_of_text_and_rises_with_another() -> None:
    centroids = kept(cloud(5, 50))
    drifts: list[float] = []
    for seed in range(40):
        centroids.observe(KEY, cloud(100 + seed, 10))
        one = centroids[KEY]
        assert one.drift is not None and one.chance is not None
        drifts.append(one.drift)
        assert one.chance == pytest.approx(math.sqrt(1 / one.recent.worth + 1 / 50))
    # The mean of the squares is that of chance: drift is no bias of the estimate.
    assert np.mean(np.square(drifts[4:])) == pytest.approx(1 / 20 + 1 / 50, rel=0.35)
    for seed in range(10):
        centroids.observe(KEY, cloud(500 + seed, 10, at=4))
    away = 8.0 / math.sqrt(WIDTH)  # the distance in spreads of unit noise in every dimension
    assert centroids[KEY].drift == pytest.approx(away, rel=0.2)
    for seed in range(10):
        centroids.observe(KEY, cloud(600 + seed, 10))
    assert centroids[KEY].drift == pytest.approx(0.0, abs=0.6)


def test_there_is_no_drift_before_there_is_a_reference() -> None:
    centroids = kept(cloud(5, 49))
    assert (centroids[KEY].drift, centroids[KEY].chance) == (None, None)
    centroids.observe(KEY, cloud(6, 1))
    assert centroids[KEY].drift is not None
    reference = centroids[KEY].reference
    centroids.observe(KEY, cloud(7, 500, at=1))
    assert centroids[KEY].reference is reference


def test_drift_is_counted_from_a_registered_centroid_where_there_is_one() -> None:
    centroids = OnlineCentroids(LIMITS)
    centroids.observe(KEY, cloud(8, 400, at=1), cloud(9, 1, at=3)[0] * 0 + 50)
    assert centroids[KEY].drift == pytest.approx(8.0 / math.sqrt(WIDTH), rel=0.2)
    assert centroids[KEY].chance == pytest.approx(math.sqrt(1 / 20), rel=1e-3)


def test_constant_states_have_no_drift_and_any_change_of_them_a_large_one() -> None:
    constant = np.full((60, WIDTH), 3.0, np.float32)
    centroids = kept(constant)
    assert centroids[KEY].drift == 0.0
    centroids.observe(KEY, constant + 1)
    drift = centroids[KEY].drift
    assert drift is not None and 1e4 < drift < 1e7


def separated(distance: float) -> list[float | None]:
    centroids = OnlineCentroids(LIMITS)
    for at, task in enumerate(("law", "maths", "sports")):
        centroids.observe(replace(KEY, task=task), cloud(20 + at, 200, at=at, away=distance))
    return [one.separation for one in centroids.facts()]


def test_separation_is_the_simplified_silhouette_on_root_mean_square_distances() -> None:
    clouds = {task: cloud(20 + at, 200, at=at).astype(np.float64) for at, task in enumerate(("law", "maths", "sports"))}
    means = {task: states.mean(0) for task, states in clouds.items()}

    def rms(states: np.ndarray, mean: np.ndarray) -> float:
        return math.sqrt(((states - mean) ** 2).sum(1).mean())

    expected = [
        1 - rms(states, means[task]) / min(rms(states, mean) for other, mean in means.items() if other != task)
        for task, states in clouds.items()
    ]
    assert separated(8.0) == pytest.approx(expected, rel=1e-6)
    near, far = separated(0.0), separated(100.0)
    assert all(one is not None and 0 <= one < 0.01 for one in near)
    assert all(one is not None and one > 0.9 for one in far)


def test_tasks_are_compared_only_with_those_of_their_layer_adapter_and_source() -> None:
    centroids = OnlineCentroids(LIMITS)
    others = [replace(KEY, task="law", layer=4), replace(KEY, task="auto:law"), replace(KEY, task="law", adapter="e")]
    for key in (KEY, *others):
        centroids.observe(key, cloud(3, 10))
    assert [one.separation for one in centroids.facts()] == [None] * 4
    centroids.observe(replace(KEY, task="law"), cloud(4, 10))
    assert sum(one.separation is not None for one in centroids.facts()) == 2


def test_the_number_of_tasks_and_of_centroids_is_bounded_and_the_refusal_says_so() -> None:
    centroids = OnlineCentroids(LIMITS)
    for task in "abcd":
        centroids.observe(replace(KEY, task=task), cloud(0, 2))
    with pytest.raises(InvalidRequest, match=r"4 tasks are kept and centroids\.max_tasks is 4; delete one") as refused:
        centroids.observe(replace(KEY, task="e"), cloud(0, 2))
    assert refused.value.param == "task"
    for layer in range(4, 12):
        centroids.observe(replace(KEY, task="a", layer=layer), cloud(0, 2))
    with pytest.raises(InvalidRequest, match=r"12 centroids are kept, 2 more .* centroids.max_centroids is 12"):
        centroids.check_room([replace(KEY, task="a", layer=layer) for layer in (11, 12, 13)])
    centroids.observe(replace(KEY, task="d"), cloud(1, 2))  # known: there is always room
    assert centroids.merge(kept(cloud(0, 3))) == 1 and len(centroids) == 12
    assert centroids.forget("a") == 9
    assert centroids.merge(kept(cloud(0, 3))) == 0


def test_states_that_are_not_finite_are_refused_and_leave_nothing_behind() -> None:
    states = cloud(0, 3)
    states[1, 2] = np.nan
    centroids = kept(cloud(1, 5))
    before = centroids.to_bytes()
    with pytest.raises(InvalidRequest, match="hold NaN or infinity"):
        centroids.observe(KEY, states)
    assert centroids.to_bytes() == before


def test_an_adapter_is_known_by_the_digest_that_a_model_name_stands_for() -> None:
    two = (("e" * 64, 0.5), ("f" * 64, 0.5))
    assert adapter_digest(()) == ""
    assert adapter_digest((("e" * 64, 1.0),)) == "e" * 64
    assert adapter_digest(two) == mixture_digest(two)


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_what_is_read_back_goes_on_as_if_it_had_never_left(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    centroids = kept(cloud(0, 70))
    centroids.observe(replace(KEY, task="law", adapter="e"), cloud(1, 3, at=1), cloud(2, 1)[0])
    path.write_bytes(centroids.to_bytes())
    again = OnlineCentroids.of_file(str(path), LIMITS)
    assert again.to_bytes() == centroids.to_bytes()
    for one in (centroids, again):
        one.observe(KEY, cloud(4, 9, at=2))
    assert again.to_bytes() == centroids.to_bytes()
    assert again.facts() == centroids.facts()


def _edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    with safe_open(str(path), "numpy") as file:
        header = dict(file.metadata())
    ((name, text),) = header.items()
    entries = json.loads(text)
    edit(entries[0])
    save_file(load_file(path), path, {name: json.dumps(entries)})


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"not safetensors"),
        lambda path: path.write_bytes(b""),
        lambda path: _edited(path, lambda entry: entry["key"].pop("layer")),
        lambda path: _edited(path, lambda entry: entry.pop("recent")),
        lambda path: _edited(path, lambda entry: entry.update(recent=[1, 0.0, 1.0])),
    ],
)
def test_a_damaged_file_is_refused_and_put_aside(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    path = tmp_path / FILE
    path.write_bytes(kept(cloud(0, 70)).to_bytes())
    harm(path)
    damaged = path.read_bytes()
    with pytest.raises(CorruptArtefact, match="cannot be used"):
        OnlineCentroids.of_file(str(path), LIMITS)
    assert asyncio.run(Centroids(CentroidSettings(), tmp_path).facts()) == ()
    assert path.with_name(FILE + BROKEN).read_bytes() == damaged and not path.exists()


def counts(part: Centroids) -> list[tuple[str, int]]:
    return [(one.key.task, one.count) for one in asyncio.run(part.facts())]


def test_what_was_saved_is_there_after_a_kill_and_what_came_since_is_lost(tmp_path: Path) -> None:
    settings = CentroidSettings(save_every_s=0.1)

    async def work() -> Centroids:
        part = Centroids(settings, tmp_path)
        await part.absorb(tuple(kept(cloud(0, 5))))
        give_up = asyncio.get_running_loop().time() + 5
        while not (tmp_path / FILE).exists():
            assert asyncio.get_running_loop().time() < give_up
            await asyncio.sleep(0.02)
        await part.absorb(tuple(kept(cloud(1, 3))))
        return part  # and no stop: killed

    part = asyncio.run(work())
    assert counts(part) == [("maths", 8)]
    assert counts(Centroids(settings, tmp_path)) == [("maths", 5)]


def test_an_orderly_end_saves_and_a_deleted_task_is_gone_from_disk_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        part = Centroids(CentroidSettings(), tmp_path)
        await part.absorb(tuple(kept(cloud(0, 5))))
        assert not (tmp_path / FILE).exists()
        await part.stop()
        assert counts_now(Centroids(CentroidSettings(), tmp_path)) == {"maths": 5}
        assert await part.forget("maths") == 1 and await part.forget("maths") == 0
        assert counts_now(Centroids(CentroidSettings(), tmp_path)) == {}

    def counts_now(part: Centroids) -> dict[str, int]:
        return {one.key.task: one.count for one in part._kept.facts()}

    asyncio.run(work())


def test_a_disk_that_refuses_loses_nothing_in_memory_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        part = Centroids(CentroidSettings(save_every_s=0.1), tmp_path)
        refuse = True
        replace_file = Path.replace

        def full(path: Path, target: Path) -> Path:
            if refuse:
                raise OSError(28, "No space left on device")
            return replace_file(path, target)

        monkeypatch.setattr(Path, "replace", full)
        await part.absorb(tuple(kept(cloud(0, 5))))
        with pytest.raises(OSError, match="No space left"):
            await part.save()
        assert list(tmp_path.iterdir()) == []  # no half of a file either
        refuse = False
        give_up = asyncio.get_running_loop().time() + 5
        while not (tmp_path / FILE).exists():
            assert asyncio.get_running_loop().time() < give_up
            await asyncio.sleep(0.02)
        assert [one.count for one in await part.facts()] == [5]

    asyncio.run(work())


# -- for `auto` --------------------------------------------------------------------------------------------------------


def observed(**tasks: np.ndarray) -> OnlineCentroids:
    centroids = OnlineCentroids(replace(LIMITS, max_tasks=8))
    for task, states in tasks.items():
        centroids.observe(replace(KEY, task=task), states)
    return centroids


def test_an_observed_mean_takes_the_place_of_the_cards_and_nothing_else_changes() -> None:
    card = TaskCentroid.calibrate(cloud(0, 60, at=0), cloud(1, 60), backbone=KEY.backbone, layer=3, pooling="last")
    known = observed(maths=cloud(2, 80, at=5), law=cloud(3, 10, at=1)).known_means(KEY.backbone, 64)
    assert [one.key.task for one in known] == ["maths"]  # law has too few states
    moved = routable(known, {"maths": card, "law": card})
    assert list(moved) == ["maths"]
    table = CentroidTable(KEY.backbone, {"m": moved["maths"]})
    wanted = HiddenStatesWanted(layers=(3,), pooling="last")
    hits = [table.choose({wanted: state[None]}).expert for state in (*cloud(7, 20, at=5), *cloud(8, 20, at=0))]
    assert hits == ["m"] * 20 + [None] * 20
    assert (moved["maths"].threshold, moved["maths"].centre.tolist()) == (card.threshold, card.centre.tolist())
    assert routable(known, {"maths": replace(card, layer=9)}) == {}


def test_an_expert_whose_card_says_nothing_is_chosen_by_its_task_among_the_others() -> None:
    tasks = {"maths": cloud(0, 80, at=0, away=12), "law": cloud(1, 80, at=1, away=12), "chat": cloud(2, 80)}
    known = observed(**tasks).known_means(KEY.backbone, 64)
    made = routable(known, {"maths": None, "law": None, "sports": None})
    assert set(made) == {"maths", "law"}
    table = CentroidTable(KEY.backbone, made)
    wanted = HiddenStatesWanted(layers=(3,), pooling="last")
    for at, expert in [(0, "maths"), (1, "law"), (None, None)]:
        for state in cloud(40, 60, at=at, away=12):
            assert table.choose({wanted: state[None]}).expert == expert
    assert routable(known[:1], {known[0].key.task: None}) == {}  # nothing to be told apart from


def test_auto_never_learns_from_its_own_choices_nor_from_an_experts_states() -> None:
    centroids = OnlineCentroids(LIMITS)
    for key in (replace(KEY, task="auto:maths"), replace(KEY, adapter="e" * 64), replace(KEY, backbone="c" * 64)):
        centroids.observe(key, cloud(0, 99))
    assert centroids.known_means(KEY.backbone, 64) == ()
