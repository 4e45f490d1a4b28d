"""What training and its checks read of a causal model: loss, logits, greedy answers and states of padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn


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


def logits_of(model: Any, sequences: Sequence[Sequence[int]], keep: int) -> Float[Tensor, "batch keep vocab"]:
    """The logits after the last `keep` tokens of each sequence, in fp32."""
    inputs = {name: one.to(model.device) for name, one in left_padded(sequences).items()}
    return model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, -keep:].float()


def summed_answer_loss(model: Any, batch: Sequence[Answered]) -> tuple[Tensor, int, int]:
    """Negative log-likelihood of the answer tokens, summed; how many those are; rows whose every one is the argmax.

    `model` is a Hugging Face causal model.
    """
    longest = max(len(one.answer) for one in batch)
    # The logit at p is for the token at p + 1: the answers' logits are the last `longest` but the very last.
    logits = logits_of(model, [one.prompt + one.answer for one in batch], longest + 1)[:, :-1]
    wanted = torch.full((len(batch), longest), -100)
    for row, one in enumerate(batch):
        wanted[row, longest - len(one.answer) :] = torch.tensor(one.answer)
    wanted = wanted.to(logits.device)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    right = ((logits.argmax(-1) == wanted) | (wanted == -100)).all(-1)
    return loss, int((wanted != -100).sum()), int(right.sum())


@torch.inference_mode()
def first_logits_and_answers(
    model: Any, prompts: Sequence[tuple[int, ...]], end_token_ids: Sequence[int], max_tokens: int
) -> tuple[Float[Tensor, "batch vocab"], list[tuple[int, ...]]]:
    """Logits of the first answer token, and the whole greedy answers up to their end token, cut at `max_tokens`."""
    inputs = {name: one.to(model.device) for name, one in left_padded(prompts).items()}
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
def last_states(model: Any, prompts: Sequence[tuple[int, ...]], layer: int) -> Float32[np.ndarray, "prompts hidden"]:
    """The model's hidden state at each prompt's last token; `layer` as in `HiddenStatesWanted`."""
    inputs = {name: one.to(model.device) for name, one in left_padded(prompts).items()}
    states = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
    return states[layer][:, -1].float().cpu().numpy()
