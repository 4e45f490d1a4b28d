"""Calls about the server itself."""

from collections.abc import Mapping
from typing import Any

from metasepia.client.calls import Answer, Ask, Steps, ask, everything, raw, request
from metasepia.client.results import Health, Model


def models() -> Steps[list[Model]]:
    """Everything that a request can name as its model."""
    found = yield from ask(request("ListModels"))
    return [Model.of(one) for one in found["data"]]


def model(id: str) -> Steps[Model]:
    """One of them."""
    return Model.of((yield from ask(request("GetModel", model=id))))


def health() -> Steps[Health]:
    """Whether every part answers. Raises Unavailable, saying which does not."""
    return Health.of((yield from ask(request("GetHealth"))))


def version() -> Steps[str]:
    """Of the server."""
    found: dict[str, Any] = yield from ask(request("GetVersion"))
    return str(found["version"])


def metrics() -> Steps[str]:
    """As Prometheus reads them."""
    answer: Answer = yield Ask(request("GetMetrics", accept="text/plain"))
    return answer.content.decode()


def json_of(method: str, path: str, *, json: Any = None, params: Mapping[str, Any] | None = None) -> Steps[Any]:
    """The answer of any route of the server, for what has no call of its own here."""
    return (yield from ask(raw(method, path, json, params)))


def everything_of(path: str, *, params: Mapping[str, Any] | None = None) -> Steps[list[dict[str, Any]]]:
    """All pages of any list of the server."""
    return (yield from everything(raw("GET", path, None, params)))
