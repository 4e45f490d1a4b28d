"""A tiny world for task embeddings: probe texts of two topics and two tones, an encoder of their words, and a model
that answers by topic."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.messages import EncoderInfo, Media, Texts
from cluster.door_settings import HttpSettings
from cluster.settings import TaskSettings
from metasepia.embedding.probes import ProbeTexts
from metasepia.errors import WindowExceeded
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.entries import LOCAL
from metasepia.rows import Row, Scores
from serve.models.prompts import Prompts
from tests.doors import DIGEST, INDEX, UP, Bench, FakeBackbone, FakeEncoder
from tests.unit.test_prompts import write_byte_tokenizer

ANIMALS = ("cat", "dog", "owl", "bee", "fox", "cow")
TOOLS = ("saw", "axe", "awl", "jig", "vice", "file")
TONES = ("good", "bad")
PROBES = ProbeTexts.of_texts([f"{tone} {thing}" for thing in (*ANIMALS, *TOOLS) for tone in TONES])
WIDTH, WINDOW = 32, 12
SETTINGS = TaskSettings(num_probes=len(PROBES), max_jobs=3, max_queued=4)


def topic_of(text: str) -> str:
    return "animal" if any(one in text for one in ANIMALS) else "tool"


def data_set(by: str, *, names: tuple[str, str] = ("a", "b"), seed: int = 0, num: int = 24) -> list[dict[str, str]]:
    """Texts told apart by `topic` or by `tone`."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, str]] = []
    for i in range(num):
        thing = str(rng.choice((*ANIMALS, *TOOLS)))
        tone = TONES[int(rng.integers(2))]
        which = (thing in TOOLS) if by == "topic" else (tone == "bad")
        found.append({"text": f"{tone} {thing} number {i}", "label": names[int(which)]})
    return found


class WordEncoder(FakeEncoder):
    """The mean of its words' vectors; animals are alike, tools are alike, and so are the tones."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    async def info(self) -> EncoderInfo:
        return EncoderInfo(id=self.id, digest=self.digest, width=WIDTH, window=WINDOW, dtype="float32", device="cpu")

    async def embed(self, items: Texts | Media) -> tuple[np.ndarray, int]:
        assert isinstance(items, Texts)
        if self.error is not None:
            raise self.error
        for place, text in enumerate(items.texts):
            if len(text.split()) > WINDOW:
                raise WindowExceeded(f"texts[{place}]", len(text.split()), WINDOW)
        self.texts += items.texts
        vectors = np.stack([np.sum([_vector(word) for word in text.split() or ["-"]], 0) for text in items.texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), len(items.texts)


def _vector(word: str) -> np.ndarray:
    group = "animal" if word in ANIMALS else "tool" if word in TOOLS else word

    def noise(text: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        return np.random.default_rng(seed).standard_normal(WIDTH)

    return noise(group) + 0.3 * noise(word)


class TopicModel(FakeBackbone):
    """Finds `yes` likely of animals and `no` of tools, the more so with an adapter."""

    _prompts: Prompts | None = None

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        if self.error is not None:
            raise self.error
        self.rows += rows
        return [self._score(row) for row in rows]

    def _score(self, row: Row) -> Scores:
        text, answer = self.text(row.token_ids[: row.score_from]), self.text(row.token_ids[row.score_from :])
        right = (topic_of(text) == "animal") == ("yes" in answer)
        tone = 0.3 * ("good" in text)
        each = (-0.1 if right else -1.5 - bool(row.adapter)) - tone * right
        logprobs = np.full(len(row.token_ids) - row.score_from, each, np.float32)
        return Scores(request_id=row.request_id, logprobs=logprobs, executed=self._executed(row))

    def text(self, token_ids: Sequence[int]) -> str:
        if self._prompts is None:
            self._prompts = Prompts(Path(self.prepared.tokenizer_dir), self.id)
        return self._prompts.text(token_ids)


def a_task_bench(tmp_path: Path, settings: TaskSettings = SETTINGS) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path))
    made.backbone = TopicModel(tmp_path)
    made.with_tasks(tmp_path / "registry", WordEncoder(), settings, HttpSettings(max_body_mib=0.25, max_examples=256))
    expert = ExpertVectors(backbone=DIGEST, factors=INDEX.digest, z={UP: np.full(4, 1.5, np.float32)})
    card: dict[str, object] = {"backbone": DIGEST}
    made.real.registry.put("expert", expert.to_bytes(), digest=expert.digest, name="maths", owner=LOCAL, card=card)
    return made
