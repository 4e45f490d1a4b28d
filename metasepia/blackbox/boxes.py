"""What a black box is, and how one tells how far it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from metasepia.blackbox.meter import Estimate
from metasepia.embedding.answers import MAX_EXAMPLES, Answers
from metasepia.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a black box is with the texts it was asked for."""

    name: str
    done: int
    """Texts answered whole, those that came out of the cache among them."""
    total: int
    """Different texts, with those that a calibration asks for."""
    cached: int = 0
    """Texts that were answered before this run."""
    way: str = ""
    """How labels are scored; empty until it is known."""
    requests: int = 0
    """Answered in this run."""
    retries: int = 0
    prompt_tokens: int = 0
    """Spent in this run; as the endpoint counts where that is to be believed."""
    completion_tokens: int = 0
    cost: float | None = None
    """Of this run; None: no prices are known."""
    waiting: str = ""
    """What it waits for, in words; empty while it goes on."""
    estimate: Estimate | None = None
    """Of what was to be asked when the run began."""

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.done}/{self.total} texts"]
        if self.cached:
            parts.append(f"{self.cached} from the cache")
        if self.way:
            parts.append(f"by {self.way}")
        if self.requests:
            parts.append(f"{self.requests} requests, {self.prompt_tokens}+{self.completion_tokens} tokens")
        if self.cost is not None:
            parts.append(f"cost {self.cost:.4f}")
        if self.waiting:
            parts.append(f"waiting: {self.waiting}")
        return ", ".join(parts)


Told = Callable[[Progress], None]


@runtime_checkable
class BlackBox(Protocol):
    """Whatever answers texts: no gradients, no weights, no states."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Of what is asked and how; equal digests ask the same."""
        ...

    async def answer(self, texts: Sequence[str], *, told: Told | None = None) -> Answers:
        """What it says of each text, a text that is there twice asked once.

        Raises InvalidRequest for texts that nothing can be told by, before anything is asked.
        """
        ...

    def source(self) -> Mapping[str, Any]:
        """Plain values for `TaskEmbedding.source`: what was asked, how, and what stood out."""
        ...


def check_texts(texts: Sequence[str]) -> None:
    """Raises InvalidRequest for texts that `Answers` would refuse, before they are paid for."""
    if isinstance(texts, str):
        raise InvalidRequest("texts", "must be a list of texts, not one text")
    if len(texts) < 2:
        raise InvalidRequest("texts", f"a task is told by two texts or more, got {len(texts)}")
    if len(texts) > MAX_EXAMPLES:
        raise InvalidRequest("texts", f"{len(texts)} are more than the {MAX_EXAMPLES} that an embedding is made of")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequest(f"texts[{i}]", "it is empty, or no text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"texts[{i}]", "it holds half of a surrogate pair, which no UTF-8 can spell") from None
