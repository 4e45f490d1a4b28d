"""Part `packing` of benchmarks.sweeps: many small models trained as one against one after the other.

The models are the laptop profile's (D 4, K 8: 16 tokens, 3 layers of width 64, 2 heads, 64 sequences a step), 16 of
them on two cores. Every side is two processes of one thread with 8 models each, started together: `packed` trains its 8
as one stack, which is what a sweep does; `alone` takes the same stack of one, model after model; `plain` is what one
would write with torch.nn and torch.optim.Adam. All draw their batches as they go. `threads` is one process, one stack
of 16, two threads. First the run checks that a stack and the plain module, from the same weights and batches, have the
same losses, and stops where they do not. On a machine with a GPU there is a row for it; without one it says so.
"""

import contextlib
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from metasepia.stacked.decoder import DecoderShape
from metasepia.stacked.regressor import StackedRegressor
from metasepia.stacked.training import StackedAdam, StackedTraining, triangle
from metasepia.synthetic.regression import PooledRegression, TaskPool, batches_of_many
from metasepia.synthetic.tasks import Seeds

DIMS, POINTS, NOISE_VARIANCE, BATCH, RATE = 4, 8, 0.125, 64, 1e-3
SHAPE = DecoderShape(layers=3, width=64, heads=2, tokens=2 * POINTS)
NUM_MODELS, NUM_PROCESSES = 16, 2
PACKS = (1, 4, 8, 12, 16)
"""Sizes whose cost is measured on one thread."""
ROUNDS = 5
ROUND_STEPS = 24
"""Steps each model takes in a round, all sides alike."""
_DRAWN_STEPS = 8
TOLERANCE = 1e-3
"""Of losses after a few steps, relative: both sides compute in float32, each in its own order."""

WORKER = (sys.executable, "-m", "benchmarks.sweeps_packing")

Train = Callable[[int], None]
"""Trains every model of a side by so many steps."""


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_1(hidden)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(F.gelu(self.up(self.norm_2(hidden)), approximate="tanh"))


