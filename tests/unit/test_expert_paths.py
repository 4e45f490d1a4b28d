import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, NotSupported, UnknownName
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.fused_mlp import FusedMLP
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.svf import ExpertLayers, attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.matrices import Matrix
from metasepia.models.shards import LayerShard
from metasepia.rows import Adapter
from tests.tiny import SMALLER, llama, summed_over

BACKBONE = "b" * 64
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
RANK = 8
TOKENS = torch.randint(0, 96, (6, 7), generator=torch.Generator().manual_seed(1))
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> FactorSet:
    return factors_of(llama(), MLP, BACKBONE, tmp_path_factory.mktemp("home"), progress=False)


def expert(factors: FactorSet, seed: int, renormalise: bool = False, rank: int | None = None) -> ExpertVectors:
    rng = np.random.default_rng(seed)
    z = {n: rng.uniform(0.6, 1.4, k).astype(np.float32) for n, k in factors.index.lengths.items()}
    whole = ExpertVectors(backbone=BACKBONE, factors=factors.digest, z=z, renormalise=renormalise)
    return whole if rank is None else whole.truncated(rank, factors.index)


def lora(model: nn.Module, seed: int, rank: int, suffixes: Sequence[str] = ("_proj",)) -> LoraAdapter:
    rng = np.random.default_rng(seed)
    names = [
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(suffixes))
    ]
    shapes = {name: model.get_parameter(name).shape for name in names}
    a = {n: (0.3 * rng.standard_normal((rank, shape[1]))).astype(np.float32) for n, shape in shapes.items()}
    b = {n: (0.3 * rng.standard_normal((shape[0], rank))).astype(np.float32) for n, shape in shapes.items()}
    return LoraAdapter(backbone=BACKBONE, a=a, b=b)


def rebuilt(factors: FactorSet, one: ExpertVectors) -> Weights:
    return {name: factors[name].scaled(torch.tensor(z), one.renormalise) for name, z in one.z.items()}


def with_low_rank(model: nn.Module, parts: Sequence[tuple[float, LoraAdapter]]) -> Weights:
    names = sorted({name for _, one in parts for name in one.a})
    return {
        n: model.get_parameter(n)
        + sum(weight * torch.tensor(one.b[n]) @ torch.tensor(one.a[n]) for weight, one in parts if n in one.a)
        for n in names
    }


