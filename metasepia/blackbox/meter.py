"""Tokens and money: before a run, while it goes on, and the line that it never crosses.

A request is reserved at its worst (its prompt, and every token of an answer that it allows) before it is sent, and
settled at what it took when its answer is there. What ended without an answer but may have been computed stays counted.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from metasepia.blackbox.errors import BudgetReached
from metasepia.errors import InvalidSettings
from metasepia.kinds import check_kinds

CHARS_PER_TOKEN = 4
"""Where no tokenizer is given; about right for English text and common vocabularies."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What an endpoint takes for a million tokens, in whatever currency `max_cost` is meant."""

    prompt_per_million: float
    completion_per_million: float

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, price in (("prompt", self.prompt_per_million), ("completion", self.completion_per_million)):
            if not 0 <= price < float("inf"):
                raise InvalidSettings(f"prices.{name}_per_million", price, "0 or more")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_per_million + completion_tokens * self.completion_per_million) / 1e6


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What asking would take, before anything is asked. Answers that are in the cache take nothing."""

    texts: int
    cached: int
    """Of the texts, those that are answered whole."""
    way: str
    is_bound: bool
    """How labels are scored is not known yet, and `way` is the dearest of those that may be."""
    requests: int
    prompt_tokens: int
    completion_tokens: int
    """At most."""
    cost: float | None
    """At most; None without prices."""
    counted_by: str

    def __str__(self) -> str:
        most = "at most " if self.is_bound else "about "
        money = "no prices are set" if self.cost is None else f"cost {most}{self.cost:.4f}"
        return (
            f"{self.texts} texts ({self.cached} answered before), by {self.way}: {most}{self.requests} requests, "
            f"{self.prompt_tokens} prompt and {self.completion_tokens} answer tokens ({self.counted_by}); {money}"
        )


class Reservation:
    """A request that may be sent. One of `settle`, `release` and `keep` ends it; later ones do nothing."""

    def __init__(self, meter: "Meter", prices: Prices | None, prompt_tokens: int, completion_tokens: int) -> None:
        self._meter, self._prices = meter, prices
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self._open = True

    @property
    def cost(self) -> float:
        return 0.0 if self._prices is None else self._prices.cost(self.prompt_tokens, self.completion_tokens)

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """It was answered, and took this much."""
        self._end(prompt_tokens, completion_tokens, answered=True)

    def release(self) -> None:
        """It was refused, or never got there: nothing is to be paid."""
        self._end(0, 0, answered=False)

    def keep(self) -> None:
        """It ended without an answer and may have to be paid all the same."""
        self._end(self.prompt_tokens, self.completion_tokens, answered=False)

    def _end(self, prompt_tokens: int, completion_tokens: int, *, answered: bool) -> None:
        if self._open:
            self._open = False
            self._meter._settle(self, prompt_tokens, completion_tokens, answered)


class Meter:
    """Counts what several black boxes take together. Thread-safe; one process's own.

    `told` is called after each request, from the thread that asked.
    """

    def __init__(
        self,
        *,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        told: "Callable[[Meter], None] | None" = None,
    ) -> None:
        for name, limit in (("max_cost", max_cost), ("max_tokens", max_tokens)):
            if limit is not None and not 0 <= limit < float("inf"):
                raise InvalidSettings(name, limit, "0 or more")
        self.max_cost, self.max_tokens, self._told = max_cost, max_tokens, told
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cost = 0.0
        """Of what has prices."""
        self.unpriced_tokens = 0
        """Tokens of endpoints without prices; 0: `cost` is all there is."""
        self.uncertain_tokens = 0
        """Of requests that ended without an answer, in the sums above: they may have been paid for."""
        self._reserved: set[Reservation] = set()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def in_flight(self) -> int:
        return len(self._reserved)

    def check_prices(self, prices: Prices | None, name: str) -> None:
        """Raises InvalidSettings where a limit on cost is set and what `name` takes is not known."""
        if self.max_cost is not None and prices is None:
            raise InvalidSettings("prices", None, f"given for {name}, since max_cost is: what it takes is not known")

    def reserve(
        self, prices: Prices | None, prompt_tokens: int, completion_tokens: int, kept: Callable[[], str]
    ) -> Reservation:
        """Room for one request at its worst. Raises BudgetReached, saying what is `kept`, where that may cross a limit.

        While others are in flight there may be room again once they are settled (`in_flight`).
        """
        wanted = Reservation(self, prices, prompt_tokens, completion_tokens)
        with self._lock:
            held_cost = sum(one.cost for one in self._reserved)
            held_tokens = sum(one.prompt_tokens + one.completion_tokens for one in self._reserved)
            tokens = prompt_tokens + completion_tokens
            if self.max_cost is not None and self.cost + held_cost + wanted.cost > self.max_cost:
                raise BudgetReached("max_cost", self.max_cost, self.cost + held_cost, wanted.cost, kept())
            if self.max_tokens is not None and self.tokens + held_tokens + tokens > self.max_tokens:
                spent = float(self.tokens + held_tokens)
                raise BudgetReached("max_tokens", float(self.max_tokens), spent, float(tokens), kept())
            self._reserved.add(wanted)
        return wanted

    def _settle(self, one: Reservation, prompt_tokens: int, completion_tokens: int, answered: bool) -> None:
        with self._lock:
            self._reserved.discard(one)
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens
            self.requests += answered
            if not answered:
                self.uncertain_tokens += prompt_tokens + completion_tokens
            if one._prices is None:
                self.unpriced_tokens += prompt_tokens + completion_tokens
            else:
                self.cost += one._prices.cost(prompt_tokens, completion_tokens)
        if self._told is not None:
            self._told(self)
