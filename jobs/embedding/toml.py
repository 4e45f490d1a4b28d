"""TOML whose mistakes are told with the file, the line and the field."""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, MetasepiaError

_HEADER = re.compile(r"\s*\[\[?\s*([A-Za-z_]+)\s*\]?\]")
_SECRET = re.compile("key|token|secret|password|auth", re.IGNORECASE)
"""Fields whose value is not shown where it is a mistake: someone may have put a key there."""


class Table:
    """One table of the file, whose fields are taken one by one; what is left over is a mistake."""

    def __init__(self, values: Mapping[str, Any], place: str, lines: Mapping[str, int]) -> None:
        self.values, self.place, self._lines = values, place, lines
        self.seen: set[str] = set()

    def take(
        self, name: str, kind: type, *default: Any, check: Callable[[Any], str | None] = lambda value: None
    ) -> Any:
        """A field of this kind; a whole number is a float too. Raises InvalidSettings."""
        self.seen.add(name)
        if name not in self.values:
            if default:
                return default[0]
            raise self.refused(name, None, "given")
        value = self.values[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            told = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table"}
            raise self.refused(name, value, told[kind])
        problem = check(value)
        if problem:
            raise self.refused(name, value, problem)
        return value

    def take_one(self, name: str, allowed: Sequence[str], *default: str) -> str:
        value = self.take(name, str, *default)
        if value not in allowed:
            raise self.refused(name, value, f"one of {', '.join(allowed)}")
        return value

    def take_strings(self, name: str, default: tuple[str, ...] | None) -> tuple[str, ...] | None:
        self.seen.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise self.refused(name, value, "a list of texts")
        return tuple(value)

    def done(self, more: Sequence[str] = ()) -> None:
        """Raises InvalidSettings for a field that nobody took."""
        for name in self.values:
            if name not in self.seen:
                known = ", ".join(dict.fromkeys((*sorted(self.seen), *more)))
                value = "(not shown)" if _SECRET.search(name) else self.values[name]
                raise self.refused(name, value, f"left out; the fields here are {known}")

    def refused(self, name: str, value: object, allowed: str) -> InvalidSettings:
        return InvalidSettings(self.place_of(name), value, allowed)

    def named(self) -> "Named":
        return Named(self)

    def place_of(self, name: str) -> str:
        line = self._lines.get(name)
        place = self.place if line is None else re.sub(r":\d+ ", f":{line} ", self.place, count=1)
        return f"{place}.{name}" if name else place


class Named:
    """Errors raised inside, with the place in the file before the field's name."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, InvalidSettings):
            first = re.split(r"[.\[]", error.field)[0]
            place = self._table.place_of(first)
            raise InvalidSettings(place + error.field[len(first) :], error.value, error.allowed) from None
        if isinstance(error, InvalidRequest) and error.param:
            field = error.param.rpartition(".")[2]
            first = re.split(r"[.\[]", field)[0]
            value = self._table.values.get(first, "(as given)")
            place = self._table.place_of(field if first in self._table.values else "")
            raise InvalidSettings(place, value, f"something else: {error.message}") from None
        if isinstance(error, MetasepiaError):
            raise InvalidSettings(self._table.place, "(as given)", f"something else: {error}") from error
        if isinstance(error, TypeError | ValueError):
            raise InvalidSettings(self._table.place, "(as given)", f"of the right kinds ({error})") from error


class Source:
    """A TOML file, with the line of each entry."""

    def __init__(self, path: Path, values: Mapping[str, Any], text: str, entries: Sequence[str]) -> None:
        self._path, self._values = path, values
        self._lines, self._entries = text.splitlines(), entries
        plain = {name: value for name, value in values.items() if name not in entries}
        self.top = Table(plain, f"{path}:1", self._fields(0))

    @classmethod
    def read(cls, path: Path, entries: Sequence[str]) -> "Source":
        """`entries`: the tables that a file may have. Raises InvalidSettings and CorruptArtefact."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettings("specification", str(path), f"a readable TOML file ({error})") from error
        try:
            return cls(path, tomllib.loads(text), text, entries)
        except tomllib.TOMLDecodeError as error:
            raise CorruptArtefact(str(path), f"it is not TOML: {error}") from error

    def tables(self, name: str) -> list[Table]:
        """The entries [[name]]."""
        values = self._values.get(name, [])
        if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
            raise InvalidSettings(f"{self._path} {name}", "(as given)", f"one or more tables headed [[{name}]]")
        starts = self._starts(name)
        made = []
        for place, one in enumerate(values):
            start = starts[place] if len(starts) == len(values) else None
            where = f"{self._path}:{start + 1}" if start is not None else str(self._path)
            lines = {} if start is None else self._fields(start + 1)
            made.append(Table(one, f"{where} {name}[{place}]", lines))
        return made

    def table(self, name: str) -> Table:
        """The table [name], empty where there is none."""
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            raise InvalidSettings(f"{self._path} {name}", value, f"a table headed [{name}]")
        starts = self._starts(name)
        start = starts[0] if starts else 0
        return Table(value, f"{self._path}:{start + 1} {name}", self._fields(start + 1) if starts else {})

    def done(self) -> None:
        """Raises InvalidSettings for a field or table that nobody took."""
        self.top.done(self._entries)

    def _starts(self, name: str) -> list[int]:
        return [i for i, line in enumerate(self._lines) if (m := _HEADER.match(line)) and m[1] == name]

    def _fields(self, begin: int) -> dict[str, int]:
        """Line numbers, from 1, of the fields up to the next header."""
        found: dict[str, int] = {}
        for number in range(begin, len(self._lines)):
            if self._lines[number].lstrip().startswith("["):
                break
            match = re.match(r"\s*([A-Za-z_]+)\s*=", self._lines[number])
            if match:
                found.setdefault(match[1], number + 1)
        return found
