from pathlib import Path

import pytest
import torch
from torch import nn

from metasepia.errors import InvalidSettings, NotSupported
from metasepia.experts import FactorIndex
from metasepia.factors import FactorSet, factors_of

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
