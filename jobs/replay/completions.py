"""Chat and plain completions recomputed, token by token.

A token is the same where its score (logits over temperature, plus the noise of seed and position) is within a tolerance
of the largest: another machine rounds otherwise, and text after a near tie goes its own way.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from jobs.replay.parts import Parts, plain, tokenizer_of
from jobs.replay.report import Report
from metasepia.backbone import ReferenceBackbone
from metasepia.decoding.choices import choose, scores_of
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, Row, Sampling

LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""By the dtype that answered, as a share of the largest logit; the reference computes in float32."""
DEFAULT_ANSWER_LEN = 256
"""The door's, for a request that names no limit."""


def replay_completion(
    request: dict[str, Any],
    receipt: Mapping[str, Any],
    answered: Mapping[str, Any] | None,
    parts: Parts,
    report: Report,
) -> None:
    # A weight is a number, or one number a layer.
    adapter: Adapter = tuple(
        (digest, tuple(weight) if isinstance(weight, list) else float(weight)) for digest, weight in receipt["adapter"]
    )
    if request["model"] != "auto":
        wanted = "an expert" if ":" in request["model"] else "the base"
        report.check("adapter", wanted, "an expert" if adapter else "the base")
    prepared = parts.backbone(receipt["backbone"])
    reference = parts.reference(receipt["backbone"], adapter)
    report.check("backbone", receipt["backbone"], prepared.digest)
    for digest, expert in parts.experts(adapter).items():
        report.check("expert", digest, expert.digest)
    if adapter and reference.factors is not None:
        report.check("factors", receipt["factors"], reference.factors.digest)
    prompts = _prompts(request, prepared)
    echoes = _echoes(request, prepared)
    limits = [request[name] for name in ("max_tokens", "max_completion_tokens") if request.get(name) is not None]
    stops = request.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    told = _choices(answered) if answered is not None else {}
    if answered is not None and answered.get("usage"):
        report.check("prompt tokens", answered["usage"]["prompt_tokens"], sum(map(len, prompts)))
    tolerance = LOGIT_TOLERANCE[receipt["dtype"]]
    report.answered, report.recomputed = {}, {}
    num_choices = _or(request.get("n"), 1)
    for index in range(len(prompts) * num_choices):
        prompt, choice = prompts[index // num_choices], told.get(index)
        if choice is not None and echoes:
            echo = echoes[index // num_choices]
            report.check(f"echo {index}", "the prompt", "the same", choice.text.startswith(echo))
            choice = Choice(choice.text.removeprefix(echo), choice.finish)
        if limits and min(limits) == 0:  # the prompt alone
            report.recomputed[index] = ""
            continue
        sampling = Sampling(
            temperature=float(_or(request.get("temperature"), 1.0)),
            top_p=float(_or(request.get("top_p"), 1.0)),
            max_tokens=min(limits) if limits else min(DEFAULT_ANSWER_LEN, prepared.window - len(prompt)),
            stop_token_ids=prepared.eos_token_ids,
        )
        row = Row(
            request_id=str(index),
            backbone=prepared.digest,
            token_ids=prompt,
            adapter=adapter,
            sampling=sampling,
            seed=(receipt["seed"] + index) % 2**63,
        )
        follows = choice is not None and not stops and _follows(choice, row, reference, prepared)
        text = choice.text if choice is not None and follows else _generated(row, reference, prepared, stops)
        report.recomputed[index] = text
        if choice is not None:
            report.answered[index] = choice.text
            if text == choice.text:
                report.check(f"choice {index}", "a text", "the same", True)
            else:
                gap = _gap(choice, row, reference, prepared)
                report.check(f"choice {index}", f"tokens within {tolerance:g}", f"{gap:.2g}", gap <= tolerance)


@dataclass(frozen=True)
class Choice:
    text: str
    finish: str | None


def _choices(answered: Mapping[str, Any]) -> dict[int, Choice]:
    return {
        one["index"]: Choice(one["message"]["content"] if "message" in one else one["text"], one["finish_reason"])
        for one in answered["choices"]
    }


def _follows(choice: Choice, row: Row, reference: ReferenceBackbone, prepared: PreparedBackbone) -> bool:
    """Whether the reference would choose just these tokens: one forward over all of them says so, without a step each.

    False also where the text does not tell its tokens, or how it ended.
    """
    tokens = _tokens(choice, prepared)
    chosen = _chosen(row, tokens, reference)
    if tuple(chosen[:-1]) != tokens:
        return False
    if choice.finish == "length":
        return len(tokens) == row.sampling.max_tokens
    return chosen[-1] in row.sampling.stop_token_ids


def _chosen(row: Row, tokens: tuple[int, ...], reference: ReferenceBackbone) -> list[int]:
    """What the reference chooses after each of the tokens, and before the first."""
    logits = reference.logits((*row.token_ids, *tokens), row.adapter)[len(row.token_ids) - 1 :]
    positions = [len(row.token_ids) + i for i in range(len(logits))]
    many = [row.sampling] * len(logits), [row.seed] * len(logits)
    return [one.token_id for one in choose(logits, *many, positions)]


def _gap(choice: Choice, row: Row, reference: ReferenceBackbone, prepared: PreparedBackbone) -> float:
    """By how much the told tokens' scores fall short of the largest, at worst, as a share of the largest logit."""
    tokens = _tokens(choice, prepared)
    logits = reference.logits((*row.token_ids, *tokens), row.adapter)[len(row.token_ids) - 1 :]
    worst = 0.0
    for i, token in enumerate(tokens):
        scores = scores_of(logits[i], row.sampling, row.seed, len(row.token_ids) + i)
        short_of = float(scores.max() - scores[token]) * (row.sampling.temperature or 1.0)
        worst = max(worst, short_of / float(logits[i].abs().max()))
    return worst


def _generated(row: Row, reference: ReferenceBackbone, prepared: PreparedBackbone, stops: Sequence[str]) -> str:
    """The reference's own answer, cut at the first stop string."""

    async def collect() -> str:
        tokens: list[int] = []
        tokenizer = tokenizer_of(prepared)
        async for chunk in reference.generate(row):
            tokens += chunk.token_ids
            if any(stop in tokenizer.decode(tokens, skip_special_tokens=True) for stop in stops):
                break
        return tokenizer.decode(tokens, skip_special_tokens=True)

    text = asyncio.run(collect())
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _given(request: Mapping[str, Any]) -> list[Any]:
    """The prompts of a plain completion: each a text or token ids."""
    prompt = request["prompt"]
    return [prompt] if isinstance(prompt, str) or all(isinstance(one, int) for one in prompt) else prompt


def _echoes(request: Mapping[str, Any], prepared: PreparedBackbone) -> list[str]:
    """What stands before the answers to each prompt; empty: nothing."""
    if not request.get("echo"):
        return []
    tokenizer = tokenizer_of(prepared)
    return [one if isinstance(one, str) else tokenizer.decode(one, skip_special_tokens=True) for one in _given(request)]


def _prompts(request: dict[str, Any], prepared: PreparedBackbone) -> list[tuple[int, ...]]:
    if "prompt" in request:
        return [plain(prepared, one) if isinstance(one, str) else tuple(one) for one in _given(request)]
    messages = [
        {"role": "system" if one["role"] == "developer" else one["role"], "content": _joined(one["content"])}
        for one in request["messages"]
    ]
    template = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    text = template.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return [tuple(tokenizer_of(prepared).encode(str(text), add_special_tokens=False).ids)]


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _tokens(choice: Choice, prepared: PreparedBackbone) -> tuple[int, ...]:
    return tuple(tokenizer_of(prepared).encode(choice.text, add_special_tokens=False).ids)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
