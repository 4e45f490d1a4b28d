import math

import numpy as np
import pytest

from metasepia.errors import InvalidRequest
from metasepia.reasoning import calibration

TWO = np.array([[0.9, 0.1], [0.2, 0.8], [0.45, 0.55], [0.7, 0.3]])
TRUTH = np.array([0, 1, 0, 1])


def test_the_calibration_error_is_the_weighted_gap_of_each_bin():
    # Bins of width 0.5: all four confidences (0.9, 0.8, 0.55, 0.7) in one, two of four right.
    assert calibration.expected_calibration_error(TWO, TRUTH, bins=2) == pytest.approx(
        (0.9 + 0.8 + 0.55 + 0.7) / 4 - 0.5
    )
    # Of width 0.1: 0.55 | 0.7 | 0.8 | 0.9, one each.
    assert calibration.expected_calibration_error(TWO, TRUTH, bins=10) == pytest.approx((0.1 + 0.2 + 0.55 + 0.7) / 4)


def test_probabilities_that_mean_what_they_say_have_little_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=200_000)
    truth = (rng.uniform(size=len(p)) < p).astype(int)
    said = np.stack([1 - p, p], axis=1)
    assert calibration.expected_calibration_error(said, truth) < 0.005
    overconfident = np.stack([1 - np.round(p), np.round(p)], axis=1)
    assert calibration.expected_calibration_error(overconfident, truth) == pytest.approx(0.25, abs=0.005)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_one_above_one_to_the_last():
    table = calibration.reliability(np.array([[0.5, 0.5], [1.0000001, 0.0]]), np.array([1, 0]), bins=2)
    assert [one.count for one in table] == [1, 1]
    assert (table[0].accuracy, table[1].accuracy) == (0.0, 1.0)
    empty = calibration.reliability(np.array([[0.9, 0.1]]), np.array([0]), bins=4)[0]
    assert (empty.low, empty.high, empty.count) == (0.0, 0.25, 0) and math.isnan(empty.accuracy)


def test_the_brier_score_is_zero_for_certain_truth_and_two_for_certain_error():
    assert calibration.brier_score(np.eye(3), np.array([0, 1, 2])) == 0
    assert calibration.brier_score(np.eye(3), np.array([1, 2, 0])) == 2
    assert calibration.brier_score(np.array([[0.25, 0.75]]), np.array([1])) == pytest.approx(2 * 0.25**2)


def test_answers_below_the_threshold_are_not_given():
    assert calibration.abstain(TWO, 0.7).tolist() == [0, 1, -1, 0]
    assert calibration.abstain(TWO, 0.0).tolist() == [0, 1, 1, 0]


def test_each_threshold_answers_its_share_with_its_accuracy():
    found = calibration.abstentions(TWO, TRUTH)
    assert [(one.threshold, one.coverage) for one in found] == [(0.55, 1.0), (0.7, 0.75), (0.8, 0.5), (0.9, 0.25)]
    assert [one.accuracy for one in found] == pytest.approx([0.5, 2 / 3, 1, 1])
    for one in found:
        kept = calibration.abstain(TWO, one.threshold)
        assert (kept >= 0).mean() == one.coverage
        assert (kept == TRUTH)[kept >= 0].mean() == pytest.approx(one.accuracy)


def test_rows_of_equal_confidence_are_answered_or_withheld_together():
    same = np.array([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    assert [(one.threshold, one.accuracy) for one in calibration.abstentions(same, np.array([0, 0, 0]))] == [
        (0.6, pytest.approx(2 / 3)),
        (0.8, 0.5),
    ]


def test_the_threshold_for_an_accuracy_is_the_lowest_that_reaches_it():
    found = calibration.threshold_for(TWO, TRUTH, 0.9)
    assert found is not None and (found.threshold, found.coverage) == (0.8, 0.5)
    assert calibration.threshold_for(TWO[2:], TRUTH[2:], 0.9) is None


def test_no_answers_have_no_calibration():
    with pytest.raises(InvalidRequest, match="there are none to judge"):
        calibration.brier_score(np.empty((0, 2)), np.empty(0, int))