class PlainRegressor(nn.Module):
    """GPT-2 over pairs as one would write it."""

    def __init__(self, shape: DecoderShape, dims: int) -> None:
        super().__init__()
        self.read_in = nn.Linear(dims + 1, shape.width, bias=False)
        self.positions = nn.Parameter(torch.zeros(shape.tokens, shape.width))
        self.blocks = nn.ModuleList([PlainBlock(shape.width, shape.heads) for _ in range(shape.layers)])
        self.norm, self.read_out = nn.LayerNorm(shape.width), nn.Linear(shape.width, 1, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = torch.stack([F.pad(x, (1, 0)), F.pad(y.unsqueeze(2), (0, x.shape[2]))], dim=2).flatten(1, 2)
        hidden = self.read_in(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.read_out(self.norm(hidden)[:, ::2]).squeeze(2)


def plain_model(seed: int, device: str) -> PlainRegressor:
    """With the initial weights of a stack's model."""
    model = PlainRegressor(SHAPE, DIMS)
    model.load_state_dict(StackedRegressor(SHAPE, DIMS, [seed], "separate").model_state(0))
    return model.to(device)


def plain(seeds: Sequence[int], device: str = "cpu") -> Train:
    """One after the other; batches by torch's own generator."""
    models = [plain_model(seed, device) for seed in seeds]
    adams = [torch.optim.Adam(model.parameters(), lr=RATE) for model in models]
    generator = torch.Generator(device).manual_seed(0)

    def train(steps: int) -> None:
        for model, adam in zip(models, adams, strict=True):
            for _ in range(steps):
                x = torch.randn(BATCH, POINTS, DIMS, generator=generator, device=device)
                w = torch.randn(BATCH, DIMS, 1, generator=generator, device=device)
                noise = torch.randn(BATCH, POINTS, generator=generator, device=device)
                y = (x @ w).squeeze(2) + NOISE_VARIANCE**0.5 * noise
                adam.zero_grad()
                F.mse_loss(model(x, y), y).backward()
                adam.step()

    return train


def stack(seeds: Sequence[int], device: str = "cpu") -> Train:
    """One stack, as the sweep trains it: every model its own pool, batches drawn for several steps together."""
    model = StackedRegressor(SHAPE, DIMS, seeds, "separate").to(device)
    problems = [
        PooledRegression(
            kind="linear",
            pool=TaskPool(dims=DIMS, num_tasks=2 ** (i % 12) if i % 12 else None),
            points=POINTS,
            noise_variance=NOISE_VARIANCE,
        )
        for i in range(len(seeds))
    ]
    drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def losses(step: int) -> Tensor:
        if step not in drawn:
            steps = range(step, step + _DRAWN_STEPS)
            batch = batches_of_many(problems, [Seeds()] * len(seeds), steps, num_sequences=BATCH, device=device)
            drawn.clear()
            drawn.update(zip(steps, zip(batch.x, batch.y, strict=True), strict=True))
        x, y = drawn[step]
        return (model(x, y) - y).square().flatten(1).mean(1)

    training = StackedTraining(model, StackedAdam(model, learning_rate=RATE), losses, triangle(1 << 20))
    return lambda steps: training.advance(training.step + steps)


def alone(seeds: Sequence[int], device: str = "cpu") -> Train:
    """Stacks of one, one after the other."""
    each = [stack([seed], device) for seed in seeds]

    def train(steps: int) -> None:
        for one in each:
            one(steps)

    return train


SIDES: dict[str, tuple[Callable[..., Train], int]] = {
    "packed": (stack, NUM_PROCESSES),
    "alone": (alone, NUM_PROCESSES),
    "plain": (plain, NUM_PROCESSES),
    "threads": (stack, 1),
}
"""What a process trains, and how many share the models; the threads of all of them are `NUM_PROCESSES`."""


def check() -> float:
    """The largest relative difference of losses between a stack of two and two plain modules, over 20 steps."""
    seeds = (1, 2)
    stacked = StackedRegressor(SHAPE, DIMS, seeds, "separate")
    plains = [plain_model(seed, "cpu") for seed in seeds]
    adams = [torch.optim.Adam(model.parameters(), lr=RATE) for model in plains]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, BATCH, POINTS, DIMS, generator=generator)
    y = x.sum(-1)

    def losses(step: int) -> Tensor:
        return (stacked(x[step], y[step]) - y[step]).square().flatten(1).mean(1)

    training = StackedTraining(stacked, StackedAdam(stacked, learning_rate=RATE), losses, lambda _: 1.0)
    worst = 0.0
    for step in range(20):
        training.advance(step + 1)
        for i, (model, adam) in enumerate(zip(plains, adams, strict=True)):
            adam.zero_grad()
            loss = F.mse_loss(model(x[step, i], y[step, i]), y[step, i])
            loss.backward()
            adam.step()
            worst = max(worst, abs(training.losses[i].item() / loss.item() - 1))
    if not worst <= TOLERANCE:
        raise SystemExit(f"a stack's losses differ from the plain module's by {worst:.2g}; more than {TOLERANCE:g}")
    return worst


class Processes:
    """The processes of a side, warm and waiting."""

    def __init__(self, side: str) -> None:
        share = NUM_MODELS // SIDES[side][1]
        self._processes = [
            subprocess.Popen(
                [*WORKER, side, str(first), str(first + share)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for first in range(0, NUM_MODELS, share)
        ]

    def ready(self) -> None:
        for process in self._processes:
            self._answer(process)

    def round(self) -> float:
        """Seconds until the last has trained its models by the round's steps."""
        begun = time.perf_counter()
        for process in self._processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        self.ready()
        return time.perf_counter() - begun

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
            process.wait(timeout=60)

    def _answer(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        if process.stdout.readline() != "done\n":
            raise SystemExit(f"a process of the benchmark ended with status {process.wait(timeout=60)}")


def work(side: str, first: int, last: int) -> None:
    """One process of a side: trains a little, says so, and then a round for each line that it reads."""
    make, processes = SIDES[side]
    torch.set_num_threads(NUM_PROCESSES // processes)
    train = make(range(first, last))
    train(2)
    print("done", flush=True)
    for _ in sys.stdin:
        train(ROUND_STEPS)
        print("done", flush=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def costs() -> list[report.Row]:
    """CPU time of one model's step, one thread, by the size of the pack."""
    sides = {**{str(size): (stack(range(size)), size) for size in PACKS}, "plain": (plain([0]), 1)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for train, _ in sides.values():
        train(1)
    for _ in range(ROUNDS):
        for name, (train, size) in sides.items():
            steps = max(_DRAWN_STEPS, NUM_MODELS // size)
            begun = time.process_time()
            train(steps)
            seconds[name].append((time.process_time() - begun) / steps / size)
    against = report.median(seconds.pop("plain")) * 1e3
    return [
        report.duration(
            f"packing-step-{size}",
            f"one step of one model in a pack of {size}, one thread",
            report.median(each) * 1e3,
            against,
            "ms of CPU",
            "against torch.nn and torch.optim.Adam, one model",
            detail=True,
        )
        for size, each in seconds.items()
    ]


def on_gpu() -> list[report.Row]:
    """A stack of 16 against 16 stacks of one and 16 plain modules, one after the other on one device."""
    what = f"{NUM_MODELS} models on a GPU, packed against one after the other"
    if not torch.cuda.is_available():
        print(f"not run, as there is no GPU: {what}", flush=True)
        return []
    sides = {name: make(range(NUM_MODELS), "cuda") for name, make in (("packed", stack), ("plain", plain))}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for train in sides.values():
        train(3)
    for _ in range(ROUNDS):
        for name, train in sides.items():
            torch.cuda.synchronize()
            begun = time.perf_counter()
            train(ROUND_STEPS)
            torch.cuda.synchronize()
            rates[name].append(NUM_MODELS * ROUND_STEPS / (time.perf_counter() - begun))
    packed, one_by_one = (report.median(rates[name]) for name in sides)
    return [report.rate("packing-gpu", what, packed, one_by_one, "model-steps/s", torch.cuda.get_device_name())]


def packing(_arguments: Namespace) -> list[report.Row]:
    with _one_thread():
        worst = check()
        rows = costs()
    sides = {name: Processes(name) for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for processes in sides.values():
            processes.ready()
        for _ in range(ROUNDS):
            for name, processes in sides.items():
                seconds[name].append(processes.round())
    finally:
        for processes in sides.values():
            processes.close()
    rates = {name: NUM_MODELS * ROUND_STEPS / report.median(each) for name, each in seconds.items()}
    return [
        report.rate(
            "packing",
            f"{NUM_MODELS} models on two cores, packed, against torch.nn in two processes",
            rates["packed"],
            rates["plain"],
            "model-steps/s",
            f"losses of both agree to {worst:.1g}",
        ),
        report.rate(
            "packing-own",
            "the same against our own stacks of one in two processes",
            rates["packed"],
            rates["alone"],
            "model-steps/s",
        ),
        report.rate(
            "packing-threads",
            f"one stack of {NUM_MODELS} with two threads against two of {NUM_MODELS // 2} with one",
            rates["threads"],
            rates["packed"],
            "model-steps/s",
            detail=True,
        ),
        *rows,
        *on_gpu(),
    ]


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
