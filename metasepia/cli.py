"""`metasepia`: a running server from a shell.

    metasepia classify reviews.csv --text review --examples labelled.csv --out labelled-all.csv
    metasepia chat "Name the capital of France." --expert desk
    metasepia experts add maths path/to/directory
    metasepia mixtures search examples.jsonl --backbone smollm2-135m
    metasepia status --watch

Where the server is: --url or METASEPIA_URL. Its key, if it wants one: METASEPIA_KEY or --key-file. What the server
refuses is printed in its own words.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metasepia import (
    cli_chat,
    cli_classify,
    cli_contexts,
    cli_embed,
    cli_experts,
    cli_jobs,
    cli_keys,
    cli_mixtures,
    cli_repository,
    cli_status,
    cli_tasks,
)
from metasepia.shell import ENDINGS, INTERRUPTED, Failed, failed, for_people, seconds

if TYPE_CHECKING:
    import metasepia.client.results

URL = "http://127.0.0.1:8000"
NOUNS = (
    cli_classify,
    cli_chat,
    cli_embed,
    cli_contexts,
    cli_experts,
    cli_mixtures,
    cli_tasks,
    cli_jobs,
    cli_keys,
    cli_status,
)
"""Each adds its verbs by `add_verbs(things, shared)`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """One run; its exit status."""
    whole = parser()
    complete_shell(whole)
    options = whole.parse_args(arguments)
    try:
        status = _run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has left: a pager, `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(options: argparse.Namespace) -> int:
    try:
        if options.local is not None:
            return options.local(options)
        with client_of(options) as client:
            options.run(client, options)
    except Failed as error:
        return _told(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        ending = failed(error)
        if ending is None:
            raise
        return _told(ending)
    return 0


def _told(ending: Failed) -> int:
    print(for_people(f"metasepia: {ending.message}", is_error=True), file=sys.stderr)
    return ending.status


def client_of(options: argparse.Namespace) -> "metasepia.client.Client":
    """Raises Failed for a key file that cannot be read, BadInput for a URL or key."""
    from metasepia.client import Client

    key = None
    if options.key_file is not None:
        try:
            key = options.key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Failed(f"{options.key_file} cannot be read: {error}", 1) from None
    return Client(options.url, key, timeout_s=options.timeout, retries=options.retries)


def parser() -> argparse.ArgumentParser:
    """The whole command line; the reference is made of it."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--json", action="store_true", help="print the server's answer as it is")
    top = argparse.ArgumentParser(
        prog="metasepia",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit status:\n" + "\n".join(f"  {status:3}  {words}" for status, words in ENDINGS.items()),
        allow_abbrev=False,
    )
    _add_connection(top, first=True)
    _add_connection(shared, first=False)
    top.set_defaults(local=None)
    things = top.add_subparsers(title="things", required=True, metavar="THING")
    for noun in NOUNS:
        noun.add_verbs(things, shared)
    cli_repository.add_verbs(things)
    return top


def _add_connection(to: argparse.ArgumentParser, *, first: bool) -> None:
    """The same options before and after the verb; those after it hold."""
    group = to.add_argument_group("connection")

    def default(value: object) -> object:
        return value if first else argparse.SUPPRESS

    group.add_argument("--url", default=default(os.environ.get("METASEPIA_URL") or URL), help="also METASEPIA_URL")
    group.add_argument("--key-file", type=Path, default=default(None), metavar="FILE", help="also METASEPIA_KEY")
    group.add_argument(
        "--timeout", type=seconds, default=default(120.0), metavar="S", help="seconds of a request, over all its tries"
    )
    group.add_argument("--retries", type=int, default=default(2), metavar="N", help="tries after the first")


def complete_shell(whole: argparse.ArgumentParser) -> None:
    """Answers a shell that completes a line, where argcomplete is installed:
    `eval "$(register-python-argcomplete metasepia)"`.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(whole)


if __name__ == "__main__":
    sys.exit(main())
