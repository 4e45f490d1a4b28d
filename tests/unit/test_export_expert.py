"""`python -m jobs.export_expert` on a tiny model: what it writes, what it says of it, and where it finds experts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jobs import export_expert
from metasepia.backbone import ReferenceBackbone
from metasepia.experts.exporting import low_rank, total_loss
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.mixing import adapter_of, base_of, mixture_blob, mixture_digest
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import SHARED

SUFFIXES = ("mlp.up_proj", "mlp.down_proj")
TOKENS = (1, 5, 9, 2, 7, 3)


@dataclass(frozen=True)
class Case:
    home: Path
    source: str
    factors: FactorSet
    model: Any
    experts: tuple[ExpertVectors, ...]

    def run(self, given: str | Path, form: str, out: Path, *more: str) -> int:
        options = ["--out", str(out), "--home", str(self.home), "--backbone", self.source, *more]
        return export_expert.main([str(given), "--format", form, *options])

    def logits(self, adapter: dict[str, Any]) -> torch.Tensor:
        reference = ReferenceBackbone(self.model, self.factors.backbone, factors=self.factors)
        for one in self.experts:
            reference.put_expert(one)
        return reference.logits(TOKENS, adapter_of(adapter))

    def logits_of(self, directory: Path, peft: bool) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(self.source if peft else directory, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(directory)) if peft else model
        with torch.no_grad():
            return model.eval()(torch.tensor([TOKENS])).logits[0]


@pytest.fixture(scope="module")
def case(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    home, source = tmp_path_factory.mktemp("home"), str(tiny_checkpoint("llama"))
    prepared = checkpoints.prepare(source, home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    factors = factors_of(model, SUFFIXES, prepared.digest, home, progress=False)
    draw = np.random.default_rng(0)
    experts = tuple(
        ExpertVectors(
            backbone=prepared.digest,
            factors=factors.digest,
            z={n: draw.uniform(0.2, 1.8, k).astype(np.float32) for n, k in factors.index.lengths.items()},
        )
        for _ in range(2)
    )
    with Registry(home / "registry") as registry:
        for name, one in zip(("maths", "law"), experts, strict=True):
            card: dict[str, object] = {"description": f"about {name}", "backbone_source": source}
            registry.put("expert", one.to_bytes(), digest=one.digest, name=name, owner="local", card=card)
        mixture = adapter_of({experts[0].digest: 0.5, experts[1].digest: 0.25, base_of(experts[0]).digest: 0.25})
        digest = mixture_digest(mixture)
        registry.put("mixture", mixture_blob(mixture), digest=digest, name="blend", owner="local", card={})
        registry.put("expert", experts[1].to_bytes(), digest=experts[1].digest, name="maths", owner=SHARED)
    return Case(home, source, factors, model, experts)


def test_a_lora_directory_says_by_layer_what_it_lost_and_peft_loads_it(case: Case, tmp_path: Path, capsys: Any):
    assert case.run("tiny:maths", "peft", tmp_path, "--rank", "4") == 0
    adapter, losses = low_rank(case.experts[0], case.factors, 4)
    said = capsys.readouterr().out
    card = json.loads((tmp_path / "card.json").read_text())
    readme = (tmp_path / "README.md").read_text()
    for layer, loss in losses.items():
        assert f"{layer}: rank 4 of {loss.exact_rank}, relative error {loss.relative:.4f}" in said
        assert f"| `{layer}` | 4 | {loss.exact_rank} | {loss.relative:.4f} |" in readme
        assert card["approximation"]["layers"][layer] == pytest.approx(loss.relative, abs=1e-6)
    total = total_loss(losses).relative
    assert 0 < total < 1
    assert f"all layers: relative error {total:.4f}" in said
    assert (card["approximation"]["relative_error"], card["digest"]) == (pytest.approx(total, abs=1e-6), adapter.digest)
    assert (card["name"], card["description"], card["exported_from"]) == (
        "maths", "about maths", [case.experts[0].digest],
    )  # fmt: skip
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (4, ["down_proj", "up_proj"])
    assert float((case.logits_of(tmp_path, True) - case.logits({case.experts[0].digest: 1.0})).abs().max()) > 1e-4


@pytest.mark.parametrize(("form", "peft"), [("peft", True), ("merged", False)])
def test_a_registered_mixture_with_the_base_is_exported_whole(case: Case, tmp_path: Path, form: str, peft: bool):
    assert case.run("mix@blend", form, tmp_path, "--rank", "1000") == 0
    one, two = case.experts
    wanted = case.logits({one.digest: 0.5, two.digest: 0.25, base_of(one).digest: 0.25})
    torch.testing.assert_close(case.logits_of(tmp_path, peft), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def test_what_was_exported_is_read_again_from_its_directory(case: Case, tmp_path: Path):
    assert case.run("maths", "peft", tmp_path / "lora", "--rank", "1000") == 0
    assert case.run(tmp_path / "lora", "merged", tmp_path / "merged") == 0
    wanted = case.logits({case.experts[0].digest: 1.0})
    torch.testing.assert_close(
        case.logits_of(tmp_path / "merged", False), wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0
    )
    assert case.run("maths", "svf", tmp_path / "svf") == 0
    kept = ExpertVectors.from_bytes((tmp_path / "svf" / "expert.safetensors").read_bytes())
    assert kept.digest == case.experts[0].digest  # the client's own, which hides the shared one
    assert case.run(tmp_path / "svf", "svf", tmp_path / "cut", "--rank", "3") == 0
    cut = ExpertVectors.from_bytes((tmp_path / "cut" / "expert.safetensors").read_bytes())
    assert cut.digest == kept.truncated(3, case.factors.index).digest


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nobody", "no expert or file named 'nobody'; known: law, maths, desk"),
        ("mix@nobody", "no mixture named 'nobody'; known: blend"),
        ("desk", "it was made for backbone"),
    ],
)
def test_what_cannot_be_exported_is_said_in_words(case: Case, tmp_path: Path, given: str, words: str, capsys: Any):
    assert case.run(given, "peft", tmp_path) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
