"""A few-shot search as a job that can be written down: what was asked, how far it is, what came out.

Everything is canonical JSON: the same request has the same digest, and a job that was killed and went on has the same
bytes as one that ran through. No clock is in them. numpy and standard library only.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from metasepia.digests import canonical_json, digest_of
from metasepia.errors import CorruptArtefact
from metasepia.search.cross_entropy import CrossEntropySearch, Generation, Score, SearchSettings
from metasepia.search.fewshot import By, Found, Scoring, Shot
from metasepia.search.warm_start import Start

Match = Literal["exact", "contains"]
"""When a generated answer is right: it is the wanted one, or it holds it. Case, outer spaces and a full stop at the end
do not count."""

ID = "search-"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and its answer, as a client gave them and as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    """The answer as given."""


@dataclass(frozen=True, kw_only=True)
class SearchJob:
    """What is searched for: everything that the result depends on."""

    backbone: str
    """Digest."""
    candidates: tuple[tuple[str, str], ...]
    """(name, digest) of the experts, the base among them where it takes part."""
    bases: tuple[str, ...]
    """Digests of the base among the candidates."""
    factors: str | None
    num_layers: int
    """Factored layers, for weights by layer; else 1."""
    examples: tuple[Example, ...]
    num_shots: int
    settings: SearchSettings
    by: By
    match: Match
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    start: Start | None = None
    """None: equal weights."""

    @property
    def digest(self) -> str:
        return digest_of(self._tree())

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' names in the order of weights in a trace."""
        names = {digest: name for name, digest in self.candidates}
        return tuple(names[digest] for digest in sorted(names))

    @property
    def id(self) -> str:
        """The same request is the same search."""
        return ID + self.digest[:24]

    def to_bytes(self) -> bytes:
        return canonical_json(self._tree())

    def _tree(self) -> dict[str, Any]:
        tree = {"kind": "search", **asdict(self)}
        if self.start is None:
            del tree["start"]  # the digest of a search that says nothing of its start
        return tree

    @classmethod
    def from_bytes(cls, blob: bytes) -> "SearchJob":
        """Raises CorruptArtefact."""
        try:
            tree: dict[str, Any] = json.loads(blob)
            if tree.pop("kind") != "search":
                raise ValueError("it is of another kind")
            tree["settings"] = SearchSettings(**tree["settings"])
            tree["candidates"] = tuple((name, digest) for name, digest in tree["candidates"])
            tree["examples"] = tuple(
                Example(prompt=tuple(one["prompt"]), answer=tuple(one["answer"]), text=one["text"])
                for one in tree["examples"]
            )
            for name in ("bases", "stop_token_ids"):
                tree[name] = tuple(tree[name])
            if "start" in tree:
                tree["start"] = Start.from_json(tree["start"])
            return cls(**tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtefact("the search's request", f"it cannot be read ({error})") from error

    def begin(self) -> CrossEntropySearch:
        perfect = self.scoring.perfect
        digests = [digest for _, digest in self.candidates]
        return CrossEntropySearch(digests, self.settings, num_layers=self.num_layers, perfect=perfect, start=self.start)

    @property
    def start_json(self) -> Any:
        """Where it began, for cards and clients: `uniform`, or by name what was known and what was made of it."""
        if self.start is None:
            return "uniform"
        return {
            "source": self.start.source,
            "similarities": dict(zip(self.names, self.start.similarities, strict=True)),
            "weights": {name: round(one, 4) for name, one in zip(self.names, self.start.mean, strict=True)},
            "std": dict(zip(self.names, self.start.std, strict=True)),
        }

    @property
    def scoring(self) -> Scoring:
        return Scoring(
            by=self.by,
            stop_token_ids=self.stop_token_ids,
            max_tokens=self.max_tokens,
            bases=frozenset(self.bases),
        )

    def shots(self, text_of: Callable[[Sequence[int]], str]) -> list[Shot]:
        """The examples; `text_of` turns generated tokens into text."""

        def judge(wanted: str) -> Callable[[tuple[int, ...]], bool]:
            return lambda answer: matches(text_of(answer), wanted, self.match)

        return [Shot(prompt=one.prompt, answer=one.answer, is_right=judge(one.text)) for one in self.examples]


def matches(answer: str, wanted: str, how: Match) -> bool:
    answer, wanted = (re.sub(r"[\s.]+$", "", text.strip()).lower() for text in (answer, wanted))
    return wanted == answer if how == "exact" else wanted in answer


@dataclass(frozen=True)
class Progress:
    """How far a search is: its state and its trace. The bytes that a checkpoint holds."""

    state: CrossEntropySearch
    trace: tuple[Mapping[str, Any], ...] = field(default=())
    """`Generation.to_json` of each generation."""

    def told(self, generation: Generation) -> "Progress":
        entry = generation.to_json()
        if generation.number == 0 and self.state.start is not None:
            entry["start"] = self.state.start.to_json()
        return Progress(self.state, (*self.trace, entry))

    def to_bytes(self) -> bytes:
        return canonical_json({"state": self.state.to_bytes().decode(), "trace": self.trace})

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Progress":
        """Raises CorruptArtefact."""
        try:
            tree = json.loads(blob)
            return cls(CrossEntropySearch.from_bytes(tree["state"].encode()), tuple(tree["trace"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtefact("the search's checkpoint", f"it cannot be read ({error})") from error


def found_json(found: Found, job: SearchJob, num_held_out: int) -> dict[str, Any]:
    """What came out, for cards and clients: what was chosen on what, and what was only measured."""
    names = {digest: name for name, digest in job.candidates}
    return {
        "weights": {names[digest]: weight for digest, weight in found.adapter},
        "best_single": names[found.best_single],
        "score": job.by,
        "start": job.start_json,
        "chosen_on": {"split": "shots", "examples": job_shots(job), **_scores(found.shots)},
        "measured_on": {"split": "held_out", "examples": num_held_out, **_scores(found.held_out)},
        "stopped": found.stopped,
        "generations": found.generations,
        "evaluations": found.evaluations,
        "seed": job.settings.seed,
    }


def job_shots(job: SearchJob) -> int:
    return min(job.num_shots, len(job.examples))


def _scores(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {
        name.replace(" ", "_"): {"value": one.rounded.value, "likelihood": one.rounded.likelihood}
        for name, one in scores.items()
    }
