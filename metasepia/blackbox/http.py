"""One request to an OpenAI-compatible endpoint until it is answered, refused, or patience ends.

Tried again: connections that fail or break, timeouts, 408, 409, 425, 429, 5xx, and answers that are none, each as long
as its bound allows. That is safe: a request changes nothing at the endpoint, and what may have been computed without
reaching us stays counted. No exception of the HTTP client leaves here, since those hold the request with its headers.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from metasepia.blackbox.errors import BadAnswer, BudgetReached, EndpointRefused, EndpointUnavailable
from metasepia.blackbox.keys import Key
from metasepia.blackbox.meter import CHARS_PER_TOKEN, Meter, Reservation
from metasepia.blackbox.pace import Pace
from metasepia.blackbox.settings import EndpointSettings
from metasepia.blackbox.shapes import NotServed, WrongShape
from metasepia.blackbox.ways import Ask
from metasepia.digests import canonical_json, digest_of

EXCERPT = 200
"""Characters of a bad answer that are shown."""
LATER = frozenset((408, 409, 425, 429))
REFUSED_5XX = frozenset((501, 505))
_ROOM_POLL_S = 0.02
Read = Callable[[Mapping[str, Any]], dict[int, Any]]


class Stopped(Exception):
    """Another request of the run has met what ends it; this one is not tried again."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who an answer says it is from."""

    model: str | None
    fingerprint: str | None

    def __str__(self) -> str:
        model = "a model that it does not name" if self.model is None else repr(self.model)
        return model if self.fingerprint is None else f"{model} (fingerprint {self.fingerprint})"

    def to_json(self) -> str:
        return canonical_json([self.model, self.fingerprint]).decode()

    @classmethod
    def of_json(cls, text: str) -> "Identity":
        model, fingerprint = json.loads(text)
        return cls(model=model, fingerprint=fingerprint)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A request's answer, read and checked."""

    parts: dict[int, Any]
    identity: Identity
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class _Response:
    status: int
    headers: Mapping[str, str]
    text: str


@dataclass(frozen=True)
class _Failed:
    problem: str
    may_be_paid: bool
    """The endpoint may have computed an answer that did not get here."""


@dataclass(frozen=True)
class _Bad:
    """What is wrong with an answer."""

    words: str
    is_served: bool = True
    """False: the answer is whole, and the endpoint does not give what was asked for."""


class Counter:
    """How many tokens texts have: by a tokenizer, or by their length; corrected by what the endpoint counts."""

    def __init__(self, count: Callable[[str], int] | None) -> None:
        self._count = count
        self._thought = self._counted = 0

    @property
    def words(self) -> str:
        return f"{CHARS_PER_TOKEN} characters a token" if self._count is None else "by the tokenizer given"

    def __call__(self, texts: tuple[str, ...]) -> int:
        return math.ceil(self.raw(texts) * max(1.0, self._ratio))

    def raw(self, texts: tuple[str, ...]) -> int:
        if self._count is not None:
            return sum(self._count(text) for text in texts)
        return sum(math.ceil(len(text) / CHARS_PER_TOKEN) for text in texts)

    @property
    def _ratio(self) -> float:
        return self._counted / self._thought if self._thought else 1.0

    def learn(self, thought: int, counted: int) -> None:
        self._thought, self._counted = self._thought + thought, self._counted + counted


