"""OpenAI-compatible endpoints over a real socket: what is asked, what is made of it, and every way of misbehaving."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasepia.blackbox.boxes import Progress
from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.errors import (
    BadAnswer,
    BudgetReached,
    EndpointRefused,
    EndpointUnavailable,
    ModelChanged,
    NothingMatched,
)
from metasepia.blackbox.meter import Meter, Prices
from metasepia.blackbox.openai import OpenAIEndpoint
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.settings import EndpointSettings
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidRequest, InvalidSettings, NotSupported
from tests.endpoint import Endpoint, Http, rendered, score

TEXTS = [f"text number {i} is here" for i in range(6)]
PLAIN = Prompt(template="Review: {text}\nIt is", labels={"b": " bad", "g": " good"}, name="plain")
CHAT = Prompt(template="Review: {text}", labels={"b": "bad", "g": "good"}, system="Say which", name="chat")
OPEN = Prompt(template="Review: {text}", max_tokens=8, name="open")
QUICK: dict[str, Any] = {"backoff_s": 0.01, "max_backoff_s": 0.02, "request_timeout_s": 5.0, "patience_s": 5.0}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    with AnswerCache(tmp_path / "answers.sqlite") as made:
        yield made


def box_of(
    endpoint: Endpoint, prompt: Prompt, cache: AnswerCache | None = None, meter: Meter | None = None, **settings: Any
) -> OpenAIEndpoint:
    fields: dict[str, Any] = QUICK | {"base_url": endpoint.url, "model": "tiny"} | settings
    return OpenAIEndpoint(EndpointSettings(**fields), prompt, cache, meter)


def answer(box: OpenAIEndpoint, texts: list[str] = TEXTS, **more: Any) -> Answers:
    return asyncio.run(asyncio.wait_for(box.answer(texts, **more), 60))


def teacher_forced(prompt: Prompt, *, chat: bool) -> np.ndarray:
    """The labels' distributions by the fake model itself."""

    def before(text: str) -> str:
        return rendered(prompt.messages(text)) if chat else prompt.document(text)

    weights = np.exp([[score(before(text), word) for word in prompt.verbalisers] for text in TEXTS])
    return weights / weights.sum(1, keepdims=True)


# -- ways to score labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", [True, False])
def test_an_echo_gives_teacher_forced_scores_with_one_prompt_or_several_a_request(lists: bool):
    with Endpoint(echo=True, lists=lists) as endpoint:
        box = box_of(endpoint, PLAIN, api="completions")
        answers = answer(box)
    np.testing.assert_allclose(answers.probabilities, teacher_forced(PLAIN, chat=False), atol=1e-6)
    assert answers.standard_error is None
    assert box.source()["way"] == "echo"
    assert len(endpoint.requests) == (len(TEXTS) if lists else 2 * len(TEXTS) + 1)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_log_probabilities_of_the_prompt_give_teacher_forced_scores(api: str):
    prompt = CHAT if api == "chat" else PLAIN
    with Endpoint(prompt_logprobs=True) as endpoint:
        box = box_of(endpoint, prompt, api=api)
        answers = answer(box)
    np.testing.assert_allclose(answers.probabilities, teacher_forced(prompt, chat=api == "chat"), atol=1e-6)
    assert box.source()["way"] == "prompt logprobs"


def test_verbalisers_that_begin_alike_are_scored_on_what_differs():
    prompt = Prompt(template="{text} It is", labels={"a": " very good", "b": " very bad", "c": " very"})
    for made in (Endpoint(echo=True), Endpoint(prompt_logprobs=True)):
        with made as endpoint:
            answers = answer(box_of(endpoint, prompt, api="completions"))
        np.testing.assert_allclose(answers.probabilities, teacher_forced(prompt, chat=False), atol=1e-6)


