"""One run: every task answered, then embedded, on Ray actors and, for endpoints, in this process's event loop.

What is kept in the run's folder is never computed or paid for again, and which process computed it leaves no trace:
batches are fixed by the specification, so the embeddings are the same bytes for any number of workers and after kills.
"""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.embedding.files import Answered, RunFiles
from jobs.embedding.plan import BackboneUnit, EndpointUnit, Task, source_of
from jobs.embedding.progress import Bar, Told
from jobs.embedding.spec import MethodSpec, Spec
from jobs.embedding.work import Embedding, ToEmbed
from metasepia.blackbox.boxes import Progress
from metasepia.blackbox.errors import CacheFailed, EndpointUnavailable
from metasepia.blackbox.keys import Key
from metasepia.blackbox.meter import Meter
from metasepia.digests import digest_of
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.errors import InvalidSettings

if TYPE_CHECKING:
    from metasepia.encoders import TextEncoder


@dataclass(kw_only=True)
class Run:
    """A run's tasks and what has become of them. `wall_s` and counts of this run are for people."""

    spec: Spec
    tasks: Sequence[Task]
    files: RunFiles
    home: Path
    meter: Meter
    batch: int
    """Tasks embedded at once."""
    answered: dict[str, Answered] = field(default_factory=dict)
    embedded: dict[str, list[TaskEmbedding]] = field(default_factory=dict)
    """By method, in the order of the tasks."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a task was not answered, by its name."""
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    """Why a method has no embedding of a task that was answered."""
    num_kept: int = 0
    """Tasks whose answers were there before."""
    texts_asked: int = 0
    tokens: int = 0
    wall_s: float = 0.0

    @property
    def todo(self) -> list[Task]:
        return [task for task in self.tasks if task.name not in self.answered and task.name not in self.failed]

    def find_kept(self) -> None:
        """Takes up what earlier runs answered."""
        for task in self.tasks:
            kept = self.files.answered(task.name, task.key)
            if kept is not None:
                self.answered[task.name] = kept
        self.num_kept = len(self.answered)

    def check_keys(self) -> None:
        """Raises MissingKey where an endpoint that is still to be asked has none."""
        for task in self.todo:
            if isinstance(task.unit, EndpointUnit):
                settings = task.unit.spec.settings
                Key(settings.key_env, settings.endpoint).check()

    def estimate(self) -> float | None:
        """Most that endpoints will take; None where nothing is asked or no prices are known."""
        boxes = [task.unit.box for task in self.todo if isinstance(task.unit, EndpointUnit)]
        costs = [box.estimate(self.spec.probes.texts).cost for box in boxes]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tasks that are embedded in one call."""

    part: str
    """Under which the result is kept."""
    items: tuple[ToEmbed, ...]


def execute(run: Run, *, encoder: "TextEncoder", workers: int, address: str | None, progress: bool) -> None:
    """Answers and embeds all that is missing. Ctrl-C and SIGTERM raise KeyboardInterrupt, with all that was done kept.

    Raises InvalidSettings for settings that a method has not, CannotPlace where the cluster has no room, StorageFailed
    where results cannot be kept.
    """
    began = time.monotonic()
    spaces = [_embedding(run.spec, one, encoder).method.space for one in run.spec.methods]
    asked = [task for task in run.todo if task.asks]
    told = Told(len(run.tasks), len(asked) * len(run.spec.probes), len(run.tasks) * len(spaces), run.meter)
    told.answered = told.kept = run.num_kept
    told.estimate = run.estimate()
    try:
        with Bar(told, shown=progress) as bar, contextlib.ExitStack() as stack:
            asyncio.run(_Execution(run, told, bar, workers, address, stack).all(spaces))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    run.texts_asked, run.tokens = told.texts_done, told.tokens
    run.wall_s = time.monotonic() - began


class _Execution:
    """What `execute` does, in one event loop."""

    def __init__(
        self,
        run: Run,
        told: Told,
        bar: Bar,
        workers: int,
        address: str | None,
        stack: contextlib.ExitStack,
    ) -> None:
        """`stack`: leaves Ray at the end, if it was needed."""
        self._run, self._told, self._bar = run, told, bar
        self._workers, self._address, self._stack = workers, address, stack
        self._has_cluster = False

    async def all(self, spaces: Sequence[Space]) -> None:
        run = self._run
        _heed_signals()
        showing = asyncio.create_task(self._show())
        try:
            local = [task for task in run.todo if not isinstance(task.unit, EndpointUnit)]
            remote = [task for task in run.todo if isinstance(task.unit, EndpointUnit)]
            if local:
                self._need_cluster()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._answer(local))
                for tasks in _by_endpoint(remote):
                    group.create_task(self._ask_one_after_another(tasks))
            for one, space in zip(run.spec.methods, spaces, strict=True):
                run.embedded[one.name] = await self._embed(one, space)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            showing.cancel()

    # -- answers

    async def _answer(self, tasks: Sequence[Task]) -> None:
        """Data sets, functions and backbones; those on one backbone together, since a process holds one at a time."""
        from jobs.embedding.actors import AnsweringActor
        from jobs.embedding.pool import Pool

        probes, home = self._run.spec.probes, self._run.home
        for gpus in (0, 1):
            chosen = sorted((task for task in tasks if _gpus(task) == gpus), key=_backbone_of)
            if not chosen:
                continue
            make = AnsweringActor.options(num_cpus=1, num_gpus=gpus, max_concurrency=2)
            pool = Pool[Task](
                lambda make=make: make.remote(probes, home),
                lambda actor, task: actor.answer.remote(task.unit),
                workers=self._workers,
                took=self._take_answers,
                failed=self._fail,
                told=self._hear_actor,
            )
            await pool.run(chosen)

    async def _ask_one_after_another(self, tasks: Sequence[Task]) -> None:
        """Prompts of one endpoint, each with as many requests in flight as its settings say.

        Once a model is silent for longer than its patience its other prompts are not asked: each would wait as long.
        CacheFailed ends the run, since nothing more that is paid for could be kept.
        """
        from jobs.embedding.pool import words_of

        silent: dict[str, str] = {}
        for task in tasks:
            assert isinstance(task.unit, EndpointUnit)
            box, model = task.unit.box, task.unit.spec.name
            if model in silent:
                self._fail(task, f"not asked: {silent[model]}")
                continue
            try:
                answers = await box.answer(self._run.spec.probes.texts, told=lambda told, t=task: self._hear(t, told))
            except CacheFailed:
                raise
            except Exception as error:  # one endpoint that fails leaves the others their time
                self._fail(task, words_of(error))
                if isinstance(error, EndpointUnavailable):
                    silent[model] = f"{model} gave no answer to {box.prompt.name} ({error.problem})"
            else:
                self._take_answers(task, (Answered(answers=answers, source=dict(box.source())), 0))

    def _take_answers(self, task: Task, result: tuple[Answered, int]) -> None:
        """`result`: with tokens that no meter counts."""
        answered, tokens = result
        self._run.files.keep_answers(task.name, task.key, answered)
        self._run.answered[task.name] = answered
        self._told.answered += 1
        self._told.finish(task.name, len(self._run.spec.probes) if task.asks else 0, tokens)

    def _fail(self, task: Task, words: str) -> None:
        self._run.failed[task.name] = words
        self._told.failed += 1
        self._told.finish(task.name, len(self._run.spec.probes) if task.asks else 0, 0)

    def _hear_actor(self, task: Task, told: Progress | None) -> None:
        if told is not None:
            self._told.live[task.name] = told.done, told.prompt_tokens + told.completion_tokens

    def _hear(self, task: Task, told: Progress) -> None:
        self._told.live[task.name] = told.done, 0  # the meter counts tokens
        if told.waiting:
            self._told.waiting[task.name] = f"{told.name}: {told.waiting}"
        else:
            self._told.waiting.pop(task.name, None)

    # -- embeddings

    async def _embed(self, method: MethodSpec, space: Space) -> list[TaskEmbedding]:
        """In the order of the tasks."""
        from jobs.embedding.actors import EmbeddingActor
        from jobs.embedding.pool import Pool

        run = self._run
        batches = _batches(run, space)
        done: dict[str, list[TaskEmbedding]] = {}
        todo: list[Batch] = []
        for one in batches:
            kept = run.files.embedded(one.part)
            if kept is None:
                todo.append(one)
            else:
                self._take_embeddings(method, one, kept, done)

        def took(one: Batch, result: tuple[list[TaskEmbedding], dict[str, str]]) -> None:
            run.files.keep_embedded(one.part, *result)
            self._take_embeddings(method, one, result, done)

        def failed(one: Batch, words: str) -> None:
            self._take_embeddings(method, one, ([], {item.name: words for item in one.items}), done)

        if todo:
            self._need_cluster()
            spec = run.spec
            gpus = 1 if spec.device == "cuda" else 0
            make = EmbeddingActor.options(num_cpus=1, num_gpus=gpus, max_concurrency=2)
            pool = Pool[Batch](
                lambda: make.remote(spec, method),
                lambda actor, one: actor.embed.remote(one.items),
                workers=self._workers,
                took=took,
                failed=failed,
            )
            await pool.run(todo)
        return [embedding for one in batches for embedding in done[one.part]]

    def _take_embeddings(
        self,
        method: MethodSpec,
        one: Batch,
        result: tuple[list[TaskEmbedding], Mapping[str, str]],
        done: dict[str, list[TaskEmbedding]],
    ) -> None:
        found, refused = result
        done[one.part] = found
        for name, words in refused.items():
            self._run.refused[method.name, name] = words
        self._told.embedded += len(found)
        self._told.failed += len(refused)

    # -- around

    def _need_cluster(self) -> None:
        from jobs.embedding.pool import cluster

        if not self._has_cluster:
            gpus = float(self._run.spec.device == "cuda" or any(_gpus(task) for task in self._run.todo))
            self._workers = self._stack.enter_context(cluster(self._address, self._workers, gpus))
            self._has_cluster = True
            _heed_signals()  # Ray has put its own handlers in their place

    async def _show(self) -> None:
        while True:
            self._bar.show()
            await asyncio.sleep(0.25)


def _heed_signals() -> None:
    """Ctrl-C and SIGTERM cancel the run, which then kills its actors."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    if threading.current_thread() is not threading.main_thread():
        return
    for one in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(one, task.cancel)


