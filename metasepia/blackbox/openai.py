"""A model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, our own server...) as a black box."""

import dataclasses
import json
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx
import numpy as np

from metasepia.blackbox import boxes, ways
from metasepia.blackbox.asking import FORM, Known, Run
from metasepia.blackbox.boxes import Progress, Told
from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.errors import NothingMatched
from metasepia.blackbox.http import Counter, EndpointClient, Identity
from metasepia.blackbox.keys import Key
from metasepia.blackbox.meter import Estimate, Meter
from metasepia.blackbox.pace import Pace
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.scores import calibrated
from metasepia.blackbox.settings import EndpointSettings
from metasepia.blackbox.ways import Abilities, Form
from metasepia.digests import canonical_json, digest_of
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidSettings

logger = logging.getLogger(__name__)

LEAST_MATCHED = 0.05
"""Share of replies, or of first tokens' mass, that must name a label for the answers to say anything."""


@dataclass(frozen=True)
class _Report:
    """What stood out in the last run."""

    way: str
    identity: Identity
    notes: Mapping[str, Any]


class OpenAIEndpoint:
    """A prompt on a model of an endpoint. Answers are cached, so asking again, or after a kill, pays for nothing twice.

    One object may be asked from several tasks and threads at once. Its key is read from the environment whenever a
    request leaves and held nowhere.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        prompt: Prompt,
        cache: AnswerCache | None = None,
        meter: Meter | None = None,
        *,
        client: httpx.AsyncClient | None = None,
        pace: Pace | None = None,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        """`cache` None keeps answers as long as this object lives. `client`: of the caller's event loop, and left open;
        None: one for each call. `pace`: one for several boxes of an endpoint, where its limits are of all of them
        together; None: by the settings, for this box alone. `count_tokens`: the tokens of a text, for estimates; None:
        four characters each.

        Raises InvalidSettings where the meter has a limit on cost and the settings have no prices, and where the key
        stands in other settings.
        """
        self.settings, self.prompt = settings, prompt
        self._cache = AnswerCache(None) if cache is None else cache
        self.meter = Meter() if meter is None else meter
        self.meter.check_prices(settings.prices, settings.model)
        self._client, self._counter = client, Counter(count_tokens)
        self._key = Key(settings.key_env, settings.endpoint)
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute) if pace is None else pace
        self._report: _Report | None = None
        self._check_no_key()

    def __repr__(self) -> str:
        return f"OpenAIEndpoint({self.name!r} at {self.settings.endpoint})"

    def _check_no_key(self) -> None:
        """A key in the settings would be shown in errors and stand in the cache."""
        settings = self.settings
        shown = json.dumps([settings.base_url, settings.model, settings.extra, settings.calibrate], ensure_ascii=False)
        if self._key.scrub_answer(shown) != shown:
            allowed = "the variable of a key that stands nowhere else; base_url, model, extra or calibrate hold it"
            raise InvalidSettings("key_env", settings.key_env, allowed)

    @property
    def name(self) -> str:
        return f"{self.settings.model}/{self.prompt.name}"

    @property
    def box(self) -> str:
        """Under which answers are kept: endpoint, model and prompt. How labels are scored is no part of it."""
        settings = self.settings
        fields = {
            "kind": "endpoint",
            "base_url": settings.base_url,
            "model": settings.model,
            "api": settings.api,
            "extra": dict(settings.extra),
            "prompt": self.prompt.digest,
        }
        return digest_of(fields)

    @property
    def digest(self) -> str:
        settings = self.settings
        fields = {
            "box": self.box,
            "way": settings.way,
            "normalise": settings.normalise,
            "calibrate": list(settings.calibrate),
            "num_samples": settings.num_samples,
            "temperature": settings.temperature,
            "seed": settings.seed,
        }
        return digest_of(fields)

    def source(self) -> dict[str, Any]:
        """What was asked and, once something was answered, how and by whom."""
        found: dict[str, Any] = {
            "kind": "endpoint",
            "endpoint": self.settings.endpoint,
            "model": self.settings.model,
            "prompt": self.prompt.name,
            "prompt_digest": self.prompt.digest,
            "black_box": self.digest,
        }
        if self._report is not None:
            identity = self._report.identity
            found |= {
                "way": self._report.way,
                "answered_as": identity.model,
                "fingerprint": identity.fingerprint,
                **self._report.notes,
            }
        return found

    # -- before --------------------------------------------------------------------------------------------------------

    def estimate(self, texts: Sequence[str]) -> Estimate:
        """What asking would take now. Nothing is asked. Raises InvalidRequest for texts that cannot be asked for."""
        boxes.check_texts(texts)
        return self._estimate_of(self._wanted(texts))

    def _estimate_of(self, wanted: Sequence[str]) -> Estimate:
        form = self._form_of_before()
        plainest = Abilities(batched=False, several=False)
        candidates = self._forms(plainest) if form is None else [form]
        return max((self._estimate(one, wanted, form is None) for one in candidates), key=_dearest)

    def _estimate(self, form: Form, wanted: Sequence[str], is_bound: bool) -> Estimate:
        known = self._known(form, wanted)
        if not is_bound:
            known.load(self._cache, self.box)
        same = known.whole() or known.newest
        requests = prompt_tokens = completion_tokens = 0
        for text in wanted:
            for ask in form.asks(text, known.missing(same, text)):
                requests += 1
                prompt_tokens += self._counter(ask.prompt_texts)
                completion_tokens += ask.max_completion_tokens
        prices = self.settings.prices
        return Estimate(
            texts=len(wanted),
            cached=known.num_whole(same),
            way=form.name,
            is_bound=is_bound,
            requests=requests,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost=None if prices is None else prices.cost(prompt_tokens, completion_tokens),
            counted_by=self._counter.words,
        )

    def _wanted(self, texts: Sequence[str]) -> tuple[str, ...]:
        """Each text once, and those of the calibration."""
        extra = () if self.prompt.is_open else self.settings.calibrate
        return tuple(dict.fromkeys((*texts, *extra)))

    def _forms(self, abilities: Abilities) -> list[Form]:
        return ways.forms(self.settings, self.prompt, abilities)

    def _form_of_before(self) -> Form | None:
        """The form that an earlier run found; None: none did, or the settings name another one."""
        fact = self._cache.fact(self.box, FORM + self.settings.way)
        if not isinstance(fact, dict):
            return None
        abilities = Abilities(**{name: value for name, value in fact.items() if name != "name"})
        return next((form for form in self._forms(abilities) if form.name == fact["name"]), None)

    def _known(self, form: Form, wanted: Sequence[str]) -> Known:
        return Known(form=form, texts=wanted, identity_of=self._same)

    def _same(self, identity: str) -> str:
        """What must stay as it is of an identity."""
        return identity if self.settings.same != "model" else canonical_json(json.loads(identity)[0]).decode()

    # -- asking --------------------------------------------------------------------------------------------------------

    async def answer(self, texts: Sequence[str], *, told: Told | None = None) -> Answers:
        """What the model says of each text, all of it by one model.

        Raises InvalidRequest for texts that cannot be asked for, MissingKey, EndpointRefused, EndpointUnavailable,
        BadAnswer, ModelChanged, BudgetReached, CacheFailed, NothingMatched, NotSupported where labels cannot be scored
        as the settings say, and Locked while another process asks the same. What was answered before any of them is
        kept: the same call goes on from there.
        """
        boxes.check_texts(texts)
        wanted = self._wanted(texts)
        async with self._cache.asking(self.box, self.settings.patience_s):
            form = self._form_of_before()
            known = self._known(form or self._forms(Abilities())[0], wanted)
            if form is not None:
                known.load(self._cache, self.box)
            same = None if form is None else known.whole()
            if same is None:
                same = await self._ask(known, form is not None, told)
            elif told is not None:
                told(self._progress(known, same, None, None, len(wanted), ""))
        return self._answers(texts, known, same)

    async def _ask(self, known: Known, has_form: bool, told: Told | None) -> str:
        self._key.check()
        settings, words = self.settings, [""]
        estimate = self._estimate_of(known.texts)
        cached = known.num_whole(known.newest) if has_form else 0

        def tell() -> None:
            if told is not None:
                same = run.current or known.newest
                told(self._progress(known, same, run, estimate, cached, words[0] if client.retries else "", client))
            words[0] = ""

        def waits(what: str) -> None:
            words[0] = what
            tell()

        limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        headers = {"user-agent": "metasepia", "accept": "application/json"}
        opened = None
        if self._client is None:
            opened = httpx.AsyncClient(limits=limits, headers=headers, verify=_certificates())
        connected = self._client or opened
        assert connected is not None
        client = EndpointClient(
            settings,
            self._key,
            connected,
            self.meter,
            self._pace,
            self._counter,
            told=waits,
            kept=lambda: self._kept(known, run.current),
            stopped=lambda: run.has_failed,
        )
        run = Run(
            settings,
            self.box,
            self._cache,
            known,
            client,
            told=tell,
            candidates=() if has_form else self._forms(Abilities()),
        )
        try:
            tell()
            if not has_form:
                form = await run.find_form()
                logger.info("%s: answers are taken by %s", self.name, form.name)
            await run.ask_all()
        finally:
            if opened is not None:
                await opened.aclose()
        assert run.current is not None
        return run.current

    def _kept(self, known: Known, same: str | None) -> str:
        where = "in memory, as long as this black box lives" if self._cache.path is None else f"in {self._cache.path}"
        done, total = known.num_whole(same or known.newest), len(known.texts)
        return f"{done} of {total} texts are answered and kept {where}; the same call goes on from there"

    def _progress(
        self,
        known: Known,
        same: str | None,
        run: Run | None,
        estimate: Estimate | None,
        cached: int,
        waiting: str,
        client: EndpointClient | None = None,
    ) -> Progress:
        prices = self.settings.prices
        tokens = (0, 0) if run is None else (run.prompt_tokens, run.completion_tokens)
        return Progress(
            name=self.name,
            done=known.num_whole(same),
            total=len(known.texts),
            cached=cached,
            way=known.form.name,
            requests=0 if run is None else run.requests,
            retries=0 if client is None else client.retries,
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            cost=None if prices is None else prices.cost(*tokens),
            waiting=waiting,
            estimate=estimate,
        )

    # -- after ---------------------------------------------------------------------------------------------------------

    def _answers(self, texts: Sequence[str], known: Known, same: str) -> Answers:
        form, parts = known.form, known.parts[same]
        asked = tuple(dict.fromkeys(texts))
        outcome = form.outcome([parts[text] for text in asked])
        self._report = _Report(form.name, Identity.of_json(known.spelt[same]), outcome.notes)
        if outcome.scores is None:
            replies = dict(zip(asked, outcome.replies, strict=True))
            return Answers.of_replies(texts, [replies[text] for text in texts])
        self._check_matched(form, outcome.notes)
        scores = outcome.scores
        if self.settings.calibrate:
            nothing = form.outcome([parts[text] for text in self.settings.calibrate]).scores
            assert nothing is not None
            scores = calibrated(scores, nothing)
        places = {text: place for place, text in enumerate(asked)}
        rows = np.array([places[text] for text in texts])
        error = None if scores.standard_error is None else scores.standard_error[rows]
        answers = Answers.of_probabilities(texts, self.prompt.names, scores.probabilities[rows], error)
        return dataclasses.replace(answers, notes=(_in_words(form.name, outcome.notes, self.settings),))

    def _check_matched(self, form: Form, notes: Mapping[str, Any]) -> None:
        if "samples" in notes:
            share, replies = 1 - notes["unmatched"] / notes["samples"], tuple(dict.fromkeys(notes["unmatched replies"]))
        elif "named" in notes:
            share, replies = notes["named"], tuple(notes["likeliest"])
        else:
            return
        if share < LEAST_MATCHED:
            raise NothingMatched(self.name, share, self.prompt.verbalisers, replies)


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Those that the machine trusts, read once: hundreds of prompts ask one after another."""
    return httpx.create_ssl_context()


def _dearest(estimate: Estimate) -> tuple[float, int]:
    return estimate.cost or 0.0, estimate.prompt_tokens + estimate.completion_tokens


def _in_words(way: str, notes: Mapping[str, Any], settings: EndpointSettings) -> str:
    said = f"labels scored by {way}"
    if "samples" in notes:
        said += f", {settings.num_samples} replies a text; {notes['unmatched']} of {notes['samples']} name no label"
    if "named" in notes:
        said += f"; {notes['named']:.1%} of the first tokens' mass names a label"
    return said + (", calibrated" if settings.calibrate else "")
