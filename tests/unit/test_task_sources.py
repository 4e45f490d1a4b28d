"""Tasks that read a user's files, make their questions by procedure, or are the user's own."""

import re
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.tasks import FROM_DATA, Example, ListedTask, make
from jobs.tasks.arc import Arc, chosen_letter
from jobs.tasks.gsm8k import final_number
from jobs.tasks.mbpp import code_of
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported, UnknownName

README = Path(__file__).parents[2] / "jobs/tasks/README.md"


def parquet(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def listed(name: str, data: Path) -> ListedTask:
    task = make(name, data)
    assert isinstance(task, ListedTask)
    return task


def prompts(task: ListedTask) -> dict[str, set[str]]:
    return {split: {one.prompt for one in examples} for split, examples in task.examples.items()}


# -- classification ----------------------------------------------------------------------------------------------------


def test_a_classification_task_is_read_alike_from_parquet_csv_and_json_lines(tmp_path: Path) -> None:
    rows = [(f"text {i}", ("good", "bad")[i % 2], ("train", "dev", "test")[i % 3]) for i in range(12)]
    texts, labels, splits = map(list, zip(*rows, strict=True))
    one = listed("classify", parquet(tmp_path / "a.parquet", text=texts, label=labels, split=splits))
    (tmp_path / "a.csv").write_text("text,label,split\n" + "".join(",".join(row) + "\n" for row in rows))
    lines = [f'{{"text": "{t}", "label": "{y}", "split": "{s}"}}\n' for t, y, s in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    for other in (tmp_path / "a.csv", tmp_path / "a.jsonl"):
        assert listed("classify", other) == one
    assert one.labels == ("bad", "good")
    assert [len(found) for found in prompts(one).values()] == [4, 4, 4]
    (example,) = one.held_out(1, 0)
    assert "bad or good" in example.prompt and example.text in example.prompt
    assert one.verify(f" {example.answer.upper()}.", example) and not one.verify("good or bad", example)


def test_without_a_valid_split_odd_training_rows_are_it_and_without_test_valid_is_judged_on(tmp_path: Path) -> None:
    texts, labels = [f"text {i}" for i in range(8)], ["x", "y"] * 4
    task = listed(
        "classify", parquet(tmp_path / "a.parquet", text=texts, label=labels, split=["train"] * 6 + ["test"] * 2)
    )
    assert [one.text for one in task.examples["train"]] == ["text 0", "text 2", "text 4"]
    task = listed(
        "classify", parquet(tmp_path / "b.parquet", text=texts, label=labels, split=["train"] * 6 + ["dev"] * 2)
    )
    assert [one.text for one in task.examples["test"]] == ["text 6", "text 7"]


def test_a_table_without_splits_is_cut_by_the_texts_alone_and_a_text_never_stands_in_two(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(100)]
    task = listed("classify", parquet(tmp_path / "a.parquet", text=texts + texts[:50], label=["x", "y"] * 75))
    again = listed("classify", parquet(tmp_path / "b.parquet", text=texts[::-1], label=["y", "x"] * 50))
    assert prompts(task) == prompts(again)
    assert sum(map(len, prompts(task).values())) == 100
    assert len(task.examples["train"]) > 3 * len(task.examples["test"]) / 2


def test_a_training_text_that_comes_again_in_test_is_left_out_of_test(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "a.parquet", text=["a", "b", "c", "d", "a", "e"], label=["x", "y"] * 3,
        split=["train", "train", "train", "train", "test", "test"],
    )  # fmt: skip
    assert [one.text for one in listed("classify", file).examples["test"]] == ["e"]


def test_a_pass_over_the_training_split_meets_every_example_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(60)]
    task = listed("classify", parquet(tmp_path / "a.parquet", text=texts, label=["x", "y"] * 30))
    size = len(task.examples["train"])
    first, second = (
        [task.batch("train", 1, 0, step)[0].text for step in range(t * size, (t + 1) * size)] for t in (0, 1)
    )
    assert len(set(first)) == size and set(first) == set(second) and first != second
    assert task.batch("train", 5, 0, 3) == task.batch("train", 5, 0, 3) != task.batch("train", 5, 1, 3)
    held_out = task.held_out(len(task.examples["test"]), 0)
    assert len({one.prompt for one in held_out}) == len(held_out)
    with pytest.raises(InvalidSettings, match=f"at most {len(held_out)}"):
        task.held_out(len(held_out) + 1, 0)


# -- gsm8k and arc -----------------------------------------------------------------------------------------------------


def test_gsm8k_is_read_from_its_own_layout_with_even_rows_trained_on(tmp_path: Path) -> None:
    worked = [f"He has {i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}" for i in range(6)]
    for split, part in (("train", slice(0, 4)), ("test", slice(4, 6))):
        questions = [f"Question {i}?" for i in range(6)][part]
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", question=questions, answer=worked[part])
    task = listed("gsm8k", tmp_path)
    assert [[one.text for one in task.examples[s]] for s in ("train", "valid", "test")] == [
        ["Question 0?", "Question 2?"], ["Question 1?", "Question 3?"], ["Question 4?", "Question 5?"],
    ]  # fmt: skip
    first = task.examples["train"][0]
    assert first.answer == "He has 0 + 1 = 1.\nThe answer is 1."
    assert task.verify("I think 7, no: #### 1", first) and not task.verify("#### 11", first)
    assert (task.reward("The answer is $1.", first), task.reward("", first)) == (1.0, -1.0)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3 + 4 = 7", "7"),
        ("The answer is 1,234.50. Is it 9?", "1234.5"),
        ("The answer is $-12", "-12"),
        ("#### 5\n6", "5"),
        ("none", None),
    ],
)
def test_the_final_number_of_an_answer(answer: str, number: str | None) -> None:
    assert final_number(answer) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (C). Not A", "C"),
        ("answer: B and not D", "B"),
        ("I weigh A against D", "D"),
        ("A. because it's B's", "A"),
        ("Apples and Bears", None),
        ("the answer is a mystery", None),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter


