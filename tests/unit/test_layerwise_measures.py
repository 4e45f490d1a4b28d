"""Scores of planted states: which layers are said to tell tasks apart."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasepia.errors import InvalidSettings
from metasepia.layerwise import measures as scoring
from metasepia.layerwise.figures import principal
from metasepia.layerwise.measures import Measures, MeasureSettings, Scored, find
from metasepia.layerwise.report import ranges
from metasepia.layerwise.texts import TaskTexts, held_out

Checkpoint = Callable[[str], Path]
SEQUENCES = [tuple(range(5, 5 + n)) for n in (9, 1, 17, 4)]


class Planted:
    """Layer i holds the tasks with signal `strengths[i]`; the embedding and the words hold nothing of them."""

    def __init__(self, texts: TaskTexts, strengths: tuple[float, ...], data_seed: int = 0) -> None:
        self.texts, self.strengths, self.data_seed = texts, strengths, data_seed

    def layer(self, pooling: str, layer: int) -> np.ndarray:
        rng = np.random.default_rng((self.data_seed, layer))
        codes = np.unique(self.texts.tasks, return_inverse=True)[1]
        signal = self.strengths[layer] * np.eye(8)[codes]
        return (signal + rng.standard_normal((len(codes), 8))).astype(np.float32)

    def embedding(self) -> np.ndarray:
        return np.random.default_rng((self.data_seed, 99)).standard_normal((len(self.texts.texts), 8), np.float32)


def wordless(num_tasks: int = 4, templates: int = 6, inputs: int = 10) -> TaskTexts:
    """Texts whose words say nothing of their tasks."""
    rng = np.random.default_rng(5)
    triples = [(f"task {t}", f"{i}") for t in range(num_tasks) for i in range(templates) for _ in range(inputs)]
    words = [" ".join(f"w{rng.integers(50)}" for _ in range(6)) for _ in triples]
    tasks, names = zip(*triples, strict=True)
    return TaskTexts(tuple(words), tasks, names)


def measured(strengths: tuple[float, ...], **settings: Any) -> tuple[Measures, list[Scored], list[Scored]]:
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    measures = Measures(texts, held, MeasureSettings(resamples=200, **settings))
    planted = Planted(texts, strengths)
    return measures, list(measures.layers(planted, ("last",), range(len(strengths)))), measures.controls(planted)


def test_only_layers_with_planted_tasks_tell_them_apart():
    measures, layers, controls = measured((0.0, 1.0, 30.0, 0.0))
    found = find(measures, layers, controls, "last")
    assert found.best.layer == 2
    assert found.best["ari", "held_out"].value == found.best["accuracy", "held_out"].value == 1
    assert 2 in found.apart
    assert 2 in found.routed
    assert not {0, 3} & {*found.apart, *found.routed}
    for one in controls:
        assert abs(one["ari", "held_out"].value) < 0.1
    shuffled = found.best["accuracy_shuffled", "held_out"].value
    assert shuffled == pytest.approx(1 / 4, abs=0.12)


def test_words_that_give_the_tasks_away_leave_nothing_for_the_layers():
    texts = wordless()
    telling = TaskTexts(tuple(f"{task.replace(' ', '')} " * 8 for task in texts.tasks), texts.tasks, texts.templates)
    held, _ = held_out(telling, 0.5, seed=0)
    measures = Measures(telling, held, MeasureSettings(resamples=100))
    planted = Planted(telling, (30.0,))
    controls = measures.controls(planted)
    layers = list(measures.layers(planted, ("last",), (0,)))
    assert controls[1]["ari", "held_out"].value == 1
    assert measures.above(layers[0], controls, "ari").value == 0
    assert find(measures, layers, controls, "last").apart == ()


def test_the_words_are_a_control_that_can_win_whatever_the_scaling_of_states():
    texts = wordless()
    rng = np.random.default_rng(0)
    mixed = tuple(
        " ".join([f"{task[-1]}v{rng.integers(3)}" for _ in range(5)] + [f"rare{i}"])
        for i, task in enumerate(texts.tasks)
    )
    telling = dataclasses.replace(texts, texts=mixed)
    held, _ = held_out(telling, 0.5, seed=0)
    for scaling in ("standard", "raw"):
        measures = Measures(telling, held, MeasureSettings(resamples=50, scaling=scaling))
        words = measures.controls(Planted(telling, ()))[1]
        assert words["ari", "held_out"].value > 0.5


def test_constant_states_score_0_and_warn_nothing(recwarn: pytest.WarningsRecorder):
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    for scaling in scoring.SCALINGS:
        measures = Measures(texts, held, MeasureSettings(resamples=50, scaling=scaling))
        scored = measures.score(np.full((240, 8), 0.37, np.float32), pooling="last", features="layer", layer=0)
        assert scored["ari", "held_out"].value == scored["ari", "fit"].value == scored["nmi", "held_out"].value == 0
        assert scored["clusters", "fit"].value == 1
        assert scored["silhouette", "held_out"].value == 0
    assert not [one for one in recwarn if "ConvergenceWarning" in str(one.category)]


def test_one_huge_dimension_hides_the_tasks_from_raw_states_only():
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    states = Planted(texts, (12.0,)).layer("last", 0)
    states[:, 7] = 1000 * np.random.default_rng(1).standard_normal(len(states))
    ari = {}
    for scaling in ("standard", "raw"):
        measures = Measures(texts, held, MeasureSettings(resamples=50, scaling=scaling))
        ari[scaling] = measures.score(states, pooling="last", features="layer", layer=0)["ari", "held_out"].value
    assert ari["standard"] > 0.9
    assert ari["raw"] < 0.1


def test_tasks_hidden_behind_shared_inputs_are_found_within_each_input():
    texts = wordless()
    inputs = tuple(str(i % 10) for i in range(len(texts.texts)))
    states = Planted(texts, (8.0,)).layer("last", 0)
    states += 100 * np.random.default_rng(1).standard_normal((10, 8))[np.arange(len(states)) % 10]
    held, _ = held_out(texts, 0.5, seed=0)
    ari = []
    for known in ((), inputs):
        measures = Measures(dataclasses.replace(texts, inputs=known), held, MeasureSettings(resamples=50))
        ari.append(measures.score(states, pooling="last", features="layer", layer=0)["ari", "held_out"].value)
    assert ari[0] < 0.1
    assert ari[1] > 0.9
    with pytest.raises(InvalidSettings, match="240 of 240 are not shared"):
        Measures(dataclasses.replace(texts, inputs=tuple(map(str, range(240)))), held, MeasureSettings())


def test_held_out_texts_do_not_move_what_is_fitted():
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    measures = Measures(texts, held, MeasureSettings(resamples=50))
    states = Planted(texts, (3.0,)).layer("last", 0)
    before = measures.score(states, pooling="last", features="layer", layer=0)
    states[held] = 1e3
    after = measures.score(states, pooling="last", features="layer", layer=0)
    for metric in ("ari", "nmi", "silhouette", "ari_shuffled"):
        assert before[metric, "fit"] == after[metric, "fit"]
    assert before["ari", "held_out"].value > 0.3 > after["ari", "held_out"].value


def test_intervals_hold_the_value_and_narrow_with_more_texts():
    widths = []
    for inputs in (6, 60):
        texts = wordless(templates=12, inputs=inputs)
        held, _ = held_out(texts, 0.5, seed=0)
        measures = Measures(texts, held, MeasureSettings(resamples=300))
        assert measures.unit == "template"
        value = measures.score(Planted(texts, (3.0,)).layer("last", 0), pooling="last", features="layer", layer=0)[
            "accuracy", "held_out"
        ]
        assert value.low is not None and value.high is not None
        assert value.low <= value.value <= value.high
        widths.append(value.high - value.low)
    assert widths[1] < 0.6 * widths[0]


def test_too_few_templates_are_not_resampled():
    texts = wordless(num_tasks=2, templates=2)
    held, by = held_out(texts, 0.5, seed=0)
    assert by == "template"
    assert Measures(texts, held, MeasureSettings()).unit == "text"


def test_the_main_axis_is_the_one_along_which_states_vary_most():
    rng = np.random.default_rng(0)
    direction = np.array([3.0, 0.0, -4.0]) / 5
    fit = 10 * rng.standard_normal((200, 1)) * direction + 0.1 * rng.standard_normal((200, 3)) + 7
    shown, _, shares = principal(fit, fit[:5])
    expected = (fit - fit.mean(0)) @ -direction  # its largest component is made positive
    np.testing.assert_allclose(shown[:, 0], expected, atol=0.5)
    assert shares[0] > 0.99
    flat, _, none = principal(np.ones((5, 3)), np.ones((2, 3)))
    assert not flat.any() and none == (0, 0)
    line, _, both = principal(np.outer(np.arange(5.0), [1.0, 2.0]), np.ones((2, 2)))
    assert not line[:, 1].any() and both[0] == pytest.approx(1)


def test_neighbouring_layers_are_named_together():
    assert ranges((5, 6, 7, 9), range(12)) == "5 to 7, 9"
    assert ranges((0, 10), (0, 5, 10)) == "0, 10"
    assert ranges((5, 10), (0, 5, 10)) == "5 to 10"
    assert ranges((), (0, 1)) == "none"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_whole_templates_are_held_out_of_every_task_and_never_all(share: float):
    texts = wordless()
    held, by = held_out(texts, share, seed=0)
    assert by == "template"
    groups = np.asarray(texts.groups())
    assert not set(groups[held]) & set(groups[~held])
    for task in texts.names:
        own = np.asarray(texts.tasks) == task
        assert 0 < held[own].sum() < own.sum()


def test_texts_without_templates_are_held_out_one_by_one():
    texts = TaskTexts(tuple(f"x{i}" for i in range(20)), ("a", "b") * 10, ("",) * 20)
    held, by = held_out(texts, 0.3, seed=0)
    assert (by, held.sum()) == ("text", 6)
    assert (held_out(texts, 0.3, seed=1)[0] != held).any()
    with pytest.raises(InvalidSettings, match="a, b has fewer than two templates"):
        held_out(texts, 0.3, seed=0, by="template")
