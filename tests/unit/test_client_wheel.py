"""What a user gets: the wheel, without the repository beside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPOSITORY_ONLY = ("serve", "actors", "cluster", "jobs", "benchmarks", "tests")


def run(*line: str, at: Path, path: Path) -> str:
    """What a program says that sees the site packages, and of ours only what is at `path`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("METASEPIA", "PYTHON"))}
    code = [sys.executable, "-c", BEGIN + line[0]] if len(line) == 1 else [sys.executable, *line]
    done = subprocess.run(
        code, cwd=at, env=environment | {"PYTHONPATH": str(path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BEGIN = f"import sys; sys.path[:] = [one for one in sys.path if one not in ({str(ROOT)!r}, '')]; "
"""An editable installation would find the repository all the same: its finder goes, too."""


def test_the_wheel_holds_a_client_and_a_command_that_need_nothing_of_the_repository(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("metasepia", "pyproject.toml", "README.md"):
        (source / name).symlink_to(ROOT / name)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run([sys.executable, *build], cwd=source, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "installed")
        entry = next(packed.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "metasepia = metasepia.cli:main" in entry
    assert {"metasepia/client/client.py", "metasepia/cli.py"} <= set(names)
    assert not {name.split("/")[0] for name in names} & set(REPOSITORY_ONLY)
    finders = "sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one).lower()]; "
    see = finders + "import metasepia.client, metasepia.cli; "
    where = run(f"{see}print(metasepia.client.__file__)", at=tmp_path, path=tmp_path / "installed")
    assert Path(where.strip()).is_relative_to(tmp_path / "installed")
    ours = f"[one for one in {REPOSITORY_ONLY!r} if one in sys.modules]"
    loaded = f"{see}from metasepia.client import Client; Client('http://x'); print({ours}, 'torch' in sys.modules)"
    assert run(loaded, at=tmp_path, path=tmp_path / "installed").strip() == "[] False"
    said = run(f"{see}metasepia.cli.main(['--help'])", at=tmp_path, path=tmp_path / "installed")
    assert "label texts by examples" in said
    served = run(f"{see}print(metasepia.cli.main(['serve']))", at=tmp_path, path=tmp_path / "installed")
    assert served.strip() == "1"
