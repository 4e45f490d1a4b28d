"""The forms in which an endpoint is asked of a text, and how its answers are read and checked.

A text has *parts* (a label to be scored, a sample, the one reply), each answered and kept by itself, so that a run that
ends goes on with what is missing. A request asks for one part or several.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from metasepia.blackbox.prompts import LabelMatcher, Prompt
from metasepia.blackbox.scores import Scores, begins, of_counts, of_first_tokens, of_log_probabilities
from metasepia.blackbox.settings import EndpointSettings
from metasepia.blackbox.shapes import NotServed, WrongShape, choices_of, log_probability, reply_of

MAX_CHOICES = 16
"""Samples asked for in one request."""
TOP = 20
"""Likeliest first tokens asked for: what most endpoints give at most."""
FEWER_TOP = 5
AMBIGUOUS = 0.01
"""Mass of first tokens that begin several verbalisers, above which first tokens are no way to score them."""
BARELY_NAMED = 0.01


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    route: str
    body: Mapping[str, Any]
    parts: tuple[int, ...]
    """Which of a text's parts it asks for."""
    prompt_texts: tuple[str, ...]
    """What it sends, for counting tokens."""
    max_completion_tokens: int


@dataclass
class Abilities:
    """What was found out about an endpoint; kept with its answers."""

    batched: bool = True
    """/completions takes a list of prompts."""
    several: bool = True
    """`n` gives several choices."""
    top: int = TOP
    tokens_field: str = "max_tokens"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A text's answers put together."""

    scores: Scores | None
    replies: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Plain values for people: what share of replies named a label, and so on."""


@runtime_checkable
class Form(Protocol):
    """One form of asking."""

    name: str
    abilities: Abilities

    @property
    def num_parts(self) -> int: ...

    def params(self) -> Mapping[str, Any]:
        """What the answer to a part depends on, beyond endpoint, model, prompt and text."""
        ...

    def asks(self, text: str, missing: Sequence[int]) -> list[Ask]: ...

    def read(self, text: str, ask: Ask, body: Mapping[str, Any]) -> dict[int, Any]:
        """The parts that a response answers, as plain JSON. Raises WrongShape."""
        ...

    def fit(self, text: str, parts: Mapping[int, Any]) -> str | None:
        """Why this form does not suit the endpoint, judging by the first text; None: it does."""
        ...

    def outcome(self, texts: Sequence[Mapping[int, Any]]) -> Outcome: ...


class _Form:
    def __init__(self, settings: EndpointSettings, prompt: Prompt, abilities: Abilities) -> None:
        self.settings, self.prompt, self.abilities = settings, prompt, abilities
        self.words = prompt.verbalisers

    @property
    def chats(self) -> bool:
        return self.settings.api == "chat"

    @property
    def route(self) -> str:
        return "chat/completions" if self.chats else "completions"

    def fit(self, text: str, parts: Mapping[int, Any]) -> str | None:
        return None

    def _ask(self, text: str, parts: Sequence[int], fields: Mapping[str, Any], *, max_tokens: int, n: int = 1) -> Ask:
        if self.chats:
            messages = self.prompt.messages(text)
            start = {"messages": messages}
            sent = "".join(one["content"] for one in messages)
        else:
            sent = self.prompt.document(text)
            start = {"prompt": sent}
        body = {"model": self.settings.model, **start, self.abilities.tokens_field: max_tokens}
        return Ask(
            route=self.route,
            body={**body, **fields, **self.settings.extra},
            parts=tuple(parts),
            prompt_texts=(sent,),
            max_completion_tokens=max_tokens * n,
        )


class Echo(_Form):
    """A part for each label: prompt and verbaliser sent to be echoed, with the log-probabilities of their tokens."""

    name = "echo"

    @property
    def num_parts(self) -> int:
        return len(self.words)

    def params(self) -> Mapping[str, Any]:
        return {}

    def asks(self, text: str, missing: Sequence[int]) -> list[Ask]:
        groups = [list(missing)] if self.abilities.batched else [[one] for one in missing]
        made: list[Ask] = []
        for group in groups:
            sent = [self._whole(text, part)[1] for part in group]
            body = {
                "model": self.settings.model,
                "prompt": sent if self.abilities.batched else sent[0],
                "max_tokens": 1,  # 0 is refused by some, and means "no limit" to others
                "temperature": 0,
                "echo": True,
                "logprobs": 1,
                **self.settings.extra,
            }
            made.append(
                Ask(
                    route="completions",
                    body=body,
                    parts=tuple(group),
                    prompt_texts=tuple(sent),
                    max_completion_tokens=len(group),
                )
            )
        return made

    def _whole(self, text: str, part: int) -> tuple[str, str]:
        """The prompt, and prompt and verbaliser. Spaces between them go with the verbaliser, as in its tokens."""
        document = self.prompt.document(text)
        context = document.rstrip(" ")
        return context, document + self.words[part]

    def read(self, text: str, ask: Ask, body: Mapping[str, Any]) -> dict[int, Any]:
        choices = choices_of(body, len(ask.parts))
        return {
            part: self._echoed(choice, *self._whole(text, part))
            for part, choice in zip(ask.parts, choices, strict=True)
        }

    def _echoed(self, choice: Mapping[str, Any], context: str, whole: str) -> dict[str, Any]:
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict):
            raise NotServed("it has no log-probabilities")
        tokens, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
            raise WrongShape("choices[].logprobs has no tokens with as many token_logprobs")
        if not all(isinstance(token, str) for token in tokens):
            raise WrongShape("choices[].logprobs.tokens are not texts")
        begin, end = _place("".join(tokens), context, whole)
        at, sums = 0, []
        for token, value in zip(tokens, values, strict=True):
            if at < end and at + len(token) > begin:
                sums.append(log_probability(value))
            at += len(token)
        return {"logprob": math.fsum(sums), "tokens": len(sums)}

    def outcome(self, texts: Sequence[Mapping[int, Any]]) -> Outcome:
        labels = range(len(self.words))
        sums = np.array([[parts[i]["logprob"] for i in labels] for parts in texts])
        lengths = np.array([[parts[i]["tokens"] for i in labels] for parts in texts])
        return Outcome(scores=of_log_probabilities(sums, lengths, self.words, self.settings.normalise))


def _place(echoed: str, context: str, whole: str) -> tuple[int, int]:
    """Where the verbaliser, `whole` after `context`, lies in the text of the tokens: [begin, end)."""
    start = echoed.find(whole)
    if start >= 0:
        return start + len(context), start + len(whole)
    # Tokens that hold a part of a character are spelt in various ways. The end of the prompt is enough to go by.
    before = re.search(r"[\x00-\x7f]{0,40}$", context)
    tail = (before[0] if before else "") + whole[len(context) :]
    start = echoed.rfind(tail)
    if start < 0:
        raise NotServed("the tokens are not those of an echo of the prompt")
    return start + len(tail) - (len(whole) - len(context)), start + len(tail)


class PromptLogprobs(_Form):
    """A part for each label: prompt and verbaliser sent, and the log-probabilities of the prompt's tokens asked for.

    A server of vLLM's kind gives them with token ids, chats too. What labels share counts for none of them, so the
    tokens after the longest beginning that all have in common are scored.
    """

    name = "prompt logprobs"

    @property
    def num_parts(self) -> int:
        return len(self.words)

    def params(self) -> Mapping[str, Any]:
        return {}

    def asks(self, text: str, missing: Sequence[int]) -> list[Ask]:
        return [self._one(text, part) for part in missing]

    def _one(self, text: str, part: int) -> Ask:
        fields: dict[str, Any] = {"prompt_logprobs": 0, "temperature": 0}
        ask = self._ask(text, [part], fields, max_tokens=1)
        body = dict(ask.body)
        if self.chats:
            answer = {"role": "assistant", "content": self.words[part]}
            body["messages"] = [*body["messages"], answer]
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        else:
            body["prompt"] += self.words[part]
        return Ask(
            route=ask.route,
            body=body,
            parts=(part,),
            prompt_texts=(ask.prompt_texts[0] + self.words[part],),
            max_completion_tokens=1,
        )

    def read(self, text: str, ask: Ask, body: Mapping[str, Any]) -> dict[int, Any]:
        found = choices_of(body, 1)[0].get("prompt_logprobs", body.get("prompt_logprobs"))
        if not isinstance(found, list) or len(found) < 2:
            raise NotServed("it has no prompt_logprobs")
        (part,) = ask.parts
        # A verbaliser has at most as many tokens as bytes.
        tail_len = len(self.words[part].encode()) + 8
        tail: list[tuple[str, float]] = []
        for entry in found[max(1, len(found) - tail_len) :]:
            if not isinstance(entry, dict) or len(entry) != 1:
                raise WrongShape("prompt_logprobs does not hold one token a place")
            ((token, value),) = entry.items()
            tail.append((str(token), log_probability(value.get("logprob") if isinstance(value, dict) else value)))
        return {part: {"length": len(found), "tail": tail}}

    def outcome(self, texts: Sequence[Mapping[int, Any]]) -> Outcome:
        sums, lengths = np.zeros((len(texts), len(self.words))), np.zeros((len(texts), len(self.words)))
        for row, parts in enumerate(texts):
            for i, scored in enumerate(_after_common([parts[i] for i in range(len(self.words))])):
                sums[row, i], lengths[row, i] = math.fsum(scored), len(scored)
        return Outcome(scores=of_log_probabilities(sums, lengths, self.words, self.settings.normalise))


def _after_common(parts: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The log-probabilities of each sequence's tokens after those that all begin with."""
    first = max(one["length"] - len(one["tail"]) for one in parts)
    tails = [one["tail"][first - one["length"] + len(one["tail"]) :] for one in parts]
    shared = 0
    for places in zip(*tails, strict=False):
        if len({token for token, _ in places}) > 1:
            break
        shared += 1
    return [[logprob for _, logprob in tail[shared:]] for tail in tails]


