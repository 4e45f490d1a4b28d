"""Training a reasoning module on synthetic tasks: recipes, one optimisation step, checkpoints.

The paper's recipe (TART, arXiv:2306.07536) is the preset `paper`; `small` is what two CPU cores train in half an hour.
A run is a pure function of its recipe: killed and resumed from its checkpoint it ends with the same weights, on
the same device type and number of threads.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.synthetic.curriculum import Curriculum, Ramp
from metasepia.synthetic.tasks import Batch, ProbabilisticLogisticRegression, Seeds


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the trained weights are a function of."""

    shape: ModuleShape
    task: ProbabilisticLogisticRegression
    curriculum: Curriculum
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    """Linear from zero."""
    cooldown_steps: int = 0
    """Linear to zero over the last steps; 0 keeps the rate constant, as the paper does."""
    clip_norm: float | None = None
    seeds: Seeds = field(default_factory=Seeds)
    module_seed: int = 0
    wave_positions: bool = False
    """Learned positions begin at waves, not at noise (`module.waves`); the paper's begin at noise."""

    def rate_at(self, step: int) -> float:
        rate = self.learning_rate
        if step < self.warmup_steps:
            rate *= (step + 1) / self.warmup_steps
        remaining = self.num_steps - step
        return rate * min(1.0, remaining / self.cooldown_steps) if self.cooldown_steps else rate

    def batch_at(self, step: int, device: torch.device | str = "cpu") -> Batch:
        return self.task.batch(
            self.seeds,
            step,
            num_sequences=self.batch_size,
            num_pairs=self.curriculum.pairs.at(step),
            active_dims=self.curriculum.dims.at(step),
            device=device,
        )

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


PRESETS: Mapping[str, Recipe] = {
    "paper": Recipe(
        shape=ModuleShape(dims=16, pairs=258, layers=12, width=256, heads=8),
        task=ProbabilisticLogisticRegression(dims=16),
        curriculum=Curriculum(
            dims=Ramp(start=4, end=16, increment=4, interval=1000),
            pairs=Ramp(start=18, end=258, increment=30, interval=1000),
        ),
        num_steps=35_001,
        batch_size=128,
        learning_rate=1e-4,
    ),
    "small": Recipe(
        shape=ModuleShape(dims=8, pairs=65, layers=4, width=64, heads=4),
        task=ProbabilisticLogisticRegression(dims=8),
        curriculum=Curriculum(
            # With 2 dims it takes some 600 steps to leave ln 2 = 0.693; with 8 from the start, far longer.
            dims=Ramp(start=2, end=8, increment=1, interval=600),
            pairs=Ramp(start=17, end=65, increment=8, interval=600),
        ),
        num_steps=12_000,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=100,
        cooldown_steps=4000,
        clip_norm=1.0,
        wave_positions=True,
    ),
    "medium": Recipe(
        shape=ModuleShape(dims=16, pairs=65, layers=4, width=64, heads=4),
        task=ProbabilisticLogisticRegression(dims=16),
        curriculum=Curriculum(
            dims=Ramp(start=2, end=16, increment=2, interval=1500),
            pairs=Ramp(start=17, end=65, increment=8, interval=1000),
        ),
        num_steps=20_000,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=100,
        cooldown_steps=6000,
        clip_norm=1.0,
        wave_positions=True,
    ),
    "tiny": Recipe(
        shape=ModuleShape(dims=2, pairs=9, layers=2, width=16, heads=2),
        task=ProbabilisticLogisticRegression(dims=2),
        curriculum=Curriculum(
            dims=Ramp(start=1, end=2, increment=1, interval=5), pairs=Ramp(start=3, end=9, increment=2, interval=5)
        ),
        num_steps=40,
        batch_size=8,
        learning_rate=1e-3,
    ),
}
"""`paper`: TART's own. `small`: 8 dims, the shipped one. `medium`: 16, never yet run to its end. `tiny`: for tests."""


def loss_of(logits: Float[Tensor, "batch padded"], y: Float[Tensor, "batch pairs"]) -> Float[Tensor, ""]:
    """Mean binary cross-entropy over all positions, in nats; positions beyond the batch's pairs are padding."""
    return F.binary_cross_entropy_with_logits(logits[:, : y.shape[1]].float(), y)


