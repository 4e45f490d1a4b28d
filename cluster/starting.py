"""What must be true before anything is started: free ports, a home that keeps what is written, room on its disk, a
cluster of our Ray's version. Each refusal is InvalidSettings or Unavailable, with what was seen and the way out.

`serve.main` stops at the first; `cluster.doctor` goes on and reports them all. No torch.
"""

import contextlib
import errno
import ipaddress
import os
import shutil
import socket
import tempfile
from pathlib import Path

from cluster import plan
from cluster.connect import check_cluster
from cluster.settings import BackboneSettings, Settings
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.experts.vectors import FactorIndex
from metasepia.local_disk import check_local_disk
from metasepia.models import checkpoints, planning
from metasepia.models.planning import GIB

SPARE_BYTES = 256 << 20
"""What the registry, its journal and logs need beside weights and factors before a start makes sense."""
PROBE = ".write-probe-"


def check_all(settings: Settings) -> None:
    """Raises the first of what the functions below find; what they can know is known before weights are prepared."""
    if settings.ray.address in ("local", "auto"):  # elsewhere the doors are another machine's
        for field, host, port in doors(settings):
            check_port(field, host, port)
    check_home(settings.home)
    check_room(settings)
    check_cluster(settings.ray.address)


def doors(settings: Settings) -> list[tuple[str, str, int]]:
    """(setting, host, port) of every port that the graph opens for clients."""
    found = [("http.port", settings.http.host, settings.http.port)]
    if settings.grpc.enabled:
        if settings.grpc.port == settings.http.port:
            raise InvalidSettings("grpc.port", settings.grpc.port, "another port than http.port")
        found.append(("grpc.port", settings.grpc.host or settings.http.host, settings.grpc.port))
    return found


def check_port(field: str, host: str, port: int) -> None:
    """Raises InvalidSettings when something listens on the port, or this machine has no such address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    variable = "METASEPIA_" + field.upper().replace(".", "__")
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise InvalidSettings(_host(field), host, f"an address of this machine ({error.strerror})") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise InvalidSettings(_host(field), host, f"an address of this machine ({error.strerror})") from None
            if error.errno == errno.EACCES:
                raise InvalidSettings(field, port, f"1024 or above for this user ({error.strerror})") from None
            allowed = f"a free port of {host} ({error.strerror}); end what listens there (make stop), or choose another"
            raise InvalidSettings(field, port, f"{allowed} with {variable}") from None


def _host(field: str) -> str:
    return field.replace("port", "host")


def is_public(host: str) -> bool:
    """True where the address is reached from other machines."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host != "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return not (mapped or address).is_loopback


def check_home(home: Path) -> None:
    """Makes `home` where it is not, and writes, syncs and deletes a file in it.

    Raises InvalidSettings for a network's filesystem, a file in the place of a directory, a filesystem that is read
    only, a directory of another user, a full disk and a quota that is used up.
    """
    check_local_disk(home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(prefix=PROBE, dir=home)
        try:
            os.write(file, b"x" * 4096)  # an empty file fits a full disk
            os.fsync(file)
        finally:
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(name)
    except OSError as error:
        raise refusal(home, error) from None


def refusal(home: Path, error: OSError) -> InvalidSettings:
    """What an error of writing under `home` means for who chose it."""
    return InvalidSettings("home", str(home), _allowed(home, error))


def _allowed(home: Path, error: OSError) -> str:
    way_out = "choose another with METASEPIA_HOME"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"on a disk with room ({error.strerror}: nothing can be written); free some, or {way_out}"
    if error.errno == errno.EROFS:
        return f"on a filesystem that can be written ({error.strerror}); mount it for writing, or {way_out}"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        there = next(one for one in (home, *home.parents) if one.exists())
        return f"a directory ({there} is a file); move it away, or {way_out}"
    user = os.geteuid()
    return f"a directory that user {user} can write ({error.strerror}); give it to that user, or {way_out}"


def room(settings: Settings) -> tuple[int, int]:
    """(bytes that preparing still has to write under `home`, bytes free there)."""
    there = next(one for one in (settings.home, *settings.home.parents) if one.exists())
    needed = sum(to_prepare(one, settings.home) for one in settings.backbones)
    return needed, shutil.disk_usage(there).free


def to_prepare(backbone: BackboneSettings, home: Path) -> int:
    """Bytes of factors that are not under `home` yet; 0 also where the checkpoint has not been looked at before, or
    is not there: `serve.prepare` says so in its own words.
    """
    try:
        found = checkpoints.find(backbone.source, home)
    except MetasepiaError:
        return 0
    if found is None or not backbone.expert_layers:
        return 0
    if any(FactorIndex.read(path.stem, home).backbone == found.digest for path in (home / "factors").glob("*.json")):
        return 0
    return planning.plan(plan.config_of(backbone, home), plan.need_of(backbone)).factors_on_disk


def check_room(settings: Settings) -> None:
    """Raises InvalidSettings where weights and factors would not fit the disk, or next to nothing is free there."""
    needed, free = room(settings)
    if free < needed + SPARE_BYTES:
        what = f"{needed / GIB:.2f} GiB of factors to make and " if needed else ""
        allowed = (
            f"on a disk with at least {(needed + SPARE_BYTES) / GIB:.2f} GiB free ({what}{SPARE_BYTES >> 20} MiB for "
            f"the registry), and {free / GIB:.2f} GiB are; free some, or choose another with METASEPIA_HOME"
        )
        raise InvalidSettings("home", str(settings.home), allowed)
