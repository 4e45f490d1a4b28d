"""Waiting for a worker thread's answer, within a deadline."""

import asyncio
import time
from concurrent.futures import Future
from typing import TypeVar

from metasepia.errors import DeadlineExceeded, MetasepiaError

T = TypeVar("T")


def remaining_s(deadline_unix_s: float, what: str) -> float:
    """Seconds left; infinity without a deadline. Raises DeadlineExceeded when there are none."""
    timeout_s = deadline_unix_s - time.time()
    if not timeout_s > 0:  # written so that NaN fails too
        raise DeadlineExceeded(what, 0.0)
    return timeout_s


async def answer_within(answer: "Future[T]", timeout_s: float, what: str) -> T:
    """The answer, or what the worker raised. Raises DeadlineExceeded after `timeout_s`.

    `answer` is cancelled when time is up or the caller leaves: the worker then drops the request.
    """
    try:
        return await asyncio.wait_for(asyncio.wrap_future(answer), None if timeout_s == float("inf") else timeout_s)
    except MetasepiaError:  # a DeadlineExceeded of the worker's is a TimeoutError too
        raise
    except TimeoutError:
        raise DeadlineExceeded(what, round(timeout_s, 3)) from None
