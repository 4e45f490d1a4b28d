"""How an OpenAI-compatible endpoint is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from metasepia.blackbox.keys import check_variable
from metasepia.blackbox.meter import Prices
from metasepia.digests import canonical_json
from metasepia.errors import InvalidSettings
from metasepia.kinds import check_kinds

Api = Literal["chat", "completions"]
Way = Literal["echo", "prompt logprobs", "first token", "sampling"]
"""How labels are scored. `echo`: teacher-forced log-probabilities from /completions with `echo` and `logprobs`. `prompt
logprobs`: the same from servers with `prompt_logprobs` (vLLM), chats too. `first token`: the likeliest first tokens of
an answer. `sampling`: replies drawn again and again, and counted."""
Normalise = Literal["sum", "token", "character"]
"""A label's score from its verbaliser's log-probabilities: their sum, the default of the field (log p of the words), or
divided by its tokens or characters, where verbalisers differ much in length."""

CONTENT_FREE = ("N/A", "[MASK]", "")
"""The inputs of contextual calibration as its paper takes them (Zhao et al. 2021, arXiv:2102.09690)."""
_OURS = frozenset(
    """model messages prompt max_tokens max_completion_tokens temperature seed n stream echo logprobs top_logprobs
    prompt_logprobs add_generation_prompt continue_final_message""".split()  # noqa: SIM905
)


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """One model behind one endpoint. Holds the name of the key's variable, never a key."""

    base_url: str
    """Up to where /chat/completions goes, as https://host/v1. Without user, password or query."""
    model: str
    key_env: str | None = None
    """The environment variable that holds the key; None: requests carry none."""
    key_header: str = "Authorization"
    """Authorization carries `Bearer <key>`; another header carries the key alone."""
    api: Api = "chat"
    """`completions` continues the prompt as plain text, at /completions."""
    way: Way | Literal["auto"] = "auto"
    """auto: the best one that the endpoint serves, found out with its first requests."""
    normalise: Normalise = "sum"
    """Of teacher-forced scores."""
    calibrate: tuple[str, ...] = ()
    """Inputs that say nothing (CONTENT_FREE): labels' probabilities are divided by their mean there. (): no."""
    num_samples: int = 10
    """sampling: replies a text. At least 1."""
    temperature: float = 1.0
    """sampling: 1 draws from the model's own distribution. In (0, 2]. Open replies are greedy."""
    seed: int | None = 0
    """Of sample i seed + i; None where the endpoint takes no seed."""
    concurrency: int = 8
    """Requests in flight. At least 1."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    request_timeout_s: float = 60.0
    """For one whole answer."""
    patience_s: float = 600.0
    """For one text, its pauses and retries together; then the run ends, to be resumed."""
    max_attempts: int = 8
    """Of one request that fails; "too many requests" (429) is bounded by `patience_s` alone."""
    max_bad_answers: int = 3
    """Of one request: answers that are none (HTML, torn JSON, wrong fields)."""
    backoff_s: float = 0.5
    """Of the first retry; doubled each time up to `max_backoff_s`, and drawn between 0 and that. A `Retry-After` goes
    before it."""
    max_backoff_s: float = 60.0
    max_answer_mib: float = 8.0
    same: Literal["model and fingerprint", "model"] = "model and fingerprint"
    """What must stay as it is for answers to be one model's: the response's `model`, and its `system_fingerprint`."""
    on_change: Literal["stop", "ask again"] = "stop"
    """When another model begins to answer: ModelChanged, or all texts are asked of what answers now."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request's body, as JSON; no keys."""
    prices: Prices | None = None

    def __post_init__(self) -> None:
        """Raises InvalidSettings naming the field."""
        check_kinds(self)
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        object.__setattr__(self, "extra", dict(self.extra))
        _check_url(self.base_url)
        if self.key_env is not None:
            check_variable(self.key_env)
        if not self.model.strip():
            raise InvalidSettings("model", self.model, "the name of a model")
        header = self.key_header
        if not header.isascii() or not header.replace("-", "").isalnum():
            raise InvalidSettings("key_header", "(not shown)", "the name of a header, as Authorization or api-key")
        if self.way == "echo" and self.api == "chat":
            raise InvalidSettings("way", self.way, "used with api = 'completions'; chats have no echo")
        if not 0 < self.temperature <= 2:
            raise InvalidSettings("temperature", self.temperature, "above 0 and at most 2")
        for name in ("num_samples", "concurrency", "max_attempts", "max_bad_answers"):
            if not getattr(self, name) >= 1:
                raise InvalidSettings(name, getattr(self, name), "at least 1")
        for name in ("request_timeout_s", "patience_s", "backoff_s", "max_backoff_s", "max_answer_mib"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidSettings(name, getattr(self, name), "above 0")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise InvalidSettings(name, getattr(self, name), "above 0, or left out")
        taken = sorted(_OURS & self.extra.keys())
        if taken:
            raise InvalidSettings("extra", taken, "without the fields that are set here")
        try:
            canonical_json(self.extra)
        except (TypeError, ValueError) as error:
            raise InvalidSettings("extra", sorted(self.extra), f"plain JSON ({error})") from None

    @property
    def endpoint(self) -> str:
        """For people, and safe to show."""
        return self.base_url


def _check_url(url: str) -> None:
    """Refuses what may hold a password or a key, without showing it."""
    allowed = "http(s)://host[:port]/path, as https://api.example.com/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InvalidSettings("base_url", "(not shown)", allowed) from None
    if "@" in url or parts.query or parts.fragment:
        shown = f"{parts.scheme}://[...]{host or ''}[...]"
        way_out = "without user, password and query; name the variable of a key in key_env"
        raise InvalidSettings("base_url", shown, f"{allowed}, {way_out}")
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidSettings("base_url", url, allowed)
