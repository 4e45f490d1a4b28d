"""Experts come, change and go at 100/s while rows decode, with room for a few: every row has its own weights."""

import asyncio
import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import registry
from actors.backbone import BackboneGroup
from actors.registry import RegistryClient
from cluster import settings as cluster_settings
from cluster.settings import BackboneSettings
from metasepia.errors import InvalidSettings, UnknownName
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, Executed, Row, Sampling, TokenChunk
from tests import gangs

OWNER = "local"
NUM_EXPERTS, NUM_NAMES, NUM_HELD, NUM_ASKERS = 16, 8, 4, 12
CHANGES_PER_S = 100
PINNED = "hot"


@dataclass(frozen=True)
class Answered:
    """One row of the storm."""

    row: Row
    tokens: tuple[int, ...]
    executed: Executed
    outlived: bool
    """Its name stood for something else, or nothing, before it ended."""


@dataclass
class Storm:
    group: BackboneGroup
    client: RegistryClient
    oracle: gangs.Oracle
    prepared: PreparedBackbone
    experts: list[ExpertVectors]
    run: Callable[..., Any]
    home: Path
    settings: BackboneSettings
    num_changes: int
    names: dict[str, str | None] = field(default_factory=dict)
    """What the changes left behind; None after a delete."""
    answered: list[Answered] = field(default_factory=list)
    refused: int = 0
    """Rows whose name the registry did not know when they came."""

    def swept(self, wanted: Callable[[Answered], bool] = lambda _: True) -> list[Answered]:
        """Answers that other weights gave, by the oracle that runs each row alone with rebuilt weights."""
        return [one for one in self.answered if wanted(one) and self.oracle.regret(one.row, one.tokens) > gangs.TIGHT]

    async def change(self, draw: np.random.Generator, name: str) -> None:
        """One acknowledged change of a name: added, replaced or deleted."""
        expert = self.experts[int(draw.integers(1, NUM_EXPERTS))]
        if draw.random() < 0.3 and self.names.get(name):
            await self.client.delete("expert", name, OWNER)
            self.names[name] = None
        else:
            await self.put(name, expert)

    async def put(self, name: str, expert: ExpertVectors) -> None:
        await self.client.put(
            "expert",
            expert.to_bytes(),
            digest=expert.digest,
            name=name,
            owner=OWNER,
            card={"backbone": expert.backbone},
        )
        self.names[name] = expert.digest

    async def changes(self) -> float:
        """All changes, CHANGES_PER_S begun each second; the rate at which they were acknowledged."""
        draw, begin = np.random.default_rng(1), time.monotonic()
        turns = {f"name-{i}": asyncio.Lock() for i in range(NUM_NAMES)}

        async def one(i: int) -> None:
            await asyncio.sleep(begin + i / CHANGES_PER_S - time.monotonic())
            name = f"name-{i % NUM_NAMES}"
            async with turns[name]:
                await self.change(draw, name)

        await asyncio.gather(*(one(i) for i in range(self.num_changes)))
        return self.num_changes / (time.monotonic() - begin)

    async def ask(self, seed: int, over: asyncio.Event) -> None:
        """Row after row as the door makes them: names are resolved when it comes, and the row carries digests."""
        draw = np.random.default_rng([2, seed])
        while not over.is_set():
            names = [f"name-{i}" for i in draw.choice(NUM_NAMES, 1 + int(draw.random() < 0.3), replace=False)]
            names = [PINNED] if draw.random() < 0.1 else names
            try:
                found = [(await self.client.resolve("expert", name, OWNER)).digest for name in names]
            except UnknownName:
                self.refused += 1
                continue
            adapter = tuple(sorted((digest, 1 / len(set(found))) for digest in set(found)))
            await self.answer(self.row(draw, adapter), names, found)

    def row(self, draw: np.random.Generator, adapter: Adapter, max_tokens: int = 10) -> Row:
        return Row(
            request_id="storm",
            backbone=self.prepared.digest,
            token_ids=tuple(int(token) for token in draw.integers(0, 250, int(draw.integers(4, 12)))),
            adapter=adapter,
            sampling=Sampling(temperature=0.0, max_tokens=max_tokens),
            deadline_unix_s=time.time() + 200,
        )

    async def answer(self, row: Row, names: list[str] = [], found: list[str] = []) -> Answered:  # noqa: B006
        chunks: list[TokenChunk] = [chunk async for chunk in self.group.generate(row)]
        outlived = [self.names[name] for name in names] != found
        executed = chunks[-1].executed
        assert executed is not None
        tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
        self.answered.append(Answered(row, tokens, executed, outlived))
        return self.answered[-1]

    async def blow(self) -> float:
        over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for seed in range(NUM_ASKERS):
                group.create_task(self.ask(seed, over))
            rate = await self.changes()
            over.set()
        return rate


