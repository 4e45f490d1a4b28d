"""Stacks in training: as if each model were alone, whatever becomes of its neighbours, and across stops."""

import math
import platform
import resource

import pytest
import torch
from torch import Tensor

from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.stacked.decoder import DecoderShape
from metasepia.stacked.memory import keep_freed_memory
from metasepia.stacked.regressor import StackedRegressor
from metasepia.stacked.training import StackedAdam, StackedTraining, triangle

SHAPE = DecoderShape(layers=2, width=16, heads=2, tokens=8)
RATES, DECAYS, CLIPS = (3e-3, 1e-2, 5e-3), (0.0, 0.1, 0.01), (0.0, 0.5, 1.0)


def batch_of(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A task for each seed, fresh points for each step."""
    w = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    x = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(1000 * seed + step))
    return x, x @ w


def training(
    models: tuple[int, ...] = (0, 1, 2),
    rates: tuple[float, ...] = RATES,
    poisoned: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> StackedTraining:
    """`poisoned`: from this step on, this model's loss is no number."""
    stack = StackedRegressor(SHAPE, 3, [seed + 10 for seed in models], "separate").to(dtype)
    adam = StackedAdam(
        stack,
        learning_rate=[rates[i] for i in models],
        weight_decay=[DECAYS[i] for i in models],
        clip_norm=[CLIPS[i] for i in models],
    )

    def losses(step: int) -> Tensor:
        x, y = (torch.stack(one).to(dtype) for one in zip(*(batch_of(seed, step) for seed in models), strict=True))
        each = ((stack(x, y) - y) ** 2).mean((1, 2))
        if poisoned and step >= poisoned[0]:
            each = each * torch.where(torch.arange(len(models)) == poisoned[1], math.nan, 1.0)
        return each

    return StackedTraining(stack, adam, losses, triangle(40))


def of_model(run: StackedTraining, model: int) -> dict[str, Tensor]:
    return {name: tensor[model] for name, tensor in run.state().items() if tensor.ndim > 1}


def test_a_model_trained_in_a_stack_is_bit_for_bit_the_model_trained_alone():
    together = training()
    together.advance(40)
    for i in range(3):
        alone = training((i,))
        alone.advance(40)
        assert together.losses[i].equal(alone.losses[0])
        for name, tensor in of_model(alone, 0).items():
            assert of_model(together, i)[name].equal(tensor), name


def test_the_way_of_accelerators_and_the_way_of_cpus_train_the_same_models():
    """In double precision a stack takes the batched products that an accelerator takes."""
    single, double = training(), training(dtype=torch.float64)
    for run in (single, double):
        run.advance(10)
    torch.testing.assert_close(single.losses.double(), double.losses, rtol=1e-4, atol=0)


def gradients_of(model: StackedRegressor, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) / (1 + step) for name, p in model.named_parameters()}


def updated(frozen: Tensor, *, at_once: bool) -> StackedRegressor:
    """A stack after six updates from drawn gradients; from the third on, those of frozen models are NaN."""
    run = training()
    assert isinstance(run.model, StackedRegressor)
    for step in range(6):
        for name, gradient in gradients_of(run.model, step).items():
            gradient[frozen & (step >= 2)] = math.nan
            run.model.get_parameter(name).grad = gradient
        run.adam.gather()
        (run.adam._update_all if at_once else run.adam._update_each)(triangle(8)(step), frozen & (step >= 2))
    return run.model


