import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported
from metasepia.experts import factors
from metasepia.experts.factors import FactorSet, SingularFactors, cut_factors, factors_of, factors_of_backbone
from metasepia.experts.vectors import FactorIndex, factors_path, found_factors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.models.shards import LayerShard

BACKBONE = "b" * 64


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 9)).requires_grad_(False)


def factored(home: Path, model: nn.Module | None = None) -> FactorSet:
    return factors_of(model or a_model(), ("0", "2"), BACKBONE, home, progress=False)


def test_factors_multiply_back_to_the_weights_and_say_their_lengths(tmp_path: Path) -> None:
    factors = factored(tmp_path)
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(factors[name].scaled(torch.ones(5)), a_model().get_parameter(name).data)
    assert factors.index.lengths == {"0.weight": 5, "2.weight": 5}
    assert factors.num_singular == 10


def test_factors_are_computed_once_and_read_back_the_same(tmp_path: Path) -> None:
    first = factored(tmp_path)
    file = tmp_path / "factors" / f"{first.digest}.safetensors"
    written = file.stat().st_mtime_ns
    again = factored(tmp_path)
    assert (again.digest, file.stat().st_mtime_ns) == (first.digest, written)
    assert all(torch.equal(f.u, again[name].u) for name, f in first.factors.items())