class TrainingRun:
    """A module, its Adam state and its step; `advance` takes one optimisation step."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        lengths: tuple[int, ...] = (),
    ) -> None:
        """`precision` float32 or bfloat16 (autocast; weights and Adam stay float32).

        `lengths`: sequences are padded at their ends to the next of these numbers of pairs, so that a compiled block
        sees few shapes; causal attention keeps padding out of sight.
        """
        self.recipe, self.device, self.step = recipe, torch.device(device), 0
        self.module = ReasoningModule(recipe.shape, seed=recipe.module_seed, wave_positions=recipe.wave_positions).to(
            self.device
        )
        self._lengths = tuple(sorted(lengths))
        self._autocast = precision == "bfloat16"
        self._adam = torch.optim.Adam(
            self.module.parameters(), lr=recipe.learning_rate, fused=True if self.device.type == "cuda" else None
        )

    @property
    def exported(self) -> ReasoningModule:
        return self.module

    def facts(self) -> dict[str, int]:
        """What one line of the loss log says beside step and loss."""
        curriculum = self.recipe.curriculum
        return {"pairs": curriculum.pairs.at(self.step), "dims": curriculum.dims.at(self.step)}

    def advance(self) -> Float[Tensor, ""]:
        """One step on this step's batch; its loss, still on the device and not waited for."""
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        loss = self._backward(self.recipe.batch_at(self.step, self.device))
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        pad = next((n for n in self._lengths if n >= batch.x.shape[1]), batch.x.shape[1]) - batch.x.shape[1]
        with torch.autocast(self.device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext():
            logits = self.module(F.pad(batch.x, (0, 0, 0, pad)), F.pad(batch.y, (0, pad)))
        loss = loss_of(logits, batch.y)
        loss.backward()
        return loss.detach()

    def compile_blocks(self) -> None:
        """Compiles one block, shared by all layers, for each padded length. Re-raises failures, and then runs plain."""
        try:
            for block in self.module.blocks:
                block.compile(dynamic=False)
            for length in self._lengths or (self.recipe.shape.pairs,):
                self._backward(
                    self.recipe.task.batch(
                        self.recipe.seeds, 0, num_sequences=self.recipe.batch_size, num_pairs=length, device=self.device
                    )
                )
        except Exception:
            for block in self.module.blocks:
                block._compiled_call_impl = None
            raise
        finally:
            self._adam.zero_grad(set_to_none=True)

    def save(self, path: Path) -> None:
        """Weights, both Adam moments and the step in one safetensors file, replaced as a whole."""
        save_run(path, self.step, self.recipe.to_json(), {"module": self.module}, self._adam)

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint of the same recipe; raises as `restore_run` does."""
        may_differ = ("num_steps", "cooldown_steps")
        modules = {"module": self.module}
        self.step = restore_run(path, self.recipe.to_json(), modules, self._adam, self.device, may_differ=may_differ)


def save_run(
    path: Path,
    step: int,
    recipe: Mapping[str, object],
    modules: Mapping[str, nn.Module],
    adam: torch.optim.Adam | torch.optim.AdamW,
) -> None:
    """Modules of one shape by name, Adam's moments of those of `module`, and the step, in one file."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    for name, parameter in modules["module"].named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = adam.state[parameter].get(moment, torch.zeros_like(parameter))
    # One key alone: safetensors writes several in any order, and equal runs leave equal bytes.
    state = json.dumps({"step": step, "recipe": recipe}, sort_keys=True)
    write_tensors(path, tensors, {"state": state})


def restore_run(
    path: Path,
    recipe: Mapping[str, object],
    modules: Mapping[str, nn.Module],
    adam: torch.optim.Adam | torch.optim.AdamW,
    device: torch.device,
    *,
    may_differ: Sequence[str] = (),
) -> int:
    """Fills modules and Adam's state from what `save_run` wrote; the step.

    Raises CorruptArtefact for a file that cannot be read, InvalidSettings for another recipe's, but for the parts that
    `may_differ`.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = json.loads(file.metadata()["state"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptArtefact(path.name, str(error)) from error
    ours, theirs = json.loads(json.dumps(recipe, sort_keys=True)), state["recipe"]
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name) and name not in may_differ:
            allowed = f"as in the checkpoint {path}: {theirs.get(name)!r}, or begin in another --out"
            raise InvalidSettings(name, ours.get(name), allowed)
    step = state["step"]
    # Fused Adam counts its steps on the device, the plain one on the CPU.
    counted_on = device if adam.defaults["fused"] else "cpu"
    with torch.no_grad():
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters():
                parameter.copy_(stored[f"{prefix}.{name}"])
        for name, parameter in modules["module"].named_parameters():
            adam.state[parameter] = {
                "step": torch.tensor(float(step), device=counted_on),
                "exp_avg": stored[f"exp_avg.{name}"].clone(),
                "exp_avg_sq": stored[f"exp_avg_sq.{name}"].clone(),
            }
    return step


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes safetensors so that a reader finds the old file or the new one, whole, also after a power cut."""
    unfinished = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=dict(metadata))
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