def _embedding(spec: Spec, method: MethodSpec, encoder: "TextEncoder") -> Embedding:
    try:
        return Embedding(encoder, spec.probes, method.name, method.settings, seed=spec.seed, redraws=spec.redraws)
    except InvalidSettings as error:
        raise InvalidSettings(f"{method.place}.settings.{error.field}", error.value, error.allowed) from None


def _batches(run: Run, space: Space) -> list[Batch]:
    """By the place of the tasks in the specification, so that one that fails moves no other into another batch."""
    made: list[Batch] = []
    for begin in range(0, len(run.tasks), run.batch):
        items = tuple(
            ToEmbed(
                name=task.name,
                kind=task.kind,
                answered=run.answered[task.name],
                source=source_of(task),
                long_texts=task.long_texts,
            )
            for task in run.tasks[begin : begin + run.batch]
            if task.name in run.answered
        )
        if items:
            told = [
                [
                    one.name,
                    one.kind,
                    one.answered.answers.digest,
                    dict(one.answered.source),
                    dict(one.source),
                    one.long_texts,
                ]
                for one in items
            ]
            key = digest_of({"space": space.digest, "seed": run.spec.seed, "redraws": run.spec.redraws, "tasks": told})
            made.append(Batch(part=f"{space.method}-{key[:16]}", items=items))
    return made


def _by_endpoint(tasks: Sequence[Task]) -> list[list[Task]]:
    found: dict[str, list[Task]] = {}
    for task in tasks:
        assert isinstance(task.unit, EndpointUnit)
        found.setdefault(task.unit.spec.settings.base_url, []).append(task)
    return list(found.values())


def _gpus(task: Task) -> int:
    return int(isinstance(task.unit, BackboneUnit) and task.unit.spec.device == "cuda")


def _backbone_of(task: Task) -> str:
    return task.unit.spec.name if isinstance(task.unit, BackboneUnit) else ""
