"""A checkpoint's model, built without memory and then filled with one rank's part of every weight.

`skeleton` makes the model on torch's meta device; whoever cuts it (DeepSpeed) works on shapes alone; `fill` then reads
this rank's rows or columns from the files, straight into their dtype and device. The process never holds more than its
share and one small buffer, so a model larger than any one process starts on enough of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metasepia.errors import CorruptArtefact, NotSupported
from metasepia.models.shards import LayerShard
from metasepia.stored import StoredTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The causal model of `directory`'s config.json in evaluation mode, every parameter and buffer on the meta device.

    Tied weights are one parameter, as in a model that transformers has loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def stored_names(model: "PreTrainedModel", stored: StoredTensors) -> dict[str, str]:
    """Under which name the files hold each parameter of `model`, as transformers would map them; tied ones share one.

    Raises CorruptArtefact when a parameter is nowhere, or tied parameters are stored with different values, and
    NotSupported for a checkpoint whose tensors transformers would transform while loading.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters: list[Any] = [one for one in conversions if not isinstance(one, WeightRenaming)]
    own = dict(model.state_dict())
    found: dict[str, str] = {}
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if pattern is not None and target in own:
            raise NotSupported(f"loading {name} by shard", f"transformers makes {target} from it by {pattern}")
        found[target] = name
    names = {name: found[name] for name, _ in model.named_parameters(remove_duplicate=False) if name in found}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, source in tied.items():
        if name in names and source in names and not _equal(stored, names[name], names[source]):
            raise CorruptArtefact(
                stored[names[name]].path.name,
                f"its config ties {name} to {source} and they differ; set tie_word_embeddings to false in config.json",
            )
        name, source = (name, source) if source in names else (source, name)
        if source in names:
            names[name] = names[source]
    missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in names]
    if missing:
        where = next((str(one.path.parent) for one in stored.values()), "the checkpoint")
        raise CorruptArtefact(where, f"it lacks the tensors {', '.join(missing[:5])}; delete it or complete it")
    return names


def fill(
    model: "PreTrainedModel",
    stored: StoredTensors,
    names: Mapping[str, str],
    shards: Mapping[str, LayerShard],
    device: torch.device | str,
) -> None:
    """Gives each parameter of a cut skeleton its memory on `device` and this rank's part of the stored tensor.

    `names`: of `stored_names`, before the cut. `shards` says by weight name how a layer was cut; the others are whole.
    Parameters that are still one share one memory. Buffers are computed in float32, as transformers computes them.
    """
    filled: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = prefix + leaf
            if id(parameter) not in filled:
                part = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                rows, columns = shards.get(f"{prefix}weight", LayerShard()).part_of(parameter.ndim)
                try:
                    stored.read(names[name], part, rows, columns)
                except ValueError as error:
                    if isinstance(error, CorruptArtefact):
                        raise
                    raise CorruptArtefact(stored[names[name]].path.name, f"{error}, as its config says") from error
                filled[id(parameter)] = nn.Parameter(part, requires_grad=False)
            setattr(module, leaf, filled[id(parameter)])
    _compute_buffers(model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"{left} have no memory"


def _compute_buffers(model: "PreTrainedModel", device: torch.device | str) -> None:
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]  # transformers leaves it alone
    for module in model.modules():
        empty = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in empty.items():
            dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype  # DeepSpeed rounds them with the rest
            fresh: Tensor = torch.empty(buffer.shape, dtype=dtype, device=device)
            module.register_buffer(name, fresh, persistent=name not in module._non_persistent_buffers_set)
        if empty:
            with torch.no_grad():
                model._init_weights(module)


def _equal(stored: StoredTensors, one: str, other: str) -> bool:
    if one == other:
        return True
    a, b = stored[one], stored[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = 1 << 22
    with a.path.open("rb") as first, b.path.open("rb") as second:
        for begin in range(0, a.num_bytes, step):
            count = min(step, a.num_bytes - begin)
            first.seek(a.offset + begin)
            second.seek(b.offset + begin)
            if first.read(count) != second.read(count):
                return False
    return True
