"""Answers of the policy in training: rows through a decoder, all at once, each by the adapter that was put last.

`LocalRollouts` steps the engine's scheduler and decoder itself, on a clock that stands still: batches, and with them
every bit of the answers, are then a function of the rows alone, so that a run that was killed can be repeated exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.inflight import Answer, Limits
from metasepia.decoding.scheduling import Scheduler
from metasepia.errors import MetasepiaError
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.svf import ExpertLayers
from metasepia.experts.vectors import ExpertVectors
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Executed, Row, TokenChunk

LIMITS = Limits(max_rows=32, max_batch_tokens=1 << 15, max_queued_tokens=1 << 30, max_prefix_tokens=1 << 13)


@dataclass(kw_only=True)
class Rolled:
    """A row's answer, whole."""

    tokens: list[int] = field(default_factory=list)
    """Without the end token."""
    logprobs: list[float] = field(default_factory=list)
    """At temperature 1."""
    ended: bool = False
    """By an end token; else by `max_tokens`."""
    executed: Executed | None = None

    def add(self, chunk: TokenChunk) -> None:
        self.tokens += chunk.token_ids
        self.logprobs += chunk.logprobs
        if chunk.finish:
            self.ended, self.executed = chunk.finish == "stop", chunk.executed


class Rollouts(Protocol):
    """Whoever generates the answers that training learns from and is measured by."""

    def put(self, adapter: ExpertVectors | LoraAdapter) -> str:
        """Takes the place of the adapter put before; rows name it by the digest returned. Nothing else is moved."""
        ...

    def generate(self, rows: Sequence[Row]) -> list[Rolled]:
        """The answers in the rows' order. Raises what refused a row."""
        ...

    def close(self) -> None: ...


class LocalRollouts:
    """In this process, on a model of its own (a `trainable.twin`) with `layers` attached."""

    def __init__(
        self, model: nn.Module, prepared: PreparedBackbone, layers: ExpertLayers, *, limits: Limits = LIMITS
    ) -> None:
        self.model, self._layers, self._prepared, self._limits = model, layers, prepared, limits
        self._digest: str | None = None

    def put(self, adapter: ExpertVectors | LoraAdapter) -> str:
        if adapter.digest != self._digest:
            self._layers.put(adapter.digest, adapter)
            before, self._digest = self._digest, adapter.digest
            if before is not None:
                self._layers.drop(before)
        return adapter.digest

    def generate(self, rows: Sequence[Row]) -> list[Rolled]:
        rolled = [Rolled() for _ in rows]
        refused: list[MetasepiaError] = []

        def answered(one: Rolled) -> Callable[[Answer], None]:
            def take(answer: Answer) -> None:
                if isinstance(answer, TokenChunk):
                    one.add(answer)
                elif isinstance(answer, MetasepiaError):
                    refused.append(answer)

            return take

        # New ones each time: what they kept of earlier rows would decide how these are batched.
        decoder = RowDecoder(
            self.model,  # pyright: ignore[reportArgumentType]
            backbone=self._prepared.digest,
            experts=self._layers,
            factors=self._layers.factors_digest,
        )
        scheduler = Scheduler(decoder.run, self._limits, self._prepared, clock=lambda: 0.0)
        for row, one in zip(rows, rolled, strict=True):
            scheduler.submit(row, answered(one))
        with torch.inference_mode():
            while scheduler.step():
                if refused:
                    raise refused[0]
        if refused:
            raise refused[0]
        return rolled

    def select(self, digest: str | None, num_rows: int) -> None:
        """What the next forward of `model` runs on, for whoever reads its logits; None: the base."""
        self._layers.select([() if digest is None else ((digest, 1.0),)] * num_rows)

    def close(self) -> None:
        """Nothing is held outside this object."""


def check_executed(rolled: Sequence[Rolled], digest: str | None) -> None:
    """Asserts that every answer was given by the adapter of this digest, or by the base (None)."""
    wanted: Mapping[str, object] = {} if digest is None else {digest: 1.0}
    for one in rolled:
        assert one.executed is not None and dict(one.executed.adapter) == wanted, (one.executed, digest)
