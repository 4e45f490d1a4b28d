"""Sequences grow while the module learns: fewer points and dimensions first (TART, arXiv:2306.07536; Garg et al.)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A whole number that rises from `start` by `increment` every `interval` steps until it is `end`."""

    start: int
    end: int
    increment: int = 1
    interval: int = 1

    def at(self, step: int) -> int:
        return min(self.end, self.start + self.increment * (step // self.interval))

    @property
    def first_full_step(self) -> int:
        return self.interval * -(-(self.end - self.start) // self.increment)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """How many dimensions are active and how many pairs a sequence has, step by step."""

    dims: Ramp
    pairs: Ramp
