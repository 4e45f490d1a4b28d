"""Calls about tasks: their embeddings, and those whose hidden states the graph observes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from metasepia.client import tables
from metasepia.client.calls import Answer, Ask, Pause, Steps, ask, ask_list, everything, request
from metasepia.client.registering import POLL_S
from metasepia.client.results import Comparison, Deletion, NearTask, ObservedTask, Probes, Task

Kind = Literal["data_set", "model", "prompt"]


def create_task(
    *,
    examples: Any = None,
    model: str | None = None,
    answers: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
    name: str | None = None,
    method: Literal["agreement", "prefix", "fisher"] | None = None,
    expert: str | None = None,
    long_texts: Literal["refuse", "leave_out"] | None = None,
    background: bool | None = None,
    seed: int | None = None,
    text: str | None = None,
    label: str = "label",
) -> Steps[Task]:
    """Embeds a data set (`examples`, also a table with the columns `text` and `label`), a prompt on a model, a context
    (`model`), or answers of a model of yours. A prompt is a job: `wait_for_task` waits for it.
    """
    body = {
        "examples": None if examples is None else tables.examples_of(examples, text, None, label),
        "model": model, "answers": answers, "prompt": prompt, "name": name, "method": method, "expert": expert,
        "long_texts": long_texts, "background": background, "seed": seed,
    }  # fmt: skip
    return Task.of((yield from ask(request("CreateTask", body))))


def wait_for_task(
    task: Task | str, *, tell: Callable[[Task], None] | None = None, poll_s: float = POLL_S
) -> Steps[Task]:
    """The task once it is over, however it ended; `tell` is called with each look at it."""
    found = task if isinstance(task, Task) else (yield from get_task(task))
    while not found.is_over:
        if tell is not None:
            tell(found)
        yield Pause(poll_s)
        found = yield from get_task(found.id)
    return found


def get_task(id: str, *, vector: bool = False) -> Steps[Task]:
    """One of them, or how far it is."""
    return Task.of((yield from ask(request("GetTask", params=_with(vector), id=id))))


def tasks(*, kind: Kind | None = None, vector: bool = False) -> Steps[list[Task]]:
    """All of them, in order of id."""
    found = yield from everything(request("ListTasks", params={"kind": kind, **_with(vector)}))
    return [Task.of(one) for one in found]


def nearest_tasks(id: str, *, k: int = 10, kind: Kind | None = None) -> Steps[list[NearTask]]:
    """The `k` tasks most like it, the nearest first."""
    asked = request("FindNearestTasks", params={"k": k, "kind": kind}, id=id)
    return [NearTask.of(one) for one in (yield from ask_list(asked))]


def compare_tasks(tasks: Sequence[str | Mapping[str, Any]]) -> Steps[Comparison]:
    """All cosines of some tasks: ids, or `raw` of tasks read with their vectors."""
    return Comparison.of((yield from ask(request("CompareTasks", {"tasks": list(tasks)}))))


def delete_task(id: str) -> Steps[Deletion]:
    """Ends its job and takes its name away."""
    return Deletion.of((yield from ask(request("DeleteTask", id=id))))


def probes() -> Steps[Probes]:
    """The probe texts, in their order."""
    return Probes.of((yield from ask(request("ListProbes"))))


def task_map(*, method: str | None = None) -> Steps[bytes]:
    """A page that shows all tasks, as HTML."""
    answer: Answer = yield Ask(request("GetTaskMap", params={"method": method}, accept="text/html, */*"))
    return answer.content


def _with(vector: bool) -> dict[str, str]:
    return {"include": "vector"} if vector else {}


# -- observed ----------------------------------------------------------------------------------------------------------


def observed_tasks() -> Steps[list[ObservedTask]]:
    """Tasks that hidden states were observed for."""
    return [ObservedTask.of(one) for one in (yield from ask_list(request("ListObservedTasks")))]


def observed_task(task: str) -> Steps[ObservedTask]:
    """How one stands."""
    return ObservedTask.of((yield from ask(request("GetObservedTask", task=task))))


def delete_observed_task(task: str) -> Steps[Deletion]:
    """Forgets one, and its reference."""
    return Deletion.of((yield from ask(request("DeleteObservedTask", task=task))))
