"""The model `auto`: the settings' chain of dispatch stages picks an expert by the request, or the base weights answer.

`centroid`    one short pass of the base model over the prompt, then the nearest task centroid among the experts' cards
`task`        one pass of the text encoder, then the nearest registered data set that the message could be a text of
`classifier`  a dispatch expert's answer to "who should answer this?", from one forward
`prompt`      the base model's own answer to that, generated

A stage that cannot tell abstains and the next one is asked; one that finds the request to be for no expert ends the
chain. All but `centroid` read the text of a chat's last message by its user, and abstain for anything else.
`auto` is listed while some stage of the settings has something to choose from.

The state by which `centroid` chose is told to the graph's online centroids, as the task `auto:<expert>`. With the
setting `centroids.used_by_auto` the stage also chooses by what /v1/hidden_states was sent under experts' names.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from actors import meters, tracing
from cluster.settings import DispatchMargins
from metasepia.centroids import ROUTED, CentroidKey, KnownMean
from metasepia.dispatch.centroid import CentroidTable, Dispatched, TaskCentroid
from metasepia.dispatch.dispatcher import Described, Dispatcher, route_by_classifier, route_by_prompt
from metasepia.dispatch.observed import routable
from metasepia.dispatch.task import RegionTable, TextRegion
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported, UnknownName
from metasepia.registry.entries import Artefact
from metasepia.rows import Row, Scores, TokenChunk
from serve.access.tenants import PerTenant
from serve.models.names import AUTO, Chosen
from serve.models.prompts import Prompts
from serve.models.shelf import Shelf
from serve.parts import Backbone, Catalogue, TextEncoder
from serve.requests.deadlines import Deadline
from serve.states.observing import Observer
from serve.tasks.stage import TaskStage, region_of

logger = logging.getLogger(__name__)

SERVED_STAGES = ("centroid", "task", "classifier", "prompt")
MAX_DESCRIBED = 32
"""Experts that the stage `prompt` chooses among, the first by name; a small model reads no longer list."""


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
    """`auto` only: the stage that chose, an expert or that none is wanted; `abstained` where none could tell, and the
    base weights answer."""
    margin: float | None = None


@dataclass(frozen=True)
class _Known:
    """What a registered expert's card says to dispatch."""

    digest: str
    backbone: str
    about: str | None
    centroid: TaskCentroid | None
    dispatcher: Dispatcher | None
    region: TextRegion | None


def _counted(routed: Routed) -> Routed:
    meters.ROUTED.inc(stage=routed.stage or "abstained")
    return routed


@dataclass(frozen=True)
class _Table:
    """The experts that stand now."""

    centroids: CentroidTable
    cards: Mapping[str, TaskCentroid]
    """By expert's name: what the cards say, whatever was observed since. Layers count from 0, as in what is observed.
    """
    names: Mapping[str, str]
    """By digest."""
    targets: Mapping[str, str]
    """Digests by name of all that may be chosen: experts of this backbone that do not dispatch."""
    described: tuple[Described, ...]
    dispatcher: Dispatcher | None
    described_texts: Mapping[str, TextRegion]
    """By digest of targets: where the card says that its task's texts lie."""
    regions: RegionTable | None = None
    """Those and the data sets registered since; known where a stage `task` is asked."""

    def has(self, stage: str) -> bool:
        """Whether a stage has something to choose from."""
        if stage == "centroid":
            return len(self.centroids) > 0
        if stage == "task":
            return self.regions is not None
        return bool(self.described) if stage == "prompt" else self.dispatcher is not None and bool(self.targets)


@dataclass
class _Own:
    """What one tenant's requests are routed by."""

    experts: Shelf[_Known]
    tasks: TaskStage
    table: _Table
    read: tuple[Mapping[str, _Known] | None, tuple[KnownMean, ...]] = (None, ())
    """What the table was made of."""


