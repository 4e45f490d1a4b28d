"""Experts by the row: what a batch of rows with different experts costs, and what moving to another expert costs.

    python -m benchmarks.experts
    python -m benchmarks.experts --parts mixed,switch --dtype bfloat16

SmolLM2-135M in one process at tp_size 1. Both sides run in turn with the same number of threads; medians over the
rounds are quoted. Experts are z = 1 + noise on gate, up and down, all different. First the run checks that a row of
each path gives the logits of its rebuilt weights (to 1e-4 of the largest in fp32), and stops where it does not.
`mixed-peft` needs peft: pip install 'metasepia[bench]'.
"""

import asyncio
import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks import report
from cluster import settings as settings_of
from metasepia.decoding.engine import DEFAULT_LIMITS, Engine
from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.steps import Advance, Begin, NewRow, StepPlan
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.svf import ExpertLayers, attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, HiddenStatesWanted, Row, Sampling

LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NUM_ROWS = 16
TRUNCATED = 64
NOISE = 0.1
PROMPT_LEN = 32
COUNTS = (1, 16, 128, 1024)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass
class Subject:
    """The model with its expert layers, and the prompts."""

    prepared: PreparedBackbone
    model: Any
    factors: FactorSet
    layers: ExpertLayers
    prompts: list[tuple[int, ...]]

    @classmethod
    def of(cls, dtype: str) -> "Subject":
        settings = settings_of.read("laptop")
        prepared = checkpoints.prepare(settings.backbones[0].source, settings.home)
        model = checkpoints.load(prepared, getattr(torch, dtype), "cpu")
        whole = model if dtype == "float32" else checkpoints.load(prepared, torch.float32, "cpu")
        factors = factors_of(whole, LAYERS, prepared.digest, settings.home)
        draw = np.random.default_rng(0)
        prompts = [tuple(map(int, draw.integers(100, prepared.vocab_size - 100, PROMPT_LEN))) for _ in range(NUM_ROWS)]
        return cls(prepared, model, factors, attach(model, factors), prompts)

    def experts(self, count: int, *, rank: int | None = None, seed: int = 0) -> list[ExpertVectors]:
        draw = np.random.default_rng((seed, rank or 0))
        made: list[ExpertVectors] = []
        for _ in range(count):
            z = {
                name: (1 + NOISE * draw.standard_normal(length)).astype(np.float32)
                for name, length in self.factors.index.lengths.items()
            }
            one = ExpertVectors(backbone=self.prepared.digest, factors=self.factors.digest, z=z)
            made.append(one if rank is None else one.truncated(rank, self.factors.index))
        return made

    def hold(self, experts: Sequence[ExpertVectors]) -> list[Adapter]:
        for one in experts:
            self.layers.put(one.digest, one)
        return [((one.digest, 1.0),) for one in experts]

    @torch.inference_mode()
    def check(self, dtype: str) -> str:
        """Rows of both paths against rebuilt weights, in one batch with a base row; the largest difference."""
        ids = torch.tensor(self.prompts[:3])
        whole, cut = self.experts(1, seed=9)[0], self.experts(1, rank=TRUNCATED, seed=9)[0]
        self.layers.select([*self.hold([whole, cut]), ()])
        ours = self.model(input_ids=ids, use_cache=False).logits.float()
        paths = [path for _, path in self.layers.executed]
        if paths != ["factors", "truncated", "plain"]:
            raise SystemExit(f"rows went by {paths}; nothing here counts")
        self.layers.select([])
        worst = 0.0
        for row, one in enumerate([whole, cut, None]):
            like = self.model.get_parameter
            weights = {n: self.factors[n].scaled(torch.tensor(z)).to(like(n)) for n, z in one.z.items()} if one else {}
            inputs = {"input_ids": ids[row : row + 1], "use_cache": False}
            oracle = torch.func.functional_call(self.model, weights, kwargs=inputs).logits.float()
            worst = max(worst, float((ours[row] - oracle[0]).abs().max() / oracle.abs().max()))
        for one in (whole, cut):
            self.layers.drop(one.digest)
        if not worst <= TOLERANCE[dtype]:
            raise SystemExit(f"expert rows differ from rebuilt weights by {worst:.2g} of the largest logit")
        return f"rows equal their rebuilt weights to {worst:.1g} of the largest logit"


T = TypeVar("T")
_KEYS = itertools.count()


@dataclass(frozen=True)
class Took:
    """Seconds on the wall and of the processor; the second says more on a busy machine."""

    wall_s: float
    cpu_s: float

    @classmethod
    def by(cls, work: Callable[[], Any]) -> "Took":
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        work()
        return cls(time.perf_counter() - wall_s, time.process_time() - cpu_s)


