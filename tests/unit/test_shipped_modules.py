"""The module that ships: what it promises of accuracy, and that it is what its card says."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from jobs.evaluate_reasoning import evaluate, evaluate_set
from metasepia.reasoning import shipped
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.shipped import LoadedModule
from metasepia.synthetic.oracles import logistic_regression


@pytest.fixture(scope="module", params=["default", "tart-paper"])
def loaded(request: pytest.FixtureRequest) -> LoadedModule:
    return shipped.load(request.param)


@pytest.mark.parametrize("name", shipped.names())
def test_each_shipped_module_loads_with_its_cards_digest_and_names_its_command_and_seeds(name: str):
    folder = shipped.folder_of(name)
    card = json.loads((folder / "card.json").read_text())
    assert shipped.load(name).digest == card["digest"]
    assert card["command"].startswith("python -m jobs.train_reasoning") and card["step"] == card["num_steps"]
    assert card["recipe"]["seeds"].keys() == {"task", "data", "noise"}
    assert (folder / "loss.png").stat().st_size > 5000 and card["command"] in (folder / "README.md").read_text()


@pytest.mark.parametrize("k", [8, 16, 32])
def test_the_causal_module_is_within_3_points_of_logistic_regression_on_fresh_problems(k: int):
    row = evaluate(shipped.load("tart-paper"), k, num_problems=120, with_bayes=False)
    assert row.module >= row.scikit_learn - 0.03
    assert row.module < row.knows_w  # a leak of the label would show here


@pytest.mark.parametrize("k", [16, 64])
def test_the_default_module_is_better_than_any_fitted_classifier_on_fresh_problems(k: int):
    row = evaluate_set(shipped.load("default"), k, num_problems=96)
    assert row.module > max(row.logistic_regression, row.support_vectors, row.centroids)
    assert row.error < 0.05


def accuracies(loaded: LoadedModule, x: np.ndarray, y: np.ndarray, k: int = 32) -> tuple[float, float]:
    """Of the module and of LogisticRegression(C=1) on the same vectors, over 4 balanced draws of k examples."""
    ours, theirs = [], []
    x = ((x - x.mean(0)) / (x.std(0) + 1e-9)).astype(np.float32)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        shots = np.concatenate([rng.permutation(np.flatnonzero(y == c))[: k // 2] for c in (0, 1)])
        rest = rng.permutation(np.setdiff1d(np.arange(len(y)), shots))[:100]
        context = Context.of(x[shots], [str(label) for label in y[shots]], seed=seed)
        (p,) = answer(loaded.module, [(compile_context(context, loaded), x[rest])])
        ours.append(np.mean((p[:, 1] >= 0.5) == y[rest]))
        theirs.append(np.mean((logistic_regression(x[shots], y[shots].astype(float), x[rest]) >= 0.5) == y[rest]))
    return float(np.mean(ours)), float(np.mean(theirs))


def test_one_module_transfers_to_images_and_measurements_without_training(loaded: LoadedModule):
    x, y = map(np.asarray, load_breast_cancer(return_X_y=True))
    sets = [(x, y)]
    x, y = map(np.asarray, load_digits(return_X_y=True))
    for a, b in ((0, 1), (3, 8), (4, 9)):
        chosen = (y == a) | (y == b)
        sets.append((x[chosen], (y[chosen] == b).astype(int)))
    losses = [theirs - ours for ours, theirs in (accuracies(loaded, x, y) for x, y in sets)]
    assert np.mean(losses) <= 0.03 and max(losses) <= 0.05
