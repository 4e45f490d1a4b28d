import argparse
import dataclasses
import html
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import clustering
from jobs import cluster_backbone, cluster_states
from metasepia.instructions import report
from metasepia.instructions.claims import CLAIMS
from metasepia.instructions.model import MASKS
from metasepia.instructions.profiles import AXES, PROFILES, plan_of, trials_of
from metasepia.instructions.results import Summary, Table
from metasepia.instructions.trial import OWN, SHARED_IN_PACK
from metasepia.instructions.work import InstructionPack
from metasepia.sweeps.plan import SweepPlan
from metasepia.sweeps.run import run_pack
from metasepia.sweeps.store import SweepStore

AXES_OF_ONE = {"seed": [0], "mask": ["bottleneck"]}


def arguments(out: Path, *more: str) -> argparse.Namespace:
    return cluster_states.parser().parse_args(["--out", str(out), *more])


def refused(capsys, *words: str) -> str:
    assert cluster_states.main(["--mode", "synthetic", *words]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> SweepStore:
    """A small sweep, run without Ray."""
    store = SweepStore.open(str(tmp_path_factory.mktemp("swept") / "sweep"), plan_of("tiny"))
    for pack in range(len(store.plan.packs)):
        run_pack(InstructionPack, store, pack)
    store.write_table()
    return store


def test_the_laptop_profile_varies_one_axis_at_a_time_and_packs_share_a_shape():
    plan = plan_of("laptop")
    trials = trials_of(plan)
    base = {name: set(values) for name, values in PROFILES["laptop"].base.items()}
    for trial in trials:
        assert sum(getattr(trial, name) not in base[name] for name in AXES) <= 1
    assert {trial.num_tasks for trial in trials} == {4, 8, 16}
    assert len({str(trial) for trial in plan.trials}) == len(trials)
    for members in plan.packs:
        assert len({tuple(getattr(trials[i], name) for name in SHARED_IN_PACK) for i in members}) == 1
    assert not set(OWN) & set(SHARED_IN_PACK)


def test_axes_of_the_command_line_are_crossed_in_full_and_replace_what_the_profile_varies(tmp_path):
    plan = cluster_states.plan_from(arguments(tmp_path, "--tasks", "4,8", "--layers", "2,3", "--seeds", "5"))
    found = {(t.num_tasks, t.layers, t.seed, t.mask) for t in trials_of(plan)}
    assert found == {(n, d, 5, m) for n in (4, 8) for d in (2, 3) for m in ("causal", "bottleneck")}


def test_the_command_of_a_plan_makes_the_plan_again(tmp_path):
    words = ["--profile", "tiny", "--tasks", "2,3", "--mask", "causal", "--steps", "7", "--pack", "1"]
    plan = cluster_states.plan_from(arguments(tmp_path, *words))
    again = cluster_states.command_of(plan).split()[3:]
    again[again.index("OUT")] = str(tmp_path)
    assert cluster_states.plan_from(cluster_states.parser().parse_args(again)).digest == plan.digest
    assert {trial.num_steps for trial in trials_of(plan)} == {7}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--profile", "huge"), "profile = 'huge' .* one of laptop, full, tiny"),
        (("--tasks", "0"), "num_tasks = 0 .* at least 2"),
        (("--tasks", "500", "--keywords", "12"), "num_tasks = 500 .* 12 keywords give 1320 families"),
        (("--tasks", ""), "axis num_tasks"),
        (("--tasks", "4,four"), "whole numbers"),
        (("--tasks", "4,4"), "no value comes twice"),
        (("--mask", "both"), "mask = 'both' .* causal, bottleneck or reread"),
        (("--width", "63"), "width = 63 .* multiple of the 4 heads"),
        (("--layers", "-1"), "layers = -1"),
        (("--steps", "0"), "num_steps = 0"),
        (("--batch-size", "2000000"), "batch_size = 2000000 .* at most 1048576"),
        (("--pack", "0"), "pack = 0"),
        (("--gpus-per-trial", "-1"), "gpus_per_trial = -1"),
        (("--resume",), "there is none to go on with"),
        (("--report-only",), "there is none to go on with"),
    ],
)
def test_what_cannot_be_run_is_refused_in_words_and_leaves_nothing(tmp_path, capsys, words, said):
    out = tmp_path / "out"
    assert re.search(said, refused(capsys, "--out", str(out), *words))
    assert not out.exists()


def test_a_folder_that_holds_a_sweep_is_gone_on_with_only_when_asked(tmp_path, capsys):
    out = str(tmp_path / "out")
    SweepStore.open(out, plan_of("tiny"))
    assert "add --resume" in refused(capsys, "--out", out, "--profile", "tiny")
    assert cluster_states.plan_from(arguments(Path(out), "--resume")).digest == plan_of("tiny").digest


