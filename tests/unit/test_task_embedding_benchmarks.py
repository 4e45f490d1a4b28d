"""What the task-embedding benchmark judges by: closed forms, and that its tasks share no text."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import task_embeddings_prompts as prompts
from benchmarks import task_embeddings_same_task as same_task
from benchmarks import task_embeddings_tasks as tasks
from benchmarks import task_embeddings_transfer as transfer
from benchmarks.task_embeddings_vectors import gram
from benchmarks.task_embeddings_wordings import TEN, THREE
from metasepia.embedding.answers import Answers


def test_ndcg_is_one_for_the_right_order_and_what_the_formula_says_for_its_reverse():
    gains = np.array([0.3, 0.1, 0.0])
    assert transfer.ndcg(np.array([3.0, 2, 1]), gains) == pytest.approx(1)
    discounts = 1 / np.log2([2, 3, 4])
    reverse = (0 * discounts[0] + 0.1 * discounts[1] + 0.3 * discounts[2]) / (0.3 * discounts[0] + 0.1 * discounts[1])
    assert transfer.ndcg(np.array([1.0, 2, 3]), gains) == pytest.approx(reverse)


def test_random_ndcg_is_the_mean_over_all_orders():
    from itertools import permutations

    gains = np.array([0.2, -0.1, 0.05, 0.0])
    orders = [transfer.ndcg(np.array(order, float), gains) for order in permutations(range(4))]
    assert transfer.random_ndcg(gains) == pytest.approx(np.mean(orders))


def test_ties_share_the_places_of_the_best_source():
    assert transfer.rank_of_best(np.array([1.0, 1, 1]), np.array([0.0, 0.5, 0.1])) == 2
    assert transfer.rank_of_best(np.array([0.0, 1, 2]), np.array([0.0, 0.5, 0.1])) == 2


def test_area_is_the_share_of_pairs_in_order_with_ties_half():
    above, below = np.array([0.5, 0.9]), np.array([0.5, 0.1, 0.95])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in above for b in below]
    assert same_task.area(above, below) == pytest.approx(np.mean(pairs))


def test_gram_does_not_change_when_labels_are_permuted_or_renamed_and_is_one_for_itself():
    rng = np.random.default_rng(0)
    texts = tuple(f"text {i}" for i in range(40))
    drawn = rng.dirichlet(np.ones(3), size=40)
    first = Answers.of_probabilities(texts, ["a", "b", "c"], drawn)
    turned = Answers.of_probabilities(texts, ["z", "x", "y"], drawn)
    other = Answers.of_probabilities(texts, ["a", "b"], rng.dirichlet(np.ones(2), size=40))
    found = gram([first, turned, other])
    np.testing.assert_allclose(found[0, 1], 1, atol=1e-5)
    np.testing.assert_allclose(found[0, 2], found[1, 2], atol=1e-6)


def test_gram_refuses_answers_to_other_texts():
    one = Answers.of_labelled(["a", "b", "c"], ["x", "y", "x"])
    other = Answers.of_labelled(["d", "e", "f"], ["x", "y", "x"])
    with pytest.raises(AssertionError, match="one set of texts"):
        gram([one, other])


def test_a_query_without_its_task_among_the_candidates_asks_nothing():
    similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    judged = same_task.judge(similarity, ["a0", "a1", "b"], ["a", "a", "b"], lambda q, c: True)
    assert judged.families == ("a", "a") and judged.hits.all()
    alone = same_task.judge(similarity, ["a0", "a1", "b"], ["a", "a", "b"], lambda q, c: (q, c) != (0, 1))
    assert alone.families == ("a",)


def test_a_family_counts_once_however_many_queries_it_has():
    judged = same_task.Judged(np.array([1.0, 1, 1, 0]), ("many", "many", "many", "one"), 0.5, ())
    assert judged.mean() == pytest.approx(0.5)


def sharp(rows: list[int], num_labels: int = 2, sure: float = 0.9) -> np.ndarray:
    probabilities = np.full((len(rows), num_labels), (1 - sure) / (num_labels - 1))
    probabilities[np.arange(len(rows)), rows] = sure
    return np.log(probabilities)


def test_baselines_of_prompts_are_what_their_formulas_say():
    balanced, stuck = sharp([0, 1, 0, 1]), sharp([0, 0, 0, 0])
    found = prompts.baselines([balanced, stuck, balanced], [10.0, 20.0, 30.0])
    each = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(found["mutual information"], [np.log(2) - each, 0, np.log(2) - each], atol=1e-9)
    np.testing.assert_allclose(found["global entropy"], [np.log(2), 0, np.log(2)], atol=1e-9)
    np.testing.assert_allclose(found["MDL"], [-each] * 3, atol=1e-9)
    np.testing.assert_allclose(found["perplexity"], [-10, -20, -30])
    np.testing.assert_allclose(found["ZPS, majority"], [1, 0.5, 1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, rows: list[dict[str, str]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")

    words = [f"{a} {b}" for a in ("good", "bad", "fine", "poor") for b in "abcdefghijklmnop"]
    reviews = [
        {"text": f"{w} film {i}", "label_name": "positive" if w[0] in "gf" else "negative", "split": "train"}
        for i, w in enumerate(words)
    ]
    held = [{**row, "text": row["text"] + " indeed", "split": "test"} for row in reviews[::3]]
    write("sst2", reviews + held)
    write("rotten_tomatoes", [{**row, "text": row["text"].upper() + "!"} for row in reviews[:8]] + reviews[8:] + held)
    fine = ["NUM:count" if i % 2 else "NUM:date" for i in range(60)]
    questions = [{"text": f"what is thing {i}", "label_name": "number" if i % 3 else "human"} for i in range(60)]
    asked = [{**row, "split": "train" if i < 48 else "test", "extra": fine[i]} for i, row in enumerate(questions)]
    write("trec", asked)
    return tmp_path


def test_no_text_is_in_two_data_sets_of_a_family_or_in_a_half_and_held_out(folder: Path):
    found = {task.name: task for task in tasks.read_tasks(folder)}
    assert found["rotten_tomatoes"].family == found.get("sst2", found["rotten_tomatoes"]).family == "sentiment"
    seen: dict[str, set[str]] = {}
    for name in ("rotten_tomatoes", "sst2"):
        if name in found:
            own = {tasks.plain(text) for half in found[name].halves for text, _ in half}
            assert not own & seen.setdefault("sentiment", set())
            assert not own & {tasks.plain(text) for text, _ in found[name].held_out}
            seen["sentiment"] |= own


def test_fine_labels_stand_on_other_texts_than_the_coarse_half_of_the_same_number(folder: Path):
    found = {task.name: task for task in tasks.read_tasks(folder)}
    coarse, fine = found["trec"], found["trec_fine"]
    assert coarse.family == fine.family
    for half in (0, 1):
        assert not {text for text, _ in coarse.halves[half]} & {text for text, _ in fine.halves[half]}
    assert set(fine.labels) == {"NUM:count", "NUM:date"}


def test_halves_begin_balanced(folder: Path):
    task = next(task for task in tasks.read_tasks(folder, rules=False) if task.family == "sentiment")
    beginning = [label for _, label in task.halves[0][:6]]
    assert beginning.count("positive") == 3


def test_every_wording_asks_once_and_has_a_word_for_every_label_of_its_data_set():
    for source in (TEN, THREE):
        for name, wordings in source.items():
            labels = {frozenset(one.words) for one in wordings}
            assert len(labels) == 1, name
            for one in wordings:
                assert one.template.count("{text}") == 1 and not one.template.endswith(" ")
                assert len(set(one.words.values())) == len(one.words)
    assert all(len(ten) == 10 for ten in TEN.values())


def test_tasks_for_choosing_settings_are_not_among_the_reported_ones():
    assert not set(transfer.DEV_TARGETS) & set(transfer.TARGETS)
    assert set(prompts.DEV_TASKS) <= set(TEN) and len(set(TEN) - set(prompts.DEV_TASKS)) >= 4


def test_open_tasks_come_in_halves_and_those_of_one_reply_are_left_out(tmp_path: Path):
    rows = [{"task": "shout", "input": f"w{i}", "output": f"W{i}", "dataset": "d"} for i in range(10)]
    rows += [{"task": "same", "input": f"w{i}", "output": "yes", "dataset": "d"} for i in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "open.parquet")
    found = tasks.read_open(tmp_path / "open.parquet", by="task")
    assert [(one.name, len(one.pairs)) for one in found] == [("shout, half 0", 5), ("shout, half 1", 5)]
    assert not {text for text, _ in found[0].pairs} & {text for text, _ in found[1].pairs}


def test_gains_are_read_again_from_their_file_and_a_source_of_the_same_question_gains(tmp_path: Path):
    rng = np.random.default_rng(0)
    direction = rng.normal(size=24)
    vectors: dict[str, np.ndarray] = {}

    def make(name: str, way: np.ndarray, count: int = 260) -> tasks.LabelledTask:
        examples = []
        for i in range(count):
            text = f"{name} text {i}"
            vector = rng.normal(size=24)
            vectors[text] = (vector / np.linalg.norm(vector)).astype(np.float32)
            examples.append((text, "yes" if vectors[text] @ way > 0 else "no"))
        a, b, held = examples[:90], examples[90:180], examples[180:]
        return tasks.LabelledTask(
            name=name, family=name, texts_of=name, halves=(tuple(a), tuple(b)), held_out=tuple(held)
        )

    made = [make("target", direction), make("helps", direction), make("else", rng.normal(size=24))]
    embed = lambda texts: np.stack([vectors[text] for text in texts])  # noqa: E731
    gains = transfer.truths(made, embed, ["target"], tmp_path, draws=4, per_class=4)
    assert gains.sources["target"] == ("helps", "else")
    assert gains.of("target")[0] > 0.05 and gains.of("target")[0] > gains.of("target")[1]
    (path,) = tmp_path.glob("transfer-target-*.json")
    kept = json.loads(path.read_text())
    kept["gains"] = [[9.0, 9.0]] * 4
    path.write_text(json.dumps(kept))
    assert transfer.truths(made, embed, ["target"], tmp_path, draws=4, per_class=4).of("target")[0] == 9
