"""How labelled texts become the vectors of a sequence: the embedding protocols of TART (arXiv:2306.07536). No torch.

`stream`: each text is embedded alone, mean over its tokens. No label and no other example enters a vector, so a query's
vector is the same in every context and may be cached by its text.

`vanilla`: one prompt holds all k examples, "Sentence: {x}\\nLabel: {label}\\n"; an example's vector is the mean over
the tokens of its own text in that prompt.

`loo`: an example's vector comes from a prompt of the other k - 1, in their order, with the example itself last and
without its label: every example then sees as many others as every other.

A query is read after all k examples, in both. Where we differ from the reference code:

- An example is tokenised as two pieces, "Sentence: {x}" and "\\nLabel: {label}\\n", whatever its neighbours. Where a
  text ends its span is then exact by construction, even with tokenizers that merge across that border; where it begins
  it comes from the tokenizer's own offsets. Nothing looks for a label's tokens, so a text may contain a label's word.
  And prompts share tokens exactly as far as they share examples, so keys and values of a shared prefix can be reused.
- Examples and queries pool the same part: the tokens of the text, of "Sentence: {x}", read in the same way. The
  reference pools "\\nLabel:" too, for examples only.
- The examples are put into one order by their content and shuffled by the seed: classes do not come in blocks, and the
  same examples in another order of the caller's give the same prompts.
- A prompt beyond the window is refused (WindowExceeded), never cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from metasepia.errors import InvalidRequest, WindowExceeded

Protocol = Literal["stream", "vanilla", "loo"]
STREAM: Protocol = "stream"
VANILLA: Protocol = "vanilla"
LOO: Protocol = "loo"
PROTOCOLS: tuple[Protocol, ...] = (STREAM, VANILLA, LOO)

WAY_OUT = 'give fewer or shorter examples, or use the protocol "stream", which reads each text alone'


@dataclass(frozen=True, kw_only=True)
class Template:
    """How an example is written in a prompt: text first, label after."""

    text: str = "Sentence: {x}\nLabel: {label}\n"
    """Holds {x} once and, after it, {label} once."""

    def __post_init__(self) -> None:
        x, label = self.text.find("{x}"), self.text.find("{label}")
        if self.text.count("{x}") != 1 or self.text.count("{label}") != 1 or not 0 <= x < label:
            raise InvalidRequest("template", f"must hold {{x}} once and then {{label}} once, got {self.text!r}")

    @property
    def before(self) -> str:
        return self.text[: self.text.index("{x}")]

    def rest(self, label: str) -> str:
        """What follows the text of an example: its label, and what stands around it."""
        between, after = self.text[self.text.index("{x}") + len("{x}") :].split("{label}")
        return between + label + after


@dataclass(frozen=True)
class Prompt:
    """Tokens to read, and which of them make the vector."""

    token_ids: tuple[int, ...]
    span: tuple[int, int]
    """The tokens [begin, end) of the text that the prompt is about."""
    shared: int
    """Its first tokens that are also the first of `Demonstrations.token_ids`. At most the span's begin."""


