"""The model `auto`: the settings' chain of dispatch stages picks an expert by the request, or the base weights answer.

Served here is the stage `centroid` (`metasepia.dispatch`): one short pass of the base model over the prompt, then the
nearest task centroid among the experts' cards. `auto` is listed while some expert has one.
"""

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metasepia.dispatch import CentroidTable, Dispatched, TaskCentroid
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported, UnknownName
from metasepia.registry import Artefact
from metasepia.rows import Row
from serve.deadlines import Deadline
from serve.names import AUTO, OWNER, Chosen
from serve.parts import Backbone, Catalogue
from serve.shelf import Shelf

logger = logging.getLogger("ray.serve")

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
        self._experts: Shelf[tuple[str, TaskCentroid] | None] = Shelf(catalogue, "expert", OWNER, _centroid)
        self._read: Mapping[str, tuple[str, TaskCentroid] | None] = {}
        self._table: tuple[CentroidTable, dict[str, str]] = (CentroidTable(backbone.prepared.digest, {}), {})

    async def is_served(self) -> bool:
        return bool(self.stages) and len((await self._known())[0]) > 0

    async def route(self, token_ids: tuple[int, ...], stages: Sequence[str] | None, deadline: Deadline) -> Routed:
        """The chain over one prompt. Raises UnknownName when there is nothing to choose from."""
        for stage in self.stages if stages is None else stages:
            if stage not in SERVED_STAGES:
                raise NotSupported(f"the dispatch stage {stage}", f"use {', '.join(SERVED_STAGES)}")
        table, names = await self._known()
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
        chosen = Chosen(f"{self.backbone.id}:{names[dispatched.expert]}", self.backbone, ((dispatched.expert, 1.0),))
        return Routed(chosen, dispatched.stage, dispatched.margin)

    async def _known(self) -> tuple[CentroidTable, dict[str, str]]:
        """The centroids of the experts that stand now, and their names by digest; made anew only after a change."""
        experts = await self._experts.all()
        if experts is not self._read:
            entries = {name: one for name, one in experts.items() if one is not None}
            names = {digest: name for name, (digest, _) in reversed(entries.items())}
            self._table = (CentroidTable(self.backbone.prepared.digest, dict(entries.values())), names)
            self._read = experts
        return self._table


def _centroid(artefact: Artefact) -> tuple[str, TaskCentroid] | None:
    """Digest and centroid; None for an expert that `auto` never chooses by one."""
    try:
        centroid = TaskCentroid.of_card(artefact.card, artefact.name)
    except CorruptArtefact as error:  # one broken card must not keep everybody from `auto`
        logger.warning("%s", error)
        return None
    return None if centroid is None else (artefact.digest, centroid)
