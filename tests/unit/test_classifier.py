import pickle  # noqa: TID251 (in memory: what joblib sends to its workers)
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import metasepia.reasoning
from metasepia.errors import InvalidSettings
from metasepia.reasoning import shipped
from metasepia.reasoning.classifier import ReasoningClassifier
from metasepia.reasoning.context import Context, answer, compile_context


@parametrize_with_checks([ReasoningClassifier()])
def test_scikit_learns_own_checks_pass(estimator, check):
    check(estimator)


def test_it_is_found_under_the_package():
    assert metasepia.reasoning.ReasoningClassifier is ReasoningClassifier


class Letters:
    """A text's vector counts its letters a to h."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32).reshape(-1, 8)


def moons(num: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(num) % 2
    return rng.standard_normal((num, 6)) + 2 * y[:, None], y


def test_probabilities_are_those_of_the_compiled_context():
    x, y = moons()
    queries = moons(70, seed=1)[0]
    loaded = shipped.load("default")
    context = Context.of(x, ["no" if one == 0 else "yes" for one in y], seed=3)
    (expected,) = answer(loaded.module, [(compile_context(context, loaded), queries.astype(np.float32))])
    classifier = ReasoningClassifier(seed=3).fit(x, y)
    np.testing.assert_allclose(classifier.predict_proba(queries), expected, atol=1e-5)
    assert classifier.module_digest_ == loaded.digest


@pytest.mark.parametrize("classes", [[10, 2], ["b", "ä"], [True, False], [2.0, -1.0]])
def test_classes_of_any_kind_come_back_as_they_were_given(classes: list):
    x, y = moons()
    labels = np.array(classes)[y]
    classifier = ReasoningClassifier().fit(x, labels)
    assert classifier.classes_.tolist() == sorted(classes)
    said = classifier.predict(x)
    assert said.dtype == labels.dtype
    assert np.mean(said == labels) > 0.9


def test_more_than_ten_classes_keep_their_columns():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(12), 4)
    centres = 5 * rng.standard_normal((12, 16))
    x = centres[y] + rng.standard_normal((48, 16))
    said = ReasoningClassifier().fit(x, y).predict(centres)
    assert np.mean(said == np.arange(12)) > 0.8


def test_texts_are_embedded_by_the_encoder_given():
    texts, labels = ["aaab", "bbb", "aab", "bba", "aaa", "bbab"], ["a", "b", "a", "b", "a", "b"]
    classifier = ReasoningClassifier(encoder=Letters()).fit(texts, labels, unlabelled=["abab", "bbaa"])
    assert classifier.predict(["aaaa", "bbbb"]).tolist() == ["a", "b"]
    assert classifier.context_.unlabelled is not None and len(classifier.context_.unlabelled) == 2
    by_vectors = ReasoningClassifier().fit(Letters().embed(texts), labels, unlabelled=Letters().embed(["abab", "bbaa"]))
    np.testing.assert_array_equal(
        classifier.predict_proba(["aaaa"]), by_vectors.predict_proba(Letters().embed(["aaaa"]))
    )


def test_unlabelled_vectors_change_the_reduction():
    x, y = moons(12)
    more = 3 * moons(200, seed=5)[0]
    plain, informed = ReasoningClassifier().fit(x, y), ReasoningClassifier().fit(x, y, unlabelled=more)
    assert not np.allclose(plain.predict_proba(x), informed.predict_proba(x), atol=1e-4)


def test_a_pickle_holds_the_examples_and_not_the_module():
    x, y = moons()
    fitted = ReasoningClassifier().fit(x, y)
    blob = pickle.dumps(fitted)
    assert len(blob) < 3 * x.size * 8 + 5000
    again = pickle.loads(blob)
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))


def test_a_pickle_of_another_module_is_refused_and_not_answered():
    x, y = moons()
    fitted = ReasoningClassifier().fit(x, y)
    fitted.module_digest_ = "f" * 64
    with pytest.raises(InvalidSettings, match="the module that it was fitted with"):
        pickle.loads(pickle.dumps(fitted)).predict(x)


def test_it_takes_part_in_pipelines_cross_validation_and_cloning():
    pipeline = make_pipeline(StandardScaler(), ReasoningClassifier(seed=4))
    assert cross_val_score(pipeline, *moons(60), cv=3).mean() > 0.9
    copy = clone(ReasoningClassifier(seed=9))
    assert isinstance(copy, ReasoningClassifier)
    assert copy.get_params() == {"module": "default", "encoder": None, "seed": 9}


def test_no_queries_have_no_answers():
    x, y = moons()
    texts = ReasoningClassifier(encoder=Letters()).fit(["a", "b", "aa", "bb"], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="0 sample"):
        texts.predict([])
    with pytest.raises(ValueError, match="0 sample"):
        ReasoningClassifier().fit(x, y).predict(x[:0])
