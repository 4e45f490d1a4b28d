"""Answers of the real door over real parts in one process, replayed; and every way in which they may differ."""

import copy
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from actors.centroids import TenantsCentroids
from actors.messages import Build, Built, Classified, Classify, Explain, Explained
from actors.reasoning_pool import ReasoningPool
from cluster.door_settings import AdmissionSettings, KeySettings
from cluster.settings import (
    BackboneSettings,
    CentroidSettings,
    DispatchMargins,
    EncoderSettings,
    ReasoningSettings,
    Settings,
    TaskSettings,
)
from jobs.replay import __main__ as program
from jobs.replay import completions, files
from jobs.replay.parts import Parts
from jobs.replay.report import Report
from metasepia.backbone import ReferenceBackbone
from metasepia.digests import digest_of
from metasepia.errors import CorruptArtefact, InvalidRequest, UnknownName
from metasepia.experts.factors import factors_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.mixing import base_of, mixture_blob, mixture_digest
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.shipped import LoadedModule
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import Artefact
from metasepia.rows import Adapter, HiddenStates, Row, Scores, TokenChunk
from serve.access.authentication import Access
from serve.app import create_app
from serve.door import Door
from serve.load.admission import Admission
from serve.shipped import ModuleCard
from tests.doors import (
    HTTP,
    OTHER,
    Bench,
    FakeCatalogue,
    FakeEncoder,
    FakeMixing,
    NearReplays,
    NoKeys,
    NoSearches,
    NoTasks,
)

MODULE = "5" * 64
EXAMPLES = [
    {"text": "good", "label": "praise"},
    {"text": "it broke at once", "label": "complaint"},
    {"text": "kind", "label": "praise"},
    {"text": "charged twice for it", "label": "complaint"},
]