class PromptTokenizer:
    """One backbone's tokenizer, as the pieces of prompts need it."""

    def __init__(self, tokenizer: Tokenizer, window: int, *, template: Template | None = None) -> None:
        """`window`: tokens of the longest prompt that the backbone reads."""
        self.window, self.template = window, template or Template()
        # A copy of our own: a text that spells a special token is text here, and nobody else's setting changes.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        encoding = tokenizer.encode("a", add_special_tokens=True)
        first = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        self.begin: tuple[int, ...] = tuple(encoding.ids[:first])
        """Special tokens that the tokenizer puts before a text; those behind it would end the prompt: left out."""
        self._tokenizer.encode_special_tokens = True

    def head(self, text: str, param: str) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The tokens of "Sentence: {x}", and the span of those that hold a character of x.

        Raises InvalidRequest naming `param` for a text without any.
        """
        before = len(self.template.before)
        encoding = self._tokenizer.encode(self.template.before + text, add_special_tokens=False)
        held = [i for i, (begin, end) in enumerate(encoding.offsets) if end > max(begin, before)]
        if not held:
            raise InvalidRequest(param, "the text has no tokens")
        return tuple(encoding.ids), (held[0], held[-1] + 1)

    def rest(self, label: str) -> tuple[int, ...]:
        """The tokens of "\\nLabel: {label}\\n"."""
        return tuple(self._tokenizer.encode(self.template.rest(label), add_special_tokens=False).ids)

    def alone(self, text: str, param: str) -> Prompt:
        """A text by itself, without template: `stream`. Raises InvalidRequest and WindowExceeded naming `param`."""
        token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if not token_ids:
            raise InvalidRequest(param, "the text has no tokens")
        begin = len(self.begin)
        prompt = Prompt((*self.begin, *token_ids), (0, begin + len(token_ids)), 0)
        if len(prompt.token_ids) > self.window:
            raise WindowExceeded(param, len(prompt.token_ids), self.window)
        return prompt


class Demonstrations:
    """k labelled examples in the order of their prompt. Examples are named by their place in the caller's list."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        seed: int = 0,
        words: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`words` gives the words that a class goes by in the prompt, used in turn; a class that it lacks goes by its
        own name.

        Raises InvalidRequest for no examples, labels that do not match the texts, a class without words, a negative
        seed or a text without tokens; WindowExceeded where the k examples together do not fit.
        """
        if not texts or len(texts) != len(labels):
            raise InvalidRequest("examples", f"{len(labels)} labels for {len(texts)} texts; at least one is needed")
        if seed < 0:
            raise InvalidRequest("seed", f"must be at least 0, got {seed}")
        self._tokenizer = tokenizer
        canonical = sorted(range(len(texts)), key=lambda i: (labels[i], texts[i]))
        shuffled: list[int] = np.random.default_rng(seed).permutation(len(texts)).tolist()
        self.order = tuple(canonical[at] for at in shuffled)
        """The caller's place of each example of the prompt, first to last."""
        self._heads = {i: tokenizer.head(texts[i], f"examples[{i}].text") for i in self.order}
        named: dict[str, int] = {}
        rests: dict[int, tuple[int, ...]] = {}
        for i in self.order:
            of_class = (words or {}).get(labels[i], (labels[i],))
            if not all(of_class) or not of_class:
                raise InvalidRequest("words", f"the class {labels[i]!r} needs at least one word, none of them empty")
            turn = named[labels[i]] = named.get(labels[i], -1) + 1
            rests[i] = tokenizer.rest(of_class[turn % len(of_class)])
        self._pieces = {i: (*self._heads[i][0], *rests[i]) for i in self.order}
        self.begins: dict[int, int] = {}
        """Where in `token_ids` each example begins."""
        token_ids = list(tokenizer.begin)
        for i in self.order:
            self.begins[i] = len(token_ids)
            token_ids += self._pieces[i]
        self.token_ids = tuple(token_ids)
        """The whole prompt of k examples: what every query is read after."""
        if len(token_ids) > tokenizer.window:
            raise WindowExceeded("examples", len(token_ids), tokenizer.window, WAY_OUT)

    def __len__(self) -> int:
        return len(self.order)

    def vanilla(self, example: int) -> Prompt:
        """An example where it stands in the prompt of all k."""
        (begin, end), at = self._heads[example][1], self.begins[example]
        return Prompt(self.token_ids, (at + begin, at + end), at)

    def left_out(self, example: int) -> Prompt:
        """An example last, without its label, after all others in their order."""
        (ids, (begin, end)), shared = self._heads[example], self.begins[example]
        others = (*self.token_ids[:shared], *self.token_ids[shared + len(self._pieces[example]) :])
        return Prompt((*others, *ids), (len(others) + begin, len(others) + end), shared)

    def query(self, text: str, param: str) -> Prompt:
        """A text after all k examples.

        Raises InvalidRequest for a text without tokens and WindowExceeded, both naming `param`.
        """
        ids, (begin, end) = self._tokenizer.head(text, param)
        before, total = len(self.token_ids), len(self.token_ids) + len(ids)
        if total > self._tokenizer.window:
            raise WindowExceeded(param, total, self._tokenizer.window, WAY_OUT)
        return Prompt((*self.token_ids, *ids), (before + begin, before + end), before)
