"""The one-process reference: itself the oracle of others, so checked against transformers and closed forms only."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from metasepia.backbone import ReferenceBackbone
from metasepia.errors import DeadlineExceeded, InvalidRequest, UnknownName
from metasepia.experts.factors import factors_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.mixing import base_of
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import HiddenStatesWanted, Row, Sampling, TokenChunk

DIGEST = "b" * 64


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> ReferenceBackbone:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval().requires_grad_(False)
    factors = factors_of(model, ("mlp.up_proj",), DIGEST, tmp_path_factory.mktemp("home"), progress=False)
    return ReferenceBackbone(model, DIGEST, factors=factors)


def expert(reference: ReferenceBackbone, value: float) -> ExpertVectors:
    assert reference.factors is not None
    z = {name: np.full(len(f.s), value, np.float32) for name, f in reference.factors.factors.items()}
    return ExpertVectors(backbone=DIGEST, factors=reference.factors.digest, z=z)


def row(**fields: Any) -> Row:
    defaults: dict[str, Any] = {"request_id": "r", "backbone": DIGEST, "token_ids": tuple(range(20, 35))}
    return Row(**defaults | fields)


def chunks_of(reference: ReferenceBackbone, one: Row) -> list[TokenChunk]:
    async def collect() -> list[TokenChunk]:
        return [chunk async for chunk in reference.generate(one)]

    return asyncio.run(collect())


def tokens_of(chunks: list[TokenChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def test_expert_of_ones_gives_the_base_logits(reference: ReferenceBackbone) -> None:
    ones = expert(reference, 1.0)
    reference.put_expert(ones)
    base, scaled = reference.logits((5, 6, 7)), reference.logits((5, 6, 7), ((ones.digest, 1.0),))
    torch.testing.assert_close(scaled, base, atol=1e-4, rtol=0)


def test_expert_of_twos_doubles_the_weight_and_leaves_the_model_as_it_was(reference: ReferenceBackbone) -> None:
    twos, ones = expert(reference, 2.0), expert(reference, 1.0)
    reference.put_expert(twos)
    reference.put_expert(ones)
    before = reference.logits((5, 6, 7))
    for adapter, scale in ((((twos.digest, 1.0),), 2.0), (((ones.digest, 0.5), (twos.digest, 0.5)), 1.5)):
        for name, weight in reference.weights(adapter).items():
            torch.testing.assert_close(weight, scale * reference.model.get_parameter(name), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(reference.logits((5, 6, 7), adapter), before, atol=1e-2)
    assert torch.equal(reference.logits((5, 6, 7)), before)


def test_weights_by_layer_and_short_vectors_and_the_base_in_a_mixture_are_rebuilt(reference: ReferenceBackbone) -> None:
    factors = reference.factors
    assert factors is not None
    names = tuple(factors.index.lengths)
    short = ExpertVectors(
        backbone=DIGEST, factors=factors.digest, z={name: np.full(5, 3.0, np.float32) for name in names}
    )
    reference.put_expert(short)
    base = base_of(short).digest
    by_layer = tuple(0.25 * i for i in range(len(names)))
    rest = tuple(1 - weight for weight in by_layer)
    rebuilt = reference.weights(((short.digest, by_layer), (base, rest)))
    for name, weight in zip(names, by_layer, strict=True):
        one = factors[name]
        leading = (one.u[:, :5] * one.s[:5]) @ one.vh[:5]
        want = reference.model.get_parameter(name) + 2 * weight * leading
        torch.testing.assert_close(rebuilt[name], want, atol=1e-4, rtol=1e-4)


def test_low_rank_adapters_are_added_by_their_weights_and_not_mixed_with_vectors(reference: ReferenceBackbone) -> None:
    name, draw = "model.layers.0.self_attn.o_proj.weight", np.random.default_rng(0)
    weight = reference.model.get_parameter(name)
    pairs = [
        (
            draw.normal(size=(2, weight.shape[1])).astype(np.float32),
            draw.normal(size=(len(weight), 2)).astype(np.float32),
        )
        for _ in range(2)
    ]
    adapters = [LoraAdapter(backbone=DIGEST, a={name: a}, b={name: b}) for a, b in pairs]
    vectors = expert(reference, 2.0)
    for one in (*adapters, vectors):
        reference.put_expert(one)
    first, second = (one.digest for one in adapters)
    want = weight + sum(share * torch.tensor(b @ a) for share, (a, b) in zip((0.25, 0.75), pairs, strict=True))
    rebuilt = reference.weights(((first, 0.25), (second, 0.75)))
    torch.testing.assert_close(rebuilt[name], want)
    with pytest.raises(InvalidRequest, match="choose one kind"):
        reference.weights(((first, 0.5), (vectors.digest, 0.5)))


def test_greedy_tokens_are_those_of_transformers(reference: ReferenceBackbone) -> None:
    chunks = chunks_of(reference, row(sampling=Sampling(temperature=0.0, max_tokens=8)))
    ids = torch.tensor([row().token_ids])
    generated: Any = reference.model.generate(  # pyright: ignore[reportCallIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    logits = reference.logits((*row().token_ids, *tokens_of(chunks)))
    gaps = logits.topk(2).values.diff().abs()[len(ids[0]) - 1 : -1]
    assert gaps.min() > 1e-3  # else equality would be luck
    assert tokens_of(chunks) == tuple(generated[0, ids.shape[1] :].tolist())
    assert chunks[-1].finish == "length" and chunks[-1].executed is not None
    assert chunks[-1].executed.path == "plain"


def test_a_sampled_row_resumed_goes_on_as_if_unbroken(reference: ReferenceBackbone) -> None:
    one = row(seed=4, sampling=Sampling(temperature=1.2, top_p=0.9, max_tokens=8))
    whole = tokens_of(chunks_of(reference, one))
    assert tokens_of(chunks_of(reference, replace(one, sent=whole[:3]))) == whole[3:]
    stopping = replace(one.sampling, stop_token_ids=(whole[5],))
    stopped = chunks_of(reference, replace(one, sampling=stopping))
    assert tokens_of(stopped) == whole[: whole.index(whole[5])] and stopped[-1].finish == "stop"


def test_scores_sum_to_the_loss_of_transformers(reference: ReferenceBackbone) -> None:
    scores = asyncio.run(reference.score(row(want="logprobs")))
    ids = torch.tensor([row().token_ids])
    loss = reference.model(ids, labels=ids).loss
    assert -scores.logprobs.mean() == pytest.approx(loss.item(), rel=1e-5)
    tail = asyncio.run(reference.score(row(want="logprobs", score_from=10)))
    np.testing.assert_array_equal(tail.logprobs, scores.logprobs[9:])


def test_hidden_states_pool_over_the_tokens(reference: ReferenceBackbone) -> None:
    def of(pooling: Any) -> np.ndarray:
        wanted = HiddenStatesWanted(layers=(0, -1), pooling=pooling)
        return asyncio.run(reference.hidden_states(row(want="hidden_states", hidden=wanted))).states

    every = of("none")
    np.testing.assert_allclose(of("mean"), every.mean(1), atol=1e-6)
    np.testing.assert_array_equal(of("last"), every[:, -1])
    embedding = reference.model.get_parameter("model.embed_tokens.weight").detach().numpy()
    np.testing.assert_array_equal(every[0], embedding[list(row().token_ids)])


def test_what_it_cannot_answer_is_refused(reference: ReferenceBackbone) -> None:
    with pytest.raises(UnknownName, match="no backbone named"):
        chunks_of(reference, row(backbone="c" * 64))
    with pytest.raises(UnknownName, match="no expert named"):
        reference.logits((1, 2), (("d" * 64, 1.0),))
    with pytest.raises(DeadlineExceeded):
        chunks_of(reference, row(deadline_unix_s=1.0))
