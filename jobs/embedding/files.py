"""What a run keeps: the answers of each task and the embeddings of each batch, write-once Parquet, named by what they
are a function of.

    OUT/answers/<name>-<key>.parquet     texts, label probabilities with their errors, or replies
    OUT/parts/<method>-<key>.parquet     embeddings of one batch, and beside it a .json that says that it is whole

The key of answers is of all that they depend on (file, model, prompt, texts), so what is there is never asked again.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metasepia.digests import canonical_json, short
from metasepia.embedding import store
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import TaskEmbedding
from metasepia.errors import CorruptArtefact
from metasepia.sweeps.files import Files

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answers, and what the black box says of itself and of how it answered."""

    answers: Answers
    source: Mapping[str, Any]


class RunFiles:
    """One run's folder, at a path or a `pyarrow.fs` URI. Only the driver writes."""

    def __init__(self, uri: str) -> None:
        """Raises InvalidSettings for a place that is none."""
        self._files = Files.at(uri)

    @property
    def uri(self) -> str:
        return self._files.uri

    def path_of(self, name: str) -> str:
        return self._files.path_of(name)

    def write(self, name: str, content: bytes) -> None:
        self._files.write(name, content)

    # -- answers

    def answered(self, name: str, key: str) -> Answered | None:
        """What is kept under a key. Torn bytes count as none: they are answered again, and replaced."""
        content = self._files.read(_answers_name(name, key))
        if content is None:
            return None
        try:
            return from_parquet(content, key)
        except (pa.ArrowException, CorruptArtefact):
            return None

    def keep_answers(self, name: str, key: str, answered: Answered) -> None:
        self._files.write(_answers_name(name, key), to_parquet(answered, key))

    # -- embeddings

    def embedded(self, part: str) -> tuple[list[TaskEmbedding], dict[str, str]] | None:
        """Embeddings of a batch, and of the others why there are none; None where the batch is not whole."""
        done = self._files.read(f"parts/{part}.json")
        if done is None:
            return None
        try:
            told = json.loads(done)
            found = store.read(self.path_of(f"parts/{part}.parquet")) if told["count"] else []
            whole = len(found) == told["count"]
            return (found, dict(told["refused"])) if whole else None
        except (ValueError, KeyError, TypeError):
            return None

    def keep_embedded(self, part: str, found: Sequence[TaskEmbedding], refused: Mapping[str, str]) -> None:
        """The .json last: it says that the rest is there."""
        if found:
            store.write(self.path_of(f"parts/{part}.parquet"), found)
        self._files.write(f"parts/{part}.json", canonical_json({"count": len(found), "refused": dict(refused)}))

    def write_embeddings(self, name: str, found: Sequence[TaskEmbedding]) -> str:
        """Returns where."""
        path = self.path_of(name)
        store.write(path, found)
        return path


def _answers_name(name: str, key: str) -> str:
    spelt = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    return f"answers/{spelt or 'task'}-{key[:16]}.parquet"


def to_parquet(answered: Answered, key: str) -> bytes:
    """The bytes depend on the answers, their source and pyarrow's version alone."""
    answers = answered.answers
    told = {
        "kind": "answers",
        "format": FORMAT,
        "key": key,
        "digest": answers.digest,
        "labels": list(answers.labels),
        "notes": list(answers.notes),
        "source": dict(answered.source),
    }
    columns: dict[str, pa.Array] = {"text": pa.array(answers.texts, pa.string())}
    if answers.is_open:
        columns["reply"] = pa.array(answers.replies, pa.string())
    else:
        columns["probabilities"] = _rows_of(answers.probabilities)
        if answers.standard_error is not None:
            columns["standard_error"] = _rows_of(answers.standard_error)
    table = pa.table(columns).replace_schema_metadata({"metasepia": canonical_json(told).decode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, version="2.6", compression="zstd", compression_level=3)
    return sink.getvalue().to_pybytes()


def from_parquet(content: bytes, key: str) -> Answered:
    """Raises CorruptArtefact for what `to_parquet` never wrote for this key."""
    table = pq.read_table(pa.BufferReader(content))
    try:
        told = json.loads((table.schema.metadata or {})[b"metasepia"])
        if told["kind"] != "answers" or told["format"] != FORMAT or told["key"] != key:
            raise ValueError(f"kind {told['kind']!r}, format {told['format']!r}, key {short(str(told['key']))}")
        texts, labels = tuple(table.column("text").to_pylist()), tuple(told["labels"])
        answers = Answers(
            texts=texts,
            labels=labels,
            probabilities=_matrix_of(table, "probabilities", (len(texts), len(labels))),
            standard_error=_matrix_of(table, "standard_error", (len(texts), len(labels)))
            if "standard_error" in table.column_names
            else None,
            replies=() if labels else tuple(table.column("reply").to_pylist()),
            notes=tuple(told["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtefact("answers", f"they cannot be read ({type(error).__name__}: {error})") from error
    if answers.digest != told["digest"]:
        raise CorruptArtefact("answers", f"their digest is {short(answers.digest)}, not {short(told['digest'])}")
    return Answered(answers=answers, source=told["source"])


def _rows_of(matrix: np.ndarray) -> pa.Array:
    values = pa.array(np.ascontiguousarray(matrix, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(values, matrix.shape[1])


def _matrix_of(table: pa.Table, name: str, shape: tuple[int, int]) -> np.ndarray:
    if not shape[1]:
        return np.zeros(shape, np.float32)
    return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(shape)
