"""Speed of decoding in one process against transformers' `generate` on the same weights, dtype and threads.

    python -m benchmarks.engine
    python -m benchmarks.engine --parts engine-batch,start --rounds 9

engine-batch     16 rows that begin together: tokens a second between the first token and the last
engine-arrivals  requests that arrive by chance (Poisson), prompts and answers of 8 to 256 tokens: what is answered a
                 second while the 99th percentile of the time to a whole answer is no worse. `generate` takes what
                 waits, at most 16 rows, as one batch, ends it when its longest row ends, and is offered three quarters
                 of what it can do; ours is offered more and more until its percentile is above that one
start            a fresh process to its first token, with an expert against the plain model

The answers of both sides are judged by the plain model: each greedy token's logit must be the largest but for rounding,
and the share of equal answers is said. transformers' continuous batching (`generate_batch`) is timed beside where this
transformers has it: it is meant for GPUs, and on CPUs was slower than `generate` whenever we looked, which is why rows
are scheduled by `metasepia.decoding.scheduling`.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria

from benchmarks import report
from cluster import settings as settings_of
from metasepia.decoding.engine import Engine
from metasepia.decoding.inflight import Limits
from metasepia.experts.factors import factors_of_backbone
from metasepia.experts.svf import ExpertLayers, attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Row, Sampling

NUM_ROWS = 16
PROMPT_LEN = ANSWER_LEN = 64
SHORTEST, LONGEST = 8, 256
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of a greedy token's logit to the plain model's largest, relative to that."""
STEPS_UP = 1.25
"""How much more ours is offered each time."""
LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LIMITS = Limits(max_rows=NUM_ROWS, max_batch_tokens=16_384, max_queued_tokens=1 << 20)


@dataclass(frozen=True)
class Asked:
    """One request: a prompt, and how many tokens its answer has."""

    prompt: tuple[int, ...]
    num_tokens: int
    arrives_s: float = 0.0


@dataclass(frozen=True)
class Subject:
    """The backbone once as transformers gives it and once for the engine."""

    prepared: PreparedBackbone
    plain: Any
    mine: Any
    layers: ExpertLayers
    dtype: str = "float32"

    @classmethod
    def of(cls, dtype: str) -> "Subject":
        settings = settings_of.read("laptop")
        prepared = checkpoints.prepare(settings.backbones[0].source, settings.home)
        plain, mine = (checkpoints.load(prepared, getattr(torch, dtype), "cpu") for _ in range(2))
        return cls(prepared, plain, mine, attach(mine, backbone=prepared.digest), dtype)

    @contextlib.contextmanager
    def engine(self) -> Iterator[Engine]:
        with Engine(self.mine, self.prepared, experts=self.layers, limits=LIMITS) as engine:
            yield engine

    def asked(self, count: int, seed: int, lengths: Sequence[tuple[int, int]] | None = None) -> list[Asked]:
        draw = np.random.default_rng(seed)
        found = lengths or [tuple(draw.integers(SHORTEST, LONGEST + 1, 2).tolist()) for _ in range(count)]
        return [Asked(tuple(draw.integers(100, self.prepared.vocab_size - 100, p).tolist()), n) for p, n in found]


# -- one batch ---------------------------------------------------------------------------------------------------------


