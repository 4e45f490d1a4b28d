"""Trains one expert to files: `python -m jobs.train_experts --task support --method sft --out DIR`.

DIR holds the expert (expert.safetensors; of `--adapter lora` a PEFT directory: adapter_model.safetensors and
adapter_config.json), card.json, README.md (made from the card), log.jsonl (a line a step), curve.png, and
checkpoint.safetensors, from which a killed run goes on to the same bytes. The model is asked as a chat asks it.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.progress import Progress

from cluster import settings
from jobs.expert_cards import card_json, command_of, draw, model_card
from jobs.tasks import Example, Task, make, names
from jobs.tasks.general import CALIBRATION
from jobs.tasks.general import HELD_OUT as GENERAL_HELD_OUT
from jobs.training import Trained, TrainingRun, train
from jobs.workbench import HELD_OUT_SEED, Workbench, evaluate
from metasepia.dispatch.centroid import CentroidTable, TaskCentroid
from metasepia.errors import MetasepiaError
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import HiddenStatesWanted
from metasepia.training.policy import Baseline, KlForm
from metasepia.training.trainable import Form, LowRank
from metasepia.training.tuning import Schedule, paired_gain

PARITY = {
    "temperature": 0.0,
    "samples": 1,
    "baseline": "none",
    "form": "reference",
    "renormalise": True,
    "learning_rate": 2e-3,
    "clip": 1e-3,
    "kl_form": "reference",
}
"""The reference's recipe, but for its batch of 256 and its number of steps."""


def compare(
    bench: Workbench,
    task: Task,
    adapter: ExpertVectors | LoraAdapter,
    layers: Sequence[str] | None,
    count: int,
    stage: str,
) -> tuple[dict[str, Any], Example]:
    """Base and expert on the same held-out questions: accuracies, and the paired gain with its 95 % interval.

    Also the first question whose greedy answer by the expert is right, as an example to try.
    """
    examples = task.held_out(count, HELD_OUT_SEED)
    with Progress() as progress:
        bar = progress.add_task(stage, total=2 * len(examples))
        base = evaluate(bench, task, examples, None, layers, lambda n: progress.advance(bar, n))
        ours = evaluate(bench, task, examples, adapter, layers, lambda n: progress.advance(bar, n))
    report: dict[str, Any] = {
        "texts": len(examples),
        "stems": len({e.group for e in examples}),
        "templates": len({e.template for e in examples}),
        "seed": HELD_OUT_SEED,
    }
    for measure in base:
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
    bench: Workbench, task: Task, layer: int, seed: int, num_held_out: int, num_prompts: int = 64
) -> tuple[TaskCentroid, dict[str, float]]:
    """The task's centroid in the base model's hidden states, and how it does on prompts that it has not seen."""
    own = [example.prompt for example in task.batch("train", num_prompts, seed, 1 << 21)]
    states, digest = bench.states, bench.prepared.digest
    centroid = TaskCentroid.calibrate(
        states(own, layer), states(CALIBRATION, layer), backbone=digest, layer=layer, pooling="last"
    )
    table = CentroidTable(digest, {task.name: centroid})
    wanted = HiddenStatesWanted(layers=(layer,), pooling="last")

    def share_chosen(messages: Sequence[str]) -> float:
        chosen = [table.choose({wanted: state[None]}).expert is not None for state in states(messages, layer)]
        return float(np.mean(chosen))

    held_out = [example.prompt for example in task.held_out(min(num_held_out, 48), HELD_OUT_SEED)]
    checked = {
        "held_out_prompts_chosen": round(share_chosen(held_out), 4),
        "general_prompts_chosen": round(share_chosen(GENERAL_HELD_OUT), 4),
    }
    return centroid, checked


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, run = parsed(given)
    torch.set_num_threads(options.threads)
    torch.manual_seed(run.seed)
    assert run.out is not None
    run.out.mkdir(parents=True, exist_ok=True)
    bench = Workbench.open(run.backbone, run.home, run.device)
    if run.rollouts == "gang" and (run.method == "reinforce" or not run.task.labels):
        from jobs.gang_rollouts import gang_rollouts

        with gang_rollouts(bench.prepared, run.home, run.layers or (), tp_size=options.tp_size) as rollouts:
            trained = train(run, bench, rollouts=rollouts)
    else:
        trained = train(run, bench)
    write_papers(run, trained, bench, options, command_of("train_experts", given))


