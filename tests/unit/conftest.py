"""Unit tests run without Ray: decision logic is plain classes, and remote parts come in as arguments."""

import pytest


@pytest.fixture(autouse=True)
def _forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a unit test started Ray; move it to tests/local_ray")

    monkeypatch.setattr(ray, "init", refuse)
