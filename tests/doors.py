"""Small fake parts of the graph, and a door over them that a client calls without a network."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from actors.centroids import TenantsCentroids
from actors.encoder import Encoder
from actors.labelled import labelled_vectors
from actors.messages import (
    Build,
    Built,
    Classified,
    Classify,
    EncoderInfo,
    Explain,
    Explained,
    LabelledVectors,
    Media,
    SearchAsked,
    SelfChecked,
    Texts,
)
from cluster.door_settings import AdmissionSettings, HttpSettings, KeySettings
from cluster.settings import CentroidSettings, DispatchMargins, EncoderSettings, MixingSettings, TaskSettings
from metasepia.errors import UnknownName, WindowExceeded
from metasepia.experts.vectors import FactorIndex, index_path
from metasepia.models.prepared import PreparedBackbone
from metasepia.reasoning.named import EmbeddedContext
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import Artefact, Changes, Kind
from metasepia.registry.replays import Claim, ReplayStore
from metasepia.rows import Executed, HiddenStates, Row, Scores, TokenChunk
from serve.access.authentication import Access
from serve.app import create_app
from serve.door import Door
from serve.experts.accepting import Fits
from serve.experts.searching import Searches
from serve.load.admission import Admission
from serve.mixing_replica import ExpertMixingPart
from serve.parts import Catalogue, Mixing, Weights
from serve.shipped import ModuleCard
from serve.task_replica import TaskEmbeddingPart
from serve.tasks.part import TaskPart

HTTP = HttpSettings(max_body_mib=0.25)
DIGEST, EXPERT, OTHER = "b" * 64, "e" * 64, "f" * 64
A = ord("a") - ord("!")
"""The letter a in the byte tokenizer of the tests."""
UP, DOWN = "layers.0.up.weight", "layers.0.down.weight"
SHAPES = {UP: (6, 4), DOWN: (4, 6)}
INDEX = FactorIndex(digest="d" * 64, backbone=DIGEST, lengths={UP: 4, DOWN: 4})
SINGULAR = {name: np.array([4, 3, 2, 1], np.float32) for name in SHAPES}


class FakeBackbone:
    """Answers every row with `answer`, a byte-token a chunk."""

    def __init__(self, tokenizer_dir: Path) -> None:
        self.id = "tiny"
        self.prepared = PreparedBackbone(
            digest=DIGEST, path="", tokenizer_dir=str(tokenizer_dir), source="tiny", window=64, eos_token_ids=(257,),
            vocab_size=258, hidden_size=4, num_layers=1, model_type="llama",
        )  # fmt: skip
        self.answer: list[int] = []
        self.rows: list[Row] = []
        self.num_closed = 0
        self.error: Exception | None = None
        self.error_after = 0
        self.hang = False
        self.likes: tuple[str, float] = (EXPERT, 0.75)
        self.state_of: Callable[[Sequence[int]], np.ndarray] = lambda tokens: np.full(4, len(tokens), np.float32)

    def _executed(self, row: Row) -> Executed:
        return Executed(backbone=DIGEST, factors=None, adapter=row.adapter, path="plain", dtype="float32", tp_size=1)

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        self.rows.append(row)
        try:
            for index, token in enumerate(self.answer):
                if self.error is not None and index == self.error_after:
                    raise self.error
                await asyncio.sleep(0)
                last = index == len(self.answer) - 1
                yield TokenChunk(
                    request_id=row.request_id, token_ids=(token,), logprobs=(-0.5,), top=self._likeliest(row, token),
                    finish="stop" if last else None, executed=self._executed(row),
                )  # fmt: skip
            if self.hang:
                await asyncio.sleep(3600)
        finally:
            self.num_closed += 1

    def _likeliest(self, row: Row, token: int) -> tuple[tuple[tuple[int, float], ...], ...]:
        beside = ((token, -0.5), *((A + i, -1.0 - i) for i in range(row.top_logprobs - 1)))
        return (beside,) if row.top_logprobs else ()

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        """The likelier, the nearer the weight of the adapter's first expert is to `likes`."""
        self.rows += rows
        return [
            Scores(
                request_id=row.request_id,
                logprobs=np.full(len(row.token_ids) - row.score_from, -self._dislike(row), np.float32),
                executed=self._executed(row),
                **self._tops(row),
            )
            for row in rows
        ]

    def _tops(self, row: Row) -> dict[str, np.ndarray]:
        """The likeliest tokens are always the letters from a on."""
        if not row.top_logprobs:
            return {}
        letters = np.arange(A, A + row.top_logprobs)
        shape = (len(row.token_ids) - row.score_from, row.top_logprobs)
        return {"top_ids": np.broadcast_to(letters, shape), "top_logprobs": np.broadcast_to(float(A) - letters, shape)}

    def _dislike(self, row: Row) -> float:
        weight = dict(row.adapter).get(self.likes[0], 0.0)
        return 1 + abs(float(np.mean(weight)) - self.likes[1])

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        """Pooled by `last` or `mean`: `state_of` of the tokens; every token's: its id and layer."""
        self.rows += rows
        if self.error is not None:
            raise self.error
        if self.hang:
            try:
                await asyncio.sleep(3600)
            finally:
                self.num_closed += 1
        states = [np.stack([self.state_of(row.token_ids)] * len(row.hidden.layers)) for row in rows]
        for at, row in enumerate(rows):
            if row.hidden.pooling == "none":
                every = [[[token, layer, 0, 0] for token in row.token_ids] for layer in row.hidden.layers]
                states[at] = np.array(every, np.float32)
            if row.hidden.pooling == "spans":  # the mean token, and how many tokens stand before the span
                means = [[np.mean(row.token_ids[begin:end]), begin, 1, 0] for begin, end in row.hidden.spans]
                states[at] = np.array([means], np.float32)
        return [
            HiddenStates(request_id=row.request_id, states=one, executed=self._executed(row))
            for row, one in zip(rows, states, strict=True)
        ]

    async def load(self) -> dict[str, float]:
        return {"num_waiting": 3.0}


