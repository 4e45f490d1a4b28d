"""What the client decides, by scripted answers and a clock of its own: no network, no waiting."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from metasepia.client import BadInput, NoAnswer, NotOurs, OutOfTime, Refused, errors
from metasepia.client.calls import Answer, Ask, Pause, Request, Send, everything, request
from metasepia.client.errors import Envelope
from metasepia.client.events import Lines
from metasepia.client.results import Completion, ContextInfo, Expert
from metasepia.client.transports import checked_url
from metasepia.client.trying import Options, seconds_of, tried

URL = "http://door"


def answer(status: int = 200, body: Any = None, **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status=status, headers={"content-type": "application/json"} | named, content=content, url=URL)


def refusal(status: int, code: str = "overloaded", **headers: str) -> Answer:
    return answer(status, {"error": {"message": "no room", "type": "x", "param": None, "code": code}}, **headers)


class Run:
    """One call: what it sent, how long it waited, and what came of it."""

    def __init__(self, asked: Request, outcomes: Iterable[Answer | Exception], took_s: float = 0.0, **options: Any):
        self.sent: list[Request] = []
        self.told_s: list[float] = []
        self.pauses: list[float] = []
        self.result: Any = None
        self.now_s = 100.0
        steps = tried(Ask(asked), URL, Options(**options), clock=lambda: self.now_s, draw=lambda: 0.5)
        answers = iter(outcomes)
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    self.pauses.append(step.seconds)
                    self.now_s += step.seconds
                    step = steps.send(None)
                    continue
                assert isinstance(step, Send)
                self.sent.append(step.request)
                self.told_s.append(float(step.request.headers["x-request-timeout-seconds"]))
                self.now_s += min(took_s, step.timeout_s)
                outcome = next(answers)
                step = steps.throw(outcome) if isinstance(outcome, Exception) else steps.send(outcome)
        except StopIteration as end:
            self.result = end.value
        except Exception as error:
            self.result = error


READ, WRITE = request("ListModels"), request("Classify", {"inputs": ["x"]})


def test_a_full_queue_is_asked_again_after_what_it_says_with_the_same_key():
    run = Run(WRITE, [refusal(429, retry_after="2"), refusal(503), answer()])
    assert run.result.status == 200
    assert run.pauses == [2.25, 0.5]  # 2 s and half of a quarter of them; 0.25 * 2 ** 1
    assert len({one.headers["idempotency-key"] for one in run.sent}) == 1


def test_two_calls_have_two_keys_and_a_read_has_none():
    first, second = Run(WRITE, [answer()]), Run(WRITE, [answer()])
    assert first.sent[0].headers["idempotency-key"] != second.sent[0].headers["idempotency-key"]
    assert "idempotency-key" not in Run(READ, [answer()]).sent[0].headers
    assert Run(WRITE, [answer()], idempotency_key="mine").sent[0].headers["idempotency-key"] == "mine"


def test_the_deadline_is_over_all_tries_and_the_server_is_told_what_is_left():
    run = Run(READ, [refusal(503), refusal(503), answer()], took_s=3.0, timeout_s=10.0, backoff_s=1.0)
    assert run.told_s == [10.0, 6.0, 1.0]
    out = Run(READ, [refusal(503)] * 9, took_s=3.0, timeout_s=10.0, backoff_s=1.0, retries=9)
    assert isinstance(out.result, errors.Unavailable)
    assert out.now_s <= 110.0


def test_a_wait_that_would_outlast_the_deadline_is_not_begun():
    run = Run(WRITE, [refusal(429, "quota_exceeded", retry_after="3600")], timeout_s=60.0)
    assert run.pauses == []
    assert isinstance(run.result, errors.QuotaExceeded)
    assert run.result.retry_after_s == 3600


def test_an_earlier_try_that_is_still_being_answered_is_waited_for_and_is_no_failure():
    run = Run(WRITE, [NoAnswer(URL, "reset"), *[refusal(409, "in_progress", retry_after="1")] * 5, answer()], retries=1)
    assert run.result.status == 200
    assert len(run.sent) == 7


def test_so_many_tries_as_asked_for():
    assert len(Run(READ, [NoAnswer(URL, "reset")] * 9, retries=2).sent) == 3
    assert len(Run(READ, [NoAnswer(URL, "reset")], retries=0).sent) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 500, 504])
def test_what_asking_again_does_not_mend_is_not_asked_again(status: int):
    run = Run(WRITE, [refusal(status, "x", x_request_id="r-7")])
    assert len(run.sent) == 1
    assert isinstance(run.result, Refused)
    assert (run.result.status, run.result.code, run.result.request_id) == (status, "x", "r-7")
    assert "no room" in str(run.result)


def test_a_secret_is_made_once_unless_nothing_can_have_been_made():
    make = request("CreateKey", {"tenant": "a", "scopes": ["infer"]})
    assert len(Run(make, [NoAnswer(URL, "reset")]).sent) == 1
    assert len(Run(make, [refusal(503)]).sent) == 1
    assert Run(make, [errors.NotConnected(URL, "refused"), refusal(429), answer()]).result.status == 200


def test_errors_are_of_the_class_that_their_status_has_and_of_pythons_own():
    kinds = {400: ValueError, 401: PermissionError, 403: PermissionError, 404: LookupError, 410: LookupError}
    kinds |= {503: ConnectionError, 504: TimeoutError, 500: RuntimeError, 409: RuntimeError, 418: ValueError}
    for status, kind in kinds.items():
        assert isinstance(Run(READ, [refusal(status)] * 9, retries=0).result, kind)


def test_errors_are_made_of_their_arguments_alone_so_that_they_cross_processes():
    envelope = Envelope(429, "overloaded", "no room", "inputs[3]", "r", 2.0)
    partly = errors.PartlyDone([1], [errors.Failure(0, 2, errors.Busy(envelope))], 5)
    for error in (errors.Busy(envelope), NoAnswer(URL, "x"), OutOfTime(URL, 3.0), NotOurs(URL, "x"), partly):
        again = type(error)(*error.args)
        assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("Thu, 01 Jan 1970 00:01:40 GMT", 60.0), ("soon", None), ("inf", None)],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float | None):
    assert seconds_of(text, lambda: 40.0) == seconds


def test_another_programs_answer_is_called_so():
    page = answer(404, b"<html>  <h1>nginx</h1></html>", content_type="text/html; charset=utf-8")
    assert "404 text/html '<html> <h1>nginx" in str(Run(READ, [page]).result)
    assert isinstance(Run(READ, [answer(302, b"")]).result, NotOurs)
    plain = Run(READ, [answer(503, b"upstream down", content_type="text/plain")], retries=0).result
    assert isinstance(plain, errors.Unavailable) and "upstream down" in str(plain)


def test_a_list_is_read_page_by_page_and_one_that_never_ends_is_refused():
    pages = [{"data": [{"id": "a"}], "has_more": True, "last_id": "a"}, {"data": [{"id": "b"}], "has_more": False}]
    steps = everything(request("ListExperts"))
    asked = [next(steps), steps.send(answer(body=pages[0]))]
    assert [one.request.params.get("after") for one in asked if isinstance(one, Ask)] == [None, "a"]
    with pytest.raises(StopIteration) as end:
        steps.send(answer(body=pages[1]))
    assert [one["id"] for one in end.value.value] == ["a", "b"]
    stuck = everything(request("ListExperts"))
    next(stuck)
    stuck.send(answer(body=pages[0]))
    with pytest.raises(NotOurs, match="does not go on"):
        stuck.send(answer(body=pages[0]))


def test_names_are_one_part_of_a_path_whatever_is_in_them():
    assert request("GetExpert", name="a/b?c").path == "/v1/experts/a%2Fb%3Fc"
    assert request("GetModel", model="tiny:mix@a").path == "/v1/models/tiny:mix@a"
    for bad in ("", ".."):
        with pytest.raises(BadInput, match="is no name"):
            request("GetExpert", name=bad)


def test_a_url_is_checked_when_the_client_is_made():
    assert checked_url(" http://h:1/v1/ ") == "http://h:1"
    assert checked_url("https://h/below") == "https://h/below"
    for bad in ("localhost:8000", "ftp://x", "http://", "http://h:99999999", "http://h/?a=1", ""):
        with pytest.raises(BadInput, match="must be http://HOST:PORT"):
            checked_url(bad)


def test_options_out_of_range_are_refused_by_name():
    every: list[dict[str, Any]] = [{"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"retries": -1}, {"concurrency": 0}]
    for bad in every:
        with pytest.raises(BadInput, match=next(iter(bad))):
            Options(**bad)


def test_results_keep_what_they_do_not_know_and_refuse_what_is_not_theirs():
    tree = {
        "id": "maths", "created": 1, "model": None, "digest": "d", "owner": "local", "form": "svf", "backbone": None,
        "bytes": 3, "new": {"field": 1},
    }  # fmt: skip
    assert Expert.of(tree).raw["new"] == {"field": 1}
    with pytest.raises(NotOurs, match="a expert without digest"):
        Expert.of({name: value for name, value in tree.items() if name != "digest"})
    with pytest.raises(NotOurs, match=r"'3' as expert\.bytes"):
        Expert.of(tree | {"bytes": "3"})
    with pytest.raises(NotOurs, match="where a contextinfo was to come"):
        ContextInfo.of([])


def test_a_chats_answer_and_a_prompts_are_read_alike():
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    about = {"id": "x", "model": "m", "created": 1, "usage": usage}
    chat = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    prompt = {"index": 0, "text": "hi", "finish_reason": "stop"}
    assert [Completion.of(about | {"choices": [one]}).text for one in (chat, prompt)] == ["hi", "hi"]


def test_events_are_found_however_the_bytes_are_cut():
    stream = ': ping\n\ndata: {"a": "é"}\r\n\r\ndata: one\ndata: two\n\ndata: [DONE]\n\n'.encode()
    for size in (1, 2, 3, 7, len(stream)):
        lines = Lines()
        found = [one for at in range(0, len(stream), size) for one in lines.feed(stream[at : at + size])]
        assert found == ['{"a": "é"}', "one\ntwo", "[DONE]"]
