"""Few-shot classifiers on vectors: the reasoning module and what a user would fit by hand; each judged on one draw."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.svm import SVC

from metasepia.reasoning import calibration
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.shipped import LoadedModule

CLASSIFIERS = ("LogisticRegression", "SVC", "NearestCentroid")
CALIBRATED = ("LogisticRegression", "SVC")
"""Of these, the ones with probabilities. SVC's are by Platt's scaling, five-fold, as SVC(probability=True) had them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One draw of one set: what every side learns from and is judged on."""

    vectors: np.ndarray
    labels: Sequence[str]
    test: np.ndarray
    truth: Sequence[str]
    seed: int
    unlabelled: np.ndarray | None = None


@dataclass(frozen=True)
class Said:
    """A side's answers. `probabilities` is [test, classes] in the order of `classes`."""

    labels: Sequence[str]
    classes: Sequence[str] = ()
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Judged:
    """How right the answers are, and how honest the probabilities (None for a side that gives none)."""

    accuracy: float
    macro: float
    """Accuracy averaged over classes."""
    ece: float | None = None
    """Expected calibration error over 15 bins of the highest probability."""
    log_loss: float | None = None
    brier: float | None = None
    """Squared error summed over classes."""


Side = Callable[[Cell], Said]


def of_module(module: LoadedModule, *, with_unlabelled: bool = False) -> Side:
    def side(cell: Cell) -> Said:
        unlabelled = cell.unlabelled if with_unlabelled else None
        context = Context.of(cell.vectors, cell.labels, seed=cell.seed, unlabelled=unlabelled)
        compiled = compile_context(context, module)
        probabilities = answer(module.module, [(compiled, cell.test)])[0]
        return Said([compiled.classes[i] for i in probabilities.argmax(1)], compiled.classes, probabilities)

    return side


def of_classifiers(*, platt: bool = False) -> dict[str, Side]:
    """scikit-learn's three as a user would write them; `platt` fits SVC's probabilities too (five more fits)."""
    return {"LogisticRegression": _logistic, "SVC": _svc_with_platt if platt else _svc, "NearestCentroid": _centroid}


def _logistic(cell: Cell) -> Said:
    fitted = LogisticRegression(C=1, max_iter=1000).fit(cell.vectors, cell.labels)
    return Said(list(fitted.predict(cell.test)), list(fitted.classes_), fitted.predict_proba(cell.test))


def _svc(cell: Cell) -> Said:
    return Said(list(SVC().fit(cell.vectors, cell.labels).predict(cell.test)))


def _svc_with_platt(cell: Cell) -> Said:
    """The labels are the plain SVC's, which Platt's sigmoid may move."""
    plain = _svc(cell)
    folds = min(5, *Counter(cell.labels).values())
    if folds < 2:
        return plain
    platt: Any = CalibratedClassifierCV(SVC(), cv=folds, ensemble=cast(Any, False))  # scikit-learn's stubs say str
    platt.fit(cell.vectors, cell.labels)
    return Said(plain.labels, list(platt.classes_), platt.predict_proba(cell.test))


def _centroid(cell: Cell) -> Said:
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", UserWarning)  # both are about constant pixels, which change no answer
        return Said(list(NearestCentroid().fit(cell.vectors, cell.labels).predict(cell.test)))


def judge(cell: Cell, sides: Mapping[str, Side]) -> dict[str, Judged]:
    return {name: judged(side(cell), cell.truth) for name, side in sides.items()}


def judged(said: Said, truth: Sequence[str]) -> Judged:
    right = np.array([a == b for a, b in zip(said.labels, truth, strict=True)])
    macro = float(np.mean([right[[y == label for y in truth]].mean() for label in set(truth)]))
    if said.probabilities is None:
        return Judged(float(right.mean()), macro)
    unseen = sorted(set(truth) - set(said.classes))  # no example showed them: probability 0
    probabilities = np.pad(np.asarray(said.probabilities, np.float64), ((0, 0), (0, len(unseen))))
    classes = [*said.classes, *unseen]
    index = np.array([classes.index(label) for label in truth])
    of_truth = probabilities[np.arange(len(truth)), index]
    return Judged(
        float(right.mean()),
        macro,
        calibration.expected_calibration_error(probabilities, index),
        float(-np.log(np.clip(of_truth, 1e-7, 1)).mean()),
        calibration.brier_score(probabilities, index),
    )
