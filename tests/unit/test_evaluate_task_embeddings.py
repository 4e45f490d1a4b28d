"""The job that says how embeddings move: what its changes keep, and that a run goes on where it was."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate_task_embeddings as job
from jobs.evaluate_task_embeddings import Change, Source
from metasepia.embedding.answers import Answers


class Letters:
    """An encoder of 26 letters' counts: cheap, and alike for alike texts."""

    digest, width, window = "3" * 64, 26, 512

    def embed(self, texts):
        counts = np.array([[text.lower().count(chr(97 + i)) + 0.01 for i in range(26)] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def tokenize(self, texts):
        return [[0] * len(text.split()) for text in texts]


def soft(name: str = "soft", count: int = 64) -> Source:
    rng = np.random.default_rng(len(name))
    answers = Answers.of_probabilities(
        tuple(f"{name} {i}" for i in range(count)), ["a", "b", "c"], rng.dirichlet(np.ones(3), size=count)
    )
    return Source(name=name, task=name, answers=answers)


def test_label_order_changes_columns_and_label_names_do_not():
    source = soft()
    names = job.changed(source, Change(kind="label names", level=1, seed=0))
    order = job.changed(source, Change(kind="label order", level=1, seed=0))
    assert names is not None and order is not None
    np.testing.assert_array_equal(names.probabilities, source.answers.probabilities)
    assert not np.array_equal(order.probabilities, source.answers.probabilities)
    np.testing.assert_allclose(np.sort(order.probabilities, 1), np.sort(source.answers.probabilities, 1), atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_label_order_is_never_the_one_that_was(seed: int):
    for count in (2, 3):
        answers = Answers.of_probabilities(
            ("x", "y"), [f"l{i}" for i in range(count)], np.random.default_rng(1).dirichlet(np.ones(count), size=2)
        )
        turned = job.changed(
            Source(name="s", task="s", answers=answers), Change(kind="label order", level=1, seed=seed)
        )
        assert turned is not None and not np.array_equal(turned.probabilities, answers.probabilities)


def test_drawn_answers_come_near_the_probabilities_as_draws_grow_and_carry_their_error():
    source = soft()
    few, many = (job.changed(source, Change(kind="samples", level=n, seed=0)) for n in (1, 64))
    assert few is not None and many is not None
    away = [np.abs(one.probabilities - source.answers.probabilities).mean() for one in (few, many)]
    assert away[1] < away[0] / 2
    assert few.standard_error is not None and many.standard_error is not None
    assert many.standard_error.mean() < few.standard_error.mean()


def test_temperature_zero_takes_the_likeliest_and_one_leaves_probabilities():
    given = np.array([[0.5, 0.3, 0.2]])
    np.testing.assert_array_equal(job.tempered(given, 0), [[1, 0, 0]])
    np.testing.assert_allclose(job.tempered(given, 1), given)
    np.testing.assert_allclose(job.tempered(given, 0.5), given**2 / (given**2).sum())


def test_what_does_not_apply_is_left_out_and_not_counted_as_unmoved():
    data_set = Source(name="d", task="d", answers=Answers.of_labelled(["a b", "c d", "e f"] * 8, ["x", "y", "x"] * 8))
    open_ones = Source(name="o", task="o", answers=Answers.of_replies([f"t{i}" for i in range(24)], list("abcd") * 6))
    for kind in ("samples", "temperature"):
        assert job.changed(data_set, Change(kind=kind, level=1, seed=0)) is None
    for kind in ("label names", "label order", "samples"):
        assert job.changed(open_ones, Change(kind=kind, level=1, seed=0)) is None
    assert job.changed(data_set, Change(kind="texts", level=512, seed=0)) is None
    assert job.changed(data_set, Change(kind="paraphrase", level=1, seed=0)) is None


def test_the_ratio_is_that_of_the_two_distances():
    row = {"method": "m", "kind": "half", "level": 0.5, "kept": True, "between": 0.2}
    rows = [row | {"source": name, "cosine": value} for name, value in (("a", 0.9), ("a", 0.7), ("b", 1.0))]
    (found,) = job.summary(rows)
    assert found["cosine"] == pytest.approx(0.9)  # sources count alike, however many seeds they have
    assert found["moved_over_apart"] == pytest.approx(0.1 / 0.8)


def test_levels_stand_in_order_whichever_source_came_first():
    row = {"method": "m", "kind": "temperature", "cosine": 0.5, "kept": True, "between": 0.2, "source": "a"}
    found = job.summary([row | {"level": level} for level in (0.5, 1.5, 0.0, 1.0)])
    assert [one["level"] for one in found] == [0.0, 0.5, 1.0, 1.5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name, letters in (("vowels", "aeiou"), ("early", "abcde"), ("late", "vwxyz")):
        texts = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 12)) for _ in range(160)]
        labels = ["many" if sum(c in letters for c in text) > 2 else "few" for text in texts]
        pq.write_table(pa.table({"text": texts, "label_name": labels}), data / f"{name}.parquet")
    return tmp_path


def test_a_folder_gives_table_summary_picture_and_words_and_goes_on_where_it_was(folder: Path):
    out = folder / "out"
    arguments = ["--data", str(folder / "data"), "--out", str(out), "--seeds", "1", "--probes", "64"]
    assert job.main(arguments, lambda _: Letters()) == 0
    rows = pq.read_table(out / "stability.parquet").to_pylist()
    unmoved = [row["cosine"] for row in rows if row["kind"] in ("text order", "label names", "label order")]
    assert len(unmoved) == 9 and min(unmoved) > 0.999
    moved = {row["source"]: row["cosine"] for row in rows if (row["kind"], row["level"]) == ("texts", 64)}
    assert set(moved) == {"vowels", "early", "late"} and max(moved.values()) < 0.999
    assert "moved / apart" in (out / "stability.md").read_text()
    assert (out / "stability.png").stat().st_size > 10_000
    kept = sorted((out / "cells").iterdir())
    altered = json.loads(kept[0].read_text())
    altered["rows"][0]["cosine"] = 0.123
    kept[0].write_text(json.dumps(altered))
    assert job.main(arguments, lambda _: Letters()) == 0
    assert 0.123 in [row["cosine"] for row in pq.read_table(out / "stability.parquet").to_pylist()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "fish"], "agreement, prefix, fisher"),
        (["--seeds", "0"], "at least 1"),
        (["--spec", "a.toml"], "together with --run"),
        (["--data", "/nowhere/at/all"], "a folder that is there"),
    ],
)
def test_bad_arguments_end_with_words(arguments: list[str], words: str, tmp_path: Path, capsys):
    assert job.main([*arguments, "--out", str(tmp_path)], lambda _: Letters()) == 2
    assert words in capsys.readouterr().err


def test_one_task_alone_is_refused_for_nothing_lies_apart(folder: Path, capsys):
    for name in ("early", "late"):
        (folder / "data" / f"{name}.parquet").unlink()
    assert job.main(["--data", str(folder / "data"), "--out", str(folder / "o")], lambda _: Letters()) == 2
    assert "two or more" in capsys.readouterr().err


def test_tables_that_cannot_be_used_are_told_and_the_others_are_sources(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    data = folder / "data"
    (data / "torn.parquet").write_bytes(b"PAR1 and nothing")
    pq.write_table(pa.table({"text": ["a", "b"], "other": ["x", "y"]}), data / "unlabelled.parquet")
    found = job.of_folder(data, 100, Letters())
    assert [(one.name, one.answers.num_texts) for one in found] == [("early", 100), ("late", 100), ("vowels", 100)]
    told = capsys.readouterr().err
    assert "torn is left out: " in told and "unlabelled is left out: " in told
