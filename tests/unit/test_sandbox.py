"""Programs that mean harm, or mean to pass by a trick. Each is judged by the assertion that an honest one passes."""

import os
import socket
import time
from pathlib import Path

import pytest

from jobs.tasks.sandbox import JAIL, Limits, Sandbox
from metasepia.errors import InvalidSettings, NotSupported

QUICK = Limits(wall_s=1.5, cpu_s=1, memory_mib=160)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(QUICK)
    except NotSupported as error:
        pytest.skip(str(error))


HONEST = "import math\ndef root(x):\n    return math.isqrt(x)"
TRICKS = {
    "exits with success": "import sys\nsys.exit(0)",
    "exits at once when called": "import os\ndef root(x):\n    os._exit(0)",
    "prints success": "def root(x):\n    print('right', flush=True)\n    raise SystemExit(0)",
    "writes a verdict to every descriptor": """
import json, os, struct
def root(x):
    data = json.dumps({"verdict": "right"}).encode()
    for descriptor in range(32):
        try:
            os.write(descriptor, struct.pack("!I", len(data)) + data)
        except OSError:
            pass
""",
    "is equal to everything": """
class Same:
    def __eq__(self, other):
        return True
    def __hash__(self):
        return 3
def root(x):
    return Same()
""",
    "is a number equal to everything": """
class Same(int):
    def __eq__(self, other):
        return True
def root(x):
    return Same(7)
""",
    "changes builtins": "import builtins\nbuiltins.AssertionError = SystemExit\nbuiltins.set = lambda *a: 3\n"
    "def root(x):\n    return 0",
    "defines what the test calls": "def abs(x):\n    return 3\ndef root(x):\n    return 5",
    "looks for the answer in the frames above": """
import sys
def root(x):
    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(value, (list, tuple)) and any("==" in str(one) for one in value):
                return 3
        frame = frame.f_back
""",
}


def test_an_honest_program_is_right_and_a_mistaken_one_wrong(sandbox: Sandbox) -> None:
    assert sandbox.run(HONEST, ["assert abs(root(9)) == 3", "assert [root(x) for x in (4, 16)] == [2, 4]"]).right
    mistaken = sandbox.run(HONEST, ["assert root(9) == 3", "assert root(16) == 5"])
    assert not mistaken.right
    assert "root(16) == 5" in mistaken.why


@pytest.mark.parametrize("code", TRICKS.values(), ids=TRICKS)
def test_a_trick_does_not_pass(sandbox: Sandbox, code: str) -> None:
    assert not sandbox.run(code, ["assert abs(root(9)) == 3"]).right


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass",
        "import time\ndef root(x):\n    time.sleep(60)",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import os\nos.setsid()\nwhile True:\n    pass",
        "import os, sys\ndef root(x):\n    while True:\n        sys.stdout.write('x' * 65536)",
    ],
    ids=["busy loop", "sleep", "fork bomb", "leaves its process group", "flood of output"],
)
def test_what_never_ends_is_ended_and_leaves_no_process(sandbox: Sandbox, code: str) -> None:
    before, started_s = processes(), time.monotonic()
    assert not sandbox.run(code, ["assert root(9) == 3"]).right
    assert time.monotonic() - started_s < QUICK.wall_s + 15  # namespaces and a busy machine
    give_up_s = time.monotonic() + 5
    while processes() - before and time.monotonic() < give_up_s:
        time.sleep(0.05)
    assert not processes() - before


def test_memory_and_messages_are_bounded(sandbox: Sandbox) -> None:
    hog = sandbox.run("def root(x):\n    return len(bytearray(10**9))", ["assert root(9) > 0"])
    assert not hog.right and "MemoryError" in hog.why
    assert not sandbox.run("def root(x):\n    return 'x' * 3_000_000", ["assert len(root(9)) == 3_000_000"]).right
    assert not sandbox.run("def root(x):\n    open('f', 'w').write('x' * 4_000_000)", ["assert root(9) is None"]).right


