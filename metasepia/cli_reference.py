"""The command line as a page of Markdown, made from its parser: `python -m metasepia.cli_reference`."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from metasepia.shell import ENDINGS


@dataclass(frozen=True)
class Line:
    """One verb."""

    words: list[str]
    """`experts`, `add`."""
    about: str
    parser: argparse.ArgumentParser

    @property
    def is_elsewhere(self) -> bool:
        """A program of the repository's, with options and a help of its own."""
        return self.parser.get_default("local") is not None


def lines_of(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Line]:
    """Every verb that can be run, in order."""
    inner = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not inner and words:
        yield Line(list(words), parser.description or "", parser)
    for one in inner:
        for name, verb in one.choices.items():
            yield from lines_of(verb, (*words, name))


def render(parser: argparse.ArgumentParser) -> str:
    """A table of verbs, and one of exit statuses."""
    rows = ["| command | does |", "| --- | --- |"]
    for line in lines_of(parser):
        named = [one for one in line.parser._actions if one.dest not in ("help", "json") and not _is_shared(one)]
        words = " ".join(["metasepia", *line.words, *filter(None, map(_shown, named))])
        rows.append(f"| `{words}` | {line.about} |")
    endings = "; ".join(f"{status} {words}" for status, words in ENDINGS.items())
    return "\n".join([*rows, "", f"Exit status: {endings}.", ""])


def _is_shared(action: argparse.Action) -> bool:
    return action.dest in ("url", "key_file", "timeout", "retries")


def _shown(action: argparse.Action) -> str:
    if action.nargs == argparse.REMAINDER:
        return "..."
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return f"[{name}]" if action.nargs in ("?", "*") else f"{name}..." if action.nargs == "+" else name
    flag = action.option_strings[0]
    if action.nargs != 0:
        flag += " " + (r"\|".join(map(str, action.choices)) if action.choices else name)
    return flag if action.required else f"[{flag}]"


if __name__ == "__main__":
    from metasepia.cli import parser

    print(render(parser()), end="")