class FakeEncoder:
    """A text's vector is its length on the first axis, 1 on the second, made unit norm."""

    id = "minilm-fake"

    def __init__(self) -> None:
        self.digest = OTHER
        self.texts: list[str] = []
        """Everything embedded so far."""

    async def info(self) -> EncoderInfo:
        return EncoderInfo(id=self.id, digest=self.digest, width=2, window=8, dtype="float32", device="cpu")

    async def embed(self, items: Texts | Media) -> tuple[np.ndarray, int]:
        texts = items
        assert isinstance(texts, Texts)
        for index, text in enumerate(texts.texts):
            if len(text.split()) > 8:
                raise WindowExceeded(f"texts[{index}]", len(text.split()), 8)
        self.texts += texts.texts
        vectors = np.array([[len(text), 1.0] for text in texts.texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), len(texts.texts)

    async def statistics(self) -> dict[str, float]:
        return {"texts": float(len(self.texts))}

    async def check(self) -> None: ...


class NearEncoder:
    """A real encoder's worker in this process, where the graph would have it in another."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.id, self.worker = settings.id, Encoder(settings)

    async def info(self) -> EncoderInfo:
        return self.worker.info()

    async def embed(self, items: Texts | Media) -> tuple[np.ndarray, int]:
        return await self.worker.embed_counted(items)

    async def statistics(self) -> dict[str, float]:
        return self.worker.statistics()

    async def check(self) -> None:
        await self.worker.check()


class FakeReasoning:
    """The nearest example's label, with certainty; contexts that it built are known by their digests."""

    modules: Sequence[ModuleCard] = (ModuleCard("nearest", "d" * 64), ModuleCard("paper", "9" * 64))

    def __init__(self) -> None:
        self.blobs: Callable[[str], bytes] | None = None
        self.asked: list[Classify | Build | Explain] = []
        self.certainty = 1.0
        self.has_time = True

    def _labelled(self, context: LabelledVectors | str) -> LabelledVectors:
        if isinstance(context, LabelledVectors):
            return context
        assert self.blobs is not None
        return labelled_vectors(EmbeddedContext.from_bytes(self.blobs(context), context))

    async def classify(self, classify: Classify) -> Classified:
        self.asked.append(classify)
        context = self._labelled(classify.context)
        classes = tuple(sorted(set(context.labels)))
        rest = (1 - self.certainty) / max(1, len(classes) - 1)
        nearest = (classify.queries @ context.vectors.T).argmax(axis=1)
        probabilities = np.full((len(classify.queries), len(classes)), rest, np.float32)
        for row, at in enumerate(nearest):
            probabilities[row, classes.index(context.labels[at])] = self.certainty
        return Classified(
            classes=classes,
            probabilities=probabilities,
            context=context.digest,
            module=classify.module,
            compiled="now",
        )

    async def build(self, build: Build) -> Built:
        self.asked.append(build)
        classes = tuple(sorted(set(build.context.labels)))
        num = len(build.context.labels)
        checked = SelfChecked(accuracy=0.75, num_left_out=num, method="leave-one-out")
        return Built(classes=classes, num_bytes=1, self_check=checked if self.has_time else None)

    async def explain(self, explain: Explain) -> Explained:
        """An example's influence on every class is its similarity to the query."""
        self.asked.append(explain)
        context = self._labelled(explain.context)
        classes = tuple(sorted(set(context.labels)))
        similarity = explain.queries @ context.vectors.T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : explain.nearest]
        return Explained(
            classes=classes,
            influences=np.repeat(similarity[:, :, None], len(classes), axis=2),
            nearest=order,
            similarity=np.take_along_axis(similarity, order, axis=1),
        )

    async def statistics(self) -> dict[str, float]:
        return {"contexts_kept": 2.0}

    async def check(self) -> None: ...


