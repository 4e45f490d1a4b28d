"""A small real PackWork, for `benchmarks.sweeps` and for tests: linear fits by gradient descent, several as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from metasepia.sweeps.plan import SweepPlan, grid, pack
from metasepia.synthetic import sampling

POINTS = 64


class Fits:
    """Trials {seed, rate, steps, dims, rounds}: `rounds` full-batch descents a step on a problem drawn from the seed.

    A rate above 2 over the largest eigenvalue diverges. `breaks_at`: raises at that step, as a bug in a work would.
    """

    def __init__(self, trials: Sequence[Mapping[str, Any]], device: str) -> None:
        self._trials, one = trials, trials[0]
        dims = one["dims"]
        index = torch.arange(POINTS * (dims + 1), dtype=torch.int64).view(POINTS, dims + 1)
        drawn = torch.stack([sampling.normal(sampling.key_of("fits", t["seed"], 0), index) for t in trials])
        self._x, self._y = drawn[:, :, :dims].to(device), drawn[:, :, dims:].to(device)
        self._rates = torch.tensor([t["rate"] for t in trials], device=device)[:, None, None]
        self._w = torch.zeros(len(trials), dims, 1, device=device)
        self._rounds, self._steps = one["rounds"], one["steps"]
        self.step, self.stops = 0, tuple(sorted({i * self._steps // 4 for i in range(5)}))

    def advance(self, until: int) -> None:
        while self.step < until:
            for trial in self._trials:
                if trial.get("breaks_at", -1) == self.step:
                    raise ZeroDivisionError(f"a bug at step {self.step}")
            for _ in range(self._rounds):
                residual = self._x @ self._w - self._y
                self._w = self._w - self._rates / POINTS * (self._x.mT @ residual)
            self.step += 1

    def measure(self) -> pa.Table:
        errors = (self._x @ self._w - self._y).square().mean((1, 2)).double().tolist()
        number, nan = len(errors), float("nan")
        finite = [error < 1e6 for error in errors]  # written so that NaN fails too
        return pa.table(
            {
                "trial": pa.array(range(number), pa.int32()),
                "step": pa.array([self.step] * number, pa.int64()),
                "metric": ["error"] * number,
                "position": pa.array([-1] * number, pa.int32()),
                "split": [""] * number,
                "value": [error if ok else nan for error, ok in zip(errors, finite, strict=True)],
                "status": ["ok" if ok else "diverged" for ok in finite],
            }
        )

    def state(self) -> dict[str, Tensor]:
        return {"w": self._w, "step": torch.tensor(self.step)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._w, self.step = state["w"].to(self._w.device), int(state["step"])


def plan_of(
    *, seeds: int = 6, rates: Sequence[float] = (0.1, 0.3), steps: int = 8, size: int = 3, **more: Any
) -> SweepPlan:
    """Packs of `size` that share a rate; `dims`, `rounds` and whatever else go to every trial."""
    same = {"steps": steps, "dims": 5, "rounds": 1, **more}
    trials = [{**same, **one} for one in grid({"rate": list(rates), "seed": list(range(seeds))})]
    return SweepPlan("fits", {}, tuple(trials), pack(trials, ["rate"], size))
