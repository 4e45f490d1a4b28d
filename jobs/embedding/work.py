"""What one process does: answers units, or embeds batches of tasks. No Ray here; `jobs.embedding.running` places it."""

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.embedding import data_sets
from jobs.embedding.files import Answered
from jobs.embedding.plan import BackboneUnit, CallableUnit, DataSetUnit, LocalUnit
from metasepia.blackbox.boxes import BlackBox, Progress
from metasepia.blackbox.callables import FromCallable
from metasepia.embedding.answers import Answers
from metasepia.embedding.methods import LongTexts, embed_tasks, method, within_window
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import EmbeddingMethod, MethodName, TaskEmbedding, TaskKind
from metasepia.errors import CorruptArtefact, InvalidSettings, MetasepiaError

if TYPE_CHECKING:
    from metasepia.encoders import TextEncoder
    from metasepia.experts.svf import ExpertLayers
    from metasepia.models.prepared import PreparedBackbone


class Answering:
    """Answers units one after another; holds one backbone, with its experts, until a unit needs another."""

    def __init__(self, probes: ProbeTexts, home: Path) -> None:
        self._probes, self._home = probes, home
        self._held: tuple[Any, _Loaded] | None = None
        self.progress: Progress | None = None
        """Of the unit at work; read from another thread."""

    def answer(self, unit: LocalUnit) -> tuple[Answered, int]:
        """The answers, and the tokens that were read and written for them.

        Raises whatever keeps the unit from being answered, in words.
        """
        try:
            if isinstance(unit, DataSetUnit):
                answers = data_sets.read(unit.spec, unit.path)
                return Answered(answers=answers, source={}), 0
            box = self._callable(unit) if isinstance(unit, CallableUnit) else self._model(unit)
            answered = asyncio.run(self._asked(box))
            told = self.progress
            return answered, 0 if told is None else told.prompt_tokens + told.completion_tokens
        finally:
            self.progress = None  # or the next unit would seem to have come as far

    async def _asked(self, box: BlackBox) -> Answered:
        answers = await box.answer(self._probes.texts, told=self._take)
        return Answered(answers=answers, source=dict(box.source()))

    def _take(self, progress: Progress) -> None:
        self.progress = progress

    def _callable(self, unit: CallableUnit) -> BlackBox:
        module, _, name = unit.spec.call.partition(":")
        field = f"{unit.spec.place}.callable"
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise InvalidSettings(field, unit.spec.call, f"a function that can be imported ({error})") from error
        return FromCallable(function, unit.spec.labels, name=unit.spec.name, version=unit.version)

    def _model(self, unit: BackboneUnit) -> BlackBox:
        from jobs.embedding.still import StillBackbone
        from metasepia.blackbox.local import LocalModel
        from metasepia.blackbox.tokens import TextTokens

        key = (unit.backbone, unit.spec.device, tuple(expert.adapter for expert in unit.experts))
        if self._held is None or self._held[0] != key:
            self._held = None  # what is held now goes before the next comes
            self._held = key, _load(unit, self._home)
        loaded = self._held[1]
        return LocalModel(
            StillBackbone(loaded.model, loaded.prepared, loaded.layers),
            TextTokens(loaded.prepared),
            unit.prompt,
            adapter=unit.expert.adapter if unit.expert else (),
            chat=unit.spec.chat,
            prepared=loaded.prepared,
            normalise=unit.spec.normalise,
            calibrate=unit.spec.calibrate,
            name=f"{unit.spec.name}/{unit.prompt.name}",
        )


@dataclass(frozen=True)
class _Loaded:
    model: Any
    prepared: "PreparedBackbone"
    layers: "ExpertLayers"


def _load(unit: BackboneUnit, home: Path) -> _Loaded:
    import torch

    from jobs.export_expert import factors_for
    from metasepia.experts.lora import read_adapter
    from metasepia.experts.svf import attach
    from metasepia.experts.vectors import ExpertVectors
    from metasepia.models import checkpoints

    prepared = checkpoints.prepare(unit.spec.source, home)
    if prepared.digest != unit.backbone:
        raise CorruptArtefact(unit.spec.source, "it is another model here than where this run was begun")
    blobs = {digest: blob for expert in unit.experts for digest, blob in expert.blobs.items()}
    held = {digest: read_adapter(blob, digest) for digest, blob in blobs.items()}
    vectors = [one for one in held.values() if isinstance(one, ExpertVectors)]
    if len({one.factors for one in vectors}) > 1:
        names = ", ".join(expert.name for expert in unit.experts)
        raise InvalidSettings(f"{unit.spec.place}.experts", names, "experts of the same layers; give others an entry")
    factors = factors_for(vectors[0], prepared, home) if vectors else None
    model = checkpoints.load(prepared, torch.float32, unit.spec.device)
    layers = attach(model, factors, backbone=prepared.digest)
    for digest, one in held.items():
        layers.put(digest, one)
    return _Loaded(model, prepared, layers)


@dataclass(frozen=True, kw_only=True)
class ToEmbed:
    """One task of a batch."""

    name: str
    kind: TaskKind
    answered: Answered
    source: Mapping[str, Any]
    long_texts: LongTexts = "refuse"


class Embedding:
    """Embeds batches of tasks by one method; holds the surrogate."""

    def __init__(
        self,
        encoder: "TextEncoder",
        probes: ProbeTexts,
        name: MethodName,
        settings: Mapping[str, Any],
        *,
        seed: int,
        redraws: int,
    ) -> None:
        self._encoder, self._seed, self._redraws = encoder, seed, redraws
        self.method: EmbeddingMethod = method(name, encoder, probes, **settings)
        self.progress = (0, 0)
        """Of the batch at work, as the method tells it."""

    def embed(self, batch: Sequence[ToEmbed]) -> tuple[list[TaskEmbedding], dict[str, str]]:
        """The embeddings in the batch's order, and of the others, by name, why there are none."""
        refused: dict[str, str] = {}
        named: list[tuple[str, TaskKind, Answers, dict[str, Any]]] = []
        for one in batch:
            try:
                answers, left_out = within_window(self._encoder, one.answered.answers, one.long_texts)
            except MetasepiaError as error:
                refused[one.name] = str(error)
                continue
            source = {**one.answered.source, **one.source}
            named.append((one.name, one.kind, answers, source | ({"left_out": left_out} if left_out else {})))
        try:
            return self._embed(named, refused), refused
        except MetasepiaError:
            # One of them cannot be embedded: which one is found out singly, and the others go on.
            found: list[TaskEmbedding] = []
            for task in named:
                if task[0] in refused:
                    continue
                try:
                    found += self._embed([task], refused)
                except MetasepiaError as error:
                    refused[task[0]] = str(error)
            return found, refused

    def _embed(self, named: Sequence[Any], refused: dict[str, str]) -> list[TaskEmbedding]:
        return embed_tasks(
            self.method,
            named,
            seed=self._seed,
            redraws=self._redraws,
            refused=refused.__setitem__,
            told=self._take,
        )

    def _take(self, done: int, total: int) -> None:
        self.progress = (done, total)
