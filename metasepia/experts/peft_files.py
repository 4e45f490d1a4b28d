"""LoRA directories as Hugging Face PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

Read into `LoraAdapter`, with everything refused in words that our sum W + B A would not be: a PEFT library of the same
version computes the same logits from the same directory (tested), or the directory is not taken. numpy only; PEFT is
not imported.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from metasepia.errors import CorruptArtefact, NotSupported
from metasepia.experts.lora import MAX_LORA_BYTES, LoraAdapter, Shapes, check_pairs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 4096

_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>[\w.-]+?)\.(?P<part>lora_\w+)(?P<end>(?:\.\w+)?)")
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.|\\d\+?)+")
"""What a key of rank_pattern may be: a module's name, or a regular expression too simple to take long."""
_HARMLESS = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "library_name", "library_version", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("eva_config", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
)
"""Fields that say how the adapter was made or which layers it has, and those read here."""
_KINDS_OF_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base weights alone; the others (pissa, olora, loftq, ...) change them."""
_WHY: dict[str, tuple[str, str]] = {
    "use_dora": ("a DoRA adapter", "train with use_dora=False, or serve the merged model as a backbone"),
    "bias": ("an adapter with biases", 'train with bias="none"'),
    "lora_bias": ("an adapter with biases", "train with lora_bias=False"),
    "modules_to_save": (
        "an adapter with whole modules of its own (modules_to_save)",
        "train without them, or serve the merged model as a backbone",
    ),
    "trainable_token_indices": ("an adapter with embeddings of its own", "train without trainable_token_indices"),
    "fan_in_fan_out": (
        "an adapter on transposed weights (fan_in_fan_out, Conv1D)",
        "use a model whose layers are torch.nn.Linear",
    ),
    "target_parameters": ("an adapter on bare parameters", "use target_modules"),
    "layer_replication": ("an adapter that repeats layers", "serve the merged model as a backbone"),
    "alora_invocation_tokens": ("an adapter that begins at invocation tokens (aLoRA)", "train a plain LoRA"),
}
_BYTES: dict[str, Callable[[bytes], np.ndarray]] = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2"),
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32),
}


def read_peft(config: bytes, weights: bytes, backbone: str, shapes: Shapes, name: str = "the adapter") -> LoraAdapter:
    """The adapter of a PEFT directory's two files, checked against the linear layers of the backbone it is for.

    `backbone` is that one's digest. Raises NotSupported for what is served in no way (DoRA, biases, whole modules,
    embeddings, transposed weights, kinds other than LoRA, ...), CorruptArtefact for what is broken or does not fit.
    """
    tree = _config(config, name)
    tensors = _tensors(weights, name)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        module, part = _place(key, name)
        pairs.setdefault(module, {})[part] = array
    a: dict[str, np.ndarray] = {}
    b: dict[str, np.ndarray] = {}
    ranks, alphas = (_Patterns(tree, field, name) for field in ("rank_pattern", "alpha_pattern"))
    for module, pair in sorted(pairs.items()):
        if pair.keys() != {"lora_A", "lora_B"}:
            raise CorruptArtefact(name, f"{module} has not both of lora_A and lora_B")
        rank = ranks.of(module, tree["r"])
        if pair["lora_A"].ndim != 2 or len(pair["lora_A"]) != rank:
            raise CorruptArtefact(
                name, f"{module}: lora_A has shape {list(pair['lora_A'].shape)} and {CONFIG} says rank {rank:g}"
            )
        scale = alphas.of(module, tree["lora_alpha"]) / (math.sqrt(rank) if tree["use_rslora"] else rank)
        layer = f"{module}.weight"
        a[layer] = pair["lora_A"]
        with np.errstate(over="ignore"):  # an infinity is found by the check
            b[layer] = (pair["lora_B"] * np.float32(scale)).astype(np.float32)
    check_pairs(a, b, name)
    made = LoraAdapter(backbone=backbone, a=a, b=b)
    made.check_fits(shapes, name)
    return made


def write_peft(adapter: LoraAdapter, base_model: str) -> tuple[bytes, bytes]:
    """The two files, (config, weights), for PEFT and vLLM: alpha is the rank, so that the scale is 1.

    Layers of a smaller rank are filled up with zeros: vLLM takes one rank an adapter. `base_model` is the name or path
    that PEFT loads the backbone by.
    """
    rank = adapter.rank
    tensors: dict[str, np.ndarray] = {}
    for layer, a in adapter.a.items():
        module, b, missing = layer.removesuffix(".weight"), adapter.b[layer], rank - len(a)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(np.pad(a, ((0, missing), (0, 0))))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(np.pad(b, ((0, 0), (0, missing))))
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": target_modules(adapter),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), save(tensors, {"format": "pt"})


def target_modules(adapter: LoraAdapter) -> list[str]:
    """The last parts of the layers' names, as PEFT and vLLM name them: `["down_proj", "up_proj"]`."""
    return sorted({layer.removesuffix(".weight").rpartition(".")[2] for layer in adapter.a})