class EndpointClient:
    """Sends requests to one model. All requests of a run share its pace, its meter and its end."""

    def __init__(
        self,
        settings: EndpointSettings,
        key: Key,
        client: httpx.AsyncClient,
        meter: Meter,
        pace: Pace,
        counter: Counter,
        *,
        told: Callable[[str], None],
        kept: Callable[[], str],
        stopped: Callable[[], bool],
    ) -> None:
        """`told`: what is waited for, in words; `kept`: what errors say is answered; `stopped`: the run has ended."""
        self._settings, self._key, self._client = settings, key, client
        self._meter, self._pace, self._counter = meter, pace, counter
        self._told, self._kept, self._stopped = told, kept, stopped
        self._random = random.Random()  # for spreading retries; no answer depends on it
        self.retries = 0
        self.disbelieved = 0
        """Answers whose `usage` cannot be true; what was sent and came is counted then."""

    async def ask(self, ask: Ask, read: Read, *, salt: str = "", probing: bool = False) -> Answered | str:
        """The answer; while `probing`, words instead where the endpoint does not serve such a request.

        Raises EndpointRefused, EndpointUnavailable, BadAnswer, BudgetReached, MissingKey, and Stopped.
        """
        settings = self._settings
        content = canonical_json(ask.body)
        attempts = failures = bad = 0
        failed_at: float | None = None
        while True:
            if self._stopped():
                raise Stopped
            reservation = await self._room(ask)
            sent = False
            # Of what is asked, the sample among it; another one after a bad answer, which might be kept there.
            same = digest_of([salt, ask.route, content.decode(), list(ask.parts), bad])
            headers = {"content-type": "application/json", "idempotency-key": same}
            try:
                await self._turn(reservation)
                sent = True
                got = await self._send(ask.route, content, headers)
            except BaseException:
                (reservation.keep if sent else reservation.release)()
                raise
            attempts += 1
            wait_s: float | None = None
            if isinstance(got, _Failed):
                (reservation.keep if got.may_be_paid else reservation.release)()
                problem, gives_up = got.problem, failures + 1 >= settings.max_attempts
                failures += 1
            elif 200 <= got.status < 300:
                answered = self._read(ask, read, got, reservation)
                if isinstance(answered, Answered):
                    return answered
                problem, bad = answered.words, bad + 1
                if probing and not answered.is_served:
                    return problem
                gives_up = bad >= settings.max_bad_answers
                if gives_up:
                    raise self._bad(got, problem)
            else:
                reservation.release()
                problem = f"status {got.status}: {self._words(got)!r}"
                if not _is_later(got):
                    if probing and got.status in (400, 405, 415, 422, 501):
                        return problem
                    raise self._refused(got)
                wait_s = _retry_after_s(got.headers)
                failures += got.status != 429
                gives_up = failures >= settings.max_attempts
            now = time.monotonic()
            failed_at = now if failed_at is None else failed_at
            spread_s = self._random.uniform(0, min(settings.max_backoff_s, settings.backoff_s * 2 ** min(attempts, 30)))
            pause_s = spread_s if wait_s is None else wait_s + 0.1 * min(spread_s, 1.0)
            if gives_up or now + pause_s - failed_at > settings.patience_s:
                asked = "" if wait_s is None else f"; it asks to come back in {wait_s:.0f} s"
                raise EndpointUnavailable(
                    settings.endpoint, settings.model, problem + asked, attempts, now - failed_at, self._kept()
                )
            if isinstance(got, _Response) and (got.status == 429 or wait_s is not None):
                self._pace.hold(pause_s)  # meant for all requests, not for this one
            self.retries += 1
            self._told(f"{problem}; asked again in {pause_s:.1f} s")
            await self._sleep(pause_s)

    # -- before --------------------------------------------------------------------------------------------------------

    async def _room(self, ask: Ask) -> Reservation:
        while True:
            thought = self._counter(ask.prompt_texts)
            try:
                return self._meter.reserve(self._settings.prices, thought, ask.max_completion_tokens, self._kept)
            except BudgetReached:
                # What is in flight was reserved at its worst: there may be room once it is settled.
                if not self._meter.in_flight:
                    raise
            if self._stopped():
                raise Stopped
            await asyncio.sleep(_ROOM_POLL_S)

    async def _turn(self, reservation: Reservation) -> None:
        await self._sleep(self._pace.turn(reservation.prompt_tokens + reservation.completion_tokens))
        while (held_s := self._pace.held_s()) > 0:
            await self._sleep(held_s)

    async def _sleep(self, seconds: float) -> None:
        """Ends early when the run does."""
        give_up_at = time.monotonic() + seconds
        while (left := give_up_at - time.monotonic()) > 0:
            if self._stopped():
                raise Stopped
            await asyncio.sleep(min(left, 0.25))

    # -- one attempt ---------------------------------------------------------------------------------------------------

    async def _send(self, route: str, content: bytes, headers: Mapping[str, str]) -> _Response | _Failed:
        settings, limit = self._settings, int(self._settings.max_answer_mib * 2**20)
        url = f"{settings.base_url}/{route}"
        failed: _Failed
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                sending = self._client.stream(
                    "POST",
                    url,
                    content=content,
                    headers=dict(headers),
                    auth=self._key.auth(settings.key_header),
                    timeout=settings.request_timeout_s,
                    follow_redirects=False,
                )
                async with sending as response:
                    body = bytearray()
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > limit:
                            return _Failed(f"an answer of more than {settings.max_answer_mib:g} MiB", True)
                    # Here already, so that no frame above holds what an endpoint may have echoed.
                    clean = self._key.scrub_answer
                    said = {name: clean(value) for name, value in response.headers.items()}
                    return _Response(response.status_code, said, clean(body.decode(errors="replace")))
        except (TimeoutError, httpx.TimeoutException) as error:
            connecting = isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            failed = _Failed(f"no whole answer within {settings.request_timeout_s:g} s", not connecting)
        except httpx.ConnectError as error:
            failed = _Failed(f"no connection ({self._key.scrub(str(error)) or 'refused'})", False)
        except httpx.RemoteProtocolError as error:
            failed = _Failed(f"the connection broke off ({self._key.scrub(str(error))})", True)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            words = self._key.scrub(str(error))
            failed = _Failed(f"{type(error).__name__}{f' ({words})' if words else ''}", True)
        return failed

    def _read(self, ask: Ask, read: Read, got: _Response, reservation: Reservation) -> "Answered | _Bad":
        """The checked answer, or what is wrong with it."""
        body = _json(got.text)
        if not isinstance(body, dict):
            reservation.keep()
            return _Bad(_what_is_it(got, body))
        try:
            if isinstance(body.get("error"), dict | str) and body["error"] and "choices" not in body:
                raise WrongShape(f"an error: {self._words(got)}")
            parts = read(body)
            identity = Identity(model=self._name(body, "model"), fingerprint=self._name(body, "system_fingerprint"))
        except WrongShape as error:
            reservation.keep()
            return _Bad(f"JSON that is no answer: {self._key.scrub(str(error))}", not isinstance(error, NotServed))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            reservation.keep()
            return _Bad(f"JSON of the wrong shape ({type(error).__name__})")
        prompt_tokens, completion_tokens = self._usage(ask, body, got.text, reservation)
        reservation.settle(prompt_tokens, completion_tokens)
        more = prompt_tokens + completion_tokens - reservation.prompt_tokens - reservation.completion_tokens
        self._pace.correct(more)
        clean = json.loads(self._key.scrub_answer(json.dumps(list(parts.items()), ensure_ascii=False)))
        return Answered(
            parts={int(part): value for part, value in clean},
            identity=identity,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )

    def _name(self, body: Mapping[str, Any], field: str) -> str | None:
        name = body.get(field)
        if name is not None and not isinstance(name, str):
            raise WrongShape(f"`{field}` is no text")
        return None if name is None else self._key.scrub(name)[:EXCERPT].encode(errors="replace").decode()

    def _usage(self, ask: Ask, body: Mapping[str, Any], text: str, reservation: Reservation) -> tuple[int, int]:
        """Tokens of prompt and answer as the endpoint counts them, where that can be true; else as they are counted
        here. A token has a byte at least, and 20 characters at most, about.
        """
        usage = body.get("usage")
        sent = sum(len(one.encode(errors="replace")) for one in ask.prompt_texts)
        thought = self._counter.raw(ask.prompt_texts)
        if isinstance(usage, dict):
            prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens", 0))
            likely = sent / 20 <= prompt <= 2 * sent + 4096 and completion <= ask.max_completion_tokens + 8
            if prompt >= 0 and completion >= 0 and likely:
                self._counter.learn(thought, prompt)
                return prompt, completion
        self.disbelieved += 1
        answer = min(ask.max_completion_tokens, self._counter.raw((text,)))
        return reservation.prompt_tokens, answer

    # -- words ---------------------------------------------------------------------------------------------------------

    def _words(self, got: _Response) -> str:
        """What the endpoint says is wrong, at most EXCERPT characters."""
        body = _json(got.text)
        said: object = None
        if isinstance(body, dict):
            error = body.get("error", body)
            said = error if isinstance(error, str) else None
            if isinstance(error, dict):
                said = error.get("message") or error.get("detail")
        text = said if isinstance(said, str) and said else got.text
        if 300 <= got.status < 400:
            text = f"redirects to {got.headers.get('location', 'nowhere')}; give that as base_url if it is right"
        return self._key.scrub(text)[:EXCERPT]

    def _refused(self, got: _Response) -> EndpointRefused:
        settings = self._settings
        return EndpointRefused(settings.endpoint, settings.model, got.status, self._words(got), self._kept())

    def _bad(self, got: _Response, problem: str) -> BadAnswer:
        settings, excerpt = self._settings, self._key.scrub(got.text)[:EXCERPT]
        return BadAnswer(settings.endpoint, settings.model, got.status, problem, excerpt, self._kept())


