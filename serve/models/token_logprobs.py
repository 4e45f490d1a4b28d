"""Log-probabilities of tokens as OpenAI's two shapes tell them, and as the text that they make leaves.

A token is told once the first of its text has left: what a stop string cuts off is told neither as text nor as tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metasepia.rows import Scores, TokenChunk
from serve.models.prompts import Prompts


@dataclass(frozen=True)
class ToldToken:
    """A token and the likeliest ones at its place."""

    token_id: int
    logprob: float | None
    """Natural; None for the first of a prompt, which nothing stands before."""
    top: tuple[tuple[int, float], ...]
    offset: int
    """Characters of text before it."""


class HeldTokens:
    """Tokens of one choice whose text has not left yet."""

    def __init__(self) -> None:
        self._held: list[ToldToken] = []
        self._read = self._left = 0

    def add(self, chunk: TokenChunk, text: str) -> None:
        """`text`: what the chunk's tokens made certain, before stop strings are looked for."""
        top = chunk.top or ((),) * len(chunk.token_ids)
        for token_id, logprob, likeliest in zip(chunk.token_ids, chunk.logprobs, top, strict=True):
            self._held.append(ToldToken(token_id, logprob, likeliest, self._read))
        self._read += len(text)

    def release(self, text: str, *, all_of_them: bool) -> tuple[ToldToken, ...]:
        """Those that begin before the end of what has left, `text` the last of it."""
        self._left += len(text)
        leaving = [one for one in self._held if all_of_them or one.offset < self._left]
        self._held = self._held[len(leaving) :]
        return tuple(leaving)


def of_prompt(token_ids: Sequence[int], scores: Scores, prompts: Prompts) -> tuple[ToldToken, ...]:
    """A prompt's own tokens, scored from the second on."""
    told = [ToldToken(token_ids[0], None, (), 0)]
    offset = len(prompts.text(token_ids[:1]))
    for i, token_id in enumerate(token_ids[1:]):
        top: tuple[tuple[int, float], ...] = ()
        if scores.top_ids is not None and scores.top_logprobs is not None:
            top = tuple(zip(scores.top_ids[i].tolist(), scores.top_logprobs[i].tolist(), strict=True))
        told.append(ToldToken(token_id, float(scores.logprobs[i]), top, offset))
        offset += len(prompts.text((token_id,)))
    return tuple(told)


def in_chat(told: Sequence[ToldToken], prompts: Prompts) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = prompts.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*likeliest) for likeliest in one.top]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def in_text(told: Sequence[ToldToken], prompts: Prompts) -> dict[str, Any]:
    """`choices[].logprobs` of a plain completion.

    Beside each token stand the likeliest ones and, as OpenAI does, itself where it is not among them.
    """

    def spelt(token_id: int) -> str:
        raw = prompts.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:  # a part of a character: spelt so that two of them stay two
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    tops: list[dict[str, float] | None] = []
    for one in told:
        if one.logprob is None:
            tops.append(None)
            continue
        beside = {spelt(token_id): logprob for token_id, logprob in one.top}
        tops.append(beside | {spelt(one.token_id): one.logprob} if one.top else {})
    return {
        "tokens": [spelt(one.token_id) for one in told],
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": tops,
        "text_offset": [one.offset for one in told],
    }