class FirstToken(_Form):
    """One part: the likeliest first tokens of the answer."""

    name = "first token"

    @property
    def num_parts(self) -> int:
        return 1

    def params(self) -> Mapping[str, Any]:
        return {"top": self.abilities.top}

    def asks(self, text: str, missing: Sequence[int]) -> list[Ask]:
        top = self.abilities.top
        fields = {"logprobs": True, "top_logprobs": top} if self.chats else {"logprobs": min(top, FEWER_TOP)}
        # At temperature 0 some servers give the log-probabilities of what is then certain.
        return [self._ask(text, [0], {"temperature": 1.0, **fields}, max_tokens=1)] if missing else []

    def read(self, text: str, ask: Ask, body: Mapping[str, Any]) -> dict[int, Any]:
        logprobs = choices_of(body, 1)[0].get("logprobs")
        top: object = None
        if isinstance(logprobs, dict) and self.chats:
            content = logprobs.get("content")
            first = content[0] if isinstance(content, list) and content else None
            top = first.get("top_logprobs") if isinstance(first, dict) else None
        elif isinstance(logprobs, dict):
            tops = logprobs.get("top_logprobs")
            first = tops[0] if isinstance(tops, list) and tops else None
            top = (
                [{"token": token, "logprob": value} for token, value in first.items()]
                if isinstance(first, dict)
                else None
            )
        if not isinstance(top, list) or not top:
            raise NotServed("it has no likeliest tokens")
        pairs: list[tuple[str, float]] = []
        for one in top:
            if not isinstance(one, dict) or not isinstance(one.get("token"), str):
                raise WrongShape("choices[0].logprobs holds a likeliest token that is no text")
            pairs.append((one["token"], log_probability(one.get("logprob"))))
        if math.fsum(math.exp(value) for _, value in pairs) > 1 + 0.01:
            raise WrongShape("the likeliest tokens together are likelier than 1")
        return {0: pairs}

    def fit(self, text: str, parts: Mapping[int, Any]) -> str | None:
        words = [one.strip().casefold() for one in self.words]
        masses = {1: 0.0, 2: 0.0}
        for token, logprob in parts[0]:
            begun = len(begins(token, words))
            if begun:
                masses[min(begun, 2)] += math.exp(logprob)
        if masses[2] > AMBIGUOUS:
            return f"first tokens that begin several labels have {masses[2]:.1%} of the mass"
        if masses[1] < BARELY_NAMED:
            return f"first tokens that begin a label have {masses[1]:.2%} of the mass"
        return None

    def outcome(self, texts: Sequence[Mapping[int, Any]]) -> Outcome:
        tops = [[(token, logprob) for token, logprob in parts[0]] for parts in texts]
        scores, named = of_first_tokens(tops, self.words)
        likeliest = [max(parts[0], key=lambda pair: pair[1])[0][:80] for parts in texts[:3]]
        return Outcome(scores=scores, notes={"named": round(named, 6), "likeliest": likeliest})


