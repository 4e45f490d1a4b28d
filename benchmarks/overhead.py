"""What the graph costs: /v1/classify and /v1/embeddings through Ray Serve against the same work in one process.

Also the time from the command to "ready", in its parts. Starts a graph of its own on a free port and ends it. Every
request brings texts that were never sent before, so no cache answers for the encoder.

    python -m benchmarks.overhead
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import torch

from benchmarks import report
from cluster import settings as settings_of
from metasepia import encoders
from metasepia.reasoning import shipped
from metasepia.reasoning.context import Context, answer, compile_context

ROOT = Path(__file__).parents[1]
NUM_EXAMPLES, NUM_INPUTS = 32, 16


@contextlib.contextmanager
def running_graph() -> Iterator[tuple[str, dict[str, float], float]]:
    """Its URL, the seconds of each part of its start, and those from command to ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.perf_counter()
    graph = subprocess.Popen(
        [sys.executable, "-m", "serve.main"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"METASEPIA_HTTP__PORT": str(port)},
    )  # fmt: skip
    try:
        parts: dict[str, float] = {}
        assert graph.stdout is not None
        lines = []
        for line in graph.stdout:
            lines.append(line)
            if found := re.fullmatch(r"(.+): ([\d.]+) s\s*", line):
                parts[found[1]] = float(found[2])
            if line.startswith("ready"):
                break
        else:
            sys.exit("the graph did not start:\n" + "".join(lines[-20:]))
        yield f"http://127.0.0.1:{port}", parts, time.perf_counter() - begin
    finally:
        os.killpg(graph.pid, signal.SIGINT)
        graph.wait(60)


class Work:
    """The same texts for both sides; no text is sent twice."""

    def __init__(self) -> None:
        self._numbers = count()

    def texts(self, num: int) -> list[str]:
        return [f"order {next(self._numbers)} came late, the box was open and one part was missing" for _ in range(num)]

    def examples(self) -> list[dict[str, str]]:
        return [{"text": text, "label": ("late", "fine")[i % 2]} for i, text in enumerate(self.texts(NUM_EXAMPLES))]


def run_clients(call: Callable[[], object], clients: int, requests: int) -> tuple[list[float], float]:
    """Milliseconds of each request, and requests a second, with `clients` of them under way."""

    def timed(_: int) -> float:
        begin = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin)

    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = list(pool.map(timed, range(requests)))
    return latencies, requests / (time.perf_counter() - begin)


def compare(
    id: str, what: str, ours: Callable[[], object], alone: Callable[[], object], requests: int
) -> list[report.Row]:
    rows = []
    for clients in (1, 8):
        sides: tuple[list[tuple[list[float], float]], ...] = ([], [])
        for call in (ours, alone):
            run_clients(call, clients, 8)
        for _ in range(5):
            for side, call in zip(sides, (ours, alone), strict=True):
                side.append(run_clients(call, clients, requests))
        rates = [report.median([rate for _, rate in side]) for side in sides]
        latencies = [[one for some, _ in side for one in some] for side in sides]
        who = f"{what}, {clients} client{'s' if clients > 1 else ''}"
        rows.append(report.rate(f"{id}-rate-{clients}", who, rates[0], rates[1], "requests/s"))
        for percent in (50, 99):
            ms = [report.percentile(one, percent) for one in latencies]
            rows.append(report.duration(f"{id}-p{percent}-{clients}", f"{who}, p{percent}", ms[0], ms[1], "ms"))
    return rows


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--requests", type=int, default=24, help="a round; five rounds a side")
    arguments = parser.parse_args()
    started_on = report.machine()
    settings = settings_of.read("laptop")
    torch.set_num_threads(settings.encoders[0].threads)
    encoder, module, work = encoders.load(settings.encoders[0].source), shipped.load(), Work()

    def classify_alone() -> None:
        examples = work.examples()
        vectors = encoder.embed([one["text"] for one in examples] + work.texts(NUM_INPUTS))
        context = Context.of(vectors[:NUM_EXAMPLES], [one["label"] for one in examples])
        answer(module.module, [(compile_context(context, module), vectors[NUM_EXAMPLES:])])

    with running_graph() as (url, parts, ready_s), httpx.Client(base_url=url, timeout=120) as client:

        def post(path: str, body: dict[str, object]) -> None:
            client.post(path, json=body).raise_for_status()

        rows = compare(
            "classify", f"/v1/classify, {NUM_EXAMPLES} examples, {NUM_INPUTS} inputs",
            lambda: post("/v1/classify", {"examples": work.examples(), "inputs": work.texts(NUM_INPUTS)}),
            classify_alone, arguments.requests,
        )  # fmt: skip
        model = settings.encoders[0].id
        rows += compare(
            "embeddings", f"/v1/embeddings, {NUM_INPUTS} texts",
            lambda: post(
                "/v1/embeddings", {"model": model, "input": work.texts(NUM_INPUTS), "encoding_format": "base64"}
            ),
            lambda: encoder.embed(work.texts(NUM_INPUTS)), arguments.requests,
        )  # fmt: skip
    rows.append(report.duration("ready", "command to ready, weights and factors cached", ready_s, None, "s"))
    rows += [report.duration(f"ready-{part.split()[0]}", f"of it: {part}", s, None, "s") for part, s in parts.items()]
    report.publish("overhead", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
