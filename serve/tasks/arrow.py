"""Task embeddings as an Arrow stream: `id`, `kind`, `space`, `expert`, `noise`, and `vector` as a list of float32.

The schema's metadata have, as JSON under the key `metasepia`, the request's facts and `spaces` by digest. pyarrow is
loaded when somebody asks for one.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np

from metasepia.embedding.space import TaskEmbedding
from serve.requests.arrow import KEY, ArrowWriter


class TasksWriter(ArrowWriter):
    """Task embeddings."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        import pyarrow as pa

        texts = [(name, pa.string()) for name in ("id", "kind", "space", "expert")]
        fields = [*texts, ("noise", pa.float64()), ("vector", pa.list_(pa.float32()))]
        super().__init__(pa.schema(fields, metadata={KEY: json.dumps(about)}))

    def add(self, ids: Sequence[str], experts: Sequence[str | None], embeddings: Sequence[TaskEmbedding]) -> bytes:
        """A record batch."""
        pa = self._pa
        ends = np.cumsum([0, *(one.dims for one in embeddings)]).astype(np.int32)
        flat = np.concatenate([one.vector for one in embeddings])
        columns = [
            pa.array(list(ids), pa.string()),
            pa.array([one.kind for one in embeddings], pa.string()),
            pa.array([one.space.digest for one in embeddings], pa.string()),
            pa.array(list(experts), pa.string()),
            pa.array([one.noise for one in embeddings], pa.float64()),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(flat)),
        ]
        return self.write(columns)


Batch = tuple[Sequence[str], Sequence[str | None], Sequence[TaskEmbedding]]
"""Ids, experts, embeddings."""


async def stream(about: Mapping[str, Any], batches: AsyncIterator[Batch]) -> AsyncIterator[bytes]:
    """Pieces of the whole stream."""
    writer = TasksWriter(about)
    async for batch in batches:
        yield writer.add(*batch)
    yield writer.close()
