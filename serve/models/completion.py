"""Chat and plain completions: a body to rows, chunks of tokens to OpenAI's JSON, whole or streamed.

`n` choices of each prompt are rows with the seeds seed, seed + 1, ...; each is a row like any other.
"""

import asyncio
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from actors.messages import Receipt
from metasepia.errors import Unavailable, WindowExceeded
from metasepia.rows import Executed, Row, Sampling, Scores, TokenChunk
from serve.models.embedding import sequences_of
from serve.models.prompts import Prompts, StopStrings, StreamedText, away
from serve.models.routing import Routed
from serve.models.token_logprobs import HeldTokens, ToldToken, in_chat, in_text, of_prompt
from serve.parts import Backbone
from serve.requests.deadlines import Deadline
from serve.requests.receipts import receipt_json
from serve.requests.schemas import DEFAULT_ANSWER_LEN, MAX_SEED, ChatRequest, CompletionRequest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A completion about to run."""

    id: str
    kind: Literal["chat", "text"]
    created: int
    routed: Routed
    rows: tuple[Row, ...]
    """The choices of the first prompt, then those of the second, ..."""
    num_prompts: int
    echoes: tuple[str, ...]
    """The text of each prompt, where it is to stand before its answers; empty: no echo."""
    is_silent: bool
    """Nothing is generated: the prompts alone are told."""
    likeliest: int | None
    """How many of the likeliest tokens are told beside each; None: no log-probabilities."""
    stops: tuple[str, ...]
    seed: int
    """Of the first choice; the request's, or drawn here and told in the receipt."""
    request_digest: str
    include_usage: bool
    deadline: Deadline

    @property
    def prompt_len(self) -> int:
        """Tokens of all prompts, each once."""
        return sum(len(row.token_ids) for row in self.rows[:: self.num_choices])

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return len(self.rows) // self.num_prompts

    def echo(self, index: int) -> str:
        """What stands before the answer of a choice."""
        return self.echoes[index // self.num_choices] if self.echoes else ""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next text of one choice."""

    index: int
    text: str
    num_tokens: int
    told: tuple[ToldToken, ...] = ()
    """The tokens of the text, where log-probabilities are asked for."""
    is_echo: bool = False
    finish: Literal["stop", "length"] | None = None
    executed: Executed | None = None


async def tokens_of(
    request: ChatRequest | CompletionRequest, backbone: Backbone, prompts: Prompts
) -> list[tuple[int, ...]]:
    """The prompts. Raises WindowExceeded, naming the field, when no answer would fit behind one."""
    if isinstance(request, ChatRequest):
        messages = [{"role": _role(one.role), "content": one.content} for one in request.messages]
        texts = [one["content"] for one in messages]
        return [await _tokens(texts, "messages", partial(prompts.chat, messages), backbone, prompts)]
    found: list[tuple[int, ...]] = []
    for index, one in enumerate(request.prompts):
        field = "prompt" if len(request.prompts) == 1 else f"prompt[{index}]"
        if isinstance(one, str):
            found.append(await _tokens([one], field, partial(prompts.plain, one), backbone, prompts))
            continue
        (token_ids,) = sequences_of([one], [field], backbone.prepared, prompts)
        if len(token_ids) >= backbone.prepared.window:
            raise WindowExceeded(field, len(token_ids), backbone.prepared.window)
        found.append(token_ids)
    return found


async def _tokens(
    texts: Sequence[str], field: str, tokenise: Callable[[], tuple[int, ...]], backbone: Backbone, prompts: Prompts
) -> tuple[int, ...]:
    window, num_tokens = backbone.prepared.window, sum(prompts.at_least(text) for text in texts)
    if num_tokens < window:
        token_ids = await away(sum(map(len, texts)), tokenise)
        if len(token_ids) < window:
            return token_ids
        num_tokens = len(token_ids)
    raise WindowExceeded(field, num_tokens, window)


def question_of(request: ChatRequest | CompletionRequest) -> str | None:
    """A chat's last message by its user; None for a plain completion, which is the beginning of any text."""
    if not isinstance(request, ChatRequest):
        return None
    return next((one.content for one in reversed(request.messages) if one.role == "user"), None)


def plan(
    request: ChatRequest | CompletionRequest,
    prompt_tokens: Sequence[tuple[int, ...]],
    routed: Routed,
    request_digest: str,
    deadline: Deadline,
    prompts: Prompts,
) -> Plan:
    """Rows for a request. Raises WindowExceeded, naming the limit, when prompt and answer cannot fit the window."""
    chat, chosen = isinstance(request, ChatRequest), routed.chosen
    window, longest = chosen.backbone.prepared.window, max(map(len, prompt_tokens))
    limit_field, limit = request.answer_limit
    if limit is not None and longest + limit > window:
        raise WindowExceeded(limit_field, longest + limit, window)
    seed = secrets.randbelow(2**53) if request.seed is None else request.seed  # 53 bits: exact in any JSON reader
    id_ = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
    rows = tuple(
        Row(
            request_id=f"{id_}-{index}",
            backbone=chosen.backbone.prepared.digest,
            token_ids=token_ids,
            adapter=chosen.adapter,
            sampling=Sampling(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=min(DEFAULT_ANSWER_LEN, window - len(token_ids)) if limit is None else max(1, limit),
                stop_token_ids=chosen.backbone.prepared.eos_token_ids,
            ),
            seed=(seed + index) % (MAX_SEED + 1),
            deadline_unix_s=deadline.unix_s,
            top_logprobs=request.likeliest or 0,
        )
        for index, token_ids in enumerate(one for one in prompt_tokens for _ in range(request.n))
    )
    echoes: tuple[str, ...] = ()
    if isinstance(request, CompletionRequest) and request.echo:
        echoes = tuple(one if isinstance(one, str) else prompts.text(one) for one in request.prompts)
    return Plan(
        id=id_,
        kind="chat" if chat else "text",
        created=int(time.time()),
        routed=routed,
        rows=rows,
        num_prompts=len(prompt_tokens),
        echoes=echoes,
        is_silent=limit == 0,
        likeliest=request.likeliest,
        stops=tuple(request.stop),
        seed=seed,
        request_digest=request_digest,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        deadline=deadline,
    )


async def echoed(plan: Plan, prompts: Prompts) -> AsyncGenerator[Piece]:
    """The prompts, where they are to stand before their answers; with their log-probabilities where asked for."""
    scores: list[Scores] = []
    if plan.is_silent or (plan.echoes and plan.likeliest is not None):
        asked = [
            dataclasses.replace(row, request_id=f"{row.request_id}-prompt", want="logprobs", score_from=1)
            for row in plan.rows[:: plan.num_choices]
        ]
        scores = await plan.routed.chosen.backbone.score(asked)
    for index, row in enumerate(plan.rows if plan.echoes else ()):
        score = scores[index // plan.num_choices] if scores else None
        told = of_prompt(row.token_ids, score, prompts) if score is not None and plan.likeliest is not None else ()
        yield Piece(
            index=index,
            text=plan.echo(index),
            num_tokens=0,
            told=told,
            is_echo=True,
            finish="length" if plan.is_silent else None,
            executed=score.executed if score is not None else None,
        )


async def pieces(plan: Plan, prompts: Prompts, index: int) -> AsyncGenerator[Piece]:
    """One choice's text as it comes; the last piece has `finish` and what was executed."""
    backbone, row = plan.routed.chosen.backbone, plan.rows[index]
    streamed, stops = StreamedText(prompts), StopStrings(plan.stops)
    held = None if plan.likeliest is None else HeldTokens()
    executed: Executed | None = None

    def piece(chunk: TokenChunk, text: str, finish: Literal["stop", "length"] | None = None) -> Piece:
        told = () if held is None else held.release(text, all_of_them=finish is not None and not stops.stopped)
        return Piece(
            index=index, text=text, num_tokens=len(chunk.token_ids), told=told, finish=finish, executed=executed
        )

    async with aclosing(backbone.generate(row)) as chunks:
        async for chunk in chunks:
            executed = chunk.executed or executed
            read = streamed.add(chunk.token_ids)
            if chunk.finish is not None:
                read += streamed.rest()
            if held is not None:
                held.add(chunk, read)
            was_stopped, text = stops.stopped, stops.add(read)
            if chunk.finish is not None:
                yield piece(chunk, text + stops.rest(), "stop" if stops.stopped else chunk.finish)
                return
            if stops.stopped and executed is not None:
                yield piece(chunk, text, "stop")
                return
            if not was_stopped:
                yield piece(chunk, text)
    raise Unavailable(f"backbone {backbone.id}", 1.0)  # the stream ended before its last chunk


async def merged(plan: Plan, prompts: Prompts) -> AsyncGenerator[Piece]:
    """The pieces of all choices as they come, echoed prompts first. An error of one ends all."""
    async for piece in echoed(plan, prompts):
        yield piece
    if plan.is_silent:
        return
    if len(plan.rows) == 1:
        async with aclosing(pieces(plan, prompts, 0)) as only:
            async for piece in only:
                yield piece
        return
    queue: asyncio.Queue[Piece | None] = asyncio.Queue(maxsize=4 * len(plan.rows))

    async def pump(index: int) -> None:
        async with aclosing(pieces(plan, prompts, index)) as source:
            async for piece in source:
                await queue.put(piece)

    async def pump_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(plan.rows)):
                    group.create_task(pump(index))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await queue.put(None)

    pumping = asyncio.create_task(pump_all())
    try:
        while (piece := await queue.get()) is not None:
            yield piece
        await pumping
    finally:
        pumping.cancel()


@dataclass
class Answered:
    """What has been said so far; enough for usage and receipt."""

    num_choices: int
    num_tokens: int = 0
    executed: Executed | None = None
    texts: list[list[str]] = field(init=False)
    echoed: list[list[ToldToken]] = field(init=False)
    told: list[list[ToldToken]] = field(init=False)
    finishes: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = [[] for _ in range(self.num_choices)]
        self.echoed = [[] for _ in range(self.num_choices)]
        self.told = [[] for _ in range(self.num_choices)]
        self.finishes = [None] * self.num_choices

    def add(self, piece: Piece) -> None:
        self.num_tokens += piece.num_tokens
        self.executed = piece.executed or self.executed
        self.texts[piece.index].append(piece.text)
        self.finishes[piece.index] = piece.finish or self.finishes[piece.index]
        (self.echoed if piece.is_echo else self.told)[piece.index] += piece.told

    def logprobs(self, plan: Plan, prompts: Prompts) -> list[dict[str, Any] | None]:
        """Of each choice; None where they were not asked for."""
        return [
            _logprobs(plan, prompts, index, echo, told)
            for index, (echo, told) in enumerate(zip(self.echoed, self.told, strict=True))
        ]

    def usage(self, plan: Plan) -> dict[str, int]:
        return {
            "prompt_tokens": plan.prompt_len,
            "completion_tokens": self.num_tokens,
            "total_tokens": plan.prompt_len + self.num_tokens,
        }

    def receipt(self, plan: Plan) -> dict[str, Any]:
        assert self.executed is not None  # the last piece of every choice carries it
        receipt = Receipt.of(self.executed, request=plan.request_digest, seed=plan.seed)
        return receipt_json(dataclasses.replace(receipt, dispatch=plan.routed.stage, margin=plan.routed.margin))


async def whole(plan: Plan, prompts: Prompts) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    answered = Answered(len(plan.rows))
    async for piece in plan.deadline.over(merged(plan, prompts), "the completion"):
        answered.add(piece)
    choices = [
        {"index": index, **_content(plan, "".join(texts)), "logprobs": logprobs, "finish_reason": finish}
        for index, (texts, logprobs, finish) in enumerate(
            zip(answered.texts, answered.logprobs(plan, prompts), answered.finishes, strict=True)
        )
    ]
    return {
        **_head(plan, streamed=False),
        "choices": choices,
        "usage": answered.usage(plan),
        "receipt": answered.receipt(plan),
    }


async def events(plan: Plan, prompts: Prompts, count: Callable[[int, int], None]) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream, up to [DONE]; the last one carries the receipt. `count` is told the tokens as they go."""
    answered, begun, counted = Answered(len(plan.rows)), False, 0
    async with aclosing(_events(plan, prompts, answered)) as source:
        async for event in source:
            if not begun:  # what is refused before its first event costs nobody
                begun = True
                count(plan.prompt_len, 0)
            if answered.num_tokens > counted:
                count(0, answered.num_tokens - counted)
                counted = answered.num_tokens
            yield event


async def _events(plan: Plan, prompts: Prompts, answered: Answered) -> AsyncGenerator[dict[str, Any]]:
    begun: set[int] = set()
    async with aclosing(plan.deadline.over(merged(plan, prompts), "the completion")) as source:
        async for piece in source:
            answered.add(piece)
            if plan.kind == "chat" and piece.index not in begun:
                begun.add(piece.index)
                yield _event(plan, piece.index, {"delta": {"role": "assistant", "content": ""}})
            if piece.text or piece.told:
                delta = {"delta": {"content": piece.text}} if plan.kind == "chat" else {"text": piece.text}
                echo, told = (piece.told, ()) if piece.is_echo else ((), piece.told)
                logprobs = _logprobs(plan, prompts, piece.index, echo, told)
                yield _event(plan, piece.index, delta, logprobs=logprobs)
            if piece.finish is not None:
                end = {"delta": {}} if plan.kind == "chat" else {"text": ""}
                event = _event(plan, piece.index, end, piece.finish)
                if all(answered.finishes) and not plan.include_usage:
                    event["receipt"] = answered.receipt(plan)
                yield event
    if plan.include_usage:
        yield {
            **_head(plan, streamed=True),
            "choices": [],
            "usage": answered.usage(plan),
            "receipt": answered.receipt(plan),
        }


def _head(plan: Plan, *, streamed: bool) -> dict[str, Any]:
    chat = "chat.completion.chunk" if streamed else "chat.completion"
    kind = chat if plan.kind == "chat" else "text_completion"
    return {"id": plan.id, "object": kind, "created": plan.created, "model": plan.routed.chosen.name}


def _logprobs(
    plan: Plan, prompts: Prompts, index: int, echo: Sequence[ToldToken], told: Sequence[ToldToken]
) -> dict[str, Any] | None:
    if plan.likeliest is None:
        return None
    if plan.kind == "chat":
        return in_chat(told, prompts)
    before = len(plan.echo(index))
    return in_text((*echo, *(dataclasses.replace(one, offset=before + one.offset) for one in told)), prompts)


def _event(
    plan: Plan,
    index: int,
    content: dict[str, Any],
    finish: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
    usage = {"usage": None} if plan.include_usage else {}
    return {**_head(plan, streamed=True), "choices": [choice], **usage}


def _content(plan: Plan, text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if plan.kind == "chat" else {"text": text}


def _role(role: str) -> str:
    """OpenAI's newer name for the system's role, which chat templates do not know."""
    return "system" if role == "developer" else role
