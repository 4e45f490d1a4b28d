"""Calls about the server itself."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from metasepia.client.calls import Answer, Ask, Steps, ask, ask_list, everything, raw, request
from metasepia.client.errors import NotOurs
from metasepia.client.results import Deletion, Health, Job, Key, Model, UsageOfDay, Version


def models() -> Steps[list[Model]]:
    """Everything that a request can name as its model."""
    return [Model.of(one) for one in (yield from ask_list(request("ListModels")))]


def model(id: str) -> Steps[Model]:
    """One of them."""
    return Model.of((yield from ask(request("GetModel", model=id))))


def health() -> Steps[Health]:
    """Whether every part answers. Raises Unavailable, saying which does not."""
    return Health.of((yield from ask(request("GetHealth"))))


def version() -> Steps[str]:
    """Of the server."""
    return Version.of((yield from ask(request("GetVersion")))).version


def status() -> Steps[dict[str, Any]]:
    """The graph at a glance: parts, backbones, rates, latency, the last ten minutes. As GET /v1/status has it."""
    answer: Answer = yield Ask(request("GetStatus"))
    found = answer.json()
    if not isinstance(found, dict):
        raise NotOurs(answer.url, answer.shown)
    return found


def create_key(
    *,
    tenant: str,
    scopes: Sequence[Literal["infer", "contexts", "experts:write", "admin"]],
    label: str | None = None,
    expires_in_s: float | None = None,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
) -> Steps[Key]:
    """A key for a tenant. Its secret is in `key` of this one answer."""
    body = {
        "tenant": tenant, "scopes": list(scopes), "label": label, "expires_in_s": expires_in_s,
        "requests_per_minute": requests_per_minute, "tokens_per_day": tokens_per_day,
    }  # fmt: skip
    return Key.of((yield from ask(request("CreateKey", body))))


def keys() -> Steps[list[Key]]:
    """All of them, dead ones too."""
    return [Key.of(one) for one in (yield from everything(request("ListKeys")))]


def key(id: str) -> Steps[Key]:
    """One of them."""
    return Key.of((yield from ask(request("GetKey", id=id))))


def revoke_key(id: str) -> Steps[Deletion]:
    """Ends a key; on other gateways within seconds."""
    return Deletion.of((yield from ask(request("RevokeKey", id=id))))


def usage(*, tenant: str | None = None, first: str | None = None, last: str | None = None) -> Steps[list[UsageOfDay]]:
    """What keys have used, by day from `first` to `last` (2026-01-31): of this key's tenant, or for `admin` of all."""
    params = {"tenant": tenant, "from": first, "to": last, "limit": 10_000}
    return [UsageOfDay.of(one) for one in (yield from ask_list(request("GetUsage", params=params)))]


def jobs(*, kind: Literal["ray", "search", "task"] | None = None) -> Steps[list[Job]]:
    """What this key's tenant has under way, the newest first: Ray jobs, searches, task embeddings; at most 200."""
    asked = request("ListJobs", params={"limit": 200, "kind": kind})
    return [Job.of(one) for one in (yield from ask_list(asked))]


def job(id: str) -> Steps[Job]:
    """One of them, and how far it is."""
    return Job.of((yield from ask(request("GetJob", id=id))))


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
