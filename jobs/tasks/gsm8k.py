"""Grade-school mathematics (GSM8K, arXiv:2110.14168): a word problem, a worked answer, a final number."""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from jobs.tasks.base import Example, ListedTask, Split
from jobs.tasks.tables import columns_of, read_table

QUESTION = '{question}\n\nThink step by step. End with the line "The answer is N." where N is a number.'
_NUMBER = r"-?\$?\s*-?\d[\d,]*(?:\.\d+)?"


@dataclass(frozen=True, kw_only=True)
class Gsm8k(ListedTask):
    """Right when the final number is: that after "####" or "answer is", else the last one of all."""

    def verify(self, answer: str, example: Example) -> bool:
        found = final_number(answer)
        return found is not None and found == final_number(example.answer)


def final_number(answer: str) -> Decimal | None:
    for pattern in (rf"####\s*({_NUMBER})", rf"answer is:?\s*({_NUMBER})", rf"({_NUMBER})"):
        if found := re.findall(pattern, answer, re.I):
            try:
                return Decimal(re.sub(r"[$,\s]", "", found[-1]))
            except InvalidOperation:
                return None
    return None


def read(path: Path) -> Gsm8k:
    """From the columns question, answer (worked, with "####", or the number and a column solution) and split.

    Training rows with an even index are trained on, odd ones are valid, as in Transformer-squared; test is held out.
    """
    rows = read_table(path)
    question, answer = columns_of(rows, path, ("question",), ("answer",))
    examples: dict[Split, list[Example]] = {"train": [], "valid": [], "test": []}
    index = 0
    for row in rows:
        worked = str(row.get("solution") or row[answer])
        steps, _, number = worked.rpartition("####") if "####" in worked else ("", "", str(row[answer]))
        steps = re.sub(r"<<.*?>>", "", steps).strip()
        wanted = f"{steps}\nThe answer is {number.strip()}.".strip()
        text = str(row[question]).strip()
        example = Example(prompt=QUESTION.format(question=text), answer=wanted, group=text, text=text)
        if row["split"] == "train":
            examples["train" if index % 2 == 0 else "valid"].append(example)
            index += 1
        elif row["split"] == "test":
            examples["test"].append(example)
    return Gsm8k(
        name="gsm8k", about="Solves word problems of grade-school mathematics.", examples=examples, max_tokens=512
    )