class _Times(StoppingCriteria):
    """When each step of `generate` ended."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        self.at_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generate(subject: Subject, asked: Sequence[Asked]) -> tuple[list[list[int]], list[float]]:
    """One static batch, left-padded, until its longest answer ends: every answer, and the time of each step."""
    width = max(len(one.prompt) for one in asked)
    pads = [width - len(one.prompt) for one in asked]
    ids = torch.tensor([[0] * pad + list(one.prompt) for pad, one in zip(pads, asked, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    times = _Times()
    made = subject.plain.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(one.num_tokens for one in asked),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[times],
    )
    answers = made[:, width:].tolist()
    return [answer[: one.num_tokens] for answer, one in zip(answers, asked, strict=True)], times.at_s


def generate_batch(subject: Subject, asked: Sequence[Asked]) -> float | None:
    """Tokens a second of transformers' continuous batching, prompts and warming up included; None without it."""
    from transformers import GenerationConfig

    if not hasattr(subject.plain, "generate_batch"):
        return None
    config = GenerationConfig(max_new_tokens=ANSWER_LEN, do_sample=False, eos_token_id=-1, pad_token_id=0)
    begin = time.perf_counter()
    try:
        made = subject.plain.generate_batch([list(one.prompt) for one in asked], generation_config=config)
    except Exception as error:  # of another version, perhaps; it is no side of the ratio
        print(f"generate_batch: {type(error).__name__}: {error}", flush=True)
        return None
    num_tokens = sum(len(one.generated_tokens) for one in made.values())
    return num_tokens / (time.perf_counter() - begin) if num_tokens else None


async def decode(engine: Engine, one: Asked, name: str) -> tuple[list[int], list[float]]:
    """The answer, and when each token came."""
    sampling = Sampling(temperature=0.0, max_tokens=one.num_tokens)
    row = Row(request_id=name, backbone=engine.digest, token_ids=one.prompt, sampling=sampling)
    tokens: list[int] = []
    at_s: list[float] = []
    async for chunk in engine.generate(row):
        tokens += chunk.token_ids
        at_s += [time.perf_counter()] * len(chunk.token_ids)
    return tokens, at_s


def batch(subject: Subject, rounds: int) -> report.Row:
    ours: list[float] = []
    theirs: list[float] = []
    asked = subject.asked(0, 0, [(PROMPT_LEN, ANSWER_LEN)] * NUM_ROWS)
    answers: list[list[int]] = []
    references: list[list[int]] = []

    async def all_rows(engine: Engine) -> list[tuple[list[int], list[float]]]:
        return await asyncio.gather(*(decode(engine, one, str(i)) for i, one in enumerate(asked)))

    with subject.engine() as engine:
        for number in range(rounds + 1):
            made = asyncio.run(all_rows(engine))
            answers = [tokens for tokens, _ in made]
            all_began = max(at_s[0] for _, at_s in made)
            later = sorted(t for _, at_s in made for t in at_s if t > all_began)
            references, at_s = generate(subject, asked)
            if number:  # the first round packs weights and fills caches
                ours.append(len(later) / (later[-1] - all_began))
                theirs.append(NUM_ROWS * (len(at_s) - 1) / (at_s[-1] - at_s[0]))
    gap, equal = judge(subject, asked, answers, references)
    other = generate_batch(subject, asked)
    note = (
        f"{PROMPT_LEN} + {ANSWER_LEN} tokens a row; {torch.get_num_threads()} threads; {equal:.0%} of the tokens "
        f"equal, the others within {gap:.0e} of the plain model's largest logit"
        + ("" if other is None else f"; generate_batch, with its prompts, {other:.0f} tokens/s")
    )
    return report.rate(
        "engine-batch",
        f"decoding, {NUM_ROWS} rows without experts, {subject.dtype}, against generate",
        report.median(ours),
        report.median(theirs),
        "tokens/s",
        note,
        extra={"ours": ours, "generate": theirs, "generate_batch": other},
    )


@torch.inference_mode()
def judge(
    subject: Subject, asked: Sequence[Asked], answers: Sequence[list[int]], references: Sequence[list[int]]
) -> tuple[float, float]:
    """Teacher-forced by the plain model: how far below its largest logit a token of either side is at most, relative to
    that, and the share of tokens that are equal up to the first that differs.

    Stops where one is further than rounding takes it.
    """
    worst = 0.0
    for one, answer in [*zip(asked, answers, strict=True), *zip(asked, references, strict=True)]:
        assert len(answer) == one.num_tokens
        ids = torch.tensor([[*one.prompt, *answer]])
        logits = subject.plain(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        own = logits[torch.arange(len(answer)), answer]
        worst = max(worst, float(((logits.amax(-1) - own) / logits.abs().amax(-1)).max()))
    if worst > TOLERANCE[subject.dtype]:
        raise SystemExit(f"an answer is {worst:.1e} from the plain model's: the sides do not do the same")
    same = sum(
        len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True))))
        for a, b in zip(answers, references, strict=True)
    )
    return worst, same / sum(len(answer) for answer in answers)


