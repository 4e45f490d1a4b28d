"""Requests outlive replicas: what a part was asked is asked again of whoever serves then, until the deadline.

That is safe because rows, texts and questions to contexts are pure functions of their message. Where there is no room
for two gangs, an update ends the old one first, and its rows wait here.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from metasepia.errors import Unavailable
from serve.requests import failures

logger = logging.getLogger(__name__)

T = TypeVar("T")

GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
"""The replica, not the request."""
PAUSES_S = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Before each try; the last one before all others."""
MAX_WAIT_S = 900.0
"""For requests without a deadline: a part that is away for longer does not come back by itself."""


class Retries:
    """Of one request to one part."""

    def __init__(self, part: str, deadline_unix_s: float) -> None:
        """`part` as its own Unavailable names it when it is stopped."""
        self._part, self._until_s = part, min(deadline_unix_s, time.time() + MAX_WAIT_S)
        self._num = 0

    async def after(self, error: Exception) -> None:
        """Returns when it is time to try again. Raises the error where that is no use."""
        found = failures.unwrap(error)
        # A gang's owner that is stopped says so by its name; one that refuses a row for good says more.
        stopped = isinstance(found, Unavailable) and found.part == self._part
        pause_s = PAUSES_S[min(self._num, len(PAUSES_S) - 1)]
        if not (stopped or isinstance(found, GONE)) or time.time() + pause_s >= self._until_s:
            raise error
        self._num += 1
        logger.info("%s: %s; asking again in %g s", self._part, type(found).__name__, pause_s)
        await asyncio.sleep(pause_s)


async def persistently(part: str, deadline_unix_s: float, ask: Callable[[], Awaitable[T]]) -> T:
    """The answer to a call that may be made more than once."""
    retries = Retries(part, deadline_unix_s)
    while True:
        try:
            return await ask()
        except Exception as error:
            await retries.after(error)
