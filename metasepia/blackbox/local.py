"""A prompt on a backbone of ours, with or without an expert, as a black box: exact label scores, as background rows.

Labels are scored by the teacher-forced log-probabilities of their verbalisers. Where each is one token, one row a text
does: its last hidden state times the verbalisers' rows of the output layer gives their logits up to what they share,
and the first text is scored both ways before that is relied upon. Else a row a label; these share the text's prompt,
or what all prompts begin with, whichever leaves less to be read.
"""

import asyncio
import math
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from metasepia.blackbox import boxes
from metasepia.blackbox.boxes import Progress, Told
from metasepia.blackbox.cache import AnswerCache, Kept
from metasepia.blackbox.heads import OutputRows
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.scores import Scores, calibrated, of_log_probabilities
from metasepia.blackbox.settings import Normalise
from metasepia.blackbox.tokens import PromptTokens, Tokenised, Tokeniser, adapter_json, shared_prefix
from metasepia.digests import digest_of, short
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidRequest, InvalidSettings, Overloaded, WindowExceeded
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, Executed, HiddenStates, HiddenStatesWanted, Row, Sampling, TokenChunk
from metasepia.rows import Scores as RowScores

PRIORITY = -1
"""Of all rows: whoever asks for an answer goes first."""
MAX_ROWS = 256
"""Asked for at once: enough for a scheduler to find rows of about one length."""
MAX_PREFIX_TOKENS = 2048
"""Of prompts that are shared by their labels' rows at once; schedulers keep about twice as many."""
MIN_PREFIX_TOKENS = 16
"""Schedulers share no fewer."""
ALONE = 2.0
"""What reading a token costs in a prefix, which is read by itself, against one in a batch of rows; about, on CPUs."""
PATIENCE_S = 600.0
"""With a backbone that is full."""
AGREES = {"float32": 2e-3, "float64": 2e-3}
"""By which log-odds of the two ways to score may differ, by the backbone's type."""
AGREES_ELSE = 0.1
HEAD, ROWS = "one row a text", "one row a label"


@runtime_checkable
class RowBackbone(Protocol):
    """What is used of `metasepia.backbone.Backbone`; `hidden_states(row)` too, where it has that."""

    @property
    def digest(self) -> str: ...
    def generate(self, row: Row) -> AsyncIterator[TokenChunk]: ...
    async def score(self, row: Row) -> RowScores: ...


@dataclass
class _Run:
    """One call of `answer`."""

    asked: Mapping[str, Tokenised]
    told: Told | None
    prefix: tuple[int, ...]
    """What all prompts begin with."""
    shares_text: bool
    """Rows of one text's labels share its whole prompt."""
    found: dict[str, Any] = field(default_factory=dict)
    cached: int = 0
    tokens: int = 0