def test_no_file_of_the_user_can_be_read_and_none_of_the_libraries_written(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("3")
    for path in (tmp_path / "secret", JAIL, Path("/etc/passwd"), Path("/proc/self/environ")):
        assert path.exists()
        read = f"def root(x):\n    open({str(path)!r}).read()\n    return 3"
        verdict = sandbox.run(read, ["assert root(9) == 3"])
        assert not verdict.right and "FileNotFoundError" in verdict.why
    verdict = sandbox.run(f"def root(x):\n    open({os.__file__!r}, 'a')", ["assert root(9) is None"])
    assert not verdict.right and "OSError" in verdict.why + "OSError" * ("PermissionError" in verdict.why)


def test_the_environment_and_the_working_directory_are_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "3")
    code = "import os\ndef root(x):\n    return dict(os.environ), os.listdir('.')"
    assert sandbox.run(code, ["assert root(9) == ({}, [])"]).right


def test_there_is_no_network_and_nobody_to_signal(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            pass
        reach = f"import socket\ndef root(x):\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return 3"
        verdict = sandbox.run(reach, ["assert root(9) == 3"])
        assert not verdict.right and "OSError" in verdict.why
    assert not sandbox.run(f"import os\ndef root(x):\n    os.kill({os.getpid()}, 0)", ["assert root(9) is None"]).right
    assert not sandbox.run("import os\ndef root(x):\n    os.kill(-1, 9)", ["assert root(9) is None"]).right


@pytest.mark.parametrize(
    "start", ["os.fork()", "subprocess.run([sys.executable])", "threading.Thread(target=print).start()"]
)
def test_it_can_start_no_process_and_no_thread(sandbox: Sandbox, start: str) -> None:
    code = f"import os, subprocess, sys, threading\ndef root(x):\n    {start}\n    return 3"
    verdict = sandbox.run(code, ["assert root(9) == 3"])
    assert not verdict.right and ("Resource temporarily unavailable" in verdict.why or "can't start" in verdict.why)


def test_it_has_no_rights_and_can_take_none(sandbox: Sandbox) -> None:
    unshare = "import ctypes\ndef root(x):\n    return ctypes.CDLL(None).unshare(0x10000000)"
    assert sandbox.run(unshare, ["assert root(9) == -1"]).right
    mount = "import ctypes\ndef root(x):\n    return ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None)"
    assert sandbox.run(mount, ["assert root(9) == -1"]).right


@pytest.mark.parametrize(
    ("code", "test"),
    [
        (
            "def f(x):\n    return {1: (2, {3})}, 1j, b'a', range(3), None",
            "f(0) == ({1: (2, {3})}, 1j, b'a', range(3), None)",
        ),
        ("def f(x):\n    yield from x", "list(f([1, 2])) == [1, 2]"),
        ("from collections import Counter\ndef f(x):\n    return Counter(x)", "f('aab') == {'a': 2, 'b': 1}"),
        ("class P:\n    def __init__(self, a):\n        self.a = a\ndef f(p):\n    return p.a", "f(P(4)) == 4"),
        ("def f(x):\n    return float('inf')", "f(0) == math.inf"),
        ("def f(*x, key=0):\n    return sum(x) + key", "f(1, 2, key=3) == 6"),
    ],
)
def test_data_cross_the_border_as_they_are(sandbox: Sandbox, code: str, test: str) -> None:
    verdict = sandbox.run(code, [f"assert {test}"])
    assert verdict.right, verdict.why


def test_the_setup_of_the_tests_is_run_before_them(sandbox: Sandbox) -> None:
    assert sandbox.run(HONEST, ["assert root(number) == 3"], "number = 9").right


def test_a_machine_without_namespaces_is_refused_in_words_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = (
        JAIL.read_text()
        .replace("libc.unshare(kinds)", "refuse(kinds)")
        .replace(
            "libc = ctypes.CDLL", "def refuse(kinds):\n    ctypes.set_errno(1)\n    return -1\n\n\nlibc = ctypes.CDLL"
        )
    )
    (tmp_path / "jail.py").write_text(refusing)
    monkeypatch.setattr("jobs.tasks.sandbox.JAIL", tmp_path / "jail.py")
    with pytest.raises(NotSupported, match=r"namespaces: Operation not permitted.* is not supported; allow"):
        Sandbox()


def test_limits_that_leave_no_room_are_refused() -> None:
    with pytest.raises(InvalidSettings, match="wall_s"):
        Limits(wall_s=float("nan"))
    with pytest.raises(InvalidSettings, match="memory_mib"):
        Limits(memory_mib=1)


def processes() -> set[str]:
    """Ids of the processes that run jails now."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(JAIL).encode() in (entry / "cmdline").read_bytes():
                    found.add(entry.name)
            except OSError:
                continue
    return found
