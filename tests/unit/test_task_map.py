"""The map of tasks: what its projections keep, what stands in the page, and the page in a real browser."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasepia.digests import digest_of
from metasepia.embedding import task_map
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.embedding.task_map import MapPoint, nearest, neighbour_plane, points_of, principal_plane, render, stress
from metasepia.errors import InvalidSettings
from tests.unit.browser import Tab, browser

EVIL = "</script><script>document.title='x'</script>\u2028&amp;"


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clusters(num: int = 48, dims: int = 16, data_seed: int = 0) -> np.ndarray:
    """Unit vectors about six centres in turn."""
    rng = np.random.default_rng(data_seed)
    return unit(rng.standard_normal((6, dims))[np.arange(num) % 6] + 0.25 * rng.standard_normal((num, dims)))


def points(num: int = 48) -> list[MapPoint]:
    kinds = ("data_set", "model", "prompt", "expert")
    made = [
        MapPoint(
            name=f"group-{place % 6} no {place}",
            kind=kinds[place // 6 % 4],
            space="agreement abc",
            vector=vector,
            source={"num_texts": 100 + place, "labels": ["no", "yes"], "answers": digest_of(place), "split": None},
        )
        for place, vector in enumerate(clusters(num))
    ]
    others = clusters(5, 7, data_seed=1)
    return made + [
        MapPoint(name=f"other {place}", kind="prompt", space="fisher def", vector=one, noise=0.125)
        for place, one in enumerate(others)
    ]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("shape", [(30, 9), (9, 30)])
def test_principal_components_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]):
    vectors = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    xy, share = principal_plane(vectors)
    np.testing.assert_allclose(np.abs(xy), np.abs(u[:, :2] * s[:2]), atol=1e-8)
    assert share == pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), abs=1e-12)
    assert all(axis[np.argmax(np.abs(axis))] > 0 for axis in xy.T)


def test_lanczos_finds_the_same_plane_as_the_gram_matrix(monkeypatch: pytest.MonkeyPatch):
    vectors = clusters(1100, 1030)
    by_lanczos, share = principal_plane(vectors)
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    assert share == pytest.approx((np.linalg.svd(centred, compute_uv=False)[:2] ** 2).sum() / (centred**2).sum())
    again, _ = principal_plane(vectors)
    assert by_lanczos.tobytes() == again.tobytes()


def test_of_points_in_a_plane_nothing_is_lost():
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    flat = np.stack([np.cos(angles), np.sin(angles), np.full(12, 0.5)], axis=1)
    vectors = unit(flat @ np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0])
    xy, share = principal_plane(vectors)
    assert share == pytest.approx(1.0)
    assert stress(vectors, xy) < 1e-3
    shuffled = xy[np.random.default_rng(1).permutation(12)]
    assert stress(vectors, shuffled) > 0.3


def test_t_sne_is_the_same_twice_and_keeps_clusters_apart():
    vectors = clusters(60, 32)
    start, _ = principal_plane(vectors)
    xy = neighbour_plane(vectors, start)
    assert xy.tobytes() == neighbour_plane(vectors, start).tobytes()
    group = np.arange(60) % 6
    away = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    np.fill_diagonal(away, np.inf)
    assert (group[away.argmin(1)] == group).mean() > 0.95


def test_nearest_are_the_largest_cosines_and_never_oneself():
    vectors = clusters(700, 8)
    found, values = nearest(vectors, 5)
    cosine = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(cosine, -2)
    np.testing.assert_allclose(values, -np.sort(-cosine, axis=1)[:, :5], atol=1e-6)
    assert not (found == np.arange(700)[:, None]).any()
    same, _ = nearest(np.tile(vectors[:1], (4, 1)), 5)
    assert same.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], "of equals the earlier comes first"


def test_the_page_holds_points_by_space_and_neighbours_within_it():
    given = points()
    data = data_of(render(given, "Tasks"))
    assert data["kinds"] == ["data_set", "model", "prompt", "expert"]
    assert [(one["name"], len(one["members"]), len(one["views"])) for one in data["spaces"]] == [
        ("agreement abc", 48, 2),
        ("fisher def", 5, 1),
    ]
    space = data["points"]["space"]
    for place, others in enumerate(data["points"]["near"]):
        assert len(others) == (5 if place < 48 else 4)
        assert all(space[one] == space[place] for one in others)
    inside = [given[0].vector @ given[other].vector for other in data["points"]["near"][0]]
    np.testing.assert_allclose(data["points"]["cosine"][0], inside, atol=6e-4)
    assert data["points"]["source"][0] == ["num_texts: 100", "labels: no, yes", f"answers: {digest_of(0)[:12]}"]
    assert max(abs(value) for xy in data["spaces"][0]["views"][0]["xy"] for value in xy) == 1.0
    assert re.match(r"Two principal components: \d+% of the variance, stress 0\.\d\d, \d+% of the nearest 5 kept\.",
                    data["spaces"][0]["views"][0]["told"])  # fmt: skip


def test_the_same_points_give_the_same_bytes_and_nothing_of_the_network():
    page = render(points(), "Tasks")
    assert page == render(points(), "Tasks")
    assert not re.findall(r"(?:src|href)=|url\(|@import|https?://", page)
    for tag in ("style", "script"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(inside) == 1
        assert f"'sha256-{b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()}'" in page


def test_names_and_titles_are_text_and_never_markup():
    point = MapPoint(name=EVIL, kind="model", space=EVIL, vector=np.ones(3), source={EVIL: EVIL})
    page = render([point], EVIL)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert data_of(page)["points"]["name"] == [EVIL]


def test_one_point_none_and_points_all_alike_have_a_page():
    assert data_of(render([], "Tasks"))["spaces"] == []
    one = MapPoint(name="a", kind="model", space="s", vector=np.ones(3))
    for count in (1, 2, 12):
        view = data_of(render([one] * count, "Tasks"))["spaces"][0]["views"]
        assert view[0]["xy"] == [[0.0, 0.0]] * count and len(view) == 1


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ([np.ones(3), np.ones(4)], r"vector = \[3, 4\]"),
        ([np.ones(3), np.zeros(3)], "'1'"),
        ([np.ones(3), np.full(3, np.nan)], "'1'"),
    ],
)
def test_vectors_that_have_no_cosine_are_refused_by_name(vectors: list[np.ndarray], said: str):
    given = [MapPoint(name=str(i), kind="model", space="s", vector=one) for i, one in enumerate(vectors)]
    with pytest.raises(InvalidSettings, match=said):
        render(given, "Tasks")


def test_more_points_than_a_page_holds_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task_map, "MAX_POINTS", 3)
    with pytest.raises(InvalidSettings, match="at most 3"):
        render(points()[:4], "Tasks")


def test_embeddings_become_points_by_space_and_experts_are_their_own_kind():
    space = Space(surrogate=digest_of(1), method="agreement", settings={}, probes=digest_of(2))
    made = [
        TaskEmbedding(space=space, vector=unit(np.ones((1, 3)))[0], kind="prompt", name=name, source=source)
        for name, source in (("base", {}), ("tuned", {"expert": "sentiment"}))
    ]
    first, second = points_of(made)
    assert (first.kind, second.kind) == ("prompt", "expert")
    assert first.space == f"agreement {space.digest[:12]}" == second.space


# -- in a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "map.html"
    path.write_text(render([*points(), MapPoint(name=EVIL, kind="model", space="agreement abc", vector=clusters()[7])],
                           "Tasks of a test"), encoding="utf-8")  # fmt: skip
    return path


def where(tab: Tab, point: int) -> tuple[float, float]:
    """On the screen."""
    left, top = tab.value("(box => [box.left, box.top])(document.getElementById('map').getBoundingClientRect())")
    x, y = tab.value(f"document.getElementById('map').placeOf({point})")
    return left + x, top + y


def choose(tab: Tab, control: str, value: str, event: str) -> None:
    """As a person's choice in a list or a field."""
    tab.value(f"(one => {{ one.value = '{value}'; one.dispatchEvent(new Event('{event}')) }})({control})")


