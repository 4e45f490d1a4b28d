"""Runs code that a model wrote against tests, where it can do no harm and cannot pass by a trick.

Each run is a process group of its own in new user, mount, process, network, IPC and host name namespaces: an empty
environment, a root directory that holds the interpreter's libraries and an empty /tmp, no network, no privileges, no
process or thread beside its one, limits on processor time, address space and files. At the deadline all of it is
killed. `jail.py` is the inside.
"""

import contextlib
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metasepia.errors import InvalidSettings, NotSupported

JAIL = Path(__file__).with_name("jail.py")
START_TIMEOUT_S = 30.0
"""Allowed to the interpreter and the namespaces on a busy machine, beyond the run's own time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run."""

    wall_s: float = 10.0
    """From the start of the code to the verdict; above 0."""
    cpu_s: int = 5
    """Seconds of each process."""
    memory_mib: int = 256
    """Address space of each process; Python itself takes some 30."""
    open_files: int = 32
    file_mib: int = 1
    """The largest file that may be written."""
    tmpfs_mib: int = 8
    """All files together."""

    def __post_init__(self) -> None:
        if not self.wall_s > 0:
            raise InvalidSettings("wall_s", self.wall_s, "above 0")
        for name, least in {"cpu_s": 1, "memory_mib": 64, "open_files": 8, "tmpfs_mib": 1}.items():
            if getattr(self, name) < least:
                raise InvalidSettings(name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True)
class Verdict:
    right: bool
    why: str = ""
    """What went wrong first; empty when right."""


class Sandbox:
    """Whether code passes tests. Raises NotSupported when it is made on a machine that cannot isolate it."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
            raise NotSupported(
                f"running generated code on {sys.platform} {platform.machine()}", "use Linux on x86_64 or aarch64"
            )
        for code, wanted in (("def one():\n    return 1", True), ("def one():\n    return 2", False)):
            verdict = self.run(code, ["assert one() == 1"])
            if verdict.right != wanted:
                raise NotSupported("running generated code", f"its sandbox judged a probe wrongly ({verdict.why})")

    def run(self, code: str, tests: Sequence[str], setup: str = "") -> Verdict:
        """Whether `code` runs and each of `tests`, assertions about what it defines, holds. `setup` precedes the tests.

        Raises NotSupported where the namespaces cannot be had.
        """
        with tempfile.TemporaryDirectory(prefix="metasepia-") as root:
            limits = {**asdict(self.limits), "root": root}
            stdin = b"".join(map(_framed, (limits, {"code": code}, {"setup": setup, "tests": list(tests)})))
            command = [sys.executable, "-I", "-S", "-B", str(JAIL)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd=root,
                start_new_session=True,
            )
            try:
                out, err = process.communicate(stdin, timeout=self.limits.wall_s + START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                out, err = b"", b""
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return _verdict(out, err)


def _framed(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data


def _verdict(out: bytes, err: bytes) -> Verdict:
    messages = []
    while len(out) >= 4:
        (length,) = struct.unpack("!I", out[:4])
        messages.append(json.loads(out[4 : 4 + length]))
        out = out[4 + length :]
    for message in messages:
        if "refused" in message:
            raise NotSupported(
                f"running generated code here ({message['refused']})",
                "allow unprivileged user namespaces to this user, or leave out tasks that run code",
            )
        if "verdict" in message:
            return Verdict(message["verdict"] == "right", message.get("why", ""))
    if {"jailed": True} not in messages:
        raise NotSupported(f"running generated code here ({err.decode(errors='replace')[-300:].strip()})", "see above")
    return Verdict(False, "it did not finish within its limits")
