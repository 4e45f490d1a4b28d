"""Keys of endpoints: read from the environment when a request leaves, scrubbed from all that comes back.

Nothing here keeps a key: objects hold the variable's name, so that none shows in a repr, a pickle, a digest or a cache.
"""

import logging
import os
import re
from collections.abc import Generator
from urllib.parse import quote

import httpx

from metasepia.blackbox.errors import MissingKey
from metasepia.errors import InvalidSettings

SCRUBBED = "[key]"
SURE_SECRET = 12
"""Characters. What is shorter (`EMPTY`, `none`) is scrubbed from what people read, but not from a model's answers,
where it may be a word."""
SHORTEST_PART = 6
"""Characters of a key that are scrubbed where an answer breaks off inside it."""
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


def check_variable(name: str) -> None:
    """Raises InvalidSettings, without the value, for what is no name of a variable: it may be the key itself."""
    if not _VARIABLE.fullmatch(name):
        allowed = "the name of an environment variable in capitals, as EXAMPLE_API_KEY; never the key itself"
        raise InvalidSettings("key_env", "(not shown)", allowed)


class Key:
    """The key in one environment variable, or none at all."""

    def __init__(self, variable: str | None, endpoint: str) -> None:
        if variable is not None:
            check_variable(variable)
        self.variable, self._endpoint = variable, endpoint
        if variable is not None:
            _scrub_logs_of(variable)

    def __repr__(self) -> str:
        return f"Key(variable={self.variable!r})"

    def check(self) -> None:
        """Raises MissingKey where the variable is not set, or holds what no header can carry."""
        if self.variable is not None:
            self._read()

    def _read(self) -> str:
        assert self.variable is not None
        key = os.environ.get(self.variable, "").strip()
        if not key:
            raise MissingKey(self.variable, self._endpoint)
        if not key.isascii() or not key.isprintable() or " " in key:
            raise MissingKey(self.variable, self._endpoint, "holds something else: spaces or signs that no key has")
        return key

    def scrub(self, text: str) -> str:
        """The text without the key, for people to read."""
        return scrubbed(text, self.variable)

    def scrub_answer(self, text: str) -> str:
        """The text without the key, where the key can be nothing else."""
        held = "" if self.variable is None else os.environ.get(self.variable, "").strip()
        return self.scrub(text) if len(held) >= SURE_SECRET else text

    def auth(self, header: str) -> httpx.Auth:
        return _KeyAuth(self, header)


def scrubbed(text: str, variable: str | None) -> str:
    """The text without what an environment variable holds: plain, quoted as in a URL, or cut off at the text's end."""
    key = "" if variable is None else os.environ.get(variable, "").strip()
    if not key:
        return text
    for spelling in sorted({key, quote(key, safe=""), quote(key)}, key=len, reverse=True):
        text = text.replace(spelling, SCRUBBED)
    for length in range(min(len(key) - 1, len(text)), SHORTEST_PART - 1, -1):
        if text.endswith(key[:length]):
            return text[:-length] + SCRUBBED
    return text


class _KeyAuth(httpx.Auth):
    """Puts the key into the header of a request as it leaves."""

    def __init__(self, key: Key, header: str) -> None:
        self._key, self._header = key, header

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self._key.variable is not None:
            prefix = "Bearer " if self._header.lower() == "authorization" else ""
            request.headers[self._header] = prefix + self._key._read()
        yield request


class _Scrubber(logging.Filter):
    """Takes keys out of what the HTTP client logs: at DEBUG it logs headers of answers, which may echo the request."""

    def __init__(self) -> None:
        super().__init__()
        self.variables: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        clean = said
        for variable in tuple(self.variables):
            clean = scrubbed(clean, variable)
        if clean != said:
            record.msg, record.args = clean, ()
        return True


_scrubber = _Scrubber()


def _scrub_logs_of(variable: str) -> None:
    _scrubber.variables.add(variable)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_scrubber)  # once: the same filter is not added again
