"""What benchmarks.media reads from Parquet files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import media
from metasepia.modalities.media import MediaEncoder
from metasepia.modalities.pixels import PixelEncoder


def test_pictures_are_scaled_to_their_largest_value_and_keep_their_splits(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 17, (6, 8, 8), dtype=np.uint8)
    pixels[0, 0, 0] = 16
    columns = {"image": [one.tobytes() for one in pixels], "height": [8] * 6, "width": [8] * 6, "label": [0, 1] * 3}
    columns["split"] = ["train"] * 4 + ["test"] * 2
    pq.write_table(pa.table(columns), tmp_path / "few.parquet")
    read = media.read_pictures(tmp_path / "few.parquet", PixelEncoder(8))
    assert read is not None and (read.train_labels.tolist(), read.test_labels.tolist()) == (list("0101"), list("01"))
    expected = pixels.reshape(6, 64) - pixels.reshape(6, 64).mean(axis=1, keepdims=True)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.concatenate([read.train, read.test]), expected, atol=0.01)  # rounded to 8 bits


class Loudness(MediaEncoder):
    modality, digest, width, window, max_batch_tokens = "audio", "0" * 64, 2, 1, 1

    def tokenize(self, items):
        raise AssertionError

    def forward(self, prepared):
        raise AssertionError

    def embed(self, items):
        return np.array([[np.abs(one.samples).max(), one.rate_hz] for one in items], np.float32)


def test_sounds_keep_their_rate_and_their_splits(tmp_path: Path):
    columns = {"audio": [[0.0, 0.5], [0.25], [-1.0, 0.0]], "sampling_rate": [8000, 8000, 16000], "label": [1, 0, 1]}
    pq.write_table(pa.table(columns | {"split": ["train", "train", "dev"]}), tmp_path / "few.parquet")
    read = media.read_sounds(tmp_path / "few.parquet", Loudness())
    assert read is not None
    assert read.train.tolist() == [[0.5, 8000], [0.25, 8000]] and read.test.tolist() == [[1, 16000]]
    assert media.read_pictures(tmp_path / "few.parquet", PixelEncoder(8)) is None
