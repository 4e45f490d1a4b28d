"""Tasks that experts are trained on: procedural, written here, free of licences. One a file; `TASKS` names them."""

from jobs.tasks.base import Example, LabelTask
from jobs.tasks.desk import DESK
from jobs.tasks.sentiment import SENTIMENT
from jobs.tasks.support import SUPPORT

TASKS: dict[str, LabelTask] = {task.name: task for task in (SUPPORT, SENTIMENT, DESK)}

__all__ = ["TASKS", "Example", "LabelTask"]
