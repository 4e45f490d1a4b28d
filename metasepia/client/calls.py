"""Requests and answers as data, and the steps that a call is made of.

What the client does with the server is written once, as generators that yield steps and are sent their outcomes
(`Steps`). Two drivers carry the steps out, with threads or in an event loop (`metasepia.client.transports`).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import quote

from metasepia.client.errors import BadInput, NotOurs

T = TypeVar("T")

ARROW = "application/vnd.apache.arrow.stream"
_NOTHING: Mapping[str, Any] = MappingProxyType({})

CALLS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "Classify": ("POST", "/v1/classify"),
        "CreateContext": ("POST", "/v1/contexts"),
        "ListContexts": ("GET", "/v1/contexts"),
        "GetContext": ("GET", "/v1/contexts/{id}"),
        "DeleteContext": ("DELETE", "/v1/contexts/{id}"),
        "ListContextExamples": ("GET", "/v1/contexts/{id}/examples"),
        "ExtendContext": ("POST", "/v1/contexts/{id}/examples"),
        "CreateChatCompletion": ("POST", "/v1/chat/completions"),
        "CreateCompletion": ("POST", "/v1/completions"),
        "CreateEmbeddings": ("POST", "/v1/embeddings"),
        "CreateHiddenStates": ("POST", "/v1/hidden_states"),
        "ListObservedTasks": ("GET", "/v1/hidden_states/tasks"),
        "GetObservedTask": ("GET", "/v1/hidden_states/tasks/{task}"),
        "DeleteObservedTask": ("DELETE", "/v1/hidden_states/tasks/{task}"),
        "AddExpert": ("POST", "/v1/experts"),
        "ListExperts": ("GET", "/v1/experts"),
        "GetExpert": ("GET", "/v1/experts/{name}"),
        "ReplaceExpert": ("PUT", "/v1/experts/{name}"),
        "DeleteExpert": ("DELETE", "/v1/experts/{name}"),
        "GetExpertContent": ("GET", "/v1/experts/{name}/content"),
        "CreateMixture": ("POST", "/v1/mixtures"),
        "ListMixtures": ("GET", "/v1/mixtures"),
        "CreateSearch": ("POST", "/v1/mixtures/search"),
        "ListSearches": ("GET", "/v1/mixtures/search"),
        "GetSearch": ("GET", "/v1/mixtures/search/{id}"),
        "GetSearchTrace": ("GET", "/v1/mixtures/search/{id}/trace"),
        "GetSearchPicture": ("GET", "/v1/mixtures/search/{id}/picture"),
        "CancelSearch": ("DELETE", "/v1/mixtures/search/{id}"),
        "GetMixture": ("GET", "/v1/mixtures/{digest}"),
        "DeleteMixture": ("DELETE", "/v1/mixtures/{digest}"),
        "CreateTask": ("POST", "/v1/tasks"),
        "ListTasks": ("GET", "/v1/tasks"),
        "ListProbes": ("GET", "/v1/tasks/probes"),
        "GetTaskMap": ("GET", "/v1/tasks/map"),
        "CompareTasks": ("POST", "/v1/tasks/compare"),
        "GetTask": ("GET", "/v1/tasks/{id}"),
        "DeleteTask": ("DELETE", "/v1/tasks/{id}"),
        "FindNearestTasks": ("GET", "/v1/tasks/{id}/nearest"),
        "ListJobs": ("GET", "/v1/jobs"),
        "GetJob": ("GET", "/v1/jobs/{id}"),
        "ListModels": ("GET", "/v1/models"),
        "GetModel": ("GET", "/v1/models/{model:path}"),
        "CreateKey": ("POST", "/v1/keys"),
        "ListKeys": ("GET", "/v1/keys"),
        "GetKey": ("GET", "/v1/keys/{id}"),
        "RevokeKey": ("DELETE", "/v1/keys/{id}"),
        "GetUsage": ("GET", "/v1/usage"),
        "GetHealth": ("GET", "/health"),
        "GetMetrics": ("GET", "/metrics"),
        "GetStatus": ("GET", "/v1/status"),
        "GetVersion": ("GET", "/version"),
    }
)
"""Every call of the server by its name: method and path. A test compares it with the server's own table."""