class LocalModel:
    """A prompt on a backbone, through an adapter or the base weights. May be asked from several tasks at once."""

    def __init__(
        self,
        backbone: RowBackbone,
        tokens: PromptTokens,
        prompt: Prompt,
        *,
        adapter: Adapter = (),
        chat: bool | None = None,
        prepared: PreparedBackbone | None = None,
        normalise: Normalise = "sum",
        calibrate: Sequence[str] = (),
        cache: AnswerCache | None = None,
        name: str = "",
    ) -> None:
        """`chat` None: by the chat template where the checkpoint has one; False: the template as it is written.

        `prepared`: the backbone's card; without it no window is checked before rows are asked, open replies end at
        `max_tokens` alone, and labels of one token cost a row each. `cache` None keeps nothing.
        Raises InvalidRequest for labels whose verbalisers are the same tokens, WindowExceeded for a template that does
        not fit the window, NotSupported for a chat without a template.
        """
        if normalise not in ("sum", "token", "character"):
            raise InvalidSettings("normalise", normalise, "sum, token or character")
        self.backbone, self.prompt, self.adapter = backbone, prompt, adapter
        self.normalise: Normalise = normalise
        self._tokens, self._prepared, self._cache = tokens, prepared, cache
        self._calibrate = () if prompt.is_open else tuple(calibrate)
        self._tokeniser = Tokeniser(tokens, prompt, chat)
        self._name = name or f"{short(backbone.digest)}{''.join(f'+{short(one)}' for one, _ in adapter)}/{prompt.name}"
        self._executed: Executed | None = None
        self._head: OutputRows | None = None
        self._head_of: tuple[tuple[int, ...], ...] = ()
        """The verbalisers that `_head` has the rows of."""
        self._way = "replies" if prompt.is_open else ""
        self._check_window({"": self._tokeniser("")}, "prompt.template")

    def __repr__(self) -> str:
        return f"LocalModel({self.name!r})"

    @property
    def name(self) -> str:
        return self._name

    @property
    def digest(self) -> str:
        fields = {
            "kind": "local",
            "backbone": self.backbone.digest,
            "adapter": adapter_json(self.adapter),
            "prompt": self.prompt.digest,
            "chat": self._tokeniser.chat,
            "normalise": self.normalise,
            "calibrate": list(self._calibrate),
        }
        return digest_of(fields)

    def source(self) -> dict[str, Any]:
        executed = self._executed
        return {
            "kind": "local",
            "backbone": self.backbone.digest,
            "adapter": adapter_json(self.adapter),
            "prompt": self.prompt.name,
            "prompt_digest": self.prompt.digest,
            "chat": self._tokeniser.chat,
            "black_box": self.digest,
            "way": self._way,
            **({} if executed is None else {"path": executed.path, "dtype": executed.dtype}),
        }

    async def answer(self, texts: Sequence[str], *, told: Told | None = None) -> Answers:
        """What the model says of each text, exactly.

        Raises InvalidRequest for texts that cannot be asked for, WindowExceeded naming the one that is too long,
        NotSupported for a backbone that lacks what is needed, CacheFailed, and what rows raise; rows that are then
        still asked for are dropped.
        """
        boxes.check_texts(texts)
        wanted = tuple(dict.fromkeys((*texts, *self._calibrate)))
        # No thread: what order rows come in, and so how they are batched, is then the same in each run.
        asked = {text: self._tokeniser(text) for text in wanted}
        places = {text: f"texts[{place}]" for place, text in reversed(list(enumerate(texts)))}
        empty = next((text for text, one in asked.items() if not one.prompt), None)
        if empty is not None:
            raise InvalidRequest(places.get(empty, "calibrate"), "it has no tokens in this prompt")
        self._check_window(asked, places)
        run = self._plan(asked, told)
        if self._cache is None:
            await self._ask_all(run)
        else:
            async with self._cache.asking(self.digest, PATIENCE_S):
                items = {self._item(text): text for text in wanted}
                run.found = {items[one.item]: one.value for one in self._cache.get(self.digest, list(items))}
                run.cached = len(run.found)
                await self._ask_all(run)
        return self._answers(texts, run.found)

    # -- before --------------------------------------------------------------------------------------------------------

    def _check_window(self, asked: Mapping[str, Tokenised], places: Mapping[str, str] | str) -> None:
        if self._prepared is None:
            return
        more = self.prompt.max_tokens if self.prompt.is_open else 0
        for text, one in asked.items():
            if one.num_tokens + more > self._prepared.window:
                place = places if isinstance(places, str) else places.get(text, "calibrate")
                raise WindowExceeded(place, one.num_tokens + more, self._prepared.window)

    def _plan(self, asked: Mapping[str, Tokenised], told: Told | None) -> _Run:
        prompts = [one.prompt for one in asked.values()]
        prefix = shared_prefix(prompts)
        mean = sum(map(len, prompts)) / len(prompts)
        num_labels = len(self.prompt.names)
        shared = len(prefix) if len(prefix) >= MIN_PREFIX_TOKENS else 0
        shares_text = ALONE * mean < num_labels * (mean - shared)
        return _Run(asked=asked, told=told, prefix=prefix, shares_text=shares_text)

    def _item(self, text: str) -> str:
        return digest_of({"text": text})

    # -- rows ----------------------------------------------------------------------------------------------------------

    async def _ask_all(self, run: _Run) -> None:
        self._tell(run)
        left = [text for text in run.asked if text not in run.found]
        if not left:
            return
        await self._choose_way(run, left[0])
        queue = deque(sorted(left, key=lambda text: len(run.asked[text].prompt)))
        longest = len(run.asked[queue[-1]].prompt)
        rows_a_text = len(self.prompt.names) if self._way == ROWS else 1
        workers = max(1, MAX_ROWS // rows_a_text)
        if self._way == ROWS and run.shares_text:
            workers = max(1, min(workers, MAX_PREFIX_TOKENS // longest))

        async def work() -> None:
            while queue:
                text = queue.popleft()
                if text not in run.found:
                    await self._one(run, text)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(workers, len(queue))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise _first(errors) from None

    async def _one(self, run: _Run, text: str) -> None:
        tokenised = run.asked[text]
        if self.prompt.is_open:
            value: Any = await self._reply(run, tokenised)
        elif self._way == HEAD and tokenised.verbalisers == self._head_of:
            value = {"sums": (await self._by_head(run, tokenised)).tolist(), "tokens": [1] * len(self.prompt.names)}
        else:
            sums = await self._by_rows(run, tokenised)
            value = {"sums": sums.tolist(), "tokens": [len(ids) for ids in tokenised.verbalisers]}
        if self._cache is not None:
            kept = [Kept(item=self._item(text), identity="", value=value)]
            await asyncio.to_thread(self._cache.put, self.digest, kept)
        run.found[text] = value
        run.tokens += tokenised.num_tokens
        self._tell(run)

    async def _choose_way(self, run: _Run, text: str) -> None:
        """One row a text, if the backbone can and that says of this text what teacher forcing says."""
        if self._way:
            return
        head = self._output_rows(run)
        self._way = ROWS
        if head is None:
            return
        self._head, self._head_of = head, run.asked[text].verbalisers
        by_rows, by_head = await asyncio.gather(
            self._by_rows(run, run.asked[text]), self._by_head(run, run.asked[text])
        )
        assert self._executed is not None
        difference = np.abs((by_rows - by_rows[0]) - (by_head - by_head[0])).max()
        if difference <= AGREES.get(self._executed.dtype, AGREES_ELSE):
            self._way = HEAD

    def _output_rows(self, run: _Run) -> OutputRows | None:
        """The output layer's rows of the verbalisers; None where one row a text cannot do."""
        capabilities = getattr(self.backbone, "capabilities", frozenset(("hidden_states",)))
        verbalisers = {one.verbalisers for one in run.asked.values()}
        able = hasattr(self.backbone, "hidden_states") and "hidden_states" in capabilities
        if not able or self._prepared is None or self.normalise == "character" or len(verbalisers) > 1:
            return None
        (ids,) = verbalisers
        return OutputRows.of(self._prepared, [one[0] for one in ids]) if all(len(one) == 1 for one in ids) else None

    async def _by_head(self, run: _Run, asked: Tokenised) -> Float[np.ndarray, " labels"]:
        """Logits of the verbalisers: log-probabilities up to what all of them share."""
        assert self._head is not None
        hidden = HiddenStatesWanted(layers=(-1,), pooling="last")
        row = self._row(run, asked.prompt, run.prefix, want="hidden_states", hidden=hidden)
        states: HiddenStates = await self._patiently(self.backbone.hidden_states, row)  # pyright: ignore[reportAttributeAccessIssue]
        self._executed = states.executed
        return self._head.logits(states.states[0])

    async def _by_rows(self, run: _Run, asked: Tokenised) -> Float[np.ndarray, " labels"]:
        """The verbalisers' log-probabilities, natural, summed."""
        prefix = asked.prompt if run.shares_text else run.prefix
        begin = len(asked.prompt)
        rows = [
            self._row(run, (*asked.prompt, *ids), prefix, want="logprobs", score_from=begin)
            for ids in asked.verbalisers
        ]
        scores: list[RowScores] = await asyncio.gather(*(self._patiently(self.backbone.score, row) for row in rows))
        self._executed = scores[0].executed
        return np.array([math.fsum(one.logprobs.tolist()) for one in scores])

    async def _reply(self, run: _Run, asked: Tokenised) -> str:
        stops = () if self._prepared is None else self._prepared.eos_token_ids
        sampling = Sampling(temperature=0.0, max_tokens=self.prompt.max_tokens, stop_token_ids=stops)
        row = self._row(run, asked.prompt, run.prefix, sampling=sampling)

        async def whole(row: Row) -> list[TokenChunk]:
            async with aclosing(self.backbone.generate(row)) as chunks:  # pyright: ignore[reportArgumentType]
                return [chunk async for chunk in chunks]

        chunks = await self._patiently(whole, row)
        self._executed = chunks[-1].executed
        return self._tokens.text([token for chunk in chunks for token in chunk.token_ids])

    def _row(self, run: _Run, token_ids: tuple[int, ...], prefix: tuple[int, ...], **more: Any) -> Row:
        return Row(
            request_id=f"blackbox-{uuid.uuid4().hex}",
            backbone=self.backbone.digest,
            token_ids=token_ids,
            adapter=self.adapter,
            priority=PRIORITY,
            prefix=prefix,
            **more,
        )

    async def _patiently(self, ask: Any, row: Row) -> Any:
        """Asked again while the backbone's queue is full: rows are pure functions of themselves."""
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            try:
                return await ask(row)
            except Overloaded as error:
                wait_s = min(max(error.retry_after_s, 0.05), 5.0)
                if asyncio.get_running_loop().time() + wait_s > give_up_at:
                    raise
                await asyncio.sleep(wait_s)

    # -- after ---------------------------------------------------------------------------------------------------------

    def _tell(self, run: _Run) -> None:
        if run.told is not None:
            run.told(
                Progress(
                    name=self.name,
                    done=len(run.found),
                    total=len(run.asked),
                    cached=run.cached,
                    way=self._way,
                    requests=len(run.found) - run.cached,
                    prompt_tokens=run.tokens,
                )
            )

    def _answers(self, texts: Sequence[str], found: Mapping[str, Any]) -> Answers:
        if self.prompt.is_open:
            return Answers.of_replies(texts, [found[text] for text in texts])
        scores = self._scores([found[text] for text in texts])
        if self._calibrate:
            scores = calibrated(scores, self._scores([found[text] for text in self._calibrate]))
        answers = Answers.of_probabilities(texts, self.prompt.names, scores.probabilities)
        calibration = ", calibrated" if self._calibrate else ""
        return replace(answers, notes=(f"labels scored by teacher forcing ({self.normalise}{calibration})",))

    def _scores(self, values: Sequence[Mapping[str, Any]]) -> Scores:
        sums, lengths = (np.array([one[name] for one in values], float) for name in ("sums", "tokens"))
        return of_log_probabilities(sums, lengths, self.prompt.verbalisers, self.normalise)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
