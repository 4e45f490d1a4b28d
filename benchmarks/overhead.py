"""What the graph costs: /v1/classify and /v1/embeddings through Ray Serve against the same work in one process.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --parts context --rounds 9

context     inputs to a compiled context: 64 inputs a request from 32 clients, against all that wait embedded and
            answered as one batch in one process; one input from one client, beside a deployment of Serve's that does
            nothing
classify    examples and inputs in one request, 1 and 8 clients
embeddings  texts, 1 and 8 clients
ready       from the command to "ready", in its parts

Starts a graph of its own on a free port and ends it. Every request brings texts that were never sent before, so that
no cache answers for the encoder. Both sides are timed in turn; beside wall time stands the processor time of all
processes of a side, which other work on the machine changes less.
"""

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import psutil
import torch

from benchmarks import graph, report
from benchmarks.graph import Graph
from cluster import settings as settings_of
from metasepia import encoders
from metasepia.reasoning import shipped
from metasepia.reasoning.context import CompiledContext, Context, answer, compile_context

NUM_EXAMPLES, NUM_INPUTS = 32, 16
CONTEXT_INPUTS, CONTEXT_CLIENTS = 64, 32
MODEL = settings_of.read("laptop").encoders[0].id


class Work:
    """The same texts for both sides; no text is sent twice."""

    def __init__(self) -> None:
        self._numbers = count()

    def texts(self, num: int) -> list[str]:
        return [f"order {next(self._numbers)} came late, the box was open and one part was missing" for _ in range(num)]

    def examples(self) -> list[dict[str, str]]:
        return [{"text": text, "label": ("late", "fine")[i % 2]} for i, text in enumerate(self.texts(NUM_EXAMPLES))]


class Alone:
    """The work in this process, as well as it can be batched."""

    def __init__(self, work: Work) -> None:
        settings = settings_of.read("laptop")
        torch.set_num_threads(settings.encoders[0].threads)
        self._encoder = encoders.load(settings.encoders[0].source)
        self._module, self._work = shipped.load(), work

    def compiled(self, examples: Sequence[dict[str, str]]) -> CompiledContext:
        vectors = self._encoder.embed([one["text"] for one in examples])
        return compile_context(Context.of(vectors, [one["label"] for one in examples]), self._module)

    def ask(self, compiled: CompiledContext, num_inputs: int) -> None:
        answer(self._module.module, [(compiled, self._encoder.embed(self._work.texts(num_inputs)))])

    def classify(self) -> None:
        examples = self._work.examples()
        vectors = self._encoder.embed([one["text"] for one in examples] + self._work.texts(NUM_INPUTS))
        context = Context.of(vectors[:NUM_EXAMPLES], [one["label"] for one in examples])
        answer(self._module.module, [(compile_context(context, self._module), vectors[NUM_EXAMPLES:])])

    def embed(self) -> None:
        self._encoder.embed(self._work.texts(NUM_INPUTS))


@dataclass
class Measured:
    """Rounds of one side."""

    processes: Sequence[psutil.Process]
    latencies_ms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """Of a request, by round."""

    def round(self, call: Callable[[], object], clients: int, requests: int, times: int = 1) -> None:
        """`requests` calls, each worth `times` requests, with `clients` of them under way."""

        def timed(_: int) -> float:
            begin = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - begin)

        begin, before = time.perf_counter(), self._cpu_s()
        with ThreadPoolExecutor(clients) as pool:
            self.latencies_ms += pool.map(timed, range(requests))
        self.rates.append(times * requests / (time.perf_counter() - begin))
        self.cpu_ms.append(1000 * (self._cpu_s() - before) / (times * requests))

    def _cpu_s(self) -> float:
        each = [process.cpu_times() for process in self.processes]
        return sum(one.user + one.system for one in each)


class Bench:
    """A running graph, and the same work beside it."""

    def __init__(self, running: Graph, client: httpx.Client, work: Work, alone: Alone, arguments: Namespace) -> None:
        self.running, self.client, self.work, self.alone, self.arguments = running, client, work, alone, arguments
        self._processes = list(running.processes().values())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.client.post(path, json=body).raise_for_status().json()

    def sides(self) -> tuple[Measured, Measured]:
        return Measured(self._processes), Measured([psutil.Process()])

    def compare(
        self, id: str, what: str, ours: Callable[[], object], alone: Callable[[], object], clients: int
    ) -> list[report.Row]:
        sides, rounds, requests = self.sides(), self.arguments.rounds, self.arguments.requests
        for side, call in zip(self.sides(), (ours, alone), strict=True):
            side.round(call, clients, 8)
        for _ in range(rounds):
            for side, call in zip(sides, (ours, alone), strict=True):
                side.round(call, clients, requests)
        who = f"{what}, {clients} client{'s' if clients > 1 else ''}"
        rows = [_rate(f"{id}-rate-{clients}", who, *sides), _cpu(f"{id}-cpu-{clients}", who, *sides)]
        for percent in (50, 99):
            ms = [report.percentile(one.latencies_ms, percent) for one in sides]
            rows.append(report.duration(f"{id}-p{percent}-{clients}", f"{who}, p{percent}", ms[0], ms[1], "ms"))
        return rows


