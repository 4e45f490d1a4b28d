"""Accuracy of a reasoning module on fresh synthetic problems of its kind, beside scikit-learn.

    python -m jobs.evaluate_reasoning --module default
    python -m jobs.evaluate_reasoning --module tart-paper --write-readme

Seeds are ones that training never uses. For the causal module problems are probabilistic logistic regression, the
Bayes-optimal predictor is shown too, and accuracy is the chance that a label drawn with its true probability is the
predicted one, so label noise adds none. For the set module they are binary problems with the geometry of embeddings,
and accuracy is counted on the labels as drawn.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.svm import SVC

from metasepia.digests import short
from metasepia.errors import MetasepiaError
from metasepia.reasoning import shipped
from metasepia.reasoning.calibration import expected_calibration_error
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.module import ReasoningModule
from metasepia.reasoning.set_module import SetModule, SetShape
from metasepia.reasoning.shipped import LoadedModule
from metasepia.synthetic.embeddings import EmbeddingLikeTasks
from metasepia.synthetic.oracles import bayes_optimal, expected_accuracy, logistic_regression
from metasepia.synthetic.tasks import Batch, ProbabilisticLogisticRegression, Seeds

SEEDS = Seeds(task=1_000_000, data=1_000_001, noise=1_000_002)
NUM_QUERIES = 64
SET_SOURCE = """The set module (`metasepia/reasoning/set_module.py`): examples are single tokens without order. It
learned from synthetic problems with the geometry of embeddings only (`metasepia/synthetic/embeddings.py`); it has
seen no real data. The ranges of those problems were chosen by looking at training splits of public text sets."""
CAUSAL_SOURCE = """The causal reasoning module of TART (arXiv:2306.07536), smaller than the paper's of 16 dims, 258
pairs and 12 layers x 256: the preset `paper` trains that one on a GPU and was not run. It learned from synthetic
logistic regression only, with w ~ alpha N(0, I), alpha {alphas}; it has seen no real data."""


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
    assert isinstance(loaded.module, ReasoningModule)
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
    assert isinstance(loaded.module, ReasoningModule)
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


@dataclass(frozen=True, kw_only=True)
class SetRow:
    """Accuracies at one k; `margin` is two standard errors of module - LogisticRegression, over problems."""

    k: int
    module: float
    logistic_regression: float
    support_vectors: float
    centroids: float
    margin: float
    error: float
    """Expected calibration error of the module, 15 bins."""


def evaluate_set(loaded: LoadedModule, k: int, num_problems: int = 200) -> SetRow:
    """The same problems for every predictor, through the compiled path, which the service uses."""
    tasks = EmbeddingLikeTasks(examples=(k, k), binary_share=1.0, unlabelled_share=0.0, queries=NUM_QUERIES)
    tasks = dataclasses.replace(tasks, states=8 * 2 * (k + NUM_QUERIES))  # eight problems a batch
    right: dict[str, list[float]] = {"module": [], "lr": [], "svc": [], "nc": []}
    chances, truths = [], []
    for step in range(-(-num_problems // 8)):
        batch = tasks.batch(SEEDS, step)
        for x, y, queries, truth in zip(batch.x, batch.y, batch.queries, batch.hidden_labels, strict=True):
            if len(set(y.tolist())) < 2:
                continue
            context = Context.of(x.numpy(), ["ab"[i] for i in y.tolist()])
            chance = answer(loaded.module, [(compile_context(context, loaded), queries.numpy())])[0]
            chances.append(chance)
            truths.append(truth.numpy())
            right["module"].append(float((chance.argmax(1) == truth.numpy()).mean()))
            made = {"lr": LogisticRegression(C=1, max_iter=1000), "svc": SVC(), "nc": NearestCentroid()}
            for name, classifier in made.items():
                said = classifier.fit(x.numpy(), y.numpy()).predict(queries.numpy())
                right[name].append(float((said == truth.numpy()).mean()))
    margin = 2 * float(np.std(np.subtract(right["module"], right["lr"]))) / len(chances) ** 0.5
    error = expected_calibration_error(np.concatenate(chances), np.concatenate(truths))
    mean = {name: float(np.mean(values)) for name, values in right.items()}
    return SetRow(
        k=k,
        module=mean["module"],
        logistic_regression=mean["lr"],
        support_vectors=mean["svc"],
        centroids=mean["nc"],
        margin=margin,
        error=error,
    )


def set_table(rows: Sequence[SetRow]) -> str:
    """Markdown, accuracies and the calibration error in per cent."""
    lines = [
        "| k | module | LogisticRegression(C=1) | SVC | NearestCentroid | module - LR | calibration error |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {r.k} | {100 * r.module:.1f} | {100 * r.logistic_regression:.1f} | {100 * r.support_vectors:.1f} | "
        f"{100 * r.centroids:.1f} | {100 * (r.module - r.logistic_regression):+.1f} ± {100 * r.margin:.1f} | "
        f"{100 * r.error:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def readme(loaded: LoadedModule, table: str, command: str) -> str:
    """The module's card for people."""
    card, shape = loaded.card, loaded.module.shape
    recipe = card["recipe"]
    assert isinstance(recipe, dict)
    seeds = ", ".join(f"{name} {seed}" for name, seed in {"weights": recipe["module_seed"], **recipe["seeds"]}.items())
    if isinstance(shape, SetShape):
        source = SET_SOURCE
        size = f"{shape.layers} layers x {shape.width}, {shape.heads} heads; any width, any number of classes"
        steps, unit = f"{card['step']:,}, about {recipe['tasks']['states']:,} tokens times classes each", "of a guess's"
    else:
        alphas = ", ".join(f"{a:g}" for a in recipe["task"]["alphas"])
        source = CAUSAL_SOURCE.format(alphas=alphas)
        size = f"{shape.dims} dims, {shape.pairs} pairs, {shape.layers} layers x {shape.width}, {shape.heads} heads"
        steps, unit = f"{card['step']:,} of {recipe['batch_size']} sequences", "nats a label"
    first, before = "", card.get("began_from")
    while isinstance(before, dict):
        first += f"\n| after | `{before['command']}`, {before['step']:,} steps |"
        before = before.get("began_from")
    return f"""# {loaded.name}

{source}

| | |
| --- | --- |
| shape | {size} |
| parameters | {sum(p.numel() for p in loaded.module.parameters()):,}, stored as {card["dtype"]} |
| digest | `{loaded.digest}` |
| command | `{card["command"]}` |{first}
| steps | {steps}, on {card["device"]}, {card["precision"]} |
| seeds | {seeds} |
| last loss | {card["final_loss"]:.4f} {unit}; `loss.jsonl` has every fiftieth step |
| licence | {card["licence"]} |

![loss](loss.png)

`{command}` prints this, in per cent, on fresh synthetic problems (± is two standard errors of the difference):

{table}
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
    print(
        f"{loaded.name} {short(loaded.digest)}: {arguments.problems} fresh problems of {NUM_QUERIES} queries, per cent"
    )
    ks = [int(k) for k in arguments.k.split(",")]
    if isinstance(loaded.module, SetModule):
        printed = set_table([evaluate_set(loaded, k, arguments.problems) for k in ks])
        print(printed)
    else:
        rows = [evaluate(loaded, k, arguments.problems) for k in ks]
        printed = table(rows)
        print(printed)
        worst = max(row.bayes_error for row in rows)
        print(f"Bayes-optimal: elliptical slice sampling; standard error of one probability at most {worst:.3f}")
    if arguments.write_readme:
        changes = f"--module {loaded.name} --k {arguments.k} --problems {arguments.problems}"
        text = readme(loaded, printed, f"python -m jobs.evaluate_reasoning {changes}")
        (shipped.folder_of(arguments.module, arguments.folder) / "README.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
