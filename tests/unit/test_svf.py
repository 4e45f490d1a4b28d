import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, UnknownName
from metasepia.experts.factors import FactorSet, SingularFactors, factors_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models.shards import LayerShard
from tests.tiny import llama, summed_over

BACKBONE = "b" * 64
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def factors(home: Path) -> FactorSet:
    return factors_of(llama(), MLP, BACKBONE, home, progress=False)


def expert(factors: FactorSet, seed: int, renormalise: bool = False, amount: float = 0.4) -> ExpertVectors:
    rng = np.random.default_rng(seed)
    z = {n: (1 + amount * rng.uniform(-1, 1, k)).astype(np.float32) for n, k in factors.index.lengths.items()}
    return ExpertVectors(backbone=BACKBONE, factors=factors.digest, z=z, renormalise=renormalise)


def materialised(factors: FactorSet, chosen: ExpertVectors) -> LlamaForCausalLM:
    model = llama()
    for name, vector in chosen.z.items():
        model.get_parameter(name).copy_(factors[name].scaled(torch.tensor(vector), chosen.renormalise))
    return model


def logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids).logits


def assert_same_logits(ours: Tensor, oracle: Tensor) -> None:
    """1e-4 of the largest logit, and the same argmax."""
    assert (ours - oracle).abs().max() <= 1e-4 * oracle.abs().max()
    assert torch.equal(ours.argmax(-1), oracle.argmax(-1))


TOKENS = torch.randint(0, 96, (4, 7), generator=torch.Generator().manual_seed(1))


def test_factors_times_a_vector_of_ones_give_back_the_weight() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SingularFactors.of(weight).scaled(torch.ones(4)), weight)


