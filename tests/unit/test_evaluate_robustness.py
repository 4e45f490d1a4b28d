from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate_robustness as job
from jobs.perturbations import Pool
from metasepia.errors import InvalidSettings
from metasepia.reasoning.module import ModuleShape, ReasoningModule
from metasepia.reasoning.shipped import LoadedModule


@pytest.fixture(scope="module")
def loaded() -> LoadedModule:
    module = ReasoningModule(ModuleShape(dims=4, pairs=17, layers=1, width=16, heads=2), seed=1).requires_grad_(False)
    return LoadedModule("random", "0" * 64, module, {})


class Letters:
    """A text's vector counts its letters; counts the texts too."""

    def __init__(self) -> None:
        self.num_texts = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.num_texts += len(texts)
        return np.array([[text.count(letter) for letter in "abcdefgh"] for text in texts], np.float32)


def write_texts(path: Path, num: int = 40, **columns: list[str]) -> Path:
    rng = np.random.default_rng(0)
    labels = ["ham" if i % 2 else "spam" for i in range(num)]
    texts = ["".join(rng.choice(list("abcd" if label == "ham" else "efgh"), size=12)) + f" {i}" for i, label in
             enumerate(labels)]  # fmt: skip
    table = {"text": texts, "label_name": labels, "split": ["train" if i < num // 2 else "test" for i in range(num)]}
    pq.write_table(pa.table(table | columns), path)
    return path


def measured(directory: Path, out: Path, loaded: LoadedModule, embed: job.Embed) -> list[dict]:
    return job.run(job.text_sets(directory, embed, 8, 100), [4], 1, loaded, embed, out)


def test_every_kind_and_level_is_measured_for_every_side(tmp_path: Path, loaded: LoadedModule):
    write_texts(tmp_path / "mail.parquet")
    rows = measured(tmp_path, tmp_path / "out", loaded, Letters().embed)
    wanted = {(kind, level, side) for kind, levels in job.LEVELS.items() for level in levels for side in job.SIDES}
    assert {(row["kind"], row["level"], row["side"]) for row in rows} == wanted
    plain = [r["accuracy"] for r in rows if r["side"] == "NearestCentroid" and r["level"] == job.LEVELS[r["kind"]][0]]
    assert plain == [1.0] * len(job.LEVELS)  # the letters tell the classes apart
    found = job.summary(rows)
    job.picture(found, 4, tmp_path / "out" / "picture.png", "tiny")
    assert (tmp_path / "out" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert job.table_of(found, 4).row_count == sum(map(len, job.LEVELS.values()))


def test_a_run_that_was_killed_goes_on_with_what_is_missing(tmp_path: Path, loaded: LoadedModule):
    write_texts(tmp_path / "mail.parquet")
    letters, out = Letters(), tmp_path / "out"
    rows = measured(tmp_path, out, loaded, letters.embed)
    num_texts, files = letters.num_texts, sorted((out / "cells").glob("*.json"))
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert measured(tmp_path, out, loaded, letters.embed) == rows
    assert letters.num_texts == num_texts  # nothing missing, nothing embedded
    files[5].unlink()
    (out / "cells" / "half.json.1.part").write_text("{")
    assert measured(tmp_path, out, loaded, letters.embed) == rows
    after = {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert [name for name in before if before[name] != after[name]] == [files[5].name]


def test_vectors_are_not_reworded(loaded: LoadedModule, tmp_path: Path):
    rng = np.random.default_rng(0)
    y = np.arange(30) % 2
    pool = Pool(train=rng.standard_normal((30, 4)).astype(np.float32), train_labels=y,
                test=rng.standard_normal((30, 4)).astype(np.float32), test_labels=y)  # fmt: skip
    source = job.Source("points", "0" * 64, False, lambda: pool)
    rows = job.run([source], [6], 1, loaded, Letters().embed, tmp_path)
    assert {row["kind"] for row in rows} == set(job.LEVELS) - set(job.TEXT_KINDS)


def test_the_loss_is_counted_against_the_same_draws():
    base = {"set": "s", "kind": "typos", "k": 4, "side": "module", "calibration_error": 0.1}
    accuracies = {(0, 0): 0.9, (0, 1): 0.5, (0.3, 0): 0.8, (0.3, 1): 0.3}
    rows = [base | {"level": level, "seed": seed, "accuracy": one} for (level, seed), one in accuracies.items()]
    last = job.summary(rows)[-1]
    assert (last["level"], last["num_draws"]) == (0.3, 2)
    assert (last["accuracy"], last["lost"], last["lost_error"]) == pytest.approx((0.55, 0.15, 0.05))


def test_a_directory_of_other_measurements_is_refused(tmp_path: Path):
    settings = {"module": "a", "ks": [4]}
    job.check_same_run(tmp_path, settings)
    job.check_same_run(tmp_path, settings)
    with pytest.raises(InvalidSettings, match="differ in module"):
        job.check_same_run(tmp_path, settings | {"module": "b"})


@pytest.mark.parametrize("labels", [["one"] * 40, ["one"] * 39 + ["two"]])
def test_a_set_that_teaches_nothing_is_refused_by_name(tmp_path: Path, labels: list[str]):
    path = write_texts(tmp_path / "dull.parquet", label_name=labels, split=["train"] * 40)
    with pytest.raises(InvalidSettings, match=r"dull\.parquet"):
        job.read_texts(path, Letters().embed, 8, 100)


def test_a_directory_without_sets_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "other.parquet")
    with pytest.raises(InvalidSettings, match="text, label_name, split"):
        job.text_sets(tmp_path, Letters().embed, 8, 100)


def test_the_sets_that_need_no_files_are_standardised_halves():
    for source in job.built_in():
        pool = source.load()
        assert set(pool.train_labels) == set(pool.test_labels) == set(range(pool.num_classes))
        np.testing.assert_allclose(pool.train.mean(0), 0, atol=1e-4)
