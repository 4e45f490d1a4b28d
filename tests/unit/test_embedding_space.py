import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from metasepia.embedding.space import Space, TaskEmbedding, cosine, cosines
from metasepia.errors import CorruptArtefact, DifferentSpaces, InvalidRequest

SPACE = Space(surrogate="a" * 64, method="agreement", settings={"dims": 4, "imitate": "needed"}, probes="b" * 64)


def embedding(vector, space: Space = SPACE, **fields) -> TaskEmbedding:
    unit = np.asarray(vector, np.float32) / np.linalg.norm(vector)
    given = {"kind": "data_set", "name": "mine", "source": {"labels": ["no", "yes"], "num_texts": 3}, "noise": 0.25}
    return TaskEmbedding(space=space, vector=unit.astype(np.float32), **(given | fields))


def test_bytes_give_back_the_embedding():
    one = embedding([3, 4, 0, 0], name="naïve 3")
    again = TaskEmbedding.from_bytes(one.to_bytes())
    assert (
        again.digest == one.digest and again.source == one.source and again.space == one.space and again.noise == 0.25
    )
    np.testing.assert_array_equal(again.vector, one.vector)
    assert again.to_bytes() == one.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"},
        {"kind": "model"},
        {"noise": None},
        {"source": {}},
        {"space": dataclasses.replace(SPACE, probes="c" * 64)},
    ],
)
def test_the_digest_is_of_all_that_is_stored(change):
    one = embedding([3, 4, 0, 0])
    assert dataclasses.replace(one, **change).digest != one.digest


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"x" * 40, lambda b: b.replace(b"4096", b"40")[:9]]
)
def test_damaged_bytes_are_corrupt(damage):
    with pytest.raises(CorruptArtefact, match="task embedding"):
        TaskEmbedding.from_bytes(damage(embedding([3, 4, 0, 0]).to_bytes()))


def test_a_vector_that_was_changed_in_the_file_is_not_of_unit_norm_any_more():
    data = embedding([3, 4, 0, 0]).to_bytes()
    other = data[:-16] + np.array([9, 0, 0, 0], np.float32).tobytes()
    with pytest.raises(CorruptArtefact, match="unit norm"):
        TaskEmbedding.from_bytes(other)


@pytest.mark.parametrize(
    ("part", "value"),
    [("surrogate", "c" * 64), ("method", "fisher"), ("settings", {"dims": 5}), ("probes", "d" * 64)],
)
def test_embeddings_of_different_spaces_are_never_compared(part, value):
    other = embedding([1, 0, 0, 0], dataclasses.replace(SPACE, **{part: value}))
    one = embedding([1, 0, 0, 0])
    with pytest.raises(DifferentSpaces, match=f"differ in {part}; embed one") as raised:
        cosine(one, other)
    assert (raised.value.ours, raised.value.theirs) == (one.space.digest, other.space.digest)
    with pytest.raises(DifferentSpaces):
        cosines(one, [one, other])
    assert str(DifferentSpaces(*raised.value.args)) == str(raised.value)  # so that it crosses processes


def test_a_space_is_told_by_its_content_and_not_by_the_order_of_settings():
    other = Space.from_json(SPACE.to_json() | {"settings": {"imitate": "needed", "dims": 4}})
    assert other == SPACE and other.digest == SPACE.digest and hash(other) == hash(SPACE)


@pytest.mark.parametrize("wrong", [{}, {"method": "voodoo"}, {"surrogate": "short"}, {"settings": None}])
def test_what_is_no_space_is_corrupt(wrong):
    given = SPACE.to_json() | wrong if wrong else {}
    with pytest.raises(CorruptArtefact, match="space"):
        Space.from_json(given)


def test_cosines_are_those_of_the_vectors():
    many = [embedding(v) for v in ([1, 0, 0, 0], [3, 4, 0, 0], [-1, 0, 0, 0])]
    np.testing.assert_allclose(cosines(many[0], many), [1, 0.6, -1], atol=1e-6)
    assert cosine(many[0], many[1]) == pytest.approx(0.6) and cosines(many[0], []).shape == (0,)


def test_vectors_that_are_no_direction_are_refused():
    for vector in (np.zeros(4, np.float32), np.full(4, np.nan, np.float32), np.ones(4, np.float32)):
        with pytest.raises(InvalidRequest, match="vector"):
            TaskEmbedding(space=SPACE, vector=vector, kind="model", name="x", source={})


def test_agreement_needs_no_torch():
    code = (
        "import sys; import metasepia.embedding.agreement, metasepia.embedding.methods, metasepia.embedding.nearest, "
        "metasepia.embedding.vendi; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