class NoSearches:
    """Nobody has asked for any."""

    async def submit(self, asked: SearchAsked) -> dict[str, Any]:
        raise AssertionError("no search was to be asked for")

    async def listing(self, owner: str) -> list[dict[str, Any]]:
        return []

    async def get(self, owner: str, id_: str) -> Any:
        raise UnknownName("search", id_, ())

    trace = picture = cancel = get


class NearSearches:
    """The part that searches, in this process, where the graph would have it behind a handle."""

    def __init__(self, part: ExpertMixingPart) -> None:
        self.submit, self.get, self.listing = part.search, part.search_get, part.search_listing
        self.trace, self.picture, self.cancel = part.search_trace, part.search_picture, part.search_cancel


class NoTasks:
    """Nobody embeds any."""

    async def make(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no task was to be embedded")

    cancel = embed = search = nearest = nearest_of = make

    async def statistics(self) -> dict[str, float]:
        return {"tasks": 3.0}

    async def check(self) -> None: ...


class NoKeys:
    """The door asks for none."""

    async def create_key(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("no key was to be looked at")

    revoke_key = get_key = list_keys = exchange_keys = usage = create_key


class FakeMixing:
    """Every mixture of known experts is the one in the catalogue."""

    async def register(self, backbone: str, weights: Weights, owner: str, name: str | None) -> str:
        for name in weights:
            if name != "maths":
                raise UnknownName("expert", name, ("maths",))
        return "a" * 64


class RealCatalogue:
    """A registry in this process, for every kind."""

    def __init__(self, root: Path) -> None:
        self.registry = Registry(root)
        self.listed: list[Kind] = []

    async def put(self, kind: Kind, blob: bytes, **rest: Any) -> Artefact:
        return self.registry.put(kind, blob, **rest)

    async def resolve(self, kind: Kind, name: str, owner: str, *, deleted: bool = False) -> Artefact:
        return self.registry.resolve(kind, name, owner, deleted=deleted)

    async def list(self, kind: Kind, owner: str, *, after: str = "", limit: int = 1000) -> Sequence[Artefact]:
        self.listed.append(kind)
        return self.registry.list(kind, owner, after=after, limit=limit)

    async def changes(self, kind: Kind, owner: str, since: tuple[int, int] | None) -> Changes:
        return self.registry.changes(kind, owner, since)

    async def owners(self, kind: Kind) -> Sequence[str]:
        return self.registry.owners(kind)

    async def get(self, digest: str, owner: str | None = None) -> bytes:
        return self.registry.get(digest, owner)

    async def delete(self, kind: Kind, name: str, owner: str) -> Artefact:
        return self.registry.delete(kind, name, owner)


class FakeCatalogue:
    """One expert of the tiny backbone, one of another, one mixture."""

    def __init__(self) -> None:
        self.artefacts: tuple[Artefact, ...] = (
        Artefact(kind="expert", digest=EXPERT, name="maths", owner="shared", created_unix_s=1.0, num_bytes=1,
                 card={"backbone": DIGEST}),
        Artefact(kind="expert", digest=OTHER, name="law", owner="shared", created_unix_s=1.0, num_bytes=1,
                 card={"backbone": OTHER}),
        Artefact(kind="mixture", digest="a" * 64, name="a" * 64, owner="shared", created_unix_s=1.0, num_bytes=1,
                 card={"backbone": DIGEST, "adapter": [[EXPERT, 0.25], [OTHER, 0.75]]}),
    )  # fmt: skip

        self.registry: Registry | None = None
        """Holds the contexts."""

    async def put(self, kind: Kind, blob: bytes, **rest: Any) -> Artefact:
        assert self.registry is not None
        return self.registry.put(kind, blob, **rest)

    async def resolve(self, kind: Kind, name: str, owner: str, *, deleted: bool = False) -> Artefact:
        if kind == "context" and self.registry is not None:
            return self.registry.resolve(kind, name, owner, deleted=deleted)
        for one in self.artefacts:
            if one.kind == kind and name in (one.name, one.digest):
                return one
        raise UnknownName(kind, name, ())

    async def changes(self, kind: Kind, owner: str, since: tuple[int, int] | None) -> Changes:
        return Changes(revision=(0, 0), names=None)

    async def list(self, kind: Kind, owner: str, *, after: str = "", limit: int = 1000) -> Sequence[Artefact]:
        if kind == "context":
            return self.registry.list(kind, owner, after=after, limit=limit) if self.registry is not None else ()
        return [one for one in self.artefacts if one.kind == kind]

    async def get(self, digest: str) -> bytes:
        if self.registry is None:
            raise UnknownName("digest", digest, ())
        return self.registry.get(digest)

    async def delete(self, kind: Kind, name: str, owner: str) -> Artefact:
        assert self.registry is not None
        return self.registry.delete(kind, name, owner)


class NearReplays:
    """Answers by Idempotency-Key, in this process; opened when somebody sends a key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: ReplayStore | None = None
        self.error: Exception | None = None

    @property
    def store(self) -> ReplayStore:
        if self.error is not None:
            raise self.error
        if self._open is None:
            self._open = ReplayStore(self.root, max_bytes=1 << 20, keep_s=60.0)
        return self._open

    async def claim_replay(self, *asked: Any, timeout_s: float | None = None) -> Claim:
        return self.store.claim(*asked)

    async def keep_replay(self, *asked: Any, timeout_s: float | None = None) -> bool:
        return self.store.keep(*asked)

    async def let_go_of_replay(self, *asked: Any, timeout_s: float | None = None) -> None:
        self.store.let_go(*asked)


class Bench:
    """A door over fakes, and a client that calls it without a network."""

    def __init__(
        self,
        directory: Path,
        http: HttpSettings = HTTP,
        media: Sequence[NearEncoder] = (),
        observing: CentroidSettings | None = None,
    ) -> None:
        self.replays = NearReplays(directory)
        self.observing = observing or CentroidSettings()
        self.admission = AdmissionSettings()
        self.access = Access(KeySettings(), NoKeys())
        self.centroids = TenantsCentroids(self.observing, directory / "centroids")
        self.backbone, self.encoder, self.reasoning = FakeBackbone(directory), FakeEncoder(), FakeReasoning()
        self.catalogue = FakeCatalogue()
        self._open(http, media, FakeMixing(), self.catalogue, NoSearches())

    def _open(
        self,
        http: HttpSettings,
        media: Sequence[NearEncoder],
        mixing: Mixing,
        catalogue: Catalogue,
        searches: Searches,
        dispatch: Sequence[str] = ("centroid",),
        tasks: TaskPart | None = None,
        embedding_tasks: TaskSettings | None = None,
    ) -> None:
        self.door = Door(
            http,
            [self.backbone],
            [self.encoder, *media],
            self.reasoning,
            mixing,
            searches,
            catalogue,
            dispatch,
            DispatchMargins(),
            {"tiny": Fits(id="tiny", prepared=self.backbone.prepared, shapes=SHAPES, index=INDEX, s=SINGULAR)},
            self.centroids,
            self.observing,
            tasks or NoTasks(),
            embedding_tasks or TaskSettings(),
            Admission(self.admission),
            self.access,
        )
        self.app = create_app(self.door, self.replays)

    def with_contexts(self, root: Path) -> "Bench":
        """With a real registry for contexts."""
        self.catalogue.registry = Registry(root)
        self.reasoning.blobs = self.catalogue.registry.get
        return self

    def with_experts(self, root: Path, http: HttpSettings = HTTP) -> "Bench":
        """With a real registry for experts and mixtures, and real mixing."""
        self.real = RealCatalogue(root)
        index_path(INDEX.digest, root).parent.mkdir()
        index_path(INDEX.digest, root).write_text(INDEX.to_json())
        self.part = ExpertMixingPart(self.real, [self.backbone], MixingSettings(max_searches=3), root)
        self._open(http, (), self.part, self.real, NearSearches(self.part))
        return self

    def with_tasks(
        self, root: Path, encoder: FakeEncoder, settings: TaskSettings, http: HttpSettings = HTTP
    ) -> "Bench":
        """With a real registry, and the real part that embeds tasks, over this encoder."""
        self.real = RealCatalogue(root)
        self.reasoning.blobs = self.real.registry.get
        self.encoder = encoder

        def load() -> Any:
            raise AssertionError("no method was to be trained")

        self.task_part = TaskEmbeddingPart(settings, self.real, encoder, load, [self.backbone])
        self._open(http, (), FakeMixing(), self.real, NoSearches(), (), self.task_part, settings)
        return self

    def says(self, text: str) -> None:
        self.backbone.answer = [*self.door.prompts["tiny"].plain(text)]

    def run(self, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await talk(client)

        return asyncio.run(main())

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.run(lambda client: client.post(path, json=body, headers=headers))

    def get(self, path: str) -> httpx.Response:
        return self.run(lambda client: client.get(path))

    def delete(self, path: str) -> httpx.Response:
        return self.run(lambda client: client.delete(path))

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 7, **fields}
        return self.post("/v1/chat/completions", body)