def text(tab: Tab, selector: str) -> str:
    return tab.value(f"[...document.querySelectorAll({selector!r})].map(one => one.textContent).join('|')")


def colours(tab: Tab) -> int:
    """How many colours the canvas shows: an empty one has one."""
    return tab.value(
        "(() => { const map = document.getElementById('map'), of = map.getContext('2d');"
        " const seen = new Uint32Array(of.getImageData(0, 0, map.width, map.height).data.buffer);"
        " return new Set(seen).size; })()"
    )


def test_hover_shows_a_point_and_its_nearest_and_a_click_pins_it(tab: Tab, page: Path):
    tab.open(page)
    assert colours(tab) > 4 and tab.value("document.getElementById('near').hidden")
    given, (near, _) = points(), nearest(clusters(), 5)
    tab.move(*where(tab, 20))
    shown = text(tab, "#near")
    assert given[20].name in shown and "expert in agreement abc" in shown and "num texts120" in shown
    assert len(tab.value("[...document.querySelectorAll('#near td:last-child')].map(one => one.textContent)")) == 5
    assert given[int(near[20, 0])].name in shown or EVIL in shown
    tab.click(*where(tab, 20))
    tab.move(600, 5)
    assert tab.value("document.getElementById('near').hidden")
    assert text(tab, "#pinned .name") == given[20].name
    tab.click(*where(tab, 20))
    assert text(tab, "#pinned .name") == ""