def write_papers(
    run: TrainingRun, trained: Trained, bench: Workbench, options: argparse.Namespace, command: str
) -> None:
    """The expert, its measures, its card and its picture, in the directory of the run."""
    task, out, adapter, prepared = run.task, run.out, trained.adapter, bench.prepared
    name, layers = options.name or task.name, run.layers
    assert out is not None and layers is not None
    if isinstance(adapter, ExpertVectors):
        (out / "expert.safetensors").write_bytes(adapter.to_bytes())
        form = {"factors": adapter.factors, "renormalise": adapter.renormalise, "trained_layers": len(adapter.z)}
    else:
        assert isinstance(trained.trainable, LowRank)
        trained.trainable.save_pretrained(str(out), prepared.source)
        form = {"form": "lora", "rank": adapter.rank, "trained_layers": len(adapter.a)}
    served = layers if run.adapter == "svf" else None
    held_out, example = compare(bench, task, adapter, served, options.held_out, f"Held-out {task.name}")
    layer = options.dispatch_layer or max(1, prepared.num_layers // 2)
    dispatcher = getattr(task, "dispatcher", None)
    best = max((accuracy for _, accuracy in trained.validated), default=None)
    card = {
        "kind": "expert",
        "name": name,
        "asked_as": f"{_backbone_id(run.backbone)}:{name}",
        "description": task.about,
        "task": task.name,
        "labels": list(task.labels),
        "digest": adapter.digest,
        "backbone": prepared.digest,
        "backbone_source": prepared.source,
        **form,
        "parameters": trained.num_parameters,
        "method": run.method,
        "command": command,
        "steps": trained.kept_step,
        **({"stopped": trained.stopped} if trained.stopped else {}),
        "batch": run.batch,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        **(_policy_card(run) if run.method == "reinforce" else {}),
        **({"valid": {"examples": run.valid, "best": round(best, 4)}} if best is not None else {}),
        "training_cpu_minutes": round(trained.cpu_s / 60, 1),
        "held_out": held_out,
        "example_prompt": example.prompt,
        "example_answer": example.answer,
    }
    if dispatcher is None:
        centroid, checked = centroid_of(bench, task, layer, run.seed, options.held_out)
        card |= {"dispatch": centroid.to_card(), "dispatch_checked": checked}
    else:  # it chooses among experts, and is none to choose
        card["dispatcher"] = dispatcher
    (out / "card.json").write_text(card_json(card))
    (out / "README.md").write_text(model_card(card))
    draw(trained.log, trained.validated, out / "curve.png", name)
    for measure in ("choice", "exact"):
        if measure in held_out:
            one = held_out[measure]
            print(f"{name}, {measure}: base {one['base']:.3f}, expert {one['expert']:.3f}, gain 95 % {one['gain_95']}")
    if trained.stopped:
        print(f"{name}: ended after {trained.steps} steps: {trained.stopped}")
    print(f"{name}: the expert of step {trained.kept_step} in {out} has digest {adapter.digest}")


def _policy_card(run: TrainingRun) -> dict[str, object]:
    return {
        "samples": run.samples,
        "temperature": run.temperature,
        "baseline": run.baseline,
        "kl": run.kl,
        "kl_form": run.kl_form,
        "choice_steps": run.choice_steps,
    }


def _backbone_id(source: str) -> str:
    """What the laptop profile calls this backbone."""
    return next((one.id for one in settings.read("laptop", {}).backbones if one.source == source), "BACKBONE")


def parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, TrainingRun]:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train_experts", description=__doc__, argument_default=argparse.SUPPRESS
    )
    defaults = {one.name: one.default for one in dataclasses.fields(TrainingRun)}

    def add(flag: str, help: str, **options: Any) -> None:
        default = defaults.get(flag[2:].replace("-", "_"), dataclasses.MISSING)
        said = "" if default in (dataclasses.MISSING, None) or "action" in options else f" (default: {default})"
        group.add_argument(flag, help=help + said, **options)

    group = parser.add_argument_group("what")
    add("--task", f"{', '.join(names())}, or package.module:attribute", required=True)
    add("--data", "file or directory that the task reads", type=Path)
    add("--out", "directory of the run; a killed run is continued in it", required=True, type=Path)
    add("--name", "the expert's name; default: the task's")
    add("--backbone", "package:NAME, a Hugging Face directory or a .gguf file")
    add("--home", "where prepared weights and factors are kept", type=Path)
    add("--method", "next-token loss on reference answers, or policy gradient on sampled ones", choices=_of("method"))
    add("--seed", "of data, samples and starting values", type=int)

    group = parser.add_argument_group("what is trained")
    add("--adapter", "multipliers of singular values, or a PEFT LoRA to compare with", choices=_of("adapter"))
    add("--layers", "ends of linear layers' names, comma between; svf: gate, up, down; lora: q and v", type=_layers)
    add("--first-block", "transformer block from which on layers are trained", type=int)
    add("--end-block", "block before which they are trained", type=int)
    add("--rank", "svf: leading singular values only; lora: its rank, 16, alpha is twice it", type=int)
    add("--form", "z itself, or sigmoid(p) as in the reference, with --renormalise", choices=get_args(Form))
    add("--renormalise", "keep each layer's nuclear norm, as the reference does", action="store_true")

    group = parser.add_argument_group("how")
    add("--steps", "of the optimiser", type=int)
    add("--batch", "prompts a step", type=int)
    add("--learning-rate", "default: svf 0.02 (sft) or 0.01 (reinforce), lora 0.002", type=float)
    add("--schedule", "of the learning rate", choices=get_args(Schedule))
    add("--clip", "longest gradient; default: 1 for reinforce", type=float)
    add("--micro-batch", "answers held for one backward pass; bounds memory", type=int)
    add("--device", "where torch computes: cpu or cuda")
    group.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")

    group = parser.add_argument_group("policy gradient")
    add("--samples", "answers to each prompt", type=int)
    add("--temperature", "of the answers, 0 to 2; 0: greedy", type=float)
    add("--baseline", "default: group (the prompt's other answers) where --samples > 1, else batch",
        choices=get_args(Baseline))  # fmt: skip
    add("--kl", "weight of the KL to the base", type=float)
    add("--kl-form", "KL(policy || base) from drawn tokens or over the vocabulary; reference: KL(base || policy)",
        choices=get_args(KlForm))  # fmt: skip
    add("--choice-steps", "first steps in which only the task's labels are drawn", type=int)
    add("--form-loss", "choice steps: weight of the loss for answering with some label", type=float)
    add("--max-flat-batches", "batches of equal rewards in a row that end the run", type=int)
    add("--rollouts", "who generates: this process, or a gang on Ray", choices=_of("rollouts"))
    group.add_argument("--tp-size", type=int, default=1, help="ranks of that gang (default: 1)")
    group.add_argument("--parity", action="store_true", help=f"the reference's recipe: {PARITY}")

    group = parser.add_argument_group("checks")
    add("--valid", "validation questions", type=int)
    add("--valid-every", "steps", type=int)
    add("--keep", "which expert is written", choices=_of("keep"))
    add("--patience", "validations without a better one before the run ends", type=int)
    add("--checkpoint-every", "steps", type=int)
    group.add_argument("--held-out", type=int, default=96, help="held-out questions (default: 96)")
    group.add_argument("--dispatch-layer", type=int, default=0, help="states for `auto`; default: half the depth")

    options = parser.parse_args(arguments)
    fields = vars(options).copy()
    parity = PARITY if fields.pop("parity", False) else {}
    for name in ("threads", "tp_size", "held_out", "dispatch_layer"):
        fields.pop(name)
    options.name = fields.pop("name", None)
    try:
        fields["task"] = make(fields["task"], fields.pop("data", None))
        return options, TrainingRun(**{**parity, **fields}).resolved()
    except MetasepiaError as error:
        parser.error(str(error))


def _of(field: str) -> tuple[str, ...]:
    return get_args(TrainingRun.__annotations__[field])


def _layers(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    main()
