"""Experts as others load them: PEFT and transformers give the reference's logits, and losses are as stated."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasepia.backbone import ReferenceBackbone
from metasepia.errors import InvalidRequest
from metasepia.experts.exporting import differences, low_rank, merge, mixed_low_rank, total_loss
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.peft_files import CONFIG, WEIGHTS, write_peft
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone

SUFFIXES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TOKENS = (1, 5, 9, 2, 7, 3)


@dataclass(frozen=True)
class Case:
    prepared: PreparedBackbone
    factors: FactorSet
    model: Any

    def expert(self, seed: int = 0, **changes: Any) -> ExpertVectors:
        draw = np.random.default_rng(seed)
        z = {n: draw.uniform(0.2, 1.8, length).astype(np.float32) for n, length in self.factors.index.lengths.items()}
        return ExpertVectors(**({"backbone": self.prepared.digest, "factors": self.factors.digest, "z": z} | changes))

    def logits(self, adapter: ExpertVectors) -> torch.Tensor:
        reference = ReferenceBackbone(self.model, self.prepared.digest, factors=self.factors)
        reference.put_expert(adapter)
        return reference.logits(TOKENS, ((adapter.digest, 1.0),))


@pytest.fixture(scope="module")
def case(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    home = tmp_path_factory.mktemp("home")
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    return Case(prepared, factors_of(model, SUFFIXES, prepared.digest, home, progress=False), model)


def _loaded(directory: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0]


def _by_peft(case: Case, adapter: LoraAdapter, directory: Path) -> torch.Tensor:
    directory.mkdir(exist_ok=True)
    for name, content in zip((CONFIG, WEIGHTS), write_peft(adapter, case.prepared.path), strict=True):
        (directory / name).write_bytes(content)
    return _logits(PeftModel.from_pretrained(_loaded(case.prepared.path), str(directory)))


@pytest.mark.parametrize("renormalise", [False, True])
def test_at_full_rank_peft_gives_the_experts_logits(case: Case, tmp_path: Path, renormalise: bool):
    expert = case.expert(renormalise=renormalise)
    adapter, losses = low_rank(expert, case.factors, 10**6)
    assert total_loss(losses).relative == 0
    wanted = case.logits(expert)
    assert float((wanted - _logits(case.model)).abs().max()) > 1e-3
    torch.testing.assert_close(_by_peft(case, adapter, tmp_path), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("renormalise", [False, True])
def test_merged_weights_give_the_experts_logits_and_come_with_a_tokenizer(
    case: Case, tmp_path: Path, renormalise: bool
):
    expert = case.expert(renormalise=renormalise)
    merge(case.prepared, expert, case.factors, tmp_path)
    wanted = case.logits(expert)
    torch.testing.assert_close(_logits(_loaded(tmp_path)), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]


def test_a_cut_loses_what_it_says_and_no_other_cut_of_that_rank_loses_less(case: Case):
    expert = case.expert()
    adapter, losses = low_rank(expert, case.factors, 3)
    for layer, loss in losses.items():
        exact = differences(expert, case.factors)[layer]().matrix.double()
        kept = torch.tensor(adapter.b[layer]).double() @ torch.tensor(adapter.a[layer]).double()
        best = torch.linalg.svdvals(exact)[3:].norm()
        torch.testing.assert_close((exact - kept).norm(), best, rtol=1e-4, atol=1e-6)
        assert loss.relative == pytest.approx(float(best / exact.norm()), rel=1e-4)
        assert (loss.rank, adapter.a[layer].shape[0]) == (3, 3)
    assert 0 < total_loss(losses).relative < 1


def test_layers_that_an_expert_leaves_alone_are_left_out_and_an_expert_of_ones_is_refused(case: Case):
    one, *rest = case.factors.index.lengths
    z = {one: case.expert().z[one], rest[0]: np.ones_like(case.expert().z[rest[0]])}
    adapter, _ = low_rank(case.expert(z=z), case.factors, 4)
    assert list(adapter.a) == [one]
    with pytest.raises(InvalidRequest, match="changes no weight"):
        low_rank(case.expert(z={one: np.ones(4, np.float32)}), case.factors, 4)
    with pytest.raises(InvalidRequest, match="at least 1"):
        low_rank(case.expert(), case.factors, 0)


def test_a_truncated_expert_needs_no_more_than_its_rank(case: Case, tmp_path: Path):
    expert = case.expert().truncated(5, case.factors.index)
    adapter, losses = low_rank(expert, case.factors, 8)
    assert (adapter.rank, total_loss(losses).relative) == (5, 0)
    wanted = case.logits(expert)
    torch.testing.assert_close(_by_peft(case, adapter, tmp_path), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_low_rank_adapters_are_mixed_cut_and_merged_like_experts(case: Case, tmp_path: Path):
    parts = [(w, low_rank(case.expert(seed), case.factors, 4)[0]) for w, seed in ((0.25, 1), (0.75, 2))]
    mixed = mixed_low_rank(parts)
    assert mixed.rank == 8
    wanted = _by_peft(case, mixed, tmp_path / "mixed")
    same, losses = low_rank(mixed, None, 8)
    assert total_loss(losses).relative < 1e-6
    torch.testing.assert_close(_by_peft(case, same, tmp_path / "same"), wanted, atol=1e-4, rtol=1e-4)
    merge(case.prepared, mixed, None, tmp_path / "merged")
    torch.testing.assert_close(_logits(_loaded(tmp_path / "merged")), wanted, atol=1e-4, rtol=1e-4)
    assert low_rank(mixed, None, 2)[1].keys() == losses.keys()
