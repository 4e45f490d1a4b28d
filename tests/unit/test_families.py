"""Each family cut over two processes gives the whole model's numbers; what cannot be cut is refused at start."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metasepia.errors import InvalidSettings, NotSupported
from metasepia.models import families, planning
from metasepia.models.planning import Need
from tests import tiny

ROOT = Path(__file__).parents[2]
FAMILIES = tiny.FAMILIES
TIGHT = 1e-4
"""Of the largest logit: what fp32 sums in another order may differ by."""


@pytest.fixture(scope="session")
def findings(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    """What tests/family_rank.py found, by tp_size and rank."""
    directory = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        (directory / family).symlink_to(tiny_checkpoint(family))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    found: dict[int, list[dict[str, Any]]] = {}
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.family_rank", str(world), str(rank), str(port), str(directory)),
                    *FAMILIES,
                ],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        try:
            output = [process.communicate(timeout=200)[0].decode()[-3000:] for process in running]
        finally:
            for process in running:
                process.kill()
        assert all(process.returncode == 0 for process in running), "\n---\n".join(output)
        found[world] = [json.loads((directory / f"rank{rank}of{world}.json").read_text()) for rank in range(world)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_cut_model_gives_the_logits_and_hidden_states_of_the_whole_one(
    findings: dict[int, list[dict[str, Any]]], family: str, tp_size: int
) -> None:
    for rank in findings[tp_size]:
        assert rank[family]["world"] == tp_size
        assert rank[family]["logits"] < TIGHT
        assert rank[family]["hidden"] < TIGHT
        assert rank[family]["same_choice"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_rows_with_different_experts_equal_each_row_alone_with_the_materialised_weights(
    findings: dict[int, list[dict[str, Any]]], family: str, tp_size: int
) -> None:
    for rank in findings[tp_size]:
        assert rank[family]["experts"] < TIGHT
        assert rank[family]["experts_same_choice"]
        assert rank[family]["experts_moved"] > 100 * TIGHT  # an expert that changes nothing would prove nothing
        assert rank[family]["ones"] < TIGHT


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_holds_its_own_part_of_every_cut_weight(
    findings: dict[int, list[dict[str, Any]]], family: str
) -> None:
    first, second = (rank[family] for rank in findings[2])
    assert first["sizes"] == second["sizes"]
    for name, sizes in first["sizes"].items():
        axis = 1 if first["kinds"][name] == "row" else 0
        assert [first["shapes"][name][axis], second["shapes"][name][axis]] == sizes
        assert min(sizes) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_that_plans_by_is_the_one_that_deepspeed_cuts_by(
    findings: dict[int, list[dict[str, Any]]], family: str
) -> None:
    config = tiny.config_of(family).to_dict()
    for rank in findings[2]:
        kinds, sizes, whole = rank[family]["kinds"], rank[family]["sizes"], rank[family]["whole"]
        assert {name for name in whole if families.is_row_parallel(family, name) is not None} == {
            name
            for name in whole
            if name.removesuffix("bias").removesuffix("weight") + "weight" in kinds
            and not (name.endswith("bias") and kinds[name.removesuffix("bias") + "weight"] == "row")
        }
        for name, kind in kinds.items():
            assert families.is_row_parallel(family, name) == (kind == "row")
            assert list(families.cut(config, name, sum(sizes[name]), 2)) == sizes[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_plan_counts_the_bytes_that_the_fullest_rank_holds(
    findings: dict[int, list[dict[str, Any]]], family: str, tp_size: int
) -> None:
    need = Need(
        device="cpu",
        dtype="float32",
        tp_size=tp_size,
        expert_layers=(),
        expert_rank=0,
        max_rows=1,
        max_batch_tokens=256,
        max_prefix_tokens=0,
        max_expert_bytes=0,
    )
    plan = planning.plan(tiny.config_of(family).to_dict(), need)
    assert plan.parts[0].what == "weights"
    assert plan.parts[0].num_bytes == max(rank[family]["bytes"] for rank in findings[tp_size])


def test_three_key_value_heads_become_two_and_one(findings: dict[int, list[dict[str, Any]]]) -> None:
    sizes = findings[2][0]["llama"]["sizes"]
    assert sizes["model.layers.0.self_attn.k_proj.weight"] == [16, 8]
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == [32, 16]
    assert sizes["model.layers.0.self_attn.o_proj.weight"] == [32, 16]


def test_collectives_of_a_gang_have_the_deadline_that_was_asked_for(findings: dict[int, list[dict[str, Any]]]) -> None:
    assert [rank["timeout_s"] for rank in findings[2]] == [37.0, 37.0]


def test_the_shared_memory_sum_equals_torchs(findings: dict[int, list[dict[str, Any]]]) -> None:
    for rank in findings[2]:
        assert rank["llama"]["all_reduce"] == "shared memory"
        assert max(rank["sums"]) < 1e-6


def test_the_shared_memory_sum_gives_up_on_a_silent_peer_at_its_deadline(
    findings: dict[int, list[dict[str, Any]]],
) -> None:
    assert 0.5 <= findings[2][0]["silence_s"] < 1.5


def test_a_family_without_a_tested_policy_is_refused_by_name_and_the_supported_ones_are_listed() -> None:
    with pytest.raises(NotSupported, match=r"'mamba'.*tp_size 1; .*bloom, gpt_neox, llama, mistral, qwen2"):
        families.check({"model_type": "mamba", "num_attention_heads": 8}, 2)


def test_any_causal_model_may_run_whole() -> None:
    families.check({"model_type": "mamba"}, 1)


def test_more_ranks_than_key_value_heads_are_refused() -> None:
    config = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3}
    families.check(config, 3)
    with pytest.raises(InvalidSettings, match=r"tp_size = 4 .* from 1 to 3, the key/value heads"):
        families.check(config, 4)
