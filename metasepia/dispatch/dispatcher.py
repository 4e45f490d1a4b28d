"""Choosing an expert from a request's text, stages `prompt` and `classifier` (Transformer-squared, arXiv:2501.06252).

`prompt`: the base model is asked which category a message is of and answers inside \\boxed{}; the paper's strategy A.
`classifier`: an expert trained for it (a *dispatch expert*) answers with a label, read from one forward; strategy B.

`other` is an answer too: the base weights then answer, and no later stage is asked. A stage that cannot tell abstains.
In the reference, "other" leaves the weights of whichever expert was loaded last. numpy and standard library only.
"""

import asyncio
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from metasepia.dispatch.centroid import Dispatched
from metasepia.errors import CorruptArtefact
from metasepia.rows import Row, Sampling
from metasepia.search.fewshot import RowBackbone

OTHER = "other"
MAX_LABELS = 64
ANSWER_LEN = 32
"""Tokens that the stage `prompt` generates at most."""
_BOXED = re.compile(r"\\?boxed\s*\{\s*(?:\\text\s*\{)?([^{}]*)\}")


@runtime_checkable
class Tokens(Protocol):
    """Text to tokens and back, as the backbone's chat template wants it; `serve.models.prompts.Prompts` is one."""

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]: ...
    def continuation(self, text: str) -> tuple[int, ...]: ...
    def text(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Described:
    """An expert that can be chosen."""

    digest: str
    name: str
    about: str
    """What it is for, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Dispatcher:
    """A dispatch expert, as its card tells."""

    digest: str
    prompt: str
    """Holds `{text}` where the message goes."""
    labels: Mapping[str, str | None]
    """The answers it gives, each with the expert's name that it means; None: no expert, the base weights."""

    @classmethod
    def of_card(cls, card: Mapping[str, Any], digest: str, name: str = "the expert") -> "Dispatcher | None":
        """None for an expert that does not dispatch. Raises CorruptArtefact for an entry that cannot be used."""
        entry = card.get("dispatcher")
        if entry is None:
            return None
        try:
            prompt, labels = str(entry["prompt"]), dict(entry["labels"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtefact(name, f"its card's dispatcher entry cannot be read ({error!r})") from error
        if prompt.count("{text}") != 1:
            raise CorruptArtefact(name, "its card's dispatcher prompt must hold {text} once")
        names_ok = all(isinstance(one, str | None) for one in labels.values())
        if not 2 <= len(labels) <= MAX_LABELS or not all(map(str.strip, labels)) or not names_ok:
            raise CorruptArtefact(name, f"its card's dispatcher needs 2 to {MAX_LABELS} labels, each of a name or null")
        return cls(digest=digest, prompt=prompt, labels=labels)


def dispatch_messages(text: str, experts: Sequence[Described]) -> list[dict[str, str]]:
    """The dispatch prompt of the stage `prompt`: the paper's, with the experts at hand as its categories."""
    categories = "\n".join(f"- {one.name}: {one.about}" for one in experts)
    names = ", ".join([*(one.name for one in experts), OTHER])
    system = (
        "Analyze the given message and classify it into one of these categories:\n"
        f"{categories}\n- {OTHER}: anything that is none of the above.\n"
        "Do not answer the message. Answer with the category's name alone, as \\boxed{category}, "
        f"where category is one of: {names}."
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": f"Message:\n{text}\n\nCategory:"}]


def category_of(answer: str, names: Sequence[str]) -> str | None:
    """The category in the last \\boxed{} of an answer, one of `names` or `other`; None where it cannot be told."""
    boxed = _BOXED.findall(answer)
    if not boxed:
        return None
    found = re.sub(r"[^a-z0-9._-]+", " ", boxed[-1].lower()).strip(" .")
    by_name = {name.lower(): name for name in (*names, OTHER)}
    return by_name.get(found)


async def route_by_prompt(
    backbone: RowBackbone,
    text: str,
    experts: Sequence[Described],
    tokens: Tokens,
    *,
    stop_token_ids: tuple[int, ...] = (),
    window: int | None = None,
    min_margin: float = 0.0,
    **row: Any,
) -> Dispatched:
    """One short generation of the base model. The margin is the geometric mean of its tokens' probabilities.

    Abstains where the answer names no category, below `min_margin`, without experts, and where prompt and answer do
    not fit the window. `row` goes into the row (a deadline).
    """
    if not experts:
        return Dispatched(expert=None, margin=0.0, stage="prompt")
    prompt = tokens.chat(dispatch_messages(text, experts))
    if window is not None and len(prompt) + ANSWER_LEN > window:
        return Dispatched(expert=None, margin=0.0, stage="prompt")
    asked = Row(
        request_id=f"route-{uuid.uuid4().hex}",
        backbone=backbone.digest,
        token_ids=prompt,
        sampling=Sampling(temperature=0.0, max_tokens=ANSWER_LEN, stop_token_ids=stop_token_ids),
        **row,
    )
    answer: list[int] = []
    logprobs: list[float] = []
    category = None
    async with aclosing(backbone.generate(asked)) as chunks:  # pyright: ignore[reportArgumentType]
        async for chunk in chunks:
            answer += chunk.token_ids
            logprobs += chunk.logprobs
            category = category_of(tokens.text(answer), [one.name for one in experts])
            if category is not None:
                break
    margin = math.exp(math.fsum(logprobs) / len(logprobs)) if logprobs else 0.0
    if category is None or margin < min_margin:
        return Dispatched(expert=None, margin=margin if category else 0.0, stage="prompt")
    chosen = next((one.digest for one in experts if one.name == category), None)
    return Dispatched(expert=chosen, margin=margin, stage="prompt", is_other=chosen is None)


async def route_by_classifier(
    backbone: RowBackbone,
    text: str,
    dispatcher: Dispatcher,
    experts: Mapping[str, str],
    tokens: Tokens,
    *,
    stop_token_ids: tuple[int, ...] = (),
    window: int | None = None,
    min_margin: float = 0.0,
    **row: Any,
) -> Dispatched:
    """The label that the dispatch expert finds likeliest, as whole answers; their shared prompt is read once.

    `experts`: digests by name. The margin is the best label's probability above the second's, among the labels.
    Abstains below `min_margin`, where the label's expert is not there (any more), and where the prompt does not fit.
    """
    prompt = tokens.chat([{"role": "user", "content": dispatcher.prompt.replace("{text}", text)}])
    answers = {label: (*tokens.continuation(label), *stop_token_ids[:1]) for label in dispatcher.labels}
    if window is not None and len(prompt) + max(map(len, answers.values())) > window:
        return Dispatched(expert=None, margin=0.0, stage="classifier")

    async def likelihood(answer: tuple[int, ...]) -> float:
        scores = await backbone.score(
            Row(
                request_id=f"route-{uuid.uuid4().hex}",
                backbone=backbone.digest,
                token_ids=(*prompt, *answer),
                adapter=((dispatcher.digest, 1.0),),
                want="logprobs",
                score_from=len(prompt),
                prefix=prompt,
                **row,
            )
        )
        return math.fsum(scores.logprobs.tolist())

    found = dict(zip(answers, await asyncio.gather(*map(likelihood, answers.values())), strict=True))
    ranked = sorted(found, key=lambda label: (-found[label], label))
    total = math.fsum(math.exp(value - found[ranked[0]]) for value in found.values())
    margin = (1 - math.exp(found[ranked[1]] - found[ranked[0]])) / total
    name = dispatcher.labels[ranked[0]]
    if margin < min_margin or (name is not None and name not in experts):
        return Dispatched(expert=None, margin=margin, stage="classifier")
    chosen = None if name is None else experts[name]
    return Dispatched(expert=chosen, margin=margin, stage="classifier", is_other=chosen is None)