@pytest.mark.parametrize("at_once", [False, True])
def test_an_update_is_adamws_with_each_models_own_rate_decay_and_clip(at_once: bool):
    made = updated(torch.tensor([False, False, False]), at_once=at_once)
    for i in range(3):
        stack = StackedRegressor(SHAPE, 3, [i + 10], "separate")
        parameters = dict(stack.named_parameters())
        decayed = set(stack.decayed())
        assert {name.split(".")[-2] for name in decayed} == {"qkv", "proj", "up", "down"}
        adamw = torch.optim.AdamW(
            [
                {"params": [parameters[name] for name in decayed], "weight_decay": DECAYS[i]},
                {"params": [parameters[name] for name in parameters.keys() - decayed], "weight_decay": 0.0},
            ]
        )
        for step in range(6):
            for group in adamw.param_groups:
                group["lr"] = RATES[i] * triangle(8)(step)
            for name, gradient in gradients_of(made, step).items():
                parameters[name].grad = gradient[i : i + 1]
            if CLIPS[i]:
                torch.nn.utils.clip_grad_norm_(stack.parameters(), CLIPS[i])
            adamw.step()
        for name, tensor in stack.model_state(0).items():
            torch.testing.assert_close(made.model_state(i)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", [False, True])
def test_an_update_leaves_frozen_models_alone(at_once: bool):
    moving, frozen = (updated(torch.tensor([False, False, held]), at_once=at_once) for held in (False, True))
    for model in (0, 1):
        for name, tensor in moving.model_state(model).items():
            assert frozen.model_state(model)[name].equal(tensor)
    assert bool(frozen.model_state(2)["positions"].isfinite().all())
    assert not frozen.model_state(2)["positions"].equal(moving.model_state(2)["positions"])


def test_training_learns():
    run = training(rates=(1e-2, 1e-2, 1e-2))
    run.advance(40)
    x, y = (torch.stack(one) for one in zip(*(batch_of(i, 0) for i in range(3)), strict=True))
    untrained = StackedRegressor(SHAPE, 3, [10, 11, 12], "separate")
    with torch.no_grad():
        before, after = (((stack(x, y) - y) ** 2).mean((1, 2)) for stack in (untrained, run.model))
    assert bool((after < 0.6 * before).all()), (before, after)


def test_a_model_that_diverges_is_frozen_and_its_neighbours_keep_their_bits():
    sound, ill = training(), training(poisoned=(15, 1))
    for run in (sound, ill):
        run.advance(15)
    before = of_model(ill, 1)
    for run in (sound, ill):
        run.advance(40)
    assert ill.diverged.tolist() == [-1, 15, -1] and sound.diverged.tolist() == [-1, -1, -1]
    for i in (0, 2):
        for name, tensor in of_model(sound, i).items():
            assert tensor.equal(of_model(ill, i)[name]), name
    for name, tensor in before.items():
        assert tensor.equal(of_model(ill, 1)[name]), name


def test_a_rate_far_too_high_fails_alone():
    sound, ill = training(), training(rates=(RATES[0], 1e30, RATES[2]))
    for run in (sound, ill):
        run.advance(40)
    assert 0 < ill.diverged[1] < 10 and ill.diverged[[0, 2]].tolist() == [-1, -1]
    for i in (0, 2):
        for name, tensor in of_model(sound, i).items():
            assert tensor.equal(of_model(ill, i)[name]), name


def test_a_run_stopped_and_restored_ends_with_the_same_bytes():
    whole = training(poisoned=(12, 2))
    whole.advance(40)
    stopped = training(poisoned=(12, 2))
    stopped.advance(17)
    state = stopped.state()
    stopped.advance(23)  # what was handed out is a copy
    resumed = training(poisoned=(12, 2))
    resumed.restore(state)
    assert resumed.step == 17
    resumed.advance(40)
    expected, made = whole.state(), resumed.state()
    assert expected.keys() == made.keys()
    for name, tensor in expected.items():
        assert tensor.numpy().tobytes() == made[name].numpy().tobytes(), name


def test_the_state_of_another_stack_is_refused_and_nothing_changed():
    run = training()
    before = run.state()
    other = StackedRegressor(DecoderShape(layers=2, width=24, heads=2, tokens=8), 3, [1, 2, 3], "separate")
    state = StackedTraining(other, StackedAdam(other, learning_rate=1.0), lambda _: torch.zeros(3), triangle(9)).state()
    with pytest.raises(CorruptArtefact, match="of another stack"):
        run.restore(state)
    with pytest.raises(CorruptArtefact, match=r"weights\.read_out\.weight is not in both"):
        run.restore({name: tensor for name, tensor in before.items() if name != "weights.read_out.weight"})
    with pytest.raises(CorruptArtefact, match="without 'step'"):
        run.restore({name: tensor for name, tensor in before.items() if name != "step"})
    with pytest.raises(CorruptArtefact, match="of 2 models, not 3"):
        run.restore({**before, "diverged": torch.zeros(2)})
    for name, tensor in run.state().items():
        assert tensor.equal(before[name])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another system")
def test_what_a_step_frees_stays_with_the_process():
    assert keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [torch.ones(1 << 20) for _ in range(20)]
        del arrays
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[2] < 2000  # of 20,480 pages


def test_a_triangle_rises_and_falls_in_its_shares_and_never_stands_still_at_zero():
    factor = triangle(100, warmup=0.25)
    assert [factor(step) for step in (0, 24, 25, 99)] == pytest.approx([0.04, 1.0, 1.0, 1 / 75])
    assert triangle(10, warmup=0.0)(0) == 1.0
    assert [triangle(10, warmup=1.0)(step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("learning_rate", {"learning_rate": [0.1, 0.1]}),
        ("learning_rate", {"learning_rate": math.nan}),
        ("weight_decay", {"learning_rate": 0.1, "weight_decay": -1.0}),
        ("clip_norm", {"learning_rate": 0.1, "clip_norm": [1.0, math.inf, 1.0]}),
        ("betas", {"learning_rate": 0.1, "betas": (0.9, 1.0)}),
    ],
)
def test_a_rate_that_is_none_is_refused_by_its_name(name: str, settings: dict):
    stack = StackedRegressor(SHAPE, 3, [1, 2, 3], "separate")
    with pytest.raises(InvalidSettings) as refusal:
        StackedAdam(stack, **settings)
    assert refusal.value.field == name
