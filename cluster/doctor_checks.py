"""What the doctor looks at: each check sees something, judges it, and names the way out. Nothing is started, no torch.

What has to be true before a start is refused by `cluster.starting`, and by its functions here too; the others are
about what a start would not notice: a machine that is too small, a limit that is too low, a clock that is wrong.
"""

import dataclasses
import email.utils
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster import machine, plan, pods, resources, starting
from cluster.connect import check_cluster, our_versions
from cluster.exposure import exposure
from cluster.settings import Settings
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.models import checkpoints, planning
from metasepia.models.planning import GIB

Verdict = Literal["ok", "warn", "refuse"]
ROOT = Path(__file__).parents[1]
SKEW_S = 5.0
"""Clocks of client and server further apart than this make expiry of keys and deadlines wrong."""
EXACT = ("ray", "torch", "transformers", "deepspeed", "grpcio", "pyarrow", "safetensors")
"""Packages of which another version is refused; of others it is said."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one check saw."""

    check: str
    verdict: Verdict
    seen: str
    way_out: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the doctor is told beside the settings."""

    address: str | None = None
    """Of a Ray cluster, in place of `ray.address`."""
    url: str | None = None
    """Of a served graph."""
    key: str | None = None
    """An API key for it."""
    grace_s: float | None = None
    """How long whoever stops the graph waits before it kills."""


Check = Callable[[Settings, Asked], Iterator[Found]]


def refused(check: str, look: Callable[[], object], seen: str) -> Found:
    """`seen` where `look` returns, its own words where it refuses."""
    try:
        look()
    except MetasepiaError as error:
        return Found(check=check, verdict="refuse", seen=str(error))
    return Found(check=check, verdict="ok", seen=seen)


def python(_: Settings, __: Asked) -> Iterator[Found]:
    """The interpreter and every package against requirements.lock."""
    here = platform.python_version()
    right = here.startswith("3.11.")
    yield Found(
        check="python",
        verdict="ok" if right else "refuse",
        seen=f"Python {here}, {platform.machine()} {platform.system()} {platform.release()}",
        way_out="" if right else "make an environment of Python 3.11: rm -r .venv; make setup",
    )
    lock = ROOT / "requirements.lock"
    if not lock.is_file():
        return
    yield packages(locked(lock.read_text()), installed)


def locked(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE))


def installed(name: str) -> str | None:
    """The version without what a wheel says of its build (`+cpu`)."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(lock: Mapping[str, str], version_of: Callable[[str], str | None]) -> Found:
    """Installed versions against the lock's."""
    found = {name: version_of(name) for name in lock}
    other = [name for name, version in found.items() if version != lock[name]]
    missing = [name for name in other if found[name] is None]
    told = ", ".join(f"{name} {found[name] or 'is missing'} (lock: {lock[name]})" for name in other[:5])
    told += f" and {len(other) - 5} more" if len(other) > 5 else ""
    if not other:
        return Found(check="packages", verdict="ok", seen=f"all {len(lock)} as in requirements.lock")
    grave = missing or set(other) & set(EXACT)
    return Found(check="packages", verdict="refuse" if grave else "warn", seen=told, way_out="make setup")


def ports(settings: Settings, asked: Asked) -> Iterator[Found]:
    """Both doors, unless a graph is meant to be there already."""
    if asked.url or (asked.address or settings.ray.address) not in ("local", "auto"):
        return
    try:
        opened = starting.doors(settings)
    except InvalidSettings as error:
        yield Found(check="ports", verdict="refuse", seen=str(error))
        return
    for field, host, port in opened:

        def look(field: str = field, host: str = host, port: int = port) -> None:
            starting.check_port(field, host, port)

        yield refused("ports", look, f"{field} {host}:{port} is free")


def doors(settings: Settings, _: Asked) -> Iterator[Found]:
    """Who can reach the doors and Ray behind them, and what they are asked for."""
    try:
        found = exposure(settings)
    except InvalidSettings:  # of the ports, which say so themselves
        return
    for one in found:
        yield Found(
            check="exposure",
            verdict="refuse",
            seen=f"{one.setting} = {one.value!r}: {one.problem}",
            way_out=one.way_out,
        )
    if not found:
        asked = "keys are asked for" if settings.keys.required else "no keys are asked for, and only this machine comes"
        yield Found(check="exposure", verdict="ok", seen=f"{asked}; Ray's own token mode: {settings.ray.auth_mode}")


def home(settings: Settings, _: Asked) -> Iterator[Found]:
    """That it is a local disk, keeps what is written, and has room."""
    found = refused("home", lambda: starting.check_home(settings.home), f"{settings.home} keeps what is written")
    yield found
    if found.verdict == "refuse":
        return
    needed, free = starting.room(settings)
    seen = f"{free / GIB:.1f} GiB free" + (f", {needed / GIB:.1f} GiB of factors to make" if needed else "")
    yield refused("disk", lambda: starting.check_room(settings), seen)
    session = shutil.disk_usage("/tmp")
    if session.free < 0.05 * session.total:
        yield Found(
            check="disk",
            verdict="warn",
            seen=f"/tmp has {session.free / GIB:.1f} of {session.total / GIB:.1f} GiB free: Ray keeps nothing there "
            "below a twentieth",
            way_out="free some, or set RAY_TMPDIR",
        )


