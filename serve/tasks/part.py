"""The part of the graph that embeds tasks, as the door sees it."""

from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from actors.messages import TaskAsked
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import MethodName, TaskEmbedding
from metasepia.errors import InvalidRequest
from metasepia.registry.entries import Artefact
from serve.parts import answered
from serve.tasks.index import Nearest

UNFINISHED = ("queued", "running")

Near = tuple[dict[str, Any], ...]
"""Of each task `id`, `name`, `kind`, `cosine`, `expert`; the nearest first."""


class TaskPart(Protocol):
    """Embeds tasks and finds the nearest ones."""

    async def make(self, asked: TaskAsked) -> tuple[Artefact, bool]:
        """See `actors.task_jobs.TaskJobs.make`."""
        ...

    async def cancel(self, owner: str, id_: str) -> None:
        """Ends the job of an owner's task, if there is one."""
        ...

    async def embed(
        self,
        answers: Answers,
        *,
        method: MethodName | None = None,
        seed: int = 0,
        deadline_unix_s: float = float("inf"),
    ) -> TaskEmbedding:
        """Without registering it. Raises InvalidRequest, WindowExceeded, Overloaded, DeadlineExceeded."""
        ...

    async def search(
        self, owner: str, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False
    ) -> Nearest:
        """The owner's tasks nearest to a registered one, itself left out. Raises UnknownName, InvalidRequest."""
        ...

    async def nearest(
        self, owner: str, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False
    ) -> Near:
        """The same with itself among them. `with_expert`: only those that stand for an expert's requests."""
        ...

    async def nearest_of(
        self,
        owner: str,
        answers: Answers,
        *,
        k: int,
        kind: str | None = None,
        with_expert: bool = False,
        method: MethodName | None = None,
        deadline_unix_s: float = float("inf"),
    ) -> Near:
        """The registered tasks nearest to one that is not registered. Raises as `embed` does."""
        ...

    async def statistics(self) -> dict[str, float]:
        """Counters and gauges by name."""
        ...

    async def check(self) -> None:
        """One real embedding."""
        ...


def not_done(found: Artefact) -> InvalidRequest:
    """What is said of a task that has no vector yet, or never will as it stands."""
    waits, why = found.card.get("status") in UNFINISHED, found.card.get("error")
    status = "is not embedded yet" if waits else f"could not be embedded ({why})"
    return InvalidRequest("id", f"the task {found.name} {status}; GET /v1/tasks/{found.name} says how far it is")


class ServedTasks:
    """Behind a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def make(self, asked: TaskAsked) -> tuple[Artefact, bool]:
        return await answered(self._handle.make.remote(asked))

    async def cancel(self, owner: str, id_: str) -> None:
        await answered(self._handle.cancel.remote(owner, id_))

    async def embed(
        self,
        answers: Answers,
        *,
        method: MethodName | None = None,
        seed: int = 0,
        deadline_unix_s: float = float("inf"),
    ) -> TaskEmbedding:
        return await answered(
            self._handle.embed.remote(answers, method=method, seed=seed, deadline_unix_s=deadline_unix_s)
        )

    async def search(
        self, owner: str, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False
    ) -> Nearest:
        return await answered(self._handle.search.remote(owner, id_, k=k, kind=kind, with_expert=with_expert))

    async def nearest(
        self, owner: str, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False
    ) -> Near:
        return await answered(self._handle.nearest.remote(owner, id_, k=k, kind=kind, with_expert=with_expert))

    async def nearest_of(
        self,
        owner: str,
        answers: Answers,
        *,
        k: int,
        kind: str | None = None,
        with_expert: bool = False,
        method: MethodName | None = None,
        deadline_unix_s: float = float("inf"),
    ) -> Near:
        return await answered(
            self._handle.nearest_of.remote(
                owner,
                answers,
                k=k,
                kind=kind,
                with_expert=with_expert,
                method=method,
                deadline_unix_s=deadline_unix_s,
            )
        )

    async def statistics(self) -> dict[str, float]:
        return await answered(self._handle.statistics.remote())

    async def check(self) -> None:
        await answered(self._handle.check.remote())
