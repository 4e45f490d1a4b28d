"""The benchmark of packing compares sides that compute the same, or says that they do not."""

import sys

import pytest
import torch

from benchmarks import sweeps_packing


def test_a_pack_and_the_plain_module_have_the_same_losses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweeps_packing, "BATCH", 8)
    assert sweeps_packing.check() < 1e-4


def test_sides_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweeps_packing, "BATCH", 8)
    of_seed = sweeps_packing.plain_model
    monkeypatch.setattr(sweeps_packing, "plain_model", lambda seed, device: of_seed(seed + 1, device))
    with pytest.raises(SystemExit, match="differ from the plain module's"):
        sweeps_packing.check()


@pytest.mark.parametrize("side", sorted(sweeps_packing.SIDES))
def test_every_side_trains_all_its_models(side: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweeps_packing, "BATCH", 4)
    updated: list[torch.Tensor] = []
    make, _ = sweeps_packing.SIDES[side]

    def adam_step(self: torch.optim.Adam) -> None:
        updated.extend(parameter for parameter in self.param_groups[0]["params"][:1])

    one_update = sweeps_packing.StackedAdam._update_one

    def stacked_update(self: sweeps_packing.StackedAdam, model: int, factor: float) -> None:
        updated.append(self._weights[model])
        one_update(self, model, factor)

    monkeypatch.setattr(torch.optim.Adam, "step", adam_step)
    monkeypatch.setattr(sweeps_packing.StackedAdam, "_update_one", stacked_update)
    make(range(3))(4)
    assert len(updated) == 12 and len({tensor.data_ptr() for tensor in updated}) == 3


_OBEYS = "import sys; print('done', flush=True); [print('done', flush=True) for _ in sys.stdin]"


def test_a_round_ends_when_every_process_of_the_side_has_answered(monkeypatch: pytest.MonkeyPatch):
    slow = f"import sys, time; time.sleep(0.2 if sys.argv[2] == '8' else 0); {_OBEYS}"
    monkeypatch.setattr(sweeps_packing, "WORKER", (sys.executable, "-c", slow))
    processes = sweeps_packing.Processes("packed")
    processes.ready()
    assert processes.round() > 0 and processes.round() > 0
    processes.close()


def test_a_process_that_ends_early_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sweeps_packing, "WORKER", (sys.executable, "-c", "raise SystemExit(3)"))
    processes = sweeps_packing.Processes("threads")
    with pytest.raises(SystemExit, match="ended with status 3"):
        processes.ready()
    processes.close()
