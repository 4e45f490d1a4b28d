"""The verbs of the repository: `metasepia serve`, `doctor`, `plan` and `bench` run its own programs.

They are no part of the wheel, which is a client and the science: elsewhere these verbs say so.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from metasepia.shell import MISUSE, REFUSED, Failed

PROGRAMS = {
    "serve": ("serve.main", "run the whole graph here, until Ctrl-C"),
    "doctor": ("cluster.doctor", "look for what would keep the graph from starting, or from being safe"),
    "plan": ("cluster.plan", "what would be placed where, before anything is started"),
}
ROOT = Path(__file__).parents[1]


def run(module: str) -> Callable[[argparse.Namespace], int]:
    """A verb that becomes a program of the repository. It does not come back."""

    def verb(options: argparse.Namespace) -> int:
        _become(module, options.rest)

    return verb


def bench(options: argparse.Namespace) -> int:
    """`metasepia bench NAME ...`; without a name those that there are."""
    folder = ROOT / "benchmarks"
    names = (
        sorted(path.stem for path in folder.glob("*.py") if "\n    main(" in path.read_text())
        if folder.is_dir()
        else []
    )
    if not names:
        raise Failed(_elsewhere("bench"), REFUSED)
    if not options.rest or options.rest[0] in ("-h", "--help"):
        print("benchmarks: " + ", ".join(names))
        return 0
    name, *rest = options.rest
    if name not in names:
        raise Failed(f"no benchmark {name!r}; there are {', '.join(names)}", MISUSE)
    _become(f"benchmarks.{name}", rest)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Replaces this process, so that signals and exit statuses are the program's own."""
    import os

    if not (ROOT / (module.replace(".", "/") + ".py")).is_file():
        raise Failed(_elsewhere(module), REFUSED)
    if importlib.util.find_spec("ray") is None:
        raise Failed(f"{module} needs the packages of the extra `serve`: run `make setup` in the repository", REFUSED)
    sys.stdout.flush()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def _elsewhere(what: str) -> str:
    return (
        f"{what} is the repository's, and this metasepia is installed without it; clone the repository and run it "
        "there (`make setup`, then .venv/bin/metasepia)"
    )


def add_verbs(things: Any) -> None:
    """The verbs; what follows them is the program's own, its --help too."""
    verbs: list[tuple[str, str, Callable[[argparse.Namespace], int]]] = [
        (name, about, run(module)) for name, (module, about) in PROGRAMS.items()
    ]
    for name, about, local in (*verbs, ("bench", "run one of the repository's benchmarks", bench)):
        said = f"{about} (of the repository)"
        one = things.add_parser(name, help=said, description=said, add_help=False, prefix_chars="\0")
        one.add_argument("rest", nargs=argparse.REMAINDER)
        one.set_defaults(local=local)