class Samples(_Form):
    """A part for each sample: replies drawn by seeds, matched to labels."""

    name = "sampling"

    @property
    def num_parts(self) -> int:
        return self.settings.num_samples

    def params(self) -> Mapping[str, Any]:
        return {"temperature": self.settings.temperature, "seed": self.settings.seed}

    def asks(self, text: str, missing: Sequence[int]) -> list[Ask]:
        most = MAX_CHOICES if self.abilities.several else 1
        groups: list[list[int]] = []
        for part in missing:
            # Choice i of a request with seed s is what seed s + i gives: a request's parts follow each other.
            if groups and len(groups[-1]) < most and groups[-1][-1] + 1 == part:
                groups[-1].append(part)
            else:
                groups.append([part])
        made: list[Ask] = []
        for group in groups:
            fields: dict[str, Any] = {"temperature": self.settings.temperature}
            if len(group) > 1:
                fields["n"] = len(group)
            if self.settings.seed is not None:
                fields["seed"] = self.settings.seed + group[0]
            made.append(self._ask(text, group, fields, max_tokens=self.prompt.max_tokens, n=len(group)))
        return made

    def read(self, text: str, ask: Ask, body: Mapping[str, Any]) -> dict[int, Any]:
        choices = choices_of(body, None)
        if len(choices) < len(ask.parts):
            self.abilities.several = False  # what came is kept, the rest is asked for one by one
        return {part: reply_of(choice) for part, choice in zip(ask.parts, choices, strict=False)}

    def outcome(self, texts: Sequence[Mapping[int, Any]]) -> Outcome:
        matcher = LabelMatcher(self.words)
        counts = np.zeros((len(texts), len(self.words)))
        unmatched: list[str] = []
        for row, parts in enumerate(texts):
            for reply in parts.values():
                label = matcher.match(reply)
                if label is None:
                    unmatched.append(reply)
                else:
                    counts[row, label] += 1
        total = sum(len(parts) for parts in texts)
        notes = {
            "samples": total,
            "unmatched": len(unmatched),
            "unmatched replies": [one[:80] for one in unmatched[:3]],
        }
        return Outcome(scores=of_counts(counts), notes=notes)


