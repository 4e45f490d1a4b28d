"""The probe texts: what models and prompts are asked, so that their answers can be compared.

The shipped set is unlabelled, of many genres, written for this project (`jobs/make_probes.py`) and fixed by its digest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from metasepia.digests import digest_of
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings

FOLDER = Path(__file__).parents[1] / "assets" / "probes"
FEWEST = 16
"""Below that answers to probe texts tell little."""


@dataclass(frozen=True)
class ProbeTexts:
    """Unlabelled texts in a fixed order, each once."""

    texts: tuple[str, ...]
    genres: tuple[str, ...] = ()
    """Of each text, for people to read; no part of the digest. () where they are not known."""

    def __post_init__(self) -> None:
        if len(self.texts) < FEWEST:
            raise InvalidRequest("probes", f"{FEWEST} texts or more are needed, got {len(self.texts)}")
        if len(set(self.texts)) < len(self.texts):
            seen: set[str] = set()
            twice = next(text for text in self.texts if text in seen or seen.add(text))
            raise InvalidRequest("probes", f"a text is there twice: {twice[:80]!r}")
        if not all(text.strip() for text in self.texts):
            raise InvalidRequest("probes", "a text is empty")
        if self.genres and len(self.genres) != len(self.texts):
            raise InvalidRequest("probes", f"{len(self.texts)} texts and {len(self.genres)} genres")

    @cached_property
    def digest(self) -> str:
        return digest_of({"kind": "probes", "texts": list(self.texts)})

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, n: int) -> "ProbeTexts":
        """The first `n`; in the shipped set they are as varied as all. Raises InvalidRequest beyond the last."""
        if not FEWEST <= n <= len(self.texts):
            raise InvalidRequest("probes", f"between {FEWEST} and {len(self.texts)} texts can be taken, got {n}")
        return ProbeTexts(self.texts[:n], self.genres[:n])

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> "ProbeTexts":
        return cls(tuple(texts))

    @classmethod
    def of_file(cls, path: Path) -> "ProbeTexts":
        """Texts of your own: .jsonl with a field `text` (and perhaps `genre`), or .txt with a text a line."""
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettings("probes", str(path), f"a readable UTF-8 file of texts ({error})") from error
        if path.suffix != ".jsonl":
            return cls(tuple(lines))
        try:
            rows = [json.loads(line) for line in lines]
            texts = tuple(str(row["text"]) for row in rows)
        except (ValueError, KeyError, TypeError) as error:
            problem = f"a line is not JSON with a field `text` ({type(error).__name__}: {error})"
            raise CorruptArtefact(path.name, problem) from error
        return cls(texts, tuple(str(row.get("genre", "")) for row in rows))


@cache
def shipped() -> ProbeTexts:
    """The shipped set. Raises CorruptArtefact when its texts are not those of the card's digest."""
    card = json.loads((FOLDER / "card.json").read_text())
    probes = ProbeTexts.of_file(FOLDER / "probes.jsonl")
    if probes.digest != card["digest"]:
        raise CorruptArtefact(
            "the shipped probe texts", f"their digest is {probes.digest}, the card's {card['digest']}"
        )
    return probes
