"""Which model families DeepSpeed may cut over several ranks, and into how many. No torch: a gang's owner asks first.

A family is here when a test compares its sharded logits with the whole model's. DeepSpeed guesses policies for others
and some guesses are silently wrong, so at tp_size above 1 they are refused by name; at tp_size 1 any causal model runs
whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metasepia.errors import InvalidSettings, NotSupported


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the blocks of one `model_type` are cut: `row_parallel` by inputs, every other linear layer by outputs."""

    module: str
    """Module of transformers that holds the block."""
    block: str
    row_parallel: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        module="transformers.models.llama.modeling_llama",
        block="LlamaDecoderLayer",
        row_parallel=("self_attn.o_proj", "mlp.down_proj"),
    ),
    "mistral": Family(
        module="transformers.models.mistral.modeling_mistral",
        block="MistralDecoderLayer",
        row_parallel=("self_attn.o_proj", "mlp.down_proj"),
    ),
    "qwen2": Family(
        module="transformers.models.qwen2.modeling_qwen2",
        block="Qwen2DecoderLayer",
        row_parallel=("self_attn.o_proj", "mlp.down_proj"),
    ),
    "gpt_neox": Family(
        module="transformers.models.gpt_neox.modeling_gpt_neox",
        block="GPTNeoXLayer",
        row_parallel=("attention.dense", "mlp.dense_4h_to_h"),
    ),
    "bloom": Family(
        module="transformers.models.bloom.modeling_bloom",
        block="BloomBlock",
        row_parallel=("self_attention.dense", "mlp.dense_4h_to_h"),
    ),
}


def num_kv_heads(config: Mapping[str, Any]) -> int:
    """Key/value heads of a `config.json`: what attention is cut by (a rank holds whole heads)."""
    for key in ("num_key_value_heads", "num_attention_heads", "n_head"):
        if config.get(key) is not None:
            return int(config[key])
    raise NotSupported(
        f"tensor parallelism for model_type {config.get('model_type')!r} without a head count in its config.json",
        "use tp_size 1",
    )


def check(config: Mapping[str, Any], tp_size: int) -> None:
    """Raises NotSupported for a family without a tested policy, InvalidSettings for more ranks than key/value heads.

    `config` is a model's `config.json`. Heads need not divide evenly: 3 heads over 2 ranks become 2 and 1.
    """
    if tp_size == 1:
        return
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise NotSupported(
            f"tp_size {tp_size} for model_type {model_type!r}",
            f"it runs at tp_size 1; families that are cut: {', '.join(sorted(FAMILIES))}",
        )
    heads = num_kv_heads(config)
    if tp_size > heads:
        raise InvalidSettings(
            "backbones.tp_size", tp_size, f"from 1 to {heads}, the key/value heads of this {model_type} model"
        )
    if model_type == "bloom" and int(config.get("pretraining_tp", 1)) > 1 and config.get("slow_but_exact"):
        raise NotSupported("tp_size above 1 for a BLOOM model with slow_but_exact", "use tp_size 1")


def grain(config: Mapping[str, Any], tp_size: int) -> int:
    """Multiple that DeepSpeed cuts feed-forward and head sizes by: 64 where every rank then gets a share, else 1."""
    hidden = int(config.get("hidden_size") or config.get("n_embed") or 0)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    return 64 if min(hidden, inner) >= 64 * tp_size else 1
