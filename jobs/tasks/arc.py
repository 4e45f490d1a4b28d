"""Science questions with lettered choices (ARC, arXiv:1803.05457), easy and challenge."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from jobs.tasks.base import Example, ListedTask, Split
from jobs.tasks.tables import Record, columns_of, read_table

LETTERS = ("A", "B", "C", "D", "E")
QUESTION = "{question}\n\nAnswer with the letter of the right choice."
_OLD_KEYS = dict(zip("12345", LETTERS, strict=True))


@dataclass(frozen=True, kw_only=True)
class Arc(ListedTask):
    """Right when the chosen letter is; see `chosen_letter`."""

    guess_seed: int | None = None
    """The reference lets an answer without any letter count as a seeded random guess; None: it is wrong."""

    def verify(self, answer: str, example: Example) -> bool:
        letter = chosen_letter(answer)
        if letter is None and self.guess_seed is not None:
            drawn = hashlib.sha256(f"{self.guess_seed}:{example.prompt}".encode()).digest()[0]
            letter = LETTERS[:4][drawn % 4]
        return letter == example.answer


def chosen_letter(answer: str) -> str | None:
    """The last of "answer is (X)", else of "answer: X", else the last letter A to E that stands alone."""
    for pattern in (r"answer is \(?([A-E])\b", r"answer:\s*\(?([A-E])\b", r"(?<![A-Za-z'])([A-E])(?![A-Za-z'])"):
        if found := re.findall(pattern, answer):
            return found[-1]
    return None


def easy(path: Path) -> Arc:
    return read(path, "arc_easy", "Answers science questions of primary school by the letter of the right choice.")


def challenge(path: Path) -> Arc:
    return read(path, "arc_challenge", "Answers hard science questions by the letter of the right choice.")


def read(path: Path, name: str, about: str) -> Arc:
    """From question (with its lettered choices) and answer, or ai2_arc's question, choices and answerKey.

    Training rows with an even index are trained on, odd ones are valid, as in Transformer-squared; test is held out and
    a development split is left alone.
    """
    rows = read_table(path)
    question, answer = columns_of(rows, path, ("question",), ("answer", "answerKey"))
    examples: dict[Split, list[Example]] = {"train": [], "valid": [], "test": []}
    index, seen = 0, set()
    for row in rows:
        text = _with_choices(str(row[question]).strip(), row)
        letter = _OLD_KEYS.get(str(row[answer]).strip(), str(row[answer]).strip())
        if row["split"] not in ("train", "test") or text in seen:
            continue
        seen.add(text)
        split: Split = "test" if row["split"] == "test" else "train" if index % 2 == 0 else "valid"
        index += row["split"] == "train"
        prompt = QUESTION.format(question=text)
        examples[split].append(Example(prompt=prompt, answer=letter, group=text, text=text))
    used = {one.answer for split in examples.values() for one in split}
    labels = tuple(letter for letter in LETTERS if letter in used)
    return Arc(name=name, about=about, examples=examples, labels=labels, max_tokens=16)


def _with_choices(question: str, row: Record) -> str:
    """The question of ai2_arc gets its choices; one that has them in its text stays."""
    choices = row.get("choices")
    if "answerKey" not in row or not isinstance(choices, dict):
        return question
    pairs = zip(choices["label"], choices["text"], strict=True)
    return question + "".join(f"\n{_OLD_KEYS.get(str(key), key)}. {text}" for key, text in pairs)
