import numpy as np
import pytest

from metasepia.errors import InvalidRequest
from metasepia.experts.transfer import Mode, matched, num_blocks, resampled, transferred
from metasepia.experts.vectors import ExpertVectors, FactorIndex

KINDS = ("mlp.up_proj.weight", "mlp.down_proj.weight")


def index(
    backbone: str, blocks: int, length: int, prefix: str = "model.layers", kinds: tuple[str, ...] = KINDS
) -> FactorIndex:
    names = [f"{prefix}.{block}.{kind}" for block in range(blocks) for kind in kinds]
    digest = FactorIndex.digest_for(backbone * 64, tuple(names))
    return FactorIndex(digest=digest, backbone=backbone * 64, lengths=dict.fromkeys(names, length))


def expert_of(factors: FactorIndex, data_seed: int = 0, rank: int | None = None) -> ExpertVectors:
    rng = np.random.default_rng(data_seed)
    z = {
        name: (1 + 0.1 * rng.standard_normal(rank or length)).astype(np.float32)
        for name, length in factors.lengths.items()
    }
    return ExpertVectors(backbone=factors.backbone, factors=factors.digest, z=z)


SOURCE = index("a", 4, 12)


def test_between_equal_shapes_ordered_changes_the_binding_and_no_number() -> None:
    expert, target = expert_of(SOURCE), index("b", 4, 12)
    moved = transferred(expert, SOURCE, target, "ordered")
    moved.check_fits(target)
    assert all((moved.z[name] == expert.z[name]).all() for name in expert.z)
    assert moved.digest != expert.digest
    assert transferred(expert, SOURCE, target, "interpolated").digest == moved.digest
    back = transferred(moved, target, SOURCE, "ordered")
    assert back.digest == expert.digest


def test_shuffled_keeps_each_vectors_values_and_not_their_order_and_follows_its_seed() -> None:
    expert, target = expert_of(SOURCE), index("b", 4, 12)
    one, again, other = (transferred(expert, SOURCE, target, "shuffled", seed=seed) for seed in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    for name, vector in expert.z.items():
        assert sorted(one.z[name]) == sorted(vector)
        assert (one.z[name] != vector).any()


def test_ordered_onto_another_shape_is_refused_and_interpolated_fits_it() -> None:
    expert, target = expert_of(SOURCE), index("b", 6, 8)
    with pytest.raises(InvalidRequest, match="one has 4 blocks and the other 6; choose interpolated"):
        transferred(expert, SOURCE, target, "ordered")
    with pytest.raises(InvalidRequest, match=r"has 12 singular values and .* has 8"):
        transferred(expert, SOURCE, index("b", 4, 8), "ordered")
    transferred(expert, SOURCE, target, "interpolated").check_fits(target)
    transferred(expert, SOURCE, target, "shuffled").check_fits(target)


def test_a_straight_line_over_the_spectrum_stays_one_at_any_length() -> None:
    line = (2 * (np.arange(40) + 0.5) / 40).astype(np.float32)
    for length in (10, 20, 80):
        inner = slice(length // 10, -length // 10)  # half a step at the ends is flat
        np.testing.assert_allclose(
            resampled(line, length)[inner], (2 * (np.arange(length) + 0.5) / length)[inner], atol=1e-6
        )
    np.testing.assert_array_equal(resampled(np.full(7, 0.5, np.float32), 30), np.full(30, 0.5, np.float32))


def test_layers_match_by_kind_and_relative_depth_whatever_the_family_calls_its_blocks() -> None:
    target = index("b", 2, 12, prefix="transformer.h")
    pairs = matched(tuple(SOURCE.lengths), tuple(target.lengths))
    assert pairs["transformer.h.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert pairs["transformer.h.1.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    deeper = matched(tuple(SOURCE.lengths), tuple(index("b", 8, 12).lengths))
    blocks = [int(deeper[f"model.layers.{block}.mlp.down_proj.weight"].split(".")[2]) for block in range(8)]
    assert blocks == [0, 0, 1, 1, 2, 2, 3, 3]
    same = matched(tuple(SOURCE.lengths), tuple(SOURCE.lengths))
    assert all(name == origin for name, origin in same.items())
    assert (num_blocks(SOURCE.lengths), num_blocks(["lm_head.weight"])) == (4, 0)


def test_a_layer_that_the_expert_leaves_alone_is_left_alone_on_the_target() -> None:
    whole = expert_of(SOURCE)
    last = {name: vector for name, vector in whole.z.items() if name.startswith("model.layers.3")}
    late = ExpertVectors(backbone=whole.backbone, factors=whole.factors, z=last)
    moved = transferred(late, SOURCE, index("b", 8, 12), "interpolated")
    assert {name.split(".")[2] for name in moved.z} == {"6", "7"}


@pytest.mark.parametrize("mode", ["ordered", "shuffled"])
def test_a_truncated_expert_stays_truncated_between_equal_shapes(mode: Mode) -> None:
    moved = transferred(expert_of(SOURCE, rank=5), SOURCE, index("b", 4, 12), mode)
    assert {len(vector) for vector in moved.z.values()} == {5}


def test_a_truncated_expert_is_interpolated_as_if_it_were_one_beyond_its_end() -> None:
    moved = transferred(expert_of(SOURCE, rank=3), SOURCE, index("b", 4, 24), "interpolated")
    for vector in moved.z.values():
        assert len(vector) == 24 and (vector[8:] == 1).all() and (vector[:5] != 1).all()


def test_backbones_without_a_kind_of_layer_in_common_are_refused() -> None:
    target = index("b", 4, 12, kinds=("mlp.dense_h_to_4h.weight",))
    with pytest.raises(InvalidRequest, match="none is of one kind"):
        transferred(expert_of(SOURCE), SOURCE, target, "interpolated")
