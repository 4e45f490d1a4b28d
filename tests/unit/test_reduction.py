import numpy as np
import pytest
from sklearn.decomposition import PCA

from metasepia.reasoning.reduction import Reduction, ReductionRecipe


def vectors(num: int, width: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num, width)) * np.linspace(3, 0.1, width) + 5).astype(np.float32)


def test_a_tiny_floor_whitens_as_scikit_learns_pca_does():
    x, new = vectors(60, 6), vectors(20, 6, seed=1)
    ours = Reduction.fit(x, dims=6, recipe=ReductionRecipe(floor=1e-12, views=1), seed=0)
    theirs = PCA(6, whiten=True).fit(x.astype(np.float64))
    mine, oracle = ours.apply(new)[0], theirs.transform(new) * np.sqrt(60 / 59)
    signs = np.sign((mine * oracle).sum(0))  # an axis may point either way
    np.testing.assert_allclose(mine, oracle * signs, atol=1e-4)


def test_with_a_floor_of_one_views_of_all_components_keep_distances_up_to_one_scale():
    x = vectors(33, 40)
    one = Reduction.fit(x, dims=8, recipe=ReductionRecipe(floor=1.0, views=4), seed=3)  # 32 components, 4 views of 8
    scales = np.linalg.norm(one.projections, axis=(1, 2)) / np.sqrt(8)
    reduced = one.apply(x) / scales[:, None, None]
    whole = reduced.transpose(1, 0, 2).reshape(33, 32)
    ours = np.linalg.norm(whole[:, None] - whole[None], axis=-1)
    np.testing.assert_allclose(ours, np.linalg.norm(x[:, None] - x[None], axis=-1), rtol=1e-3, atol=1e-3)


def test_examples_have_mean_zero_and_mean_variance_one_in_every_view():
    x = vectors(50)
    for floor in (1.0, 0.1):
        reduced = Reduction.fit(x, dims=8, recipe=ReductionRecipe(floor=floor, views=5), seed=0).apply(x)
        np.testing.assert_allclose(reduced.mean(axis=1), 0, atol=1e-5)
        np.testing.assert_allclose(reduced.var(axis=1).mean(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("case", ["constant", "zeros", "duplicates", "two", "huge", "tiny"])
def test_degenerate_examples_reduce_to_finite_numbers(case: str):
    x = {
        "constant": np.full((10, 24), 0.3, np.float32),
        "zeros": np.zeros((10, 24), np.float32),
        "duplicates": np.repeat(vectors(2), 5, axis=0),
        "two": vectors(2),
        "huge": vectors(10) * np.float32(1e30),
        "tiny": vectors(10) * np.float32(1e-30),
    }[case]
    one = Reduction.fit(x, dims=8, recipe=ReductionRecipe(), seed=0)
    for new in (x, vectors(3, seed=5), x * 1e3):
        assert np.isfinite(one.apply(new)).all()
    assert not one.apply(x).any() if case in ("constant", "zeros") else one.apply(x).any()


def test_fewer_components_than_dims_leave_zeros():
    x = vectors(4)
    assert not Reduction.fit(x, dims=8, recipe=ReductionRecipe(), seed=0).apply(x)[:, :, 3:].any()


def test_equal_seeds_give_equal_views_and_other_seeds_other_ones():
    x = vectors(30)
    first, same, other = (Reduction.fit(x, dims=8, recipe=ReductionRecipe(), seed=s).projections for s in (1, 1, 2))
    assert np.array_equal(first, same) and not np.allclose(first, other)