def test_a_text_of_tokens_that_are_parts_of_characters_is_scored_by_its_end():
    texts = ["ein schönes 🦑 Tier", "plain"]
    with Endpoint(echo=True) as endpoint:
        whole = answer(box_of(endpoint, PLAIN, api="completions"), texts)
        respond = endpoint._echo

        def broken(prompt: str) -> dict[str, Any]:
            choice = respond(prompt)
            tokens = choice["logprobs"]["tokens"]
            choice["logprobs"]["tokens"] = [one.replace("🦑", "bytes:\\xf0\\x9f") for one in tokens]
            return choice

        endpoint._echo = broken
        by_end = answer(box_of(endpoint, PLAIN, api="completions"), texts)
    np.testing.assert_array_equal(by_end.probabilities, whole.probabilities)


def test_first_tokens_score_labels_with_one_request_a_text():
    with Endpoint(logprobs=True) as endpoint:
        box = box_of(endpoint, CHAT)
        answers = answer(box)
    assert box.source()["way"] == "first token"
    assert len(endpoint.requests) == len(TEXTS)

    def masses(text: str) -> list[float]:
        before = rendered(CHAT.messages(text))
        return [sum(np.exp(score(before, form)) for form in (word, " " + word)) for word in CHAT.verbalisers]

    want = np.array([masses(text) for text in TEXTS])
    np.testing.assert_allclose(answers.probabilities, want / want.sum(1, keepdims=True), atol=1e-6)


def test_an_endpoint_that_gives_fewer_likeliest_tokens_is_asked_for_fewer():
    with Endpoint(logprobs=True, max_top=5) as endpoint:
        box = box_of(endpoint, CHAT)
        answers = answer(box)
    assert box.source()["way"] == "first token"
    assert [body["top_logprobs"] for _, _, body in endpoint.requests] == [20] + [5] * len(TEXTS)
    assert answers.standard_error is not None  # what is not listed is not known


def test_labels_that_first_tokens_cannot_tell_apart_are_sampled():
    prompt = Prompt(template="{text}", labels={"a": "negative", "b": "neutral"})
    with Endpoint(logprobs=True, words=prompt.verbalisers) as endpoint:  # " ne" begins both
        box = box_of(endpoint, prompt)
        answer(box)
    assert box.source()["way"] == "sampling"


@pytest.mark.parametrize("several", [True, False])
def test_samples_estimate_the_models_distribution_with_its_uncertainty(several: bool):
    with Endpoint(several=several) as endpoint:
        box = box_of(endpoint, CHAT, num_samples=40)
        answers = answer(box)
    assert box.source()["way"] == "sampling"
    assert answers.standard_error is not None
    deviations = (answers.probabilities - teacher_forced(CHAT, chat=True)) / answers.standard_error
    assert np.abs(deviations).max() < 4
    seeds = [(body["messages"][1]["content"], body["seed"]) for _, _, body in endpoint.requests if "seed" in body]
    assert len(seeds) > len(TEXTS)
    if not several:  # no sample is drawn twice by one seed
        assert len({pair for pair in seeds if seeds.count(pair) == 1}) >= 39 * len(TEXTS)


def test_samples_do_not_depend_on_how_many_are_asked_for_at_once():
    with Endpoint() as together, Endpoint(several=False) as alone:
        first, second = (answer(box_of(one, CHAT, num_samples=6)) for one in (together, alone))
    np.testing.assert_array_equal(first.probabilities, second.probabilities)


def test_samples_without_a_seed_are_not_one_request_sent_again(cache: AnswerCache):
    with Endpoint(several=False) as endpoint:
        answer(box_of(endpoint, CHAT, cache, way="sampling", num_samples=5, seed=None))
    keys = [headers["idempotency-key"] for _, headers, _ in endpoint.requests]
    assert len(set(keys)) == len(keys) >= 5 * len(TEXTS)
    assert all("seed" not in body for _, _, body in endpoint.requests)


