"""The part of the graph that embeds tasks: methods over the graph's encoder, black boxes over its backbones' handles.

It may die at any time: embeddings are in the registry, and jobs go on from their last answers when it is back.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from actors import logs, meters
from actors.messages import EncoderInfo, TaskAsked, Texts
from actors.registry import RegistryClient
from actors.task_embedding import Task, TaskEmbedder
from actors.task_jobs import Opened, TaskJobs, Turns
from actors.yielding import Yielding
from cluster.settings import Settings, TaskSettings
from metasepia.embedding import probes
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import MethodName, TaskEmbedding
from metasepia.errors import Outdated, Overloaded, Unavailable
from metasepia.registry.entries import Artefact
from metasepia.rows import Executed, HiddenStates, Row, Scores, TokenChunk
from serve import prepare
from serve.models.prompts import Prompts
from serve.parts import Backbone, ServedBackbone, ServedEncoder, TextEncoder
from serve.reached import Reached, told
from serve.tasks.bodies import prompt_of
from serve.tasks.index import Nearest, TaskIndex
from serve.tasks.part import Near, not_done

if TYPE_CHECKING:
    from metasepia.encoders import TextEncoder as LoadedEncoder

PATIENCE_S = 120.0
"""How long texts without a deadline of their own wait for an encoder that is full or away."""


class TaskEmbeddingPart:
    """`TaskEmbedder`, `TaskJobs` and `TaskIndex` over one registry."""

    def __init__(
        self,
        settings: TaskSettings,
        catalogue: Any,
        encoder: TextEncoder,
        load: "Callable[[], LoadedEncoder]",
        backbones: Sequence[Backbone],
    ) -> None:
        """`load` gives the encoder's weights, for methods that train."""
        self._settings, self._catalogue = settings, catalogue
        texts = probes.shipped().first(settings.num_probes)
        self.embedder = TaskEmbedder(settings, texts, SurrogateVectors(encoder), load)
        self._backbones = {one.prepared.digest: one for one in backbones}
        self._prompts: dict[str, Prompts] = {}
        self._turns = Turns(settings.max_batch)
        self._jobs: dict[str, TaskJobs] = {}
        self._indexes: OrderedDict[str, TaskIndex] = OrderedDict()
        self._counted = (0, 0)
        meters.SAMPLING.follow(self._tell)

    def _tell(self) -> None:
        told = self.embedder.statistics()
        counted = int(told["tasks"]), int(told["batches"])
        meters.TASKS.inc(counted[0] - self._counted[0])
        meters.TASK_BATCHES.inc(counted[1] - self._counted[1])
        self._counted = counted
        meters.TASKS_QUEUED.set(told["queued"], kind="at_hand")
        meters.TASKS_QUEUED.set(self.num_unfinished, kind="background")

    def jobs_of(self, owner: str) -> TaskJobs:
        """One tenant's; they take turns with all others'."""
        if owner not in self._jobs:
            self._jobs[owner] = TaskJobs(
                self._catalogue, self.embedder, self._open, self._settings, owner=owner, turns=self._turns
            )
        return self._jobs[owner]

    @property
    def num_unfinished(self) -> int:
        """Jobs that wait or run, of all tenants."""
        return sum(one.num_unfinished for one in self._jobs.values())

    async def recover(self) -> int:
        """Goes on with every tenant's jobs; how many."""
        return sum([await self.jobs_of(one).recover() for one in await self._catalogue.owners("embedding")])

    async def make(self, asked: TaskAsked) -> tuple[Artefact, bool]:
        return await self.jobs_of(asked.owner).make(asked)

    async def cancel(self, owner: str, id_: str) -> None:
        await self.jobs_of(owner).cancel(id_)

    async def embed(
        self,
        answers: Answers,
        *,
        method: MethodName | None = None,
        seed: int = 0,
        deadline_unix_s: float = float("inf"),
    ) -> TaskEmbedding:
        kind = "data_set" if answers.texts != self.embedder.probes.texts else "model"
        method = method or self._settings.method
        return await self.embedder.embed(
            Task(name="unnamed", kind=kind, answers=answers, method=method, seed=seed, deadline_unix_s=deadline_unix_s)
        )

    async def search(
        self, owner: str, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False
    ) -> Nearest:
        query = await self._registered(owner, id_)
        return await self._nearest(owner, query, k=k, kind=kind, with_expert=with_expert, without=id_)

    async def nearest(
        self, owner: str, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False
    ) -> Near:
        query = await self._registered(owner, id_)
        return (await self._nearest(owner, query, k=k, kind=kind, with_expert=with_expert)).found

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
        query = await self.embed(answers, method=method, deadline_unix_s=deadline_unix_s)
        return (await self._nearest(owner, query, k=k, kind=kind, with_expert=with_expert)).found

    async def _nearest(self, owner: str, query: TaskEmbedding, **asked: Any) -> Nearest:
        """By the tenant's index; those asked least recently leave while all hold more than `index_mib`."""
        if owner not in self._indexes:
            self._indexes[owner] = TaskIndex(self._catalogue, owner, self._settings.index_mib)
        self._indexes.move_to_end(owner)
        found = await self._indexes[owner].nearest(query, **asked)
        while len(self._indexes) > 1 and self._index_bytes > self._settings.index_mib * 2**20:
            self._indexes.popitem(last=False)
        return found

    @property
    def _index_bytes(self) -> int:
        return sum(one.num_bytes for one in self._indexes.values())

    async def statistics(self) -> dict[str, float]:
        return self.embedder.statistics() | {
            "jobs": self.num_unfinished,
            "indexed": sum(one.num_kept for one in self._indexes.values()),
            "index_bytes": self._index_bytes,
        }

    async def check(self) -> None:
        await self.embedder.check()

    async def _registered(self, owner: str, id_: str) -> TaskEmbedding:
        found = await self._catalogue.resolve("embedding", id_, owner)
        if found.card.get("status") != "done":
            raise not_done(found)
        return TaskEmbedding.from_bytes(await self._catalogue.get(found.digest))

    def _open(self, box: Mapping[str, Any]) -> Opened:
        from metasepia.blackbox.local import LocalModel  # most lives ask no model

        backbone = self._backbones.get(box["backbone"])
        if backbone is None:
            served = tuple(f"{one.id} ({one.prepared.digest[:12]})" for one in self._backbones.values())
            raise Outdated("the task", "backbone", str(box["backbone"])[:12], served)
        if backbone.id not in self._prompts:
            self._prompts[backbone.id] = Prompts(Path(backbone.prepared.tokenizer_dir), backbone.id)
        rows = _Watched(Yielding(backbone.prepared.digest, Reached(backbone)))
        adapter = tuple((digest, tuple(w) if isinstance(w, list) else w) for digest, w in box["adapter"])
        prompt, chat = prompt_of(box["prompt"])
        tokens, card = self._prompts[backbone.id], backbone.prepared
        model = LocalModel(rows, tokens, prompt, adapter=adapter, chat=chat, prepared=card)
        return Opened(model, lambda: rows.executed)