def engine_batch(arguments: Namespace) -> list[report.Row]:
    return [batch(Subject.of(dtype), arguments.rounds) for dtype in ("float32", "bfloat16")]


# -- arrivals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What became of a stream of requests."""

    tokens_per_s: float
    p99_s: float
    """From a request's arrival to its whole answer."""
    answers: list[list[int]]

    @classmethod
    def of(cls, asked: Sequence[Asked], ended_s: Sequence[float], answers: list[list[int]]) -> "Served":
        waited = [end - one.arrives_s for one, end in zip(asked, ended_s, strict=True)]
        num_tokens = sum(one.num_tokens for one in asked)
        return cls(num_tokens / (max(ended_s) - asked[0].arrives_s), report.percentile(waited, 99), answers)


def arriving(asked: Sequence[Asked], per_s: float) -> list[Asked]:
    """The same requests, `per_s` a second on average; at another rate the same gaps, longer or shorter."""
    gaps = np.random.default_rng(1).exponential(1 / per_s, len(asked))
    return [dataclasses.replace(one, arrives_s=float(at)) for one, at in zip(asked, gaps.cumsum(), strict=True)]


def serve_static(subject: Subject, asked: Sequence[Asked]) -> Served:
    """What has arrived, at most NUM_ROWS, is one batch; the next begins when it ends."""
    begin, waiting = time.perf_counter(), list(range(len(asked)))
    ended, answers = [0.0] * len(asked), [[0]] * len(asked)
    while waiting:
        now = time.perf_counter() - begin
        chosen = [i for i in waiting if asked[i].arrives_s <= now][:NUM_ROWS]
        if not chosen:
            time.sleep(max(0.0, asked[waiting[0]].arrives_s - now))
            continue
        made, _ = generate(subject, [asked[i] for i in chosen])
        for i, answer in zip(chosen, made, strict=True):
            answers[i], ended[i] = answer, time.perf_counter() - begin
        waiting = [i for i in waiting if i not in chosen]
    return Served.of(asked, ended, answers)


def serve_ours(engine: Engine, asked: Sequence[Asked]) -> Served:
    ended, answers = [0.0] * len(asked), [[0]] * len(asked)

    async def one_request(i: int, begin: float) -> None:
        await asyncio.sleep(max(0.0, asked[i].arrives_s - (time.perf_counter() - begin)))
        answers[i], at_s = await decode(engine, asked[i], str(i))
        ended[i] = at_s[-1] - begin

    async def all_requests() -> None:
        begin = time.perf_counter()
        await asyncio.gather(*(one_request(i, begin) for i in range(len(asked))))

    asyncio.run(all_requests())
    return Served.of(asked, ended, answers)


def engine_arrivals(arguments: Namespace) -> list[report.Row]:
    return [arrivals(Subject.of("float32"), arguments.requests)]


