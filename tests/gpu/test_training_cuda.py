"""Needs a CUDA device: `pytest -m gpu`."""

import dataclasses

import pytest
import torch

from metasepia.reasoning.training import PRESETS, TrainingRun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_batch_has_the_same_bits_on_both_devices():
    recipe = PRESETS["paper"]
    for step in (0, 1500, 9000):
        cpu, gpu = recipe.batch_at(step), recipe.batch_at(step, "cuda")
        assert torch.equal(cpu.x, gpu.x.cpu()) and torch.equal(cpu.w, gpu.w.cpu()) and torch.equal(cpu.y, gpu.y.cpu())


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_losses_on_the_gpu_follow_those_on_the_cpu(precision: str, tolerance: float):
    recipe = dataclasses.replace(PRESETS["small"], learning_rate=1e-4)
    cpu, gpu = TrainingRun(recipe), TrainingRun(recipe, device="cuda", precision=precision)
    for _ in range(5):
        torch.testing.assert_close(cpu.advance(), gpu.advance().cpu(), atol=tolerance, rtol=0)
