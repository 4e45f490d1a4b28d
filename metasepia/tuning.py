"""Training an expert vector by next-token loss through the singular factors (SVF, Transformer-squared, 2501.06252).

The gradient reaches z through y = U ((n s z) * (Vh x)); no weight gradient is ever built. The paper trains by
REINFORCE; its ablation, and this, by next-token loss on the answer tokens (supervised fine-tuning). One process.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from metasepia.digests import canonical_json
from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts import ExpertVectors
from metasepia.rows import Adapter
from metasepia.svf import ExpertLayers


@dataclass(frozen=True)
class Answered:
    """A tokenised prompt, as a chat sends it, and the answer that must follow, its end token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def left_padded(sequences: Sequence[Sequence[int]]) -> dict[str, Int[Tensor, "batch seq"]]:
    """Token ids, attention mask and position ids of sequences that end together."""
    width = max(map(len, sequences))
    token_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    for row, sequence in enumerate(sequences):
        token_ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return {"input_ids": token_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def answer_loss(model: Any, batch: Sequence[Answered]) -> tuple[Tensor, float]:
    """Mean negative log-likelihood of the answer tokens, and the share of rows whose every answer token is the argmax.

    `model` is a Hugging Face causal model; the adapters in force are whatever was selected.
    """
    longest = max(len(one.answer) for one in batch)
    inputs = left_padded([one.prompt + one.answer for one in batch])
    # The logit at p is for the token at p + 1: the answers' logits are the last `longest` but the very last.
    logits = model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    wanted = torch.full((len(batch), longest), -100)
    for row, one in enumerate(batch):
        wanted[row, longest - len(one.answer) :] = torch.tensor(one.answer)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
    right = ((logits.argmax(-1) == wanted) | (wanted == -100)).all(-1)
    return loss, float(right.float().mean())


class ExpertTrainer:
    """Adam on z from z = 1, for the layers named; the model's own weights stay frozen."""

    def __init__(
        self,
        model: Any,
        layers: ExpertLayers,
        *,
        names: Sequence[str],
        learning_rate: float,
        renormalise: bool,
        run: dict[str, object],
    ) -> None:
        """`run` is everything that decides the result; a checkpoint of another run is refused."""
        self._model, self._layers, self._renormalise = model, layers, renormalise
        self._run = canonical_json(run).decode()
        base = torch.ones(layers.factors.num_singular)
        self._trained = torch.cat([torch.arange(layers.spans[n].start, layers.spans[n].stop) for n in names])
        self._names, self._base = tuple(names), base
        self._z = torch.nn.Parameter(base[self._trained])
        self._adam = torch.optim.Adam([self._z], lr=learning_rate)
        self.step = 0

    @property
    def z(self) -> Float[Tensor, " singular"]:
        """All layers' multipliers, flat; 1 where nothing is trained."""
        return self._base.index_copy(0, self._trained, self._z)

    def train_step(self, batch: Sequence[Answered]) -> dict[str, float]:
        """One Adam step; what to log of it. Raises InvalidRequest when the loss is no longer a number."""
        self._layers.select_values(self.z[None], self._renormalise)
        loss, accuracy = answer_loss(self._model, batch)
        if not torch.isfinite(loss):
            raise InvalidRequest(
                "learning_rate", f"the loss at step {self.step} is {float(loss)}; choose a smaller one"
            )
        self._adam.zero_grad()
        loss.backward()
        assert self._z.grad is not None
        norm = float(self._z.grad.norm())
        self._adam.step()
        self.step += 1
        change = float((self._z.detach() - 1).abs().max())
        return {"loss": float(loss.detach()), "accuracy": accuracy, "gradient_norm": norm, "largest_change": change}

    def expert(self) -> ExpertVectors:
        z = self.z.detach()
        vectors = {name: z[self._layers.spans[name]].numpy().astype(np.float32) for name in self._names}
        factors = self._layers.factors
        return ExpertVectors(
            backbone=factors.backbone, factors=factors.digest, z=vectors, renormalise=self._renormalise
        )

    def save(self, path: Path) -> None:
        """Writes the checkpoint, whole or not at all."""
        state = self._adam.state_dict()["state"].get(0, {})
        tensors = {"z": self._z.detach(), **{f"adam/{name}": torch.as_tensor(v) for name, v in state.items()}}
        scratch = path.with_suffix(".tmp")
        scratch.write_bytes(
            save(tensors, {"checkpoint": canonical_json({"run": self._run, "step": self.step}).decode()})
        )
        scratch.replace(path)

    def resume(self, path: Path) -> bool:
        """Goes on from a checkpoint; False where there is none. Raises CorruptArtefact for a wrong or torn one."""
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("checkpoint", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise CorruptArtefact(str(path), f"it cannot be read ({error}); delete it to start anew") from error
        if header.get("run") != self._run:
            raise CorruptArtefact(str(path), "it is of a run with other options; delete it or choose another --out")
        with torch.no_grad():
            self._z.copy_(tensors["z"])
        state = {name.removeprefix("adam/"): value for name, value in tensors.items() if name.startswith("adam/")}
        if state:
            self._adam.load_state_dict({**self._adam.state_dict(), "state": {0: state}})
        self.step = int(header["step"])
        return True


@torch.inference_mode()
def first_logits_and_answers(
    model: Any,
    layers: ExpertLayers,
    adapter: Adapter,
    prompts: Sequence[tuple[int, ...]],
    end_token_ids: Sequence[int],
    max_tokens: int,
) -> tuple[Float[Tensor, "batch vocab"], list[tuple[int, ...]]]:
    """Logits of the first answer token, and the whole greedy answers up to their end token, cut at `max_tokens`."""
    layers.select([adapter] * len(prompts))
    inputs = left_padded(prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    first = output.logits[:, -1].float()
    logits, mask, positions = first, inputs["attention_mask"], inputs["position_ids"][:, -1:]
    for _ in range(max_tokens):
        chosen = logits.argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            done[row] = done[row] or token in end_token_ids
            if not done[row]:
                answers[row].append(token)
        if all(done):
            break
        mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions + 1
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
    return first, [tuple(answer) for answer in answers]


@torch.inference_mode()
def last_states(
    model: Any, layers: ExpertLayers, prompts: Sequence[tuple[int, ...]], layer: int
) -> Float32[np.ndarray, "prompts hidden"]:
    """The base model's hidden state at each prompt's last token; `layer` as in `HiddenStatesWanted`."""
    layers.select([()] * len(prompts))
    states = model(**left_padded(prompts), use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
    return states[layer][:, -1].float().numpy()


def paired_gain(
    base: Sequence[bool], ours: Sequence[bool], groups: Sequence[str], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean difference of two answers to the same questions, and its 95 % interval: (gain, low, high).

    A percentile bootstrap over groups (texts of one stem are not independent), so that it also covers new stems.
    """
    difference = np.asarray(ours, float) - np.asarray(base, float)
    names = sorted(set(groups))
    sums = np.array([difference[[g == name for g in groups]].sum() for name in names])
    counts = np.array([sum(g == name for g in groups) for name in names])
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)