def test_scaled_multiplies_each_rank_one_part_by_its_own_value() -> None:
    f = SingularFactors.of(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    z = torch.tensor([0.5, 2.0, 0.0, 1.5])
    parts = sum(z[i] * f.s[i] * torch.outer(f.u[:, i], f.vh[i]) for i in range(4))
    torch.testing.assert_close(f.scaled(z), parts)


def test_renormalising_keeps_the_nuclear_norm_and_makes_a_constant_vector_change_nothing() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    f = SingularFactors.of(weight)
    z = torch.tensor([0.2, 0.9, 0.5, 0.7])
    torch.testing.assert_close(torch.linalg.matrix_norm(f.scaled(z, renormalise=True), "nuc"), f.s.sum())
    torch.testing.assert_close(f.scaled(torch.full((4,), 0.525), renormalise=True), weight)
    torch.testing.assert_close(f.scaled(torch.full((4,), 0.525)), 0.525 * weight)


def test_the_references_first_vector_needs_its_renormalisation_to_start_near_the_base(factors: FactorSet) -> None:
    """sigmoid(0.1 + 0.01 noise) is about 0.525 everywhere: the same direction, about half the size."""
    rng = np.random.default_rng(0)
    z = {n: (1 / (1 + np.exp(-rng.normal(0.1, 0.01, k)))).astype(np.float32) for n, k in factors.index.lengths.items()}
    model = llama()
    base = logits(model, TOKENS)
    layers = attach(model, factors)
    change = {}
    for renormalise in (True, False):
        one = ExpertVectors(backbone=BACKBONE, factors=factors.digest, z=z, renormalise=renormalise)
        layers.put(one.digest, one)
        layers.select([((one.digest, 1.0),)] * 4)
        change[renormalise] = float((logits(model, TOKENS) - base).norm() / base.norm())
    assert change[True] < 0.02 < 0.2 < change[False]


def test_an_expert_of_ones_and_a_base_row_give_the_base_logits(factors: FactorSet) -> None:
    model = llama()
    base = logits(model, TOKENS)
    layers = attach(model, factors)
    assert_same_logits(logits(model, TOKENS), base)
    ones = expert(factors, 0, amount=0)
    layers.put(ones.digest, ones)
    layers.select([((ones.digest, 1.0),)] * 4)
    assert_same_logits(logits(model, TOKENS), base)


@pytest.mark.parametrize("renormalise", [False, True])
def test_each_row_of_a_mixed_batch_equals_itself_alone_with_its_own_weights_rebuilt(
    factors: FactorSet, renormalise: bool
) -> None:
    first, second = expert(factors, 1, renormalise), expert(factors, 2, renormalise)
    model = llama()
    layers = attach(model, factors)
    layers.put(first.digest, first)
    layers.put(second.digest, second)
    layers.select([((first.digest, 1.0),), (), ((second.digest, 1.0),), ((first.digest, 1.0),)])
    ours = logits(model, TOKENS)
    for row, weights in enumerate([first, None, second, first]):
        alone = llama() if weights is None else materialised(factors, weights)
        assert_same_logits(ours[row : row + 1], logits(alone, TOKENS[row : row + 1]))


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_mixture_mixes_the_vectors_and_then_renormalises(factors: FactorSet, renormalise: bool) -> None:
    first, second = expert(factors, 1, renormalise), expert(factors, 2, renormalise)
    mixed_z = {n: np.float32(0.3) * first.z[n] + np.float32(0.7) * second.z[n] for n in first.z}
    mixed = ExpertVectors(backbone=BACKBONE, factors=factors.digest, z=mixed_z, renormalise=renormalise)
    model = llama()
    layers = attach(model, factors)
    for one in (first, second):
        layers.put(one.digest, one)
    layers.select([((first.digest, 0.3), (second.digest, 0.7))] * 4)
    assert_same_logits(logits(model, TOKENS), logits(materialised(factors, mixed), TOKENS))


def test_a_layer_that_an_expert_lacks_counts_as_ones_alone_and_in_a_mixture(factors: FactorSet) -> None:
    whole = expert(factors, 1)
    name = sorted(whole.z)[0]
    part = ExpertVectors(backbone=BACKBONE, factors=factors.digest, z={name: whole.z[name]})
    model = llama()
    layers = attach(model, factors)
    for one in (whole, part):
        layers.put(one.digest, one)
    layers.select([((part.digest, 1.0),), (), (), ((part.digest, 0.5), (whole.digest, 0.5))])
    ours = logits(model, TOKENS)
    assert_same_logits(ours[:1], logits(materialised(factors, part), TOKENS[:1]))
    half = {n: (z if n == name else (1 + z) / 2) for n, z in whole.z.items()}
    mixed = ExpertVectors(backbone=BACKBONE, factors=factors.digest, z=half)
    assert_same_logits(ours[3:], logits(materialised(factors, mixed), TOKENS[3:]))


def test_below_fp32_an_expert_of_ones_is_the_base_model_to_the_last_bit(factors: FactorSet) -> None:
    model = llama().bfloat16()
    layers = attach(model, factors)
    base = logits(model, TOKENS)
    ones = expert(factors, 0, amount=0)
    layers.put(ones.digest, ones)
    layers.select([((ones.digest, 1.0),)] * 4)
    assert torch.equal(logits(model, TOKENS), base)


def test_the_base_after_an_expert_is_the_base_to_the_last_bit(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    base = logits(model, TOKENS)
    one = expert(factors, 1)
    layers.put(one.digest, one)
    layers.select([((one.digest, 1.0),)] * 4)
    assert not torch.allclose(logits(model, TOKENS), base, atol=1e-2)
    layers.select([()] * 4)
    assert torch.equal(logits(model, TOKENS), base)
    layers.select_values(layers.flat(one)[None])
    layers.select([])
    assert torch.equal(logits(model, TOKENS), base)


class Ffn(nn.Module):
    """Two layers as tensor parallelism cuts them: the first by outputs, the second by inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 9), nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("sizes", [(6, 3), (5, 4), (9,)])
def test_shards_of_both_kinds_summed_by_one_reduce_a_layer_equal_the_whole_layer(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    whole = Ffn().requires_grad_(False)
    factors = factors_of(whole, ("up", "down"), BACKBONE, tmp_path, progress=False)
    one = expert(factors, 1, renormalise=True)
    adapters = [(), ((one.digest, 1.0),), ()]
    x = torch.randn(3, 2, 10)
    rebuilt = Ffn().requires_grad_(False)
    rebuilt.load_state_dict(whole.state_dict())
    for name, z in one.z.items():
        rebuilt.get_parameter(name).copy_(factors[name].scaled(torch.tensor(z), True))
    wanted = torch.stack([whole(x[0]), rebuilt(x[1]), whole(x[2])])

    reduces, num_reduces, answers = summed_over(len(sizes)), [0] * len(sizes), [x] * len(sizes)

    def run(rank: int) -> None:
        shard = {
            "up.weight": LayerShard("column", sizes, rank),
            "down.weight": LayerShard("row", sizes, rank),
        }
        span = shard["up.weight"].span
        model = Ffn().requires_grad_(False)
        model.up.weight, model.up.bias = (nn.Parameter(p[span], False) for p in (whole.up.weight, whole.up.bias))
        model.down.weight, model.down.bias = nn.Parameter(whole.down.weight[:, span], False), whole.down.bias

        def reduce(y: Tensor) -> Tensor:
            num_reduces[rank] += 1
            return reduces(rank)(y)

        layers = attach(model, factors, shard, reduce)
        layers.put(one.digest, one)
        layers.select(adapters)
        answers[rank] = model(x)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_reduces == [1] * len(sizes)
    for answer in answers:
        torch.testing.assert_close(answer, wanted)


def test_a_shard_of_another_shape_than_it_says_is_refused(factors: FactorSet) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InvalidSettings, match=r"such that the weight is \[30, 24\]; it is \[40, 24\]"):
        attach(llama(), factors, {name: LayerShard("column", (30, 10), 0)})
    with pytest.raises(InvalidSettings, match="sizes that sum to 40"):
        attach(llama(), factors, {name: LayerShard("column", (30, 30), 0)})


def test_what_ran_is_reported_row_by_row_and_not_before_it_ran(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    one = expert(factors, 1)
    layers.put(one.digest, one)
    adapter = ((one.digest, 1.0),)
    layers.select([(), adapter])
    with pytest.raises(RuntimeError, match="0 of 6 expert layers ran"):
        _ = layers.executed
    logits(model, TOKENS[:2])
    assert layers.executed == (((), "plain"), (adapter, "factors"))


def test_an_expert_that_is_not_held_is_refused_by_name_and_the_selection_stays(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    one = expert(factors, 1)
    layers.put(one.digest, one)
    layers.select([((one.digest, 1.0),)])
    ours = logits(model, TOKENS[:1])
    with pytest.raises(UnknownName, match=f"no expert named 'absent'; known: {one.digest}"):
        layers.select([(("absent", 1.0),)])
    assert torch.equal(logits(model, TOKENS[:1]), ours)
    layers.drop(one.digest)
    with pytest.raises(UnknownName):
        layers.select([((one.digest, 1.0),)])


def test_a_batch_of_another_size_than_selected_is_an_error_and_not_the_base_model(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    layers.select([()] * 3)
    with pytest.raises(ValueError, match="3 adapters are selected and the batch has 4 rows"):
        logits(model, TOKENS)


def test_a_mixture_of_renormalised_and_other_experts_or_off_the_simplex_is_refused(factors: FactorSet) -> None:
    layers = attach(llama(), factors)
    a, b = expert(factors, 1), expert(factors, 2, renormalise=True)
    layers.put(a.digest, a)
    layers.put(b.digest, b)
    with pytest.raises(InvalidRequest, match="choose one kind"):
        layers.select([((a.digest, 0.5), (b.digest, 0.5))])
    for weights in [(0.5, 0.6), (1.5, -0.5), (float("nan"), 1.0)]:
        with pytest.raises(InvalidRequest, match="weights must"):
            layers.select([((a.digest, weights[0]), (b.digest, weights[1]))])


def test_an_expert_under_a_digest_that_is_not_its_own_is_refused(factors: FactorSet) -> None:
    layers = attach(llama(), factors)
    with pytest.raises(CorruptArtefact, match="its content has digest"):
        layers.put("0" * 64, expert(factors, 1))


def test_an_expert_whose_norm_cannot_be_restored_is_refused(factors: FactorSet) -> None:
    layers = attach(llama(), factors)
    z = {n: -np.ones(k, np.float32) for n, k in factors.index.lengths.items()}
    one = ExpertVectors(backbone=BACKBONE, factors=factors.digest, z=z, renormalise=True)
    with pytest.raises(CorruptArtefact, match="not positive"):
        layers.put(one.digest, one)


def test_experts_cost_their_vectors_only_and_switching_between_them_less_than_a_mebibyte(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    before = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    experts = [expert(factors, seed) for seed in range(20)]
    for one in experts:
        layers.put(one.digest, one)
    assert layers.num_bytes == 20 * 4 * factors.num_singular == sum(one.num_bytes for one in experts)
    with torch.profiler.profile(profile_memory=True) as profile:
        tracemalloc.start()
        layers.select([((experts[3].digest, 1.0),), ((experts[7].digest, 1.0),), ()])
        _, python_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 0 < allocated < 1 << 20
    assert python_peak < 1 << 20
    assert {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]} == before


def test_whole_factors_in_the_models_dtype_are_not_copied(home: Path, factors: FactorSet) -> None:
    model = llama()
    attach(model, factors)
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    for name, f in factors.factors.items():
        assert buffers[name.removesuffix("weight") + "u"] == f.u.data_ptr()
        assert buffers[name.removesuffix("weight") + "vh"] == f.vh.data_ptr()


def test_the_gradient_of_a_vector_through_the_factors_is_that_through_the_rebuilt_weight(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    z = layers.flat(expert(factors, 1, renormalise=True)).requires_grad_()
    layers.select_values(z[None], renormalise=True)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()

    by_hand = z.detach().clone().requires_grad_()
    rebuilt = {n: factors[n].scaled(by_hand[span], True) for n, span in layers.spans.items()}
    oracle = llama()
    loss = torch.func.functional_call(oracle, rebuilt, kwargs={"input_ids": TOKENS, "labels": TOKENS}).loss
    loss.backward()
    assert z.grad is not None and by_hand.grad is not None
    torch.testing.assert_close(z.grad, by_hand.grad, rtol=1e-3, atol=1e-5)


def test_rows_of_a_population_each_use_their_own_values(factors: FactorSet) -> None:
    members = [expert(factors, seed) for seed in (1, 2, 3, 4)]
    model = llama()
    layers = attach(model, factors)
    layers.select_values(torch.stack([layers.flat(one) for one in members]))
    ours = logits(model, TOKENS)
    for row, one in enumerate(members):
        assert_same_logits(ours[row : row + 1], logits(materialised(factors, one), TOKENS[row : row + 1]))
