"""Prompts as a backbone's tokens: plain text, or a chat by the checkpoint's template; and where a verbaliser begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokenizers import Tokenizer

from metasepia.blackbox.prompts import Prompt
from metasepia.errors import CorruptArtefact, InvalidRequest, NotSupported
from metasepia.models.prepared import PreparedBackbone


@runtime_checkable
class PromptTokens(Protocol):
    """A backbone's tokenizer and chat template."""

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """A conversation up to where the answer begins. Raises NotSupported without a template."""
        ...

    def plain(self, text: str) -> tuple[int, ...]:
        """With the special tokens that the tokenizer adds."""
        ...

    def continuation(self, text: str) -> tuple[int, ...]:
        """Without special tokens."""
        ...

    def text(self, token_ids: Sequence[int]) -> str: ...


class TextTokens:
    """`PromptTokens` of a prepared backbone, for programs; servers have their own, which need no transformers."""

    def __init__(self, prepared: PreparedBackbone) -> None:
        """Raises CorruptArtefact for a directory without a readable tokenizer.json."""
        self._prepared = prepared
        try:
            self._tokenizer = Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))
        except Exception as error:  # the package raises bare Exception
            raise CorruptArtefact(prepared.source, f"its tokenizer.json cannot be read ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template: Any = None

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        if self._template is None:
            from transformers import AutoTokenizer

            self._template = AutoTokenizer.from_pretrained(self._prepared.tokenizer_dir)
        if not self._template.chat_template:
            raise NotSupported(f"chat with {self._prepared.source}, which has no chat template,", "use chat = False")
        text = self._template.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self.continuation(text)

    def plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text).ids)

    def continuation(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


@dataclass(frozen=True)
class Tokenised:
    """A text in a prompt, as tokens."""

    prompt: tuple[int, ...]
    verbalisers: tuple[tuple[int, ...], ...]
    """In the order of the prompt's labels; () for open replies."""

    @property
    def num_tokens(self) -> int:
        """Of the longest row."""
        return len(self.prompt) + max(map(len, self.verbalisers), default=0)


class Tokeniser:
    """A prompt's texts to tokens, as a chat or as they are written."""

    def __init__(self, tokens: PromptTokens, prompt: Prompt, chat: bool | None) -> None:
        """`chat` None: where the checkpoint has a template.

        Raises NotSupported for a chat without a template, InvalidRequest for verbalisers of the same tokens.
        """
        self._tokens, self._prompt = tokens, prompt
        try:
            tokens.chat([{"role": "user", "content": "a"}])
            self.chat = chat is not False
        except NotSupported:
            if chat:
                raise
            self.chat = False
        tried = self("text")
        seen: dict[tuple[int, ...], str] = {}
        for label, ids in zip(prompt.names, tried.verbalisers, strict=True):
            other = seen.setdefault(ids, label)
            if other != label:
                raise InvalidRequest("prompt.labels", f"the verbalisers of {other!r} and {label!r} are the same tokens")
            if not ids:
                raise InvalidRequest("prompt.labels", f"the verbaliser of {label!r} has no tokens")

    def __call__(self, text: str) -> Tokenised:
        prompt = self._prompt
        if self.chat:
            verbalisers = tuple(self._tokens.continuation(one) for one in prompt.verbalisers)
            return Tokenised(self._tokens.chat(prompt.messages(text)), verbalisers)
        document = prompt.document(text)
        if prompt.is_open:
            return Tokenised(self._tokens.plain(document), ())
        # Spaces go with the word after them, as in the tokens of running text.
        context = document.rstrip(" ")
        before = self._tokens.plain(context)
        words = [document[len(context) :] + one for one in prompt.verbalisers]
        return Tokenised(before, tuple(self._after(before, context, word) for word in words))

    def _after(self, before: tuple[int, ...], context: str, word: str) -> tuple[int, ...]:
        """The tokens of `word` after a text, as they are when both are read together, where that leaves the text's."""
        together = self._tokens.plain(context + word)
        if together[: len(before)] == before and len(together) > len(before):
            return together[len(before) :]
        return self._tokens.continuation(word)


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all of them begin with; of one prompt none, since nothing would be shared."""
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:count]


def adapter_json(adapter: Sequence[tuple[str, Any]]) -> list[Any]:
    """An adapter as canonical JSON takes it."""
    return [[digest, list(weight) if isinstance(weight, tuple) else weight] for digest, weight in adapter]
