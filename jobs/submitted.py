"""What `jobs.submit` starts on the cluster: one job in this process, SIGTERM told to it, its end written down.

    python -m jobs.submitted [--results URI] --id ID NAME -- the job's own arguments

URI/_job.json has the job's name, arguments, times (UTC) and exit status, `null` until it has ended.
"""

import argparse
import datetime
import json
import runpy
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from metasepia.sweeps.files import Files

INDEX = "_job.json"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    p = argparse.ArgumentParser(prog="python -m jobs.submitted", description=__doc__, allow_abbrev=False)
    p.add_argument("name")
    p.add_argument("--id", required=True)
    p.add_argument("--results")
    arguments, given = p.parse_args(words[:at]), words[at + 1 :]
    files = None if arguments.results is None else Files.at(arguments.results)
    told = {"id": arguments.id, "job": arguments.name, "arguments": given, "began": _now(), "ended": None, "exit": None}
    if files is not None:
        files.write(INDEX, _json(told))
    # A job that has no handler of its own ends as by Ctrl-C, with all that its store has.
    signal.signal(signal.SIGTERM, _interrupt)
    status = _status(arguments.name, given)
    if files is not None:
        files.write(INDEX, _json(told | {"ended": _now(), "exit": status}))
    return status


def _status(name: str, given: Sequence[str]) -> int:
    sys.argv = [f"jobs/{name}.py", *given]
    try:
        runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except KeyboardInterrupt:
        print("stopped; started again, it goes on with what is stored", file=sys.stderr)
        return INTERRUPTED
    return 0


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())
