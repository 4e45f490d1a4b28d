"""The inside of `sandbox.py`: a program of its own that imports the standard library only. Not for import.

Three processes. The *runner* makes new user, mount, process, network, IPC and host name namespaces and a root directory
of a small tmpfs with the interpreter's libraries in it, read only. Its child, process 1 of the new namespace, is the
*judge*: it gives up its rights, forks the *candidate*, and only then reads the tests, which the candidate's memory
therefore never holds. The candidate runs the code under test and answers calls by message. What comes back is plain
data or a handle, so that no object with an `__eq__` of its own, no changed builtin and no exit code can pass for a
right answer. When the judge ends, the kernel ends every process of the namespace.
"""

import ast
import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import types
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE = 1024, 2048, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
MAX_MESSAGE_BYTES = 1 << 20
MAX_ITEMS = 100_000
"""Of an iterator that a candidate returns."""

libc = ctypes.CDLL(None, use_errno=True)


def call(what, result):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=None):
    given = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    call(f"mount {target}", libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]))


def read_exactly(descriptor, count):
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def receive(descriptor):
    (length,) = struct.unpack("!I", read_exactly(descriptor, 4))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError("a message is too long")
    return json.loads(read_exactly(descriptor, length))


def send(descriptor, message):
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError("a message is too long")
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data) :]


# -- namespaces --------------------------------------------------------------------------------------------------------


