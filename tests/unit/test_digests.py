"""Digests depend on content alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from metasepia.digests import digest_of, digest_of_safetensors, is_digest
from metasepia.errors import CorruptArtefact

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(2, dtype=np.int64)}


def test_key_order_and_memory_layout_do_not_matter():
    other = {"a": TENSORS["a"], "b": np.asfortranarray(TENSORS["b"])}
    assert digest_of({"x": 1, "y": 2}, TENSORS) == digest_of({"y": 2, "x": 1}, other)
    assert is_digest(digest_of({}))


@pytest.mark.parametrize(
    "changed",
    [
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"], "b": TENSORS["b"].reshape(3, 2)},
        {"a": TENSORS["a"], "b": TENSORS["b"].astype(np.float64)},
        {"a": TENSORS["a"], "b": TENSORS["b"] + 1e-3},
    ],
    ids=["name", "shape", "dtype", "value"],
)
def test_name_shape_dtype_and_value_each_change_the_digest(changed: dict[str, np.ndarray]):
    assert digest_of({}, changed) != digest_of({}, TENSORS)


def test_nan_in_a_header_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"x": float("nan")})


def test_safetensors_split_over_files_have_the_digest_of_one_file(tmp_path: Path):
    save_file(TENSORS, tmp_path / "one.safetensors")
    for name, array in TENSORS.items():
        save_file({name: array}, tmp_path / f"{name}.safetensors", metadata={"made": "elsewhere"})
    split = digest_of_safetensors({}, [tmp_path / "b.safetensors", tmp_path / "a.safetensors"])
    assert split == digest_of_safetensors({}, [tmp_path / "one.safetensors"])


def test_a_cut_off_file_is_said_to_be_corrupt(tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptArtefact, match=r"cut\.safetensors cannot be used: it ends inside tensor"):
        digest_of_safetensors({}, [path])
    path.write_bytes((1 << 40).to_bytes(8, "little") + json.dumps({}).encode())
    with pytest.raises(CorruptArtefact, match="header is longer than the file"):
        digest_of_safetensors({}, [path])
