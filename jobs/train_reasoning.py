"""Pretrains a reasoning module on synthetic problems and leaves weights, card, loss log and picture.

    python -m jobs.train_reasoning --preset set
    python -m jobs.train_reasoning --preset paper --device cuda --precision bfloat16 --out runs/paper --max-seconds 560

The same command run again goes on from `OUT/checkpoint.safetensors` to the same weights that one uninterrupted run
gives. Needs torch, numpy and safetensors; matplotlib for the picture and rich for the bar, where they are installed.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.reasoning import shipped
from metasepia.reasoning.set_module import SetModule
from metasepia.reasoning.set_training import SET_PRESETS, SetRecipe, SetTrainingRun
from metasepia.reasoning.training import PRESETS, Recipe, TrainingRun

LOG_EVERY = 50
"""Steps that one line of the loss log averages over; checkpoints fall on its multiples."""


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds."""

    def __init__(self, total: int, first: int, *, every_s: float = 5.0) -> None:
        self._total, self._first, self._every_s = total, first, every_s
        self._began = self._told = time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            try:
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("training", total=total, completed=first)
            self._bar.start()

    def show(self, step: int, loss: float, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {loss:.4f} {text}")
        elif time.monotonic() - self._told > self._every_s or step == self._total:
            self._told = time.monotonic()
            rate = (step - self._first) / max(1e-9, self._told - self._began)
            left = (self._total - step) / max(1e-9, rate)
            print(
                f"step {step}/{self._total}  loss {loss:.4f}  {text}  {rate:.1f} steps/s  {left / 60:.1f} min left",
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def train(
    recipe: Recipe | SetRecipe,
    out: Path,
    *,
    command: str,
    preset: str,
    device: str = "cpu",
    precision: str = "float32",
    compile_blocks: bool = False,
    checkpoint_every: int = 1000,
    stop_at: float = float("inf"),
    stop_after: int | None = None,
    dtype: torch.dtype = torch.float32,
    copies: Path | None = None,
    warm_start: Path | None = None,
) -> bool:
    """Trains from OUT's checkpoint, or from the start, until done or `stop_at` (time.monotonic()). True when done.

    `stop_after`: it is done after so many steps, a multiple of LOG_EVERY, and the rate falls as if it went on.
    `warm_start`: without a checkpoint, weights come from this exported folder and Adam begins anew; the causal module's
    step too, a set module begins at step 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "checkpoint.safetensors", out / "loss.jsonl"
    run, lengths = _run(recipe, device, precision, compile_blocks)
    if checkpoint.is_file():
        run.restore(checkpoint)
        print(f"goes on from step {run.step} of {checkpoint}", flush=True)
    elif warm_start is not None:
        loaded = shipped.load(str(warm_start))
        source = {name: loaded.card[name] for name in ("digest", "command", "step")}
        if "began_from" in loaded.card:
            source["began_from"] = loaded.card["began_from"]
        if isinstance(run, SetTrainingRun):
            if not isinstance(loaded.module, SetModule):
                raise InvalidSettings("warm_start", str(warm_start), "a folder with a set module")
            run.begin_from(loaded.module)
            (out / "began_from.json").write_text(json.dumps(source))
            print(f"begins with the weights of {warm_start}", flush=True)
        else:
            run.module.load_state_dict(loaded.module.state_dict())
            run.step = int(str(loaded.card["step"]))
            print(f"goes on from step {run.step} of {warm_start}, with a new Adam state", flush=True)
            if not log.is_file() and (warm_start / log.name).is_file():
                log.write_text((warm_start / log.name).read_text())
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rows = [row for row in rows if row["step"] <= run.step]  # lines after the checkpoint will be written again
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if isinstance(run, TrainingRun) and compile_blocks and run.step < recipe.num_steps:
        began = time.monotonic()
        try:
            run.compile_blocks()
            print(f"compiled for {lengths} pairs in {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:  # any failure of the compiler leaves the uncompiled path, which computes the same
            print(f"runs uncompiled: {type(error).__name__}: {str(error)[:300]}", flush=True)

    last = min(recipe.num_steps, stop_after or recipe.num_steps)
    progress = Progress(last, run.step)
    total = torch.zeros((), device=run.device)
    count = 0
    try:
        while run.step < last:
            facts = run.facts()
            total, count = total + run.advance(), count + 1
            if run.step % LOG_EVERY and run.step < last:
                continue
            loss = float(total) / count
            total, count = torch.zeros_like(total), 0
            if not loss < float("inf"):
                raise SystemExit(f"the loss is {loss} at step {run.step}; the last good checkpoint is {checkpoint}")
            row = {"step": run.step, "loss": round(loss, 6), **facts}
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            progress.show(run.step, loss, " ".join(f"{name} {value}" for name, value in facts.items()))
            if run.step % checkpoint_every < LOG_EVERY or time.monotonic() > stop_at:
                run.save(checkpoint)
            if time.monotonic() > stop_at:
                break
    finally:
        progress.close()
    run.save(checkpoint)
    done = run.step >= last
    picture = draw(
        rows,
        out / "loss.png",
        f"{preset}: mean cross-entropy on fresh synthetic tasks",
        "share of a guess's" if isinstance(recipe, SetRecipe) else "nats a label",
    )
    card = {
        "name": out.name,
        "preset": preset,
        "command": command,
        "recipe": recipe.to_json(),
        "step": run.step,
        "num_steps": last,
        "final_loss": rows[-1]["loss"] if rows else None,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "precision": precision,
        "torch": torch.__version__,
        "licence": "that of this repository; trained on synthetic data alone",
    }
    if (out / "began_from.json").is_file():
        card["began_from"] = json.loads((out / "began_from.json").read_text())
    for folder in (out, *([copies] if copies else [])):
        shipped.export(run.exported, folder, card, dtype=dtype)
        if folder != out:
            (folder / "loss.jsonl").write_text(log.read_text())
            if picture:
                (folder / "loss.png").write_bytes((out / "loss.png").read_bytes())
    print(f"{'done' if done else 'stopped'} at step {run.step} of {last}: {out}", flush=True)
    return done


def _run(
    recipe: Recipe | SetRecipe, device: str, precision: str, compile_blocks: bool
) -> tuple[TrainingRun | SetTrainingRun, tuple[int, ...]]:
    """A run at its start, and the lengths that its blocks will be compiled for."""
    if isinstance(recipe, SetRecipe):
        for name, value, only in (("precision", precision, "float32"), ("compile", compile_blocks, False)):
            if value != only:
                raise InvalidSettings(name, value, f"{only} for a set module")
        return SetTrainingRun(recipe, device=device), ()
    end = recipe.curriculum.pairs.end
    lengths = tuple(sorted({-(-end * i // 3) for i in (1, 2, 3)})) if compile_blocks else ()
    return TrainingRun(recipe, device=device, precision=precision, lengths=lengths), lengths


def draw(rows: list[dict[str, float]], path: Path, title: str, unit: str) -> bool:
    """The loss curve; without matplotlib says so and returns False."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed; the losses are in loss.jsonl", flush=True)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=0.9)
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return True