def test_factors_are_mapped_from_their_file_and_so_shared_between_processes(tmp_path: Path) -> None:
    factors = factored(tmp_path)
    (mapped,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{factors.digest}.safe" in line]
    begin, end = (int(address, 16) for address in mapped.split()[0].split("-"))
    assert all(begin <= part.data_ptr() < end for f in factors.factors.values() for part in (f.u, f.s, f.vh))


def test_the_index_beside_the_factors_is_read_without_them(tmp_path: Path) -> None:
    factors = factored(tmp_path)
    index = FactorIndex.read(factors.digest, tmp_path)
    assert index == factors.index
    assert index.digest == FactorIndex.digest_for(BACKBONE, ("2.weight", "0.weight"))


def test_a_torn_factor_file_is_computed_anew(tmp_path: Path) -> None:
    first = factored(tmp_path)
    values = first["0.weight"].s.clone()  # `first` itself is a view of the file that is torn next
    file = tmp_path / "factors" / f"{first.digest}.safetensors"
    torn = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()
    file.write_bytes(torn)
    assert torch.equal(factored(tmp_path)["0.weight"].s, values)


def test_factors_of_a_half_precision_weight_are_fp32(tmp_path: Path) -> None:
    factors = factored(tmp_path, a_model().bfloat16())
    assert factors["0.weight"].u.dtype == torch.float32
    rounded = a_model().get_parameter("0.weight").bfloat16().float()
    torch.testing.assert_close(factors["0.weight"].scaled(torch.ones(5)), rounded)


def test_a_layer_name_that_the_model_lacks_is_refused_with_the_names_it_has(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"expert_layers = 'mlp\.up_proj'.*here: 0, 2"):
        factors_of(a_model(), ("mlp.up_proj",), BACKBONE, tmp_path, progress=False)


def test_a_layer_with_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(NotSupported, match="transposed weight"):
        factors_of(nn.Sequential(Conv1D(4, 3)), ("0",), BACKBONE, tmp_path, progress=False)


# -- straight from the files -------------------------------------------------------------------------------------------

MLP = ("mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def llama(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> PreparedBackbone:
    return checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path)


def test_factors_of_the_files_are_those_of_the_loaded_model(llama: PreparedBackbone, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    want = factors_of(model, MLP, llama.digest, tmp_path / "other", progress=False)
    got = factors_of_backbone(llama, MLP, tmp_path, progress=False)
    assert (got.digest, got.index) == (want.digest, want.index)
    assert factors_path(got.digest, tmp_path).read_bytes() == factors_path(got.digest, tmp_path / "other").read_bytes()


def test_one_weight_at_a_time_is_in_memory_while_factoring(
    llama: PreparedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(checkpoints, "load", refuse)
    assert len(factors_of_backbone(llama, MLP, tmp_path, progress=False).factors) == 4


def test_factoring_that_was_killed_goes_on_where_it_stopped_and_ends_with_the_same_bytes(
    llama: PreparedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = factors_of_backbone(llama, MLP, tmp_path / "other", progress=False)
    factored: list[tuple[int, ...]] = []
    of = SingularFactors.of

    def killed_at_the_third(weight: Tensor) -> SingularFactors:
        if len(factored) == 2:
            raise KeyboardInterrupt
        factored.append(tuple(weight.shape))
        return of(weight)

    with monkeypatch.context() as patched:
        patched.setattr(SingularFactors, "of", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            factors_of_backbone(llama, MLP, tmp_path, progress=False)
    assert found_factors(whole.digest, tmp_path) is None
    journal = factors_path(whole.digest, tmp_path).with_suffix(".journal")
    with journal.open("a") as torn:
        torn.write("model.layers.1.mlp.up_")  # a name that was being written
    counted: list[Tensor] = []
    monkeypatch.setattr(SingularFactors, "of", lambda weight: counted.append(weight) or of(weight))
    factors_of_backbone(llama, MLP, tmp_path, progress=False)
    assert len(counted) == 2
    path = factors_path(whole.digest, tmp_path)
    assert path.read_bytes() == factors_path(whole.digest, tmp_path / "other").read_bytes()
    assert sorted(one.suffix for one in path.parent.iterdir()) == [".json", ".lock", ".safetensors"]


def test_small_weights_are_factored_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    of = SingularFactors.of
    monkeypatch.setattr(SingularFactors, "of", lambda weight: used.append(torch.get_num_threads()) or of(weight))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        factored(tmp_path / "small")
        monkeypatch.setattr(factors, "ONE_THREAD", 4)
        factored(tmp_path / "large")
        assert used == [1, 1, 2, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_was_begun_for_other_layers_is_not_gone_on_with(tmp_path: Path) -> None:
    path = factors_path(FactorIndex.digest_for(BACKBONE, ("0.weight", "2.weight")), tmp_path)
    path.parent.mkdir()
    path.with_suffix(".partial").write_bytes(b"x" * 1000)
    path.with_suffix(".journal").write_text("0.weight\n")
    weight = a_model().get_parameter("0.weight").data
    torch.testing.assert_close(factored(tmp_path)["0.weight"].scaled(torch.ones(5)), weight)


def test_a_disk_without_room_is_refused_before_anything_is_factored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: Any = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InvalidSettings, match=r"GiB free for the factors.*expert_rank"):
        factored(tmp_path)


def test_a_rank_reads_its_rows_of_u_or_columns_of_vh(llama: PreparedBackbone, tmp_path: Path) -> None:
    whole = factors_of_backbone(llama, MLP, tmp_path, progress=False)
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    shards = {up: LayerShard("column", (50, 46), 1), down: LayerShard("row", (50, 46), 1)}
    mine = cut_factors(whole.digest, whole.backbone, tmp_path, shards, dtype=torch.bfloat16)
    assert torch.equal(mine[up].u, whole[up].u[50:].bfloat16()) and torch.equal(mine[up].vh, whole[up].vh.bfloat16())
    assert torch.equal(mine[down].u, whole[down].u.bfloat16())
    assert torch.equal(mine[down].vh, whole[down].vh[:, 50:].bfloat16())
    assert torch.equal(mine[up].s, whole[up].s) and mine.index == whole.index
    assert mine.shards == shards


def test_the_leading_singular_vectors_alone_are_kept_with_all_singular_values(
    llama: PreparedBackbone, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    leading = factors_of_backbone(llama, MLP, tmp_path, rank=8, progress=False)
    whole = factors_of_backbone(llama, MLP, tmp_path, progress=False)  # of its own: the file of eight is not enough
    assert leading.digest == whole.digest and leading.index == whole.index
    small, large = (factors_path(whole.digest, tmp_path, rank) for rank in (8, 0))
    assert small.stat().st_size < 0.3 * large.stat().st_size
    assert load_file(small)[f"{name}/u"].shape == (48, 8)
    for rank in (8, 5):
        again = factors_of_backbone(llama, MLP, tmp_path, rank=rank, progress=False)
        cut = cut_factors(whole.digest, whole.backbone, tmp_path, {}, rank=rank)
        for one in (again[name], cut[name]):
            assert torch.equal(one.u, whole[name].u[:, :rank]) and torch.equal(one.vh, whole[name].vh[:rank])
            assert torch.equal(one.s, whole[name].s)
    assert not factors_path(whole.digest, tmp_path, 5).exists()


def test_factors_that_nobody_made_are_missed_with_the_command_that_makes_them(
    llama: PreparedBackbone, tmp_path: Path
) -> None:
    whole = factors_of_backbone(llama, MLP, tmp_path, progress=False)
    factors_path(whole.digest, tmp_path).unlink()
    with pytest.raises(CorruptArtefact, match=r"jobs\.factor_backbone"):
        cut_factors(whole.digest, whole.backbone, tmp_path, {})
