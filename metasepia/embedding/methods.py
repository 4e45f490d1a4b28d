"""The three ways to embed a task, by name, and embedding with the uncertainty of sampled answers carried along.

`agreement` needs no gradient and no torch; `prefix` (TuPaTE) and `fisher` (Task2Vec's, as E[g^2]) are those of FUTE,
arXiv:2402.14522. A method's module is imported when it is asked for.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import METHODS, EmbeddingMethod, MethodName, Space, TaskEmbedding, TaskKind
from metasepia.errors import InvalidRequest, InvalidSettings, WindowExceeded

if TYPE_CHECKING:
    from metasepia.encoders import TextEncoder

NamedTask = tuple[str, TaskKind, Answers, Mapping[str, Any]]
"""Name, kind, answers, and what the caller knows of their source."""
LongTexts = Literal["refuse", "leave_out"]
_Settings = TypeVar("_Settings")


def method(name: str, encoder: "TextEncoder", probes: ProbeTexts, **settings: Any) -> EmbeddingMethod:
    """An embedding method with some of its settings changed. Raises InvalidSettings for a name or setting it lacks."""
    if name == "agreement":
        from metasepia.embedding.agreement import AgreementMethod, AgreementSettings

        return AgreementMethod(encoder, probes, _settings(AgreementSettings, settings))
    if name == "prefix":
        from metasepia.embedding.prefix import PrefixMethod, PrefixSettings

        return PrefixMethod(encoder, probes, _settings(PrefixSettings, settings))
    if name == "fisher":
        from metasepia.embedding.fisher import FisherMethod, FisherSettings

        return FisherMethod(encoder, probes, _settings(FisherSettings, settings))
    raise InvalidSettings("method", name, f"one of {', '.join(METHODS)}")


def embed_tasks(
    method: EmbeddingMethod,
    named: Sequence[NamedTask],
    *,
    seed: int = 0,
    redraws: int = 8,
    refused: Callable[[str, str], None] | None = None,
    told: Callable[[int, int], None] | None = None,
) -> list[TaskEmbedding]:
    """Embeddings with their source and noise, in the order given.

    Sampled answers are drawn again `redraws` times (0: their noise stays None), and `noise` is the mean of 1 - cosine
    over the pairs of draws. A task that tells no texts apart has no embedding: without `refused` InvalidRequest is
    raised, else `refused(name, reason)` hears of it and the others are embedded.
    """
    if redraws < 0 or redraws == 1:
        raise InvalidSettings("redraws", redraws, "0, or 2 and more")
    kept: list[NamedTask] = []
    for one in named:
        if not one[2].is_constant:
            kept.append(one)
        elif refused is None:
            raise InvalidRequest(one[0], CONSTANT)
        else:
            refused(one[0], CONSTANT)
    tasks = [answers for _, _, answers, _ in kept]
    drawn: list[tuple[int, Answers]] = []
    for place, answers in enumerate(tasks):
        if answers.standard_error is not None:
            drawn += [(place, answers.redrawn(_seed_of(seed, answers, i))) for i in range(redraws)]
    drawn = [(place, answers) for place, answers in drawn if not answers.is_constant]
    if not tasks:
        return []
    vectors = method.embed([*tasks, *(answers for _, answers in drawn)], seed=seed, told=told)
    owners = np.array([place for place, _ in drawn], np.int64)
    redrawn = vectors[len(tasks) :]
    return [
        TaskEmbedding(
            space=method.space,
            vector=vectors[place],
            kind=kind,
            name=name,
            source={**_source_of(answers), **source},
            noise=_noise(redrawn[owners == place]),
        )
        for place, (name, kind, answers, source) in enumerate(kept)
    ]


CONSTANT = (
    "it answers every text alike, so it tells no two texts apart and has no place among tasks; check its prompt, its "
    "labels and their words"
)


def within_window(encoder: "TextEncoder", answers: Answers, long_texts: LongTexts = "refuse") -> tuple[Answers, int]:
    """The answers to the texts that fit the encoder's window, and how many do not.

    A text is never cut: its answer was to the whole of it. `refuse` raises WindowExceeded for the first that is too
    long; `leave_out` leaves such texts out (put the number into the source), and raises InvalidRequest where fewer than
    two, or only one label, are left.
    """
    try:
        encoder.tokenize(answers.texts)
        return answers, 0
    except WindowExceeded:
        if long_texts == "refuse":
            raise
    fits = [i for i, text in enumerate(answers.texts) if _fits(encoder, text)]
    left = answers.num_texts - len(fits)
    if len(fits) < 2:
        raise InvalidRequest("texts", f"{left} of {answers.num_texts} texts are longer than {encoder.window} tokens")
    kept = answers.only(fits)
    if kept.is_constant:
        raise InvalidRequest("texts", f"without the {left} texts longer than {encoder.window} tokens, {CONSTANT}")
    return kept, left


def _fits(encoder: "TextEncoder", text: str) -> bool:
    try:
        encoder.tokenize([text])
    except WindowExceeded:
        return False
    return True


def _settings(of: type[_Settings], given: Mapping[str, Any]) -> _Settings:
    known = [field.name for field in dataclasses.fields(of)]  # pyright: ignore[reportArgumentType]
    for name, value in given.items():
        if name not in known:
            raise InvalidSettings(name, value, f"left out: this method has {', '.join(known)}")
    return of(**given)


def _source_of(answers: Answers) -> dict[str, Any]:
    source: dict[str, Any] = {"answers": answers.digest, "num_texts": answers.num_texts, "labels": list(answers.labels)}
    return source | ({"notes": list(answers.notes)} if answers.notes else {})


def _noise(vectors: Float[np.ndarray, "redraws dims"]) -> float | None:
    if len(vectors) < 2:
        return None
    gram = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    return float(max(0.0, 1 - gram[np.triu_indices(len(vectors), 1)].mean()))


def _seed_of(seed: int, answers: Answers, draw: int) -> int:
    """By what the answers are, not by their place, so that a task's noise does not depend on the tasks beside it."""
    return int(np.random.SeedSequence([seed, int(answers.digest[:16], 16), draw]).generate_state(1)[0])


__all__ = ["EmbeddingMethod", "MethodName", "NamedTask", "Space", "embed_tasks", "method", "within_window"]
