"""Named contexts: one id for one content, whatever order it came in, and blobs that give it back."""

import dataclasses
import json

import numpy as np
import pytest

from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.reasoning.named import (
    EmbeddedContext,
    EncoderName,
    Example,
    NamedContext,
    digest_of_name,
    vector_content,
    vectors_of_contents,
)

MINILM = EncoderName("minilm", "e" * 64)
EXAMPLES = [Example("good", "yes"), Example("bad", "no"), Example("🦑 مرحبا", "yes"), Example("good", "yes")]


def context(examples=EXAMPLES, **changes) -> NamedContext:
    return NamedContext.of("text", examples, **({"encoder": MINILM, "module": "d" * 64} | changes))


def vectors(rows: np.ndarray) -> NamedContext:
    examples = [Example(vector_content(row.tolist(), "v"), "ab"[i % 2]) for i, row in enumerate(rows)]
    return NamedContext.of("vector", examples, encoder=None, module="d" * 64)


def embedded(named: NamedContext) -> EmbeddedContext:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((len(named.examples) + len(named.unlabelled), 3)).astype(np.float32)
    rest = numbers[len(named.examples) :]
    return EmbeddedContext(named, numbers[: len(named.examples)], rest if len(rest) else None)


def test_the_same_examples_in_another_order_have_the_same_id():
    other = context(EXAMPLES[::-1], unlabelled=["b", "a"])
    assert other.id == context(unlabelled=["a", "b"]).id
    assert [EXAMPLES[::-1][i] for i in other.given] == list(other.examples) == list(context().examples)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"module": "0" * 64},
        {"encoder": EncoderName("minilm", "f" * 64)},
        {"unlabelled": ["x"]},
        {"protocol": "loo"},
        {"reduction": {"views": 3}},
        {"examples": EXAMPLES[:3]},
        {"examples": [*EXAMPLES[:3], Example("good", "Yes")]},
        {"examples": [*EXAMPLES[:3], Example("Good", "yes")]},
    ],
    ids=str,
)
def test_whatever_belongs_to_a_context_changes_its_id(change):
    assert context(**change).id != context().id


def test_an_encoders_name_does_not_change_the_id():
    assert context(encoder=EncoderName("renamed", MINILM.digest)).id == context().id


def test_a_name_is_read_back_and_nothing_else_is_taken_for_one():
    assert digest_of_name(context().id) == context().digest
    assert [digest_of_name(name) for name in ("ctx-", "ctx-xyz", context().digest, "ctx-" + "A" * 64)] == [None] * 4


def test_labels_that_differ_by_case_are_different_and_two_spellings_of_one_are_refused():
    assert context([Example("a", "Spam"), Example("b", "spam")]).classes == ("Spam", "spam")
    with pytest.raises(InvalidRequest, match=r"examples\[1\]\.label: .*two spellings"):
        context([Example("a", "café"), Example("b", "cafe\u0301"), Example("c", "tea")])


def test_one_class_or_none_is_refused():
    with pytest.raises(InvalidRequest, match="every example carries the label 'yes'"):
        context([Example("a", "yes"), Example("b", "yes")])
    with pytest.raises(InvalidRequest, match="there are none"):
        context([])


def test_more_examples_give_another_context_and_the_order_of_adding_does_not_matter():
    whole = context()
    grown = context(EXAMPLES[:2]).extended(EXAMPLES[2:])
    assert grown.id == whole.id
    assert [(*context(EXAMPLES[:2]).examples, *EXAMPLES[2:])[i] for i in grown.given] == list(grown.examples)


@pytest.mark.parametrize(
    "named",
    [
        context(unlabelled=["b", "a", "a"], seed=7, reduction={"views": 2}),
        NamedContext.of(
            "image", [Example(b"\x89PNG", "a"), Example(b"", "b")], encoder=MINILM, module="d" * 64, unlabelled=[b"123"]
        ),
        vectors(np.random.default_rng(0).standard_normal((5, 3))),
    ],
    ids=["text", "image", "vector"],
)
def test_a_blob_gives_back_the_context_and_the_same_blob_again(named: NamedContext):
    one = embedded(named)
    if named.kind == "vector":
        one = EmbeddedContext(named, vectors_of_contents(example.content for example in named.examples))
    blob = one.to_bytes()
    again = EmbeddedContext.from_bytes(blob, named.digest)
    assert again.named == named
    np.testing.assert_array_equal(again.vectors, one.vectors)
    np.testing.assert_array_equal(again.unlabelled, one.unlabelled)
    assert again.to_bytes() == blob


def test_a_blob_of_another_context_or_no_context_is_refused():
    blob = embedded(context()).to_bytes()
    with pytest.raises(CorruptArtefact, match="its content has the digest"):
        EmbeddedContext.from_bytes(blob, context(seed=1).digest)
    for broken in (b"", b"\xff" * 64, blob[:-5], blob.replace(b'\\"format\\": 1', b'\\"format\\": 9')):
        with pytest.raises(CorruptArtefact, match="does not parse"):
            EmbeddedContext.from_bytes(broken, context().digest)
    fewer = dataclasses.replace(embedded(context()), vectors=np.zeros((3, 3), np.float32)).to_bytes()
    with pytest.raises(CorruptArtefact, match="4 labels, 3 vectors"):
        EmbeddedContext.from_bytes(fewer, context().digest)


@pytest.mark.parametrize("numbers", [[float("nan")], [float("inf")], [1e39], [10**400], [], [[1.0], [2.0]]], ids=str)
def test_numbers_that_are_no_vector_are_refused_by_their_field(numbers):
    with pytest.raises(InvalidRequest, match=r"examples\[0\]\.vector"):
        vector_content(numbers, "examples[0].vector")


def test_minus_zero_is_zero_and_float32_is_what_counts():
    assert vector_content([-0.0, 0.1], "v") == vector_content([0, float(np.float32(0.1))], "v")


def test_vectors_of_unequal_width_are_refused_by_their_place():
    examples = [Example(vector_content([0.0] * n, "v"), label) for n, label in ((2, "a"), (2, "b"), (3, "a"))]
    with pytest.raises(InvalidRequest, match=r"^examples\[2\]\.vector: 3 numbers, where examples\[0\]\.vector has 2"):
        NamedContext.of("vector", examples, encoder=None, module="d" * 64)
    short = NamedContext.of("vector", examples[:2], encoder=None, module="d" * 64)
    with pytest.raises(InvalidRequest, match=r"^examples\[0\]\.vector: 3 numbers"):
        short.extended(examples[2:])


def test_the_header_of_a_blob_is_json_that_people_can_read():
    blob = embedded(context()).to_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    assert json.loads(header["context"])["texts"].count("good") == 2
