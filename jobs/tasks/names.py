"""The names of tasks, and what each is made from."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from jobs.tasks import arc, classify, gsm8k, gym, mbpp
from jobs.tasks.base import LabelTask, Task
from jobs.tasks.desk import DESK
from jobs.tasks.dispatch import DISPATCH
from jobs.tasks.sentiment import SENTIMENT
from jobs.tasks.support import SUPPORT
from metasepia.errors import InvalidSettings, UnknownName

TASKS: dict[str, LabelTask] = {task.name: task for task in (SUPPORT, SENTIMENT, DESK)}
"""Labelling tasks of sentences written here, each with its shipped expert."""

FROM_DATA: Mapping[str, Callable[[Path], Task]] = {
    "arc_challenge": arc.challenge,
    "arc_easy": arc.easy,
    "classify": classify.read,
    "gsm8k": gsm8k.read,
    "mbpp": mbpp.read,
}
"""Tasks that read a file or a directory of the user's."""


def names() -> tuple[str, ...]:
    """What `make` takes, but for the families `gym:<dataset>` and `package.module:attribute`."""
    return tuple(sorted((*TASKS, DISPATCH.name, *FROM_DATA)))


def make(name: str, data: Path | None = None) -> Task:
    """The task of a name, with the data of `data` if it needs any.

    `gym:<dataset>` is one of reasoning-gym's, and `package.module:attribute` a user's own: a Task, or a callable that
    makes one from `data`. Raises UnknownName, and InvalidSettings for data that are missing, not wanted or not what the
    task reads.
    """
    if name in FROM_DATA:
        if data is None:
            raise InvalidSettings("data", None, f"the file or directory that task {name} reads (--data PATH)")
        return FROM_DATA[name](data)
    if name.startswith(gym.PREFIX):
        _check_no_data(name, data)
        return gym.make(name)
    if ":" in name:
        return _users_own(name, data)
    if name != DISPATCH.name and name not in TASKS:
        raise UnknownName("task", name, (*names(), f"{gym.PREFIX}<dataset>", "package.module:attribute"))
    _check_no_data(name, data)
    return DISPATCH if name == DISPATCH.name else TASKS[name]


def _check_no_data(name: str, data: Path | None) -> None:
    if data is not None:
        raise InvalidSettings("data", str(data), f"left out, for task {name} needs none")


def _users_own(name: str, data: Path | None) -> Task:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidSettings("task", name, f"a module and an attribute that can be imported ({error})") from error
    return cast(Task, found(data) if callable(found) else found)