def test_more_samples_later_pay_for_those_that_are_new(cache: AnswerCache):
    with Endpoint() as endpoint:
        answer(box_of(endpoint, CHAT, cache, way="sampling", num_samples=4))
        count = len(endpoint.requests)
        more = answer(box_of(endpoint, CHAT, cache, way="sampling", num_samples=6))
        assert [body["n"] for _, _, body in endpoint.requests[count:]] == [2] * len(TEXTS)
        fresh = answer(box_of(endpoint, CHAT, way="sampling", num_samples=6))
    np.testing.assert_array_equal(more.probabilities, fresh.probabilities)


def test_naming_another_way_and_going_back_pays_for_nothing_again(cache: AnswerCache):
    with Endpoint(logprobs=True) as endpoint:
        first = answer(box_of(endpoint, CHAT, cache))
        answer(box_of(endpoint, CHAT, cache, way="sampling", num_samples=3))
        count = len(endpoint.requests)
        again = answer(box_of(endpoint, CHAT, cache))
        answer(box_of(endpoint, CHAT, cache, way="first token"))
        answer(box_of(endpoint, CHAT, cache, way="sampling", num_samples=3))
    assert len(endpoint.requests) == count
    assert first.digest == again.digest


def test_replies_that_name_no_label_are_counted_and_told():
    def say(before: str, seed: int) -> str:
        return "who knows" if seed == 0 else "It is good."

    with Endpoint(say=say) as endpoint:
        box = box_of(endpoint, CHAT, num_samples=4)
        answers = answer(box)
    assert (box.source()["unmatched"], box.source()["samples"]) == (len(TEXTS), 4 * len(TEXTS))
    np.testing.assert_allclose(answers.probabilities[:, 1], 3.5 / 4)
    assert "6 of 24 name no label" in answers.notes[0]


def test_replies_that_hardly_ever_name_a_label_are_an_error_that_shows_them():
    with (
        Endpoint(say=lambda before, seed: "As a language model...") as endpoint,
        pytest.raises(NothingMatched) as raised,
    ):
        answer(box_of(endpoint, CHAT))
    assert "As a language model" in str(raised.value)
    assert "'bad', 'good'" in str(raised.value)


def test_open_answers_are_the_greedy_replies_in_order():
    with Endpoint(say=lambda before, seed: f"on {before[-29:]}") as endpoint:
        answers = answer(box_of(endpoint, OPEN), [*TEXTS, TEXTS[0]])
    assert answers.replies == tuple(f"on {rendered(OPEN.messages(text))[-29:]}" for text in [*TEXTS, TEXTS[0]])
    assert len(endpoint.requests) == len(TEXTS)
    assert all(body["temperature"] == 0 for _, _, body in endpoint.requests)


def test_a_calibrated_box_asks_for_texts_that_say_nothing_and_divides_by_them():
    with Endpoint(echo=True) as endpoint:
        plain = answer(box_of(endpoint, PLAIN, api="completions"))
        box = box_of(endpoint, PLAIN, api="completions", calibrate=("N/A", ""))
        answers = answer(box)
    weights = np.exp([[score(PLAIN.document(text), word) for word in PLAIN.verbalisers] for text in ("N/A", "")])
    nothing = (weights / weights.sum(1, keepdims=True)).mean(0)
    want = plain.probabilities / nothing
    np.testing.assert_allclose(answers.probabilities, want / want.sum(1, keepdims=True), atol=1e-6)


def test_a_way_that_is_named_and_not_served_is_refused_in_the_endpoints_words():
    with Endpoint() as endpoint, pytest.raises(NotSupported, match="echo is not supported here; leave it out"):
        answer(box_of(endpoint, PLAIN, api="completions", way="echo"))


