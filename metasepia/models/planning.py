"""What a rank of a gang will hold, before there is one: from a config.json and the settings, without torch.

Weights, factors, keys and values are counted tensor by tensor as `families` cuts them, so they are exact;
working memory and what a process needs for itself are bounds and are said to be.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metasepia.errors import MetasepiaError, NotSupported
from metasepia.models import families

GIB = 2**30
CACHE_SLACK = 1.875
"""The cache grows by half its rows and a quarter of its columns at a time (`RowCache.reserve`)."""
COMPOSED_BYTES = 256 << 20
"""Mixtures kept ready (`metasepia.experts.svf.MAX_COMPOSED_BYTES`)."""
PROCESS_BYTES = {"cpu": int(0.6 * GIB), "cuda": int(1.5 * GIB)}
"""What a rank takes beside all tensors: libraries on a CPU (`benchmarks.loading` measures it); on a GPU CUDA's context,
kernels, NCCL's buffers and the allocator's gaps, an estimate."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Need:
    """The settings that memory depends on; see `cluster.settings.BackboneSettings`."""

    device: str
    dtype: str
    tp_size: int
    expert_layers: tuple[str, ...]
    expert_rank: int
    max_rows: int
    max_batch_tokens: int
    max_prefix_tokens: int
    max_expert_bytes: int
    pinned: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    what: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of the fullest rank."""

    parts: tuple[Part, ...]
    largest: Part
    """The largest tensor. While weights are read a rank holds no more than what is read, and a buffer of 8 MiB."""
    weights_on_disk: int
    """In the dtype that runs."""
    factors_on_disk: int
    factoring: Part
    """Of the process that makes the factors, once."""

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def tensors_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model by name, from its config.json; tied ones once. NotSupported for other families."""
    kind = str(config.get("model_type"))
    if kind not in families.FAMILIES:
        known = ", ".join(sorted(families.FAMILIES))
        raise NotSupported(f"a memory plan for model_type {kind!r}", f"families that are planned: {known}")
    hidden = int(config.get("hidden_size") or config["n_embed"])
    layers = int(config.get("num_hidden_layers") or config["n_layer"])
    vocab = int(config["vocab_size"])
    block = {"gpt_neox": _gpt_neox_block, "bloom": _bloom_block}.get(kind, _llama_block)(config, hidden)
    prefix, embedding, tied = {
        "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in", False),
        "bloom": ("transformer.h", "transformer.word_embeddings", True),
    }.get(kind, ("model.layers", "model.embed_tokens", False))
    found: dict[str, tuple[int, ...]] = {f"{embedding}.weight": (vocab, hidden)}
    for layer in range(layers):
        found |= {f"{prefix}.{layer}.{name}": shape for name, shape in block.items()}
    ends = {
        "gpt_neox": _norm("gpt_neox.final_layer_norm", hidden),
        "bloom": _norm("transformer.word_embeddings_layernorm", hidden) | _norm("transformer.ln_f", hidden),
    }
    found |= ends.get(kind, {"model.norm.weight": (hidden,)})
    if not config.get("tie_word_embeddings", tied):
        found["lm_head.weight"] = (vocab, hidden)
    return found


