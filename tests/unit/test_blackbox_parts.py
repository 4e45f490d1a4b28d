"""Prompts, label matching, scores, meter and pace of black boxes."""

import math
import pickle  # noqa: TID251 (in memory: what crosses process borders)
from typing import Any

import numpy as np
import pytest

from metasepia.blackbox import errors
from metasepia.blackbox.errors import BudgetReached
from metasepia.blackbox.meter import Meter, Prices
from metasepia.blackbox.pace import Pace
from metasepia.blackbox.prompts import LabelMatcher, Prompt
from metasepia.blackbox.scores import Scores, calibrated, of_counts, of_first_tokens, of_log_probabilities
from metasepia.errors import InvalidRequest, InvalidSettings

SENTIMENT = {"pos": "positive", "neg": "negative"}


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"template": "no place"},
        {"template": "{text} and {text}"},
        {"template": "{text}", "labels": {"only": "one"}},
        {"template": "{text}", "labels": {"a": "Yes", "b": " yes."}},
        {"template": "{text}", "labels": {"a": "yes", "b": "!!"}},
        {"template": "{text}", "max_tokens": 0},
        {"template": "\ud800{text}"},
    ],
)
def test_a_prompt_that_cannot_be_asked_is_refused_by_field(fields: dict[str, Any]):
    with pytest.raises(InvalidRequest, match=r"^prompt\.(template|labels|max_tokens): "):
        Prompt(**fields)


def test_only_the_place_of_the_text_is_filled():
    prompt = Prompt(template='{"json": "{text}", "{other}": {}}', system="Be brief")
    assert prompt.filled("a {text} of braces") == '{"json": "a {text} of braces", "{other}": {}}'
    assert [one["role"] for one in prompt.messages("a")] == ["system", "user"]


def test_a_prompts_digest_is_of_what_is_asked_and_not_of_its_name_or_the_order_of_labels():
    first = Prompt(template="{text}", labels=SENTIMENT, name="one")
    same = Prompt(template="{text}", labels=dict(reversed(SENTIMENT.items())), name="two")
    other = Prompt(template="{text}", labels=SENTIMENT | {"pos": "good"})
    assert first.digest == same.digest != other.digest
    assert first.names == ("neg", "pos")
    assert first.verbalisers == ("negative", "positive")


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("positive", 0),
        (" **Positive**.", 0),
        ("Negative\nbecause it broke", 1),
        ("The answer is: positive", 0),
        ("<think>is it negative? no</think>\n\npositive", 0),
        ("It is not positive", None),
        ("It isn't positive at all", None),
        ("positive or negative", 0),
        ("either positive or negative", None),
        ("positively", None),
        ("", None),
        ("very positive", 2),
        ("I would say very positive.", 2),
    ],
)
def test_a_reply_names_the_label_that_a_reader_would_say(reply: str, label: int | None):
    assert LabelMatcher(["positive", "negative", "very positive"]).match(reply) == label


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_the_softmax_of_sums_or_of_means_by_length():
    sums, tokens = np.log([[0.2, 0.02], [0.1, 0.3]]), np.array([[1, 2], [1, 2]])
    words = ("one", "eleven")
    by_sum = of_log_probabilities(sums, tokens, words, "sum").probabilities
    np.testing.assert_allclose(by_sum, [[0.2 / 0.22, 0.02 / 0.22], [0.25, 0.75]])
    by_token = of_log_probabilities(sums, tokens, words, "token").probabilities
    np.testing.assert_allclose(by_token[0, 1], 0.02**0.5 / (0.2 + 0.02**0.5))
    by_character = of_log_probabilities(sums, tokens, words, "character").probabilities
    np.testing.assert_allclose(by_character[1, 0], 0.1 ** (1 / 3) / (0.1 ** (1 / 3) + 0.3 ** (1 / 6)))


def test_scores_far_below_zero_keep_their_differences():
    """The reference floors scores at zero, where all of these would be ties."""
    scores = of_log_probabilities(np.array([[-2000.0, -2001.0]]), np.ones((1, 2)), ("a", "b"), "sum")
    np.testing.assert_allclose(scores.probabilities, [[1 / (1 + math.exp(-1)), 1 / (1 + math.e)]])


def test_all_beginnings_of_a_label_count_for_it():
    top = [("pos", math.log(0.3)), (" Pos", math.log(0.1)), ("neg", math.log(0.4)), ("the", math.log(0.2))]
    scores, named = of_first_tokens([top], ["positive", "negative"])
    np.testing.assert_allclose(scores.probabilities, [[0.5, 0.5]])
    assert scores.standard_error is None
    assert named == pytest.approx(0.8)


def test_a_label_that_the_list_does_not_show_is_bounded_and_uncertain_not_impossible():
    top = [("pos", math.log(0.6)), ("the", math.log(0.1))]
    scores, _ = of_first_tokens([top], ["positive", "negative"])
    # The unseen label has at most 0.1: the least that is listed. Half of that, and a uniform's deviation.
    np.testing.assert_allclose(scores.probabilities, [[0.6 / 0.65, 0.05 / 0.65]])
    assert scores.standard_error is not None
    assert scores.standard_error[0, 1] == pytest.approx(0.1 / math.sqrt(12) / 0.65)


def test_a_token_that_begins_two_labels_tells_nothing_of_which():
    scores, _ = of_first_tokens([[("ne", math.log(0.9)), ("pos", math.log(0.1))]], ["negative", "neutral", "positive"])
    np.testing.assert_allclose(scores.probabilities, [[0.45, 0.45, 0.1]])
    assert scores.standard_error is not None
    assert scores.standard_error[0, 0] > 0.2


