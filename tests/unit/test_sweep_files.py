"""Small files are replaced whole."""

import os
from pathlib import Path

import pytest

from metasepia.sweeps.files import Files


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path):
    (tmp_path / "timing.json").write_text("old and longer")
    Files.at(str(tmp_path)).write("timing.json", b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"timing.json": "new"}


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "timing.json").write_text("old")

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        Files.at(str(tmp_path)).write("timing.json", b"new")
    assert (tmp_path / "timing.json").read_text() == "old"
