"""jobs.batch against what a user would write instead: a loop over the rows, eight threads, a request a row.

    python -m benchmarks.batch
    python -m benchmarks.batch --parts embed --rounds 5

classify    texts to labels by a compiled context; the loop asks with httpx
embed       texts to vectors; the loop asks with the official openai client
complete    prompts to 16 tokens each; the same client. Both decode at the graph's own speed, and the ratio says that
            the batch loses nothing
memory      the most that the command ever held for 20,000 rows and for ten times as many, answered by a server that
            answers at once; and its rows a second there, its own bound

Starts a graph of its own on a free port and ends it. The command is timed from its start to its end, importing, reading
and writing included; the loop only keeps its answers. No text is sent twice. The sides take turns.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import graph, report
from benchmarks.graph import ROOT, Graph
from benchmarks.upper import Upper, serving

THREADS = 8
BACKBONE, ENCODER = "smollm2-135m", "minilm-l6"
NUM_TOKENS = 16


@dataclass
class Bench:
    """Rows that nobody has sent, and both ways to have them answered."""

    running: Graph
    arguments: Namespace
    folder: Path
    http: httpx.Client
    client: openai.OpenAI
    numbers: "count[int]"

    def texts(self, num: int) -> list[str]:
        return [f"order {next(self.numbers)} came late, the box was open and one part was missing" for _ in range(num)]

    def compare(
        self, id: str, what: str, rows: int, words: Sequence[str], ask: Callable[[str], object]
    ) -> list[report.Row]:
        ours, loop = list[float](), list[float]()
        for number in range(self.arguments.rounds):
            source, out = self.folder / f"{id}-{number}.parquet", self.folder / f"{id}-{number}-out.parquet"
            pq.write_table(pa.table({"text": self.texts(rows)}), source)
            begin = time.perf_counter()
            run(self.running.url, source, out, words)
            ours.append(rows / (time.perf_counter() - begin))
            assert pq.read_table(out)["error"].null_count == rows
            texts = self.texts(rows)
            begin = time.perf_counter()
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(ask, texts))
            loop.append(rows / (time.perf_counter() - begin))
        who = f"{what}, {rows} rows, against a loop of {THREADS} threads"
        return [report.rate(f"{id}-rate", who, report.median(ours), report.median(loop), "rows/s")]


def run(url: str, source: Path, out: Path, words: Sequence[str]) -> int:
    """The whole command; the most bytes that it held in memory."""
    command = [sys.executable, "-m", "jobs.batch", "--input", str(source), "--output", str(out), "--url", url]
    process = psutil.Popen([*command, "--quiet", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            most = max(most, process.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.1)
    if process.wait():
        sys.exit("jobs.batch failed; see above")
    return most


def classify(bench: Bench) -> list[report.Row]:
    examples = [{"text": text, "label": ("late", "fine")[i % 2]} for i, text in enumerate(bench.texts(32))]
    made = bench.http.post("/v1/contexts", json={"examples": examples}).raise_for_status().json()["id"]

    def ask(text: str) -> object:
        return bench.http.post("/v1/classify", json={"model": made, "inputs": [text]}).raise_for_status().json()

    words = ["--task", "classify", "--model", made]
    return bench.compare("classify", "/v1/classify", bench.arguments.rows, words, ask)


def embed(bench: Bench) -> list[report.Row]:
    def ask(text: str) -> object:
        return bench.client.embeddings.create(model=ENCODER, input=text)

    words = ["--task", "embed", "--model", ENCODER]
    return bench.compare("embed", "/v1/embeddings", bench.arguments.rows, words, ask)


def complete(bench: Bench) -> list[report.Row]:
    def ask(text: str) -> object:
        return bench.client.completions.create(model=BACKBONE, prompt=text, max_tokens=NUM_TOKENS, temperature=0)

    words = ["--task", "complete", "--model", BACKBONE, "--option", f"max_tokens={NUM_TOKENS}"]
    words += ["--option", "temperature=0"]
    rows = max(8, bench.arguments.rows // 16)
    return bench.compare("complete", f"/v1/completions, {NUM_TOKENS} tokens", rows, words, ask)


def memory(bench: Bench) -> list[report.Row]:
    found, rates = list[float](), list[float]()
    with serving(Upper()) as upper:
        for rows in (20_000, 200_000):
            source = bench.folder / f"memory-{rows}.parquet"
            pq.write_table(pa.table({"text": [f"row {i} of many, as long as others" for i in range(rows)]}), source)
            begin = time.perf_counter()
            most = run(upper.url, source, bench.folder / f"out-{rows}", ["--task", "embed", "--model", "m"])
            rates.append(rows / (time.perf_counter() - begin))
            found.append(most / 2**20)
            upper.bodies.clear()
            upper.keys.clear()
    return [
        report.duration("memory", "most memory, 200,000 rows, against 20,000", found[1], found[0], "MiB"),
        report.figure("bound", "a server that answers at once, in Python too", rates[1], "rows/s"),
    ]


PARTS = {"classify": classify, "embed": embed, "complete": complete, "memory": memory}


def main() -> None:
    parser = report.parser(__doc__)
    report.add_parts(parser, PARTS)
    parser.add_argument("--rows", type=int, default=1024, help="of a round; completions: a sixteenth")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, in turn")
    arguments = parser.parse_args()
    started_on = report.machine()
    with ExitStack() as stack:
        running = stack.enter_context(graph.running())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metasepia-batch-")))
        http = stack.enter_context(httpx.Client(base_url=running.url, timeout=120))
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120)
        bench = Bench(running, arguments, folder, http, client, count(os.getpid() * 10**6))
        parts: dict[str, Any] = {name: lambda _, part=part: part(bench) for name, part in PARTS.items()}
        rows = report.rows_of(parts, arguments)
    report.publish("batch", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
