"""The part that embeds tasks, from inside: what goes together, what waits, what fails alone, what is kept at hand."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors import task_embedding
from actors.task_embedding import Task, TaskEmbedder
from cluster.settings import TaskSettings
from metasepia.embedding import methods
from metasepia.embedding.answers import Answers
from metasepia.embedding.jobs import TaskJob, TaskProgress, joined, parts_of
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.errors import CorruptArtefact, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from metasepia.registry.entries import LOCAL
from serve.task_replica import SurrogateVectors
from serve.tasks.index import TaskIndex
from tests.doors import RealCatalogue
from tests.tasks import PROBES, WordEncoder, data_set

SPACE = Space(surrogate="a" * 64, method="agreement", settings={}, probes=PROBES.digest)


class Gated:
    """A method that waits for its gate and remembers what went together; of a task's texts the number says where."""

    dims, space = 4, SPACE

    def __init__(self) -> None:
        self.gate, self.began = threading.Event(), threading.Event()
        self.batches: list[tuple[int, list[int]]] = []

    def embed(self, tasks: Sequence[Answers], *, seed: int = 0, told: Any = None) -> np.ndarray:
        self.batches.append((seed, [one.num_texts for one in tasks]))
        self.began.set()
        while not self.gate.wait(0.005):
            told(0, len(tasks))
        if any(one.num_texts == 13 for one in tasks):
            raise InvalidRequest("task", "thirteen")
        return np.stack([np.eye(4, dtype=np.float32)[one.num_texts % 4] for one in tasks])


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Gated:
    made = Gated()
    monkeypatch.setattr(methods, "method", lambda *_: made)
    return made


def an_embedder(**changes: Any) -> TaskEmbedder:
    def load() -> Any:
        raise AssertionError("nothing is trained")

    return TaskEmbedder(TaskSettings(**changes), PROBES, SurrogateVectors(WordEncoder()), load)


def a_task(num_texts: int, **changes: Any) -> Task:
    examples = data_set("tone", num=num_texts)
    answers = Answers.of_labelled([one["text"] for one in examples], [one["label"] for one in examples])
    return Task(name=f"of-{num_texts}", kind="data_set", answers=answers, method="agreement", **changes)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), 30)

    return asyncio.run(bounded())


async def begun(embedder: TaskEmbedder, gated: Gated, *tasks: Task) -> list[asyncio.Task[TaskEmbedding]]:
    """The first task is in its forward when the others come, and these wait."""
    asked: list[asyncio.Task[TaskEmbedding]] = []
    for place, task in enumerate(tasks):
        asked.append(asyncio.create_task(embedder.embed(task)))
        if place == 0:
            await asyncio.to_thread(gated.began.wait, 10)
    while embedder.num_queued < len(tasks) or embedder._workers["agreement"].num_put < len(tasks):
        await asyncio.sleep(0.002)
    return asked


def test_tasks_that_wait_go_together_by_seed_and_background_ones_last(gated: Gated) -> None:
    async def main() -> None:
        embedder = an_embedder(max_batch=2)
        tasks = [a_task(8), a_task(9, background=True), a_task(10), a_task(11, seed=1), a_task(12), a_task(14)]
        asked = await begun(embedder, gated, *tasks)
        gated.gate.set()
        found = await asyncio.gather(*asked)
        assert gated.batches == [(0, [8]), (0, [10, 12]), (1, [11]), (0, [14]), (0, [9])]
        assert [int(one.vector.argmax()) for one in found] == [8 % 4, 9 % 4, 10 % 4, 11 % 4, 12 % 4, 14 % 4]
        assert embedder.statistics()["batches"] == 5 and embedder.num_queued == 0
        embedder.stop()

    run(main)


def test_a_task_that_cannot_be_embedded_fails_alone(gated: Gated) -> None:
    async def main() -> None:
        embedder = an_embedder()
        asked = await begun(embedder, gated, a_task(8), a_task(13), a_task(14))
        gated.gate.set()
        first, bad, other = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(bad, InvalidRequest) and bad.message == "thirteen"
        assert isinstance(first, TaskEmbedding) and isinstance(other, TaskEmbedding)
        embedder.stop()

    run(main)


def test_more_tasks_than_may_wait_are_refused_and_those_that_leave_are_never_embedded(gated: Gated) -> None:
    async def main() -> None:
        embedder = an_embedder(max_queued=2)
        asked = await begun(embedder, gated, a_task(8), a_task(9))
        with pytest.raises(Overloaded) as refused:
            await embedder.embed(a_task(10))
        assert refused.value.retry_after_s >= 1
        asked[1].cancel()
        await asyncio.gather(asked[1], return_exceptions=True)
        gated.gate.set()
        await asked[0]
        assert await embedder.embed(a_task(12)) is not None
        assert [batch for _, batch in gated.batches] == [[8], [12]]
        embedder.stop()

    run(main)


def test_a_batch_that_everybody_has_left_is_given_up(gated: Gated) -> None:
    async def main() -> None:
        embedder = an_embedder()
        (asked,) = await begun(embedder, gated, a_task(8))
        asked.cancel()
        later = asyncio.create_task(embedder.embed(a_task(9)))
        while len(gated.batches) < 2:  # the gate is still shut: the first batch ended without it
            await asyncio.sleep(0.002)
        gated.gate.set()
        assert (await later).name == "of-9"
        embedder.stop()

    run(main)


