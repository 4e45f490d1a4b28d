"""A prompt makes a model into a classifier, or into one that replies: two prompts on a model are two black boxes.

Replies are matched to labels here too, where no log-probabilities are to be had.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from metasepia.digests import digest_of
from metasepia.errors import InvalidRequest

PLACE = "{text}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is told with each text, and the words that stand for the labels."""

    template: str
    """Has {text} once, where each text goes; other braces are left alone."""
    labels: Mapping[str, str] | None = None
    """Each label's verbaliser: the words that the model would answer with. None: replies are taken as they are."""
    system: str | None = None
    """For chats."""
    max_tokens: int = 32
    """Of a reply, where replies are asked for. At least 1."""
    name: str = "prompt"
    """For people; no part of the digest."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming `prompt.<field>`."""
        if not isinstance(self.template, str) or self.template.count(PLACE) != 1:
            raise InvalidRequest("prompt.template", f"must have {PLACE} in it exactly once, where each text goes")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise InvalidRequest("prompt.max_tokens", f"must be 1 or more, got {self.max_tokens!r}")
        for field, text in (("template", self.template), ("system", self.system or "")):
            if not _is_utf8(text):
                raise InvalidRequest(f"prompt.{field}", "holds half of a surrogate pair, which no UTF-8 can spell")
        if self.labels is None:
            return
        object.__setattr__(self, "labels", dict(self.labels))
        if len(self.labels) < 2:
            raise InvalidRequest(
                "prompt.labels", f"two labels or more are needed, or none for open replies; got {len(self.labels)}"
            )
        told: dict[str, str] = {}
        for label, verbaliser in self.labels.items():
            if (
                not label
                or not isinstance(verbaliser, str)
                or not plain(verbaliser)
                or not _is_utf8(label + verbaliser)
            ):
                raise InvalidRequest(
                    "prompt.labels", f"the verbaliser of {label!r} must have a letter or a digit in it"
                )
            other = told.setdefault(plain(verbaliser), label)
            if other != label:
                raise InvalidRequest(
                    "prompt.labels",
                    f"{other!r} and {label!r} have the same verbaliser {verbaliser!r}; replies could "
                    "not tell them apart",
                )

    @property
    def is_open(self) -> bool:
        return self.labels is None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The labels, sorted."""
        return tuple(sorted(self.labels or ()))

    @cached_property
    def verbalisers(self) -> tuple[str, ...]:
        """In the order of `names`."""
        return tuple((self.labels or {})[name] for name in self.names)

    @cached_property
    def digest(self) -> str:
        fields = {
            "kind": "prompt",
            "template": self.template,
            "labels": None if self.labels is None else dict(self.labels),
            "system": self.system,
            "max_tokens": self.max_tokens,
        }
        return digest_of(fields)

    def filled(self, text: str) -> str:
        return self.template.replace(PLACE, text)

    def messages(self, text: str) -> list[dict[str, str]]:
        """As a chat: the system's message, if any, and the user's."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.filled(text)}]

    def document(self, text: str) -> str:
        """As plain text to be continued: the system's words, if any, go before it."""
        return self.filled(text) if self.system is None else f"{self.system}\n\n{self.filled(text)}"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain(text: str) -> str:
    """Letters, digits and signs within words, one space between words, case folded; what is compared of replies."""
    return " ".join(re.findall(r"[\w+#%&/'-]*\w[\w+#%&/'-]*", text.casefold()))


_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_NEGATION = re.compile(r"(?:\bnot|\bno|\bnever|n't|\bnor|\bneither)(?: an?| the)?$")


class LabelMatcher:
    """Which label a reply names.

    In order: the reply is a verbaliser; it begins with one; it holds exactly one of them as words, without "not"
    before it. Of several that fit at a place the longest counts. Thoughts before `</think>` are left out.
    """

    def __init__(self, verbalisers: Sequence[str]) -> None:
        self._words = [plain(one) for one in verbalisers]
        longest_first = sorted(self._words, key=len, reverse=True)
        self._pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")

    def match(self, reply: str) -> int | None:
        """The index of the verbaliser; None where the reply names none, or several."""
        said = plain(_THOUGHT.sub("", reply))
        if said in self._words:
            return self._words.index(said)
        found = [(match.start(), match[0]) for match in self._pattern.finditer(said)]
        if found and found[0][0] == 0:
            return self._words.index(found[0][1])
        if len({word for _, word in found}) != 1 or any(_NEGATION.search(said[:at].rstrip()) for at, _ in found):
            return None
        return self._words.index(found[0][1])
