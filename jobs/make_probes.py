"""Composes the probe texts that models and prompts are asked, and writes them with their card.

    python -m jobs.make_probes --check
    python -m jobs.make_probes --num-texts 512 --seed 0 --out metasepia/assets/probes

The texts come out of OUT/grammar.toml: genres of templates, and lists for their slots. Texts go round the genres, and a
template is used again only when all of its genre were; so the first n are as varied as all, and no two of the shipped
ones share a template. The same grammar, number and seed give the same bytes. --check composes the texts anew and
compares them with what is there. Another set of texts is another digest, and with it another space of embeddings.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from metasepia.digests import canonical_json, digest_of, digest_of_file
from metasepia.embedding.probes import FOLDER, ProbeTexts
from metasepia.errors import CorruptArtefact, InvalidSettings, MetasepiaError

_SLOT = re.compile(r"\{(a |\^)?([a-z]+)([0-9]?)\}|\{([^{}]*\|[^{}]*)\}")
_VOWELS = tuple("aeiouAEIOU")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_probes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="a folder with a grammar.toml")
    parser.add_argument("--num-texts", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless the files there are the same")
    arguments = parser.parse_args(argv)
    try:
        probes = compose(read_grammar(arguments.out / "grammar.toml"), arguments.num_texts, arguments.seed)
        files = files_of(probes, arguments.out, arguments.num_texts, arguments.seed)
        for name, content in files.items():
            path = arguments.out / name
            if not arguments.check:
                path.write_bytes(content)
            elif not path.is_file() or path.read_bytes() != content:
                raise CorruptArtefact(str(path), "composing it anew gives something else")
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(probes)} texts of {len(set(probes.genres))} genres, digest {probes.digest}")
    return 0


def read_grammar(path: Path) -> Mapping[str, object]:
    """Raises InvalidSettings for a file that is not there, or is no grammar."""
    try:
        grammar = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidSettings("grammar", str(path), f"a TOML file of genres and slots ({error})") from error
    slots = grammar.get("slots", {})
    for genre in grammar.get("genre", []):
        for text in genre["texts"]:
            for _, slot, _, _ in _SLOT.findall(text):
                if slot and slot not in slots:
                    raise InvalidSettings("grammar", text, f"one with slots out of {', '.join(sorted(slots))}")
    if not grammar.get("genre"):
        raise InvalidSettings("grammar", str(path), "one with genres")
    return grammar


def compose(grammar: Mapping[str, object], num_texts: int, seed: int) -> ProbeTexts:
    """The first `num_texts`: round after round, each genre once a round in an order of its own."""
    slots: Mapping[str, Sequence[str]] = grammar["slots"]  # pyright: ignore[reportAssignmentType]
    genres: Sequence[Mapping[str, Sequence[str]]] = grammar["genre"]  # pyright: ignore[reportAssignmentType]
    rng = np.random.default_rng(seed)
    queues = [[str(genre["texts"][i]) for i in rng.permutation(len(genre["texts"]))] for genre in genres]
    words = _Words(slots, rng)
    texts: dict[str, str] = {}
    rounds = 0
    while len(texts) < num_texts:
        before = len(texts)
        for i in rng.permutation(len(genres)):
            template = queues[i][rounds % len(queues[i])]
            text = words.fill(template)
            if text not in texts and len(texts) < num_texts:
                texts[text] = str(genres[i]["name"])
        rounds += 1
        if len(texts) == before:
            raise InvalidSettings("num_texts", num_texts, f"at most about {before}: the grammar has no more texts")
    return ProbeTexts(tuple(texts), tuple(texts.values()))


class _Words:
    """Fills slots. A list is gone through to its end before a word of it comes again."""

    def __init__(self, slots: Mapping[str, Sequence[str]], rng: np.random.Generator) -> None:
        self._slots, self._rng = slots, rng
        self._left: dict[str, list[str]] = {name: [] for name in slots}

    def fill(self, template: str) -> str:
        used: set[str] = set()
        numbered: dict[str, str] = {}

        def word(match: re.Match[str]) -> str:
            how, slot, number, either = match.groups()
            if either is not None:
                choices = either.split("|")
                return choices[int(self._rng.integers(len(choices)))]
            chosen = numbered.get(slot + number) or self._next(slot, used)
            used.add(chosen)
            if number:
                numbered[slot + number] = chosen
            if how == "a ":
                return f"{'an' if chosen.startswith(_VOWELS) else 'a'} {chosen}"
            return chosen[0].upper() + chosen[1:] if how == "^" else chosen

        text = _SLOT.sub(word, template)
        return text[0].upper() + text[1:] if template.startswith("{a ") else text

    def _next(self, slot: str, used: set[str]) -> str:
        """The next word, but none that this text has already; lists are longer than any template's slots."""
        while True:
            if not self._left[slot]:
                self._left[slot] = [self._slots[slot][int(i)] for i in self._rng.permutation(len(self._slots[slot]))]
            place = next((i for i, one in enumerate(self._left[slot]) if one not in used), None)
            if place is not None:
                return self._left[slot].pop(place)
            self._left[slot] = []


def files_of(probes: ProbeTexts, folder: Path, num_texts: int, seed: int) -> dict[str, bytes]:
    """What is written, by name: the texts, a line each, and their card."""
    lines = [
        canonical_json({"text": text, "genre": genre}) for text, genre in zip(probes.texts, probes.genres, strict=True)
    ]
    card = {
        "digest": probes.digest,
        "num_texts": len(probes),
        "genres": len(set(probes.genres)),
        "command": f"python -m jobs.make_probes --num-texts {num_texts} --seed {seed}",
        "seed": seed,
        "grammar": digest_of_file(folder / "grammar.toml"),
        "licence": "that of Metasepia; the sentences were written for it, and none is taken from a data set",
        "first_64": digest_of({"kind": "probes", "texts": list(probes.texts[:64])}),
    }
    return {
        "probes.jsonl": b"\n".join(lines) + b"\n",
        "card.json": (json.dumps(card, indent=2, sort_keys=True) + "\n").encode(),
    }


if __name__ == "__main__":
    sys.exit(main())
