"""The part of the graph that embeds tasks: methods over the graph's encoder, black boxes over its backbones' handles.

It may die at any time: embeddings are in the registry, and jobs go on from their last answers when it is back.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from actors import logs, meters
from actors.messages import EncoderInfo, TaskAsked, Texts
from actors.registry import RegistryClient
from actors.task_embedding import Task, TaskEmbedder
from actors.task_jobs import Opened, TaskJobs
from actors.yielding import Yielding
from cluster.settings import Settings, TaskSettings
from metasepia.embedding import probes
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import MethodName, TaskEmbedding
from metasepia.errors import Outdated, Overloaded, Unavailable
from metasepia.registry.entries import Artefact
from metasepia.rows import Executed, HiddenStates, Row, Scores, TokenChunk
from serve import prepare
from serve.names import OWNER
from serve.parts import Backbone, ServedBackbone, ServedEncoder, TextEncoder
from serve.prompts import Prompts
from serve.reached import Reached, told
from serve.task_bodies import prompt_of
from serve.task_index import Nearest, TaskIndex
from serve.task_part import Near, not_done

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
        owner: str = OWNER,
    ) -> None:
        """`load` gives the encoder's weights, for methods that train."""
        self._settings, self._catalogue, self._owner = settings, catalogue, owner
        texts = probes.shipped().first(settings.num_probes)
        self.embedder = TaskEmbedder(settings, texts, SurrogateVectors(encoder), load)
        self._backbones = {one.prepared.digest: one for one in backbones}
        self._prompts: dict[str, Prompts] = {}
        self.jobs = TaskJobs(catalogue, self.embedder, self._open, settings, owner=owner)
        self._index = TaskIndex(catalogue, owner, settings.index_mib)
        self._counted = (0, 0)
        meters.SAMPLING.follow(self._tell)

    def _tell(self) -> None:
        told = self.embedder.statistics()
        counted = int(told["tasks"]), int(told["batches"])
        meters.TASKS.inc(counted[0] - self._counted[0])
        meters.TASK_BATCHES.inc(counted[1] - self._counted[1])
        self._counted = counted
        meters.TASKS_QUEUED.set(told["queued"], kind="at_hand")
        meters.TASKS_QUEUED.set(self.jobs.num_unfinished, kind="background")

    async def make(self, asked: TaskAsked) -> tuple[Artefact, bool]:
        return await self.jobs.make(asked)

    async def cancel(self, id_: str) -> None:
        await self.jobs.cancel(id_)

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

    async def search(self, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False) -> Nearest:
        query = await self._registered(id_)
        return await self._index.nearest(query, k=k, kind=kind, with_expert=with_expert, without=id_)

    async def nearest(self, id_: str, *, k: int, kind: str | None = None, with_expert: bool = False) -> Near:
        query = await self._registered(id_)
        return (await self._index.nearest(query, k=k, kind=kind, with_expert=with_expert)).found

    async def nearest_of(
        self,
        answers: Answers,
        *,
        k: int,
        kind: str | None = None,
        with_expert: bool = False,
        method: MethodName | None = None,
        deadline_unix_s: float = float("inf"),
    ) -> Near:
        query = await self.embed(answers, method=method, deadline_unix_s=deadline_unix_s)
        return (await self._index.nearest(query, k=k, kind=kind, with_expert=with_expert)).found

    async def statistics(self) -> dict[str, float]:
        return self.embedder.statistics() | {
            "jobs": self.jobs.num_unfinished,
            "indexed": self._index.num_kept,
            "index_bytes": self._index.num_bytes,
        }

    async def check(self) -> None:
        await self.embedder.check()

    async def _registered(self, id_: str) -> TaskEmbedding:
        found = await self._catalogue.resolve("embedding", id_, self._owner)
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
        await self.jobs.recover()

    async def __del__(self) -> None:
        # Serve awaits this when it takes the replica down.
        if hasattr(self, "jobs"):
            await self.jobs.stop()
            await asyncio.to_thread(self.embedder.stop)
