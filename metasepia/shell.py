"""What the verbs of `metasepia` share: how a run ends, what is printed, and files that are read.

Nothing heavy is imported here: help and misuse answer at once.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISUSE, REFUSED, UNKNOWN, LATER, NOBODY, NOT_ALLOWED, PARTLY, INTERRUPTED = 2, 1, 3, 4, 5, 6, 7, 130
ENDINGS = {
    0: "done",
    REFUSED: "refused, or a file here that cannot be read",
    MISUSE: "misuse of the command",
    UNKNOWN: "unknown or deleted",
    LATER: "try again later: busy, a quota spent, being rebuilt, out of time",
    NOBODY: "nobody answers there, or not a Metasepia server",
    NOT_ALLOWED: "no key, a wrong one, or one without the scope",
    PARTLY: "some of the inputs have no answer; the others are written",
    INTERRUPTED: "interrupted",
}
"""What each exit status says."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Failed(Exception):
    """What ends the program: words for stderr, and its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.message, self.status = message, status


def failed(error: Exception) -> Failed | None:
    """How a call's error ends the program; None for what is no error of a call."""
    from metasepia.client import errors

    statuses: dict[type[Exception], int] = {
        errors.Unauthenticated: NOT_ALLOWED,
        errors.Forbidden: NOT_ALLOWED,
        errors.NotFound: UNKNOWN,
        errors.Deleted: UNKNOWN,
        errors.Busy: LATER,
        errors.Unavailable: LATER,
        errors.TimedOut: LATER,
        errors.OutOfTime: LATER,
        errors.StreamBroken: LATER,
        errors.NoAnswer: NOBODY,
        errors.NotOurs: NOBODY,
        errors.PartlyDone: PARTLY,
        errors.BadInput: REFUSED,
        errors.Refused: REFUSED,
    }
    found = next((statuses[kind] for kind in type(error).__mro__ if kind in statuses), None)
    if found is None:
        return None
    words = str(error)
    if isinstance(error, errors.OutOfTime):
        words = f"{error.url} did not answer in {error.timeout_s:g} s; give more with --timeout"
    elif isinstance(error, errors.NoAnswer):
        words = f"nobody answers at {error.url} ({error.problem}); is it running? --url or METASEPIA_URL says where"
    elif isinstance(error, errors.NotOurs):
        words += " --url or METASEPIA_URL says where"
    elif isinstance(error, errors.Unauthenticated):
        words += "; METASEPIA_KEY or --key-file brings a key"
    return Failed(words, found)


def add_noun(things: Any, name: str, about: str) -> Any:
    """A thing that verbs are about; its subparsers."""
    noun = things.add_parser(name, help=about, description=about, allow_abbrev=False)
    return noun.add_subparsers(required=True, metavar="VERB", title="verbs")


def add_verb(
    verbs: Any, name: str, run: Callable[..., None], about: str, shared: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=about, parents=[shared], allow_abbrev=False
    )
    made.set_defaults(run=run)
    return made


def existing(path: Path) -> Path:
    if not path.is_file():
        raise Failed(f"{path} does not exist", REFUSED)
    return path


def text_of(path: Path) -> str:
    """UTF-8, from a file or, for `-`, standard input. Raises Failed."""
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        return existing(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failed(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8", REFUSED) from None
    except OSError as error:
        raise Failed(f"{path} cannot be read: {error.strerror}", REFUSED) from None


def json_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text_of(path))
    except ValueError as error:
        raise Failed(f"{path} is not JSON: {error}", REFUSED) from None
    if not isinstance(found, dict):
        raise Failed(f"{path} must be a JSON object", REFUSED)
    return found


def json_lines(path: Path) -> list[Any]:
    """A JSON array, or an object a line. Raises Failed."""
    return json_values(text_of(path), str(path))


def json_values(text: str, where: str) -> list[Any]:
    """Raises Failed."""
    if not text.strip():
        raise Failed(f"{where} is empty", REFUSED)
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise Failed(f"{where} is neither a JSON array nor JSON lines: {error}", REFUSED) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside the file, which takes its place at the end: readers see it whole or as it was. Raises Failed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror or error}", REFUSED) from None
    finally:
        beside.unlink(missing_ok=True)


def show(options: argparse.Namespace, answer: Any, words: Callable[[], None]) -> None:
    if options.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        words()


def show_fields(options: argparse.Namespace, shown: dict[str, Any]) -> None:
    def words() -> None:
        wide = max(map(len, shown), default=0)
        for key, value in shown.items():
            if value not in (None, {}, []):
                text = value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
                print(for_people(f"{key:{wide}}  {text}"))

    show(options, shown, words)


def cell(value: Any, column: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(cell(one, column) for one in value) or "-"
    return str(value)[:12] if column == "digest" else f"{value:,}" if isinstance(value, int) else str(value)


def for_people(text: str, *, is_error: bool = False) -> str:
    """As it may be written to a terminal: control characters, which could rewrite the screen, made visible."""
    is_terminal = (sys.stderr if is_error else sys.stdout).isatty()
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if is_terminal else text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print(for_people("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))


def show_list(options: argparse.Namespace, found: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """A row each, or the entries as the server gave them."""
    show(options, list(found), lambda: table(columns, [[cell(one.get(c), c) for c in columns] for one in found]))


def seconds(text: str) -> float:
    """Of an option. Raises argparse's error."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.001 to 86400")
    return found


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