class Embedded:
    """The fake encoder, asked directly."""

    digest = OTHER

    def embed(self, items: Sequence[str], /) -> np.ndarray:
        vectors = np.array([[len(text), 1.0] for text in items], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class OneProcess:
    """The reference in the place of a gang."""

    id = "tiny"

    def __init__(self, prepared: PreparedBackbone, reference: ReferenceBackbone) -> None:
        self.prepared, self.reference = prepared, reference

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        async for chunk in self.reference.generate(row):
            yield chunk

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        return [await self.reference.score(row) for row in rows]

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        return [await self.reference.hidden_states(row) for row in rows]

    async def load(self) -> dict[str, float]:
        return {}


class Pooled:
    """The real pool, without Serve."""

    modules: Sequence[ModuleCard] = (ModuleCard("random", MODULE),)

    def __init__(self, pool: ReasoningPool) -> None:
        self._pool = pool

    async def classify(self, classify: Classify) -> Classified:
        return await self._pool.classify(classify)

    async def build(self, build: Build) -> Built:
        return await self._pool.build(build)

    async def explain(self, explain: Explain) -> Explained:
        return await self._pool.explain(explain)

    async def statistics(self) -> dict[str, float]:
        return {}

    async def check(self) -> None: ...


class Here(Parts):
    """With an encoder and a module that are not on disk."""

    def __init__(self, settings: Settings, loaded: LoadedModule) -> None:
        super().__init__(settings)
        self._loaded = loaded

    def module(self, digest: str) -> LoadedModule:
        if digest != MODULE:
            raise UnknownName("reasoning module", digest, (MODULE,))
        return self._loaded

    def encoder(self, digest: str) -> Embedded:
        if digest != OTHER:
            raise UnknownName("encoder", digest, (OTHER,))
        return Embedded()


class World:
    """A door, its registry, and the parts to replay with."""

    def __init__(self, home: Path, checkpoint: Path) -> None:
        backbone = BackboneSettings(id="tiny", source=str(checkpoint), expert_layers=("mlp.up_proj",))
        encoder = EncoderSettings(id="minilm-fake", source="nowhere")
        settings = Settings(backbones=(backbone,), encoders=(encoder,), home=home)
        prepared = checkpoints.prepare(backbone.source, home)
        module = ReasoningModule(ModuleShape(dims=2, pairs=17, layers=1, width=16, heads=2), seed=1)
        for parameter in module.requires_grad_(False).parameters():
            parameter.mul_(8.0)
        loaded = LoadedModule("random", MODULE, module, {})
        self.parts = Here(settings, loaded)
        reference = self.parts.reference(prepared.digest)
        factors = factors_of(reference.model, ("mlp.up_proj",), prepared.digest, home, progress=False)
        rng = np.random.default_rng(0)
        z = {name: rng.uniform(0, 2, len(f.s)).astype(np.float32) for name, f in factors.factors.items()}
        expert = ExpertVectors(backbone=prepared.digest, factors=factors.digest, z=z)
        o_proj = "model.layers.1.self_attn.o_proj.weight"
        low_rank = LoraAdapter(
            backbone=prepared.digest,
            a={o_proj: rng.normal(size=(2, 48)).astype(np.float32)},
            b={o_proj: rng.normal(size=(48, 2)).astype(np.float32)},
        )
        experts = {expert.digest: expert, low_rank.digest: low_rank}
        reference = ReferenceBackbone(reference.model, prepared.digest, factors=factors, experts=experts)
        catalogue = FakeCatalogue()
        catalogue.registry = self.registry = Registry(home / "registry")
        card: dict[str, object] = {"backbone": prepared.digest}
        stored: Artefact = self.registry.put(
            "expert", expert.to_bytes(), digest=expert.digest, name="maths", owner="shared", card=card
        )
        by_layer: Adapter = tuple(sorted([(expert.digest, (0.25, 1.0)), (base_of(expert).digest, (0.75, 0.0))]))
        mixture = mixture_digest(by_layer)
        catalogue.artefacts = (
            stored,
            self.registry.put(
                "expert", low_rank.to_bytes(), digest=low_rank.digest, name="low", owner="shared", card=card
            ),
            self.registry.put(
                "mixture",
                mixture_blob(by_layer),
                digest=mixture,
                name="layers",
                owner="shared",
                card=card | {"adapter": [list(pair) for pair in by_layer]},
            ),
        )
        self.pool = ReasoningPool(ReasoningSettings(), catalogue, [loaded])
        self.bench = Bench.__new__(Bench)
        door = Door(
            HTTP,
            [OneProcess(prepared, reference)],
            [FakeEncoder()],
            Pooled(self.pool),
            FakeMixing(),
            NoSearches(),
            catalogue,
            (),
            DispatchMargins(),
            {},
            TenantsCentroids(CentroidSettings(), home / "centroids"),
            CentroidSettings(),
            NoTasks(),
            TaskSettings(),
            Admission(AdmissionSettings()),
            Access(KeySettings(), NoKeys()),
        )
        self.bench.app = create_app(door, NearReplays(home))

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        response: httpx.Response = self.bench.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def replay(self, answer: dict[str, Any], body: dict[str, Any]) -> Report:
        return program.replay(answer, body, self.parts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("home"), tiny_checkpoint("llama"))
    yield world
    world.pool.stop()
    world.registry.close()


def differing(report: Report) -> list[str]:
    return [what for what, *_, ok in report.rows if not ok]


CLASSIFY = {"examples": EXAMPLES, "inputs": ["nice", "the handle came off after a day"], "seed": 3}
BODIES = {
    "examples": ("/v1/classify", CLASSIFY),
    "abstention": ("/v1/classify", CLASSIFY | {"abstain_below": 0.9, "unlabelled": ["so it is", "fine"]}),
    "vectors": (
        "/v1/classify",
        {
            "examples": [{"vector": [i, 1, -i], "label": "ab"[i % 2]} for i in range(6)],
            "inputs": [{"vector": [2.5, 1, 0]}],
        },
    ),
    "backbone": ("/v1/classify", CLASSIFY | {"encoder": "tiny"}),
    "vanilla": ("/v1/classify", CLASSIFY | {"encoder": "tiny", "protocol": "vanilla", "inputs": ["nice"]}),
    "embeddings": ("/v1/embeddings", {"model": "minilm-fake", "input": ["one", "twenty-two"]}),
    "base64": ("/v1/embeddings", {"model": "tiny", "input": "one", "encoding_format": "base64"}),
    "tokens": ("/v1/embeddings", {"model": "tiny", "input": [5, 6, 7]}),
    "greedy": ("/v1/completions", {"model": "tiny", "prompt": "ab", "max_tokens": 5, "temperature": 0}),
    "low rank": ("/v1/completions", {"model": "tiny:low", "prompt": "ab", "max_tokens": 5, "temperature": 0}),
    "by layer": ("/v1/completions", {"model": "tiny:mix@layers", "prompt": "ab", "max_tokens": 5, "temperature": 0}),
    "expert": ("/v1/completions", {"model": "tiny:maths", "prompt": "ab", "max_tokens": 5, "temperature": 0}),
    "prompts": (
        "/v1/completions",
        {"model": "tiny", "prompt": ["ab", "c"], "max_tokens": 3, "n": 2, "echo": True, "logprobs": 1},
    ),
    "prompt alone": ("/v1/completions", {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 0, "echo": True}),
    "short": ("/v1/embeddings", {"model": "tiny", "input": ["one", "two"], "dimensions": 3}),
    "sampled": (
        "/v1/chat/completions",
        {
            "model": "tiny:maths",
            "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            "max_completion_tokens": 4,
            "temperature": 0.8,
            "top_p": 0.9,
            "n": 2,
            "stop": ["\u0011"],
        },
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_of_the_door_is_recomputed(world: World, name: str):
    path, body = BODIES[name]
    answer = world.ask(path, body)
    report = world.replay(answer, body)
    assert differing(report) == []
    assert len(report.rows) >= 2 and report.answered is not None and report.recomputed is not None


def test_a_named_context_and_answers_by_it_are_recomputed_also_after_it_was_deleted(world: World):
    body = {"examples": EXAMPLES, "unlabelled": ["anything"], "seed": 1}
    made = world.ask("/v1/contexts", body)
    assert differing(world.replay(made, body)) == []
    question = {"model": made["id"], "inputs": ["nice", "it came late"]}
    answer = world.ask("/v1/classify", question)
    world.bench.delete(f"/v1/contexts/{made['id']}")
    report = world.replay(answer, question)
    assert differing(report) == []
    assert "vectors of the context" in [what for what, *_ in report.rows]


def test_a_context_that_was_added_to_is_recomputed_from_what_it_became(world: World):
    made = world.ask("/v1/contexts", {"examples": EXAMPLES, "seed": 2})
    body = {"examples": [{"text": "splendid", "label": "praise"}]}
    more = world.ask(f"/v1/contexts/{made['id']}/examples", body)
    assert differing(world.replay(more, body)) == []
    other = {"examples": [{"text": "dreadful", "label": "praise"}, EXAMPLES[1]]}
    assert {"request", "context"} <= set(differing(world.replay(more, other)))


def test_a_stream_is_put_together_and_recomputed(world: World, tmp_path: Path):
    path, body = BODIES["expert"]
    response = world.bench.post(path, body | {"stream": True})
    (tmp_path / "stream").write_text(response.text)
    given = files.read_answer(tmp_path / "stream")
    assert given["choices"][0]["text"] == world.ask(path, body)["choices"][0]["text"]
    assert differing(world.replay(given, body | {"stream": True})) == []


def test_a_receipt_alone_is_checked_and_the_answer_computed(world: World):
    path, body = BODIES["expert"]
    answer = world.ask(path, body)
    report = world.replay(answer["receipt"], body)
    assert report.same and report.recomputed == {0: answer["choices"][0]["text"]}


@pytest.mark.parametrize(
    ("name", "where", "value", "expected"),
    [
        ("examples", ("receipt", "request"), "0" * 64, "request"),
        ("examples", ("receipt", "context"), "0" * 64, "context"),
        ("examples", ("receipt", "module"), "0" * 64, "recomputing"),
        ("examples", ("receipt", "encoder"), "0" * 64, "recomputing"),
        ("examples", ("results", 0, "probabilities"), {"complaint": 0.123, "praise": 0.877}, "probabilities"),
        ("examples", ("results", 1, "label"), "other", "labels"),
        ("embeddings", ("data", 1, "embedding"), [0.6, 0.8], "vectors"),
        ("expert", ("receipt", "adapter"), [], "adapter"),
        ("expert", ("receipt", "adapter"), [["0" * 64, 1.0]], "recomputing"),
        ("expert", ("receipt", "factors"), "0" * 64, "factors"),
        ("expert", ("receipt", "backbone"), "0" * 64, "recomputing"),
        ("expert", ("usage", "prompt_tokens"), 99, "prompt tokens"),
        ("greedy", ("choices", 0, "text"), "zzzzz", "choice 0"),
    ],
)
def test_what_differs_is_named(world: World, name: str, where: tuple[Any, ...], value: Any, expected: str):
    path, body = BODIES[name]
    answer = copy.deepcopy(world.ask(path, body))
    inner = answer
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    assert expected in differing(world.replay(answer, body))


def test_an_answer_by_the_base_for_a_request_for_an_expert_does_not_pass(world: World):
    path, body = BODIES["greedy"]
    answer = world.ask(path, body)
    asked = body | {"model": "tiny:maths"}
    answer["receipt"]["request"] = digest_of(asked)
    assert "adapter" in differing(world.replay(answer, asked))


def test_tokens_within_the_tolerance_pass_though_the_text_differs(world: World, monkeypatch: pytest.MonkeyPatch):
    path, body = BODIES["greedy"]
    answer = world.ask(path, body)
    answer["choices"][0]["text"] = "zzzzz"
    monkeypatch.setitem(completions.LOGIT_TOLERANCE, "float32", 1e9)
    report = world.replay(answer, body)
    assert report.same and report.answered != report.recomputed


def test_the_program_prints_both_answers_and_says_by_its_status_whether_they_agree(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, body = BODIES["examples"]
    answer = world.ask(path, body)
    files = [tmp_path / "answer.json", tmp_path / "request.json"]
    command = ["--receipt", str(files[0]), "--request", str(files[1])]
    files[0].write_text(json.dumps(answer))
    files[1].write_text(json.dumps(body, indent=2))
    assert program.main(command, world.parts) == 0
    printed = capsys.readouterr().out
    assert "everything is as the receipt says" in printed and printed.count('"probabilities"') == 4
    files[1].write_text(json.dumps(body | {"seed": 4}))
    assert program.main(command, world.parts) == 1
    assert "differs: request, context" in capsys.readouterr().out
    files[0].write_text("no answer")
    assert program.main(command, world.parts) == 2
    assert "neither JSON nor a stream" in capsys.readouterr().err


def test_what_is_no_answer_is_refused(world: World):
    with pytest.raises(InvalidRequest, match="no receipt"):
        world.replay({"error": {"message": "no"}}, CLASSIFY)
    with pytest.raises(InvalidRequest, match="none of messages"):
        world.replay({"receipt": {"request": "0" * 64}}, {"weights": {}})


def test_a_stream_that_broke_off_has_no_receipt(tmp_path: Path):
    (tmp_path / "stream").write_text('data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n')
    with pytest.raises(CorruptArtefact, match="without a receipt"):
        files.read_answer(tmp_path / "stream")
