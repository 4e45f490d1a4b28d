"""The job's command line with packs run in this process: what it refuses, what it leaves, how it goes on."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import task_diversity
from jobs import sweep_tasks, sweeping
from metasepia.diversity.profiles import plan_of
from metasepia.sweeps.run import find_work, run_pack
from metasepia.sweeps.store import SweepStore

QUICK = ("--profile", "tiny", "--num-tasks", "2,4,inf", "--steps", "8", "--seed", "0,1", "--pack", "3")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray Tune was asked for; packs run here, and all but one where `only_first` is put into the list."""
    calls: list[dict[str, Any]] = []

    def run_here(plan: Any, uri: str, work: str, **options: Any) -> SimpleNamespace:
        calls.append(options)
        store = SweepStore.open(uri, plan)
        for pack in range(len(plan.packs)):
            if not store.done(pack):
                run_pack(find_work(work), store, pack)
        return SimpleNamespace(table=store.write_table())

    monkeypatch.setattr(sweeping, "run_sweep", run_here)
    return calls


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here."""
    monkeypatch.setattr(sweep_tasks, "pictures", lambda findings: [])


def run(out: Path, *more: str) -> int:
    return sweep_tasks.main(["--out", str(out), *more])


def test_a_sweep_leaves_a_table_figures_and_a_page(tmp_path: Path, asked: list[dict[str, Any]], capsys):
    assert run(tmp_path / "a", *QUICK, "--workers", "3") == 0
    assert asked[0]["workers"] == 3 and asked[0]["gpus_per_trial"] == 0.0 and asked[0]["asha"] is None
    table = pq.read_table(tmp_path / "a" / "table.parquet")
    assert set(table.column("trial").to_pylist()) == set(range(6))
    pictures = {path.name for path in (tmp_path / "a" / "figures").iterdir()}
    assert pictures == {"tasks-0.png", "training-0.png", "positions-0.png", "path-0.png"}
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "--profile tiny --steps 8 --num-tasks 2,4,inf --pack 3 --out OUT" in page
    assert "from which models are nearer ridge than dMMSE, on new tasks: " in capsys.readouterr().out


def test_a_second_call_must_say_resume_which_needs_no_axis_and_leaves_the_same_bytes(
    tmp_path: Path, asked: list[dict[str, Any]], undrawn: None, capsys
):
    assert run(tmp_path / "a", *QUICK) == 0
    before = {name: (tmp_path / "a" / name).read_bytes() for name in ("table.parquet", "report.html")}
    assert run(tmp_path / "a", *QUICK) == 2
    told = capsys.readouterr().err
    assert "finished" in told and "--resume" in told and "not finished" not in told
    (tmp_path / "a" / "report.html").unlink()
    assert run(tmp_path / "a", "--resume") == 0
    assert {name: (tmp_path / "a" / name).read_bytes() for name in before} == before
    assert run(tmp_path / "a", "--resume", *QUICK) == 0
    assert run(tmp_path / "a", "--resume", *QUICK, "--dims", "3") == 2
    assert "holds the sweep" in capsys.readouterr().err


def test_a_sweep_that_was_stopped_is_told_from_a_finished_one_and_goes_on(
    tmp_path: Path, asked: list[dict[str, Any]], undrawn: None, capsys
):
    arguments = sweep_tasks.parser().parse_args(["--out", str(tmp_path / "part"), *QUICK])
    plan = sweep_tasks.plan_from(arguments)
    run_pack(find_work(sweep_tasks.WORK), SweepStore.open(str(tmp_path / "part"), plan), 1)
    assert run(tmp_path / "part", *QUICK) == 2 and "not finished" in capsys.readouterr().err
    assert run(tmp_path / "part", "--report-only") == 0 and not asked
    assert "Part of the trials did not run to their end" in (tmp_path / "part" / "report.html").read_text()
    assert run(tmp_path / "part", "--resume") == 0 and run(tmp_path / "whole", *QUICK) == 0
    for name in ("table.parquet", "report.html"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--colour 3", "axis = '--colour'"),
        ("--num-tasks ''", "axis num_tasks = ''"),
        ("--num-tasks 0", "num_tasks = 0"),
        ("--points 9 --context 8", "at most the context of 8 pairs"),
        ("--noise-variance -1", "noise_variance = -1.0"),
        ("--noise-variance nan", "a finite number (sigma squared, above 0)"),
        ("--learning-rate 1e-3,inf", "axis learning_rate = 'inf'"),
        ("--sample-seed 3", "given with --sample"),
        ("--profile huge", "profile = 'huge' is not allowed; it must be one of laptop, evening, paper, tiny"),
        ("--model base --width 8", "it sets the three"),
        ("--pack 0", "pack = 0"),
        ("--sample 1000", "from 1 to the"),
        ("--resume", "there is none to go on with"),
        ("--device cpu --gpus-per-trial 1", "gpus_per_trial = 1.0"),
        ("--scheduler asha --pack 4", "1 with --scheduler asha"),
        ("--scheduler asha --problem linear,logistic", "both problems"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words_and_leaves_nothing(
    tmp_path: Path, asked: list[dict[str, Any]], capsys, arguments: str, said: str
):
    assert run(tmp_path / "out", *shlex.split(arguments)) == 2
    assert said in capsys.readouterr().err
    assert not asked and not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_refused_unless_a_cluster_may_have_it(
    tmp_path: Path, asked: list[dict[str, Any]], undrawn: None, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (("--device", "cuda"), ("--gpus-per-trial", "0.5"), ("--profile", "paper")):
        assert run(tmp_path / "out", *arguments) == 2
        assert "this machine has no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", *QUICK, "--device", "cuda", "--address", "10.0.0.1:6379") == 0
    assert asked[0]["gpus_per_trial"] == 1.0 and asked[0]["address"] == "10.0.0.1:6379"


def test_another_sweeps_folder_and_a_torn_manifest_are_refused(
    tmp_path: Path, asked: list[dict[str, Any]], undrawn: None, capsys
):
    assert run(tmp_path / "a", *QUICK) == 0
    manifest = tmp_path / "a" / "manifest.json"
    value = json.loads(manifest.read_text())
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    assert run(tmp_path / "a", "--resume") == 2 and "half-written" in capsys.readouterr().err
    value["plan"]["kind"] = "instructions"
    manifest.write_text(json.dumps(value))
    assert run(tmp_path / "a", "--resume") == 2 and "manifest.json" in capsys.readouterr().err


def test_the_printed_command_makes_the_same_sweep():
    asked = (
        "--profile tiny --num-tasks 2^3,inf --dims 2,4 --weight-decay 0,0.1 --pack 2 --sample 5 --sample-seed 7",
        "--profile laptop --problem logistic",
        "--profile paper --model small,base --batch-size 256,512",
        "--profile evening",
    )
    for line in asked:
        plan = sweep_tasks.plan_from(sweep_tasks.parser().parse_args(["--out", "/nowhere", *shlex.split(line)]))
        again = sweep_tasks.parser().parse_args(shlex.split(sweep_tasks.command_of(plan))[3:])
        again.out = "/nowhere"
        assert sweep_tasks.plan_from(again).digest == plan.digest, line


def test_stopping_early_runs_models_one_by_one(tmp_path: Path, asked: list[dict[str, Any]], undrawn: None):
    assert run(tmp_path / "a", *QUICK[:-2], "--scheduler", "asha") == 0
    assert (asked[0]["asha"].metric, asked[0]["asha"].split) == ("delta_dmmse", "pretraining")
    assert {len(one) for one in SweepStore.read(str(tmp_path / "a")).plan.packs} == {1}


def test_a_dry_run_says_what_would_be_run_and_runs_nothing(tmp_path: Path, asked: list[dict[str, Any]], capsys):
    assert run(tmp_path / "a", "--profile", "paper", "--dry-run") == 0
    assert "21 models in 2 packs, 10,500,000 steps" in capsys.readouterr().out
    assert not asked and not (tmp_path / "a").exists()


def test_the_benchmark_reads_a_finished_sweep_and_runs_one_that_is_not_there(
    tmp_path: Path, asked: list[dict[str, Any]], undrawn: None, monkeypatch: pytest.MonkeyPatch
):
    figures = tmp_path / "figures.json"
    plan = plan_of("tiny", {"num_tasks": (4, 64, None), "num_steps": (8,)})
    store = SweepStore.open(str(tmp_path / "a"), plan)
    for pack in range(len(plan.packs)):
        run_pack(find_work(sweep_tasks.WORK), store, pack)
    monkeypatch.setattr("sys.argv", ["task_diversity"])
    task_diversity.main(["--sweep", str(tmp_path / "a"), "--profile", "tiny", "--json", str(figures)])
    rows = {row["id"]: row for row in json.loads(figures.read_text())["rows"]}
    assert not asked
    findings, wall_s = task_diversity.findings_at(str(tmp_path / "a"), "tiny")
    assert wall_s is None
    for claim in findings.claims:
        row = rows[f"diversity-{claim.id}"]
        assert row["ours"] == pytest.approx(claim.value) and row["extra"]["holds"] == claim.holds
        assert ("holds" if claim.holds else "missed") in row["note"]
    assert rows["diversity-new-inf"]["against"] == pytest.approx(
        findings.results.groups[0].mean("ridge_error", "new", 4)
    )
    with pytest.raises(ValueError, match="one of tiny: say --profile"):
        task_diversity.findings_at(str(tmp_path / "a"), "laptop")
    _, wall_s = task_diversity.findings_at(str(tmp_path / "b"), "tiny")
    assert wall_s is not None and len(asked) == 1
