import csv
import json
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.measure_diversity import halves, main, picture, reliability_of
from metasepia import encoders
from metasepia.embedding import store
from metasepia.embedding.answers import Answers
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.embedding.vendi import diversity

SPACE = Space(surrogate="a" * 64, method="agreement", settings={}, probes="b" * 64)


class Words:
    """An encoder in place of the real one: a direction for each word."""

    digest, width, window = "e" * 64, 16, 40

    def tokenize(self, texts):
        return [text.split() for text in texts]

    def embed(self, texts) -> np.ndarray:
        vectors = np.stack([sum((_word(word) for word in text.lower().split()), np.ones(16)) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _word(word: str) -> np.ndarray:
    return np.random.default_rng([ord(c) for c in word]).standard_normal(16)


def embedding(name: str, vector, space: Space = SPACE) -> TaskEmbedding:
    unit = (np.asarray(vector) / np.linalg.norm(vector)).astype(np.float32)
    return TaskEmbedding(space=space, vector=unit, kind="model", name=name, source={"num_texts": 7})


def collection(space: Space = SPACE) -> list[TaskEmbedding]:
    axes = np.eye(6)
    return [
        *(embedding(f"task {i}", axes[i], space) for i in range(5)),
        embedding("copy of 2", axes[2] + 0.05 * axes[5], space),
    ]


def write_table(path, rule, data_seed: int, count: int = 120) -> None:
    rng = np.random.default_rng(data_seed)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for _ in range(count):
            text = " ".join(rng.choice(["the", "a", "good", "bad", "film", "song", "why", "I", "you", "now"], 5))
            rows.writerow([text, rule(text)])


def test_a_stored_collection_is_measured_and_its_copy_is_named(tmp_path, capsys):
    store.write(str(tmp_path / "mine.parquet"), collection())
    assert main(["--embeddings", str(tmp_path / "mine.parquet"), "--out", str(tmp_path / "out"), "--show", "2"]) == 0
    words = capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "diversity.json").read_text())
    expected = diversity(np.stack([one.vector for one in collection()]))
    assert told["measured"]["score"] == pytest.approx(expected.score) and told["freed_of_noise"] is None
    assert set(told["least"]) == {"task 2", "copy of 2"} and set(told["most"]).isdisjoint(told["least"])
    assert "copy of 2: " in words and "nearest is task 2, cosine 1.00" in words
    rows = pq.read_table(tmp_path / "out" / "tasks.parquet").to_pylist()
    np.testing.assert_allclose([row["adds"] for row in rows], expected.adds, atol=1e-9)
    assert "copy of 2" in (tmp_path / "out" / "report.html").read_text()
    ET.fromstring((tmp_path / "out" / "picture.svg").read_text())


def test_a_store_of_several_spaces_asks_for_one(tmp_path, capsys):
    other = Space(surrogate="a" * 64, method="prefix", settings={}, probes="b" * 64)
    kept = store.EmbeddingStore(str(tmp_path / "store"))
    kept.add([*collection(), *collection(other)[:4]])
    out = ["--out", str(tmp_path / "out"), "--embeddings", str(tmp_path / "store")]
    assert main(out) == 2
    assert "(prefix)" in capsys.readouterr().err
    assert main([*out, "--space", other.digest[:10]]) == 0
    assert json.loads((tmp_path / "out" / "diversity.json").read_text())["measured"]["count"] == 4


def test_data_sets_are_embedded_and_those_that_tell_nothing_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoders.TextEncoder, "load", lambda *_, **__: Words())
    folder = tmp_path / "sets"
    folder.mkdir()
    write_table(folder / "mood.csv", lambda text: "yes" if "good" in text else "no", 0)
    write_table(folder / "mood_again.csv", lambda text: "1" if "good" in text else "0", 1)
    write_table(folder / "why.csv", lambda text: "question" if "why" in text else "other", 2)
    write_table(folder / "one_label.csv", lambda _: "same", 3)
    assert main(["--data-sets", str(folder / "*.csv"), "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "diversity.json").read_text())
    twins = {row["name"]: row["twin"] for row in told["tasks"]}
    assert twins["mood"] == "mood_again" and twins["mood_again"] == "mood"
    assert 1 < told["freed_of_noise"]["score"] < told["measured"]["score"] < 3
    assert all(row["halves_cosine"] > 0.3 for row in told["tasks"])
    assert "one_label is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--embeddings", "nothing.parquet"], "nothing"),
        (["--data-sets", "nothing/*.csv"], "nothing"),
        (["--embeddings", "x", "--order", "0"], "order"),
        (["--embeddings", "x", "--show", "0"], "show"),
        (["--data-sets", "x", "--most", "1"], "most"),
    ],
)
def test_what_cannot_be_measured_ends_with_words_and_status_two(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoders.TextEncoder, "load", lambda *_, **__: Words())
    assert main([*arguments, "--out", "out"]) == 2
    assert told in capsys.readouterr().err


def test_one_task_is_no_collection(tmp_path, capsys):
    store.write(str(tmp_path / "mine.parquet"), collection()[:1])
    assert main(["--embeddings", str(tmp_path / "mine.parquet"), "--out", str(tmp_path / "out")]) == 2
    assert "two tasks or more" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["--embeddings", "nothing.parquet", "--out", str(tmp_path / "out")]) == 2
    assert "this is a file" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_halves_share_every_label_and_no_example():
    answers = Answers.of_labelled([f"t{i}" for i in range(41)], ["a" if i < 30 else "b" for i in range(41)])
    one, other = halves(answers, 0)
    assert sorted(one.texts + other.texts) == sorted(answers.texts)
    assert abs(one.probabilities[:, 1].sum() - other.probabilities[:, 1].sum()) <= 1


def test_reliability_grows_with_what_the_halves_agree_on():
    found = reliability_of(np.array([-0.5, 0.0, 0.5, 1.0]))
    np.testing.assert_allclose(found, [0.02, 0.02, 2 / 3, 1], atol=1e-3)


def test_the_picture_of_many_tasks_shows_those_at_the_ends():
    vectors = np.random.default_rng(0).standard_normal((60, 30))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"<task> & {i}" for i in range(60)]
    measured = diversity(vectors)
    drawn = picture(names, vectors, measured).decode()
    shown = {element.text for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert names[measured.by_adds[0]] in shown and names[measured.by_adds[-1]] in shown
    assert len(shown & set(names)) == 40