class _Patterns:
    """rank_pattern or alpha_pattern: numbers by module, PEFT's rule (the first key that matches the name's end)."""

    def __init__(self, config: Mapping[str, Any], field: str, name: str) -> None:
        self._order: list[tuple[re.Pattern[str], float]] = []
        given = config.get(field) or {}
        if not isinstance(given, dict) or len(given) > MAX_PATTERNS:
            raise CorruptArtefact(name, f"{field} must be an object of at most {MAX_PATTERNS} names")
        for key, value in given.items():
            if not _PATTERN.fullmatch(key) or key.count("*") + key.count("+") > 2:
                raise NotSupported(f"the key {key[:80]!r} of {field}", "name modules, with at most two of .* and \\d+")
            self._order.append((re.compile(rf"(.*\.)?({key})$"), _positive(value, f"{field}[{key}]", name)))

    def of(self, module: str, default: float) -> float:
        return next((value for pattern, value in self._order if pattern.match(module)), default)


def _config(config: bytes, name: str) -> dict[str, Any]:
    if len(config) > MAX_CONFIG_BYTES:
        raise CorruptArtefact(name, f"{CONFIG} has {len(config)} bytes and at most {MAX_CONFIG_BYTES} are read")
    try:
        tree = json.loads(config)
        if not isinstance(tree, dict):
            raise TypeError("no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptArtefact(name, f"{CONFIG} is no JSON object ({error})") from error
    if tree.get("peft_type") != "LORA":
        raise NotSupported(f"an adapter of peft_type {str(tree.get('peft_type'))[:40]!r}", "LORA is read")
    if tree.get("task_type") not in (None, "CAUSAL_LM"):
        raise NotSupported(f"an adapter for the task {str(tree['task_type'])[:40]!r}", "CAUSAL_LM is read")
    for field, value in tree.items():
        neutral = value in (None, False, "none") or value in ([], {}, 0, "")
        if field in _HARMLESS or neutral:
            continue
        what, instead = _WHY.get(field, (f"{field[:80]} = {value!r:.80} in {CONFIG}", "train a plain LoRA without it"))
        raise NotSupported(what, instead)
    init = tree.get("init_lora_weights")
    if not any(init is one or (isinstance(one, str) and init == one) for one in _KINDS_OF_INIT):
        raise NotSupported(
            f"an adapter begun by init_lora_weights = {init!r:.60}, which changes the base weights,",
            "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    rank = _positive(tree.get("r"), "r", name)
    alpha = _positive(tree.get("lora_alpha"), "lora_alpha", name)
    return tree | {"r": rank, "lora_alpha": alpha, "use_rslora": tree.get("use_rslora") is True}


def _positive(value: object, field: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise CorruptArtefact(name, f"{CONFIG} says {field} = {value!r:.60}; it must be a number above 0")
    return float(value)


def _tensors(weights: bytes, name: str) -> dict[str, np.ndarray]:
    if len(weights) > MAX_LORA_BYTES:
        raise CorruptArtefact(name, f"{WEIGHTS} has {len(weights)} bytes and at most {MAX_LORA_BYTES} are read")
    try:
        entries = deserialize(weights)
    except SafetensorError as error:
        raise CorruptArtefact(name, f"{WEIGHTS} is not a safetensors file ({error})") from error
    found: dict[str, np.ndarray] = {}
    for key, entry in entries:
        if entry["dtype"] not in _BYTES:
            raise CorruptArtefact(name, f"{key} is {entry['dtype']}; {', '.join(_BYTES)} are read")
        values = _BYTES[entry["dtype"]](bytes(entry["data"]))
        found[key] = values.astype(np.float32).reshape(entry["shape"])
    if not found:
        raise CorruptArtefact(name, f"{WEIGHTS} holds no tensors")
    return found


def _place(key: str, name: str) -> tuple[str, str]:
    """Module and part of a tensor's key. Raises in words for every key that is no lora_A or lora_B of a layer."""
    found = _KEY.fullmatch(key)
    if found is None:
        raise CorruptArtefact(name, f"{WEIGHTS} holds {key[:120]!r}, which is no tensor of a LoRA adapter")
    part = found["part"]
    if part.startswith("lora_embedding"):
        raise NotSupported(f"an adapter on embeddings ({key[:120]})", "train it on linear layers only")
    if part == "lora_magnitude_vector":
        raise NotSupported("a DoRA adapter", "train with use_dora=False")
    if part not in ("lora_A", "lora_B") or found["end"] != ".weight":
        raise NotSupported(f"the tensor {key[:120]} of an adapter", "lora_A.weight and lora_B.weight are read")
    return found["module"], part