def placement(settings: Settings, asked: Asked) -> Iterator[Found]:
    """Logical CPUs and GPUs of a cluster of our own, and whether this machine really has them."""
    if (asked.address or settings.ray.address) != "local":
        return
    offered = {"CPU": settings.ray.num_cpus, "GPU": settings.ray.num_gpus}
    total = sum(cpus for _, cpus, _ in resources.parts(settings))
    seen = f"{total:g} of {offered['CPU']:g} logical CPUs are taken"
    yield refused("placement", lambda: resources.check_fits(settings, offered), seen)
    real = machine.real_cpus()
    if offered["CPU"] > 1.5 * real:
        yield Found(
            check="cpus",
            verdict="warn",
            seen=f"ray.num_cpus says {offered['CPU']:g} and this machine gives us {real:g}: parts will wait for it",
            way_out="choose a smaller profile or a larger machine",
        )
    else:
        yield Found(check="cpus", verdict="ok", seen=f"{real:g} CPUs for {offered['CPU']:g} logical ones")


def memory(settings: Settings, asked: Asked) -> Iterator[Found]:
    """What the processes would hold at most, against what is free here; and shared memory for the object store."""
    if asked.url or (asked.address or settings.ray.address) != "local":
        return
    shared, shm = int(settings.ray.object_store_gib * GIB), shutil.disk_usage("/dev/shm").free
    if shm < shared:
        yield Found(
            check="shm",
            verdict="warn",
            seen=f"/dev/shm has {shm / GIB:.2f} GiB for an object store of {shared / GIB:.2f}: Ray would use the disk",
            way_out="mount it larger (docker run --shm-size), or lower ray.object_store_gib",
        )
    else:
        yield Found(check="shm", verdict="ok", seen=f"{shm / GIB:.1f} GiB for an object store of {shared / GIB:.1f}")
    if any(unprepared(settings)):
        told = ", ".join(unprepared(settings))
        yield Found(check="memory", verdict="ok", seen=f"planned once weights are prepared ({told})")
        return
    parts = resources.all_parts(settings)
    needed = pods.NODE_BYTES + shared + sum(one.max_replicas * pods.memory_of(settings, one) for one in parts)
    free = machine.free_memory(Path("/proc/meminfo").read_text())
    yield Found(
        check="memory",
        verdict="ok" if needed <= free else "warn",
        seen=f"at most {needed / GIB:.1f} GiB for {free / GIB:.1f} free",
        way_out="" if needed <= free else "lower max_batch_tokens, caches or expert_rank (python -m cluster.plan)",
    )
    for one in settings.backbones:
        config = plan.config_of(one, settings.home)

        def look(one: Any = one, config: Mapping[str, Any] = config) -> None:
            plan.check(one, config)

        made = planning.plan(config, plan.need_of(one)).num_bytes
        yield refused("ranks", look, f"{one.id}: {made / GIB:.1f} GiB a rank on {one.device}")


def unprepared(settings: Settings) -> list[str]:
    """Backbones that can only be planned after their checkpoints were read whole, which is not for a doctor."""
    found: list[str] = []
    for one in settings.backbones:
        try:
            if one.shapes is None and checkpoints.find(one.source, settings.home) is None:
                found.append(one.id)
        except MetasepiaError:
            found.append(one.id)
    return found


