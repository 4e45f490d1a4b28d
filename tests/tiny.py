"""Tiny random causal models of each family, in memory and saved as Hugging Face directories, and what goes with them.

Weights are wide enough (`initializer_range`) for logits to differ clearly; sizes are odd on purpose where the family
allows it (three key/value heads, a sliding window shorter than the prompts).
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from metasepia.models.prepared import PreparedBackbone

FAMILIES = ("llama", "mistral", "qwen2", "gpt_neox", "bloom")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 288
"""256 bytes, the special tokens, and some logits that no token has."""
WINDOW = 256
BLOCKS = {
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 96,
    "max_position_embeddings": WINDOW,
}
SMALLER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
"""Of a model in memory."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config_of(family: str, **overrides: Any) -> PreTrainedConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": None,
        "tie_word_embeddings": family in ("llama", "bloom"),
    }
    fields |= {
        "llama": {**BLOCKS, "num_key_value_heads": 3},
        "mistral": {**BLOCKS, "num_key_value_heads": 2, "sliding_window": 12},
        "qwen2": {**BLOCKS, "num_key_value_heads": 2},
        "gpt_neox": {**BLOCKS, "rotary_pct": 0.25},
        "bloom": {"n_layer": 2, "n_head": 6, "seq_length": WINDOW},
    }[family]
    return AutoConfig.for_model(family, **fields | overrides)


def prepared(digest: str = "b" * 64) -> PreparedBackbone:
    """The card of a family's tiny model, of which nothing is on disk."""
    return PreparedBackbone(
        digest=digest,
        path="",
        tokenizer_dir="",
        source="tiny",
        window=WINDOW,
        eos_token_ids=(258,),
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        num_layers=2,
        model_type="llama",
    )


def llama(**changes: Any) -> LlamaForCausalLM:
    """Two frozen blocks in memory, smaller than those on disk; the same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALLER | changes)).eval().requires_grad_(False)


def summed_over(num_ranks: int) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """An all-reduce between threads that stand for ranks."""
    barrier, parts = threading.Barrier(num_ranks, timeout=20), [torch.empty(0)] * num_ranks

    def of_rank(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(x: Tensor) -> Tensor:
            assert x.is_contiguous()
            parts[rank] = x
            barrier.wait()
            total = torch.stack(parts).sum(0)
            barrier.wait()
            return total

        return reduce

    return of_rank


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special ones, and a chat template."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(family: str, directory: Path, *, weights_seed: int = 0, **overrides: Any) -> Path:
    """Writes config, random weights (safetensors) and tokenizer into `directory` and returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(weights_seed)
        model = AutoModelForCausalLM.from_config(config_of(family, **overrides))
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
