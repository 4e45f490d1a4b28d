"""Settings of the doors: what a request may be, who may send it, and how many wait."""

from dataclasses import dataclass

from cluster.tables import between

ENDING_S = 30.0
"""Serve's parts, then Ray, once nothing is answered any more; whatever is left then is killed."""


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """The door."""

    host: str = "127.0.0.1"
    port: int = 8000
    """From 1 to 65535."""
    max_body_mib: float = 8.0
    """Larger bodies are refused with 413. From 0.01 to 1024."""
    max_upload_mib: float = 64.0
    """Larger experts are refused with 413, those whose length is told unread. From 0.01 to 4096."""
    max_json_depth: int = 64
    """Deeper JSON is refused with 400. From 8 to 500."""
    request_timeout_s: float = 120.0
    """Deadline of a request that brings none. From 1 to 86400."""
    max_examples: int = 4096
    """Labelled examples of one context, in a request or named. From 256 to 100000."""
    max_unlabelled: int = 4096
    """Unlabelled inputs of one context. From 0 to 100000."""
    max_classes: int = 512
    """Labels of one context. From 2 to 2048."""
    max_label_chars: int = 256
    """Characters of a label. From 16 to 256."""
    max_text_chars: int = 50_000
    """Characters of a text to classify or to learn from; the encoder's window, in tokens, is often less. From 100 to
    10**7."""
    max_vector_width: int = 8192
    """Numbers of a vector that a request brings. From 1 to 65536."""
    max_explained: int = 262_144
    """Examples times inputs times labels of a classification that is explained. From 256 to 10**7."""
    max_explained_examples: int = 1024
    """Examples of a context whose answers are explained: each costs a compiling of the context. From 16 to 100000."""
    max_inputs: int = 2048
    """Texts to classify or embed in one request. From 300 to 100000."""
    max_states_mib: float = 256.0
    """Hidden states of one answer, in float32, as an Arrow stream. From 0.01 to 10**6."""
    max_json_states_mib: float = 8.0
    """The same as JSON, whose text is several times longer and is made at once. From 0.01 to 1024."""
    max_head_kib: float = 64.0
    """Of a request: its line and its headers; more is refused with 431. From 4 to 1024."""
    head_timeout_s: float = 15.0
    """Within which a request's head has to come in, and a new connection has to say something. From 1 to 3600."""
    max_connections: int = 4096
    """Open at once at one proxy; more are refused with 503. From 16 to 10**6."""
    max_replayed_mib: float = 16.0
    """Longer answers are not kept for their Idempotency-Key. From 0.01 to 256."""

    def __post_init__(self) -> None:
        between("http", "port", self.port, 1, 65535)
        between("http", "max_body_mib", self.max_body_mib, 0.01, 1024)
        between("http", "max_upload_mib", self.max_upload_mib, 0.01, 4096)
        between("http", "max_json_depth", self.max_json_depth, 8, 500)
        between("http", "request_timeout_s", self.request_timeout_s, 1, 86400)
        between("http", "max_examples", self.max_examples, 256, 100_000)
        between("http", "max_unlabelled", self.max_unlabelled, 0, 100_000)
        between("http", "max_classes", self.max_classes, 2, 2048)
        between("http", "max_label_chars", self.max_label_chars, 16, 256)
        between("http", "max_text_chars", self.max_text_chars, 100, 10**7)
        between("http", "max_vector_width", self.max_vector_width, 1, 65_536)
        between("http", "max_explained", self.max_explained, 256, 10**7)
        between("http", "max_explained_examples", self.max_explained_examples, 16, 100_000)
        between("http", "max_inputs", self.max_inputs, 300, 100_000)
        between("http", "max_states_mib", self.max_states_mib, 0.01, 10**6)
        between("http", "max_head_kib", self.max_head_kib, 4, 1024)
        between("http", "head_timeout_s", self.head_timeout_s, 1, 3600)
        between("http", "max_connections", self.max_connections, 16, 10**6)
        between("http", "max_replayed_mib", self.max_replayed_mib, 0.01, 256)
        between("http", "max_json_states_mib", self.max_json_states_mib, 0.01, 1024)


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """The Serve ingress."""

    cpus: float = 0.1
    max_ongoing_requests: int = 1024
    """Requests inside a gateway at once, those that wait for their turn included; as many again wait at the proxy, and
    more are refused with 503 by Serve's own limit. From 1 to 100000."""

    def __post_init__(self) -> None:
        between("gateway", "cpus", self.cpus, 0.01, 1000)
        between("gateway", "max_ongoing_requests", self.max_ongoing_requests, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class AdmissionSettings:
    """What waits at the gateway, whose turn it is, and how it ends: `serve/load/`."""

    max_queued_tokens: int = 262_144
    """Of the requests that wait, prompts and answers; beyond it they are refused with 429. From 256 to 10**9."""
    max_queued_mib: float = 64.0
    """Of their bodies. From 0.01 to 10**6."""
    max_queued_requests: int = 512
    """Below gateway.max_ongoing_requests, so that the gateway decides who waits and not the proxy before it. From 1 to
    10**6."""
    ahead: float = 2.0
    """Work let through to a part, in multiples of what it does at once. More fills its batches, less keeps the turns of
    tenants fair. From 1 to 100."""
    drain_s: float = 30.0
    """From the order to end until requests that run are cut off; new ones are refused with 503 meanwhile. Also what
    Serve gives a replica that it takes down. From 0 to 3600."""

    @property
    def grace_s(self) -> float:
        """From SIGTERM to the last process: what whoever stops the graph has to wait before it kills."""
        return self.drain_s + ENDING_S

    def __post_init__(self) -> None:
        between("admission", "max_queued_tokens", self.max_queued_tokens, 256, 10**9)
        between("admission", "max_queued_mib", self.max_queued_mib, 0.01, 10**6)
        between("admission", "max_queued_requests", self.max_queued_requests, 1, 10**6)
        between("admission", "ahead", self.ahead, 1, 100)
        between("admission", "drain_s", self.drain_s, 0, 3600)


@dataclass(frozen=True, kw_only=True)
class GrpcSettings:
    """The gRPC door: the same calls, on a port of Serve's gRPC proxy."""

    enabled: bool = True
    host: str = ""
    """Address to listen on. Empty: that of `[http]`."""
    port: int = 9000
    """From 1 to 65535."""
    reflection: bool = True
    """Lets clients such as grpcurl ask which services and messages there are."""
    max_message_mib: float = 64.0
    """Longer messages are refused unread, in both directions. What a request may hold is bounded by `[http]`. From 0.01
    to 1024."""
    max_watchers: int = 64
    """Open streams of grpc.health.v1.Health/Watch; each is a request inside the gateway. From 1 to 10000."""

    def __post_init__(self) -> None:
        between("grpc", "port", self.port, 1, 65535)
        between("grpc", "max_message_mib", self.max_message_mib, 0.01, 1024)
        between("grpc", "max_watchers", self.max_watchers, 1, 10_000)


@dataclass(frozen=True, kw_only=True)
class KeySettings:
    """Who may come in. Keys are kept beside the catalogue of the registry, as hashes; `python -m actors.keys` makes
    the first one.
    """

    required: bool = False
    """Every call but health and version brings a key. False is for loopback only: then whoever reaches the port may do
    everything, as the tenant `local`."""
    open_metrics: bool = False
    """/metrics and /v1/status need no key, for a scraper that has none. False: one with the scope `admin`."""
    requests_per_minute: int = 0
    """Of a key that was made without a limit of its own, in each UTC minute. 0: no limit. From 0 to 10**9."""
    tokens_per_day: int = 0
    """Likewise tokens read and written in each UTC day. 0: no limit. From 0 to 10**15."""
    sync_every_s: float = 0.25
    """Each gateway tells the registry what its keys have used, and learns of keys made and revoked and of what was used
    elsewhere. A revocation is in force everywhere within this time and that of one call. From 0.05 to 0.5."""
    max_silence_s: float = 30.0
    """A gateway that the registry has not answered for this long lets nobody in with a key. From 1 to 3600."""

    def __post_init__(self) -> None:
        between("keys", "requests_per_minute", self.requests_per_minute, 0, 10**9)
        between("keys", "tokens_per_day", self.tokens_per_day, 0, 10**15)
        between("keys", "sync_every_s", self.sync_every_s, 0.05, 0.5)
        between("keys", "max_silence_s", self.max_silence_s, 1, 3600)
