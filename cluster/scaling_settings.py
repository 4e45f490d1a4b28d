"""How many replicas a part of the graph has."""

from dataclasses import dataclass

from cluster.tables import between
from metasepia.errors import InvalidSettings


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """Between which bounds a part scales, and on what. Equal bounds fix the number, and nothing is measured."""

    min_replicas: int = 1
    """From 1 to 1000."""
    max_replicas: int = 1
    """From min_replicas to 1000. A cluster of our own must have room for all of them."""
    queued_per_replica: float = 4096.0
    """What clients wait for, at the gateway or in the part, that one replica is given before another is added: tokens
    of a backbone (prompts not yet answered, and answers still to come) or an encoder, queries of the reasoning pool.
    From 1 to 10**9."""
    upscale_delay_s: float = 10.0
    """How long it must be too much. From 0 to 86400."""
    downscale_delay_s: float = 300.0
    """How long fewer replicas must have been enough, with room to spare. From 0 to 86400."""
    look_back_s: float = 15.0
    """The amount is the mean over this long; it is read five times in it. From 1 to 3600."""

    @property
    def is_fixed(self) -> bool:
        return self.min_replicas == self.max_replicas

    def __post_init__(self) -> None:
        between("scaling", "min_replicas", self.min_replicas, 1, 1000)
        between("scaling", "max_replicas", self.max_replicas, self.min_replicas, 1000)
        between("scaling", "queued_per_replica", self.queued_per_replica, 1, 10**9)
        between("scaling", "upscale_delay_s", self.upscale_delay_s, 0, 86_400)
        between("scaling", "downscale_delay_s", self.downscale_delay_s, 0, 86_400)
        between("scaling", "look_back_s", self.look_back_s, 1, 3600)

    def check(self, owner: str, bound: int) -> None:
        """Raises InvalidSettings where a part that scales refuses requests (beyond `bound`) before it would grow."""
        if not self.is_fixed and self.queued_per_replica >= bound:
            allowed = f"below {bound}, beyond which {owner} refuses requests"
            raise InvalidSettings(f"{owner}.scaling.queued_per_replica", self.queued_per_replica, allowed)
