"""Decoding, scoring and hidden states of many rows at once, on one tensor-parallel rank.

A `RowDecoder` holds the rows in flight and their key/value cache. It is driven by `StepPlan`s, small plain values
that go to each rank alike; every rank runs the same forwards in the same order, and rank 0's `StepResult` goes back to
the scheduler. It works for any causal model of transformers: rows are left-padded, so rotary, learned and ALiBi positions
and sliding windows see the same distances as the row alone.
"""

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from metasepia.rows import Adapter, Sampling
from metasepia.steps import Chosen, StepPlan, StepResult


class ExpertLayers(Protocol):
    """What the decoder needs of `metasepia.svf.ExpertLayers`."""

    def select(self, adapters: Sequence[Adapter]) -> None: ...

    def holds(self, digest: str) -> bool: ...


class RowDecoder:
    """The rows in flight on one rank, and their cache.

    `run` is deterministic in the sequence of plans, so ranks given the same plans stay in lock-step. Anything that
    `run` raises is a failure of the whole gang: the decoder's rows are then lost and must be submitted again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backbone: str,
        experts: ExpertLayers | None = None,
        factors: str | None = None,
        tp_size: int = 1,
        chooses: bool = True,
    ) -> None:
        """`backbone` and `factors` are digests for `Executed`; `chooses` is False on ranks whose results are not read."""
        raise NotImplementedError

    def run(self, plan: StepPlan) -> StepResult:
        """Runs one step. The result's dicts are empty where `chooses` is False."""
        raise NotImplementedError


def choose(
    logits: Float[Tensor, "rows vocab"], sampling: Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int]
) -> list[Chosen]:
    """The next token of each row: the largest logit at temperature 0, else a draw from the tempered nucleus.

    The noise is Gumbel, a function of (seed, position, vocabulary size) alone: Philox, counter-based, so a row
    draws the same in any batch and after any restart. `positions` are those of the tokens chosen, in the whole sequence.
    """
    raise NotImplementedError