def test_arc_is_read_from_its_own_layout_with_numbered_choices_as_letters(tmp_path: Path) -> None:
    choices = [{"label": ["1", "2"], "text": ["ice", "fire"]}] * 5
    questions = [f"What is {i} like?" for i in range(5)]
    splits = ["train", "train", "validation", "test", "test"]
    keys = ["2", "1", "1", "2", "1"]
    file = parquet(tmp_path / "a.parquet", question=questions, choices=choices, answerKey=keys, split=splits)
    task = listed("arc_challenge", file)
    assert isinstance(task, Arc)
    (example,) = task.examples["train"]
    assert "What is 0 like?\nA. ice\nB. fire" in example.prompt and example.answer == "B"
    assert task.labels == ("A", "B") and len(task.examples["test"]) == 2
    assert not task.verify("no idea", example)
    guessing = {Arc(**{**vars(task), "guess_seed": seed}).verify("no idea", example) for seed in range(20)}
    assert guessing == {True, False}


# -- mbpp --------------------------------------------------------------------------------------------------------------


def test_mbpp_runs_the_program_of_an_answer_against_all_its_tests(tmp_path: Path) -> None:
    file = parquet(
        tmp_path / "a.parquet", text=["Double.", "Halve.", "Negate."], split=["train", "validation", "test"],
        code=["def f(x):\n\treturn 2 * x", "def f(x):\n    return x / 2", "def f(x):\n    return -x"],
        test_list=[[f"assert f(4) == {y}", f"assert f(0) == {z}"] for y, z in ((8, 0), (2, 0), (-4, 0))],
    )  # fmt: skip
    try:
        task = listed("mbpp", file)
    except NotSupported as error:
        pytest.skip(str(error))
    (example,) = task.batch("train", 1, 0, 0)
    assert "assert f(4) == 8" in example.prompt and "f(0)" not in example.prompt
    assert task.verify(example.answer, example)
    assert not task.verify("```python\ndef f(x):\n    return 8\n```", example)
    assert (task.reward("", example), task.reward("def f(x): return x + x", example)) == (-1.0, 1.0)


