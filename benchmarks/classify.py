"""Accuracy of few-shot classification over the sets of a directory, several seeds, with no choosing.

Ours is the shipped reasoning module, which never saw these data. Against it stand scikit-learn's LogisticRegression
(C=1), SVC and NearestCentroid on the same vectors (the best of the three by its mean, chosen afterwards), and a
backbone's own in-context prompting. Parts, in this order; each prints its table and replaces its own rows in the JSON
file when it is done:

    minilm       the sets of two classes, the encoder's vectors, k labelled examples; calibration
    unlabelled   the same, with unlabelled texts of the train split given to our context
    multi-class  the sets of more classes, so many examples of each
    digits       sets of pictures as pixel vectors, all pairs of classes
    smollm2      the sets of two classes, the backbone's vectors against prompting it with the same examples (slow)
    gaps         TART's two gaps, of the representation (fine-tuning beyond a probe) and of reasoning (the probe beyond
                 prompting); slow

    python -m benchmarks.classify --data DIR --json benchmarks/results/classify.json

`--dev` looks at train splits alone, halved: for choosing between modules. A set too small for some k is left out there
and named. Vectors are kept under METASEPIA_HOME, so that a second run is quick.
"""

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks import datasets, parts, report
from metasepia.reasoning import shipped

PARTS = {
    "minilm": parts.binary,
    "unlabelled": parts.binary,
    "multi-class": parts.many_classes,
    "digits": parts.pictures,
    "smollm2": parts.against_prompting,
    "gaps": parts.both_gaps,
}


def numbers(text: str) -> list[int]:
    return sorted({int(number) for number in text.split(",")})


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files")
    report.add_parts(parser, PARTS)
    parser.add_argument("--dev", action="store_true", help="train splits alone, halved")
    parser.add_argument("--k", type=numbers, default="16,32,64,128,256", help="numbers of examples, two classes")
    parser.add_argument("--each", type=numbers, default="5,10", help="numbers of examples a class, many classes")
    parser.add_argument("--picture-k", type=int, default=32, help="number of examples, pictures")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", type=int, default=500, help="held-out examples a set, the same for every seed")
    parser.add_argument("--unlabelled", type=int, default=500, help="unlabelled texts given to a context")
    parser.add_argument("--characters", type=int, help="cut texts to this; without, whole up to the window")
    parser.add_argument("--prompt-k", type=numbers, default="16,32", help="numbers of examples in a prompt")
    parser.add_argument("--prompted", type=int, default=40, help="texts a set and seed asked by prompt")
    parser.add_argument("--gap-k", type=int, default=256, help="examples that the encoder is fine-tuned on")
    parser.add_argument("--gap-test", type=int, default=200, help="held-out texts a set for the representation gap")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning")
    parser.add_argument("--module", default="default", help="a shipped name or a folder")
    parser.add_argument("--beside", default="tart-paper", help="modules shown beside it, with commas; may be empty")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    disable_progress_bar()  # transformers' own, of loading weights
    started_on, began = report.machine(), time.perf_counter()
    sets = datasets.read_all(arguments.data)
    if arguments.characters:
        sets = [one.cut(arguments.characters) for one in sets]
    if arguments.dev:
        sets = [one.within_train() for one in sets]
    module = shipped.load(arguments.module)
    beside = [shipped.load(name) for name in arguments.beside.split(",") if name]
    others = [other for other in beside if other.digest != module.digest]
    with Progress(console=Console(stderr=True)) as progress:
        run = parts.Run(arguments=arguments, sets=sets, module=module, others=others, progress=progress)
        for part in dict.fromkeys(PARTS[name] for name in arguments.parts):
            if rows := part(run):  # published at once: a run that is stopped leaves the parts that it finished
                report.publish("classify", rows, json_file=arguments.json, started_on=started_on)
    print(f"{module.name}: {len(sets)} sets, {arguments.seeds} seeds, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
