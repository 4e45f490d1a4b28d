"""Fixtures of all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model of a family, made once a session."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(family, tmp_path_factory.mktemp(f"tiny-{family}"))
        return made[family]

    return of
