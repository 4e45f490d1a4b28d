"""Which model families DeepSpeed may cut over several ranks, and into how many. No torch: a gang's owner asks first.

A family is here when a test compares its sharded logits with the whole model's. DeepSpeed guesses policies for others
and some guesses are silently wrong, so at tp_size above 1 they are refused by name; at tp_size 1 any causal model runs
whole. `cut` is the rule by which DeepSpeed cuts a layer, for those who plan before there is a process.
"""

import re
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


def is_row_parallel(model_type: str, name: str) -> bool | None:
    """Whether the tensor of this parameter name is cut by inputs (True), by outputs (False), or kept whole (None)."""
    module, _, leaf = name.rpartition(".")
    if module.endswith("lm_head"):
        return True
    family = FAMILIES[model_type]
    if not re.search(r"\.\d+\.", f".{module}.") or "norm" in module.rpartition(".")[2]:
        return None  # outside the blocks, or a block's norm
    row = module.endswith(family.row_parallel)
    return None if row and leaf == "bias" else row


def cut(config: Mapping[str, Any], name: str, side: int, tp_size: int) -> tuple[int, ...]:
    """Sizes by rank of a layer whose cut side is `side` long: whole key/value heads, or multiples of the grain."""
    module = name.rpartition(".")[0]
    heads = num_kv_heads(config)
    if side % heads == 0 and "mlp" not in module and not module.endswith("lm_head"):
        return tuple(side * (heads // tp_size + (rank < heads % tp_size)) // heads for rank in range(tp_size))
    multiple = grain(config, tp_size)
    if side < multiple:
        return tuple(side // tp_size + (rank < side % tp_size) for rank in range(tp_size))
    grains, rest = divmod(side, multiple)
    sizes = [(grains // tp_size + (rank < grains % tp_size)) * multiple for rank in range(tp_size)]
    return (*sizes[:-1], sizes[-1] + rest)


def grain(config: Mapping[str, Any], tp_size: int) -> int:
    """Multiple that DeepSpeed cuts feed-forward and head sizes by: 64 where every rank then gets a share, else 1."""
    hidden = int(config.get("hidden_size") or config.get("n_embed") or 0)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    return 64 if min(hidden, inner) >= 64 * tp_size else 1