def test_an_endpoint_that_wants_another_field_for_the_length_gets_it():
    def behave(count: int, body: dict[str, Any]) -> Http | None:
        if "max_tokens" in body:
            return Http(400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead"}})
        return None

    with Endpoint(logprobs=True, behave=behave) as endpoint:
        answer(box_of(endpoint, CHAT))
    assert [("max_tokens" in body) for _, _, body in endpoint.requests] == [True] + [False] * len(TEXTS)


# -- trouble -----------------------------------------------------------------------------------------------------------


def first(count: int, trouble: Http) -> Any:
    """That for the first `count` requests, then the model."""
    return lambda number, body: trouble if number < count else None


TROUBLE = {
    "500": Http(500, {"error": {"message": "boom"}}),
    "502 in HTML": Http(502, "<html>Bad gateway</html>", {"content-type": "text/html"}),
    "429 without a word": Http(429, ""),
    "429 with seconds": Http(429, {"error": {"message": "slow"}}, {"retry-after": "0"}),
    "429 with a date": Http(429, "", {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "HTML": Http(200, "<!DOCTYPE html><html>Sign in</html>", {"content-type": "text/html"}),
    "nothing": Http(200, ""),
    "torn JSON": Http(200, '{"choices": [{"index": 0, "mess'),
    "a list": Http(200, "[]"),
    "other JSON": Http(200, {"result": 3}),
    "an error with status 200": Http(200, {"error": {"message": "overloaded"}}),
    "choices of text": Http(200, {"choices": ["good"]}),
    "no choices": Http(200, {"choices": []}),
    "content of a number": Http(200, {"choices": [{"message": {"content": 3}}]}),
    "a model that is a number": Http(200, {"model": 3, "choices": [{"message": {"content": "good"}}]}),
    "a stream": Http(200, 'data: {"choices": []}\n\ndata: [DONE]\n\n', {"content-type": "text/event-stream"}),
    "a body that breaks off": Http(200, '{"choices":', promised=1000),
    "no answer at all": Http(drop=True),
    "bytes": Http(200, b"\xff\xfe\x00\x01"),
    "deep nonsense": Http(200, "[" * 100_000),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_that_passes_leaves_no_trace_in_the_answers(trouble: Http):
    with Endpoint() as endpoint:
        want = answer(box_of(endpoint, OPEN))
    # Two at first, when it is found out what is served, and later ones.
    with Endpoint(behave=lambda count, body: trouble if count in (0, 1, 4) else None) as endpoint:
        got = answer(box_of(endpoint, OPEN, concurrency=2))
    assert got.digest == want.digest
    assert len(endpoint.requests) == len(TEXTS) + 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HTML", "HTML; a login or an error page"),
        ("nothing", "nothing in it"),
        ("torn JSON", "text that is no JSON, or breaks off"),
        ("other JSON", "no list `choices`"),
        ("an error with status 200", "an error: overloaded"),
        ("a stream", "a stream of events, though none was asked for"),
        ("bytes", "text that is no JSON"),
    ],
)
def test_answers_that_are_never_one_end_the_run_in_words(name: str, words: str):
    trouble = TROUBLE[name]
    with Endpoint(behave=first(100, trouble)) as endpoint, pytest.raises((BadAnswer, NotSupported)) as raised:
        answer(box_of(endpoint, OPEN, max_bad_answers=2))
    said = str(raised.value)
    assert words in said
    assert endpoint.url in said


def test_a_bad_answer_names_endpoint_model_status_and_how_it_begins():
    page = Http(200, "<html>" + "x" * 1000, {"content-type": "text/html"})
    with Endpoint(behave=first(100, page)) as endpoint, pytest.raises(BadAnswer) as raised:
        answer(box_of(endpoint, OPEN))
    assert (raised.value.endpoint, raised.value.model, raised.value.status) == (endpoint.url, "tiny", 200)
    assert raised.value.excerpt == "<html>" + "x" * 194
    assert "0 of 6 texts are answered" in str(raised.value)
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Http(500, {"error": {"message": "boom"}}), "status 500: 'boom'"),
        (Http(429, {"error": {"message": "slow down"}}), "status 429: 'slow down'"),
        (Http(drop=True), "broke off"),
    ],
)
def test_an_endpoint_that_stays_away_ends_the_run_when_patience_does(trouble: Http, words: str):
    started = time.monotonic()
    with Endpoint(behave=first(10_000, trouble)) as endpoint, pytest.raises(EndpointUnavailable) as raised:
        answer(box_of(endpoint, OPEN, patience_s=0.6, max_attempts=1000))
    assert words in str(raised.value)
    assert time.monotonic() - started < 10
    assert len(endpoint.requests) > 2


