"""A backbone set up for training and measuring: loaded once, used by many runs. Asks as a chat asks."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from jobs.tasks import Example, Task
from metasepia.errors import InvalidSettings
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Row, Sampling
from metasepia.training.rollouts import LocalRollouts, Rolled, Rollouts, check_executed
from metasepia.training.teacher_forcing import Answered, first_logits_and_answers, last_states
from metasepia.training.trainable import twin

BATCH_OF_EVALUATION = 16
HELD_OUT_SEED = 1_000_003
"""Of the held-out questions that experts are measured on, here and in benchmarks."""
EXPERT_LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

Right = dict[str, list[bool]]
"""By measure (`choice`: is the likeliest label right; `exact`: does the task take the greedy answer) and question."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def decode(self, token_ids: Sequence[int], **options: Any) -> Any: ...


class Asker:
    """Turns a task's questions into what the chat route sends, and token ids back into text."""

    def __init__(self, tokenizer: Tokenizer, prepared: PreparedBackbone) -> None:
        """Raises InvalidSettings for a checkpoint whose answers end with no token."""
        self.tokenizer = tokenizer
        self.end_token_ids = prepared.eos_token_ids
        if not self.end_token_ids:
            raise InvalidSettings("backbone", prepared.source, "a chat model, whose answers end with a token")
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidSettings("backbone", prepared.source, "a chat model, with a chat template")
        ends_turn = getattr(tokenizer, "eos_token_id", None)
        self._end = ends_turn if ends_turn in self.end_token_ids else self.end_token_ids[0]

    def prompt(self, message: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokens(text)

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def answered(self, example: Example) -> Answered:
        return Answered(self.prompt(example.prompt), (*self.tokens(example.answer), self._end))

    def label_tokens(self, task: Task) -> tuple[int, ...]:
        """The labels' first tokens. Raises InvalidSettings unless they differ: a choice is read off one logit."""
        firsts = {label: self.tokens(label)[0] for label in task.labels}
        if len(set(firsts.values())) < len(firsts):
            raise InvalidSettings("task", task.name, f"one whose labels begin with different tokens, not {firsts}")
        return tuple(firsts.values())

    def row(
        self, example: Example, backbone: str, digest: str | None, sampling: Sampling, request_id: str = "0"
    ) -> Row:
        """The row that asks one question of an adapter, or of the base (None)."""
        return Row(
            request_id=request_id,
            backbone=backbone,
            token_ids=self.prompt(example.prompt),
            adapter=() if digest is None else ((digest, 1.0),),
            sampling=sampling,
        )


class Workbench:
    """Model, tokenizer, factors and, once something is generated, a decoder with weights shared. One process."""

    def __init__(self, prepared: PreparedBackbone, home: Path, device: str = "cpu") -> None:
        """In fp32: gradients are taken here."""
        from transformers import AutoTokenizer

        self.prepared, self.home = prepared, home
        self.model: Any = checkpoints.load(prepared, torch.float32, device)
        self.asker = Asker(AutoTokenizer.from_pretrained(prepared.tokenizer_dir), prepared)
        self._factors: dict[tuple[str, ...], FactorSet] = {}
        self._rollouts: dict[tuple[str, ...], LocalRollouts] = {}

    @classmethod
    def open(cls, backbone: str, home: Path, device: str = "cpu") -> Self:
        """`backbone`: `package:<distribution>`, a Hugging Face directory or a .gguf file."""
        return cls(checkpoints.prepare(backbone, home), home, device)

    def factors(self, layers: Sequence[str]) -> FactorSet:
        """Of the linear layers whose names end so; from the cache under `home`, or computed once."""
        key = tuple(sorted(layers))
        if key not in self._factors:
            self._factors[key] = factors_of(self.model, layers, self.prepared.digest, self.home)
        return self._factors[key]

    def rollouts(self, layers: Sequence[str] | None) -> LocalRollouts:
        """A decoder in this process that serves experts on these layers and low-rank adapters; None: these alone.

        Raises NotSupported on a model that does not attend.
        """
        key = tuple(sorted(layers or ()))
        if key not in self._rollouts:
            model = twin(self.model)
            factors = self.factors(layers) if layers else None
            attached = attach(model, factors, backbone=self.prepared.digest)
            self._rollouts[key] = LocalRollouts(model, self.prepared, attached)
        return self._rollouts[key]

    def states(self, messages: Sequence[str], layer: int) -> np.ndarray:
        """The base model's hidden state at the last token of each chat message."""
        parts = [
            last_states(self.model, [self.asker.prompt(m) for m in messages[i : i + BATCH_OF_EVALUATION]], layer)
            for i in range(0, len(messages), BATCH_OF_EVALUATION)
        ]
        return np.concatenate(parts)


def read_labels(
    model: Any,
    asker: Asker,
    task: Task,
    examples: Sequence[Example],
    *,
    select: Callable[[int], object] = lambda _: None,
    advance: Callable[[int], object] = lambda _: None,
) -> Right:
    """Both measures of a label task, from a model's first-token logits and greedy answers.

    `select` is called before each batch with its rows, `advance` after it.
    """
    firsts = list(asker.label_tokens(task))
    right: Right = {"choice": [], "exact": []}
    max_tokens = 1 + max(len(asker.tokens(label)) for label in task.labels)
    for start in range(0, len(examples), BATCH_OF_EVALUATION):
        batch = examples[start : start + BATCH_OF_EVALUATION]
        prompts = [asker.prompt(example.prompt) for example in batch]
        select(len(batch))
        logits, answers = first_logits_and_answers(model, prompts, asker.end_token_ids, max_tokens)
        for row, example in enumerate(batch):
            chosen = task.labels[int(logits[row, firsts].argmax())]
            right["choice"].append(chosen == example.answer)
            right["exact"].append(task.verify(asker.text(answers[row]), example))
        advance(len(batch))
    return right


def read_answers(
    rollouts: Rollouts,
    asker: Asker,
    task: Task,
    backbone: str,
    examples: Sequence[Example],
    digest: str | None,
    advance: Callable[[int], object] = lambda _: None,
) -> Right:
    """The measure `exact` of any task, from greedy answers. `digest`: the adapter that was put; None: the base."""
    rolled: list[Rolled] = []
    sampling = Sampling(temperature=0.0, max_tokens=task.max_tokens, stop_token_ids=asker.end_token_ids)
    for start in range(0, len(examples), 4 * BATCH_OF_EVALUATION):
        batch = examples[start : start + 4 * BATCH_OF_EVALUATION]
        rows = [asker.row(one, backbone, digest, sampling, str(index)) for index, one in enumerate(batch)]
        rolled += rollouts.generate(rows)
        advance(len(batch))
    check_executed(rolled, digest)
    texts = [asker.text(one.tokens) for one in rolled]
    return {"exact": [task.verify(text, one) for text, one in zip(texts, examples, strict=True)]}


def evaluate(
    bench: Workbench,
    task: Task,
    examples: Sequence[Example],
    adapter: ExpertVectors | LoraAdapter | None,
    layers: Sequence[str] | None = EXPERT_LAYERS,
    advance: Callable[[int], object] = lambda _: None,
) -> Right:
    """An adapter's answers as they would be served, None: the base's.

    `layers`: those that an expert's factors are of; None for the base and low-rank adapters, which have none.
    """
    rollouts = bench.rollouts(None if isinstance(adapter, LoraAdapter) else layers)
    digest = None if adapter is None else rollouts.put(adapter)
    if not task.labels:
        return read_answers(rollouts, bench.asker, task, bench.prepared.digest, examples, digest, advance)
    select = partial(rollouts.select, digest)
    return read_labels(rollouts.model, bench.asker, task, examples, select=select, advance=advance)
