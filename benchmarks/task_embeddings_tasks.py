"""The tasks of `benchmarks.task_embeddings`: which data sets ask the same question, and what stands for each task.

A task is the question that is asked of a text. Data sets that ask the same one are a *family*, whatever their texts and
their label sets: sentiment of films, phrases or goods, by two labels or by five. Beside the data sets' own questions
stand four that a rule answers on any text (a number, a question, the first person, the length), on texts of three data
sets each, so that there are different tasks on the same texts. Families were written down before any embedding was
made. HALF was raised once, from 300, after a look at the Gram baseline of all families. Those in `DEV` are for choosing
settings.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import datasets
from benchmarks.datasets import Example
from benchmarks.task_embeddings_answers import cut

FAMILY: Mapping[str, str] = {
    **dict.fromkeys(("sst2", "sst5", "rotten_tomatoes", "mpqa", "amazon_reviews_polarity"), "sentiment"),
    **dict.fromkeys(("tweet_emotion", "emotion6"), "emotion"),
    **dict.fromkeys(("tweet_offensive", "hate_speech_davidson"), "offence"),
    **dict.fromkeys(("trec", "trec_fine"), "question type"),
}
"""Of data sets that share one; others are a family of their own."""
DEV = ("emotion", "snips", "banking77", "first person", "length")
HALF = 1000
"""Examples of one half of a data set, at most: what a model learns from."""
EMBEDDED = 300
"""Of a half, the examples that a data-set embedding is made of."""
HELD_OUT = 300
FEWEST_OF_LABEL = 20
"""Of trec's fine labels, rarer ones are left out."""

_ASKS = re.compile(
    r"^\W*(who|what|where|when|why|how|which|whose|is|are|was|were|do|does|did|can|could|will|would|should|have|has)\b",
    re.IGNORECASE,
)
_FIRST_PERSON = re.compile(r"\b(i|i'm|i've|im|me|my|mine|we|us|our|ours)\b", re.IGNORECASE)
_NUMBER = re.compile(
    r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|million)\b", re.IGNORECASE
)

Rule = Callable[[str], bool]
RULES: Mapping[str, tuple[Rule, tuple[str, ...]]] = {
    "number": (lambda text: bool(_NUMBER.search(text)), ("ag_news", "sms_spam", "amazon_reviews_polarity")),
    "question": (lambda text: "?" in text or bool(_ASKS.match(text)), ("clinc150", "sms_spam", "tweet_offensive")),
    "first person": (lambda text: bool(_FIRST_PERSON.search(text)), ("amazon_reviews_polarity", "banking77", "sst2")),
    "length": (lambda text: len(text.split()) > 14, ("rotten_tomatoes", "tweet_emotion", "sms_spam")),
}
"""Question, the rule that answers it, and the data sets whose texts it is asked of."""


@dataclass(frozen=True, kw_only=True)
class LabelledTask:
    """One data set with one question: two halves without a text in common, and held-out examples."""

    name: str
    family: str
    texts_of: str
    """The data set that its texts come from."""
    halves: tuple[tuple[Example, ...], tuple[Example, ...]]
    held_out: tuple[Example, ...]
    rule: Rule | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({label for half in self.halves for _, label in half}))

    @property
    def is_dev(self) -> bool:
        return self.family in DEV

    @property
    def train(self) -> tuple[Example, ...]:
        return (*self.halves[0], *self.halves[1])