def limits(settings: Settings, _: Asked) -> Iterator[Found]:
    """Open files: a connection each, at the proxy."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * settings.gateway.max_ongoing_requests + 1024
    low = soft != resource.RLIM_INFINITY and soft < needed
    yield Found(
        check="files",
        verdict="warn" if low else "ok",
        seen=f"{soft} open files a process, and a full house needs {needed}",
        way_out=f"ulimit -n {min(65536, hard) if hard > 0 else 65536}" if low else "",
    )


def clock(_: Settings, __: Asked) -> Iterator[Found]:
    """Whether the kernel takes its clock for right; keys expire by it, and deadlines are compared between machines."""
    synchronised = machine.kernel_clock()
    if synchronised is None:
        return
    yield Found(
        check="clock",
        verdict="ok" if synchronised else "warn",
        seen="the kernel's clock is synchronised" if synchronised else "nobody synchronises this machine's clock",
        way_out="" if synchronised else "run chrony or systemd-timesyncd; in a container, on its host",
    )


def grace(settings: Settings, asked: Asked) -> Iterator[Found]:
    """What an end takes against what it is given."""
    needed, drain = settings.admission.grace_s, settings.admission.drain_s
    if asked.grace_s is not None and asked.grace_s < needed:
        yield Found(
            check="grace",
            verdict="refuse",
            seen=f"an end takes up to {needed:g} s, and it is killed after {asked.grace_s:g}",
            way_out=f"give it {needed:g} s (terminationGracePeriodSeconds, TimeoutStopSec), or lower admission.drain_s",
        )
        return
    seen = f"an end takes up to {needed:g} s, {drain:g} of them for requests under way"
    longest = settings.http.request_timeout_s
    yield Found(
        check="grace", verdict="ok", seen=seen + (f"; longer ones are cut off ({longest:g} s)" * (longest > drain))
    )


def gpus(settings: Settings, _: Asked) -> Iterator[Found]:
    """Devices and their memory, where the settings ask for any."""
    wanted = settings.ray.num_gpus or any(one.device == "cuda" for one in (*settings.backbones, *settings.encoders))
    if not wanted or settings.ray.address != "local":
        return
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield Found(
            check="gpus",
            verdict="refuse",
            seen=f"the settings ask for GPUs and the driver does not answer ({error})",
            way_out="install NVIDIA's driver (in a container its toolkit: --gpus all), or choose a profile for CPUs",
        )
        return
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    least_gib = min(float(row[1]) / 1024 for row in rows)
    told = f"{len(rows)} x {rows[0][0]}, {least_gib:.0f} GiB, driver {rows[0][2]}"
    planned = max((one.rank_memory_gib for one in settings.backbones), default=0.0)
    if len(rows) < settings.ray.num_gpus:
        yield Found(check="gpus", verdict="refuse", seen=f"{told}; ray.num_gpus is {settings.ray.num_gpus:g}")
    elif planned > least_gib:
        yield Found(check="gpus", verdict="refuse", seen=f"{told}; rank_memory_gib is {planned:g}")
    else:
        yield Found(check="gpus", verdict="ok", seen=told)


def kernel(_: Settings, __: Asked) -> Iterator[Found]:
    """What ranks on one machine and the sandbox of generated code need of it."""
    lacks = [] if hasattr(os, "memfd_create") else ["memfd_create: ranks on one machine then talk through gloo"]
    try:
        allowed = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    except (OSError, ValueError):
        allowed = 0
    if not allowed:
        lacks.append("user namespaces: jobs that run generated code refuse to")
    yield Found(
        check="kernel",
        verdict="warn" if lacks else "ok",
        seen="without " + "; without ".join(lacks) if lacks else "unnamed shared memory and user namespaces",
    )


def cluster(settings: Settings, asked: Asked) -> Iterator[Found]:
    """The Ray that would be joined."""
    address = asked.address or settings.ray.address
    if address == "local":
        return
    yield refused("cluster", lambda: check_cluster(address), f"{address} runs {our_versions()}, as we do")


def served(_: Settings, asked: Asked) -> Iterator[Found]:
    """A graph that answers: its health part by part, its version, its clock."""
    if asked.url is None:
        return
    import httpx

    headers = {"authorization": f"Bearer {asked.key}"} if asked.key else {}
    begin = time.time()
    try:
        with httpx.Client(base_url=asked.url, timeout=15, headers=headers) as client:
            health, version = client.get("/health"), client.get("/version")
            told: dict[str, Any] = health.json()
            theirs = str(version.json()["version"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        yield Found(
            check="graph",
            verdict="refuse",
            seen=f"{asked.url} does not answer as a graph ({type(error).__name__}: {error})",
            way_out="start it (make serve), or give its address with --url",
        )
        return
    yield from of_graph(asked.url, told, theirs, health.headers.get("date"), begin)


def of_graph(url: str, health: Mapping[str, Any], version: str, date: str | None, now_s: float) -> Iterator[Found]:
    """What a graph said of itself."""
    parts: Mapping[str, Any] = health.get("parts", {})
    broken = [f"{name}: {one.get('reason')}" for name, one in parts.items() if not one.get("ready")]
    yield Found(
        check="graph",
        verdict="refuse" if broken or not parts else "ok",
        seen=f"{url}: " + ("; ".join(broken) or f"{len(parts)} parts are ready"),
        way_out="its log says more; Ray's logs are in /tmp/ray/session_latest/logs" if broken else "",
    )
    ours = importlib.metadata.version("metasepia")
    yield Found(
        check="version",
        verdict="ok" if version == ours else "warn",
        seen=f"it runs metasepia {version}" + ("" if version == ours else f", and this is {ours}"),
    )
    if date is not None:
        skew_s = email.utils.parsedate_to_datetime(date).timestamp() - now_s
        apart = abs(skew_s) > SKEW_S
        yield Found(
            check="skew",
            verdict="warn" if apart else "ok",
            seen=f"its clock is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}",
            way_out="synchronise both clocks: keys expire by the server's" if apart else "",
        )


CHECKS: tuple[Check, ...] = (
    *(python, ports, doors, home, placement, memory, limits, clock, grace, gpus, kernel, cluster, served),
)


def all_found(settings: Settings, asked: Asked) -> list[Found]:
    """Of every check; one that fails in a way of its own says so and hides no other."""
    found: list[Found] = []
    for check in CHECKS:
        try:
            found += check(settings, asked)
        except Exception as error:
            found.append(Found(check=check.__name__, verdict="warn", seen=f"could not look: {error!r}"))
    return found


def as_json(found: list[Found]) -> list[dict[str, str]]:
    return [dataclasses.asdict(one) for one in found]
