"""The doctor: each check judged on what it would see on a machine that lacks something, and the whole on this one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import doctor, doctor_checks, machine, starting
from cluster import settings as settings_of
from cluster.doctor_checks import Asked, Found
from cluster.settings import Settings

ROOT = Path(__file__).parents[2]
NOW_S = 1_800_000_000.0
DATE = "Fri, 15 Jan 2027 08:00:00 GMT"
"""NOW_S, as a server writes it."""


def read(home: Path, **environ: str) -> Settings:
    named = {f"METASEPIA_{name}": value for name, value in environ.items()}
    return settings_of.read("laptop", {"METASEPIA_HOME": str(home)} | named)


def the(found: Iterator[Found], check: str) -> Found:
    (one,) = (one for one in found if one.check == check)
    return one


def test_packages_of_the_lock_are_judged_by_what_they_decide() -> None:
    lock = {"ray": "2.60.0", "rich": "15.0"}
    assert doctor_checks.packages(lock, lock.get).verdict == "ok"
    other = doctor_checks.packages(lock, (lock | {"rich": "14.0"}).get)
    assert other.verdict == "warn" and "rich 14.0 (lock: 15.0)" in other.seen
    assert doctor_checks.packages(lock, (lock | {"ray": "2.59.0"}).get).verdict == "refuse"
    missing = doctor_checks.packages(lock, {"ray": "2.60.0"}.get)
    assert missing.verdict == "refuse" and "rich is missing" in missing.seen and missing.way_out == "make setup"


def test_the_lock_is_read_whole() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert len(doctor_checks.locked(text)) == len(text.split())


def test_a_public_door_without_keys_and_token_is_refused_twice(tmp_path: Path) -> None:
    found = list(doctor_checks.doors(read(tmp_path, HTTP__HOST="0.0.0.0", GRPC__ENABLED="false"), Asked()))
    assert [one.verdict for one in found] == ["refuse", "refuse"]
    assert "KEYS__REQUIRED" in found[0].way_out and "RAY__AUTH_MODE" in found[1].way_out
    (fine,) = doctor_checks.doors(read(tmp_path), Asked())
    assert fine.verdict == "ok" and "only this machine" in fine.seen


def test_a_home_that_cannot_be_written_is_refused_and_not_measured() -> None:
    (found,) = doctor_checks.home(read(Path("/proc/self/home")), Asked())
    assert found.verdict == "refuse" and "METASEPIA_HOME" in found.seen


def test_a_cluster_of_our_own_that_is_too_small_is_refused_part_by_part(tmp_path: Path) -> None:
    found = the(doctor_checks.placement(read(tmp_path, RAY__NUM_CPUS="1"), Asked()), "placement")
    assert found.verdict == "refuse" and "gateway 0.2" in found.seen
    assert list(doctor_checks.placement(read(tmp_path), Asked(address="auto"))) == []


def test_a_control_group_bounds_what_the_machine_has(tmp_path: Path) -> None:
    meminfo = "MemTotal:       2000 kB\nMemAvailable:       1000 kB\n"
    assert machine.free_memory(meminfo, tmp_path / "none") == 1000 * 1024
    for name, text in (("memory.max", "600\n"), ("memory.current", "200\n"), ("cpu.max", "50000 100000\n")):
        (tmp_path / name).write_text(text)
    assert machine.free_memory(meminfo, tmp_path) == 400
    assert machine.real_cpus(tmp_path) == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.free_memory(meminfo, tmp_path) == 1000 * 1024
    assert machine.real_cpus(tmp_path) >= 1


def test_an_object_store_beyond_shared_memory_is_warned_of(tmp_path: Path) -> None:
    found = the(doctor_checks.memory(read(tmp_path, RAY__OBJECT_STORE_GIB="1000"), Asked()), "shm")
    assert found.verdict == "warn" and "1000.00" in found.seen
    told = the(doctor_checks.memory(read(tmp_path), Asked()), "memory")
    assert "smollm2-135m" in told.seen  # nothing is prepared for the question


def test_too_few_open_files_are_told_with_the_number_that_is_enough(tmp_path: Path) -> None:
    (found,) = doctor_checks.limits(read(tmp_path, GATEWAY__MAX_ONGOING_REQUESTS="100000"), Asked())
    assert found.verdict == "warn" and "201024" in found.seen and "ulimit -n" in found.way_out


def test_a_kill_before_the_end_is_refused(tmp_path: Path) -> None:
    settings = read(tmp_path)
    needed = settings.admission.grace_s
    (early,) = doctor_checks.grace(settings, Asked(grace_s=needed - 1))
    (enough,) = doctor_checks.grace(settings, Asked(grace_s=needed))
    assert (early.verdict, enough.verdict) == ("refuse", "ok") and f"{needed:g} s" in early.way_out


def test_gpus_are_looked_for_only_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor_checks.gpus(read(tmp_path), Asked())) == []
    asks = read(tmp_path, RAY__NUM_GPUS="2")
    monkeypatch.setenv("PATH", str(tmp_path))
    (absent,) = doctor_checks.gpus(asks, Asked())
    assert absent.verdict == "refuse" and "driver" in absent.way_out
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559, 570.1'\n")
    script.chmod(0o755)
    (few,) = doctor_checks.gpus(asks, Asked())
    assert few.verdict == "refuse" and "1 x NVIDIA H100, 80 GiB" in few.seen
    (enough,) = doctor_checks.gpus(read(tmp_path, RAY__NUM_GPUS="1"), Asked())
    assert enough.verdict == "ok"


def test_a_graph_is_judged_by_its_parts_its_version_and_its_clock() -> None:
    ready = {"parts": {"encoder": {"ready": True}, "gang": {"ready": True}}}
    fine = list(doctor_checks.of_graph("http://here", ready, "0.1.0", DATE, NOW_S + 2))
    assert [one.verdict for one in fine] == ["ok", "ok", "ok"]
    ill = {"parts": {"encoder": {"ready": True}, "gang": {"ready": False, "reason": "rank 1 died"}}}
    found = list(doctor_checks.of_graph("http://here", ill, "9.9.9", DATE, NOW_S - 60))
    assert [one.verdict for one in found] == ["refuse", "warn", "warn"]
    assert "gang: rank 1 died" in found[0].seen and "60 s ahead" in found[2].seen


def test_nobody_at_the_url_is_refused_and_its_ports_are_not_asked_to_be_free(tmp_path: Path) -> None:
    asked = Asked(url="http://127.0.0.1:1")
    assert list(doctor_checks.ports(read(tmp_path), asked)) == []
    (found,) = doctor_checks.served(read(tmp_path), asked)
    assert found.verdict == "refuse" and "make serve" in found.way_out


def test_a_check_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Settings, __: Asked) -> Iterator[Found]:
        raise OSError("no /proc here")
        yield

    monkeypatch.setattr(doctor_checks, "CHECKS", (broken, doctor_checks.grace))
    found = doctor_checks.all_found(read(tmp_path), Asked())
    assert [(one.check, one.verdict) for one in found] == [("broken", "warn"), ("grace", "ok")]
    assert "no /proc here" in found[0].seen


def test_the_status_is_the_worst_of_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verdicts, status in ((["ok"], 0), (["ok", "warn"], 1), (["warn", "refuse", "ok"], 2)):
        found = [Found(check="one", verdict=verdict, seen="this") for verdict in verdicts]  # type: ignore[arg-type]
        monkeypatch.setattr(doctor, "all_found", lambda *_, found=found: found)
        assert doctor.main([]) == status
        assert doctor.main(["--json"]) == status
    assert json.loads(capsys.readouterr().out.rpartition("\n[")[2].join(["[", ""]))[1]["verdict"] == "refuse"


def test_wrong_settings_are_the_first_thing_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--profile", "none-such"]) == 2
    assert "one of" in capsys.readouterr().out


def test_the_doctor_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from cluster import doctor\n"
        "status = doctor.main(['--json'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(10 + status)\n"
    )
    environ = {"PATH": "/usr/bin:/bin", "METASEPIA_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (10, 11, 12), done.stderr
    found = {one["check"] for one in json.loads(done.stdout)}
    assert {"python", "packages", "ports", "exposure", "home", "disk", "placement", "files", "grace", "kernel"} <= found
    assert starting.PROBE not in "".join(one.name for one in (tmp_path / "home").iterdir())