def test_the_code_of_an_answer_is_its_longest_fenced_block() -> None:
    assert code_of("Sure:\n```python\na = 1\nb = 2\n```\nor\n```\na\n```") == "a = 1\nb = 2\n"
    assert code_of("```py\na = 1") == "a = 1"
    assert code_of("a = 1") == "a = 1"


# -- reasoning-gym -----------------------------------------------------------------------------------------------------


def test_a_question_of_a_small_procedural_task_stands_in_one_split_only() -> None:
    task = make("gym:chain_sum,max_terms=2,max_digits=1")
    drawn = {
        split: {e.prompt for step in range(20) for e in task.batch(split, 8, 0, step)} for split in ("train", "valid")
    }
    held_out = {e.prompt for e in task.held_out(20, 0)}
    assert len(held_out) == 20 and len(drawn["train"]) > 50
    assert not drawn["train"] & drawn["valid"] and not (drawn["train"] | drawn["valid"]) & held_out
    assert task.batch("train", 4, 0, 1) == task.batch("train", 4, 0, 1) != task.batch("train", 4, 0, 2)


def test_a_procedural_answer_is_scored_by_the_dataset_itself() -> None:
    task = make("gym:chain_sum,max_terms=2,max_digits=1")
    (example,) = task.held_out(1, 0)
    assert task.verify(f" {example.answer}\n", example) and task.reward(example.answer, example) == 1.0
    assert -1 < task.reward(f"It is {example.answer}!", example) < 1
    assert task.reward("", example) == -1.0


def test_a_procedural_task_with_too_few_questions_says_so() -> None:
    with pytest.raises(InvalidSettings, match="at most about"):
        make("gym:chain_sum,max_terms=2,max_digits=1").held_out(150, 0)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "error", "words"),
    [
        ("chess", None, UnknownName, "arc_challenge, arc_easy"),
        ("gsm8k", None, InvalidSettings, "the file or directory that task gsm8k reads"),
        ("desk", Path("a"), InvalidSettings, "task desk needs none"),
        ("gym:chess", None, UnknownName, "ab, acre"),
        ("gym:chain_sum,terms=2", None, InvalidSettings, "fields that it takes"),
        ("gym:chain_sum,seed=2", None, InvalidSettings, "without seed"),
        ("gym:rush_hour", None, NotSupported, "without an answer"),
        ("nowhere:TASK", None, InvalidSettings, "can be imported"),
    ],
)
def test_a_name_that_makes_no_task_is_refused_in_words(name: str, data: Path | None, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make(name, data)


@pytest.mark.parametrize("name", FROM_DATA)
def test_missing_empty_or_foreign_data_are_refused_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="a file or directory that exists"):
        make(name, tmp_path / "none.parquet")
    with pytest.raises(InvalidSettings, match="a directory with"):
        make(name, tmp_path)
    with pytest.raises(InvalidSettings, match="a table with columns"):
        make(name, parquet(tmp_path / "foreign.parquet", colour=["red"], split=["train"]))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptArtefact, match="cannot be read"):
        make(name, tmp_path / "torn.parquet")


def test_the_task_of_the_readme_can_be_made_asked_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (tmp_path / "capitals.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "capitals", raising=False)
    task = make("capitals:CAPITALS")
    example: Example = task.held_out(3, 0)[0]
    assert task.verify(f"It is {example.answer}, of course.", example) and not task.verify("Vienna", example)
    assert len(task.batch("train", 6, 0, 0)) == 6
    assert task.reward(example.answer, example) == 1.0
