"""Accuracy of few-shot classification of pictures and sounds, all classes of a set at once.

Pictures go through the encoder `pixels`, sounds through Whisper's (needs the extra `audio`); train and test are those
of the file, or halves. Ours is the shipped module, against it scikit-learn's three on the same vectors (the best by its
mean at each size, chosen afterwards).

    python -m benchmarks.media --data DIR --json benchmarks/results/media.json
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from benchmarks import report, sides
from benchmarks.datasets import PictureSet, balanced_draw, split_vectors
from benchmarks.sides import CLASSIFIERS, Cell
from benchmarks.tally import Tally, accuracy_row
from metasepia.errors import NotSupported
from metasepia.modalities.loading import WHISPER_PACKAGE, load
from metasepia.modalities.media import MediaEncoder
from metasepia.modalities.sounds import Samples
from metasepia.reasoning import shipped

OURS = "ours"


def read_pictures(path: Path, encoder: MediaEncoder) -> PictureSet | None:
    """The set of one file with columns image (uint8, row-major), height, width, label; None where it has none."""
    names = pq.read_schema(path).names
    if not {"image", "height", "width", "label"} <= set(names):
        return None
    rows = pq.read_table(path).to_pylist()
    pixels = [np.frombuffer(row["image"], np.uint8).reshape(row["height"], row["width"], -1) for row in rows]
    scale = 255 / max(1, max(int(one.max()) for one in pixels))  # digits8x8 goes from 0 to 16
    files = [_png((one * scale).astype(np.uint8)) for one in pixels]
    return _split(path.stem, encoder.embed(files), rows)


def read_sounds(path: Path, encoder: MediaEncoder) -> PictureSet | None:
    """The set of one file with columns audio (from -1 to 1), sampling_rate and label; None where it has none."""
    if not {"audio", "sampling_rate", "label"} <= set(pq.read_schema(path).names):
        return None
    rows = pq.read_table(path).to_pylist()
    sounds = [Samples(np.asarray(row["audio"], np.float32), row["sampling_rate"]) for row in rows]
    console = Console(stderr=True)
    vectors = [encoder.embed([one])[0] for one in track(sounds, f"{path.stem}: vectors", console=console)]
    return _split(path.stem, np.stack(vectors), rows)


def _split(name: str, vectors: np.ndarray, rows: Sequence[dict]) -> PictureSet:
    labels = np.array([str(row.get("label_name", row["label"])) for row in rows])
    return split_vectors(name, vectors, labels, [row.get("split", "all") for row in rows])


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files")
    parser.add_argument("--each", default="1,2,5,10", help="numbers of examples a class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", type=int, default=500, help="held-out items a set, the same for every seed")
    parser.add_argument("--module", default="default", help="a shipped name or a folder")
    parser.add_argument("--audio", default=f"package:{WHISPER_PACKAGE}", help="source of the sounds' encoder")
    parser.add_argument("--dev", action="store_true", help="train splits alone, halved")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    started_on = report.machine()
    module = shipped.load(arguments.module)
    judges = {OURS: sides.of_module(module), **sides.of_classifiers()}
    files = sorted(arguments.data.glob("*.parquet"))
    pixels = load("image", "pixels")
    sets = [(one, "pixels") for path in files if (one := read_pictures(path, pixels)) is not None]
    try:
        whisper = load("audio", arguments.audio)
        sets += [(one, "Whisper") for path in files if (one := read_sounds(path, whisper)) is not None]
    except NotSupported as error:
        print(f"sounds left out: {error}")
    rows = []
    for whole, by in sets:
        one = whole.within_train() if arguments.dev else whole
        tally, classes = Tally(), sorted(set(one.train_labels.tolist()))
        judged = np.random.default_rng(0).permutation(len(one.test))[: arguments.test]
        for num_each in map(int, arguments.each.split(",")):
            for seed in range(arguments.seeds):
                drawn = balanced_draw(one.train_labels.tolist(), num_each, seed)
                cell = Cell(
                    vectors=one.train[drawn],
                    labels=one.train_labels[drawn].tolist(),
                    test=one.test[judged],
                    truth=one.test_labels[judged].tolist(),
                    seed=seed,
                )
                tally.add(num_each, one.name, sides.judge(cell, judges))
        for num_each in tally.sizes:
            what = f"accuracy, {one.name} by {by}, {len(classes)} classes, {num_each} examples each"
            rows.append(accuracy_row(tally, num_each, OURS, CLASSIFIERS, id=f"media-{one.name}-{num_each}", what=what))
    report.publish("media", rows, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
