"""Whether the graph answers: a real forward through each part, bounded in time, shared by whoever asks at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors import meters
from metasepia.errors import Overloaded
from metasepia.rows import Row, Sampling
from serve.parts import Backbone
from serve.requests.failures import unwrap
from serve.shared import Shared

PROBE_TIMEOUT_S = 5.0
FRESH_S = 2.0
"""A report this young is given again without a probe."""
PROBE_PRIORITY = 1000

Probe = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Report:
    """What each part said when it was asked last."""

    ready: bool
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        broken = [f"{name}: {one['reason']}" for name, one in self.parts.items() if not one["ready"]]
        return "; ".join(broken)


class Health:
    """Asks every part, all at once, each within `timeout_s`."""

    def __init__(self, probes: Mapping[str, Probe], timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self._probes, self._timeout_s = dict(probes), timeout_s
        self._answered: set[str] = set()
        self._asked = Shared(self._ask_all)
        self._last: tuple[float, Report] | None = None

    def last(self) -> Report:
        """What the last report said; before the first one, nobody has answered yet."""
        if self._last is not None:
            return self._last[1]
        return Report(False, {name: {"ready": False, "reason": "not asked yet"} for name in self._probes})

    def age_s(self) -> float | None:
        """Of the last report; None before the first."""
        return None if self._last is None else time.monotonic() - self._last[0]

    async def report(self) -> Report:
        """Of a real forward through each part; the last one where it is good and fresh."""
        if self._last is not None and time.monotonic() - self._last[0] < FRESH_S and self._last[1].ready:
            return self._last[1]
        return await self._asked()

    async def _ask_all(self) -> Report:
        answers = await asyncio.gather(*(self._ask(name, probe) for name, probe in self._probes.items()))
        parts = dict(zip(self._probes, answers, strict=True))
        for name, one in parts.items():
            meters.PART_READY.set(one["ready"], part=name)
        report = Report(all(one["ready"] for one in answers), parts)
        self._last = (time.monotonic(), report)
        return report

    async def _ask(self, name: str, probe: Probe) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                await probe()
        except TimeoutError:
            return {"ready": False, "reason": f"no answer within {self._timeout_s:g} s"}
        except Exception as error:
            error = unwrap(error)
            if not (isinstance(error, Overloaded) and name in self._answered):  # a full queue is not a dead part
                return {"ready": False, "reason": str(error) or type(error).__name__}
        self._answered.add(name)
        return {"ready": True, "seconds": round(time.monotonic() - begin, 4)}


def probe_backbone(backbone: Backbone) -> Probe:
    """One token from one token, through every rank."""

    async def probe() -> None:
        row = Row(
            request_id=f"health-{time.monotonic_ns()}",
            backbone=backbone.prepared.digest,
            token_ids=(0,),
            sampling=Sampling(temperature=0.0, max_tokens=1),
            deadline_unix_s=time.time() + PROBE_TIMEOUT_S,
            priority=PROBE_PRIORITY,
        )
        async for chunk in backbone.generate(row):
            if chunk.finish is not None:
                return
        raise RuntimeError("the answer ended without its last chunk")

    return probe