def wall_s(took: Sequence[Took]) -> float:
    return report.median([one.wall_s for one in took])


def cpu_ratio(against: Sequence[Took], ours: Sequence[Took]) -> str:
    ratio = report.median([a.cpu_s / b.cpu_s for a, b in zip(against, ours, strict=True)])
    return f"by processor time {ratio:.3f}"


def decode(subject: Subject, adapters: Sequence[Adapter], steps: int) -> Took:
    """`steps` decoding steps of one row an adapter, after their prompts were read."""
    decoder = RowDecoder(subject.model, backbone=subject.prepared.digest, experts=subject.layers)
    rows = tuple(
        NewRow(
            key=next(_KEYS),
            token_ids=prompt,
            adapter=adapter,
            want="tokens",
            sampling=Sampling(temperature=0, max_tokens=steps + 2),
            seed=0,
            score_from=1,
            hidden=HiddenStatesWanted(),
        )
        for prompt, adapter in zip(subject.prompts, adapters, strict=True)
    )
    with torch.inference_mode():
        begun = StepPlan(
            step=0, begin=(Begin(group=0, rows=rows),), advance=(Advance(group=0, num_columns=PROMPT_LEN),)
        )
        result = decoder.run(begun)
        for step in range(1, steps + 2):
            if step == 2:  # the first step makes room and tables
                began = time.perf_counter(), time.process_time()
            result = decoder.run(StepPlan(step=step, feed=tuple((k, c.token_id) for k, c in result.chosen.items())))
            if len(result.chosen) != len(rows):
                raise SystemExit(f"rows failed: {result.failed}")
        wall, cpu = began  # pyright: ignore[reportPossiblyUnboundVariable]
        return Took(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(rounds: int, *sides: Callable[[], T]) -> list[list[T]]:
    """What each side returned in each round, after one round that does not count."""
    taken: list[list[T]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, seconds in zip(sides, taken, strict=True):
            one = side()
            if number:
                seconds.append(one)
    return taken


def mixed(subject: Subject, arguments: Namespace, note: str) -> list[report.Row]:
    """16 rows with 16 experts, all factors or the leading 64, against the same rows on the base weights."""
    full = subject.hold(subject.experts(NUM_ROWS))
    cut = subject.hold(subject.experts(NUM_ROWS, rank=TRUNCATED))
    base: list[Adapter] = [()] * NUM_ROWS
    steps = arguments.steps
    same = full[:1] * NUM_ROWS
    sides = [lambda rows=rows: decode(subject, rows, steps) for rows in (base, full, cut, same)]
    plain, *taken = in_turn(arguments.rounds, *sides)
    plain_ms = 1000 * wall_s(plain) / steps
    rows: list[report.Row] = []
    for (id, what), own in zip(
        (
            ("mixed-full", "decode, 16 rows with 16 experts, all singular values"),
            ("mixed-64", "decode, 16 rows with 16 experts, the leading 64"),
            ("same-full", "decode, 16 rows with one expert, all singular values"),
        ),
        taken,
        strict=True,
    ):
        own_ms = 1000 * wall_s(own) / steps
        told = f"{own_ms - plain_ms:.2f} ms a step more than {plain_ms:.2f}; {cpu_ratio(plain, own)}; {note}"
        rows.append(
            report.rate(
                id,
                what,
                1000 * NUM_ROWS / own_ms,
                1000 * NUM_ROWS / plain_ms,
                "tokens/s",
                told,
                detail=id == "same-full",
                extra={"added_ms": own_ms - plain_ms},
            )
        )
    for adapter in (*full, *cut):
        subject.layers.drop(adapter[0][0])
    return rows


# -- through the engine ------------------------------------------------------------------------------------------------


async def answer_all(
    engine: Engine, prompts: Sequence[tuple[int, ...]], adapters: Sequence[Adapter], lengths: Sequence[int]
) -> int:
    """Runs every row to its length; how many tokens came."""

    async def one(number: int) -> int:
        row = Row(
            request_id=str(number),
            backbone=engine.digest,
            token_ids=prompts[number % len(prompts)],
            adapter=adapters[number],
            sampling=Sampling(temperature=0, max_tokens=lengths[number]),
        )
        return sum([len(chunk.token_ids) async for chunk in engine.generate(row)])

    return sum(await asyncio.gather(*[one(number) for number in range(len(adapters))]))


def through(
    engine: Engine, prompts: Sequence[tuple[int, ...]], adapters: Sequence[Adapter], lengths: Sequence[int]
) -> Took:
    came: list[int] = []
    took = Took.by(lambda: came.append(asyncio.run(answer_all(engine, prompts, adapters, lengths))))
    if came != [sum(lengths)]:
        raise SystemExit(f"{came} tokens came instead of {sum(lengths)}")
    return took


def drawn(how: str, count: int, num_rows: int) -> list[int]:
    """Which of `count` experts each row uses."""
    draw = np.random.default_rng(count)
    if how == "identical":
        return [0] * num_rows
    if how == "distinct":
        return [int(i) for i in np.resize(draw.permutation(count), num_rows)]
    shares = np.ones(count) if how == "uniform" else 1 / np.arange(1, count + 1)
    return [int(i) for i in draw.choice(count, num_rows, p=shares / shares.sum())]


def expert_count(subject: Subject, arguments: Namespace, note: str) -> list[report.Row]:
    """Rows that come and go, 16 at a time, with more and more experts registered; against one expert."""
    num_rows, rounds = 2 * NUM_ROWS, min(3, arguments.rounds)
    lengths = [arguments.steps // 2 + 4 * (number % 5) for number in range(num_rows)]
    adapters: list[Adapter] = []
    tokens, rows = sum(lengths), []
    experts = subject.experts(COUNTS[-1], seed=1)
    with Engine(subject.model, subject.prepared, experts=subject.layers, limits=DEFAULT_LIMITS) as engine:

        def run(which: Sequence[int]) -> Took:
            return through(engine, subject.prompts, [adapters[i] for i in which], lengths)

        for count in COUNTS:
            adapters += subject.hold(experts[len(adapters) : count])
            draws = {how: drawn(how, count, num_rows) for how in ("identical", "zipf", "uniform", "distinct")}
            if count == 1:
                draws = {"identical": draws["identical"]}
            one = [0] * num_rows
            times = in_turn(rounds, *[lambda which=which: run(which) for which in (one, *draws.values())])
            for how, own in zip(draws, times[1:], strict=True):
                alone_s = wall_s(times[0])
                rows.append(
                    report.rate(
                        f"expert-count-{count}-{how}", f"{count} experts registered, rows drawn {how}",
                        tokens / wall_s(own), tokens / alone_s, "tokens/s", cpu_ratio(times[0], own), detail=True,
                    )
                )  # fmt: skip
            if count == 1:
                first = wall_s(times[0])
        alone_after = wall_s([run([0] * num_rows) for _ in range(rounds)])
    for adapter in adapters:
        subject.layers.drop(adapter[0][0])
    rows.append(
        report.rate(
            "expert-count-registered", f"one expert's rows, {COUNTS[-1]} registered against 1", tokens / alone_after,
            tokens / first, "tokens/s", detail=True,  # pyright: ignore[reportPossiblyUnboundVariable]
        )
    )  # fmt: skip
    worst = min(rows, key=lambda row: row.ratio or 0)
    summary = report.rate(
        "expert-count", f"32 rows that come and go, 1 to {COUNTS[-1]} experts registered, the worst of all draws",
        worst.ours, worst.against, "tokens/s", f"{worst.what}; {note}",
    )  # fmt: skip
    return [summary, *rows]


def mixed_peft(subject: Subject, arguments: Namespace, note: str) -> list[report.Row]:
    """16 rows with 16 adapters: our experts in our engine, LoRA of rank 16 on the same layers in `generate`."""
    import peft
    from transformers.utils import logging

    logging.set_verbosity_error()
    rank = 16
    plain: Any = checkpoints.load(subject.prepared, subject.model.dtype, "cpu")
    names = [f"adapter{i}" for i in range(NUM_ROWS)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[one.split(".")[-1] for one in LAYERS])
    theirs: Any = peft.get_peft_model(plain, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        theirs.add_adapter(name, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    theirs.eval().requires_grad_(False)
    ids = torch.tensor(subject.prompts)
    length = arguments.steps

    @torch.inference_mode()
    def generate(**options: Any) -> None:
        out = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
            min_new_tokens=length, max_new_tokens=length, pad_token_id=0, **options,
        )  # fmt: skip
        if tuple(out.shape) != (NUM_ROWS, PROMPT_LEN + length):
            raise SystemExit(f"generate answered {tuple(out.shape)}")

    def disabled() -> None:
        with theirs.disable_adapter():
            generate()

    adapters = subject.hold(subject.experts(NUM_ROWS, seed=2))
    cut = subject.hold(subject.experts(NUM_ROWS, rank=TRUNCATED, seed=2))
    with Engine(subject.model, subject.prepared, experts=subject.layers, limits=DEFAULT_LIMITS) as engine:
        ours, ours_cut, of_peft, plain = in_turn(
            max(2, arguments.rounds // 2),
            lambda: through(engine, subject.prompts, adapters, [length] * NUM_ROWS),
            lambda: through(engine, subject.prompts, cut, [length] * NUM_ROWS),
            lambda: Took.by(lambda: generate(adapter_names=names)),
            lambda: Took.by(disabled),
        )
    for adapter in (*adapters, *cut):
        subject.layers.drop(adapter[0][0])
    tokens = NUM_ROWS * length
    peft_s = wall_s(of_peft)
    told = f"PEFT gives {wall_s(plain) / peft_s:.2f} of the same model without adapters in `generate`; "
    told += f"{cpu_ratio(of_peft, ours)}; {note}"
    return [
        report.rate(
            "mixed-peft", f"16 rows with 16 adapters, {PROMPT_LEN} tokens read and {length} written each, "
            f"against PEFT LoRA rank {rank} in `generate`", tokens / wall_s(ours), tokens / peft_s, "tokens/s", told,
        ),
        report.rate(
            "mixed-peft-64", "the same with experts on the leading 64", tokens / wall_s(ours_cut), tokens / peft_s,
            "tokens/s", detail=True,
        ),
    ]  # fmt: skip


def switch(subject: Subject, arguments: Namespace, note: str) -> list[report.Row]:
    """From an expert's bytes in memory to layers that use it for every row, against rebuilding all the weights."""
    blobs = [one.to_bytes() for one in subject.experts(arguments.rounds + 1, seed=3)]
    weights = {name: subject.model.get_parameter(name).detach().clone() for name in subject.factors.factors}
    later = iter(blobs)

    @torch.inference_mode()
    def ours() -> float:
        expert = ExpertVectors.from_bytes(next(later))
        began = time.perf_counter()
        subject.layers.put(expert.digest, expert)
        subject.layers.select([((expert.digest, 1.0),)] * NUM_ROWS)
        for part in subject.layers._selection.parts:  # what each layer else does in its first forward
            for layer in subject.layers._layers.values():
                tables = [part.table, *[delta.table for delta in part.deltas]]
                if layer.place is not None:
                    for table in filter(None, tables):
                        table.at(3, layer.place.whole)
        return time.perf_counter() - began

    @torch.inference_mode()
    def theirs() -> float:
        expert = ExpertVectors.from_bytes(blobs[0])
        began = time.perf_counter()
        for name, z in expert.z.items():
            weights[name].copy_(subject.factors[name].scaled(torch.from_numpy(z)))
        return time.perf_counter() - began

    ours_s, theirs_s = in_turn(arguments.rounds, ours, theirs)
    for digest in subject.layers.held:
        subject.layers.drop(digest)
    return [
        report.duration(
            "switch", "a replica to another expert, against rebuilding U diag(s z) Vh of all layers",
            1000 * report.median(ours_s), 1000 * report.median(theirs_s), "ms", note,
        )
    ]  # fmt: skip


def cost(subject: Subject, arguments: Namespace, note: str) -> list[report.Row]:
    """Multiply-adds of one rank for one token, counted from the shapes: all weights but the embedding, no attention."""
    in_factors = {name: (f.u.shape[0], f.vh.shape[1], len(f.s)) for name, f in subject.factors.factors.items()}
    linear = sum(p.numel() for n, p in subject.model.named_parameters() if p.ndim == 2 and "embed" not in n)
    head = subject.prepared.vocab_size * subject.prepared.hidden_size
    total = linear + (head if subject.model.config.tie_word_embeddings else 0)
    rows: list[report.Row] = []
    for tp_size in (1, 2, 4, 8):
        plain = total / tp_size
        dense = sum(out * width for out, width, _ in in_factors.values()) / tp_size
        full = cut = 0.0
        for name, (out, width, singular) in in_factors.items():
            # Column-parallel: vh whole and u split; row-parallel: vh split and u whole.
            split, whole = (width, out) if name.endswith("down_proj.weight") else (out, width)
            full += singular * (split / tp_size + whole)
            cut += min(TRUNCATED, singular) * (split / tp_size + whole)
        for id, own in (("full", plain - dense + full), ("64", plain + cut)):
            rows.append(
                report.duration(
                    f"cost-{id}-tp{tp_size}", f"multiply-adds a token and rank at tp_size {tp_size}, mixed-{id}",
                    own / 1e6, plain / 1e6, "million", "counted: what the arithmetic allows", detail=tp_size > 2,
                )
            )  # fmt: skip
    return rows


PARTS = {"mixed": mixed, "count": expert_count, "peft": mixed_peft, "switch": switch, "cost": cost}


def main() -> None:
    parser = report.parser(__doc__)
    report.add_parts(parser, PARTS)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48, help="decoding steps of a round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    started_on = report.machine()
    torch.set_num_threads(arguments.threads)
    subject = Subject.of(arguments.dtype)
    note = f"{arguments.dtype}, {arguments.threads} threads"
    print(subject.check(arguments.dtype))
    rows = report.rows_of({name: partial(part, subject, note=note) for name, part in PARTS.items()}, arguments)
    report.publish("experts", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
