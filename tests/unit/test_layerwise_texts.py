"""Folders of texts in every form, and which of them are held out."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metasepia.errors import InvalidSettings
from metasepia.layerwise.texts import TextSettings
from metasepia.layerwise.texts import read as read_texts

Checkpoint = Callable[[str], Path]
SEQUENCES = [tuple(range(5, 5 + n)) for n in (9, 1, 17, 4)]


ROWS = [{"text": f"{task} number {i}", "label": task, "template": f"t{i % 2}"} for task in "ab" for i in range(6)]


def as_jsonl(rows: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n\n"


def as_csv(rows: list[dict[str, str]], between: str = ",") -> str:
    return "\r\n".join(between.join(row) for row in [list(rows[0]), *[list(row.values()) for row in rows]])


def test_every_form_gives_the_same_texts(tmp_path: Path):
    forms = {}
    for name, content in (
        ("one.jsonl", as_jsonl(ROWS)), ("one.csv", "\ufeff" + as_csv(ROWS)), ("one.tsv", as_csv(ROWS, "\t"))
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content, encoding="utf-8")
        forms[name] = read_texts(tmp_path / name, TextSettings())
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "parquet" / "one.parquet")
    forms["parquet"] = read_texts(tmp_path / "parquet", TextSettings())
    for task in "ab":
        for template in ("t0", "t1"):
            (tmp_path / "folders" / task).mkdir(parents=True, exist_ok=True)
            lines = [row["text"] for row in ROWS if (row["label"], row["template"]) == (task, template)]
            (tmp_path / "folders" / task / f"{template}.txt").write_text("\r\n\r\n".join(lines))
    forms["folders"] = read_texts(tmp_path / "folders", TextSettings())
    assert len({one.digest for one in forms.values()}) == 1
    assert forms["folders"].names == ("a", "b")
    assert len(forms["folders"].texts) == 12
    assert forms["folders"].inputs == ()
    found = read_texts(tmp_path / "folders", TextSettings(within="line"))
    by_hand = {row["text"]: str(2 * (i % 6 // 2) + 1) for i, row in enumerate(ROWS)}  # every other line is empty
    assert found.inputs == tuple(by_hand[text] for text in found.texts)
    found = read_texts(tmp_path / "one.csv", TextSettings(within="template", template_column="label"))
    assert found.inputs == tuple(row["template"] for row in sorted(ROWS, key=lambda row: row["text"]))


def test_a_task_is_the_file_where_there_are_several_and_the_label_where_asked(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(as_jsonl(ROWS))
    (tmp_path / "y.txt").write_text("".join(f"line {i}\n" for i in range(5)))
    assert read_texts(tmp_path, TextSettings()).names == ("x", "y")
    with pytest.raises(InvalidSettings, match="5 texts of 17 have no label"):
        read_texts(tmp_path, TextSettings(task_by="label"))


def test_rows_are_chosen_by_where_and_columns_by_name(tmp_path: Path):
    rows = [
        {"q": f"question {i} {c}", "kind": c, "split": s} for i in range(5) for c in "ab" for s in ("train", "test")
    ]
    rows = [{**row, "q": row["q"] + row["split"]} for row in rows]
    (tmp_path / "x.jsonl").write_text(as_jsonl(rows))
    found = read_texts(tmp_path, TextSettings(text_column="q", label_column="kind", where=(("split", "train"),)))
    assert found.names == ("a", "b")
    assert all(text.endswith("train") for text in found.texts)
    assert len(found.texts) == 10


def test_repeated_and_ambiguous_texts_are_left_out_and_told(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"a {i}\n" for i in range(5)) + "a 0\nboth\n")
    (tmp_path / "b.txt").write_text("".join(f"b {i}\n" for i in range(5)) + "both\n")
    (tmp_path / "README.md").write_text("not a task")
    found = read_texts(tmp_path, TextSettings())
    assert "both" not in found.texts
    assert len(found.texts) == 10
    assert [note.split()[0] for note in found.notes] == ["not", "1", "1"]


def test_the_limit_takes_of_every_template_alike_and_depends_on_the_seed_alone(tmp_path: Path):
    sizes = {"t0": 40, "t1": 8, "t2": 8}
    for task in "ab":
        (tmp_path / task).mkdir()
        for template, size in sizes.items():
            (tmp_path / task / f"{template}.txt").write_text("".join(f"{task} {template} {i}\n" for i in range(size)))
    found = read_texts(tmp_path, TextSettings(limit=12))
    pairs = list(zip(found.tasks, found.templates, strict=True))
    assert {pair: pairs.count(pair) for pair in set(pairs)} == {(t, s): 4 for t in "ab" for s in sizes}
    assert read_texts(tmp_path, TextSettings(limit=12)).digest == found.digest
    assert read_texts(tmp_path, TextSettings(limit=12, seed=1)).digest != found.digest
