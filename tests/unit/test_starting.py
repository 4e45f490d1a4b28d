"""What is refused before anything starts: each in words that give the value and the way out, never a traceback."""

import dataclasses
import errno
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import connect, starting
from cluster import settings as settings_of
from cluster.connect import RayVersions
from metasepia.errors import InvalidSettings, Unavailable

ROOT = Path(__file__).parents[2]
LAPTOP = settings_of.read("laptop", {})


def taken() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_port_that_is_taken_is_named_with_the_variable_that_changes_it(door: str) -> None:
    with taken() as listener:
        port = listener.getsockname()[1]
        settings = settings_of.read("laptop", {f"METASEPIA_{door.upper()}__PORT": str(port)})
        with pytest.raises(InvalidSettings, match=rf"{door}\.port = {port} .*METASEPIA_{door.upper()}__PORT"):
            for field, host, found in starting.doors(settings):
                if found == port:
                    starting.check_port(field, host, found)


def test_both_doors_on_one_port_are_refused() -> None:
    settings = settings_of.read("laptop", {"METASEPIA_GRPC__PORT": "8000"})
    with pytest.raises(InvalidSettings, match="another port than http"):
        starting.doors(settings)


def test_a_door_that_is_shut_needs_no_port() -> None:
    assert [one[0] for one in starting.doors(settings_of.read("laptop", {"METASEPIA_GRPC__ENABLED": "false"}))] == [
        "http.port"
    ]


def test_an_address_of_another_machine_is_refused_as_the_host_and_not_the_port() -> None:
    with pytest.raises(InvalidSettings, match=r"http\.host = '203\.0\.113\.7'"):
        starting.check_port("http.port", "203.0.113.7", 18123)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.0.1.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.7", True),
        ("::ffff:10.0.0.7", True),
        ("host.example", True),
    ],
)
def test_what_other_machines_reach_is_public(host: str, public: bool) -> None:
    assert starting.is_public(host) is public


def test_a_file_in_the_place_of_home_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InvalidSettings, match=r"taken is a file"):
        starting.check_home(tmp_path / "taken")
    with pytest.raises(InvalidSettings, match=r"taken is a file"):
        starting.check_home(tmp_path / "taken" / "below")


def test_a_home_that_cannot_be_written_is_refused_whoever_asks() -> None:
    # The kernel refuses a new file in /proc to root as well, which no mode of a directory does.
    with pytest.raises(InvalidSettings, match="choose another with METASEPIA_HOME"):
        starting.check_home(Path("/proc/self/home"))


def test_a_home_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    starting.check_home(tmp_path / "new" / "home")
    assert list((tmp_path / "new" / "home").iterdir()) == []


def test_a_disk_that_takes_no_byte_is_said_to_be_full(tmp_path: Path) -> None:
    # Run by itself: the limit holds for the whole process. The kernel answers EFBIG where a full disk has ENOSPC.
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from cluster import starting\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    starting.check_home(Path(sys.argv[1]))\n"
        "except starting.InvalidSettings as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "nothing can be written"),
        (errno.EDQUOT, "nothing can be written"),
        (errno.EROFS, "mount it for writing"),
        (errno.EACCES, "give it to that user"),
    ],
)
def test_each_error_of_a_disk_has_its_own_way_out(number: int, words: str) -> None:
    refused = starting.refusal(Path("/data/home"), OSError(number, os.strerror(number)))
    assert words in str(refused) and "/data/home" in str(refused) and "METASEPIA_HOME" in str(refused)


def test_a_disk_without_room_is_refused_with_what_is_needed_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(LAPTOP, home=tmp_path)
    starting.check_room(settings)
    monkeypatch.setattr(starting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 200 << 20}))
    with pytest.raises(InvalidSettings, match=r"at least 0\.25 GiB free .*, and 0\.20 GiB are"):
        starting.check_room(settings)


def test_a_cluster_of_another_ray_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = RayVersions(ray="2.59.0", python="3.11.7")
    monkeypatch.setattr(connect, "cluster_versions", lambda _: theirs)
    with pytest.raises(InvalidSettings, match=r"Ray 2\.60\.0 on Python .* runs Ray 2\.59\.0 on Python 3\.11\.7"):
        connect.check_cluster("10.0.0.5:6379", RayVersions(ray="2.60.0", python="3.11.7"))
    assert connect.check_cluster("10.0.0.5:6379", theirs) == theirs
    assert connect.check_cluster("local", RayVersions(ray="1", python="1")) is None


def test_nobody_at_the_address_of_a_cluster_is_said_at_once() -> None:
    with taken() as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(Unavailable, match=f"a Ray cluster at {address}"):
        connect.cluster_versions(address, timeout_s=1.0)


def test_a_refused_start_prints_one_sentence_and_starts_nothing(tmp_path: Path) -> None:
    with taken() as listener:
        port = str(listener.getsockname()[1])
        environ = os.environ | {"METASEPIA_HTTP__PORT": port, "METASEPIA_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-m", "serve.main"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stdout.startswith("not started: setting http.port") and "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "home").exists()
