"""A backbone in one process whose answers are the same bits whenever the same rows are asked for in the same order.

The engine's scheduler and decoder, stepped in the caller's event loop on a clock that stands still, as training's
rollouts are (`metasepia.training.rollouts`): which rows share a forward is then a function of the rows alone.
"""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncGenerator

import torch
from torch import nn

from metasepia.decoding.asking import AsksRows
from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.inflight import Answer, Limits
from metasepia.decoding.scheduling import Scheduler
from metasepia.experts.svf import ExpertLayers
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk, Want

LIMITS = Limits(max_rows=32, max_batch_tokens=1 << 14, max_queued_tokens=1 << 30, max_prefix_tokens=1 << 13)
TURNS = 8
"""Of the event loop before a step, in which all who can ask do so."""


class StillBackbone(AsksRows):
    """For one event loop. A new one for each unit of work: what it kept of earlier rows would decide batches."""

    def __init__(self, model: nn.Module, prepared: PreparedBackbone, layers: ExpertLayers) -> None:
        decoder = RowDecoder(
            model,  # pyright: ignore[reportArgumentType]
            backbone=prepared.digest,
            experts=layers,
            factors=layers.factors_digest,
        )
        self.digest = prepared.digest
        self._scheduler = Scheduler(decoder.run, LIMITS, prepared, clock=lambda: 0.0)
        self._names = itertools.count()
        self._stepping: asyncio.Task[None] | None = None
        self._inboxes: dict[str, asyncio.Queue[Answer | Exception]] = {}

    async def _ask(self, row: Row, want: Want) -> AsyncGenerator[TokenChunk | Scores | HiddenStates]:
        inbox: asyncio.Queue[Answer | Exception] = asyncio.Queue()
        key = str(next(self._names))
        self._inboxes[key] = inbox
        finished = True  # nothing to be dropped yet
        try:
            wanted = dataclasses.replace(row, request_id=key, want=want, deadline_unix_s=float("inf"))
            self._scheduler.submit(wanted, inbox.put_nowait)
            finished = False
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.get_running_loop().create_task(self._step())
            while not finished:
                answer = await inbox.get()
                finished = not isinstance(answer, TokenChunk) or answer.finish is not None
                if isinstance(answer, Exception):
                    raise answer
                yield dataclasses.replace(answer, request_id=row.request_id)
        finally:
            del self._inboxes[key]
            if not finished:
                self._scheduler.cancel(key)

    async def _step(self) -> None:
        try:
            while True:
                for _ in range(TURNS):  # whoever was answered may ask again
                    await asyncio.sleep(0)
                with torch.inference_mode():
                    if not self._scheduler.step():
                        return
        except Exception as error:  # whoever waits must learn of it
            for inbox in self._inboxes.values():
                inbox.put_nowait(error)