@torch.no_grad()
def logits(model: nn.Module, token_ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    if weights:
        return torch.func.functional_call(model, dict(weights), kwargs={"input_ids": token_ids}).logits
    return model(input_ids=token_ids).logits


def assert_same_logits(ours: Tensor, oracle: Tensor) -> None:
    """1e-4 of the largest logit, and the same argmax."""
    assert (ours - oracle).abs().max() <= 1e-4 * oracle.abs().max()
    assert torch.equal(ours.argmax(-1), oracle.argmax(-1))


def hold(layers: ExpertLayers, *experts: ExpertVectors | LoraAdapter) -> list[Adapter]:
    for one in experts:
        layers.put(one.digest, one)
    return [((one.digest, 1.0),) for one in experts]


def test_rows_of_every_path_share_a_batch_and_each_equals_its_own_dense_weights(factors: FactorSet) -> None:
    model, plain = llama(), llama()
    layers = attach(model, factors, truncated_rank=RANK)
    whole, cut, pinned = expert(factors, 1), expert(factors, 2, rank=RANK), expert(factors, 3, renormalise=True)
    low = lora(plain, 4, rank=3)
    of_whole, of_cut, of_pinned, of_low = hold(layers, whole, cut, pinned, low)
    layers.pin(of_pinned)
    layers.select([of_cut, of_whole, (), of_low, of_pinned, of_cut])
    ours = logits(model, TOKENS)
    oracles = [rebuilt(factors, cut), rebuilt(factors, whole), {}, with_low_rank(plain, [(1, low)])]
    oracles += [rebuilt(factors, pinned), rebuilt(factors, cut)]
    for row, weights in enumerate(oracles):
        assert_same_logits(ours[row : row + 1], logits(plain, TOKENS[row : row + 1], weights))
    paths = ["truncated", "factors", "plain", "lora", "materialised", "truncated"]
    assert [path for _, path in layers.executed] == paths
    with pytest.raises(RuntimeError, match="0 of 14 expert layers ran"):
        layers.select([()])
        _ = layers.executed


@pytest.mark.parametrize("renormalise", [False, True])
def test_truncated_rows_equal_dense_weights_alone_and_mixed(factors: FactorSet, renormalise: bool) -> None:
    model, plain = llama(), llama()
    layers = attach(model, factors, truncated_rank=RANK)
    first, second = (expert(factors, seed, renormalise, rank) for seed, rank in ((1, RANK), (2, RANK - 3)))
    of_first, of_second = hold(layers, first, second)
    mixture: Adapter = ((first.digest, 0.3), (second.digest, 0.7))
    identity = ExpertVectors.identity(BACKBONE, factors.digest, renormalise)
    half: Adapter = ((first.digest, 0.5), (identity.digest, 0.5))
    layers.select([of_first, of_second, mixture, half, (), of_first])
    ours = logits(model, TOKENS)

    def mixed(weight: float, other: ExpertVectors) -> Weights:
        z = {n: np.ones(RANK, np.float32) * (1 - weight) + np.float32(weight) * v for n, v in first.z.items()}
        for name, vector in other.z.items():
            z[name][: len(vector)] += np.float32(1 - weight) * (vector - 1)
        return rebuilt(factors, dataclasses.replace(first, z=z))

    oracles = [rebuilt(factors, first), rebuilt(factors, second), mixed(0.3, second), mixed(0.5, identity), {}]
    for row, weights in enumerate([*oracles, oracles[0]]):
        assert_same_logits(ours[row : row + 1], logits(plain, TOKENS[row : row + 1], weights))
    assert {path for adapter, path in layers.executed if adapter} == {"truncated"}
    layers.select([of_first])
    assert_same_logits(logits(model, TOKENS[:1]), ours[:1])


def test_an_expert_takes_the_truncated_path_only_if_it_is_cut_to_the_rank_served(factors: FactorSet) -> None:
    layers = attach(llama(), factors, truncated_rank=RANK)
    paths = [layers.path_of(one) for one in hold(layers, *[expert(factors, 1, rank=r) for r in (RANK, RANK + 1, None)])]
    assert paths == ["truncated", "factors", "factors"]
    both = tuple((expert(factors, 1, rank=r).digest, 0.5) for r in (RANK, None))
    assert layers.path_of(both) == "factors"


def test_a_mixture_of_cut_and_whole_experts_goes_through_all_factors(factors: FactorSet) -> None:
    model, plain = llama(), llama()
    layers = attach(model, factors, truncated_rank=RANK)
    whole, cut = expert(factors, 1), expert(factors, 2, rank=RANK)
    hold(layers, whole, cut)
    layers.select([((whole.digest, 0.25), (cut.digest, 0.75))] * len(TOKENS))
    z = {n: np.float32(0.25) * v + np.float32(0.75) for n, v in whole.z.items()}
    for name, vector in cut.z.items():
        z[name][:RANK] += np.float32(0.75) * (vector - 1)
    mixed = dataclasses.replace(whole, z=z)
    assert_same_logits(logits(model, TOKENS), logits(plain, TOKENS, rebuilt(factors, mixed)))


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("renormalise", [False, True])
def test_weights_by_layer_mix_each_layer_by_its_own(factors: FactorSet, renormalise: bool, rank: int | None) -> None:
    model, plain = llama(), llama()
    layers = attach(model, factors, truncated_rank=RANK)
    first, second = (expert(factors, seed, renormalise, rank) for seed in (1, 2))
    hold(layers, first, second)
    shares = tuple(i / 10 for i in range(len(factors.index.lengths)))
    layers.select([((first.digest, shares), (second.digest, tuple(1 - w for w in shares)))] * len(TOKENS))
    z = {
        name: np.float32(share) * first.z[name] + np.float32(1 - share) * second.z[name]
        for name, share in zip(factors.index.lengths, shares, strict=True)
    }
    weights = rebuilt(factors, dataclasses.replace(first, z=z))
    assert_same_logits(logits(model, TOKENS), logits(plain, TOKENS, weights))
    with pytest.raises(InvalidRequest, match="one for each of the 6 factored layers, got 2"):
        layers.select([((first.digest, (0.5, 0.5)), (second.digest, (0.5, 0.5)))])


def test_the_base_as_an_expert_is_held_always_and_runs_as_the_base(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    base = logits(model, TOKENS)
    for renormalise in (False, True):
        digest = ExpertVectors.identity(BACKBONE, factors.digest, renormalise).digest
        assert layers.holds(digest) and digest not in layers.held
        layers.drop(digest)
        layers.select([((digest, 1.0),)] * len(TOKENS))
        assert torch.equal(logits(model, TOKENS), base)
        assert layers.executed[0] == (((digest, 1.0),), "plain")
        with pytest.raises(InvalidRequest, match="sum to 1"):
            layers.select([((digest, 0.5),)])


def test_low_rank_adapters_of_different_ranks_and_layers_share_a_batch(
    factors: FactorSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = llama(attention_bias=True), llama(attention_bias=True)
    layers = attach(model, backbone=BACKBONE)
    whole = lora(plain, 1, rank=5)
    attention = lora(plain, 2, rank=2, suffixes=("q_proj", "v_proj"))
    down = lora(plain, 3, rank=4, suffixes=("down_proj",))
    of_whole, of_attention, of_down = hold(layers, whole, attention, down)
    mixture: Adapter = ((whole.digest, 0.25), (attention.digest, 0.75))
    rows = [of_whole, (), of_attention, of_down, mixture, of_whole]
    oracles = [[(1, whole)], [], [(1, attention)], [(1, down)], [(0.25, whole), (0.75, attention)], [(1, whole)]]
    for most in (512, 6):
        monkeypatch.setattr("metasepia.experts.low_rank.MAX_STACKED_RANKS", most)
        layers.select([()])
        layers.select(rows)
        ours = logits(model, TOKENS)
        for row, parts in enumerate(oracles):
            weights = with_low_rank(plain, parts)
            assert_same_logits(ours[row : row + 1], logits(plain, TOKENS[row : row + 1], weights))
    assert layers.num_bytes == sum(one.num_bytes for one in (whole, attention, down))
    layers.drop(whole.digest)
    with pytest.raises(UnknownName):
        layers.select(rows)


def test_low_rank_adapters_that_do_not_fit_are_refused_in_words(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors)
    good, vectors = lora(llama(), 1, rank=2), expert(factors, 1)
    hold(layers, good, vectors)
    with pytest.raises(InvalidRequest, match="cannot be mixed; choose one kind"):
        layers.select([((good.digest, 0.5), (vectors.digest, 0.5))])
    with pytest.raises(InvalidRequest, match="by one weight each"):
        layers.select([((good.digest, (1.0,) * 6),)])
    other = dataclasses.replace(good, backbone="c" * 64)
    with pytest.raises(CorruptArtefact, match="made for backbone cccccccccccc"):
        layers.put(other.digest, other)
    wrong = dataclasses.replace(good, a={n: a[:, 1:] for n, a in good.a.items()})
    with pytest.raises(CorruptArtefact, match="the layer's is"):
        layers.put(wrong.digest, wrong)
    name = "lm_head.weight"
    head = LoraAdapter(
        backbone=BACKBONE, a={name: np.ones((1, 24), np.float32)}, b={name: np.ones((96, 1), np.float32)}
    )
    with pytest.raises(CorruptArtefact, match="none of the backbone's 14 linear layers"):
        layers.put(head.digest, head)


@pytest.mark.parametrize("kind", ["factors", "truncated", "renormalised", "lora"])
def test_rows_of_a_pinned_adapter_alone_go_through_its_dense_weights(factors: FactorSet, kind: str) -> None:
    model, plain = llama(), llama()
    layers = attach(model, factors, truncated_rank=RANK)
    if kind == "lora":
        pinned: ExpertVectors | LoraAdapter = lora(plain, 1, rank=3, suffixes=("q_proj", "up_proj"))
        weights = with_low_rank(plain, [(1, pinned)])  # pyright: ignore[reportArgumentType]
    else:
        pinned = expert(factors, 1, kind == "renormalised", RANK if kind in ("truncated", "renormalised") else None)
        weights = rebuilt(factors, pinned)
    other = expert(factors, 2)
    of_pinned, of_other = hold(layers, pinned, other)
    rows = [of_pinned, (), of_other, of_pinned, of_other, ()]
    layers.pin(of_pinned)
    layers.select(rows)
    ours = logits(model, TOKENS)
    oracle = [logits(plain, TOKENS, one) for one in (weights, {}, rebuilt(factors, other))]
    assert_same_logits(ours, torch.stack([oracle[i][row] for row, i in enumerate([0, 1, 2, 0, 2, 1])]))
    assert [path for _, path in layers.executed] == [
        "materialised",
        "plain",
        "factors",
        "materialised",
        "factors",
        "plain",
    ]
    layers.unpin()
    layers.select(rows)
    assert_same_logits(logits(model, TOKENS), ours)
    assert "materialised" not in [path for _, path in layers.executed]
    layers.pin(of_pinned)
    layers.drop(pinned.digest)
    with pytest.raises(UnknownName):
        layers.path_of(of_pinned)


def test_the_pin_of_an_adapter_leaves_the_path_of_every_other(factors: FactorSet) -> None:
    layers = attach(llama(), factors, truncated_rank=RANK)
    of_a, of_b, of_c = hold(layers, expert(factors, 1), expert(factors, 2), expert(factors, 3, rank=RANK))
    before = [layers.path_of(one) for one in (of_b, of_c, ())]
    layers.pin(of_a)
    assert [layers.path_of(one) for one in (of_b, of_c, ())] == before
    layers.pin(of_b)
    assert (layers.path_of(of_a), layers.path_of(of_b)) == ("factors", "materialised")


def test_a_forward_selected_before_a_drop_keeps_its_values(factors: FactorSet) -> None:
    model = llama()
    layers = attach(model, factors, truncated_rank=RANK)
    experts = [expert(factors, 1), expert(factors, 2, rank=RANK), lora(llama(), 3, rank=2)]
    rows = hold(layers, *experts)
    layers.select(rows)
    before = logits(model, TOKENS[:3])
    for one in experts:
        layers.drop(one.digest)
    assert torch.equal(logits(model, TOKENS[:3]), before)
    assert layers.num_bytes == 0
    with pytest.raises(UnknownName):
        layers.select(rows)


def test_mixtures_kept_ready_stay_within_their_bytes(factors: FactorSet) -> None:
    one_row = 4 * factors.num_singular
    layers = attach(llama(), factors, max_composed_bytes=3 * one_row)
    adapters = hold(layers, *[expert(factors, seed) for seed in range(5)])
    for adapter in adapters:
        layers.select([adapter])
    assert layers._held._composed_bytes == 3 * one_row
    assert list(layers._held._composed) == adapters[2:]
    layers.drop(adapters[4][0][0])
    assert layers._held._composed_bytes == 2 * one_row


@pytest.mark.parametrize("leading", [False, True])
def test_gradients_reach_the_values_as_through_the_rebuilt_weights(factors: FactorSet, leading: bool) -> None:
    """In the reference's form: z = sigmoid(p), renormalised."""
    model, plain = llama(), llama()
    layers = attach(model, factors, truncated_rank=RANK)
    one = expert(factors, 1, rank=RANK if leading else None)
    p = torch.logit(layers.flat(one, leading=leading) / 3).requires_grad_()
    layers.select_values(torch.sigmoid(p)[None], renormalise=True, leading=leading)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    by_hand = p.detach().clone().requires_grad_()
    z = torch.sigmoid(by_hand)
    spans = layers.leading_spans if leading else layers.spans
    weights = {name: factors[name].scaled(z[span], True) for name, span in spans.items()}
    torch.func.functional_call(plain, weights, kwargs={"input_ids": TOKENS, "labels": TOKENS}).loss.backward()
    assert p.grad is not None and by_hand.grad is not None
    torch.testing.assert_close(p.grad, by_hand.grad, rtol=1e-3, atol=1e-5)


def test_factors_cut_to_their_leading_values_serve_truncated_experts_and_refuse_others(factors: FactorSet) -> None:
    kept = {n: type(f)(f.u[:, :RANK], f.s, f.vh[:RANK]) for n, f in factors.factors.items()}
    model, plain = llama(), llama()
    layers = attach(model, dataclasses.replace(factors, factors=kept, rank=RANK))
    cut, whole = expert(factors, 1, renormalise=True, rank=RANK), expert(factors, 1)
    layers.select(hold(layers, cut) * len(TOKENS))
    assert_same_logits(logits(model, TOKENS), logits(plain, TOKENS, rebuilt(factors, cut)))
    with pytest.raises(NotSupported, match="keeps the factors of the leading 8"):
        layers.put(whole.digest, whole)
    with pytest.raises(NotSupported, match="keeps the factors of the leading 8"):
        layers.select_values(layers.flat(cut)[None])


@pytest.mark.parametrize(
    ("config", "model_class"), [(MistralConfig, MistralForCausalLM), (Qwen2Config, Qwen2ForCausalLM)]
)
def test_other_gated_families_are_fused_too(tmp_path: Path, config: type, model_class: type) -> None:
    torch.manual_seed(0)
    plain = model_class(config(**SMALLER)).eval().requires_grad_(False)
    torch.manual_seed(0)
    model = model_class(config(**SMALLER)).eval().requires_grad_(False)
    factors = factors_of(plain, MLP, BACKBONE, tmp_path, progress=False)
    one = expert(factors, 1)
    layers = attach(model, factors)
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    layers.select([*hold(layers, one), ()])
    ours = logits(model, TOKENS[:2])
    assert_same_logits(ours[:1], logits(plain, TOKENS[:1], rebuilt(factors, one)))
    assert_same_logits(ours[1:], logits(plain, TOKENS[1:2]))


@pytest.mark.parametrize("suffixes", [("mlp.down_proj",), ("q_proj", "o_proj", *MLP)])
def test_any_set_of_layers_may_be_factored(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    model, plain = llama(attention_bias=True, mlp_bias=True), llama(attention_bias=True, mlp_bias=True)
    for module in (model, plain):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
    factors = factors_of(plain, suffixes, BACKBONE, tmp_path, progress=False)
    layers = attach(model, factors, truncated_rank=RANK)
    whole, cut = expert(factors, 1), expert(factors, 2, renormalise=True, rank=RANK)
    of_whole, of_cut = hold(layers, whole, cut)
    layers.select([of_whole, of_cut, ()])
    ours = logits(model, TOKENS[:3])
    for row, weights in enumerate([rebuilt(factors, whole), rebuilt(factors, cut), {}]):
        assert_same_logits(ours[row : row + 1], logits(plain, TOKENS[row : row + 1], weights))
    assert len(layers.executed) == 3


def test_a_model_keeps_the_names_and_values_of_its_weights(factors: FactorSet) -> None:
    model, plain = llama(), llama()
    layers = attach(model, factors)
    layers.select(hold(layers, expert(factors, 1), lora(plain, 2, rank=2)))
    logits(model, TOKENS[:2])
    ours = dict(model.named_parameters())
    assert ours.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours[name], parameter)


def test_weights_that_change_or_are_replaced_for_one_call_are_used_as_they_are(factors: FactorSet) -> None:
    model, plain = llama(), llama()
    attach(model, factors)
    weights = rebuilt(factors, expert(factors, 1))
    base = logits(model, TOKENS)
    assert_same_logits(logits(model, TOKENS, weights), logits(plain, TOKENS, weights))
    assert torch.equal(logits(model, TOKENS), base)
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    assert_same_logits(logits(model, TOKENS), logits(plain, TOKENS, weights))


@pytest.mark.parametrize("sizes", [(25, 15), (20, 12, 8), (40,)])
def test_cut_blocks_give_rows_of_every_path_their_weights_with_one_reduce_a_block(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    plain: Any = llama(mlp_bias=True)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.linspace(-0.5, 0.5, len(parameter)))
    factors = factors_of(plain, MLP, BACKBONE, tmp_path, progress=False)
    whole, cut, pinned = (
        expert(factors, 1),
        expert(factors, 2, renormalise=True, rank=RANK),
        expert(factors, 3, renormalise=True),
    )
    low, lower = lora(plain, 4, rank=3), lora(plain, 5, rank=2, suffixes=("down_proj",))
    experts = (whole, cut, pinned, low, lower)
    adapters: list[Adapter] = [(), *[((one.digest, 1.0),) for one in experts]]
    oracles = [{}, *[rebuilt(factors, one) for one in (whole, cut, pinned)]]
    oracles += [with_low_rank(plain, [(1, one)]) for one in (low, lower)]
    x = torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(5))
    prefix = "model.layers.0.mlp."
    wanted = torch.stack(
        [
            torch.func.functional_call(
                plain.model.layers[0].mlp,
                {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)},
                (x[row : row + 1],),
            )[0]
            for row, weights in enumerate(oracles)
        ]
    )
    reduces, num_reduces, answers = summed_over(len(sizes)), [0] * len(sizes), [x] * len(sizes)

    def run(rank: int) -> None:
        model: Any = llama(mlp_bias=True)
        model.load_state_dict(plain.state_dict())
        shards: dict[str, LayerShard] = {}
        for block, mlp in enumerate([layer.mlp for layer in model.model.layers]):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                kind: Literal["column", "row"] = "row" if leaf == "down_proj" else "column"
                shard = LayerShard(kind, sizes, rank)
                shards[f"model.layers.{block}.mlp.{leaf}.weight"] = shard
                linear = getattr(mlp, leaf)
                linear.weight = nn.Parameter(linear.weight[shard.part_of(2)], False)
                linear.bias = nn.Parameter(linear.bias[shard.part_of(1)[0]], False)

        def reduce(y: Tensor) -> Tensor:
            num_reduces[rank] += 1
            return reduces(rank)(y)

        layers = attach(model, factors, shards, reduce, truncated_rank=RANK)
        hold(layers, *experts)
        layers.pin(adapters[3])
        layers.select(adapters)
        with torch.no_grad():
            answers[rank] = model.model.layers[0].mlp(x)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_reduces == [1] * len(sizes)
    for answer in answers:
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-5)


