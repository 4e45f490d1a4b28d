"""A backbone's rows for background work, with every way of its being away as one error."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from metasepia.errors import Unavailable
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk
from serve.parts import Backbone
from serve.requests.failures import unwrap

_AWAY = (RayActorError, BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError)


class Reached:
    """What fails because the backbone is away raises Unavailable; everything else its own error."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        try:
            return await self._backbone.score(rows)
        except Exception as error:
            raise self._told(error) from error

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        try:
            return await self._backbone.hidden_states(rows)
        except Exception as error:
            raise self._told(error) from error

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        try:
            async with aclosing(self._backbone.generate(row)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> BaseException:
        return told(error, f"backbone {self._backbone.id}")


def told(error: Exception, part: str) -> BaseException:
    """An error that a Serve handle raised: Unavailable where the part is away, else our own out of Ray's wrapping."""
    return Unavailable(part, 2.0) if isinstance(error, _AWAY) else unwrap(error)