def test_nobody_at_the_address_is_told_in_words():
    with Endpoint() as endpoint:
        url = endpoint.url
    fields: dict[str, Any] = QUICK | {"max_attempts": 2}
    settings = EndpointSettings(base_url=url, model="tiny", **fields)
    with pytest.raises(EndpointUnavailable, match=r"no connection .* 0 of 6 texts are answered"):
        answer(OpenAIEndpoint(settings, OPEN))


def test_an_answer_that_takes_too_long_is_given_up_and_asked_again():
    slow = Http(200, {"choices": [{"message": {"content": "late"}}]}, delay_s=1.0)
    with Endpoint(behave=first(1, slow)) as endpoint:
        box = box_of(endpoint, OPEN, request_timeout_s=0.3)
        replies = answer(box).replies
    assert "late" not in replies
    assert box.meter.uncertain_tokens > 0  # it may have been computed


def test_a_retry_after_holds_all_requests_for_that_long():
    busy = Http(429, {"error": {"message": "slow"}}, {"retry-after": "0.6"})
    with Endpoint(behave=lambda count, body: busy if count == 1 else None) as endpoint:
        answer(box_of(endpoint, OPEN, concurrency=1))
    assert endpoint.times[2] - endpoint.times[1] >= 0.6


def test_a_retry_after_beyond_all_patience_ends_the_run_at_once():
    busy = Http(429, "", {"retry-after": "3600"})
    with Endpoint(behave=first(100, busy)) as endpoint, pytest.raises(EndpointUnavailable, match="come back in 3600 s"):
        answer(box_of(endpoint, OPEN))
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Http(401, {"error": {"message": "bad key"}}), "'bad key'; is the right variable named in key_env"),
        (Http(403, {"detail": "not yours"}), "not yours"),
        (Http(404, {"error": {"message": "no such model"}}), "'no such model'; is there such a model"),
        (Http(429, {"error": {"code": "insufficient_quota", "message": "pay first"}}), "'pay first'"),
        (Http(301, "", {"location": "https://elsewhere.example/v1"}), "redirects to https://elsewhere.example/v1"),
        (Http(413, "<html>too large</html>"), "too large"),
    ],
)
def test_a_refusal_is_not_asked_again(trouble: Http, words: str):
    with Endpoint(behave=first(100, trouble)) as endpoint, pytest.raises(EndpointRefused) as raised:
        answer(box_of(endpoint, OPEN))
    assert words in str(raised.value)
    assert raised.value.status == trouble.status
    assert len(endpoint.requests) == 1


def test_an_answer_without_end_is_cut_off():
    endless = Http(200, "x" * 300_000)
    with (
        Endpoint(behave=first(100, endless)) as endpoint,
        pytest.raises(EndpointUnavailable, match=r"more than 0\.1 MiB"),
    ):
        answer(box_of(endpoint, OPEN, max_answer_mib=0.1, max_attempts=2))


