"""What can go wrong, as one tree. No torch here: errors cross process borders, and an import would delay them.

    MetasepiaError
    ├── InvalidSettings        (ValueError)      a setting outside its range; found at start
    ├── InvalidRequest         (ValueError)      a request field outside its range
    │   ├── WindowExceeded                       more tokens than the backbone's window
    │   └── BodyTooLarge                         more bytes than a request may have
    ├── Unauthenticated        (PermissionError) no key, or one that does not open this door
    ├── Forbidden              (PermissionError) a key without the scope that the call needs
    ├── UnknownName            (LookupError)     a name nobody registered; lists those that exist
    ├── DeletedName            (LookupError)     a name that stood for something until it was deleted
    ├── NameTaken              (ValueError)      a name that stands for something else already
    ├── Outdated               (RuntimeError)    made with a part that is served in another version now
    ├── DifferentSpaces        (ValueError)      two task embeddings that no cosine compares
    ├── NotSupported           (NotImplementedError)  a backbone, family or route lacks what was asked
    ├── CorruptArtefact        (ValueError)      a file that is not what its digest or kind says
    ├── CannotPlace            (RuntimeError)    the cluster has less than the settings add up to
    ├── Overloaded             (RuntimeError)    a bounded queue is full; carries `retry_after_s`
    │   └── QuotaExceeded                        a key has used what it may until its window ends
    ├── DeadlineExceeded       (TimeoutError)    a deadline passed before the answer was whole
    ├── Unavailable            (ConnectionError) a part is down or being rebuilt; carries `retry_after_s`
    ├── NoLearningSignal       (RuntimeError)    rewards never differ: policy gradients have no direction
    └── Locked                 (RuntimeError)    another writer holds the registry

Each class's `args` equal its constructor's parameters, so that Ray hands the caller the error itself.
"""

import math
from datetime import UTC, datetime


class MetasepiaError(Exception):
    """Root of every error that this project raises on purpose."""


class InvalidSettings(MetasepiaError, ValueError):
    """A setting is outside its range, or two settings contradict each other."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field, self.value, self.allowed = field, value, allowed

    def __str__(self) -> str:
        return f"setting {self.field} = {self.value!r} is not allowed; it must be {self.allowed}"


class InvalidRequest(MetasepiaError, ValueError):
    """A request's field has a value that no answer can be given for."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(param, message)
        self.param, self.message = param, message

    def __str__(self) -> str:
        return self.message if self.param is None else f"{self.param}: {self.message}"


class WindowExceeded(InvalidRequest):
    """The prompt, or prompt and `max_tokens` together, do not fit the backbone's window."""

    def __init__(self, param: str, num_tokens: int, window: int, way_out: str = "shorten it") -> None:
        MetasepiaError.__init__(self, param, num_tokens, window, way_out)
        self.param, self.num_tokens, self.window, self.way_out = param, num_tokens, window, way_out
        self.message = f"{num_tokens} tokens do not fit the window of {window} tokens; {way_out}"


class BodyTooLarge(InvalidRequest):
    """The request's body is longer than this server reads."""

    def __init__(self, max_mib: float, way_out: str = "send fewer texts at a time") -> None:
        MetasepiaError.__init__(self, max_mib, way_out)
        self.param, self.max_mib, self.way_out = "body", max_mib, way_out
        self.message = f"longer than {max_mib:g} MiB; {way_out}"


class Unauthenticated(MetasepiaError, PermissionError):
    """The door asks for a key, and the request brought none, or one that opens nothing. Never says which key it was."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}; send one as 'Authorization: Bearer msk_...'"


class Forbidden(MetasepiaError, PermissionError):
    """The key is good, and lacks the scope that the call needs."""

    def __init__(self, operation: str, scope: str) -> None:
        super().__init__(operation, scope)
        self.operation, self.scope = operation, scope

    def __str__(self) -> str:
        return f"{self.operation} needs a key with the scope {self.scope!r}, which this one has not"


class UnknownName(MetasepiaError, LookupError):
    """No such model, expert, encoder, module, context or digest."""

    def __init__(self, kind: str, name: str, known: tuple[str, ...]) -> None:
        super().__init__(kind, name, known)
        self.kind, self.name, self.known = kind, name, known

    def __str__(self) -> str:
        return f"no {self.kind} named {self.name!r}; known: {', '.join(self.known) or 'none'}"


class DeletedName(MetasepiaError, LookupError):
    """What had this name was deleted; unlike an unknown name, it can be made again with the same content."""

    def __init__(self, kind: str, name: str, deleted_unix_s: float) -> None:
        super().__init__(kind, name, deleted_unix_s)
        self.kind, self.name, self.deleted_unix_s = kind, name, deleted_unix_s

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.deleted_unix_s, UTC).isoformat(timespec="seconds")
        return f"the {self.kind} {self.name} was deleted at {when}; create it again, the same content has the same id"


class NameTaken(MetasepiaError, ValueError):
    """The name stands for something else, and the request did not say that it may be replaced."""

    def __init__(
        self, kind: str, name: str, digest: str, way_out: str = "replace it with PUT, or choose another name"
    ) -> None:
        super().__init__(kind, name, digest, way_out)
        self.kind, self.name, self.digest, self.way_out = kind, name, digest, way_out

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r} exists ({self.digest}); {self.way_out}"


class Outdated(MetasepiaError, RuntimeError):
    """A stored thing was made with a part that this server does not have any more, or has in another version."""

    def __init__(self, what: str, part: str, made_with: str, served: tuple[str, ...]) -> None:
        super().__init__(what, part, made_with, served)
        self.what, self.part, self.made_with, self.served = what, part, made_with, served

    def __str__(self) -> str:
        return (
            f"{self.what} was made with the {self.part} {self.made_with}, and this server has "
            f"{', '.join(self.served) or 'none'}; create it again from its examples, or serve the {self.part} of then"
        )


class IdempotencyConflict(MetasepiaError, ValueError):
    """An Idempotency-Key came again with another request than the one that it was first sent with."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return (
            f"the Idempotency-Key {self.key!r} was sent before with another request (method, path, query, body or kind "
            "of answer); send a new key with a new request"
        )


