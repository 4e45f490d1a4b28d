import json
import re
from collections import Counter

import pytest

from jobs.make_probes import compose, files_of, main, read_grammar
from metasepia.embedding import probes
from metasepia.embedding.probes import FOLDER, ProbeTexts, shipped
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings


def test_composing_the_shipped_texts_anew_gives_the_same_bytes():
    composed = compose(read_grammar(FOLDER / "grammar.toml"), 512, 0)
    for name, content in files_of(composed, FOLDER, 512, 0).items():
        assert (FOLDER / name).read_bytes() == content
    assert composed.digest == shipped().digest


def test_another_seed_gives_other_texts_of_the_same_genres():
    other = compose(read_grammar(FOLDER / "grammar.toml"), 512, 1)
    assert len(set(other.texts) & set(shipped().texts)) < 200 and set(other.genres) == set(shipped().genres)


@pytest.mark.parametrize("n", [66, 128, 256, 512])
def test_the_first_texts_are_spread_over_the_genres_as_all_are(n):
    counts = Counter(shipped().first(n).genres)
    assert len(counts) == 33 and max(counts.values()) - min(counts.values()) <= 1


def test_no_two_probe_texts_are_nearly_the_same():
    words = [frozenset(re.findall(r"[a-z]+", text.lower())) for text in shipped().texts]
    alike = [
        (len(a & b) / len(a | b), i, j)
        for i, a in enumerate(words)
        for j, b in enumerate(words[:i])
        if len(a) > 4 < len(b)
    ]
    assert max(alike)[0] < 0.7


def test_every_slot_of_every_probe_text_is_filled():
    assert not [text for text in shipped().texts if re.search(r"[{}|]", text)]


def test_probe_texts_that_are_not_those_of_the_card_are_refused(tmp_path, monkeypatch):
    for name in ("probes.jsonl", "card.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes().replace(b"someone", b"Someone"))
    monkeypatch.setattr(probes, "FOLDER", tmp_path)
    shipped.cache_clear()
    try:
        with pytest.raises(CorruptArtefact, match="digest"):
            shipped()
    finally:
        shipped.cache_clear()


def test_the_order_of_probe_texts_is_part_of_their_digest():
    texts = shipped().texts
    assert ProbeTexts(texts[::-1]).digest != ProbeTexts(texts).digest == shipped().digest


def test_own_probe_texts_are_read_line_by_line(tmp_path):
    plain, lines = tmp_path / "mine.txt", tmp_path / "mine.jsonl"
    texts = [f"my text {i}" for i in range(20)]
    plain.write_text("\n\n".join(texts))
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert ProbeTexts.of_file(plain).digest == ProbeTexts.of_file(lines).digest == ProbeTexts.of_texts(texts).digest


@pytest.mark.parametrize(
    ("texts", "told"),
    [(["a"] * 20, "twice: 'a'"), (["few"], "16 texts or more"), ([*map(str, range(20)), " "], "empty")],
)
def test_probe_texts_that_are_no_set_are_refused(texts, told):
    with pytest.raises(InvalidRequest, match=told):
        ProbeTexts.of_texts(texts)


def test_a_file_of_probe_texts_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidSettings, match=r"nothing\.txt"):
        ProbeTexts.of_file(tmp_path / "nothing.txt")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"text": "a"')
    with pytest.raises(CorruptArtefact, match=r"torn\.jsonl"):
        ProbeTexts.of_file(torn)


def test_a_grammar_with_a_slot_that_it_has_not_is_refused(tmp_path):
    grammar = tmp_path / "grammar.toml"
    grammar.write_text('[slots]\nname = ["Ann"]\n[[genre]]\nname = "x"\ntexts = ["{nmae} sleeps"]\n')
    assert main(["--out", str(tmp_path)]) == 2
    with pytest.raises(InvalidSettings, match="nmae"):
        read_grammar(grammar)


def test_more_texts_than_a_grammar_has_are_refused_rather_than_sought_for_ever(tmp_path):
    grammar = tmp_path / "grammar.toml"
    grammar.write_text(
        '[slots]\nname = ["Ann", "Bob"]\n[[genre]]\nname = "x"\ntexts = ["{name} sleeps", "{name} eats"]\n'
    )
    with pytest.raises(InvalidSettings, match="no more texts"):
        compose(read_grammar(grammar), 20, 0)
