"""Text to tokens and back without torch: tokenizer.json, the checkpoint's chat template, text as it streams.

The template runs in jinja2's sandbox, with the functions that Hugging Face's own renderer gives it.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from metasepia.errors import CorruptArtefact, InvalidRequest, NotSupported

T = TypeVar("T")
_LONG_TEXT = 16_384
"""Characters; a few milliseconds of tokenising."""
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_LONGEST_CHARACTER = 4
"""Bytes, so also tokens, that one character of UTF-8 takes at most."""


def _bytes_of_characters() -> dict[str, int]:
    """The inverse of GPT-2's table: each byte by the printable character that byte-level vocabularies spell it with."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


class Prompts:
    """One backbone's tokenizer and chat template."""

    def __init__(self, tokenizer_dir: Path, backbone_id: str) -> None:
        """Raises CorruptArtefact for a directory without a readable tokenizer.json."""
        self._id = backbone_id
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        except Exception as error:  # the package raises bare Exception
            raise CorruptArtefact(f"tokenizer of {backbone_id}", f"tokenizer.json cannot be read ({error})") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._is_byte_level = b"ByteLevel" in (self.tokenizer.decoder.__getstate__() if self.tokenizer.decoder else b"")
        self._added = {one.content for one in self.tokenizer.get_added_tokens_decoder().values()}
        self._longest = max((len(token.encode()) for token in self.tokenizer.get_vocab()), default=1)
        config_path = tokenizer_dir / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_path.read_text()) if config_path.is_file() else {}
        self._special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        source = _template_source(tokenizer_dir, config)
        self._template = None if source is None else _environment().from_string(source)

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """The token ids of a conversation, up to where the assistant's answer begins.

        Raises NotSupported for a checkpoint without a template, InvalidRequest for messages that it refuses.
        """
        if self._template is None:
            raise NotSupported(f"chat with {self._id}, which has no chat template,", "use /v1/completions")
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except TemplateError as error:
            raise InvalidRequest("messages", f"the chat template of {self._id} refuses them: {error}") from error
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def plain(self, text: str) -> tuple[int, ...]:
        """The token ids of a text as the checkpoint wants it, with the special tokens that its tokenizer adds."""
        return tuple(self.tokenizer.encode(text).ids)

    def continuation(self, text: str) -> tuple[int, ...]:
        """The token ids of a text that follows others: no special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def at_least(self, text: str) -> int:
        """A lower bound on the tokens of `text`, without tokenising it: no token is longer than the longest.

        Halved, since a normaliser may shorten text before it is cut. Spares everybody else a text of megabytes.
        """
        return len(text.encode()) // (2 * self._longest)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, in UTF-8; it may be a part of a character. Special tokens by their names."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None:  # of a vocabulary that the model's is padded beyond
            return f"<{token_id}>".encode()
        if token in self._added:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[character] for character in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()

    def text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)


async def away(num_chars: int, work: Callable[[], T]) -> T:
    """The work's result; done in a thread where the text is long, so that other requests go on meanwhile."""
    return await asyncio.to_thread(work) if num_chars > _LONG_TEXT else work()


class StreamedText:
    """Text of tokens that arrive one by one. The pieces add up to the text of all tokens, and no piece ends inside a
    character: tokens of byte-level vocabularies may each hold a part of one.
    """

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._token_ids: list[int] = []
        self._context = 0
        """Where decoding starts: a token's text may depend on the one before (leading spaces)."""
        self._emitted = 0
        """Tokens whose text has left."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._token_ids += token_ids
        end = len(self._token_ids)
        piece = self._between(end)
        if piece.endswith(_REPLACEMENT):
            # Either the beginning of a character or bytes that are none. Those older than the longest character are.
            end = max(self._emitted, end - _LONGEST_CHARACTER)
            whole, piece = piece, self._between(end)
            if not whole.startswith(piece):
                return ""
        if piece:
            self._context, self._emitted = self._emitted, end
        return piece

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        piece = self._between(len(self._token_ids))
        self._context = self._emitted = len(self._token_ids)
        return piece

    def _between(self, end: int) -> str:
        before = self._prompts.text(self._token_ids[self._context : self._emitted])
        both = self._prompts.text(self._token_ids[self._context : end])
        return both[len(before) :]


class StopStrings:
    """Cuts streamed text at the first stop string, and holds back what may turn out to be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that may leave. After a stop string `stopped` is true and nothing more leaves."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _template_source(tokenizer_dir: Path, config: dict[str, Any]) -> str | None:
    path = tokenizer_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    return source


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