class InProgress(MetasepiaError, RuntimeError):
    """A request with the same Idempotency-Key is being answered. Asking again after `retry_after_s` seconds is safe."""

    def __init__(self, key: str, retry_after_s: float) -> None:
        super().__init__(key, retry_after_s)
        self.key, self.retry_after_s = key, retry_after_s

    def __str__(self) -> str:
        return (
            f"a request with the Idempotency-Key {self.key!r} is being answered; try again in "
            f"{math.ceil(self.retry_after_s)} s"
        )


class DifferentSpaces(MetasepiaError, ValueError):
    """Two task embeddings of different surrogates, methods, settings or probe texts: their cosine would mean nothing.

    `parts` names those that differ, out of surrogate, method, settings and probes.
    """

    def __init__(self, ours: str, theirs: str, parts: tuple[str, ...]) -> None:
        super().__init__(ours, theirs, parts)
        self.ours, self.theirs, self.parts = ours, theirs, parts

    def __str__(self) -> str:
        return (
            f"task embeddings of the spaces {self.ours} and {self.theirs} cannot be compared: they differ in "
            f"{' and '.join(self.parts)}; embed one of the two tasks again in the other's space"
        )


class NotSupported(MetasepiaError, NotImplementedError):
    """The chosen backbone, family or route cannot do what was asked; says what can."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(what, instead)
        self.what, self.instead = what, instead

    def __str__(self) -> str:
        return f"{self.what} is not supported; {self.instead}"


class CorruptArtefact(MetasepiaError, ValueError):
    """A file or blob is not what its name, digest or kind promises."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} cannot be used: {self.problem}"


class CannotPlace(MetasepiaError, RuntimeError):
    """The deployment needs more than the cluster has; found before anything is started."""

    def __init__(self, resource: str, needed: float, available: float, parts: str) -> None:
        super().__init__(resource, needed, available, parts)
        self.resource, self.needed, self.available, self.parts = resource, needed, available, parts

    def __str__(self) -> str:
        return (
            f"the settings need {self.needed:g} {self.resource} ({self.parts}) and the cluster has {self.available:g}; "
            "choose a smaller profile or add nodes"
        )


class Overloaded(MetasepiaError, RuntimeError):
    """A bounded queue is full. Trying again after `retry_after_s` seconds is safe."""

    def __init__(self, queue: str, retry_after_s: float) -> None:
        super().__init__(queue, retry_after_s)
        self.queue, self.retry_after_s = queue, retry_after_s

    def __str__(self) -> str:
        return f"{self.queue} is full; try again in {self.retry_after_s:.0f} s"


class QuotaExceeded(Overloaded):
    """A key has used what it may within a window of time. `retry_after_s` is how long the window still lasts."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        super().__init__(limit, retry_after_s)
        self.limit = limit

    def __str__(self) -> str:
        return f"this key has used its {self.limit}; try again in {math.ceil(self.retry_after_s)} s"


class DeadlineExceeded(MetasepiaError, TimeoutError):
    """The request's deadline passed before its answer was whole."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(what, timeout_s)
        self.what, self.timeout_s = what, timeout_s

    def __str__(self) -> str:
        return f"{self.what} did not finish within {self.timeout_s:g} s"


class Unavailable(MetasepiaError, ConnectionError):
    """A part of the system is down or being rebuilt. Trying again after `retry_after_s` seconds is safe."""

    def __init__(self, part: str, retry_after_s: float) -> None:
        super().__init__(part, retry_after_s)
        self.part, self.retry_after_s = part, retry_after_s

    def __str__(self) -> str:
        return f"{self.part} is not available now; try again in {self.retry_after_s:.0f} s"


class NoLearningSignal(MetasepiaError, RuntimeError):
    """Every answer got the same reward, batch after batch, before anything was learnt."""

    def __init__(self, num_batches: int, reward: float) -> None:
        super().__init__(num_batches, reward)
        self.num_batches, self.reward = num_batches, reward

    def __str__(self) -> str:
        return (
            f"all answers of {self.num_batches} batches in a row had the same reward, {self.reward:g}: the model never "
            "does what is rewarded, so there is nothing to strengthen. Raise --temperature or --samples, begin with "
            "--choice-steps (tasks with labels), give partial rewards in the task, or use --method sft"
        )


class Locked(MetasepiaError, RuntimeError):
    """Another process writes this registry, or took it over since we opened it."""

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(path, holder)
        self.path, self.holder = path, holder

    def __str__(self) -> str:
        return f"{self.path} is held by {self.holder}; stop that process or choose another registry directory"
