"""What the graph does under load: overload, its end, an update, and memory over many requests.

    python -m benchmarks.load
    python -m benchmarks.load --parts overload --seconds 60 --json FILE
    python -m benchmarks.load --parts memory --requests 20000

overload   32-token completions at four times what the graph can do, at fixed times and from another process: what is
           answered in time against the best that it can do (the better of before and after), how late accepted ones
           are, what became of the others
sigterm    SIGTERM while clients ask, plainly and by stream: everything that had been sent is answered
update     Serve replaces every replica while clients ask, where there is room for one of each: they wait
memory     unique requests of every kind; the slope of each process's own memory, with its 95 % interval

Each part starts a graph of its own and ends it.
"""

import asyncio
import itertools
import math
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
import psutil

from benchmarks import graph, report
from benchmarks.graph import Graph
from benchmarks.load_client import Outcome, Sent, ask, client_of, closed_loop, open_loop, told

ANSWER_LEN = 32
PATIENT_S = 120.0
"""A client's deadline where none is to be missed."""
T_95 = {6: 2.447, 18: 2.101, 38: 2.024}
"""Student's t, two sides, by degrees of freedom."""
NUM_BLOCKS = 20


class Texts:
    """Texts that were never sent before."""

    def __init__(self) -> None:
        self._numbers = itertools.count(time.time_ns() % 10**9 * 1000)

    def one(self, words: int = 12) -> str:
        number = next(self._numbers)
        return " ".join(f"word{(number * (place + 1)) % 9973}" for place in range(words - 1)) + f" {number}"


def completions(graph: Graph, timeout_s: float, *, streams: bool = False) -> Callable[[], Sent]:
    """Each the next 32-token completion; every other one streamed where `streams`."""
    texts, model, turn = Texts(), graph.settings.backbones[0].id, itertools.count()

    def next_request() -> Sent:
        body = {"model": model, "prompt": texts.one(), "max_tokens": ANSWER_LEN, "temperature": 0}
        if streams and next(turn) % 2:
            body["stream"] = True
        return Sent("/v1/completions", body, timeout_s)

    return next_request


# -- overload ----------------------------------------------------------------------------------------------------------


def overload(arguments: Namespace) -> list[report.Row]:
    seconds, deadline_s = arguments.seconds, arguments.deadline
    with graph.running() as running:
        patient = completions(running, PATIENT_S)
        at_once = 3 * running.settings.backbones[0].max_rows
        asyncio.run(_for(running, patient, at_once, min(10.0, seconds / 4)))  # it learns its own speed
        before = _peak(asyncio.run(_for(running, patient, at_once, seconds / 3)))
        offered = arguments.times * before
        outcomes = asyncio.run(
            open_loop(running.url, completions(running, deadline_s), offered, seconds)
        )  # fmt: skip
        after = _peak(asyncio.run(_for(running, patient, at_once, seconds / 3)))
    peak = max(before, after)  # other work on the machine lowers either
    begin = min(one.sent_s for one in outcomes)
    goodput = _rate(outcomes, begin + deadline_s / 2, begin + seconds)
    accepted = sorted(one.latency_s for one in outcomes if one.kind == "ok")
    refused = [one for one in outcomes if one.kind == "refusal"]
    lost = [one for one in outcomes if one.kind == "lost"]
    what = (
        f"{ANSWER_LEN}-token completions offered at {arguments.times:g} x capacity ({offered:.1f}/s) for {seconds:g} s"
    )
    p99 = report.percentile(accepted, 99) if accepted else math.inf
    waits = sorted(one.retry_after_s for one in refused if one.retry_after_s is not None)
    return [
        report.rate("goodput", f"{what}: answered in time", goodput, peak, "requests/s", told(outcomes)),
        report.duration(
            "accepted-p50", f"{what}: accepted, p50", report.median(accepted or [math.inf]), deadline_s, "s"
        ),
        report.duration("accepted-p99", f"{what}: accepted, p99, against the deadline", p99, deadline_s, "s"),
        report.figure("refused", f"{what}: refused, typed", len(refused), "requests", f"Retry-After {_span(waits)}"),
        report.figure("lost", f"{what}: lost or untyped", len(lost), "requests", told(lost)),
    ]


async def _for(running: Graph, next_request: Callable[[], Sent], clients: int, seconds: float) -> list[Outcome]:
    end = time.monotonic() + seconds
    return await closed_loop(running.url, next_request, clients, lambda: time.monotonic() > end)


def _peak(outcomes: Sequence[Outcome]) -> float:
    return _rate(outcomes, outcomes[0].sent_s + 2, max(one.sent_s for one in outcomes))


def _rate(outcomes: Sequence[Outcome], begin_s: float, end_s: float) -> float:
    """Good answers a second that ended within the time."""
    good = sum(one.kind == "ok" and begin_s <= one.ended_s < end_s for one in outcomes)
    return good / max(end_s - begin_s, 1e-9)


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g} to {values[-1]:g} s" if values else "none"


