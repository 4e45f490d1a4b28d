"""What other machines could reach, and what keeps them out. A door that others reach asks for keys, and the Ray behind
it for its own token: whoever may call Ray may run anything.
"""

from dataclasses import dataclass

from cluster.settings import Settings
from cluster.starting import doors, is_public
from metasepia.errors import InvalidSettings


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A setting that leaves something open to others."""

    setting: str
    value: object
    problem: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}: {self.problem}; {self.way_out}"


def exposure(settings: Settings) -> tuple[Finding, ...]:
    """Everything that is open to other machines and should not be; nothing for doors on loopback."""
    found: list[Finding] = []
    public = [(field.replace("port", "host"), host) for field, host, _ in doors(settings) if is_public(host)]
    for field, host in public:
        if not settings.keys.required:
            problem = "other machines reach it, and whoever does may do everything, as keys.required is false"
            way_out = "set keys.required = true (METASEPIA_KEYS__REQUIRED=true), or listen on 127.0.0.1"
            found.append(Finding(setting=field, value=host, problem=problem, way_out=way_out))
    if public and settings.ray.auth_mode != "token":
        doors_said = " and ".join(field for field, _ in public)
        found.append(
            Finding(
                setting="ray.auth_mode",
                value=settings.ray.auth_mode,
                problem=f"{doors_said}: other machines reach it, and a Ray without its token runs what anybody sends",
                way_out="set ray.auth_mode = 'token' (METASEPIA_RAY__AUTH_MODE=token), or listen on 127.0.0.1",
            )
        )
    return tuple(found)


def check_exposure(settings: Settings) -> None:
    """Raises InvalidSettings with the first of what `exposure` finds."""
    for one in exposure(settings):
        raise InvalidSettings(one.setting, one.value, f"another: {one.problem}; {one.way_out}")
