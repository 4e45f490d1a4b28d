"""Searches as jobs, over a real registry and a pretended backbone."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from actors import mixture_searches, yielding
from actors.mixture_searches import Searched, Searches
from metasepia.errors import CorruptArtefact, InvalidRequest, Overloaded, Unavailable, UnknownName
from metasepia.registry.catalogue import Registry
from metasepia.rows import Adapter
from metasepia.search.jobs import Progress, SearchJob, matches
from tests.searches import BACKBONE, MATHS, Direct, PretendedRows, a_job, text_of

OWNER = "local"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as opened:
        yield opened


class Graph:
    """One life of the actor that runs searches."""

    def __init__(self, registry: Registry, rows: PretendedRows | None = None, max_unfinished: int = 4) -> None:
        self.rows, self.catalogue = rows or PretendedRows(), Direct(registry)
        self.registered: list[tuple[Adapter, Mapping[str, object]]] = []
        backbone = Searched(id="tiny", digest=BACKBONE, rows=self.rows, text_of=text_of)
        self.searches = Searches(
            self.catalogue, {BACKBONE: backbone}, self._register, owner=OWNER, max_unfinished=max_unfinished
        )

    async def _register(self, job: SearchJob, adapter: Adapter, facts: Mapping[str, object]) -> str:
        self.registered.append((adapter, facts))
        return "e" * 64

    async def ended(self, id_: str) -> dict[str, Any]:
        while (job := await self.searches.get(id_))["status"] in ("queued", "running"):
            await asyncio.sleep(0)
        return job


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main(), 30)

    return asyncio.run(bounded())


def whole(registry: Registry, job: SearchJob) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        graph = Graph(registry)
        await graph.searches.submit(job)
        return await graph.ended(job.id)

    return run(main)


@pytest.mark.parametrize("by", ["likelihood", "accuracy"])
def test_a_search_ends_with_a_registered_mixture_and_says_what_was_chosen_on_what(registry: Registry, by: str) -> None:
    job = a_job(by=by)

    async def main() -> None:
        graph = Graph(registry)
        queued = await graph.searches.submit(job)
        assert (queued["status"], queued["id"]) == ("queued", job.id)
        done = await graph.ended(job.id)
        result = done["result"]
        assert done["status"] == "done" and result["model"] == f"tiny:mix@{'e' * 64}"
        assert abs(result["weights"]["maths"] - 0.8) < 0.15 and result["best_single"] == "maths"
        assert (result["chosen_on"]["examples"], result["measured_on"]["examples"]) == (4, 6)
        assert result["chosen_on"]["split"] == "shots" and result["measured_on"]["split"] == "held_out"
        assert result["measured_on"]["mixture"] == result["chosen_on"]["mixture"]  # all questions are alike here
        (adapter, facts), *more = graph.registered
        assert dict(adapter)[MATHS] == result["weights"]["maths"] and not more
        assert facts["search"]["id"] == job.id  # pyright: ignore[reportIndexIssue]

    run(main)


def test_a_search_killed_in_any_generation_goes_on_by_itself_to_the_same_bytes(tmp_path: Path) -> None:
    job = a_job(generations=3)
    with Registry(tmp_path / "whole") as registry:
        wanted = whole(registry, job)
    assert wanted["generations"] == 3

    for dies_at in range(2, wanted["generations"] + 4):
        with Registry(tmp_path / f"killed {dies_at}") as registry:

            async def live(dies_at: int = dies_at, registry: Registry = registry) -> None:
                graph = Graph(registry)
                await graph.searches.submit(job)
                while len(graph.catalogue.puts) < dies_at and graph.searches._tasks:
                    await asyncio.sleep(0)
                # Its tasks end with the event loop, wherever they are.

            async def live_again(registry: Registry = registry) -> dict[str, Any]:
                graph = Graph(registry)
                await graph.searches.recover()
                return await graph.ended(job.id)

            run(live)
            again = run(live_again)
            assert {k: v for k, v in again.items() if k != "created_unix_s"} == {
                k: v for k, v in wanted.items() if k != "created_unix_s"
            }


def test_the_same_request_again_is_the_same_job(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry)
        await graph.searches.submit(a_job())
        first = await graph.ended(a_job().id)
        num_rows = len(graph.rows.rows)
        assert await graph.searches.submit(a_job()) == first
        assert len(graph.rows.rows) == num_rows
        assert (await graph.searches.submit(a_job(seed=1)))["id"] != first["id"]

    run(main)


def test_a_full_or_absent_backbone_is_waited_for(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def no_sleep(seconds: float) -> None:
        if seconds < 1.0:  # somebody else's, in a thread of its own
            await sleep(seconds)
            return
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(mixture_searches.asyncio, "sleep", no_sleep)
    wanted = whole(registry, a_job())

    async def main() -> None:
        graph = Graph(registry)
        graph.rows.refusals = [
            Overloaded("the queue", 3.0),
            Unavailable("the gang", 60.0),
            Overloaded("the queue", 2.0),
        ]
        await graph.searches.submit(a_job(num_shots=3))
        assert (await graph.ended(a_job(num_shots=3).id))["status"] == "done"

    run(main)
    assert sorted(pauses) == [2.0, 3.0, 5.0] and wanted["status"] == "done"


def test_few_rows_are_asked_for_at_a_time_and_all_behind_other_peoples(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry)
        job = a_job(num_examples=40, num_shots=30, generations=1)
        await graph.searches.submit(job)
        await graph.ended(job.id)
        assert max(graph.rows.calls) <= yielding.ROWS_A_CALL
        assert graph.rows.most_open <= yielding.CALLS_AT_ONCE
        assert {row.priority for row in graph.rows.rows} == {-1}
        assert all(row.deadline_unix_s < float("inf") for row in graph.rows.rows)

    run(main)


def test_a_cancelled_search_asks_for_nothing_more_and_goes_on_when_it_is_asked_for_again(
    registry: Registry, tmp_path: Path
) -> None:
    with Registry(tmp_path / "uninterrupted") as other:
        wanted = whole(other, a_job())

    async def main() -> None:
        graph = Graph(registry)
        job = a_job()
        await graph.searches.submit(job)
        while (await graph.searches.get(job.id))["generations"] < 2:
            await asyncio.sleep(0)
        cancelled = await graph.searches.cancel(job.id)
        num_rows = len(graph.rows.rows)
        for _ in range(50):
            await asyncio.sleep(0)
        assert cancelled["status"] == "cancelled" and len(graph.rows.rows) == num_rows and graph.rows.num_open == 0
        assert await graph.searches.get(job.id) == cancelled == await graph.searches.cancel(job.id)
        assert len(await graph.searches.trace(job.id)) == cancelled["generations"] >= 2
        await graph.searches.submit(job)
        done = await graph.ended(job.id)
        assert (done["result"], done["checkpoint"]) == (wanted["result"], wanted["checkpoint"])

    run(main)


def test_a_finished_search_is_not_cancelled(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry)
        await graph.searches.submit(a_job())
        done = await graph.ended(a_job().id)
        assert await graph.searches.cancel(a_job().id) == done

    run(main)


def test_jobs_run_one_after_another_and_too_many_are_refused(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry, max_unfinished=2)
        graph.rows.gate = asyncio.Event()
        for seed in range(2):
            await graph.searches.submit(a_job(seed=seed))
        with pytest.raises(Overloaded, match="the queue of searches"):
            await graph.searches.submit(a_job(seed=2))
        for _ in range(50):
            await asyncio.sleep(0)
        statuses = [(await graph.searches.get(a_job(seed=seed).id))["status"] for seed in range(2)]
        assert statuses == ["running", "queued"]
        graph.rows.gate.set()
        for seed in range(2):
            assert (await graph.ended(a_job(seed=seed).id))["status"] == "done"
        assert [one["id"] for one in await graph.searches.listing()] == [a_job(seed=1).id, a_job(seed=0).id]

    run(main)


def test_only_so_many_finished_searches_are_kept(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_searches, "MAX_FINISHED", 2)

    async def main() -> None:
        graph = Graph(registry)
        for seed in range(4):
            job = a_job(seed=seed, generations=1)
            await graph.searches.submit(job)
            await graph.ended(job.id)
        kept = {one["id"] for one in await graph.searches.listing()}
        assert kept == {a_job(seed=seed, generations=1).id for seed in (1, 2, 3)} - {a_job(seed=1, generations=1).id}

    run(main)


def test_a_search_that_fails_says_why_and_keeps_its_trace(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry)
        await graph.searches.submit(a_job())
        while (await graph.searches.get(a_job().id))["generations"] < 1:
            await asyncio.sleep(0)
        graph.rows.refusals = [CorruptArtefact("expert maths", "its logits are not finite numbers")]
        failed = await graph.ended(a_job().id)
        assert failed["status"] == "failed" and failed["error"].startswith("expert maths cannot be used")
        assert len(await graph.searches.trace(a_job().id)) >= 1

    run(main)


def test_a_search_on_a_backbone_that_is_gone_fails_in_words(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry)
        graph.rows.gate = asyncio.Event()
        await graph.searches.submit(a_job())
        await graph.searches.stop()
        other = Graph(registry)
        other.searches._backbones = {}
        assert await other.searches.recover() == 1
        failed = await other.ended(a_job().id)
        assert failed["status"] == "failed" and "made with the backbone dddd" in failed["error"]

    run(main)


def test_what_cannot_be_searched_is_refused_before_anything_is_stored(registry: Registry) -> None:
    async def main() -> None:
        graph = Graph(registry)
        with pytest.raises(InvalidRequest, match="two examples or more"):
            await graph.searches.submit(a_job(num_examples=1))
        assert await graph.searches.listing() == [] and graph.catalogue.puts == []
        with pytest.raises(UnknownName):
            await graph.searches.get("search-none")

    run(main)


def test_the_trace_has_an_entry_a_generation_and_the_picture_shows_it(registry: Registry) -> None:
    done = whole(registry, a_job())

    async def main() -> None:
        graph = Graph(registry)
        trace = await graph.searches.trace(done["id"])
        assert [one["number"] for one in trace] == list(range(done["generations"]))
        assert all(len(one["scores"]) == 12 for one in trace)
        root = ElementTree.fromstring(await graph.searches.picture(done["id"]))
        bars = [one for one in root.iter() if one.tag.endswith("rect") and one.get("fill", "").startswith("#")]
        assert len(bars) == 3 * done["generations"]
        texts = {one.text for one in root.iter() if one.tag.endswith("text")}
        assert {"maths", "law", "base"} <= texts

    run(main)


def test_a_job_and_its_checkpoint_are_read_back_as_they_were_written() -> None:
    job = a_job()
    assert SearchJob.from_bytes(job.to_bytes()) == job
    progress = Progress(job.begin())
    assert Progress.from_bytes(progress.to_bytes()).to_bytes() == progress.to_bytes()
    for blob in (b"{}", b"[]", b"\xff", json.dumps({"kind": "search"}).encode()):
        with pytest.raises(CorruptArtefact):
            SearchJob.from_bytes(blob)
        with pytest.raises(CorruptArtefact):
            Progress.from_bytes(blob)


@pytest.mark.parametrize(
    ("answer", "wanted", "how", "is_right"),
    [
        (" Praise. ", "praise", "exact", True),
        ("praise it", "praise", "exact", False),
        ("It is praise", "praise", "contains", True),
        ("complaint", "praise", "contains", False),
    ],
)
def test_an_answer_is_matched_without_case_and_full_stop(answer: str, wanted: str, how: str, is_right: bool) -> None:
    assert matches(answer, wanted, how) is is_right  # pyright: ignore[reportArgumentType]
