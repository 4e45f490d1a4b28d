"""What the catalogue holds, as everybody speaks of it: kinds, owners, names, entries, changes. Plain values."""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from metasepia.errors import InvalidRequest

Kind = Literal["expert", "mixture", "search", "context", "module", "factors", "embedding"]
KINDS: tuple[str, ...] = get_args(Kind)

SHARED = "shared"
"""The owner of shipped artefacts: everyone sees them, only the system writes them."""
LOCAL = "local"
"""The owner of what clients make, while the door has no keys."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A registry entry: an immutable blob by digest and the name that points to it."""

    kind: Kind
    digest: str
    name: str
    owner: str
    created_unix_s: float
    num_bytes: int
    card: dict[str, object] = field(default_factory=dict)
    deleted_unix_s: float | None = None
    """When the name was deleted or replaced; None while it points here."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What happened to names since a revision; see `Registry.changes`."""

    revision: tuple[int, int]
    """To be given next time."""
    names: tuple[tuple[str, str], ...] | None
    """(owner, name) of each name that may have changed; None: list everything again."""
    live: tuple[Artefact, ...] = ()
    """What those names stand for now; one that is not here stands for nothing."""


def check_name(name: str, param: str = "name") -> None:
    """Raises InvalidRequest unless `name` is `[a-z0-9][a-z0-9._-]{0,63}` and not reserved (`auto`, `mix@`, `ctx-`)."""
    if not _NAME.fullmatch(name) or name == "auto" or name.startswith("ctx-"):
        raise InvalidRequest(
            param,
            f"{name[:80]!r} is not allowed; use 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit; "
            "auto, mix@... and ctx-... are reserved",
        )
