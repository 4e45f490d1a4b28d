"""What a sweep has computed, as write-once objects at a `pyarrow.fs` URI: JSON, Parquet and safetensors, no pickle.

    URI/manifest.json                                 the plan and its digest
    URI/packs/00007/rows-00001000-<stamp>.parquet     figures of one pack at one step
    URI/packs/00007/state-00001000-<stamp>.safetensors  what the pack goes on from; only the latest is kept
    URI/packs/00007/done.json                         which rows a finished pack has
    URI/table.parquet                                 all rows, sorted; made from the others

A stamp is the first 16 digits of the sha256 of the object's bytes, so a torn object is told from a whole one wherever
it came from, and no object names a machine, a device or a time. Locally an object is written beside its place, synced
and renamed; elsewhere it is one put, which object stores show whole or not at all.
"""

from typing import Literal

import pyarrow as pa

ROWS = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),  # in `measure` the place in the pack, in the table the index
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),  # -1: all positions together
        pa.field("split", pa.string(), nullable=False),  # "pretraining", "new" or ""
        pa.field("value", pa.float64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "ok", or what happened, as "diverged"
    ]
)
KEY = ("trial", "step", "metric", "split", "position")
"""The table's order; no two rows have the same."""
FORMAT = 1
Kind = Literal["rows", "state"]
SUFFIX: dict[Kind, str] = {"rows": "parquet", "state": "safetensors"}