class Replies(_Form):
    """One part: the greedy reply, for open answers."""

    name = "replies"

    @property
    def num_parts(self) -> int:
        return 1

    def params(self) -> Mapping[str, Any]:
        return {"seed": self.settings.seed}

    def asks(self, text: str, missing: Sequence[int]) -> list[Ask]:
        fields: dict[str, Any] = {"temperature": 0}
        if self.settings.seed is not None:
            fields["seed"] = self.settings.seed
        return [self._ask(text, [0], fields, max_tokens=self.prompt.max_tokens)] if missing else []

    def read(self, text: str, ask: Ask, body: Mapping[str, Any]) -> dict[int, Any]:
        return {0: reply_of(choices_of(body, 1)[0])}

    def outcome(self, texts: Sequence[Mapping[int, Any]]) -> Outcome:
        replies = tuple(parts[0] for parts in texts)
        return Outcome(scores=None, replies=replies, notes={"empty": sum(not one.strip() for one in replies)})


def forms(settings: EndpointSettings, prompt: Prompt, abilities: Abilities) -> list[Form]:
    """The forms that may serve, best first; one where the settings name it, or replies are open."""
    if prompt.is_open:
        return [Replies(settings, prompt, abilities)]
    classes = {one.name: one for one in (Echo, PromptLogprobs, FirstToken, Samples)}
    if settings.way != "auto":
        return [classes[settings.way](settings, prompt, abilities)]
    firsts = [one.strip().casefold()[:1] for one in prompt.verbalisers]
    differ = len(set(firsts)) == len(firsts)
    if settings.api == "completions":
        order = ["echo", "prompt logprobs", *(["first token"] if differ else [])]
    else:  # one request a text before one a label, where it tells labels apart
        order = ["first token", "prompt logprobs"] if differ else ["prompt logprobs", "first token"]
    return [classes[name](settings, prompt, abilities) for name in (*order, "sampling")]