@pytest.mark.parametrize(
    "lie",
    [None, "many", {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": 10**12, "completion_tokens": 1},
     {"prompt_tokens": 5, "completion_tokens": 10**9}, {"prompt_tokens": 0, "completion_tokens": 0},
     {"prompt_tokens": 5.5}, {"prompt_tokens": True}],
)  # fmt: skip
def test_a_usage_that_cannot_be_true_is_counted_here_instead(lie: object):
    with Endpoint(usage=lambda prompt, completion: lie) as endpoint:
        box = box_of(endpoint, OPEN)
        answer(box)
    assert 6 * 5 <= box.meter.prompt_tokens <= 6 * 15
    assert 6 <= box.meter.completion_tokens <= 6 * 8


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_as_many_requests_are_in_flight_as_allowed_and_no_more():
    three = threading.Barrier(3, timeout=20)

    def together(count: int, body: dict[str, Any]) -> None:
        if 1 <= count <= 18:  # after the one that finds out what is served
            three.wait()

    with Endpoint(behave=together) as endpoint:
        answer(box_of(endpoint, OPEN, concurrency=3, request_timeout_s=30.0), [f"text {i}" for i in range(20)])
    assert endpoint.most_in_flight == 3


def test_requests_a_minute_are_spread_over_the_minute():
    with Endpoint() as endpoint:
        answer(box_of(endpoint, OPEN, requests_per_minute=600.0))
    assert endpoint.times[-1] - endpoint.times[0] >= 0.35  # five steps of 0.1 s, the first of which may arrive late


def test_an_estimate_bounds_what_is_then_taken_and_costs_nothing(cache: AnswerCache):
    prices = Prices(prompt_per_million=3.0, completion_per_million=15.0)
    with Endpoint(logprobs=True) as endpoint:
        box = box_of(endpoint, CHAT, cache, prices=prices)
        before = box.estimate(TEXTS)
        assert not endpoint.requests
        assert before.is_bound
        assert "4 characters a token" in str(before)
        answer(box)
        after = box.estimate([*TEXTS, "one more"])
    assert before.cost is not None
    assert 0 < box.meter.cost < before.cost
    assert (after.is_bound, after.texts, after.cached, after.requests) == (False, 7, 6, 1)


def test_progress_is_told_from_the_estimate_to_the_last_text():
    told: list[Progress] = []
    prices = Prices(prompt_per_million=3.0, completion_per_million=15.0)
    with Endpoint(logprobs=True) as endpoint:
        answer(box_of(endpoint, CHAT, prices=prices), told=told.append)
    assert told[0].estimate is not None
    assert told[0].done == 0
    assert [one.done for one in told] == sorted(one.done for one in told)
    last = told[-1]
    assert (last.done, last.total, last.requests, last.way) == (6, 6, 6, "first token")
    assert last.cost is not None
    assert last.cost == pytest.approx(3e-6 * last.prompt_tokens + 15e-6 * last.completion_tokens)
    assert "6/6 texts" in str(last)


@pytest.mark.parametrize("limits", [{"max_cost": 0.0025}, {"max_tokens": 60}])
def test_a_run_stops_before_its_limit_and_goes_on_with_another(cache: AnswerCache, limits: dict[str, Any]):
    """A request takes 18 tokens and 0.0005 here, and is reserved at a little less or more."""
    prices = Prices(prompt_per_million=10.0, completion_per_million=50.0)
    with Endpoint(usage=lambda prompt, completion: {"prompt_tokens": 10, "completion_tokens": 8}) as endpoint:
        meter = Meter(**limits)
        with pytest.raises(BudgetReached, match=r"of 6 texts are answered and kept in .*; raise max_"):
            answer(box_of(endpoint, OPEN, cache, meter, prices=prices))
        paid = len(endpoint.requests)
        assert 0 < paid < 6
        assert meter.cost <= 0.0025
        assert meter.tokens <= 100
        answer(box_of(endpoint, OPEN, cache, prices=prices))
    assert set(endpoint.answered.values()) == {1}
    assert len(endpoint.requests) == 6


# -- who answers -------------------------------------------------------------------------------------------------------


def other_from(count: int) -> Any:
    return lambda number: "tiny-1" if number < count else "tiny-2"


def test_a_model_that_changes_ends_the_run_and_names_both(cache: AnswerCache):
    with Endpoint(model=other_from(3)) as endpoint:
        with pytest.raises(ModelChanged) as raised:
            answer(box_of(endpoint, OPEN, cache, concurrency=1))
        assert (raised.value.before, raised.value.after) == ("'tiny-1'", "'tiny-2'")
        assert (raised.value.num_before, raised.value.num_after) == (3, 1)
        assert "'ask again'" in str(raised.value)
        # Asked again without a decision: nothing more is paid for before somebody decides.
        with pytest.raises(ModelChanged):
            answer(box_of(endpoint, OPEN, cache))
    assert len(endpoint.requests) == 4


def test_answers_before_and_after_a_change_never_mix(cache: AnswerCache):
    """Each model has its own words, so a mixture would show."""
    with Endpoint(model=other_from(3)) as endpoint:
        endpoint.say = lambda before, seed: "first" if len(endpoint.requests) <= 3 else "second"
        with pytest.raises(ModelChanged):
            answer(box_of(endpoint, OPEN, cache, concurrency=1))
        box = box_of(endpoint, OPEN, cache, on_change="ask again")
        answers = answer(box)
    assert set(answers.replies) == {"second"}
    assert box.source()["answered_as"] == "tiny-2"
    assert len(endpoint.requests) == 3 + 6  # those of the second model that were paid for are kept


def test_a_change_of_the_fingerprint_alone_counts_unless_the_settings_say_otherwise(cache: AnswerCache):
    fingerprint = lambda count: f"fp_{count % 2}"  # noqa: E731
    with Endpoint(fingerprint=fingerprint) as endpoint:
        with pytest.raises(ModelChanged, match="fingerprint fp_0"):
            answer(box_of(endpoint, OPEN, cache, concurrency=1))
        with pytest.raises(ModelChanged):  # it alternates: there is no one model
            answer(box_of(endpoint, OPEN, cache, concurrency=1, on_change="ask again"))
        paid = len(endpoint.requests)
        answers = answer(box_of(endpoint, OPEN, cache, same="model"))
        assert len(endpoint.requests) <= max(6, paid + 3)
    assert len(answers.replies) == 6


def test_an_endpoint_back_at_its_first_model_goes_on_where_that_was(cache: AnswerCache):
    model = lambda count: "tiny-2" if count == 3 else "tiny-1"  # noqa: E731
    with Endpoint(model=model) as endpoint:
        with pytest.raises(ModelChanged):
            answer(box_of(endpoint, OPEN, cache, concurrency=1))
        answer(box_of(endpoint, OPEN, cache, concurrency=1, on_change="ask again"))
    assert len(endpoint.requests) == 4 + 3


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], ["one"], ["a", " "], ["a", "\ud800"]])
def test_texts_that_tell_nothing_are_refused_before_anything_is_asked(texts: list[str]):
    with Endpoint() as endpoint, pytest.raises(InvalidRequest, match="texts"):
        answer(box_of(endpoint, OPEN), texts)
    assert not endpoint.requests


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "ftp://host/v1"},
        {"base_url": "host:8000/v1"},
        {"base_url": "http://host:notaport/v1"},
        {"model": " "},
        {"concurrency": 0},
        {"temperature": float("nan")},
        {"requests_per_minute": 0.0},
        {"patience_s": float("inf")},
        {"extra": {"messages": []}},
        {"extra": {"when": float("nan")}},
        {"way": "echo"},
    ],
)
def test_settings_outside_their_range_are_refused(fields: dict[str, Any]):
    given: dict[str, Any] = {"base_url": "http://host/v1", "model": "m"} | fields
    with pytest.raises(InvalidSettings):
        EndpointSettings(**given)


def test_a_limit_on_cost_without_prices_is_refused_before_anything_is_asked():
    with Endpoint() as endpoint, pytest.raises(InvalidSettings, match="prices"):
        box_of(endpoint, OPEN, meter=Meter(max_cost=1.0))
