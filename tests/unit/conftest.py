"""Unit tests run without Ray: decision logic is plain classes, and remote parts come in as arguments."""

import pytest


@pytest.fixture(autouse=True)
def _forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a unit test started Ray; move it to tests/local_ray")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(autouse=True, scope="session")
def _without_ray() -> None:
    """The session's cluster (tests/local_ray) ends here: what looks for a running Ray must find none."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
