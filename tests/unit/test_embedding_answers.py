import numpy as np
import pytest

from metasepia.embedding.answers import MAX_EXAMPLES, MAX_LABELS, Answers
from metasepia.errors import InvalidRequest

TEXTS = [f"text {i}" for i in range(6)]


def sampled(data_seed: int, draws: int = 5) -> Answers:
    counts = np.random.default_rng(data_seed).multinomial(draws, [0.6, 0.3, 0.1], 6).astype(float)
    return Answers.of_counts(TEXTS, ["c", "a", "b"], counts)


def test_labels_are_sorted_and_each_text_keeps_its_own():
    answers = Answers.of_labelled(TEXTS, ["no", "yes", "maybe", "no", "no", "yes"])
    given = [answers.labels[i] for i in answers.probabilities.argmax(1)]
    assert answers.labels == ("maybe", "no", "yes") and given == ["no", "yes", "maybe", "no", "no", "yes"]


def test_the_order_of_labels_does_not_enter_the_digest():
    p = np.array([[0.5, 0.2, 0.3]] * 3 + [[0.1, 0.1, 0.8]] * 3)
    one = Answers.of_probabilities(TEXTS, ["a", "b", "c"], p)
    other = Answers.of_probabilities(TEXTS, ["c", "a", "b"], p[:, [2, 0, 1]])
    assert one.digest == other.digest
    assert one.digest != Answers.of_probabilities(TEXTS, ["a", "b", "d"], p).digest


@pytest.mark.parametrize(
    ("texts", "labels", "told"),
    [
        ([], [], "empty"),
        (TEXTS, ["x"] * 6, "every text has the label 'x'"),
        (TEXTS, ["x"] * 5, "6 texts, 5 labels"),
        (["a", " "], ["x", "y"], "it is empty"),
        (["a", "b\ud800"], ["x", "y"], r"texts\[1\]: not valid Unicode"),
        (["a", "b"], ["x", "y\udfff"], r"labels\[1\]: not valid Unicode"),
        ([f"{i}" for i in range(MAX_LABELS + 1)], [f"{i}" for i in range(MAX_LABELS + 1)], "open answers"),
    ],
)
def test_a_data_set_that_tells_nothing_is_refused_in_words(texts, labels, told):
    with pytest.raises(InvalidRequest, match=told):
        Answers.of_labelled(texts, labels)


def test_a_million_examples_are_refused_and_drawn_where_that_is_asked_for():
    count = 1_000_000
    texts, labels = ["a text"] * count, ["rare" if i == 7 else "ab"[i % 4 == 0] for i in range(count)]
    with pytest.raises(InvalidRequest, match=f"more than the {MAX_EXAMPLES}.*most=1000"):
        Answers.of_labelled(texts, labels)
    drawn = Answers.of_labelled(texts, labels, most=1000)
    assert drawn.notes == ("1000 of 1000000 examples, drawn by seed 0 with each label's share kept",)
    assert drawn.probabilities.sum(0).tolist() == [749, 250, 1]
    assert Answers.of_labelled(texts, labels, most=1000).digest == drawn.digest


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([np.nan, 0.5], r"probabilities\[2\]: not finite"),
        ([1.2, -0.2], r"probabilities\[2\]: negative"),
        ([0.3, 0.3], r"probabilities\[2\]: sums to 0.6"),
    ],
)
def test_probabilities_off_the_simplex_name_their_row(row, told):
    p = np.full((6, 2), 0.5)
    p[2] = row
    with pytest.raises(InvalidRequest, match=told):
        Answers.of_probabilities(TEXTS, ["a", "b"], p)


def test_redraws_have_the_mean_and_the_spread_that_sampling_left():
    answers = sampled(0)
    drawn = np.stack([answers.redrawn(seed).probabilities for seed in range(3000)])
    assert answers.standard_error is not None
    np.testing.assert_allclose(drawn.mean(0), answers.probabilities, atol=0.02)
    np.testing.assert_allclose((drawn.var(0)).sum(1), (answers.standard_error**2).sum(1), rtol=0.1)


def test_counts_tell_more_the_more_draws_there_were():
    few, many = (Answers.of_counts(TEXTS, ["a", "b"], n * np.array([[3.0, 1.0]] * 6)) for n in (1, 100))
    assert few.standard_error is not None and many.standard_error is not None
    # Jeffreys: (3 + 1/2) / (4 + 1), and the variance of that Beta distribution.
    assert few.probabilities[0, 0] == pytest.approx(0.7) and few.standard_error[0, 0] ** 2 == pytest.approx(
        0.7 * 0.3 / 6
    )
    assert many.standard_error[0, 0] < few.standard_error[0, 0] / 8


def test_exact_answers_are_not_redrawn():
    exact = Answers.of_labelled(TEXTS, list("ababab"))
    assert exact.redrawn(3) is exact


def test_certainty_with_an_error_is_refused_and_says_what_to_do():
    p, error = np.tile([1.0, 0.0], (6, 1)), np.full((6, 2), 0.1)
    with pytest.raises(InvalidRequest, match=r"Answers\.of_counts"):
        Answers.of_probabilities(TEXTS, ["a", "b"], p, error)


def test_answers_that_do_not_depend_on_the_text_are_found_out():
    assert Answers.of_probabilities(TEXTS, ["a", "b"], np.tile([0.9, 0.1], (6, 1))).is_constant
    assert Answers.of_replies(TEXTS, ["I cannot help."] * 6).is_constant
    assert not Answers.of_replies(TEXTS, ["yes", "no"] * 3).is_constant


def test_open_answers_take_no_probabilities_and_labels_no_replies():
    with pytest.raises(InvalidRequest, match="one a text"):
        Answers.of_replies(TEXTS, ["only one"])
    with pytest.raises(InvalidRequest, match="not both"):
        Answers(
            texts=tuple(TEXTS), labels=("a", "b"), probabilities=np.full((6, 2), 0.5, np.float32), replies=("x",) * 6
        )