def recipe_of(arguments: argparse.Namespace) -> Recipe | SetRecipe:
    """The preset with the changes asked for. Raises InvalidSettings for one that this kind of module does not have."""
    recipe: Recipe | SetRecipe = {**PRESETS, **SET_PRESETS}[arguments.preset]
    changes = {
        "num_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "warmup_steps": arguments.warmup_steps,
        "cooldown_steps": arguments.cooldown_steps,
        "clip_norm": arguments.clip_norm,
        "module_seed": arguments.seed,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    known = {field.name for field in dataclasses.fields(recipe)}
    for name in changes if arguments.alphas is None or isinstance(recipe, Recipe) else ["alphas"]:
        if name not in known:
            raise InvalidSettings(name, getattr(arguments, name), f"left out: {arguments.preset} has no such part")
    recipe = dataclasses.replace(recipe, **changes)
    if arguments.alphas is not None and isinstance(recipe, Recipe):
        recipe = dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, alphas=tuple(arguments.alphas)))
    return recipe


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m jobs.train_reasoning", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--preset", choices=sorted({**PRESETS, **SET_PRESETS}), default="set")
    p.add_argument("--out", type=Path, help="folder of this run (default runs/reasoning-PRESET); resumes from it")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    p.add_argument("--compile", action="store_true", help="torch.compile one block, for three lengths; falls back")
    p.add_argument("--max-seconds", type=float, default=float("inf"), help="stop, saved, after so long")
    p.add_argument("--stop-after", type=int, metavar="STEPS", help="be done then, though the preset has more")
    p.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS")
    p.add_argument("--export-dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    p.add_argument("--copy-to", type=Path, help="a second folder for weights (15 MiB a file), card, log and picture")
    p.add_argument("--warm-start", type=Path, help="exported weights to go on from where OUT has no checkpoint")
    p.add_argument("--restart", action="store_true", help="forget OUT's checkpoint")
    recipe = p.add_argument_group("changes to the preset's recipe")
    recipe.add_argument("--steps", type=int)
    recipe.add_argument("--learning-rate", type=float)
    recipe.add_argument("--warmup-steps", type=int)
    recipe.add_argument("--cooldown-steps", type=int)
    recipe.add_argument("--clip-norm", type=float)
    recipe.add_argument("--alphas", type=float, nargs="+", help="each sequence takes one of them")
    recipe.add_argument("--seed", type=int, help="of the initial weights")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parser().parse_args(argv)
    out = arguments.out or Path("runs") / f"reasoning-{arguments.preset}"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if arguments.restart:
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
    try:
        done = train(
            recipe_of(arguments),
            out,
            command="python -m jobs.train_reasoning " + shlex.join(argv),
            preset=arguments.preset,
            device=arguments.device,
            precision=arguments.precision,
            compile_blocks=arguments.compile,
            checkpoint_every=arguments.checkpoint_every,
            stop_at=began + arguments.max_seconds,
            stop_after=arguments.stop_after,
            dtype=getattr(torch, arguments.export_dtype),
            copies=arguments.copy_to,
            warm_start=arguments.warm_start,
        )
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
