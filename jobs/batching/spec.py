"""What one batch is: its digest names its output, its requests, and whether a later call goes on with it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from metasepia.digests import canonical_json, digest_of
from metasepia.errors import InvalidSettings

TaskName = Literal["classify", "embed", "complete", "chat", "hidden_states"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One input file, known by what its footer says: names and places may change, bytes may not."""

    rows: int
    num_bytes: int
    footer: str
    """sha256 of the Parquet metadata."""


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """What is asked, of which rows. Not where the graph is, nor how much is asked at once."""

    task: TaskName
    pieces: tuple[Piece, ...]
    column: str
    model: str | None
    """Of rows that name none."""
    model_column: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the requests' bodies."""
    prefix: str = ""
    """Begins the names of the columns added."""
    keep: tuple[str, ...] | None = None
    """Input columns in the output; None: all."""
    media: Literal["image", "audio"] | None = None
    """What binary cells are."""
    rows_a_part: int = 4096
    rows_a_request: int = 64

    def __post_init__(self) -> None:
        for name, most in (("rows_a_part", 1_000_000), ("rows_a_request", 2048)):
            if not 1 <= getattr(self, name) <= most:
                raise InvalidSettings(name, getattr(self, name), f"from 1 to {most}")

    @cached_property
    def digest(self) -> str:
        return digest_of(self.to_json())

    @property
    def num_rows(self) -> int:
        return sum(one.rows for one in self.pieces)

    @property
    def num_parts(self) -> int:
        return -(-self.num_rows // self.rows_a_part)

    def rows_of(self, part: int) -> range:
        begin = part * self.rows_a_part
        return range(begin, min(begin + self.rows_a_part, self.num_rows))

    def key_of(self, rows: Sequence[int]) -> str:
        """The Idempotency-Key of the request for these rows: after a kill the server gives the same answer again."""
        return digest_of([self.digest, list(rows)])[:48]

    def to_json(self) -> dict[str, Any]:
        told = dataclasses.asdict(self) | {"options": dict(self.options)}
        canonical_json(told)  # a value that has no one spelling is refused here
        return told