def test_a_deadline_ends_the_wait(gated: Gated) -> None:
    async def main() -> None:
        embedder = an_embedder()
        with pytest.raises(DeadlineExceeded):
            await embedder.embed(a_task(8, deadline_unix_s=time.time() + 0.2))
        gated.gate.set()
        embedder.stop()

    run(main)


def test_a_part_that_is_at_work_is_healthy_until_its_batch_is_stuck(
    gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        embedder = an_embedder()
        gated.gate.set()
        await embedder.embed(a_task(8))
        gated.gate.clear()
        gated.began.clear()
        (asked,) = await begun(embedder, gated, a_task(9))
        await embedder.check(0.1)
        monkeypatch.setattr(task_embedding, "STUCK_S", 0.0)
        with pytest.raises(Unavailable):
            await embedder.check(0.1)
        gated.gate.set()
        await asked
        await embedder.check(5.0)
        embedder.stop()

    run(main)


# -- the index ---------------------------------------------------------------------------------------------------------


def put(catalogue: RealCatalogue, id_: str, vector: Sequence[float], **card: Any) -> TaskEmbedding:
    unit = np.array(vector, np.float32) / np.float32(np.linalg.norm(vector))
    space = card.pop("at", SPACE)
    made = TaskEmbedding(space=space, vector=unit, kind=card.get("kind", "data_set"), name=id_, source={})
    facts = {"status": "done", "kind": made.kind, "space": space.digest, "dims": made.dims, "expert": None} | card
    catalogue.registry.put("embedding", made.to_bytes(), digest=made.digest, name=id_, owner=LOCAL, card=facts)
    return made


@pytest.mark.parametrize("max_mib", [0.0, 2 * 4 * 4 / 2**20, 10.0])
def test_the_nearest_are_the_same_however_many_vectors_there_is_room_for(tmp_path: Path, max_mib: float) -> None:
    catalogue = RealCatalogue(tmp_path)
    vectors = np.random.default_rng(0).standard_normal((7, 4))
    made = [put(catalogue, f"t{i}", one.tolist(), kind=("data_set", "model")[i % 2]) for i, one in enumerate(vectors)]
    other = Space(surrogate="b" * 64, method="agreement", settings={}, probes=PROBES.digest)
    put(catalogue, "elsewhere", [1, 0, 0, 0], at=other)
    put(catalogue, "queued", [1, 0, 0, 0], status="queued")

    async def main() -> None:
        index = TaskIndex(catalogue, LOCAL, max_mib)
        near = await index.nearest(made[0], k=3, without="t0")
        table = np.stack([one.vector for one in made]) @ made[0].vector
        wanted = [f"t{i}" for i in np.argsort(-table) if i][:3]
        assert [one["id"] for one in near.found] == wanted
        assert near.compared == 6 and dict(near.elsewhere) == {other.digest: 1}
        assert index.num_bytes <= max_mib * 2**20
        assert {one["kind"] for one in (await index.nearest(made[0], k=9, kind="model")).found} == {"model"}
        catalogue.registry.delete("embedding", wanted[0], LOCAL)
        put(catalogue, "twin", made[0].vector.tolist())
        near = await index.nearest(made[0], k=3, without="t0")
        assert [one["id"] for one in near.found] == ["twin", *wanted[1:]]

    run(main)


# -- jobs on paper -----------------------------------------------------------------------------------------------------


def test_a_job_comes_back_from_its_bytes_to_the_last_bit() -> None:
    rows = np.random.default_rng(1).dirichlet([1, 1, 1], len(PROBES))
    answers = Answers.of_probabilities(PROBES.texts, ("a", "b", "c"), rows, np.sqrt(rows * (1 - rows)) / 4)
    job = TaskJob(kind="model", method="agreement", space="s" * 64, box={"backbone": "b", "adapter": [["e", 0.5]]})
    first, then = (answers.only([*part]) for part in (range(8), range(8, len(PROBES))))
    progress = TaskProgress(job=job).more(first, {"path": "plain"}, {"way": "x"}).more(then, None, {"way": "y"})
    again = TaskProgress.from_bytes(progress.to_bytes())
    assert again.to_bytes() == progress.to_bytes() and again.job.id == job.id
    assert again.answered is not None and again.answered.digest == answers.digest
    assert again.executed == {"path": "plain"} and again.source == {"way": "y"}
    with pytest.raises(CorruptArtefact, match="it cannot be read"):
        TaskProgress.from_bytes(progress.to_bytes()[:-2])
    with pytest.raises(CorruptArtefact, match="other labels"):
        joined(first, Answers.of_probabilities(PROBES.texts, ("a", "b"), np.full((len(PROBES), 2), 0.5)))


@pytest.mark.parametrize(("num", "begin"), [(512, 0), (129, 0), (65, 0), (130, 64), (64, 64), (2, 0)])
def test_parts_cover_all_texts_once_and_none_is_of_a_single_one(num: int, begin: int) -> None:
    parts = parts_of(num, begin, 64)
    assert [i for part in parts for i in part] == [*range(begin, num)]
    assert all(len(part) > 1 for part in parts)


def test_a_surrogate_of_other_weights_is_refused_each_time() -> None:
    other = SimpleNamespace(digest="0" * 64)
    embedder = TaskEmbedder(TaskSettings(), PROBES, SurrogateVectors(WordEncoder()), lambda: other)  # pyright: ignore[reportArgumentType]

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(Unavailable, match="other weights"):
                await embedder.space("prefix")

    run(main)
