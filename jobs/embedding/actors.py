"""The processes of a run that embeds tasks: thin actors over `jobs.embedding.work`. All answer `told` at work."""

from collections.abc import Sequence
from pathlib import Path

import ray
from ray.actor import ActorClass

from jobs.embedding.files import Answered
from jobs.embedding.plan import LocalUnit
from jobs.embedding.spec import MethodSpec, Spec
from jobs.embedding.work import Answering, Embedding, ToEmbed
from metasepia.blackbox.boxes import Progress
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import TaskEmbedding


class AnsweringProcess:
    """Serves Answering."""

    def __init__(self, probes: ProbeTexts, home: Path) -> None:
        self._work = Answering(probes, home)

    @ray.method
    def answer(self, unit: LocalUnit) -> tuple[Answered, int]:
        """With the tokens that were read and written."""
        return self._work.answer(unit)

    @ray.method
    def told(self) -> Progress | None:
        return self._work.progress


class EmbeddingProcess:
    """Serves Embedding, over a surrogate of its own."""

    def __init__(self, spec: Spec, method: MethodSpec) -> None:
        from metasepia.encoders import TextEncoder

        encoder = TextEncoder.load(spec.encoder, spec.device)
        self._work = Embedding(encoder, spec.probes, method.name, method.settings, seed=spec.seed, redraws=spec.redraws)

    @ray.method
    def embed(self, batch: Sequence[ToEmbed]) -> tuple[list[TaskEmbedding], dict[str, str]]:
        return self._work.embed(batch)

    @ray.method
    def told(self) -> tuple[int, int]:
        return self._work.progress


AnsweringActor: ActorClass[AnsweringProcess] = ray.remote(AnsweringProcess)
EmbeddingActor: ActorClass[EmbeddingProcess] = ray.remote(EmbeddingProcess)
