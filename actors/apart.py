"""Calls that belong to the process that makes them, not to the Ray task that it serves meanwhile."""

import contextvars
from typing import Any


def apart(method: Any, *args: Any) -> Any:
    """`method.remote(*args)` outside of the current Ray task, which a context variable names.

    Ray cancels with a task all that it has called, and Serve cancels the task of a client that leaves. An actor that
    executes in order (ranks, the registry) then waits for the call that does not come, up to 30 s, and answers nobody
    else of the same process: a rank that is well would be taken for silent, and its gang be given up.
    """
    return contextvars.Context().run(method.remote, *args)