def arrivals(subject: Subject, count: int) -> report.Row:
    asked = subject.asked(count, 2)
    mean_tokens = sum(one.num_tokens for one in asked) / len(asked)
    warm = asked[:NUM_ROWS]
    with subject.engine() as engine:
        serve_ours(engine, warm)
        most = serve_static(subject, asked)
        per_s = 0.75 * most.tokens_per_s / mean_tokens
        theirs = serve_static(subject, arriving(asked, per_s))
        tried: list[tuple[float, Served]] = []
        while True:
            factor = 1.5 * STEPS_UP ** len(tried)
            tried.append((factor, serve_ours(engine, arriving(asked, factor * per_s))))
            if tried[-1][1].p99_s > theirs.p99_s or saturated([served.tokens_per_s for _, served in tried]):
                break
    if tried[0][1].p99_s > theirs.p99_s:
        print(f"even {tried[0][0]:.1f} times the load is too much for the engine: the ratio is below it", flush=True)
    best = max((served for _, served in tried if served.p99_s <= theirs.p99_s), key=_rate, default=tried[0][1])
    gap, equal = judge(subject, asked, best.answers, theirs.answers)
    note = (
        f"{len(asked)} requests; p99 {best.p99_s:.1f} s against {theirs.p99_s:.1f} s; generate at three quarters of "
        f"the {most.tokens_per_s:.0f} tokens/s it gives when all requests are there at once; "
        f"{torch.get_num_threads()} threads; {equal:.0%} of the tokens equal, the others within {gap:.0e}"
    )
    return report.rate(
        "engine-arrivals",
        f"Poisson arrivals, {SHORTEST} to {LONGEST} tokens, {subject.dtype}, against generate in batches, equal p99",
        best.tokens_per_s,
        theirs.tokens_per_s,
        "tokens/s",
        note,
        extra={"tried": [(factor, one.tokens_per_s, one.p99_s) for factor, one in tried], "p99_s": theirs.p99_s},
    )


def saturated(rates: Sequence[float]) -> bool:
    """Whether neither of the last two loads gave 3 % more than the best before them."""
    return len(rates) > 2 and max(rates[-2:]) < 1.03 * max(rates[:-2])


def _rate(served: Served) -> float:
    return served.tokens_per_s


# -- start -------------------------------------------------------------------------------------------------------------


def start(arguments: Namespace) -> list[report.Row]:
    settings = settings_of.read("laptop")
    prepared = checkpoints.prepare(settings.backbones[0].source, settings.home)
    factors = factors_of_backbone(prepared, LAYERS, settings.home)
    draw = np.random.default_rng(0)
    expert = ExpertVectors(
        backbone=prepared.digest,
        factors=factors.digest,
        z={n: draw.uniform(0.9, 1.1, size).astype(np.float32) for n, size in factors.index.lengths.items()},
    )
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    cpu_s: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "expert.safetensors"
        file.write_bytes(expert.to_bytes())
        for number in range(arguments.rounds + 1):
            for side, times in seconds.items():
                begin, cpu_began = time.perf_counter(), _children_cpu_s()
                command = (side, str(settings.home), prepared.source, str(arguments.threads), str(file))
                subprocess.run(
                    (sys.executable, "-m", "benchmarks.first_token", *command), check=True, stdout=subprocess.DEVNULL
                )
                if number:  # the first round reads the files
                    times.append(time.perf_counter() - begin)
                    cpu_s[side].append(_children_cpu_s() - cpu_began)
    by_cpu = report.median(cpu_s["theirs"]) / report.median(cpu_s["ours"])
    return [
        report.duration(
            "start",
            "a fresh process to its first token, with an expert, against the plain model in transformers",
            report.median(seconds["ours"]),
            report.median(seconds["theirs"]),
            "s",
            f"float32; factors are cached, files in the page cache; {arguments.threads} threads; by processor time "
            f"{by_cpu:.3g} times",
            extra=seconds,
        )
    ]


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


PARTS: Mapping[str, Callable[[Namespace], Sequence[report.Row]]] = {
    "engine-batch": engine_batch,
    "engine-arrivals": engine_arrivals,
    "start": start,
}


def main() -> None:
    parser = report.parser(__doc__)
    report.add_parts(parser, PARTS)
    parser.add_argument("--threads", type=int, default=2, help="of both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=48, help="of engine-arrivals")
    arguments = parser.parse_args()
    if min(arguments.threads, arguments.rounds, arguments.requests) < 1:
        parser.error("--threads, --rounds and --requests are at least 1")
    torch.set_num_threads(arguments.threads)
    started_on = report.machine()
    report.publish("engine", report.rows_of(PARTS, arguments), json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
