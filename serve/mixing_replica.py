"""The expert-mixing part of the graph: mixtures registered, and few-shot searches run over the backbones' handles.

It may die at any time: mixtures are in the registry, and searches go on from their last generation when it is back.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.serve.handle import DeploymentHandle

from actors import logs, meters
from actors.centroids import Seen, TenantsCentroids
from actors.drift_meters import tell_drift
from actors.expert_mixing import Candidates, ExpertMixing
from actors.messages import SearchAsked
from actors.mixture_searches import Searched, Searches
from actors.registry import RegistryClient
from cluster.settings import MixingSettings, Settings
from metasepia.centroids import CentroidFacts, CentroidKey, KnownMean
from metasepia.errors import InvalidRequest, UnknownName
from metasepia.experts.lora import LoraAdapter, read_adapter
from metasepia.experts.mixing import BASE
from metasepia.experts.vectors import ExpertVectors, FactorIndex
from metasepia.registry.entries import LOCAL, Artefact
from metasepia.rows import Adapter
from metasepia.search.jobs import SearchJob
from metasepia.search.warm_start import Nearness
from serve import prepare
from serve.models.prompts import Prompts
from serve.parts import Backbone, ServedBackbone, Weights
from serve.reached import Reached

DRIFT_EVERY_S = 2.0
"""How often the gauges of centroids are set."""
MAX_CANDIDATES = 64
"""Experts of one search; each is scored alone in the first generation where the population has room."""


class ExpertMixingPart:
    """`ExpertMixing` and `Searches` over one registry."""

    def __init__(self, catalogue: Any, backbones: Sequence[Backbone], settings: MixingSettings, home: Path) -> None:
        """`home` is where the factors' indices are, for weights by layer."""
        self._catalogue, self._home, self._settings = catalogue, home, settings
        self._mixing = ExpertMixing(catalogue, self._layers)
        served = [
            Searched(
                id=one.id,
                digest=one.prepared.digest,
                rows=Reached(one),
                text_of=Prompts(Path(one.prepared.tokenizer_dir), one.id).text,
            )
            for one in backbones
        ]
        self._served = {one.digest: one for one in served}
        self._turn = asyncio.Semaphore(1)
        self._searches: dict[str, Searches] = {}

    def searches_of(self, owner: str) -> Searches:
        """One tenant's searches. They run one at a time, whoever they are of, in the order in which they came."""

        async def register(job: SearchJob, adapter: Adapter, facts: Mapping[str, object]) -> str:
            candidates = Candidates(named=job.candidates, factors=job.factors, bases=frozenset(job.bases))
            return await self._mixing.put(job.backbone, adapter, candidates, owner, facts)

        if owner not in self._searches:
            most = self._settings.max_searches
            self._searches[owner] = Searches(
                self._catalogue, self._served, register, owner=owner, max_unfinished=most, turn=self._turn
            )
        return self._searches[owner]

    async def recover(self) -> int:
        """Goes on with every tenant's searches; how many."""
        return sum([await self.searches_of(one).recover() for one in await self._catalogue.owners("search")])

    async def stop(self) -> None:
        """Leaves the searches to whoever recovers them."""
        for one in self._searches.values():
            await one.stop()

    async def register(self, backbone: str, weights: Weights, owner: str, name: str | None = None) -> str:
        """See `ExpertMixing.register`."""
        meters.MIXTURES.inc()
        return await self._mixing.register(backbone, weights, owner, name)

    async def search(self, asked: SearchAsked) -> dict[str, Any]:
        """Queues a search; see `Searches.submit`.

        Raises UnknownName, and InvalidRequest for candidates that cannot be mixed, for fewer than two, and for a warm
        start of which nothing is known.
        """
        meters.SEARCHES.inc()
        names = await self._all_experts(asked.backbone, asked.owner) if asked.experts is None else asked.experts
        if not names:
            raise InvalidRequest("experts", "the backbone has none that can be mixed; register some first")
        if len(names) > MAX_CANDIDATES:
            raise InvalidRequest("experts", f"{len(names)} are candidates and at most {MAX_CANDIDATES} are; name fewer")
        if len(names) + asked.base < 2:
            raise InvalidRequest("experts", "a search needs two candidates or more; name another, or let base be true")
        try:
            wanted = [*names, *([BASE] if asked.base else [])]
            found = await self._mixing.candidates(asked.backbone, wanted, asked.owner, "experts")
        except UnknownName as error:
            raise UnknownName("candidate expert", error.name, error.known) from None
        if len(set(found.digests.values())) < len(found.named):
            raise InvalidRequest("experts", "two names stand for the same expert; leave one out")
        num_layers = 1
        if asked.settings.per_layer:
            if found.factors is None:
                raise InvalidRequest("per_layer", "is for expert vectors; low-rank adapters have a weight each")
            num_layers = len(self._layers(found.factors).lengths)
        start = None
        if asked.near is not None:
            known = await self._digests(asked.near, asked.owner)
            start = asked.near.start(known, list(found.digests.values()), found.bases)
        return await self.searches_of(asked.owner).submit(
            SearchJob(
                backbone=asked.backbone,
                candidates=tuple(sorted(found.named)),
                bases=tuple(sorted(found.bases)),
                factors=found.factors,
                num_layers=num_layers,
                examples=asked.examples,
                num_shots=asked.num_shots,
                settings=asked.settings,
                by=asked.by,
                match=asked.match,
                max_tokens=asked.max_tokens,
                stop_token_ids=asked.stop_token_ids,
                start=start,
            )
        )

    async def search_get(self, owner: str, id_: str) -> dict[str, Any]:
        return await self.searches_of(owner).get(id_)

    async def search_listing(self, owner: str) -> list[dict[str, Any]]:
        return await self.searches_of(owner).listing()

    async def search_trace(self, owner: str, id_: str) -> list[dict[str, Any]]:
        return await self.searches_of(owner).trace(id_)

    async def search_picture(self, owner: str, id_: str) -> bytes:
        return await self.searches_of(owner).picture(id_)

    async def search_cancel(self, owner: str, id_: str) -> dict[str, Any]:
        return await self.searches_of(owner).cancel(id_)

    # -- experts -------------------------------------------------------------------------------------------------------

    async def _all_experts(self, backbone: str, owner: str) -> tuple[str, ...]:
        """Every expert that can be a candidate beside the others: expert vectors of the paper's form, or where there
        are none renormalised ones, or where there are none low-rank adapters. Never one that dispatches.
        """
        listed = await self._catalogue.list("expert", owner, limit=10 * MAX_CANDIDATES)
        own = {one.name: one for one in sorted(listed, key=lambda one: one.owner == owner)}
        able = [one for one in own.values() if one.card.get("backbone") == backbone and not one.card.get("dispatcher")]
        kinds: dict[str, list[str]] = {"plain": [], "renormalised": [], "low rank": []}
        for one in able:
            kinds[await self._kind(one, owner)].append(one.name)
        return tuple(next((names for names in kinds.values() if names), []))

    async def _kind(self, artefact: Artefact, owner: str) -> str:
        expert = read_adapter(await self._catalogue.get(artefact.digest, owner), artefact.name)
        if isinstance(expert, LoraAdapter):
            return "low rank"
        assert isinstance(expert, ExpertVectors)
        return "renormalised" if expert.renormalise else "plain"

    async def _digests(self, near: Nearness, owner: str) -> dict[str, str]:
        """What the names of experts stand for now; one that is gone stands for nothing."""
        names = list(dict.fromkeys(name for name, _ in near.experts))
        asked = (self._catalogue.resolve("expert", name, owner) for name in names)
        found = await asyncio.gather(*asked, return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException) and not isinstance(one, UnknownName):
                raise one
        return {name: one.digest for name, one in zip(names, found, strict=True) if isinstance(one, Artefact)}

    def _layers(self, factors: str) -> FactorIndex:
        return FactorIndex.read(factors, self._home)