def _count(value: object) -> int:
    """-1 for what is no number of tokens."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else -1


def _json(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _what_is_it(got: _Response, body: object) -> str:
    kind = got.headers.get("content-type", "").split(";")[0].strip().lower()
    start = got.text.lstrip()[:64].lower()
    if not start:
        return "nothing in it"
    if kind == "text/html" or start.startswith(("<!doctype", "<html")):
        return "HTML; a login or an error page of something before the endpoint?"
    if kind == "text/event-stream" or start.startswith("data:"):
        return "a stream of events, though none was asked for"
    return "text that is no JSON, or breaks off" if body is None else "JSON that is no object"


def _is_later(got: _Response) -> bool:
    """Whether the same request may be answered another time."""
    if got.status == 429:
        body = _json(got.text)
        error = body.get("error") if isinstance(body, dict) else None
        codes = {error.get("code"), error.get("type")} if isinstance(error, dict) else set()
        return "insufficient_quota" not in codes
    return got.status in LATER or (got.status >= 500 and got.status not in REFUSED_5XX)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds until the endpoint wants to be asked again; None where it says nothing that can be read."""
    milliseconds, said = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif said is None:
            return None
        elif said.strip().replace(".", "", 1).isdigit():
            seconds = float(said)
        else:
            now = headers.get("date")
            then = parsedate_to_datetime(said).timestamp()
            seconds = then - (time.time() if now is None else parsedate_to_datetime(now).timestamp())
    except (ValueError, TypeError, OverflowError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