def test_a_sweep_of_another_kind_is_refused(tmp_path, capsys):
    out = str(tmp_path / "out")
    SweepStore.open(out, SweepPlan(kind="task-diversity", settings={}, trials=({"seed": 0},), packs=((0,),)))
    assert "sweep = 'task-diversity'" in refused(capsys, "--out", out, "--resume")


def test_a_report_needs_one_finished_pack(tmp_path, capsys):
    out = str(tmp_path / "out")
    SweepStore.open(out, plan_of("tiny"))
    assert "at least one finished pack" in refused(capsys, "--out", out, "--report-only")


def test_dry_run_says_what_would_be_run_and_runs_nothing(tmp_path, capsys):
    assert cluster_states.main(["--out", str(tmp_path / "out"), "--profile", "tiny", "--dry-run"]) == 0
    assert "4 models in 2 packs, 160 steps" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_mode_backbone_has_its_own_options(capsys):
    with pytest.raises(SystemExit):
        cluster_states.main(["--mode", "backbone", "--help"])
    assert "--texts" in capsys.readouterr().out


def test_figures_and_one_page_that_needs_no_network_come_from_the_stored_sweep(swept, capsys):
    assert cluster_states.main(["--report-only", "--out", swept.uri]) == 0
    said = capsys.readouterr().out
    folder = Path(swept.uri)
    page = (folder / "report.html").read_text()
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {"dynamics-causal.png", "dynamics-bottleneck.png", "projections-causal.png", "patches.png"} <= names
    assert page.count("data:image/png;base64,") == len(names)
    assert "http://" not in page and "https://" not in page
    table = Table(pq.read_table(folder / "table.parquet"), trials_of(swept.plan))
    group = report.first_groups(report.groups_of(table))["causal"]
    assert f"{group.medians['accuracy']:.3f}" in said
    for claim in CLAIMS:
        assert (html.escape(claim.what) in page) is (claim.mask != "reread")  # which this sweep has not


def test_a_summary_is_what_the_rows_say(swept):
    rows = swept.table().to_pylist()
    end = max(row["step"] for row in rows)
    table = Table(swept.table(), trials_of(swept.plan))

    def value(trial, metric, position, step=end, split="unseen"):
        found = [
            row["value"]
            for row in rows
            if (row["trial"], row["metric"], row["position"], row["step"], row["split"])
            == (trial, metric, position, step, split)
        ]
        assert len(found) == 1
        return found[0]

    for trial in (0, 3):
        summary = table.summary(trial)
        aris = [value(trial, f"ari/task/layer{layer}", 10) for layer in range(3)]
        assert summary.accuracy == value(trial, "accuracy", 12)
        assert (summary.ari_task, summary.ari_task_layer0) == (max(aris), aris[0])
        before = value(trial, f"ari/task/layer{summary.layer}", 10, step=0)
        assert summary.ari_task_gain == max(aris) - before
        assert summary.flips_layer1 == value(trial, "flips/replace/layer1", 10)
        assert summary.flips_last_layer == value(trial, "flips/replace/layer2", 10)
        assert summary.last_ari_task == value(trial, "ari/task/layer2", 12)


def test_a_sweep_in_other_packs_order_leaves_the_same_table(swept, tmp_path):
    store = SweepStore.open(str(tmp_path / "again"), swept.plan)
    for pack in reversed(range(len(store.plan.packs))):
        run_pack(InstructionPack, store, pack)
    assert Path(store.write_table()).read_bytes() == (Path(swept.uri) / "table.parquet").read_bytes()


def test_a_report_of_an_unfinished_sweep_says_so_and_leaves_the_rest_out(tmp_path, capsys):
    store = SweepStore.open(str(tmp_path / "part"), plan_of("tiny", AXES_OF_ONE | {"num_tasks": [2, 3]}, pack_size=1))
    run_pack(InstructionPack, store, 0)
    assert cluster_states.main(["--report-only", "--out", store.uri]) == 0
    assert "1 of 2 packs are finished; the others are left out." in capsys.readouterr().out


def test_a_benchmark_of_which_a_seed_diverged_is_not_reached():
    names = {field.name: 1.0 for field in dataclasses.fields(Summary)}
    whole = Summary(**{**names, "layer": 1, "diverged": -1})
    gone = Summary(**{**dict.fromkeys(names, math.nan), "layer": -1, "diverged": 7})
    rows, missed = clustering.rows_of({mask: [whole, gone] for mask in MASKS})
    assert [one for one in missed if "1 of 2 seeds diverged" in one] == missed[: len(MASKS)]
    assert {row.id: row.ours for row in rows}["accuracy-causal"] == 1.0
    assert all(row.extra["seeds"] in ([1.0], [1]) for row in rows)


def test_a_backbone_is_read_with_all_threads_that_it_is_given(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(cluster_backbone, "run", lambda _: 0)
    assert cluster_states.main(["--mode", "backbone", "--texts", "texts"]) == 0
    assert chosen == []