def test_factors_that_are_cut_otherwise_than_the_layer_are_refused(factors: FactorSet) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    cut = dataclasses.replace(factors, shards={name: LayerShard("column", (20, 20), 1)})
    with pytest.raises(InvalidSettings, match="as its factors are cut"):
        attach(llama(), cut, {name: LayerShard("column", (20, 20), 0)})


def test_in_bf16_an_expert_row_strays_from_its_fp32_oracle_at_most_twice_as_far_as_a_base_row(
    factors: FactorSet,
) -> None:
    """Mean divergence KL(fp32 || bf16) of the next token, over the rows and positions."""
    plain, model = llama(), llama().bfloat16()
    layers = attach(model, factors, truncated_rank=RANK)
    token_ids = torch.randint(0, 96, (32, 16), generator=torch.Generator().manual_seed(2))

    def strays(adapter: Adapter, weights: Weights) -> float:
        layers.select([adapter] * len(token_ids))
        ours = logits(model, token_ids).float().log_softmax(-1)
        oracle = logits(plain, token_ids, weights).log_softmax(-1)
        return float((oracle.exp() * (oracle - ours)).sum(-1).mean())

    base = strays((), {})
    for one in (expert(factors, 1), expert(factors, 2, True), expert(factors, 3, rank=RANK)):
        (adapter,) = hold(layers, one)
        assert 0 < strays(adapter, rebuilt(factors, one)) <= 2 * base


def test_a_matrix_of_several_weights_gives_what_each_gives_however_it_is_computed() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 4))]
    matrix = Matrix(*[lambda one=one: one for one in weights])
    x, other, bias = torch.randn(2, 3, 4), torch.randn(2, 3, 8), torch.randn(8)
    wanted = x @ torch.cat([one.detach() for one in weights]).T
    for packs in (True, False):
        with torch.set_grad_enabled(not packs):
            torch.testing.assert_close(matrix(x, bias=bias), wanted + bias)
            torch.testing.assert_close(matrix.silu(x), nn.functional.silu(wanted))
            torch.testing.assert_close(matrix.times(x, other), wanted * other)
            torch.testing.assert_close(matrix.times(x, other[:, :1]), wanted * other[:, :1])
            torch.testing.assert_close(matrix.plus(x, other), wanted + other)
    owning = Matrix.owning(*[one.detach() for one in weights])
    torch.testing.assert_close(owning(x), wanted)