def plan(config: Mapping[str, Any], need: Need) -> Plan:
    """Raises NotSupported or InvalidSettings for what cannot be cut into `tp_size`."""
    families.check(config, need.tp_size)
    tensors, item, tp = tensors_of(config), ITEM_BYTES[need.dtype], need.tp_size
    held = {name: _share(config, name, shape, tp) for name, shape in tensors.items()}
    if tp > 1 and "lm_head.weight" not in tensors:  # DeepSpeed unties a head that it cuts
        vocab, hidden = next(iter(tensors.values()))
        held["lm_head.weight"] = _share(config, "lm_head.weight", (vocab, hidden), tp)
    weights = {name: math.prod(shape) * item for name, shape in held.items()}
    factors, kept, factors_on_disk, factoring = 0, 0, 0, 0
    layers = [n for n in tensors if any(f".{n}".endswith(f".{suffix}.weight") for suffix in need.expert_layers)]
    for name in layers:
        rows, columns = tensors[name]
        singular = min(rows, columns)
        rank = min(need.expert_rank or singular, singular)
        kept = max(kept, rank)
        factors += sum(held[name]) * rank * item
        factors_on_disk += 4 * ((rows + columns) * rank + singular)
        factoring = max(factoring, 8 * (2 * rows * columns + singular * (2 * rows + 2 * columns)))
    packed = sum(weights[name] for name in held if _is_linear(name, held[name])) + factors
    heads = families.num_kv_heads(config)
    token = 2 * _num_layers(config) * -(-heads // tp) * _head_dim(config) * item
    inner = max(shape[0] for shape in held.values() if len(shape) == 2)
    cache = int((need.max_batch_tokens * CACHE_SLACK + need.max_prefix_tokens) * token)
    window = min(need.max_batch_tokens, int(config.get("max_position_embeddings") or need.max_batch_tokens))
    blocks = max((max(shape) for name, shape in held.items() if ".mlp." in name), default=inner)
    hidden = int(config.get("hidden_size") or config["n_embed"])
    working = window * (4 * hidden + 3 * blocks) * item + 2 * need.max_rows * int(config["vocab_size"]) * 4
    how = "all singular vectors" if not need.expert_rank else f"the leading {kept} singular vectors"
    how += f" of {len(layers)} layers"
    parts = [
        Part(what="weights", num_bytes=sum(weights.values()), note=_cut_note(tp)),
        Part(what="factors", num_bytes=factors, note=how if layers else "no expert layers"),
        Part(
            what="keys and values",
            num_bytes=cache,
            note=f"{need.max_batch_tokens} tokens of {token / 1024:g} KiB, room to grow, {need.max_prefix_tokens} kept",
        ),
        Part(
            what="experts",
            num_bytes=(need.max_expert_bytes + COMPOSED_BYTES) if layers else 0,
            note="vectors held and mixtures kept ready, at most" if layers else "",
        ),
        Part(
            what="working memory",
            num_bytes=working,
            note=f"a prompt of {window} tokens, {need.max_rows} rows of logits",
        ),
        Part(what="the process", num_bytes=PROCESS_BYTES[need.device], note="libraries, an estimate"),
    ]
    if need.pinned:
        pinned = sum(weights[name] for name in layers)
        parts.insert(2, Part(what="pinned weights", num_bytes=pinned, note="of the expert that `pinned` names"))
    if need.device == "cpu":
        parts.insert(2, Part(what="packed copies", num_bytes=packed, note="linear layers and factors, for oneDNN"))
    largest = max(weights, key=lambda name: weights[name])
    return Plan(
        parts=tuple(parts),
        largest=Part(what=largest, num_bytes=weights[largest]),
        weights_on_disk=sum(math.prod(shape) for shape in tensors.values()) * item,
        factors_on_disk=factors_on_disk,
        factoring=Part(what="factoring", num_bytes=factoring, note="one layer in double precision"),
    )


def remedies(config: Mapping[str, Any], need: Need, memory_bytes: int) -> list[str]:
    """Changes of one setting that would each be enough, the mildest of each; where none is, of two; perhaps none."""

    def fits(**changed: Any) -> bool:
        try:
            return plan(config, dataclasses.replace(need, **changed)).num_bytes <= memory_bytes
        except MetasepiaError:  # cannot be cut so
            return False

    found = []
    if need.dtype == "float32" and fits(dtype="bfloat16"):
        found.append('dtype = "bfloat16"')
    heads = families.num_kv_heads(config)
    for name, values in (
        ("tp_size", [size for size in range(need.tp_size + 1, 65) if heads % size == 0]),
        ("expert_rank", [2**power for power in range(12, 3, -1) if 2**power < (need.expert_rank or 2**13)]),
        ("max_batch_tokens", [need.max_batch_tokens >> halved for halved in range(1, 12)]),
    ):
        enough = [value for value in values if fits(**{name: value})]
        if enough and (name != "max_batch_tokens" or enough[0] >= 1024):
            found.append(f"{name} = {enough[0]}")
    for tokens in (need.max_batch_tokens >> halved for halved in range(8)):
        if not found and need.expert_layers and fits(expert_rank=64, max_batch_tokens=tokens):
            found.append(f"expert_rank = 64 with max_batch_tokens = {tokens}")
    return found


def _llama_block(config: Mapping[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    inner, dim = int(config["intermediate_size"]), _head_dim(config)
    queries, keys = dim * int(config["num_attention_heads"]), dim * families.num_kv_heads(config)
    found: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    biased = [name for name in found if "self_attn" in name] if config.get("attention_bias") else []
    if config["model_type"] == "qwen2":
        biased = [f"self_attn.{one}_proj.weight" for one in "qkv"]
    biased += [name for name in found if "mlp" in name] if config.get("mlp_bias") else []
    found |= {name.replace("weight", "bias"): found[name][:1] for name in biased}
    return found | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def _gpt_neox_block(config: Mapping[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    inner = int(config["intermediate_size"])
    found = _linear("mlp.dense_h_to_4h", inner, hidden) | _linear("mlp.dense_4h_to_h", hidden, inner)
    attention = _linear("attention.query_key_value", 3 * hidden, hidden) | _linear("attention.dense", hidden, hidden)
    if not config.get("attention_bias", True):
        attention = {name: shape for name, shape in attention.items() if name.endswith("weight")}
    return attention | found | _norm("input_layernorm", hidden) | _norm("post_attention_layernorm", hidden)


def _bloom_block(config: Mapping[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    return (
        _linear("self_attention.query_key_value", 3 * hidden, hidden)
        | _linear("self_attention.dense", hidden, hidden)
        | _linear("mlp.dense_h_to_4h", 4 * hidden, hidden)
        | _linear("mlp.dense_4h_to_h", hidden, 4 * hidden)
        | _norm("input_layernorm", hidden)
        | _norm("post_attention_layernorm", hidden)
    )


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, side: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (side,), f"{name}.bias": (side,)}


def _share(config: Mapping[str, Any], name: str, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
    """The largest share that a rank has of a tensor."""
    row = families.is_row_parallel(str(config["model_type"]), name)
    if tp_size == 1 or row is None:
        return shape
    side = 1 if row and len(shape) > 1 else 0
    return (*shape[:side], max(families.cut(config, name, shape[side], tp_size)), *shape[side + 1 :])


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed" not in name


def _cut_note(tp_size: int) -> str:
    return "whole" if tp_size == 1 else f"1/{tp_size} of every layer and of the head; embeddings and norms whole"


def _num_layers(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or config["n_layer"])


def _head_dim(config: Mapping[str, Any]) -> int:
    heads = int(config.get("num_attention_heads") or config["n_head"])
    return int(config.get("head_dim") or int(config.get("hidden_size") or config["n_embed"]) // heads)
