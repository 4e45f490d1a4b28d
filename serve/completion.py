"""Chat and plain completions: a body to rows, chunks of tokens to OpenAI's JSON, whole or streamed.

`n` choices are n rows with the seeds seed, seed + 1, ...; each is a row like any other.
"""

import asyncio
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from actors.messages import Receipt
from metasepia.errors import Unavailable, WindowExceeded
from metasepia.rows import Executed, Row, Sampling
from serve.deadlines import Deadline
from serve.parts import Backbone
from serve.prompts import Prompts, StopStrings, StreamedText, away
from serve.receipts import receipt_json
from serve.routing import Routed
from serve.schemas import DEFAULT_ANSWER_LEN, MAX_SEED, ChatRequest, CompletionRequest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A completion about to run."""

    id: str
    kind: Literal["chat", "text"]
    created: int
    routed: Routed
    rows: tuple[Row, ...]
    stops: tuple[str, ...]
    seed: int
    """Of the first choice; the request's, or drawn here and told in the receipt."""
    request_digest: str
    include_usage: bool
    deadline: Deadline

    @property
    def prompt_len(self) -> int:
        return len(self.rows[0].token_ids)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next text of one choice."""

    index: int
    text: str
    num_tokens: int
    finish: Literal["stop", "length"] | None = None
    executed: Executed | None = None


async def tokens_of(request: ChatRequest | CompletionRequest, backbone: Backbone, prompts: Prompts) -> tuple[int, ...]:
    """The prompt. Raises WindowExceeded, naming the field, when no answer would fit behind it."""
    window = backbone.prepared.window
    if isinstance(request, ChatRequest):
        messages = [{"role": _role(one.role), "content": one.content} for one in request.messages]
        field, texts = "messages", [one["content"] for one in messages]
        tokenise = partial(prompts.chat, messages)
    else:
        field, texts = "prompt", [request.prompt]
        tokenise = partial(prompts.plain, request.prompt)
    num_tokens = sum(prompts.at_least(text) for text in texts)
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
    token_ids: tuple[int, ...],
    routed: Routed,
    request_digest: str,
    deadline: Deadline,
) -> Plan:
    """Rows for a request. Raises WindowExceeded, naming the limit, when prompt and answer cannot fit the window."""
    chat, chosen = isinstance(request, ChatRequest), routed.chosen
    window = chosen.backbone.prepared.window
    limit_field, limit = request.answer_limit
    if limit is not None and len(token_ids) + limit > window:
        raise WindowExceeded(limit_field, len(token_ids) + limit, window)
    seed = secrets.randbelow(2**53) if request.seed is None else request.seed  # 53 bits: exact in any JSON reader
    sampling = Sampling(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=min(DEFAULT_ANSWER_LEN, window - len(token_ids)) if limit is None else limit,
        stop_token_ids=chosen.backbone.prepared.eos_token_ids,
    )
    id_ = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
    rows = tuple(
        Row(
            request_id=f"{id_}-{index}",
            backbone=chosen.backbone.prepared.digest,
            token_ids=token_ids,
            adapter=chosen.adapter,
            sampling=sampling,
            seed=(seed + index) % (MAX_SEED + 1),
            deadline_unix_s=deadline.unix_s,
        )
        for index in range(request.n)
    )
    return Plan(
        id=id_,
        kind="chat" if chat else "text",
        created=int(time.time()),
        routed=routed,
        rows=rows,
        stops=tuple(request.stop),
        seed=seed,
        request_digest=request_digest,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
        deadline=deadline,
    )


async def pieces(plan: Plan, prompts: Prompts, index: int) -> AsyncGenerator[Piece]:
    """One choice's text as it comes; the last piece has `finish` and what was executed."""
    backbone, row = plan.routed.chosen.backbone, plan.rows[index]
    streamed, stops = StreamedText(prompts), StopStrings(plan.stops)
    executed: Executed | None = None
    async with aclosing(backbone.generate(row)) as chunks:
        async for chunk in chunks:
            executed = chunk.executed or executed
            text = streamed.add(chunk.token_ids)
            if chunk.finish is not None:
                text = stops.add(text + streamed.rest()) + stops.rest()
                finish = "stop" if stops.stopped else chunk.finish
                yield Piece(index=index, text=text, num_tokens=len(chunk.token_ids), finish=finish, executed=executed)
                return
            was_stopped = stops.stopped
            text = stops.add(text)
            if stops.stopped and executed is not None:
                yield Piece(index=index, text=text, num_tokens=len(chunk.token_ids), finish="stop", executed=executed)
                return
            if not was_stopped:
                yield Piece(index=index, text=text, num_tokens=len(chunk.token_ids))
    raise Unavailable(f"backbone {backbone.id}", 1.0)  # the stream ended before its last chunk


async def merged(plan: Plan, prompts: Prompts) -> AsyncGenerator[Piece]:
    """The pieces of all choices as they come. An error of one ends all."""
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
    finishes: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.texts = [[] for _ in range(self.num_choices)]
        self.finishes = [None] * self.num_choices

    def add(self, piece: Piece) -> None:
        self.num_tokens += piece.num_tokens
        self.executed = piece.executed or self.executed
        self.texts[piece.index].append(piece.text)
        self.finishes[piece.index] = piece.finish or self.finishes[piece.index]

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
        {"index": index, **_content(plan, "".join(texts)), "logprobs": None, "finish_reason": finish}
        for index, (texts, finish) in enumerate(zip(answered.texts, answered.finishes, strict=True))
    ]
    return {
        **_head(plan, streamed=False),
        "choices": choices,
        "usage": answered.usage(plan),
        "receipt": answered.receipt(plan),
    }


async def events(plan: Plan, prompts: Prompts, count: Callable[[int, int], None]) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream, up to [DONE]; the last one carries the receipt. `count` is told the tokens at the end."""
    answered = Answered(len(plan.rows))
    try:
        async with aclosing(_events(plan, prompts, answered)) as source:
            async for event in source:
                yield event
    finally:
        count(plan.prompt_len, answered.num_tokens)


async def _events(plan: Plan, prompts: Prompts, answered: Answered) -> AsyncGenerator[dict[str, Any]]:
    begun: set[int] = set()
    async with aclosing(plan.deadline.over(merged(plan, prompts), "the completion")) as source:
        async for piece in source:
            answered.add(piece)
            if plan.kind == "chat" and piece.index not in begun:
                begun.add(piece.index)
                yield _event(plan, piece.index, {"delta": {"role": "assistant", "content": ""}})
            if piece.text:
                delta = {"delta": {"content": piece.text}} if plan.kind == "chat" else {"text": piece.text}
                yield _event(plan, piece.index, delta)
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


def _event(plan: Plan, index: int, content: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
    usage = {"usage": None} if plan.include_usage else {}
    return {**_head(plan, streamed=True), "choices": [choice], **usage}


def _content(plan: Plan, text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if plan.kind == "chat" else {"text": text}


def _role(role: str) -> str:
    """OpenAI's newer name for the system's role, which chat templates do not know."""
    return "system" if role == "developer" else role