class _Watched:
    """Rows that remember what was run for them."""

    def __init__(self, rows: Yielding) -> None:
        self._rows, self.digest = rows, rows.digest
        self.capabilities = frozenset({"generate", "score", "hidden_states", "row_adapters"})
        self.executed: Executed | None = None

    async def score(self, row: Row) -> Scores:
        answer = await self._rows.score(row)
        self.executed = answer.executed
        return answer

    async def hidden_states(self, row: Row) -> HiddenStates:
        answer = await self._rows.hidden_states(row)
        self.executed = answer.executed
        return answer

    async def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        async for chunk in self._rows.generate(row):
            self.executed = chunk.executed or self.executed
            yield chunk


class SurrogateVectors:
    """An encoder of the graph as the surrogate of task embeddings; one that is full or away is waited for."""

    digest: str
    width: int
    window: int

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._info: EncoderInfo | None = None

    async def ready(self) -> None:
        if self._info is None:
            try:
                self._info = await self._encoder.info()
            except Exception as error:
                raise told(error, f"encoder {self._encoder.id}") from error
            self.digest, self.width, self.window = self._info.digest, self._info.width, self._info.window

    async def embed(self, texts: Sequence[str], deadline_unix_s: float) -> np.ndarray:
        await self.ready()
        give_up_s = min(deadline_unix_s, time.time() + PATIENCE_S)
        message = Texts(encoder=self.digest, texts=tuple(texts), deadline_unix_s=give_up_s)
        while True:
            try:
                return (await self._encoder.embed(message))[0]
            except Exception as error:
                ours = told(error, f"encoder {self._encoder.id}")
                pause_s = min(getattr(ours, "retry_after_s", 1.0), 5.0)
                if not isinstance(ours, Overloaded | Unavailable) or time.time() + pause_s > give_up_s:
                    raise ours from error
                await asyncio.sleep(pause_s)


class TaskEmbeddingReplica(TaskEmbeddingPart):
    """What Serve runs; it goes on with the jobs that its predecessor left."""

    async def __init__(
        self,
        settings: Settings,
        registry: RegistryClient,
        encoder: DeploymentHandle[Any],
        backbones: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        logs.begin()
        surrogate = settings.surrogate

        def load() -> "LoadedEncoder":
            from metasepia.encoders import TextEncoder as Loaded

            return Loaded.load(surrogate.source, surrogate.device, max_batch_tokens=surrogate.max_batch_tokens)

        prepared = await asyncio.to_thread(prepare.ready, settings)
        served = [ServedBackbone(id_, prepared[id_], handle) for id_, handle in backbones.items()]
        super().__init__(settings.tasks, registry, ServedEncoder(surrogate.id, encoder), load, served)
        await self.recover()

    async def __del__(self) -> None:
        # Serve awaits this when it takes the replica down.
        if hasattr(self, "_jobs"):
            for one in self._jobs.values():
                await one.stop()
            await asyncio.to_thread(self.embedder.stop)
