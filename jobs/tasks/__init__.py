"""Tasks that experts are trained on, one a file. `make` gives one by its name; README.md shows how to add another.

Those in `TASKS` are made of sentences written here, free of licences, and need no data; the others read a file that the
user gives, or make their questions by procedure.
"""

from jobs.tasks.base import Example, LabelTask, ListedTask, Task, TrainingSplit
from jobs.tasks.names import FROM_DATA, TASKS, make, names

__all__ = ["FROM_DATA", "TASKS", "Example", "LabelTask", "ListedTask", "Task", "TrainingSplit", "make", "names"]
