"""Training the set module on synthetic problems with the geometry of embeddings: recipe, one step, checkpoints.

A run is a pure function of its recipe: killed and resumed from its checkpoint it ends with the same weights, on the
same device type and number of threads. What is exported is the running mean of the weights.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metasepia.errors import InvalidSettings
from metasepia.reasoning.set_module import SetModule, SetShape
from metasepia.reasoning.training import restore_run, save_run
from metasepia.synthetic.embeddings import EmbeddingBatch, EmbeddingLikeTasks
from metasepia.synthetic.tasks import Seeds

MEAN_OVER = 1000
"""Steps that the running mean of the weights reaches back over, about."""


@dataclass(frozen=True, kw_only=True)
class SetRecipe:
    """Everything that the trained weights are a function of."""

    shape: SetShape
    tasks: EmbeddingLikeTasks
    num_steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    """Linear from zero; then half a cosine down to `last_rate` times the rate."""
    last_rate: float = 0.02
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seeds: Seeds = field(default_factory=Seeds)
    module_seed: int = 0

    def rate_at(self, step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps)))
        rate = self.learning_rate * (self.last_rate + (1 - self.last_rate) * cosine)
        return rate * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def batch_at(self, step: int) -> EmbeddingBatch:
        return self.tasks.batch(self.seeds, step)

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


SET_PRESETS: Mapping[str, SetRecipe] = {
    "set-broad": SetRecipe(
        shape=SetShape(width=32, layers=6, value_dim=8, soft_heads=4, mlp=64),
        tasks=EmbeddingLikeTasks(
            dims=(32, 512),
            heavy_share=0.25,
            topics_share=0.35,
            sphere_share=0.5,
            widths_share=0.4,
            parts_share=0.4,
            bent_share=0.15,
            decay=(0.3, 2.0),
            shift=(1.0, 30.0),
            alignment=(0.8, 3.0),
        ),
        num_steps=14_000,
    ),
    "set-close": SetRecipe(
        shape=SetShape(width=32, layers=6, value_dim=8, soft_heads=4, mlp=64),
        tasks=EmbeddingLikeTasks(),
        num_steps=9000,
        learning_rate=1.2e-3,
        warmup_steps=100,
        seeds=Seeds(task=10, data=11, noise=12),
    ),
    "set": SetRecipe(
        shape=SetShape(width=32, layers=6, value_dim=8, soft_heads=4, mlp=64),
        tasks=EmbeddingLikeTasks(
            dims=(64, 512),
            examples=(10, 400),
            unlabelled=(30, 400),
            many_examples=(3, 10),
            distance=(0.4, 12.0),
            states=7000,
        ),
        num_steps=4200,
        learning_rate=8e-4,
        warmup_steps=100,
        seeds=Seeds(task=20, data=21, noise=22),
    ),
    "set-large": SetRecipe(
        shape=SetShape(width=64, layers=10, value_dim=8, soft_heads=8, mlp=192),
        tasks=EmbeddingLikeTasks(examples=(4, 1000), states=120_000),
        num_steps=60_000,
        learning_rate=1e-3,
    ),
    "set-tiny": SetRecipe(
        shape=SetShape(width=8, layers=2, value_dim=4, soft_heads=2, mlp=16),
        tasks=EmbeddingLikeTasks(dims=(4, 12), examples=(6, 20), unlabelled=(5, 10), queries=8, states=1000),
        num_steps=40,
        warmup_steps=10,
    ),
}
"""`set-broad`, stopped after 7550 steps, then `set-close` from there, then `set`: the shipped default, some 80 minutes
of a CPU core; problems come closer to what embeddings of texts look like, and then are larger.

`set-large`: for a GPU, not run. `set-tiny`: for tests.
"""


def loss_of(logits: Float[Tensor, "problems hidden classes"], batch: EmbeddingBatch) -> Float[Tensor, ""]:
    """Mean cross-entropy over unlabelled vectors and queries as a share of a guess's, ln(classes)."""
    return F.cross_entropy(logits.flatten(0, 1), batch.hidden_labels.flatten()) / math.log(batch.num_classes)


class SetTrainingRun:
    """A set module, its AdamW state, its running mean and its step; `advance` takes one optimisation step."""

    def __init__(self, recipe: SetRecipe, *, device: torch.device | str = "cpu") -> None:
        self.recipe, self.device, self.step = recipe, torch.device(device), 0
        self.module = SetModule(recipe.shape, seed=recipe.module_seed).to(self.device)
        self.mean = SetModule(recipe.shape, seed=recipe.module_seed).to(self.device).requires_grad_(False)
        self._adam = torch.optim.AdamW(
            self.module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        # Batches without unlabelled vectors leave some weights without a gradient: they count as zeros, so that Adam
        # has taken as many steps with every weight, and a checkpoint needs one number for all.
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def begin_from(self, module: SetModule) -> None:
        """Step 0 with another run's weights. Raises InvalidSettings for another shape."""
        if module.shape != self.recipe.shape:
            raise InvalidSettings("warm_start", module.shape, f"a module of the shape {self.recipe.shape}")
        self.module.load_state_dict(module.state_dict())
        self.mean.load_state_dict(module.state_dict())

    @property
    def exported(self) -> SetModule:
        return self.mean

    def facts(self) -> dict[str, int]:
        """What one line of the loss log says beside step and loss: none here, sizes differ from batch to batch."""
        return {}

    def advance(self) -> Float[Tensor, ""]:
        """One step on this step's batch; its loss."""
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        batch = _to(self.recipe.batch_at(self.step), self.device)
        logits = self.module(batch.x, batch.y, batch.queries, batch.num_classes, batch.unlabelled)
        loss = loss_of(logits, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)
        self.step += 1
        kept = min(1 - 1 / MEAN_OVER, self.step / (self.step + 50))
        with torch.no_grad():
            for mean, now in zip(self.mean.parameters(), self.module.parameters(), strict=True):
                mean.lerp_(now, 1 - kept)
        return loss.detach()

    def save(self, path: Path) -> None:
        """Weights, their mean, both Adam moments and the step in one safetensors file, replaced as a whole."""
        save_run(path, self.step, self.recipe.to_json(), self._modules, self._adam)

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint of the same recipe; raises as `restore_run` does."""
        self.step = restore_run(path, self.recipe.to_json(), self._modules, self._adam, self.device)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {"module": self.module, "mean": self.mean}


def _to(batch: EmbeddingBatch, device: torch.device) -> EmbeddingBatch:
    return dataclasses.replace(
        batch,
        x=batch.x.to(device),
        y=batch.y.to(device),
        unlabelled=None if batch.unlabelled is None else batch.unlabelled.to(device),
        queries=batch.queries.to(device),
        hidden_labels=batch.hidden_labels.to(device),
    )
