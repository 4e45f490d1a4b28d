"""`jobs.cluster_states` on a real Ray Tune: two workers, one of them not needed the second time."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from jobs import cluster_states
from metasepia.instructions.profiles import plan_of
from metasepia.instructions.work import InstructionPack
from metasepia.sweeps.run import run_pack
from metasepia.sweeps.store import SweepStore

AXES = ["--profile", "tiny", "--seeds", "0", "--quiet"]


@pytest.fixture
def one_thread():
    """As trials compute, whatever the machine's cores: sums in another order are other bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_sweep_by_tune_leaves_the_table_of_one_process_and_resumes_to_it(cluster, tmp_path, one_thread):
    alone = SweepStore.open(str(tmp_path / "alone"), plan_of("tiny", {"seed": (0,)}))
    for pack in range(len(alone.plan.packs)):
        run_pack(InstructionPack, alone, pack)
    expected = Path(alone.write_table()).read_bytes()

    out = tmp_path / "swept"
    began = SweepStore.open(str(out), alone.plan)
    run_pack(InstructionPack, began, 0)  # killed after its first pack, say
    assert cluster_states.main([*AXES, "--resume", "--workers", "2", "--out", str(out)]) == 0
    assert (out / "table.parquet").read_bytes() == expected
    assert set(pq.read_table(out / "table.parquet")["trial"].to_pylist()) == {0, 1}
    assert "data:image/png" in (out / "report.html").read_text()
