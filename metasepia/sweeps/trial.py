"""What the settings of a sweep's trials have in common."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from metasepia.errors import InvalidSettings

Trial = TypeVar("Trial", bound="TrialSettings")


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Settings of one trial, as a plan spells them in JSON."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[Trial], values: Mapping[str, Any]) -> Trial:
        """Raises InvalidSettings for a name that no trial has."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise InvalidSettings(name, values[name], f"one of {', '.join(sorted(known))}")
        return cls(**values)

    def _whole(self, name: str, *, least: int, most: int | None = None, way_out: str = "") -> None:
        """Raises InvalidSettings unless the setting is a whole number within these bounds."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
            allowed = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
            raise InvalidSettings(name, value, allowed + way_out)
