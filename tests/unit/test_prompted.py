"""Shared prefixes against the slow way: every prompt encoded whole, one at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from metasepia.errors import InvalidRequest, NotSupported
from metasepia.reasoning.prompted import PrefixCache, PromptedEncoder, SharedPrefixReader
from metasepia.reasoning.protocols import LOO, VANILLA, Demonstrations, Prompt, PromptTokenizer
from tests import tiny

Checkpoint = Callable[[str], Path]
TEXTS = ["fine", "dull and long", "so so", "a gem", "no"]
LABELS = ["good", "bad", "bad", "good", "bad"]
QUERIES = ["what a film", "meh", "what a film", "x"]


def model_of(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval().requires_grad_(False)


def slowly(model: PreTrainedModel, prompt: Prompt) -> np.ndarray:
    output = model(torch.tensor([prompt.token_ids]), use_cache=False, output_hidden_states=True)
    return torch.nn.functional.normalize(
        output.hidden_states[-1][0, prompt.span[0] : prompt.span[1]].mean(0), dim=-1
    ).numpy()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("protocol", [VANILLA, LOO])
def test_vectors_are_those_of_whole_prompts(family: str, protocol: str, tiny_checkpoint: Checkpoint) -> None:
    model = model_of(tiny_checkpoint(family))
    encoder = PromptedEncoder(model, tiny.tokenizer(), tiny.WINDOW, pack_tokens=64)
    examples = encoder.examples(protocol, TEXTS, LABELS, seed=1)
    shown = Demonstrations(PromptTokenizer(tiny.tokenizer().backend_tokenizer, tiny.WINDOW), TEXTS, LABELS, seed=1)
    prompts = [shown.vanilla(i) if protocol == VANILLA else shown.left_out(i) for i in range(len(TEXTS))]
    want = np.stack([slowly(model, prompt) for prompt in prompts])
    np.testing.assert_allclose(examples.vectors, want, atol=1e-4)
    want = np.stack([slowly(model, shown.query(text, "x")) for text in QUERIES])
    np.testing.assert_allclose(examples.embed(QUERIES), want, atol=1e-4)
    assert np.abs(want[0] - want[1]).max() > 0.01  # or any vector would do
    # BLOOM's ALiBi counts columns of the cache, so its prompts cannot be packed.
    assert encoder._reader.packs == (family != "bloom")


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_way_of_reading_gives_the_same_states(
    packs: bool, implementation: str, tiny_checkpoint: Checkpoint
) -> None:
    model = model_of(tiny_checkpoint("mistral"), attn_implementation=implementation)
    reader = SharedPrefixReader(model, pack_tokens=48, packs=packs)
    draw = np.random.default_rng(0)
    ids = tuple(draw.integers(0, 256, 40).tolist())
    prefix, states = reader.read(ids)
    want = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(states, want, atol=1e-4, rtol=1e-4)
    prompts = []
    for shared, own in [(0, 1), (0, 90), (7, 20), (7, 3), (7, 5), (40, 2), (40, 30), (39, 4)]:
        tail = tuple(draw.integers(0, 256, own).tolist())
        prompts.append(Prompt((*ids[:shared], *tail), (shared + own // 2, shared + own), shared))
    got = torch.nn.functional.normalize(reader.pooled(prompts, prefix), dim=-1).numpy()
    np.testing.assert_allclose(got, np.stack([slowly(model, one) for one in prompts]), atol=1e-4)


def test_a_query_is_the_same_alone_and_in_company(tiny_checkpoint: Checkpoint) -> None:
    encoder = PromptedEncoder(model_of(tiny_checkpoint("llama")), tiny.tokenizer(), tiny.WINDOW)
    examples = encoder.examples(LOO, TEXTS, LABELS)
    together = examples.embed(QUERIES)
    np.testing.assert_allclose(together, np.concatenate([examples.embed([one]) for one in QUERIES]), atol=1e-5)
    np.testing.assert_array_equal(together[0], together[2])


def test_leaving_out_costs_half_and_a_query_its_own_tokens(tiny_checkpoint: Checkpoint) -> None:
    encoder = PromptedEncoder(model_of(tiny_checkpoint("llama")), tiny.tokenizer(), 4096)
    k, length = 8, len("Sentence: abcd\nLabel: 0\n")
    head = len("Sentence: abcd")
    examples = encoder.examples(LOO, [f"abc{i}" for i in range(k)], [str(i % 2) for i in range(k)])
    assert examples.work.asked == k * ((k - 1) * length + head)
    assert examples.work.computed == k * length + (k * (k - 1) // 2) * length + k * head
    before = examples.work
    examples.embed(["efgh", "ijkl"])
    assert examples.work.computed - before.computed == 2 * head
    assert examples.work.asked - before.asked == 2 * (k * length + head)
    assert examples.work.hit_ratio == 1 - examples.work.computed / examples.work.asked


def test_stream_reads_each_text_alone(tiny_checkpoint: Checkpoint) -> None:
    model = model_of(tiny_checkpoint("qwen2"))
    got = PromptedEncoder(model, tiny.tokenizer(), tiny.WINDOW).stream(QUERIES)
    for text, vector in zip(QUERIES, got, strict=True):
        ids = tuple(text.encode())
        np.testing.assert_allclose(vector, slowly(model, Prompt(_ids(text), (0, len(ids)), 0)), atol=1e-4)


def test_no_queries_give_no_vectors(tiny_checkpoint: Checkpoint) -> None:
    encoder = PromptedEncoder(model_of(tiny_checkpoint("llama")), tiny.tokenizer(), tiny.WINDOW)
    assert encoder.examples(VANILLA, TEXTS, LABELS).embed([]).shape == (0, 48)


def test_a_model_whose_past_is_a_state_and_an_unknown_protocol_are_refused(tiny_checkpoint: Checkpoint) -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(NotSupported, match="MambaForCausalLM"):
        SharedPrefixReader(MambaForCausalLM(config))
    encoder = PromptedEncoder(model_of(tiny_checkpoint("llama")), tiny.tokenizer(), tiny.WINDOW)
    with pytest.raises(InvalidRequest, match="'vanilla' or 'loo', got 'stream'"):
        encoder.examples("stream", TEXTS, LABELS)


def test_a_prefix_is_not_changed_by_what_is_read_after_it(tiny_checkpoint: Checkpoint) -> None:
    reader = SharedPrefixReader(model_of(tiny_checkpoint("llama")), pack_tokens=8)
    ids = tuple(range(20))
    prefix, _ = reader.read(ids)
    prompt = Prompt((*ids[:10], *range(60, 90)), (39, 40), 10)
    before = [keys.clone() for keys in prefix._keys]
    first = reader.pooled([prompt], prefix)
    assert all(torch.equal(was, now) for was, now in zip(before, prefix._keys, strict=True))
    assert isinstance(prefix, PrefixCache) and prefix.get_seq_length() == 20
    torch.testing.assert_close(reader.pooled([prompt], prefix), first)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(tiny.tokenizer().backend_tokenizer.encode(text).ids)