def test_counted_replies_have_the_mean_and_deviation_of_the_posterior():
    scores = of_counts(np.array([[3.0, 1.0]]))
    draws = np.random.default_rng(0).dirichlet([3.5, 1.5], 200_000)
    np.testing.assert_allclose(scores.probabilities[0], draws.mean(0), atol=2e-3)
    assert scores.standard_error is not None
    np.testing.assert_allclose(scores.standard_error[0], draws.std(0), atol=2e-3)


def test_calibration_makes_a_text_that_says_nothing_uniform():
    biased = np.array([[0.9, 0.1]])
    nothing = Scores(probabilities=biased)
    np.testing.assert_allclose(calibrated(nothing, nothing).probabilities, [[0.5, 0.5]])
    # Odds of 9 : 1 against a prior of 9 : 1 are 1 : 1; odds of 1 : 1 are 1 : 9.
    np.testing.assert_allclose(
        calibrated(Scores(probabilities=np.array([[0.5, 0.5]])), nothing).probabilities, [[0.1, 0.9]]
    )


def test_calibration_carries_the_uncertainty_of_samples_on():
    few, many = of_counts(np.array([[6.0, 4.0]])), of_counts(np.array([[600.0, 400.0]]))
    nothing = Scores(probabilities=np.array([[0.6, 0.4]]))
    of_few, of_many = calibrated(few, nothing), calibrated(many, nothing)
    assert of_few.standard_error is not None
    assert of_many.standard_error is not None
    np.testing.assert_allclose(of_many.probabilities, [[0.5, 0.5]], atol=0.01)
    assert of_few.standard_error[0, 0] > 5 * of_many.standard_error[0, 0]


# -- meter -------------------------------------------------------------------------------------------------------------


def kept() -> str:
    return "3 of 5 texts are answered"


def test_a_meter_counts_what_was_taken_and_keeps_what_may_have_been():
    meter = Meter()
    prices = Prices(prompt_per_million=2.0, completion_per_million=8.0)
    meter.reserve(prices, 100, 50, kept).settle(90, 10)
    meter.reserve(prices, 100, 50, kept).release()
    meter.reserve(None, 100, 50, kept).keep()
    assert (meter.prompt_tokens, meter.completion_tokens, meter.requests) == (190, 60, 1)
    assert (meter.uncertain_tokens, meter.unpriced_tokens) == (150, 150)
    assert meter.cost == pytest.approx((90 * 2 + 10 * 8) / 1e6)


@pytest.mark.parametrize("limits", [{"max_cost": 3e-4}, {"max_tokens": 300}])
def test_no_request_is_sent_that_could_cross_a_limit(limits: dict[str, Any]):
    meter = Meter(**limits)
    prices = Prices(prompt_per_million=1.0, completion_per_million=1.0)
    held = meter.reserve(prices, 100, 50, kept)
    meter.reserve(prices, 100, 50, kept)
    with pytest.raises(BudgetReached, match="3 of 5 texts are answered; raise max_"):
        meter.reserve(prices, 1, 0, kept)
    held.settle(10, 10)  # took less than its worst
    meter.reserve(prices, 100, 30, kept)


def test_a_limit_on_cost_without_prices_is_refused():
    with pytest.raises(InvalidSettings, match="given for some-model, since max_cost is"):
        Meter(max_cost=1.0).check_prices(None, "some-model")


# -- pace --------------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_minute_has_more_requests_or_tokens_than_its_limits():
    clock, rng, starts = Clock(), np.random.default_rng(0), []
    pace = Pace(20.0, 1000.0, clock=clock)
    for _ in range(400):
        tokens = int(rng.integers(1, 120))
        starts.append((clock.now + pace.turn(tokens), tokens))
        clock.now += float(rng.exponential(1.0))
    times, tokens = (np.array(values) for values in zip(*starts, strict=True))
    for begin in times:
        inside = (times >= begin) & (times < begin + 60 - 1e-6)
        assert inside.sum() <= 20
        assert tokens[inside].sum() <= 1000 + 120


def test_pace_without_limits_never_waits_and_a_pause_holds_everybody():
    clock = Clock()
    pace = Pace(clock=clock)
    assert [pace.turn(1000) for _ in range(3)] == [0, 0, 0]
    pace.hold(7.0)
    assert pace.turn(1) == pace.held_s() == 7.0
    clock.now = 7.0
    assert pace.turn(1) == pace.held_s() == 0.0


def test_tokens_that_were_thought_too_few_are_made_up_for():
    clock = Clock()
    pace = Pace(None, 60.0, clock=clock)
    pace.turn(10)
    pace.correct(5)
    assert pace.turn(1) == 15.0


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        errors.MissingKey("A_KEY", "http://a/v1"),
        errors.EndpointRefused("http://a/v1", "m", 401, "no", "0 of 2"),
        errors.EndpointUnavailable("http://a/v1", "m", "status 500", 3, 1.5, "0 of 2"),
        errors.BadAnswer("http://a/v1", "m", 200, "HTML", "<html>", "0 of 2"),
        errors.ModelChanged("http://a/v1", "m", "'a'", "'b'", 3, 1),
        errors.BudgetReached("max_cost", 1.0, 0.9, 0.2, "0 of 2"),
        errors.NothingMatched("box", 0.01, ("a", "b"), ("who", "what")),
        errors.CacheFailed("/a", "is damaged"),
    ],
)
def test_errors_cross_process_borders(error: Exception):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, str(again)) == (type(error), error.args, str(error))