class MixingReplica(ExpertMixingPart):
    """What Serve runs; it goes on with the searches that its predecessor left, and has the graph's online centroids
    (`actors.centroids` says why here)."""

    async def __init__(
        self, settings: Settings, registry: RegistryClient, backbones: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        prepared = await asyncio.to_thread(prepare.ready, settings)
        served = [ServedBackbone(id_, prepared[id_], handle) for id_, handle in backbones.items()]
        super().__init__(registry, served, settings.mixing, settings.home)
        logs.begin()
        self._centroids = TenantsCentroids(settings.centroids, settings.home / "centroids")
        self._telling = asyncio.create_task(self._tell_drift({one.prepared.digest: one.id for one in served}))
        await self.recover()

    async def _tell_drift(self, ids: Mapping[str, str]) -> None:
        while True:
            tell_drift(await self.centroids_facts(LOCAL), ids)  # names of tasks are their tenants'
            await asyncio.sleep(DRIFT_EVERY_S)

    async def centroids_check_room(self, owner: str, keys: Sequence[CentroidKey]) -> None:
        await self._centroids.check_room(owner, keys)

    async def centroids_absorb(self, owner: str, seen: Seen) -> tuple[CentroidFacts, ...]:
        return await self._centroids.absorb(owner, seen)

    async def centroids_compare(self, owner: str, seen: Seen) -> tuple[tuple[CentroidFacts, float], ...]:
        return await self._centroids.compare(owner, seen)

    async def centroids_facts(self, owner: str) -> tuple[CentroidFacts, ...]:
        return await self._centroids.facts(owner)

    async def centroids_forget(self, owner: str, task: str) -> int:
        return await self._centroids.forget(owner, task)

    async def centroids_known_means(self, owner: str, backbone: str) -> tuple[KnownMean, ...]:
        return await self._centroids.known_means(owner, backbone)

    async def __del__(self) -> None:
        # Serve awaits this when it takes the replica down.
        if hasattr(self, "_centroids"):
            await self._centroids.stop()
        if hasattr(self, "_searches"):
            await self.stop()