def _rate(id: str, what: str, ours: Measured, alone: Measured) -> report.Row:
    return report.rate(id, what, report.median(ours.rates), report.median(alone.rates), "requests/s")


def _cpu(id: str, what: str, ours: Measured, alone: Measured) -> report.Row:
    what = f"{what}: processor time of a request, without the client's"
    return report.duration(id, what, report.median(ours.cpu_ms), report.median(alone.cpu_ms), "ms")


def context(bench: Bench) -> list[report.Row]:
    examples = bench.work.examples()
    id_ = bench.post("/v1/contexts", {"examples": examples})["id"]
    compiled = bench.alone.compiled(examples)

    def ours(num_inputs: int) -> None:
        bench.post("/v1/classify", {"model": id_, "inputs": bench.work.texts(num_inputs)})

    # All that 32 clients have under way, as one batch.
    clients, inputs, rounds = CONTEXT_CLIENTS, CONTEXT_INPUTS, bench.arguments.rounds
    sides = bench.sides()
    ours(inputs)
    for _ in range(rounds):
        sides[0].round(lambda: ours(inputs), clients, 3 * clients)
        sides[1].round(lambda: bench.alone.ask(compiled, inputs * clients), 1, 3, clients)
    what = f"/v1/classify on a context, {inputs} inputs, {clients} clients"
    rows = [_rate("context-rate", what, *sides), _cpu("context-cpu", what, *sides)]
    p99 = report.percentile(sides[0].latencies_ms, 99)
    rows.append(report.figure("context-p99", f"{what}, p99", p99, "ms"))

    noop = _deploy_noop(bench.running)
    one, alone, nothing = Measured(sides[0].processes), Measured(sides[1].processes), Measured(sides[0].processes)
    calls = (
        (one, lambda: ours(1)),
        (alone, lambda: bench.alone.ask(compiled, 1)),
        (nothing, lambda: bench.client.post(noop, json={"model": id_, "inputs": bench.work.texts(1)})),
    )
    for _, call in calls:
        Measured([]).round(call, 1, 20)
    for _ in range(rounds):
        for side, call in calls:
            side.round(call, 1, bench.arguments.requests)
    ms, ms_alone, ms_noop = (report.percentile(side.latencies_ms, 50) for side in (one, alone, nothing))
    what = "/v1/classify on a context, 1 input, 1 client"
    rows += [
        report.duration("context-p50-one", f"{what}, p50", ms, ms_alone, "ms"),
        report.figure("context-added", f"{what}, p50 added", ms - ms_alone, "ms", "reach: below 10"),
        report.figure("noop-p50", "a deployment of Serve's that does nothing, p50", ms_noop, "ms"),
        report.figure(
            "context-over-noop", f"{what}, p50 added beyond that", ms - ms_alone - ms_noop, "ms", "reach: below 2"
        ),
        report.figure("context-cpu-one", f"{what}: processor time", report.median(one.cpu_ms), "ms"),
        report.figure("noop-cpu", "the same of doing nothing", report.median(nothing.cpu_ms), "ms"),
    ]
    return rows


def _deploy_noop(running: Graph) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.overhead_noop", running.ray_address],
        cwd=graph.ROOT, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"the deployment that does nothing could not be deployed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return "/noop"


def classify(bench: Bench) -> list[report.Row]:
    what = f"/v1/classify, {NUM_EXAMPLES} examples, {NUM_INPUTS} inputs"

    def ours() -> object:
        return bench.post("/v1/classify", {"examples": bench.work.examples(), "inputs": bench.work.texts(NUM_INPUTS)})

    return [row for n in (1, 8) for row in bench.compare("classify", what, ours, bench.alone.classify, n)]


def embeddings(bench: Bench) -> list[report.Row]:
    def ours() -> object:
        body = {"model": MODEL, "input": bench.work.texts(NUM_INPUTS), "encoding_format": "base64"}
        return bench.post("/v1/embeddings", body)

    what = f"/v1/embeddings, {NUM_INPUTS} texts"
    return [row for n in (1, 8) for row in bench.compare("embeddings", what, ours, bench.alone.embed, n)]


def ready(bench: Bench) -> list[report.Row]:
    running = bench.running
    rows = [report.duration("ready", "command to ready, weights and factors cached", running.ready_s, None, "s")]
    parts = running.parts.items()
    return rows + [report.duration(f"ready-{part.split()[0]}", f"of it: {part}", s, None, "s") for part, s in parts]


PARTS = {"context": context, "classify": classify, "embeddings": embeddings, "ready": ready}


def main() -> None:
    parser = report.parser(__doc__)
    report.add_parts(parser, PARTS)
    parser.add_argument("--requests", type=int, default=24, help="a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn")
    arguments = parser.parse_args()
    started_on = report.machine()
    work = Work()
    alone = Alone(work)
    with graph.running() as running, httpx.Client(base_url=running.url, timeout=120) as client:
        bench = Bench(running, client, work, alone, arguments)
        parts = {name: lambda _, part=part: part(bench) for name, part in PARTS.items()}
        rows = report.rows_of(parts, arguments)
    report.publish("overhead", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
