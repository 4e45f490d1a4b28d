"""Accuracy of few-shot text classification over the binary sets of a directory, several seeds, with no choosing.

Sides: the shipped reasoning module on the encoder's and on the backbone's embeddings; scikit-learn's LogisticRegression
(C=1), SVC and NearestCentroid on the same embeddings (the best of the three by its mean at each k, chosen afterwards);
the backbone's own in-context prompting on the same examples. The module never saw these data; nothing is tuned here.

    python -m benchmarks.classify --data DIR --k 16,32,64
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.svm import SVC
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import datasets, report
from benchmarks.datasets import TextSet
from benchmarks.prompting import InContextPrompting
from cluster import settings as settings_of
from metasepia import checkpoints, encoders
from metasepia.reasoning import shipped
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.shipped import LoadedModule

Embed = Callable[[Sequence[str]], np.ndarray]
CLASSIFIERS = {
    "LogisticRegression": lambda: LogisticRegression(C=1, max_iter=1000),
    "SVC": SVC,
    "NearestCentroid": NearestCentroid,
}


def embed_with_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16) -> Embed:
    """Mean over tokens of the last hidden states, unit norm: what the served graph does with `encoder: <backbone>`."""

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [tokenizer(text)["input_ids"] for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.zeros((len(ids), model.config.hidden_size), dtype=np.float32)
        for begin in range(0, len(order), batch):
            some = order[begin : begin + batch]
            width = max(len(ids[i]) for i in some)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in some])
            tokens = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in some])
            states = model.base_model(tokens, attention_mask=mask).last_hidden_state
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[some] = torch.nn.functional.normalize(means, dim=1).float().numpy()
        return vectors

    return embed


def accuracy_of_module(
    module: LoadedModule, train: np.ndarray, labels: Sequence[str], test: np.ndarray, truth: Sequence[str], seed: int
) -> float:
    context = compile_context(Context.of(train, labels, seed=seed), module)
    best = answer(module.module, [(context, test)])[0].argmax(1)
    return float(np.mean([context.classes[i] == y for i, y in zip(best, truth, strict=True)]))


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files")
    parser.add_argument("--k", default="16,32,64", help="numbers of labelled examples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=100, help="held-out texts a set, the same for every seed")
    parser.add_argument("--prompted", type=int, default=20, help="of these, how many the prompted backbone answers")
    parser.add_argument("--characters", type=int, default=100, help="texts are cut to this, as TART's scripts do")
    parser.add_argument("--module", default="default")
    parser.add_argument("--no-prompting", action="store_true", help="leave the slowest side out")
    arguments = parser.parse_args()
    started_on = report.machine()
    ks = [int(k) for k in arguments.k.split(",")]
    sets = datasets.read_all(arguments.data, num_labels=2)

    settings = settings_of.read("laptop")
    prepared = checkpoints.prepare(settings.backbones[0].source, settings.home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    prompting = InContextPrompting(model, tokenizer)
    embeds: dict[str, Embed] = {
        "encoder": encoders.load(settings.encoders[0].source).embed,
        "backbone": embed_with_backbone(model, tokenizer),
    }
    module = shipped.load(arguments.module)

    scores: dict[tuple[str, int], dict[str, list[float]]] = {}

    def score(side: str, k: int, name: str, value: float) -> None:
        scores.setdefault((side, k), {}).setdefault(name, []).append(value)

    began = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("classifying", total=len(sets) * arguments.seeds)
        for one in sets:
            cut = arguments.characters
            test = [(text[:cut], label) for text, label in one.sample_test(arguments.test, seed=0)]
            vectors = {source: embed([text for text, _ in test]) for source, embed in embeds.items()}
            for seed in range(arguments.seeds):
                run_one(one, seed, ks, arguments, embeds, module, prompting, score, test, vectors)
                progress.advance(task)
    report.publish(
        "classify", rows_of(scores, sets, ks, arguments, module), json_file=arguments.json, started_on=started_on
    )
    print(f"{len(sets)} sets, {arguments.seeds} seeds, {time.perf_counter() - began:.0f} s")


def run_one(one: TextSet, seed: int, ks, arguments, embeds, module, prompting, score, test, test_vectors_of) -> None:
    """Every side on one draw of one set."""
    examples = [(text[: arguments.characters], label) for text, label in one.draw(max(ks), seed)]
    texts, truth = [text for text, _ in test], [label for _, label in test]
    labels = [label for _, label in examples]
    for source, embed in embeds.items():
        train_vectors, test_vectors = embed([text for text, _ in examples]), test_vectors_of[source]
        for k in ks:
            value = accuracy_of_module(module, train_vectors[:k], labels[:k], test_vectors, truth, seed)
            score(f"module/{source}", k, one.name, value)
            for name, make in CLASSIFIERS.items():
                fitted = make().fit(train_vectors[:k], labels[:k])
                score(f"{name}/{source}", k, one.name, float(np.mean(fitted.predict(test_vectors) == truth)))
    if not arguments.no_prompting:
        asked, expected = texts[: arguments.prompted], truth[: arguments.prompted]
        for k, said in prompting.predict(examples, ks, asked).items():
            right = [a == b for a, b in zip(said, expected, strict=True)]
            score("prompting/backbone", k, one.name, float(np.mean(right)))


def rows_of(scores, sets: Sequence[TextSet], ks: Sequence[int], arguments, module: LoadedModule) -> list[report.Row]:
    """Mean accuracies over sets and seeds, ours against the best classifier and against prompting."""

    def mean(side: str, k: int) -> float:
        return float(np.mean([np.mean(values) for values in scores[side, k].values()]))

    rows = []
    for source in ("encoder", "backbone"):
        for k in ks:
            best = max(CLASSIFIERS, key=lambda name: mean(f"{name}/{source}", k))
            ours = scores[f"module/{source}", k]
            against = scores[f"{best}/{source}", k]
            lost = [s.name for s in sets if np.mean(ours[s.name]) < np.mean(against[s.name]) - 0.005]
            note = f"{module.name} against {best}; behind by over half a point on {len(lost)} of {len(sets)}"
            note += f": {', '.join(lost)}" if lost else ""
            what = f"mean accuracy, {source} embeddings, k = {k}"
            rows.append(
                report.rate(f"classify-{source}-{k}", what, mean(f"module/{source}", k), mean(f"{best}/{source}", k),
                            "accuracy", note)
            )  # fmt: skip
    if not arguments.no_prompting:
        for k in ks:
            note = f"module on the backbone's embeddings against the backbone prompted with the same {k} examples "
            note += f"(calibrated; {arguments.prompted} texts a set and seed)"
            rows.append(
                report.rate(f"prompting-{k}", f"mean accuracy, in-context prompting, k = {k}",
                            mean("module/backbone", k), mean("prompting/backbone", k), "accuracy", note)
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
