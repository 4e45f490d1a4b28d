import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save

from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.vectors import FORMAT, ExpertVectors, FactorIndex

BACKBONE, FACTORS = "b" * 64, "f" * 64
INDEX = FactorIndex(digest=FACTORS, backbone=BACKBONE, lengths={"layers.0.weight": 3, "layers.1.weight": 2})


def metadata(**changes: object) -> dict[str, str]:
    header = {"format": FORMAT, "backbone": BACKBONE, "factors": FACTORS, "renormalise": False}
    return {"expert": json.dumps(header | changes)}


def an_expert(**changes: object) -> ExpertVectors:
    z = {"layers.0.weight": np.array([1, 2, 3], np.float32), "layers.1.weight": np.array([0.5, 1], np.float32)}
    return ExpertVectors(**({"backbone": BACKBONE, "factors": FACTORS, "z": z} | changes))  # pyright: ignore[reportArgumentType]


def test_an_expert_read_back_is_the_expert_written() -> None:
    written = an_expert(renormalise=True)
    read = ExpertVectors.from_bytes(written.to_bytes())
    assert (read.digest, read.renormalise, read.to_bytes()) == (written.digest, True, written.to_bytes())
    for name, vector in written.z.items():
        np.testing.assert_array_equal(read.z[name], vector)
    read.check_fits(INDEX)


def test_the_digest_changes_with_everything_that_changes_the_answer() -> None:
    one = an_expert()
    other_z = {**one.z, "layers.1.weight": np.array([0.5, 1.0000001], np.float32)}
    others = [
        an_expert(renormalise=True),
        an_expert(backbone="c" * 64),
        an_expert(factors="c" * 64),
        an_expert(z=other_z),
        an_expert(z={"layers.0.weight": one.z["layers.0.weight"]}),
    ]
    assert len({one.digest, *[other.digest for other in others]}) == 6


def test_the_order_in_which_vectors_were_given_does_not_change_the_digest_or_the_bytes() -> None:
    one = an_expert()
    other = an_expert(z=dict(reversed(list(one.z.items()))))
    assert (other.digest, other.to_bytes()) == (one.digest, one.to_bytes())


@pytest.mark.parametrize(
    ("blob", "problem"),
    [
        (b"", "not a safetensors file"),
        (b"{}", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
        (an_expert().to_bytes()[:-4], "not a safetensors file"),
        (save({"layers.0.weight": np.ones(3, np.float32)}), "format None"),
        (save({"layers.0.weight": np.ones(3, np.float32)}, metadata(backbone="mine")), "backbone 'mine', not 64"),
        (save({"layers.0.weight": np.ones(3, np.float32)}, metadata(renormalise="1")), "renormalise '1'"),
        (save({}, metadata()), "holds no vectors"),
        (save({"layers.0.weight": np.ones(3, np.float64)}, metadata()), "float64 of shape"),
        (save({"layers.0.weight": np.ones((3, 1), np.float32)}, metadata()), r"of shape \[3, 1\]"),
        (save({"layers.0.weight": np.array([1, np.nan, 1], np.float32)}, metadata()), "NaN or infinity"),
        (save({"layers.0.weight": np.array([1, np.inf, 1], np.float32)}, metadata()), "NaN or infinity"),
    ],
)
def test_a_blob_that_is_no_expert_is_refused_in_words(blob: bytes, problem: str) -> None:
    with pytest.raises(CorruptArtefact, match=f"^my upload cannot be used: .*{problem}"):
        ExpertVectors.from_bytes(blob, "my upload")


def test_a_blob_that_is_too_large_is_refused_unread() -> None:
    with pytest.raises(CorruptArtefact, match="it has 100 bytes and at most 99 are read"):
        ExpertVectors.from_bytes(b"x" * 100, max_bytes=99)


@pytest.mark.parametrize(
    ("expert", "problem"),
    [
        (an_expert(backbone="c" * 64), "made for backbone cccccccccccc and this one is bbbbbbbbbbbb"),
        (an_expert(factors="c" * 64), "made for factors cccccccccccc and these are ffffffffffff"),
        (an_expert(z={"layers.9.weight": np.ones(3, np.float32)}), "layers.9.weight is none of the 2 factored layers"),
        (an_expert(z={"layers.0.weight": np.ones(4, np.float32)}), "has 4 multipliers and the layer 3 singular values"),
        (an_expert(z={"layers.0.weight": np.ones(0, np.float32)}), "has 0 multipliers and the layer 3 singular values"),
    ],
)
def test_an_expert_for_something_else_is_refused_in_words(expert: ExpertVectors, problem: str) -> None:
    with pytest.raises(CorruptArtefact, match=problem):
        expert.check_fits(INDEX)


def test_a_truncated_expert_keeps_the_leading_multipliers_and_fits() -> None:
    whole = an_expert()
    cut = whole.truncated(2, INDEX)
    assert {name: z.tolist() for name, z in cut.z.items()} == {"layers.0.weight": [1, 2], "layers.1.weight": [0.5, 1]}
    cut.check_fits(INDEX)
    assert (cut.rank, cut.is_truncated(INDEX)) == (2, True)
    assert (whole.rank, whole.is_truncated(INDEX)) == (3, False)
    assert whole.truncated(3, INDEX).digest == whole.digest != cut.digest
    assert ExpertVectors.from_bytes(cut.to_bytes()).digest == cut.digest
    with pytest.raises(InvalidRequest, match="at least 1 singular value, got 0"):
        whole.truncated(0, INDEX)


def test_a_renormalised_expert_that_is_constant_beyond_the_cut_loses_nothing_by_it() -> None:
    z = {"layers.0.weight": np.array([0.9, 0.5, 0.5], np.float32)}
    cut = an_expert(z=z, renormalise=True).truncated(1, INDEX)
    np.testing.assert_allclose(cut.z["layers.0.weight"], [1.8])
    with pytest.raises(InvalidRequest, match="the mean of z is 0"):
        an_expert(z={"layers.0.weight": np.array([1, 1, -1], np.float32)}, renormalise=True).truncated(1, INDEX)


def test_the_identity_changes_no_singular_value() -> None:
    identity = ExpertVectors.identity(BACKBONE, FACTORS)
    identity.check_fits(INDEX)
    assert (identity.rank, identity.is_truncated(INDEX), dict(identity.z)) == (0, False, {})


def test_experts_and_mixtures_are_read_without_torch() -> None:
    code = "import sys, metasepia.experts.vectors, metasepia.experts.mixing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
