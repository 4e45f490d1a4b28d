"""Keys as everybody speaks of them: `msk_<id>_<secret>`, what one may do, what it has used.

The secret has 256 bits from the system's random source, so what is kept of it is one sha256: nobody can try so many.
Slow hashes are for passwords, which people choose; here they would cost each request a tenth of a second for nothing.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Literal, get_args

from metasepia.errors import InvalidRequest
from metasepia.registry.entries import LOCAL, SHARED, check_name

Scope = Literal["infer", "contexts", "experts:write", "admin"]
"""What a key may do; `admin` may do everything."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "msk"
MAX_LABEL_CHARS = 128
MAX_LIFETIME_S = 100 * 365.25 * 86400
MAX_REQUESTS_PER_MINUTE, MAX_TOKENS_PER_DAY = 10**9, 10**15

_KEY = re.compile(rf"{PREFIX}_([0-9a-f]{{16}})_([A-Za-z0-9_-]{{43}})")


@dataclass(frozen=True, kw_only=True)
class Key:
    """All that is told of a key: nothing by which it could be used."""

    id: str
    """The public part, 16 hex digits."""
    tenant: str
    """The owner of what its requests make."""
    scopes: tuple[Scope, ...]
    label: str = ""
    requests_per_minute: int | None = None
    """Begun within one UTC minute. None: the settings' limit; 0: no limit."""
    tokens_per_day: int | None = None
    """Read and written within one UTC day. None: the settings' limit; 0: no limit."""
    created_unix_s: float = 0.0
    expires_unix_s: float | None = None
    """From then on it opens nothing, by the registry's clock. None: it does not expire."""
    revoked_unix_s: float | None = None

    def status(self, now_unix_s: float) -> Literal["active", "revoked", "expired"]:
        if self.revoked_unix_s is not None:
            return "revoked"
        return "expired" if self.expires_unix_s is not None and now_unix_s >= self.expires_unix_s else "active"


@dataclass(frozen=True, kw_only=True)
class HeldKey:
    """A key with what its secret is compared with; between the registry and gateways, never told."""

    key: Key
    sha256: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class NewKey:
    """A key to be kept. Its maker keeps the secret; the same one may be sent again."""

    id: str
    sha256: bytes = field(repr=False)
    tenant: str
    scopes: tuple[Scope, ...]
    label: str = ""
    lifetime_s: float | None = None
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None

    def check(self, *, operator: bool = False) -> "NewKey":
        """Raises InvalidRequest naming the field. `operator`: somebody at the machine itself, who may also make a key
        to what was made while the door had none, the tenant `local`.
        """
        check_name(self.tenant, "tenant")
        if self.tenant == SHARED or (self.tenant == LOCAL and not operator):
            raise InvalidRequest("tenant", f"{self.tenant!r} is reserved; choose another name")
        if not self.scopes or len(set(self.scopes)) < len(self.scopes) or not set(self.scopes) <= set(SCOPES):
            raise InvalidRequest("scopes", f"must be one or more of {', '.join(SCOPES)}, each once")
        if len(self.label) > MAX_LABEL_CHARS or not (self.label.isprintable()):
            raise InvalidRequest("label", f"must be up to {MAX_LABEL_CHARS} printable characters")
        if self.lifetime_s is not None and not 1 <= self.lifetime_s <= MAX_LIFETIME_S:
            raise InvalidRequest("expires_in_s", f"must be from 1 to {MAX_LIFETIME_S:.0f}, got {self.lifetime_s:g}")
        for name, most in (
            ("requests_per_minute", MAX_REQUESTS_PER_MINUTE),
            ("tokens_per_day", MAX_TOKENS_PER_DAY),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise InvalidRequest(name, f"must be from 0 (no limit) to {most}, got {value}")
        return self


def mint() -> tuple[str, str, bytes]:
    """(id, the whole key, sha256 of its secret) of a key that nobody has. The second is shown once and kept nowhere."""
    id_, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return id_, f"{PREFIX}_{id_}_{secret}", hash_of(secret)


def parse(text: str) -> tuple[str, str] | None:
    """(id, secret); None for what is no key."""
    found = _KEY.fullmatch(text)
    return None if found is None else (found[1], found[2])


def hash_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one key used within one minute, as one gateway counted it."""

    key: str
    minute: int
    """Since 1970, UTC."""
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a gateway tells. Sent again under the same number, it counts once."""

    gateway: str
    number: int
    spent: tuple[Spent, ...]


@dataclass(frozen=True, kw_only=True)
class Total:
    """What all gateways have told of a key, for the windows of its quotas."""

    key: str
    minute: int
    requests: int
    day: int
    """Since 1970, UTC."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a gateway did not know yet."""

    revision: tuple[int, int, int]
    """To be given next time."""
    now_unix_s: float
    """By the registry's clock, which decides what has expired."""
    whole: bool
    """All keys are in `keys`; else those made, changed or revoked since."""
    keys: tuple[HeldKey, ...]
    totals: tuple[Total, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """A line of the ledger."""

    day: int
    key: str
    tenant: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