ONCE = ("CreateKey",)
"""Whose answers the server does not keep for an Idempotency-Key."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, as often as it may be sent."""

    method: str
    path: str
    """Below the server's URL, its names percent-encoded."""
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Of a form with files."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    streams: bool = False
    """The answer's body is wanted as it comes in."""
    once: bool = False
    """The server does not know it again by its Idempotency-Key: sent again only where it was not carried out."""

    @property
    def is_read(self) -> bool:
        return self.method in ("GET", "HEAD")

    def with_headers(self, **headers: str) -> "Request":
        """Underscores in names stand for hyphens."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return dataclasses.replace(self, headers={**self.headers, **more})


def request(
    call: str,
    body: Mapping[str, Any] | None = None,
    /,
    *,
    params: Mapping[str, Any] = _NOTHING,
    content: bytes | None = None,
    content_type: str = "application/json",
    accept: str | None = None,
    **names: str,
) -> Request:
    """The request of a call in CALLS; `names` fill its path. Parameters and fields that are None are left out.

    Raises BadInput for a name that no path can hold, and a body that is not JSON.
    """
    method, path = CALLS[call]
    for part, value in names.items():
        if not value or value in (".", ".."):
            raise BadInput(part, f"{value!r} is no name")
        whole = f"{{{part}:path}}"
        kept = whole in path
        path = path.replace(whole if kept else f"{{{part}}}", quote(value, safe="/:@" if kept else ""))
    if body is not None:
        content = encoded({key: value for key, value in body.items() if value is not None})
    headers = {"accept": accept or "application/json"}
    if content is not None:
        headers["content-type"] = content_type
    given = {key: str(value) for key, value in params.items() if value is not None}
    once = call in ONCE
    return Request(method=method, path=path, params=given, headers=headers, content=content, once=once)


def raw(method: str, path: str, body: Any, params: Mapping[str, Any] | None) -> Request:
    """A request of any route. Raises BadInput for a path that is none."""
    if not path.startswith("/"):
        raise BadInput("path", f"{path!r} must begin with /")
    given = {key: str(value) for key, value in (params or {}).items() if value is not None}
    headers = {"accept": "application/json"} | ({} if body is None else {"content-type": "application/json"})
    content = None if body is None else encoded(body)
    return Request(method=method.upper(), path=path, params=given, headers=headers, content=content)


def encoded(tree: Any) -> bytes:
    """JSON. Raises BadInput for what JSON cannot say: NaN, an infinity, half a surrogate pair, another object."""
    try:
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise BadInput("body", f"cannot be written as JSON: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    content: bytes
    url: str
    """The server's, for complaints."""
    source: Any = None
    """Of a stream: the open response of the transport."""

    def json(self) -> Any:
        """Raises NotOurs."""
        try:
            return json.loads(self.content)
        except ValueError:
            raise NotOurs(self.url, self.shown) from None

    @property
    def shown(self) -> str:
        """Status, type and beginning, for complaints."""
        kind = self.headers.get("content-type", "no content type").partition(";")[0]
        text = re.sub(r"\s+", " ", self.content[:400].decode(errors="replace")).strip()
        return f"{self.status} {kind} {text[:120]!r}"


@dataclass(frozen=True)
class Ask:
    """Step: an answer of the server that is no error, tried again where that is safe."""

    request: Request


@dataclass(frozen=True)
class Send:
    """Step: one try. Its outcome is an Answer of any status; raises NoAnswer and OutOfTime."""

    request: Request
    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Step: wait."""

    seconds: float


@dataclass(frozen=True)
class Together:
    """Step: several calls, `Options.concurrency` at once.

    Its outcome has an entry for each: the result, the exception that ended it, or `SKIPPED`.
    """

    parts: Sequence["Steps[Any]"]
    done: Callable[[int], None]
    """Told the place of each part that ends, from the thread that called."""
    goes_on: Callable[[Exception], bool]
    """Whether parts that have not begun are worth beginning after this error."""


SKIPPED = object()
"""Of a part that was not begun."""

Step = Ask | Send | Pause | Together
Steps = Generator[Step, Any, T]


def ask(request: Request) -> Steps[Any]:
    """The answer's JSON."""
    answer = yield Ask(request)
    return answer.json()


def ask_list(request: Request) -> Steps[list[Any]]:
    """The `data` of a list that has no pages. Raises NotOurs."""
    answer: Answer = yield Ask(request)
    found = answer.json()
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise NotOurs(answer.url, answer.shown)
    return found["data"]


def everything(request: Request) -> Steps[list[dict[str, Any]]]:
    """All pages of a list."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        params = {"limit": 1000, **request.params} | ({"after": after} if after else {})
        answer: Answer = yield Ask(dataclasses.replace(request, params=params))
        page = answer.json()
        if not isinstance(page, dict) or not isinstance(page.get("data"), list):
            raise NotOurs(answer.url, "a list without data")
        found += page["data"]
        if not page.get("has_more"):
            return found
        if not page["data"] or page.get("last_id") in (None, after):
            raise NotOurs(answer.url, "a list that says there is more and does not go on")
        after = str(page["last_id"])