# -- ends --------------------------------------------------------------------------------------------------------------


def sigterm(arguments: Namespace) -> list[report.Row]:
    with graph.running() as running:
        signalled_s = math.inf
        gone = False

        async def talk() -> list[Outcome]:
            nonlocal signalled_s

            async def after(one: Outcome) -> None:
                nonlocal gone
                if one.kind == "lost" and one.sent_s > signalled_s:
                    gone = True  # nobody listens any more
                elif one.kind == "refusal":
                    await asyncio.sleep(0.2)

            next_request = completions(running, PATIENT_S, streams=True)
            asking = asyncio.create_task(closed_loop(running.url, next_request, 12, lambda: gone, after))
            await asyncio.sleep(arguments.seconds / 6)
            signalled_s = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            return await asking

        outcomes = asyncio.run(talk())
        running.process.wait(running.settings.admission.grace_s + 10)
        ended_s = time.monotonic() - signalled_s
        status = running.process.returncode
    before = [one for one in outcomes if one.sent_s <= signalled_s]
    after = [one for one in outcomes if one.sent_s > signalled_s]
    failed = [one for one in before if one.kind != "ok"]
    refused = [one for one in after if one.kind == "refusal"]
    late = [one for one in after if one.kind == "lost"]
    under_way = sum(one.ended_s > signalled_s for one in before)
    return [
        report.figure(
            "sigterm-failed", "SIGTERM under load: requests sent before it that failed", len(failed), "requests",
            f"{len(before)} sent, {under_way} of them under way{'; ' + told(failed) if failed else ''}",
        ),
        report.figure("sigterm-refused", "sent after it: refused, typed", len(refused), "requests", told(refused)),
        report.figure("sigterm-gone", "sent after it: found nobody", len(late), "requests", told(late)),
        report.duration(
            "sigterm-seconds", "SIGTERM to the last process, against what it may take", ended_s,
            running.settings.admission.grace_s, "s", f"exit status {status}",
        ),
    ]  # fmt: skip


def update(arguments: Namespace) -> list[report.Row]:
    with graph.running() as running:
        begin, done = time.monotonic(), False

        async def talk() -> tuple[list[Outcome], float]:
            nonlocal done
            next_request = completions(running, PATIENT_S, streams=True)
            asking = asyncio.create_task(closed_loop(running.url, next_request, 12, lambda: done))
            await asyncio.sleep(arguments.seconds / 6)
            began = time.monotonic()
            updating = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.load_update", running.ray_address, str(running.settings.home)),
                cwd=graph.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await updating.communicate()
            if updating.returncode:
                sys.exit(f"the update failed:\n{said.decode()[-2000:]}")
            took_s = time.monotonic() - began
            await asyncio.sleep(arguments.seconds / 6)
            done = True
            return await asking, took_s

        pids = {process.pid for process in running.processes().values()}
        outcomes, took_s = asyncio.run(talk())
        replaced = [name for name, process in running.processes().items() if process.pid not in pids]
    failed = [one for one in outcomes if one.kind != "ok"]
    longest = max(one.latency_s for one in outcomes)
    return [
        report.figure(
            "update-failed", "rolling update under load: failed requests", len(failed), "requests",
            f"{len(outcomes)} sent in {time.monotonic() - begin:.0f} s{'; ' + told(failed) if failed else ''}",
        ),
        report.figure("update-longest", "rolling update under load: longest wait", longest, "s"),
        report.figure("update-seconds", "the update", took_s, "s", f"replaced: {', '.join(sorted(replaced))}"),
    ]  # fmt: skip


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """Least squares through block means: neighbouring samples of memory say the same, blocks hardly do."""

    per_1000: float
    half_width: float
    """Of the 95 % interval."""

    @property
    def is_flat(self) -> bool:
        return self.per_1000 - self.half_width <= 0

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float], num_blocks: int = NUM_BLOCKS) -> "Slope":
        """Of y by thousands of x. `num_blocks` 8, 20 or 40."""
        blocks = np.array_split(np.arange(len(x)), num_blocks)
        at = np.array([np.mean(np.asarray(x)[block]) for block in blocks]) / 1000
        mean = np.array([np.mean(np.asarray(y)[block]) for block in blocks])
        centred = at - at.mean()
        slope = float(centred @ mean / (centred @ centred))
        rest = mean - mean.mean() - slope * centred
        error = math.sqrt(float(rest @ rest) / (num_blocks - 2) / float(centred @ centred))
        return cls(slope, T_95[num_blocks - 2] * error)


