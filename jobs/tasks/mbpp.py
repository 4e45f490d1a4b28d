"""Short Python programs (MBPP, arXiv:2108.07732): a sentence, and assertions that the program must pass.

Generated code runs in `jobs.tasks.sandbox`, which reading the task makes and probes: a machine that cannot isolate it
is refused before anything is trained.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.tasks.base import Example, ListedTask, Split
from jobs.tasks.sandbox import Sandbox
from jobs.tasks.tables import columns_of, read_table

QUESTION = "{question}\nYour code should satisfy this test:\n{test}\nAnswer with the Python code only."


@dataclass(frozen=True)
class Tests:
    setup: str
    assertions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Mbpp(ListedTask):
    """Right when the code passes every assertion, of which the prompt shows the first."""

    sandbox: Sandbox = field(repr=False)

    def verify(self, answer: str, example: Example) -> bool:
        tests: Tests = example.reference
        code = code_of(answer)
        return bool(code.strip()) and self.sandbox.run(code, tests.assertions, tests.setup).right


def code_of(answer: str) -> str:
    """The longest fenced block of an answer, or all of it where none is fenced; an open fence runs to the end."""
    blocks = re.findall(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.S | re.I)
    return max(blocks, key=len) if blocks else answer


def read(path: Path) -> Mbpp:
    """From the question (question, text or prompt), the code, test_list (a list, or JSON of one) and the split.

    The file's own splits hold; its `prompt` rows are left out. Raises NotSupported where code cannot be isolated.
    """
    rows = read_table(path)
    question, code, tests = columns_of(rows, path, ("question", "text", "prompt"), ("answer", "code"), ("test_list",))
    examples: dict[Split, list[Example]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: row["split"] != "train"):
        assertions = _listed(row[tests])
        text = str(row[question]).strip()
        prompt = QUESTION.format(question=text, test=assertions[0] if assertions else "")
        if row["split"] not in examples or not assertions or prompt in seen:
            continue
        seen.add(prompt)
        setup = "\n".join([str(row.get("test_setup_code") or ""), *_listed(row.get("test_imports"))]).strip()
        written = str(row[code]).replace("\r\n", "\n").expandtabs(4).strip()
        reference = Tests(setup, tuple(assertions))
        examples[row["split"]].append(
            Example(prompt=prompt, answer=f"```python\n{written}\n```", group=text, text=text, reference=reference)
        )
    about = "Writes short Python programs from a sentence and a test."
    return Mbpp(name="mbpp", about=about, examples=examples, max_tokens=256, sandbox=Sandbox())


def _listed(value: Any) -> list[str]:
    return [str(one) for one in (json.loads(value) if isinstance(value, str) else value or [])]