@pytest.fixture(
    scope="module", params=[(1, 300), pytest.param((2, 3000), marks=pytest.mark.soak)], ids=["tp_size 1", "tp_size 2"]
)
def storm(
    request: pytest.FixtureRequest,
    cluster: dict[str, float],
    run: Callable[..., Any],
    home: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Storm]:
    tp_size, num_changes = request.param
    source = str(tiny_checkpoint("llama"))
    prepared = checkpoints.prepare(source, home)
    plain = BackboneSettings(id="storm", source=source)
    oracle = gangs.Oracle.of(prepared, plain, home)
    draw = np.random.default_rng(3)
    experts = [
        ExpertVectors(
            backbone=prepared.digest,
            factors=oracle.factors.digest,
            z={
                name: draw.uniform(0.2, 1.8, len(one.s)).astype(np.float32)
                for name, one in oracle.factors.factors.items()
            },
        )
        for _ in range(NUM_EXPERTS)
    ]
    for expert in experts:
        oracle.reference.put_expert(expert)
    settings = BackboneSettings(
        id="storm",
        source=source,
        tp_size=tp_size,
        max_rows=8,
        max_expert_mib=(1 + NUM_HELD) * experts[0].num_bytes / 2**20,
        pinned=PINNED,
    )
    where = tmp_path_factory.mktemp("storm")
    client = registry.start(
        cluster_settings.read("laptop", {"METASEPIA_HOME": str(where), "METASEPIA_REGISTRY__CPUS": "0.01"})
    )

    async def resolve(name: str) -> str:
        return (await client.resolve("expert", name, OWNER)).digest

    scope = gangs.started(settings, prepared, home, fetch=client.get, resolve=resolve)
    try:
        with pytest.raises(
            InvalidSettings, match=r"backbones\[storm\]\.pinned = 'hot' .*no expert named 'hot'; known: none"
        ):
            run(gangs.started(settings, prepared, home, fetch=client.get, resolve=resolve).__aenter__())
        made = Storm(None, client, oracle, prepared, experts, run, home, settings, num_changes)  # pyright: ignore[reportArgumentType]
        run(made.put(PINNED, experts[0]))
        made.group = run(scope.__aenter__())
        try:
            yield made
        finally:
            run(scope.__aexit__(None, None, None))
    finally:
        registry.stop()


def test_every_row_of_a_storm_is_answered_by_the_weights_that_it_was_admitted_with(storm: Storm) -> None:
    rate = storm.run(storm.blow(), 300)
    load = storm.run(storm.group.load())
    rows = Counter(len(one.row.adapter) for one in storm.answered)
    paths = Counter(one.executed.path for one in storm.answered)
    outlived = sum(one.outlived for one in storm.answered)
    print(f"{rate:.0f} changes/s, rows {dict(rows)}, {dict(paths)}, {outlived} outlived their name, {load}")
    hot = ((storm.experts[0].digest, 1.0),)
    for one in storm.answered:
        assert one.executed.adapter == one.row.adapter  # the receipt names what was admitted
        assert one.executed.path == ("materialised" if one.row.adapter == hot else "factors")
        assert len(one.tokens) == 10
    assert storm.swept() == []
    # And it was a storm: rows outlived what they were admitted with, and experts made room all the time.
    assert min(rows[1], rows[2], paths["materialised"], storm.refused, outlived) > 0
    assert load.experts_forgotten > NUM_EXPERTS and load.expert_bytes <= storm.settings.max_expert_bytes
    assert (load.num_live, load.num_reading, load.num_waiting) == (0, 0, 0)


def test_the_oracle_tells_any_two_experts_apart(storm: Storm) -> None:
    draw = np.random.default_rng(4)

    async def ask() -> list[Answered]:
        rows = [storm.row(draw, ((expert.digest, 1.0),)) for expert in storm.experts]
        return list(await asyncio.gather(*(storm.answer(row) for row in rows)))

    for one in storm.run(ask()):
        mistaken = [
            expert
            for expert in storm.experts
            if ((expert.digest, 1.0),) != one.row.adapter
            and storm.oracle.regret(dataclasses.replace(one.row, adapter=((expert.digest, 1.0),)), one.tokens)
            <= 10 * gangs.TIGHT
        ]
        assert not mistaken


def test_two_rows_of_the_table_swapped_on_purpose_are_caught(storm: Storm) -> None:
    first, second = storm.experts[1].digest, storm.experts[2].digest
    draw = np.random.default_rng(5)

    async def both() -> list[Answered]:
        rows = [storm.row(draw, ((digest, 1.0),)) for digest in (first, second)]
        return list(await asyncio.gather(*(storm.answer(row) for row in rows)))

    def swap(shard: Any) -> None:
        held = shard._experts._held
        held._held[first], held._held[second] = held._held[second], held._held[first]
        held._composed.clear()
        held._composed_bytes = 0
        shard._experts._selected = None

    async def swap_on_every_rank() -> None:
        gang = storm.group._gang
        assert gang is not None
        await asyncio.gather(*(process.handle.__ray_call__.remote(swap) for process in gang.processes))

    storm.run(both())  # now both are held
    for wrong in (True, False):
        storm.run(swap_on_every_rank())
        answers = storm.run(both())
        assert [one.executed.adapter for one in answers] == [((first, 1.0),), ((second, 1.0),)]
        assert storm.swept(lambda one, answers=answers: one in answers) == (answers if wrong else [])
    storm.answered.clear()


def test_a_new_gang_pins_what_the_name_stands_for_then_and_holds_what_rows_ask_for(storm: Storm) -> None:
    group, draw = storm.group, np.random.default_rng(6)
    new = storm.experts[1]
    hot, other = (storm.row(draw, ((expert.digest, 1.0),), 60) for expert in (new, storm.experts[2]))

    async def survive() -> list[Answered]:
        await storm.put(PINNED, new)
        before = await storm.answer(dataclasses.replace(hot, sampling=Sampling(temperature=0.0, max_tokens=4)))
        assert before.executed.path == "factors"  # this gang pins what it found
        under_way = [asyncio.create_task(storm.answer(row)) for row in (hot, other)]
        await asyncio.sleep(0.05)
        os.kill(group.info.pids[0], signal.SIGKILL)
        return list(await asyncio.gather(*under_way))

    answers = storm.run(survive(), 240)
    assert [one.executed.path for one in answers] == ["materialised", "factors"]
    assert group.info.pinned == new.digest and len(group.info.rebuilds) == 1
    assert storm.swept(lambda one: one in answers) == []
