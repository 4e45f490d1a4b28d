"""The model `auto`: the settings' chain of dispatch stages picks an expert by the request, or the base weights answer.

Served here is the stage `centroid` (`metasepia.dispatch`): one short pass of the base model over the prompt, then the
nearest task centroid among the experts' cards. `auto` is listed while some expert has one.
"""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from metasepia.dispatch import CentroidTable, Dispatched, TaskCentroid
from metasepia.errors import InvalidSettings, NotSupported, UnknownName
from metasepia.registry import SHARED, Artefact
from metasepia.rows import Row
from serve.deadlines import Deadline
from serve.names import AUTO, Chosen
from serve.parts import Backbone, Catalogue

SERVED_STAGES = ("centroid",)


def check_stages(stages: Sequence[str]) -> None:
    """For the settings, at start. Raises InvalidSettings."""
    for stage in stages:
        if stage not in SERVED_STAGES:
            raise InvalidSettings("dispatch", stage, f"of {', '.join(SERVED_STAGES)} in this version")


@dataclass(frozen=True)
class Routed:
    """A model name brought to its end: a backbone, perhaps with an expert, and how `auto` came to it."""

    chosen: Chosen
    stage: str | None = None
    """`auto` only: the stage that chose; `abstained` where none did, and the base weights answer."""
    margin: float | None = None


class Routing:
    """Chooses among the experts of one backbone."""

    def __init__(self, backbone: Backbone, catalogue: Catalogue, stages: Sequence[str]) -> None:
        self.backbone, self.stages = backbone, tuple(stages)
        self._catalogue = catalogue
        self._table: tuple[tuple[str, ...], CentroidTable] = ((), CentroidTable(backbone.prepared.digest, {}))

    async def is_served(self) -> bool:
        return bool(self.stages) and len((await self._known())[1]) > 0

    async def route(self, token_ids: tuple[int, ...], stages: Sequence[str] | None, deadline: Deadline) -> Routed:
        """The chain over one prompt. Raises UnknownName when there is nothing to choose from."""
        for stage in self.stages if stages is None else stages:
            if stage not in SERVED_STAGES:
                raise NotSupported(f"the dispatch stage {stage}", f"use {', '.join(SERVED_STAGES)}")
        experts, table = await self._known()
        if not len(table):
            raise UnknownName("model", AUTO, (self.backbone.id,))
        wanted = table.wanted
        rows = [
            Row(
                request_id=f"route-{uuid.uuid4().hex}",
                backbone=self.backbone.prepared.digest,
                token_ids=token_ids,
                deadline_unix_s=deadline.unix_s,
                want="hidden_states",
                hidden=one,
            )
            for one in wanted
        ]
        answers = await asyncio.gather(*(self.backbone.hidden_states([row]) for row in rows))
        dispatched: Dispatched = table.choose(
            {one: states[0].states for one, states in zip(wanted, answers, strict=True)}
        )
        if dispatched.expert is None:
            return Routed(Chosen(self.backbone.id, self.backbone), "abstained", dispatched.margin)
        name = next(one.name for one in experts if one.digest == dispatched.expert)
        chosen = Chosen(f"{self.backbone.id}:{name}", self.backbone, ((dispatched.expert, 1.0),))
        return Routed(chosen, dispatched.stage, dispatched.margin)

    async def _known(self) -> tuple[Sequence[Artefact], CentroidTable]:
        experts = await self._catalogue.list("expert", SHARED)
        digests = tuple(one.digest for one in experts)
        if self._table[0] != digests:
            found = {one.digest: TaskCentroid.of_card(one.card, one.name) for one in experts}
            centroids = {digest: one for digest, one in found.items() if one is not None}
            self._table = (digests, CentroidTable(self.backbone.prepared.digest, centroids))
        return experts, self._table[1]