def enter_namespaces():
    """As root a second user is mapped, to become: limits on processes do not bind root. The maps are then written by a
    child that stays outside, for from within only the one own user may be mapped."""
    uid, gid = os.getuid(), os.getgid()
    uids, gids = [f"0 {uid} 1"], [f"0 {gid} 1"]
    if uid == 0:
        uids.append(f"1 {NOBODY} 1")
        gids.append(f"1 {NOBODY} 1")
    told, tell = os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(tell)
        status = 1
        try:
            if os.read(told, 1):
                write(f"/proc/{me}/setgroups", "deny")
                write(f"/proc/{me}/gid_map", "\n".join(gids))
                write(f"/proc/{me}/uid_map", "\n".join(uids))
                status = 0
        finally:
            os._exit(status)
    kinds = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    call("new namespaces", libc.unshare(kinds))
    os.write(tell, b"1")
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError(1, "the users of a new namespace cannot be mapped")
    write("/proc/sys/user/max_user_namespaces", "0")  # none within this one: there the candidate would be root again


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def build_root(root, tmpfs_mib):
    """A tmpfs with the libraries that Python needs, read only, and an empty /tmp."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={tmpfs_mib}m,nr_inodes=4096,mode=755")
    for path in dict.fromkeys((f"{sys.base_prefix}/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64")):
        if os.path.islink(path):
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
            mount(path, root + path, None, MS_BIND | MS_REC)
            mount(None, root + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept_flags(path))
    os.makedirs(f"{root}/tmp", exist_ok=True)
    os.chmod(f"{root}/tmp", 0o777)


def kept_flags(path):
    """Flags of the mount below that a user namespace must not take away."""
    flags = os.statvfs(path).f_flag
    kept = MS_NOEXEC if flags & os.ST_NOEXEC else 0
    kept |= MS_NOATIME if flags & os.ST_NOATIME else 0
    return kept | (MS_NODIRATIME if flags & os.ST_NODIRATIME else 0)


def enter_root(root):
    os.chdir(root)
    call("pivot_root", libc.syscall(PIVOT_ROOT[platform.machine()], b".", b"."))
    call("umount", libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")


def give_up_rights(limits, was_root):
    os.environ.clear()
    if was_root:
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    header = struct.pack("Ii", 0x20080522, 0)
    call("capset", libc.capset(header, bytes(24)))
    call("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    call("dumpable", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))  # no other process of the same user reads its memory
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory_mib"] << 20),
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_FSIZE, limits["file_mib"] << 20),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


# -- values as messages ------------------------------------------------------------------------------------------------


class Handle:
    """Stands in the judge for an object that stays with the candidate. Equal to nothing but itself."""

    __slots__ = ("_call", "_number")

    def __init__(self, number, call):
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name, value):
        self._call({"set": name, "args": [self, value]})

    def __getattr__(self, name):
        return self._call({"get": name, "args": [self]})


PLAIN = ((list, "l"), (tuple, "t"), (frozenset, "f"), (set, "s"))


def encode(value, keep, depth=0):
    """`keep(object)` gives the number of a handle. Exact values of subclasses of builtins count as the builtin."""
    if depth > 60:
        raise ValueError("data are nested too deeply")
    if value is None or isinstance(value, bool):
        return ["v", value]
    for kind in (int, float, str):
        if isinstance(value, kind):
            return ["v", kind(value)]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    for kind, tag in PLAIN:
        if isinstance(value, kind):
            return [tag, [encode(one, keep, depth + 1) for one in value]]
    if isinstance(value, dict):
        return ["d", [[encode(k, keep, depth + 1), encode(v, keep, depth + 1)] for k, v in value.items()]]
    if isinstance(value, range):
        return ["r", value.start, value.stop, value.step]
    if isinstance(value, types.GeneratorType) or type(value) in (map, filter, zip, enumerate, reversed):
        items = [one for one, _ in zip(value, range(MAX_ITEMS), strict=False)]
        return ["i", [encode(one, keep, depth + 1) for one in items]]
    return ["h", keep(value)]


def decode(message, find):
    tag, *rest = message
    if tag == "v":
        return rest[0]
    if tag == "c":
        return complex(*rest)
    if tag == "b":
        return bytes.fromhex(rest[0])
    if tag == "r":
        return range(*rest)
    if tag == "h":
        return find(rest[0])
    if tag == "d":
        return {decode(k, find): decode(v, find) for k, v in rest[0]}
    items = [decode(one, find) for one in rest[0]]
    return iter(items) if tag == "i" else {"l": list, "t": tuple, "f": frozenset, "s": set}[tag](items)


# -- candidate ---------------------------------------------------------------------------------------------------------


def be_candidate(channel, code):
    """Runs the code, then answers calls until the channel closes."""
    names: dict[str, Any] = {"__name__": "solution"}
    kept = []

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    try:
        exec(compile(code, "solution.py", "exec"), names)
        send(channel, {"ready": True})
    except BaseException as error:
        send(channel, {"error": f"{type(error).__name__}: {error}"[:500]})
        return
    while True:
        asked = receive(channel)
        try:
            args = [decode(one, kept.__getitem__) for one in asked["args"]]
            if "get" in asked:
                result = getattr(args[0], asked["get"])
            elif "set" in asked:
                result = setattr(args[0], asked["set"], args[1])
            else:
                keywords = {key: decode(one, kept.__getitem__) for key, one in asked["keywords"].items()}
                result = names[asked["call"]](*args, **keywords)
            answer = {"value": encode(result, keep)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        send(channel, answer)


# -- judge -------------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """The candidate did not do what the tests ask for."""


def be_judge(channel, setup, tests):
    """Raises Wrong unless every test passes."""
    try:
        ready = receive(channel)
    except (EOFError, ValueError, OSError) as error:
        raise Wrong("the code ended the process before it was run whole") from error
    if "error" in ready:
        raise Wrong(str(ready["error"]))

    def ask(message):
        def keep(value):
            if not isinstance(value, Handle):
                raise TypeError(f"a test passes a {type(value).__name__}, which cannot be sent")
            return value._number

        message["args"] = [encode(one, keep) for one in message["args"]]
        message["keywords"] = {key: encode(one, keep) for key, one in message.get("keywords", {}).items()}
        try:
            send(channel, message)
            answer = receive(channel)
        except (EOFError, OSError) as error:
            raise Wrong("the code ended the process") from error
        if "error" in answer:
            raise Wrong(str(answer["error"]))
        return decode(answer["value"], lambda number: Handle(number, ask))

    names: dict[str, Any] = {"__name__": "tests"}
    for source in [setup, *tests]:
        for name in sorted(needed_names(source) - set(names)):
            if name in sys.stdlib_module_names:
                names[name] = __import__(name)
            elif not hasattr(builtins, name):
                names[name] = lambda *args, _name=name, **keywords: ask(
                    {"call": _name, "args": args, "keywords": keywords}
                )
        try:
            exec(compile(source, "tests.py", "exec"), names)
        except Wrong:
            raise
        except BaseException as error:
            raise Wrong(f"{source.strip()[:200]}: {type(error).__name__} {error}"[:500]) from error


def needed_names(source):
    """Names that a piece of test code reads and does not make itself."""
    nodes = list(ast.walk(ast.parse(source)))
    made = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    made |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - made


def out_of_time(*_):
    raise Wrong("it did not finish in time")


def judge(code, null, wall_s):
    """Process 1. The tests are on standard input still when the candidate is forked."""
    ours, theirs = socket.socketpair()
    candidate = os.fork()
    if candidate == 0:
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        ours.close()
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process and no thread of its own
        try:
            be_candidate(theirs.fileno(), code)
        finally:
            os._exit(0)
    theirs.close()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    work = receive(0)
    signal.signal(signal.SIGALRM, out_of_time)
    try:
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        be_judge(ours.fileno(), work["setup"], work["tests"])
        send(1, {"verdict": "right"})
    except Wrong as error:
        send(1, {"verdict": "wrong", "why": str(error)})


def main():
    limits = receive(0)
    try:
        null, was_root = os.open("/dev/null", os.O_RDWR), os.getuid() == 0
        enter_namespaces()
        build_root(limits["root"], limits["tmpfs_mib"])
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        enter_root(limits["root"])
        give_up_rights(limits, was_root)
        call("parent's death", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    except (OSError, KeyError) as error:
        send(1, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(1)
    send(1, {"jailed": True})
    judge(receive(0)["code"], null, limits["wall_s"])
    os._exit(0)


if __name__ == "__main__":
    main()
