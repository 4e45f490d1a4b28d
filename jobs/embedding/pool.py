"""Actors that take units of work off one queue, each replaced if its process dies; and the Ray they run on."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.connect import connect
from cluster.settings import RaySettings
from metasepia.errors import CannotPlace, MetasepiaError

MAX_DEATHS = 3
"""A unit at whose work so many processes died is failed; the others go on."""
POLL_S = 0.5
U = TypeVar("U")


@contextlib.contextmanager
def cluster(address: str | None, workers: int, gpus: float) -> Iterator[int]:
    """Ray, started here (address None) or joined, and left as it was found; gives the workers it has room for.

    Raises CannotPlace where there is room for none.
    """
    ours = not ray.is_initialized()
    if ours and address is None:
        connect(RaySettings(num_cpus=float(workers), num_gpus=_num_gpus() if gpus else 0.0, object_store_gib=0.3))
    elif ours:
        connect(RaySettings(address=str(address)))
    try:
        has = ray.cluster_resources()
        if has.get("CPU", 0.0) < 1:
            raise CannotPlace("CPU", 1.0, has.get("CPU", 0.0), "one worker")
        if gpus and has.get("GPU", 0.0) < gpus:
            raise CannotPlace("GPU", gpus, has.get("GPU", 0.0), "one worker")
        yield min(workers, int(has["CPU"]))
    finally:
        if ours:
            ray.shutdown()


def _num_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


class Pool(Generic[U]):
    """Runs units on at most `workers` actors at a time."""

    def __init__(
        self,
        make: Callable[[], Any],
        call: Callable[[Any, U], Any],
        *,
        workers: int,
        took: Callable[[U, Any], None],
        failed: Callable[[U, str], None],
        told: Callable[[U, Any], None] = lambda unit, told: None,
    ) -> None:
        """`make`: a new actor, which has a method `told`. `call` gives the reference of a unit's result.

        `took` gets each result, `failed` why there is none, `told` what the actor at a unit says of it now and then.
        """
        self._make, self._call, self._workers = make, call, workers
        self._took, self._failed, self._told = took, failed, told
        self._at_work: dict[int, tuple[Any, U]] = {}

    async def run(self, units: Sequence[U]) -> None:
        queue = deque(units)
        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for slot in range(min(self._workers, len(queue))):
                    group.create_task(self._work(slot, queue))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            watching.cancel()

    async def _work(self, slot: int, queue: deque[U]) -> None:
        actor: Any = None
        try:
            while queue:
                unit, deaths = queue.popleft(), 0
                while True:
                    actor = self._make() if actor is None else actor
                    self._at_work[slot] = actor, unit
                    try:
                        result = await self._call(actor, unit)
                    except RayActorError as error:
                        actor, deaths = None, deaths + 1
                        if deaths == MAX_DEATHS:
                            self._failed(unit, f"its process died {deaths} times; the last time: {_first_line(error)}")
                            break
                    except (MetasepiaError, RayTaskError) as error:
                        self._failed(unit, words_of(error))
                        break
                    else:
                        self._took(unit, result)
                        break
                    finally:
                        self._at_work.pop(slot, None)
        finally:
            if actor is not None:
                ray.kill(actor)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for slot, (actor, unit) in list(self._at_work.items()):
                with contextlib.suppress(TimeoutError, RayActorError, RayTaskError):
                    told = await asyncio.wait_for(_awaited(actor.told.remote()), POLL_S)
                    if self._at_work.get(slot) == (actor, unit):
                        self._told(unit, told)


async def _awaited(reference: Any) -> Any:
    return await reference


def words_of(error: BaseException) -> str:
    """What went wrong, in a line or so: of errors of ours their own words, of others their kind too."""
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, BaseException):
        error = cause
    if isinstance(error, MetasepiaError):
        return str(error)
    if isinstance(error, RayTaskError):
        return _first_line(error, last=True)
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}{notes}"


def _first_line(error: BaseException, *, last: bool = False) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if last else 0]