def read_tasks(directory: Path, *, rules: bool = True) -> list[LabelledTask]:
    """Every labelled text set of a directory as a task, trec's fine labels, and the rules where their texts are there.

    No text, case and punctuation aside, is in two halves or sets of one family: what comes later gives way.
    """
    sets = {one.name: one for one in datasets.read_all(directory)}
    tasks, taken = [], dict[str, set[str]]()
    for name, one in sets.items():
        family = FAMILY.get(name, name)
        tasks.append(_task(name, family, name, one.train, one.test, taken.setdefault(family, set())))
    if "trec" in sets and (fine := _fine(directory / "trec.parquet")):
        # The same texts as trec, so its halves change places: what is compared never shares a text.
        trec = next(task for task in tasks if task.name == "trec")
        halves = tuple(tuple((t, fine[t]) for t, _ in half if t in fine) for half in trec.halves)
        held_out = tuple((t, fine[t]) for t, _ in trec.held_out if t in fine)
        tasks.append(
            LabelledTask(
                name="trec_fine", family=trec.family, texts_of="trec", halves=(halves[1], halves[0]), held_out=held_out
            )
        )
    for question, (rule, names) in RULES.items() if rules else ():
        for name in names:
            if name in sets:
                of = lambda part, rule=rule: [(text, "yes" if rule(cut(text)) else "no") for text, _ in part]  # noqa: E731
                one = sets[name]
                made = _task(f"{question} in {name}", question, name, of(one.train), of(one.test), set(), rule)
                if len(made.labels) == 2:
                    tasks.append(made)
    return tasks


def _task(
    name: str,
    family: str,
    texts_of: str,
    train: Sequence[Example],
    test: Sequence[Example],
    taken: set[str],
    rule: Rule | None = None,
) -> LabelledTask:
    """Halves of the train split by a fixed seed, each with its classes in turn, so that its beginning is balanced."""
    once: list[Example] = []
    for text, label in train:
        if (key := plain(text)) and key not in taken:
            taken.add(key)
            once.append((cut(text), label))
    first = datasets.halves([label for _, label in once])
    halves: list[tuple[Example, ...]] = []
    for want in (True, False):
        half = [example for example, own in zip(once, first, strict=True) if own == want]
        order = datasets.balanced_order([label for _, label in half], seed=0)[:HALF]
        halves.append(tuple(half[int(i)] for i in order))
    held_out = [(cut(text), label) for text, label in test if plain(text) and plain(text) not in taken]
    chosen = np.random.default_rng(0).permutation(len(held_out))[:HELD_OUT]
    return LabelledTask(
        name=name,
        family=family,
        texts_of=texts_of,
        halves=(halves[0], halves[1]),
        held_out=tuple(held_out[int(i)] for i in chosen),
        rule=rule,
    )


def plain(text: str) -> str:
    """Two texts with the same are one."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def _fine(path: Path) -> dict[str, str]:
    """The fine label of every text that has a frequent one."""
    if "extra" not in pq.read_schema(path).names:
        return {}
    rows = pq.read_table(path, columns=["text", "extra"]).to_pylist()
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["extra"]] = counts.get(row["extra"], 0) + 1
    return {cut(row["text"]): row["extra"] for row in rows if counts[row["extra"]] >= FEWEST_OF_LABEL}


@dataclass(frozen=True, kw_only=True)
class OpenTask:
    """Texts and open replies."""

    name: str
    family: str
    pairs: tuple[tuple[str, str], ...]


def read_open(path: Path, *, by: str, longest: int = 600) -> list[OpenTask]:
    """`by` = "task": two halves of every task, each an OpenTask of that family. `by` = "dataset": a task a template,
    and the data set it is made from is the family. Replies and inputs are cut to `longest` characters. Tasks whose
    replies are all the same are left out.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in pq.read_table(path).to_pylist():
        if row["input"] and row["output"] and row["input"].strip() and row["output"].strip():
            groups.setdefault(row["task"], []).append(row)
    made = []
    for name, rows in sorted(groups.items()):
        order = np.random.default_rng(0).permutation(len(rows))
        pairs = [(rows[i]["input"].strip()[:longest], rows[i]["output"].strip()[:longest]) for i in order]
        if by == "dataset":
            made.append(OpenTask(name=name, family=rows[0]["dataset"], pairs=tuple(pairs)))
            continue
        middle = len(pairs) // 2
        for half, part in enumerate((pairs[:middle], pairs[middle:])):
            made.append(OpenTask(name=f"{name}, half {half}", family=name, pairs=tuple(part)))
    return [one for one in made if len({reply for _, reply in one.pairs}) > 1]
