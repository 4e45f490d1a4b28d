"""Small fake parts of the graph, and a door over them that a client calls without a network."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from actors.messages import Classified, Classify, EncoderInfo, Texts
from cluster.settings import HttpSettings
from metasepia.errors import UnknownName, WindowExceeded
from metasepia.prepared import PreparedBackbone
from metasepia.registry import Artefact
from metasepia.rows import Executed, HiddenStates, Row, TokenChunk
from serve.gateway import Door, create_app

HTTP = HttpSettings(max_body_mib=0.25)
DIGEST, EXPERT, OTHER = "b" * 64, "e" * 64, "f" * 64


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
                    request_id=row.request_id, token_ids=(token,), logprobs=(0.0,),
                    finish="stop" if last else None, executed=self._executed(row),
                )  # fmt: skip
            if self.hang:
                await asyncio.sleep(3600)
        finally:
            self.num_closed += 1

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        states = [np.full((1, 4), float(len(row.token_ids)), np.float32) for row in rows]
        return [
            HiddenStates(request_id=row.request_id, states=one, executed=self._executed(row))
            for row, one in zip(rows, states, strict=True)
        ]

    async def load(self) -> dict[str, float]:
        return {"num_waiting": 3.0}


class FakeEncoder:
    """A text's vector is its length on the first axis, 1 on the second, made unit norm."""

    id = "minilm-fake"

    async def info(self) -> EncoderInfo:
        return EncoderInfo(id=self.id, digest=OTHER, width=2, window=8, dtype="float32", device="cpu")

    async def embed(self, texts: Texts) -> tuple[np.ndarray, int]:
        for index, text in enumerate(texts.texts):
            if len(text.split()) > 8:
                raise WindowExceeded(f"texts[{index}]", len(text.split()), 8)
        vectors = np.array([[len(text), 1.0] for text in texts.texts], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), len(texts.texts)

    async def check(self) -> None: ...


class FakeReasoning:
    """The nearest example's label, with certainty."""

    name, digest = "nearest", "d" * 64

    async def classify(self, classify: Classify) -> Classified:
        classes = tuple(sorted(set(classify.context.labels)))
        nearest = (classify.queries @ classify.context.vectors.T).argmax(axis=1)
        probabilities = np.zeros((len(classify.queries), len(classes)), np.float32)
        for row, at in enumerate(nearest):
            probabilities[row, classes.index(classify.context.labels[at])] = 1
        return Classified(
            classes=classes, probabilities=probabilities, context="c" * 64, module=self.digest, compiled="now"
        )

    async def check(self) -> None: ...


class FakeMixing:
    """Every mixture of known experts is the one in the catalogue."""

    async def register(self, backbone: str, weights: Mapping[str, float]) -> str:
        for name in weights:
            if name != "maths":
                raise UnknownName("expert", name, ("maths",))
        return "a" * 64


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

    async def resolve(self, kind: str, name: str, owner: str) -> Artefact:
        for one in self.artefacts:
            if (one.kind, one.name, one.owner) == (kind, name, owner):
                return one
        raise UnknownName(kind, name, ())

    async def list(self, kind: str, owner: str) -> list[Artefact]:
        return [one for one in self.artefacts if (one.kind, one.owner) == (kind, owner)]

    async def get(self, digest: str) -> bytes:
        raise UnknownName("digest", digest, ())


class Bench:
    """A door over fakes, and a client that calls it without a network."""

    def __init__(self, directory: Path) -> None:
        self.backbone, self.encoder, self.reasoning = FakeBackbone(directory), FakeEncoder(), FakeReasoning()
        self.catalogue = FakeCatalogue()
        self.door = Door(
            HTTP, [self.backbone], [self.encoder], self.reasoning, FakeMixing(), self.catalogue, ("centroid",)
        )
        self.app = create_app(self.door)

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

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 7, **fields}
        return self.post("/v1/chat/completions", body)