def test_filters_by_kind_text_and_space_leave_what_they_say(tab: Tab, page: Path):
    tab.open(page)
    assert text(tab, "#count") == "49 of 49 points"
    tab.value("document.querySelector('#kinds input[value=prompt]').click()")
    assert text(tab, "#count") == "37 of 49 points"
    hidden = where(tab, 12)
    tab.move(*hidden)
    assert points()[12].name not in text(tab, "#near .name"), "what is filtered out answers no pointer"
    tab.value("document.getElementById('search').focus()")
    tab.type("Group-3 no")
    assert text(tab, "#count") == "6 of 49 points"
    assert text(tab, "#list li") == "|".join(f"group-3 no {place}" for place in (3, 9, 21, 27, 33, 45))
    choose(tab, "document.getElementById('search')", "", "input")
    choose(tab, "document.getElementById('space')", "1", "change")
    assert text(tab, "#count") == "0 of 5 points", "the kind stays filtered"
    tab.value("document.querySelector('#kinds input[value=prompt]').click()")
    assert text(tab, "#list li") == "other 0|other 1|other 2|other 3|other 4"
    tab.move(*where(tab, 50))
    assert "other 2" in text(tab, "#near .name") and "noise0.13" in text(tab, "#near dl")


def test_keys_alone_go_from_point_to_point_pin_zoom_and_let_go(tab: Tab, page: Path):
    tab.open(page)
    tab.value("document.getElementById('map').focus()")
    tab.key("ArrowRight")
    first = text(tab, "#near .name")
    before = tab.value("document.getElementById('said').textContent")
    assert first and first in before and "Nearest: " in before
    tab.key("ArrowLeft")
    second = text(tab, "#near .name")
    assert second and second != first
    tab.key("Enter")
    assert text(tab, "#pinned .name") == second
    at = where(tab, 0), where(tab, 1)
    tab.key("+")
    wider = where(tab, 0), where(tab, 1)
    assert np.hypot(*np.subtract(*wider)) == pytest.approx(1.4 * np.hypot(*np.subtract(*at)))
    tab.key("0")
    assert where(tab, 0) == pytest.approx(at[0])
    tab.key("Escape")
    tab.key("Escape")
    assert text(tab, "#pinned .name") == "" and tab.value("document.getElementById('near').hidden")


def test_dragging_moves_and_the_wheel_zooms_about_the_pointer(tab: Tab, page: Path):
    tab.open(page)
    x, y = where(tab, 5)
    away = np.hypot(*np.subtract(where(tab, 0), (x, y)))
    tab.wheel(x, y, -400)
    assert np.hypot(*np.subtract(where(tab, 0), where(tab, 5))) == pytest.approx(np.exp(0.6) * away)
    assert where(tab, 5) == pytest.approx((x, y), abs=1), "a wheel tells whole pixels"
    x, y = where(tab, 5)
    tab.drag(400, 500, 430, 480)
    assert where(tab, 5) == pytest.approx((x + 30, y - 20), abs=1e-6)
    assert text(tab, "#pinned .name") == "", "a drag pins nothing"


def test_names_that_look_like_markup_are_shown_as_they_are_and_the_page_is_quiet(tab: Tab, page: Path):
    tab.problems.clear()
    tab.asked_for.clear()
    tab.open(page, dark=True)
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    tab.value("[...document.querySelectorAll('#list button')].at(-1).click()")
    assert text(tab, "#pinned .name") == EVIL
    assert tab.value("document.title") == "Tasks of a test"
    assert tab.problems == [] and tab.asked_for == [page.as_uri()]