class Routing:
    """Chooses among the experts of one backbone that a tenant can see."""

    def __init__(
        self,
        backbone: Backbone,
        catalogue: Catalogue,
        stages: Sequence[str],
        margins: DispatchMargins | None = None,
        prompts: Prompts | None = None,
        observer: Observer | None = None,
        encoders: Sequence[TextEncoder] = (),
    ) -> None:
        """`prompts` None: `classifier` and `prompt` abstain; `observer` None: nobody is told of states; without a text
        encoder `task` has nothing to choose from.
        """
        self.backbone, self.stages, self._observer = backbone, tuple(stages), observer
        self._margins, self._prompts = margins or DispatchMargins(), prompts

        def own(owner: str) -> _Own:
            return _Own(
                experts=Shelf(catalogue, "expert", owner, _known),
                tasks=TaskStage(catalogue, owner, encoders, self._margins),
                table=_Table(CentroidTable(backbone.prepared.digest, {}), {}, {}, {}, (), None, {}),
            )

        self._own = PerTenant(own)

    async def is_served(self) -> bool:
        if not self.stages:
            return False
        table = await self._known(self._own.mine(), self.stages)
        return any(table.has(stage) for stage in self.stages)

    @tracing.spanned("route")
    async def route(
        self, token_ids: tuple[int, ...], stages: Sequence[str] | None, deadline: Deadline, text: str | None = None
    ) -> Routed:
        """The chain over one prompt; `text` is its last user message, of a chat.

        Raises UnknownName when there is nothing to choose from.
        """
        stages = self.stages if stages is None else stages
        for stage in stages:
            if stage not in SERVED_STAGES:
                raise NotSupported(f"the dispatch stage {stage}", f"use {', '.join(SERVED_STAGES)}")
        own = self._own.mine()
        table = await self._known(own, (*stages, *self.stages))
        if not any(table.has(stage) for stage in SERVED_STAGES):
            raise UnknownName("model", AUTO, (self.backbone.id,))
        margin: float | None = None
        for stage in stages:
            if not table.has(stage):
                continue
            dispatched = await self._ask(stage, own.tasks, table, token_ids, text, deadline)
            margin = dispatched.margin
            if dispatched.abstains:
                continue
            if dispatched.expert is None:
                return _counted(Routed(Chosen(self.backbone.id, self.backbone), stage, margin))
            name = f"{self.backbone.id}:{table.names[dispatched.expert]}"
            return _counted(Routed(Chosen(name, self.backbone, ((dispatched.expert, 1.0),)), stage, margin))
        return _counted(Routed(Chosen(self.backbone.id, self.backbone), "abstained", margin))

    async def _ask(
        self,
        stage: str,
        tasks: TaskStage,
        table: _Table,
        token_ids: tuple[int, ...],
        text: str | None,
        deadline: Deadline,
    ) -> Dispatched:
        if stage == "centroid":
            return await self._by_centroid(table, token_ids, deadline)
        if text is None or not text.strip():
            return Dispatched(expert=None, margin=0.0, stage=stage)
        if stage == "task":
            assert table.regions is not None  # `has` has seen to it
            return await tasks.choose(text, table.regions, deadline)
        if self._prompts is None:
            return Dispatched(expert=None, margin=0.0, stage=stage)
        prepared, rows = self.backbone.prepared, _Rows(self.backbone)
        about = {
            "stop_token_ids": prepared.eos_token_ids,
            "window": prepared.window,
            "deadline_unix_s": deadline.unix_s,
        }
        if stage == "prompt":
            return await route_by_prompt(
                rows, text, table.described, self._prompts, min_margin=self._margins.prompt, **about
            )
        assert table.dispatcher is not None  # `has` has seen to it
        least = self._margins.classifier
        return await route_by_classifier(
            rows, text, table.dispatcher, table.targets, self._prompts, min_margin=least, **about
        )

    async def _by_centroid(self, table: _Table, token_ids: tuple[int, ...], deadline: Deadline) -> Dispatched:
        wanted = table.centroids.wanted
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
        states = {one: answer[0].states for one, answer in zip(wanted, answers, strict=True)}
        found = table.centroids.choose(states)
        if found.expert is None or found.margin < self._margins.centroid:
            return Dispatched(expert=None, margin=found.margin)
        if self._observer is not None:
            name = table.names[found.expert]
            used, card = table.centroids[found.expert], table.cards.get(name)
            one = next(one for one in wanted if one.pooling == used.pooling and used.layer in one.layers)
            state = states[one][one.layers.index(used.layer)]
            self._observer.routed(self._key(ROUTED + name, used), state, None if card is None else card.mean)
        return found

    def _key(self, task: str, centroid: TaskCentroid) -> CentroidKey:
        return CentroidKey(
            backbone=centroid.backbone, task=task, adapter="", layer=centroid.layer, pooling=centroid.pooling
        )

    async def registered(self, name: str) -> tuple[CentroidKey, Float[np.ndarray, " hidden"]] | None:
        """Where the card of the expert of this name says that its prompts lie; None without one."""
        card = (await self._known(self._own.mine())).cards.get(name)
        return None if card is None else (self._key(name, card), card.mean)

    async def _known(self, own: _Own, stages: Sequence[str] = ()) -> _Table:
        """The experts that stand now; made anew only after a change. The data sets too, where `stages` has `task`."""
        digest = self.backbone.prepared.digest
        means = () if self._observer is None else self._observer.known_means(digest)
        experts = await own.experts.all()
        if experts is not own.read[0] or means is not own.read[1]:
            able = {n: one for n, one in experts.items() if one.backbone == digest}
            targets = {name: one for name, one in able.items() if one.dispatcher is None}
            found = {name: one.centroid for name, one in targets.items()}
            cards = {
                name: replace(one, layer=one.layer % (self.backbone.prepared.num_layers + 1))
                for name, one in found.items()
                if one is not None and one.backbone == digest
            }
            learnt = routable(means, {name: cards.get(name) for name in targets})
            described = [
                Described(digest=one.digest, name=name, about=one.about)
                for name, one in targets.items()
                if one.about is not None
            ]
            own.table = _Table(
                centroids=CentroidTable(digest, {targets[n].digest: one for n, one in (cards | learnt).items()}),
                cards=cards,
                names={one.digest: name for name, one in reversed(targets.items())},
                targets={name: one.digest for name, one in targets.items()},
                described=tuple(described[:MAX_DESCRIBED]),
                dispatcher=next((one.dispatcher for one in able.values() if one.dispatcher is not None), None),
                described_texts={one.digest: one.region for one in targets.values() if one.region is not None},
            )
            own.read = experts, means
        table = own.table
        if "task" not in stages:
            return table
        return replace(table, regions=await own.tasks.table(table.targets, table.described_texts))


class _Rows:
    """A served backbone as the library's stages ask it, a row at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self.digest = backbone, backbone.prepared.digest

    def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        return self._backbone.generate(row)

    async def score(self, row: Row) -> Scores:
        return (await self._backbone.score([row]))[0]


def _known(artefact: Artefact) -> _Known:
    """One broken entry of a card must not keep everybody from `auto`: it is left out, and told."""
    card = artefact.card
    description = card.get("description")
    about = " ".join(description.split()) if isinstance(description, str) and description.strip() else None
    dispatcher: Dispatcher | None = None
    centroid: TaskCentroid | None = None
    try:
        dispatcher = Dispatcher.of_card(card, artefact.digest, artefact.name)
        centroid = TaskCentroid.of_card(card, artefact.name)
    except CorruptArtefact as error:
        logger.warning("%s", error)
        if card.get("dispatcher") is not None:
            about = None  # whatever it is, it is no target
    return _Known(artefact.digest, str(card.get("backbone")), about, centroid, dispatcher, region_of(artefact))
