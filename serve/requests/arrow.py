"""Answers as Arrow streams. pyarrow is loaded when somebody asks for one.

Hidden states, piece by piece as rows come in. Columns: `input` and `layer` (int32), `token` (its position) and
`token_id` (int32; null where states are the mean over tokens), `state` (a fixed-size list of float32). Metadata are
JSON under the one key `metasepia`: the schema's has the request's facts and the receipt; a record batch's has a
`receipt` of its own where its row was executed in another way than the first; the last record batch, of no rows, has
`usage` and perhaps `task`, or `error`. A stream without that last one was cut off.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
KEY = "metasepia"
PIECE_BYTES = 4 << 20
"""States of one record batch, about."""


class ArrowWriter:
    """One stream; what is written is handed out at once."""

    def __init__(self, schema: Any) -> None:
        import pyarrow as pa

        self._pa, self._schema = pa, schema
        self._sink = io.BytesIO()
        self._writer = pa.ipc.new_stream(self._sink, schema)

    def write(self, columns: Sequence[Any]) -> bytes:
        """One record batch."""
        self._writer.write_batch(self._pa.record_batch(columns, schema=self._schema))
        return self._taken()

    def close(self) -> bytes:
        """The stream's end."""
        self._writer.close()
        return self._taken()

    def _taken(self) -> bytes:
        """What was written since the last time."""
        written = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return written


class StatesWriter(ArrowWriter):
    """Hidden states."""

    def __init__(self, hidden_size: int, about: Mapping[str, Any]) -> None:
        """`about` has a `receipt`."""
        import pyarrow as pa

        self._hidden_size, self._receipt = hidden_size, about["receipt"]
        fields = [(name, pa.int32()) for name in ("input", "layer", "token", "token_id")]
        states = ("state", pa.list_(pa.float32(), hidden_size))
        super().__init__(pa.schema([*fields, states], metadata={KEY: json.dumps(about)}))

    def add(
        self,
        index: int,
        layers: Sequence[int],
        token_ids: Sequence[int],
        pooling: str,
        states: np.ndarray,
        receipt: Mapping[str, Any],
    ) -> Iterator[bytes]:
        """One input: states [layers, hidden], or [layers, tokens, hidden] for the pooling `none`."""
        pa, count = self._pa, len(token_ids)
        tokens: list[int | None] = {"none": [*range(count)], "last": [count - 1]}.get(pooling, [None])  # type: ignore[list-item]
        ids = [None if token is None else token_ids[token] for token in tokens]
        flat = np.ascontiguousarray(states, np.float32).reshape(-1)
        num_rows = len(layers) * len(tokens)
        batch = pa.record_batch(
            [
                pa.array(np.full(num_rows, index, np.int32)),
                pa.array(np.repeat(np.array(layers, np.int32), len(tokens))),
                pa.array(tokens * len(layers), pa.int32()),
                pa.array(ids * len(layers), pa.int32()),
                pa.FixedSizeListArray.from_arrays(pa.array(flat), self._hidden_size),
            ],
            schema=self._schema,
        )
        metadata = None if receipt == self._receipt else {KEY: json.dumps({"receipt": receipt})}
        step = max(1, PIECE_BYTES // (4 * self._hidden_size))
        for begin in range(0, num_rows, step):
            self._writer.write_batch(batch.slice(begin, step), custom_metadata=metadata)
            yield self._taken()

    def end(self, said: Mapping[str, Any]) -> bytes:
        """The last record batch and the stream's end."""
        empty = self._pa.RecordBatch.from_pylist([], schema=self._schema)
        self._writer.write_batch(empty, custom_metadata={KEY: json.dumps(said)})
        return self.close()


def classification(answer: Mapping[str, Any]) -> bytes:
    """A classification: `label` (null where it abstains) and `probabilities`, a fixed-size list of float32 in the order
    of the metadata's `classes`. The metadata have the answer's other fields too.
    """
    import pyarrow as pa

    results = answer["results"]
    classes = list(results[0]["probabilities"])
    about = {name: value for name, value in answer.items() if name != "results"} | {"classes": classes}
    probabilities = pa.list_(pa.float32(), len(classes))
    fields = [("label", pa.string()), ("probabilities", probabilities)]
    writer = ArrowWriter(pa.schema(fields, metadata={KEY: json.dumps(about)}))
    flat = np.array([list(one["probabilities"].values()) for one in results], np.float32).reshape(-1)
    labels = pa.array([one["label"] for one in results], pa.string())
    return writer.write([labels, pa.FixedSizeListArray.from_arrays(pa.array(flat), len(classes))]) + writer.close()


def embeddings(vectors: np.ndarray, about: Mapping[str, Any]) -> bytes:
    """`embedding`, a fixed-size list of float32, in the order of the inputs; `about` is the metadata."""
    import pyarrow as pa

    width = vectors.shape[1]
    fields = [("embedding", pa.list_(pa.float32(), width))]
    writer = ArrowWriter(pa.schema(fields, metadata={KEY: json.dumps(about)}))
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return writer.write([pa.FixedSizeListArray.from_arrays(flat, width)]) + writer.close()
