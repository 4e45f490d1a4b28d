"""Accuracy of a reasoning module on fresh synthetic problems, beside scikit-learn and the Bayes-optimal predictor.

    python -m jobs.evaluate_reasoning --module default
    python -m jobs.evaluate_reasoning --module runs/reasoning-small --write-readme

Problems are probabilistic logistic regression with seeds that training never uses; each has k examples and 64 queries.
Accuracy is the chance that a label drawn with its true probability is the predicted one, so label noise adds none.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from metasepia.digests import short
from metasepia.errors import MetasepiaError
from metasepia.reasoning import shipped
from metasepia.reasoning.shipped import LoadedModule
from metasepia.synthetic.oracles import bayes_optimal, expected_accuracy, logistic_regression
from metasepia.synthetic.tasks import Batch, ProbabilisticLogisticRegression, Seeds

SEEDS = Seeds(task=1_000_000, data=1_000_001, noise=1_000_002)
NUM_QUERIES = 64


@dataclass(frozen=True)
class Row:
    """Accuracies at one k; `margin` is two standard errors of module - scikit-learn, over problems."""

    k: int
    module: float
    scikit_learn: float
    margin: float
    bayes: float
    bayes_error: float
    knows_w: float


def evaluate(loaded: LoadedModule, k: int, num_problems: int = 200, *, with_bayes: bool = True) -> Row:
    """The same problems for every predictor."""
    task = ProbabilisticLogisticRegression(dims=loaded.module.shape.dims)
    batch = task.batch(SEEDS, k, num_sequences=num_problems, num_pairs=k + NUM_QUERIES)
    true = batch.probabilities[:, k:]
    ours = expected_accuracy(_module_probabilities(loaded, batch, k), true).mean(1)
    fitted = expected_accuracy(_fitted_probabilities(batch, k), true).mean(1)
    bayes, error = float("nan"), float("nan")
    if with_bayes:
        predictive = bayes_optimal(batch.x[:, :k], batch.y[:, :k], batch.x[:, k:])
        bayes, error = float(expected_accuracy(predictive.probabilities, true).mean()), predictive.standard_error
    margin = 2 * float((ours - fitted).std()) / num_problems**0.5
    knows = float(expected_accuracy(true, true).mean())
    return Row(k, float(ours.mean()), float(fitted.mean()), margin, bayes, error, knows)


def _module_probabilities(loaded: LoadedModule, batch: Batch, k: int) -> torch.Tensor:
    """By the compiled path, which the service uses; no reduction, the problems have the module's own dims."""
    rows = loaded.module.compile_rows([x[:k] for x in batch.x], [y[:k] for y in batch.y])
    return torch.sigmoid(torch.stack(loaded.module.answer(rows, [x[k:] for x in batch.x])))


def _fitted_probabilities(batch: Batch, k: int) -> torch.Tensor:
    x, y = batch.x.numpy(), batch.y.numpy()
    rows = [logistic_regression(a[:k], b[:k], a[k:]) for a, b in zip(x, y, strict=True)]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def table(rows: Sequence[Row]) -> str:
    """Markdown, for the card as for the eye; accuracies in per cent."""
    lines = [
        "| k | module | LogisticRegression(C=1) | module - LR | Bayes-optimal | knows w |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {r.k} | {100 * r.module:.1f} | {100 * r.scikit_learn:.1f} | "
        f"{100 * (r.module - r.scikit_learn):+.1f} ± {100 * r.margin:.1f} | {100 * r.bayes:.1f} | "
        f"{100 * r.knows_w:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def readme(loaded: LoadedModule, rows: Sequence[Row], command: str) -> str:
    """The module's card for people."""
    card, shape = loaded.card, loaded.module.shape
    recipe = card["recipe"]
    assert isinstance(recipe, dict)
    seeds = ", ".join(f"{name} {seed}" for name, seed in {"weights": recipe["module_seed"], **recipe["seeds"]}.items())
    return f"""# {loaded.name}

A reasoning module in the manner of TART (arXiv:2306.07536). It learned from synthetic logistic regression only, with
w ~ alpha N(0, I), alpha {", ".join(f"{a:g}" for a in recipe["task"]["alphas"])}; it has seen no real data.

| | |
| --- | --- |
| shape | {shape.dims} dims, {shape.pairs} pairs, {shape.layers} layers x {shape.width}, {shape.heads} heads |
| parameters | {sum(p.numel() for p in loaded.module.parameters()):,}, stored as {card["dtype"]} |
| digest | `{loaded.digest}` |
| command | `{card["command"]}` |
| steps | {card["step"]:,} of {recipe["batch_size"]} sequences, on {card["device"]}, {card["precision"]} |
| seeds | {seeds} |
| last loss | {card["final_loss"]:.4f} nats a label; `loss.jsonl` has every fiftieth step |
| licence | {card["licence"]} |

![loss](loss.png)

`{command}` prints this, in per cent, on fresh synthetic problems (± is two standard errors of the difference):

{table(rows)}
"""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m jobs.evaluate_reasoning", description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    p.add_argument("--module", default="default", help="default, a shipped name, or a folder")
    p.add_argument("--folder", type=Path, default=shipped.MODULES, help="where shipped modules lie")
    p.add_argument("--k", default="8,16,32", help="examples, separated by commas; at most the module's")
    p.add_argument("--problems", type=int, default=200)
    p.add_argument("--write-readme", action="store_true", help="write README.md into the module's folder")
    arguments = p.parse_args(argv)
    try:
        loaded = shipped.load(arguments.module, folder=arguments.folder)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    shape = loaded.module.shape
    print(f"{loaded.name} {short(loaded.digest)}: {shape.dims} dims, {shape.layers} layers x {shape.width}")
    print(f"{arguments.problems} fresh problems, {NUM_QUERIES} queries each; accuracy in per cent")
    rows = [evaluate(loaded, int(k), arguments.problems) for k in arguments.k.split(",")]
    print(table(rows))
    worst = max(row.bayes_error for row in rows)
    print(f"Bayes-optimal: elliptical slice sampling; standard error of one probability at most {worst:.3f}")
    if arguments.write_readme:
        command = f"python -m jobs.evaluate_reasoning --module {loaded.name} --problems {arguments.problems}"
        (shipped.folder_of(arguments.module, arguments.folder) / "README.md").write_text(readme(loaded, rows, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