def mixed(running: Graph, context: str) -> Iterator[Sent]:
    """Unique requests: most are cheap, as most requests are, so that many fit in minutes."""
    texts, draw, settings = Texts(), np.random.default_rng(0), running.settings
    model, encoder = settings.backbones[0].id, settings.encoders[0].id
    while True:
        kind, words = draw.random(), int(draw.integers(4, 48))  # below the encoder's 256 tokens
        if kind < 0.40:
            body = {"model": context, "inputs": [texts.one(words) for _ in range(int(draw.integers(1, 5)))]}
            yield Sent("/v1/classify", body, PATIENT_S)
        elif kind < 0.75:
            yield Sent("/v1/embeddings", {"model": encoder, "input": [texts.one(words)]}, PATIENT_S)
        elif kind < 0.80:
            examples = [{"text": texts.one(), "label": ("a", "b")[i % 2]} for i in range(8)]
            yield Sent("/v1/classify", {"examples": examples, "inputs": [texts.one()]}, PATIENT_S)
        elif kind < 0.81:
            examples = [{"text": texts.one(), "label": ("a", "b")[i % 2]} for i in range(8)]
            yield Sent("/v1/contexts", {"examples": examples}, PATIENT_S)
        else:
            length = int(draw.integers(1, 9))
            body = {"model": model, "prompt": texts.one(words), "max_tokens": length, "temperature": 0}
            yield Sent("/v1/completions", body | ({"stream": True} if draw.random() < 0.5 else {}), PATIENT_S)


SMALL_CACHES = {"METASEPIA_REASONING__CACHE_MIB": "4", "METASEPIA_ENCODERS__0__CACHE_MIB": "2"}
"""Full before memory is looked at: a cache that fills up to its bound is no leak."""


def memory(arguments: Namespace) -> list[report.Row]:
    with graph.running(**SMALL_CACHES) as running:
        examples = [{"text": f"example {i} of the context", "label": ("a", "b")[i % 2]} for i in range(32)]
        context = httpx.post(f"{running.url}/v1/contexts", json={"examples": examples}, timeout=60).json()["id"]
        names = running.processes()
        samples: list[tuple[int, dict[str, float]]] = []

        async def talk() -> list[Outcome]:
            requests, outcomes = mixed(running, context), list[Outcome]()

            async def one(client: httpx.AsyncClient) -> None:
                while len(outcomes) < arguments.requests:
                    outcomes.append(await ask(client, next(requests)))

            async def watch() -> None:
                while True:
                    samples.append((len(outcomes), {name: _own_mib(one) for name, one in names.items()}))
                    await asyncio.sleep(1.0)

            watching = asyncio.create_task(watch())
            async with client_of(running.url) as client, asyncio.TaskGroup() as group:
                for _ in range(arguments.clients):
                    group.create_task(one(client))
            watching.cancel()
            return outcomes

        outcomes = asyncio.run(talk())
    warm = [one for one in samples if one[0] >= arguments.requests * arguments.warm]
    failed = [one for one in outcomes if one.kind != "ok"]
    rows = [
        report.figure(
            "memory-failed", f"{len(outcomes)} unique requests: failed", len(failed), "requests", told(failed)
        )
    ]
    for name in names:
        slope = Slope.of([at for at, _ in warm], [mib[name] for _, mib in warm])
        first, last = warm[0][1][name], warm[-1][1][name]
        interval = f"{slope.per_1000 - slope.half_width:+.3f} to {slope.per_1000 + slope.half_width:+.3f}"
        note = f"95 %: {interval}; {first:.0f} to {last:.0f} MiB; {'flat' if slope.is_flat else 'GROWS'}"
        blocks = [round(float(np.mean(block)), 1) for block in np.array_split([mib[name] for _, mib in samples], 40)]
        extra = {"half_width": slope.half_width, "flat": slope.is_flat, "mib_from_the_start": blocks}
        what = f"own memory of {name} by 1,000 requests"
        rows.append(report.figure(f"slope-{name}", what, slope.per_1000, "MiB", note, extra=extra))
    return rows


def _own_mib(process: psutil.Process) -> float:
    """Resident without what is shared: pages of the object store and of mapped weights are nobody's own."""
    info = process.memory_info()
    return (info.rss - info.shared) / 2**20


# -- all ---------------------------------------------------------------------------------------------------------------

PARTS = {"overload": overload, "sigterm": sigterm, "update": update, "memory": memory}


def main() -> None:
    parser = report.parser(__doc__)
    report.add_parts(parser, PARTS)
    parser.add_argument("--seconds", type=float, default=60, help="of the overload; other times are shares of it")
    parser.add_argument("--times", type=float, default=4, help="how much more is offered than the graph can do")
    parser.add_argument("--deadline", type=float, default=15, help="seconds, of each request of the overload")
    parser.add_argument("--requests", type=int, default=20_000, help="of the part memory")
    parser.add_argument("--clients", type=int, default=8, help="of the part memory")
    parser.add_argument("--warm", type=float, default=0.25, help="share of the requests before memory is looked at")
    arguments = parser.parse_args()
    started_on = report.machine()
    report.publish("load", report.rows_of(PARTS, arguments), json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
