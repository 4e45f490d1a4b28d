"""The tree keeps its promises: one direction of imports, no Ray in the science, no pickle, no file over 600 lines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("metasepia", "cluster", "actors", "serve", "jobs", "benchmarks", "tests")
GENERATED = ("_pb2.py", "_pb2_grpc.py")
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if not p.name.endswith(GENERATED)]


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after it ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys; print(' '.join({m.split('.')[0] for m in sys.modules}))"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_whole_science_package_imports_without_ray_deepspeed_or_a_server():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in sorted((ROOT / "metasepia").rglob("*.py"))
    ]
    loaded = loaded_after("import importlib\nfor m in " + repr(modules) + ": importlib.import_module(m)")
    assert {"metasepia", "torch"} <= loaded
    assert not {"ray", "deepspeed", "fastapi", "grpc", "kubernetes"} & loaded


@pytest.mark.parametrize(
    "module", ["serve.gateway", "actors.registry", "metasepia.registry.catalogue", "metasepia.rows"]
)
def test_the_gateway_and_the_registry_import_no_torch(module: str):
    assert "torch" not in loaded_after(f"import {module}")


def test_help_of_the_main_program_needs_no_heavy_import():
    assert not {"torch", "transformers"} & loaded_after("import serve.main")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_600_lines_or_imports_pickle(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 600
    words = ("import pickle", "from pickle", "import cloudpickle", "import joblib", "import dill")
    assert not [line for line in lines if line.strip().startswith(words) and "(in memory" not in line]


def test_deepspeed_is_imported_in_one_file_and_ray_is_started_in_one():
    def files_with(text: str) -> set[str]:
        folders = ("metasepia", "cluster", "actors", "serve", "jobs")
        return {str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.py") if text in p.read_text()}

    assert files_with("import deepspeed") == {"actors/tensor_parallel.py"}
    assert files_with("ray.init(") == {"cluster/connect.py"}
