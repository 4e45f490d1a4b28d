"""One run of an endpoint over many texts: what is kept is not asked, the rest is, bounded, until all is of one model.

Workers take texts from one queue. What a worker is answered is kept, under the identity that answered, before it
counts. The first thing that ends the run (a refusal, a limit, a changed model) lets requests in flight come home, since
they are paid for, and starts no others.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from metasepia.blackbox.cache import AnswerCache, Kept
from metasepia.blackbox.errors import ModelChanged
from metasepia.blackbox.http import Answered, EndpointClient, Identity, Stopped
from metasepia.blackbox.settings import EndpointSettings
from metasepia.blackbox.ways import FEWER_TOP, Ask, Form
from metasepia.digests import digest_of
from metasepia.errors import NotSupported

FORM = "form for "
"""The fact of a cache that says how an endpoint is asked, by what the settings say of that."""
MAX_CHANGES = 3
"""Changes of the model within one run that `ask again` goes along with; what alternates is no one model."""


def item_of(form: Form, text: str, part: int) -> str:
    """The digest of one part of a text, as it is kept."""
    return digest_of({"way": form.name, "params": dict(form.params()), "text": text, "part": part})


@dataclass
class Known:
    """What is kept of the texts of a run, by who answered."""

    form: Form
    texts: Sequence[str]
    identity_of: Callable[[str], str]
    """What must stay the same of an identity as it is kept."""
    parts: dict[str, dict[str, dict[int, Any]]] = field(default_factory=dict)
    """By identity, text and part."""
    spelt: dict[str, str] = field(default_factory=dict)
    """The last whole identity that was seen of each."""
    _num_whole: dict[str, int] = field(default_factory=dict)

    def begin(self, form: Form) -> None:
        """Forgets all, for another form of asking."""
        self.form = form
        self.parts, self.spelt, self._num_whole = {}, {}, {}

    def load(self, cache: AnswerCache, box: str, texts: Sequence[str] | None = None) -> None:
        items = {
            item_of(self.form, text, part): (text, part)
            for text in (self.texts if texts is None else texts)
            for part in range(self.form.num_parts)
        }
        for kept in cache.get(box, list(items)):
            self.add(kept.identity, *items[kept.item], kept.value)

    def add(self, identity: str, text: str, part: int, value: Any) -> None:
        """In order of time: the identity added last is the newest."""
        same = self.identity_of(identity)
        self.parts[same] = self.parts.pop(same, {})
        have = self.parts[same].setdefault(text, {})
        if part not in have and len(have) + 1 == self.form.num_parts:
            self._num_whole[same] = self._num_whole.get(same, 0) + 1
        have[part] = value
        self.spelt[same] = identity

    @property
    def newest(self) -> str | None:
        return next(reversed(self.parts), None)

    def missing(self, same: str | None, text: str) -> list[int]:
        have = self.parts.get(same, {}).get(text, {}) if same is not None else {}
        return [part for part in range(self.form.num_parts) if part not in have]

    def num_whole(self, same: str | None) -> int:
        """Texts that this identity has answered whole."""
        return 0 if same is None else self._num_whole.get(same, 0)

    def whole(self) -> str | None:
        """The newest identity that has answered every text."""
        return next((one for one in reversed(self.parts) if self.num_whole(one) == len(self.texts)), None)


def _claim(form: Form, text: str) -> str:
    return digest_of([form.name, dict(form.params()), text])


class Run:
    """Asks for what `known` lacks."""

    def __init__(
        self,
        settings: EndpointSettings,
        box: str,
        cache: AnswerCache,
        known: Known,
        client: EndpointClient,
        *,
        told: Callable[[], None],
        candidates: Sequence[Form] = (),
    ) -> None:
        self._settings, self._box, self._cache = settings, box, cache
        self.known, self._client, self._told = known, client, told
        self._candidates = candidates
        self.failure: BaseException | None = None
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        """Answered in this run, and what they took."""
        self._queue: deque[str] = deque()
        self._epoch = 0
        """Counts changes of the model; a request remembers in which it was sent."""
        self._changes = 0
        self.current: str | None = None

    @property
    def has_failed(self) -> bool:
        return self.failure is not None

    async def find_form(self) -> Form:
        """Tries the candidates on the first text, one request each, until one is served; what it answers is kept.

        Raises NotSupported where the form that the settings name does not suit.
        """
        text, reasons = self.known.texts[0], []
        for form in self._candidates:
            self.known.begin(form)
            why = await self._probe(form, text)
            if why is None:
                await asyncio.to_thread(
                    self._cache.put_fact,
                    self._box,
                    FORM + self._settings.way,
                    {"name": form.name, **form.abilities.to_json()},
                )
                self.known.load(self._cache, self._box)
                return form
            reasons.append(f"{form.name}: {why}")
        what = f"scoring labels by {self._candidates[-1].name} at {self._settings.endpoint}"
        raise NotSupported(what, f"it says {'; '.join(reasons)[:400]}; leave way = 'auto'")

    async def _probe(self, form: Form, text: str) -> str | None:
        """Why this form is not to be used; None: it is. Waits for who asks the same already in this process."""
        claimed = _claim(form, text)
        while (other := self._cache.begin(self._box, claimed)) is not None:
            await asyncio.shield(asyncio.wrap_future(other))
        try:
            self.known.load(self._cache, self._box, [text])
            newest = self.known.newest
            if newest is not None and not self.known.missing(newest, text):  # asked when the settings said otherwise
                return form.fit(text, self.known.parts[newest][text])
            while True:
                ask = form.asks(text, range(form.num_parts))[0]
                told = await self._client.ask(ask, partial(form.read, text, ask), probing=True)
                if isinstance(told, Answered):
                    await self._keep(form, text, told)
                    return form.fit(text, told.parts)
                if not _adapt(form, ask, told):
                    return told
        finally:
            self._cache.end(self._box, claimed)

    # -- all texts -----------------------------------------------------------------------------------------------------

    async def ask_all(self) -> None:
        """Until one identity has answered every text. Raises what ended the run."""
        self.current = self.known.newest
        self._check_kept()
        self._fill()
        workers = [asyncio.create_task(self._work()) for _ in range(min(self._settings.concurrency, len(self._queue)))]
        try:
            while workers:
                await asyncio.gather(*workers)
                # A text whose answer came too late for the model of then is asked for again.
                self._fill()
                left = min(self._settings.concurrency, len(self._queue))
                workers = [] if self.has_failed else [asyncio.create_task(self._work()) for _ in range(left)]
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self.failure is not None:
            raise self.failure

    def _check_kept(self) -> None:
        """Where answers of another model are kept that the newest lacks, asking on would pay for them again."""
        others = [one for one in self.known.parts if one != self.current]
        lacking = [text for text in self.known.texts if self.known.missing(self.current, text)]
        if self._settings.on_change == "ask again":
            return
        for one in others:
            if any(self.known.parts[one].get(text) for text in lacking):
                assert self.current is not None
                raise self._changed(one, self.current)

    def _changed(self, before: str, after: str) -> ModelChanged:
        known = self.known
        return ModelChanged(
            self._settings.endpoint,
            self._settings.model,
            str(Identity.of_json(known.spelt[before])),
            str(Identity.of_json(known.spelt[after])),
            known.num_whole(before),
            known.num_whole(after),
        )

    def _fill(self) -> None:
        """Texts that nobody has answered come first: their answers are of use whichever model gives them."""
        parts = self.known.parts.values()
        lacking = [text for text in self.known.texts if self.known.missing(self.current, text)]
        self._queue = deque(sorted(lacking, key=lambda text: any(text in have for have in parts)))

    async def _work(self) -> None:
        while self._queue and not self.has_failed:
            text = self._queue.popleft()
            try:
                await self._one(text)
            except Stopped:
                return
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # the first one is what the run ends with
                self.failure = self.failure or error
                return

    async def _one(self, text: str) -> None:
        """Asks for a text's missing parts, or waits for who does already in this process."""
        form = self.known.form
        claimed = _claim(form, text)
        other = self._cache.begin(self._box, claimed)
        if other is not None:
            await asyncio.shield(asyncio.wrap_future(other))
            self.known.load(self._cache, self._box, [text])
            if self.known.missing(self.current, text):
                self._queue.append(text)
            self._told()
            return
        try:
            self.known.load(self._cache, self._box, [text])
            while missing := self.known.missing(self.current, text):
                epoch, current = self._epoch, self.current
                ask = form.asks(text, missing)[0]
                told = await self._client.ask(ask, partial(form.read, text, ask), salt=current or "")
                assert isinstance(told, Answered)
                if not told.parts:
                    raise NotSupported(f"what {self._settings.endpoint} answers", "it holds none of what was asked for")
                await self._keep(form, text, told)
                if not self._is_current(told.identity, epoch):
                    return
        finally:
            self._cache.end(self._box, claimed)

    def _is_current(self, identity: Identity, epoch: int) -> bool:
        """Whether an answer is from the model that this run is about; notices when that changes."""
        same = self.known.identity_of(identity.to_json())
        if self.current is None:
            self.current = same
        if same == self.current:
            return True
        if epoch != self._epoch:  # sent before the change that this run has noticed already
            return False
        before, self._changes = self.current, self._changes + 1
        if self._settings.on_change == "stop" or self._changes > MAX_CHANGES:
            self.failure = self.failure or self._changed(before, same)
            return False
        self.current, self._epoch = same, self._epoch + 1
        self._fill()
        return False

    async def _keep(self, form: Form, text: str, told: Answered) -> None:
        identity = told.identity.to_json()
        share = 1 / max(len(told.parts), 1)
        kept = [
            Kept(
                item=item_of(form, text, part),
                identity=identity,
                value=value,
                prompt_tokens=round(told.prompt_tokens * share),
                completion_tokens=round(told.completion_tokens * share),
            )
            for part, value in told.parts.items()
        ]
        await asyncio.to_thread(self._cache.put, self._box, kept)
        for part, value in told.parts.items():
            self.known.add(identity, text, part, value)
        self.requests += 1
        self.prompt_tokens += told.prompt_tokens
        self.completion_tokens += told.completion_tokens
        self._told()


def _adapt(form: Form, ask: Ask, said: str) -> bool:
    """Whether the same form may be tried in a plainer spelling; notes that in the endpoint's abilities."""
    abilities = form.abilities
    if "max_completion_tokens" in said and abilities.tokens_field == "max_tokens":
        abilities.tokens_field = "max_completion_tokens"
    elif form.name == "echo" and abilities.batched and len(ask.parts) > 1:
        abilities.batched = False
    elif form.name == "first token" and abilities.top > FEWER_TOP and "logprobs" in said:
        abilities.top = FEWER_TOP
    elif form.name == "sampling" and abilities.several and len(ask.parts) > 1:
        abilities.several = False
    else:
        return False
    return True
