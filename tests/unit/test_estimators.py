import functools
import itertools

import numpy as np
import pytest
import torch

from metasepia.errors import InvalidSettings
from metasepia.synthetic.estimators import (
    PosteriorSums,
    discrete_mmse,
    discrete_mmse_sums,
    discrete_predictive,
    discrete_predictive_sums,
    gaussian_predictive,
    merge,
    ridge,
)
from metasepia.synthetic.oracles import bayes_optimal
from metasepia.synthetic.regression import Of, PooledRegression, RegressionBatch, TaskPool
from metasepia.synthetic.tasks import Seeds

NOISE = 0.125


def linear(
    num_tasks: int | None, *, num_sequences: int = 12, of: Of = "pretraining"
) -> tuple[TaskPool, RegressionBatch]:
    pool = TaskPool(dims=4, num_tasks=num_tasks)
    problem = PooledRegression(kind="linear", pool=pool, points=8, noise_variance=NOISE)
    return pool, problem.batch(Seeds(), 0, num_sequences=num_sequences, of=of, stream="evaluation")


def logistic(
    num_tasks: int | None, *, num_sequences: int = 12, dims: int = 4, scale: float = 3.0, of: Of = "pretraining"
) -> tuple[TaskPool, RegressionBatch]:
    pool = TaskPool(dims=dims, num_tasks=num_tasks, scale=scale)
    problem = PooledRegression(kind="logistic", pool=pool, points=8)
    return pool, problem.batch(Seeds(), 0, num_sequences=num_sequences, of=of, stream="evaluation")


def exactly(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_ridge_is_the_closed_form_solved_anew_at_each_point():
    _, batch = linear(None)
    x, y = batch.x.double(), batch.y.double()
    ours = ridge(batch.x, batch.y, NOISE, task_variance=2.0)
    for k in range(8):
        gram = x[:, :k].mT @ x[:, :k] + NOISE / 2.0 * torch.eye(4, dtype=torch.float64)
        w = torch.linalg.solve(gram, (x[:, :k].mT @ y[:, :k, None])[..., 0])
        exactly(ours[:, k], (w * x[:, k]).sum(1))


def test_ridge_with_next_to_no_noise_finds_w_once_there_are_as_many_points_as_dims():
    problem = PooledRegression(kind="linear", pool=TaskPool(dims=3, num_tasks=None), points=40, noise_variance=1e-8)
    batch = problem.batch(Seeds(), 0, num_sequences=200)
    error = (ridge(batch.x, batch.y, 1e-8) - batch.target).abs()
    assert float(error[:, 8:].max()) < 3e-3 and float(error[:, 2].mean()) > 0.1


def recomputed(x, y, tasks, log_likelihood, predict) -> np.ndarray:
    """Each point's posterior from scratch, in numpy."""
    x, y, tasks = (tensor.double().numpy() for tensor in (x, y, tasks))
    scores = np.einsum("bkd,md->bkm", x, tasks)
    predictions = np.empty_like(y)
    for k in range(x.shape[1]):
        log_weights = log_likelihood(scores[:, :k], y[:, :k, None]).sum(1)
        weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
        predictions[:, k] = (weights * predict(scores[:, k])).sum(1) / weights.sum(1)
    return predictions


def log_sigmoid(scores: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -scores)


def test_discrete_mmse_is_the_posterior_mean_recomputed_at_each_point():
    for num_tasks, of in itertools.product((1, 5, 300), ("pretraining", "new")):
        pool, batch = linear(num_tasks, of=of)
        theirs = recomputed(
            batch.x, batch.y, pool.tasks(), lambda s, y: -((y - s) ** 2) / (2 * NOISE), lambda scores: scores
        )
        exactly(discrete_mmse(batch.x, batch.y, pool, NOISE), torch.from_numpy(theirs))


def test_discrete_predictive_is_the_posterior_mean_recomputed_at_each_point():
    for num_tasks, of in itertools.product((1, 5, 300), ("pretraining", "new")):
        pool, batch = logistic(num_tasks, of=of)
        theirs = recomputed(
            batch.x, batch.y, pool.tasks(), lambda s, y: log_sigmoid((2 * y - 1) * s), lambda s: np.exp(log_sigmoid(s))
        )
        exactly(discrete_predictive(batch.x, batch.y, pool), torch.from_numpy(theirs))


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
def test_a_pool_read_in_chunks_gives_what_the_whole_gives(chunk):
    pool, batch = linear(300)
    exactly(discrete_mmse(batch.x, batch.y, pool, NOISE, chunk=chunk), discrete_mmse(batch.x, batch.y, pool, NOISE))
    pool, batch = logistic(300)
    exactly(discrete_predictive(batch.x, batch.y, pool, chunk=chunk), discrete_predictive(batch.x, batch.y, pool))


def test_no_more_of_a_pool_is_drawn_at_once_than_a_chunk(monkeypatch):
    drawn, tasks = [], TaskPool.tasks

    def counted(self: TaskPool, first: int = 0, last: int | None = None, device: torch.device | str = "cpu"):
        drawn.append((first, last))
        return tasks(self, first, last, device)

    monkeypatch.setattr(TaskPool, "tasks", counted)
    pool, batch = linear(2500)
    discrete_mmse(batch.x, batch.y, pool, NOISE, chunk=1000)
    assert drawn == [(0, 1000), (1000, 2000), (2000, 2500)]


def test_a_pool_given_as_a_tensor_is_that_pool():
    pool, batch = linear(50)
    ours = discrete_mmse(batch.x, batch.y, pool.tasks(), NOISE)
    assert torch.equal(ours, discrete_mmse(batch.x, batch.y, pool, NOISE))


def of_shards(sums, num_tasks: int) -> list[PosteriorSums]:
    cuts = [0, 1, 90, 130, 299, num_tasks]
    return [sums(first=first, last=last) for first, last in itertools.pairwise(cuts)]


def test_shards_merged_in_any_order_and_grouping_give_the_whole_pool():
    pool, batch = linear(300, of="new")
    labels_pool, labels = logistic(300, of="new")
    for sums in (
        functools.partial(discrete_mmse_sums, batch.x, batch.y, pool, NOISE),
        functools.partial(discrete_predictive_sums, labels.x, labels.y, labels_pool),
    ):
        a, b, c, d, e = of_shards(sums, 300)
        whole = sums()
        for merged in (merge([a, b, c, d, e]), merge([d, b, e, a, c]), a.merge(b.merge(c)).merge(d.merge(e))):
            exactly(merged.predictions, whole.predictions)
            exactly(merged.log_max + merged.total.log(), whole.log_max + whole.total.log())


def test_weights_far_below_the_smallest_number_still_choose_the_nearest_task():
    x = torch.ones(1, 40, 1)
    y = torch.full((1, 40), 5.0)
    tasks = torch.tensor([[-100.0], [90.0], [100.0]])  # log-likelihoods around -1e9
    ours = discrete_mmse(x, y, tasks, 1e-4, chunk=1)
    exactly(ours[0, 1:], torch.full((39,), 90.0, dtype=torch.float64))
    labels = discrete_predictive(x, torch.zeros(1, 40), torch.tensor([[900.0], [800.0]]), chunk=1)
    exactly(labels, torch.ones(1, 40, dtype=torch.float64))


def test_the_posterior_of_a_pool_of_one_task_is_that_task():
    pool, batch = linear(1)
    exactly(discrete_mmse(batch.x, batch.y, pool, NOISE), (batch.x.double() @ batch.w.double()[..., None])[..., 0])
    pool, batch = logistic(1)
    exactly(
        discrete_predictive(batch.x, batch.y, pool),
        torch.sigmoid((batch.x.double() @ batch.w.double()[..., None])[..., 0]),
    )


# Per dim, mean over the points, at D = 8, K = 16, sigma squared 0.25; a pool that is drawn anew moves those of few
# tasks: dMMSE and ridge on pretraining tasks, dMMSE on new ones, and their squared difference on each.
GOLDEN = {
    64: (0.161, 0.354, 0.896, 0.194, 0.554),
    256: (0.187, 0.336, 0.714, 0.148, 0.376),
    1024: (0.223, 0.345, 0.616, 0.121, 0.263),
    4096: (0.254, 0.345, 0.510, 0.092, 0.174),
}


@functools.cache
def errors(num_tasks: int) -> tuple[float, ...]:
    """dMMSE and ridge on pretraining tasks, both on new ones, and their squared difference on each."""
    pool = TaskPool(dims=8, num_tasks=num_tasks)
    problem = PooledRegression(kind="linear", pool=pool, points=16, noise_variance=0.25)
    found, differences = [], []
    for of in ("pretraining", "new"):
        batch = problem.batch(Seeds(), 0, num_sequences=4096 if num_tasks <= 1024 else 2048, of=of)
        pooled, general = discrete_mmse(batch.x, batch.y, pool, 0.25), ridge(batch.x, batch.y, 0.25)
        found += [float((one - batch.target).pow(2).mean()) / 8 for one in (pooled, general)]
        differences.append(float((pooled - general).pow(2).mean()) / 8)
    return (*found, *differences)


@pytest.mark.parametrize("num_tasks", GOLDEN)
def test_errors_are_those_of_the_paper_s_setting(num_tasks):
    old_pooled, old_general, new_pooled, new_general, old_difference, new_difference = errors(num_tasks)
    assert abs(new_general - 0.344) < 0.01  # whatever the pool
    ours = (old_pooled, old_general, new_pooled, old_difference, new_difference)
    np.testing.assert_allclose(ours, GOLDEN[num_tasks], rtol=0.1 if num_tasks < 1024 else 0.05)


@pytest.mark.parametrize("num_tasks", GOLDEN)
def test_the_ideal_of_each_prior_is_a_projection_so_that_errors_add_as_in_pythagoras(num_tasks):
    old_pooled, old_general, new_pooled, new_general, old_difference, new_difference = errors(num_tasks)
    assert abs(old_pooled + old_difference - old_general) < 0.02 * old_general
    assert abs(new_general + new_difference - new_pooled) < 0.02 * new_pooled


def test_each_ideal_is_best_on_its_own_tasks_and_they_draw_together_as_the_pool_grows():
    gaps = []
    for num_tasks in sorted(GOLDEN):
        old_pooled, old_general, new_pooled, new_general, *_ = errors(num_tasks)
        gaps.append((old_general - old_pooled, new_pooled - new_general))
        assert min(gaps[-1]) > 0
    assert gaps == sorted(gaps, reverse=True) and [gap for _, gap in gaps] == sorted((g for _, g in gaps), reverse=True)


def test_a_pool_that_fills_the_space_gives_ridge():
    pool = TaskPool(dims=1, num_tasks=1 << 16)
    problem = PooledRegression(kind="linear", pool=pool, points=6, noise_variance=0.25)
    batch = problem.batch(Seeds(), 0, num_sequences=16, of="new")
    pooled, general = discrete_mmse(batch.x, batch.y, pool, 0.25), ridge(batch.x, batch.y, 0.25)
    torch.testing.assert_close(pooled, general, atol=0.03, rtol=0)


@pytest.mark.parametrize("dims", [1, 2])
def test_the_predictive_of_the_true_prior_agrees_with_quadrature(dims):
    _, batch = logistic(None, dims=dims)
    line = torch.linspace(-18, 18, 1201 if dims == 1 else 241, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * dims).view(-1, dims)
    log_weights = -grid.pow(2).sum(1).expand(12, -1) / (2 * 3.0**2)
    exact = []
    for k in range(8):
        scores = batch.x[:, k].double() @ grid.T
        exact.append((torch.softmax(log_weights, 1) * torch.sigmoid(scores)).sum(1))
        log_weights = log_weights + torch.nn.functional.logsigmoid((2 * batch.y[:, k, None] - 1) * scores)
    ours = gaussian_predictive(batch.x, batch.y, 3.0)
    assert (ours.probabilities[:, 0] == 0.5).all()
    difference = ours.probabilities - torch.stack(exact, 1)
    rms = float(difference.pow(2).mean().sqrt())
    assert rms < 0.003 and rms / 3 < ours.standard_error < 3 * rms
    assert float(difference.abs().max()) < 0.015


def test_the_predictive_of_the_true_prior_agrees_with_long_chains():
    _, batch = logistic(None, num_sequences=24)
    ours = gaussian_predictive(batch.x, batch.y, 3.0)
    assert ours.standard_error < 0.005
    chains = bayes_optimal(batch.x[:, :7], batch.y[:, :7], batch.x[:, 7:], alphas=(3.0,))
    difference = ours.probabilities[:, 7:] - chains.probabilities
    assert float(difference.pow(2).mean().sqrt()) < 2 * chains.standard_error < 0.04
    assert abs(float(difference.mean())) < 0.006


def test_sharp_labels_and_long_sequences_are_answered_within_the_error_that_is_stated():
    pool = TaskPool(dims=4, num_tasks=None, scale=10.0)
    batch = PooledRegression(kind="logistic", pool=pool, points=16).batch(Seeds(), 0, num_sequences=16)
    few, many = (gaussian_predictive(batch.x, batch.y, 10.0, particles=n, seed=n) for n in (1024, 16384))
    rms = float((few.probabilities - many.probabilities).pow(2).mean().sqrt())
    assert rms < 0.012 and many.standard_error < few.standard_error / 2 and rms < 2 * few.standard_error
    # Again by 2**17 draws of the prior, of which a typical sequence of labels leaves some hundreds.
    drawn = discrete_predictive(batch.x[:4], batch.y[:4], TaskPool(dims=4, num_tasks=1 << 17, scale=10.0, seed=0))
    assert float((many.probabilities[:4] - drawn).pow(2).mean().sqrt()) < 0.012


def test_the_predictive_of_the_true_prior_is_a_function_of_each_sequence_and_the_seed():
    _, batch = logistic(None)
    one, same, other = (gaussian_predictive(batch.x, batch.y, 3.0, particles=64, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.probabilities, same.probabilities)
    assert not torch.equal(one.probabilities, other.probabilities)
    alone = gaussian_predictive(batch.x[5:6], batch.y[5:6], 3.0, particles=64)
    torch.testing.assert_close(alone.probabilities, one.probabilities[5:6], atol=1e-4, rtol=0)


def test_each_ideal_of_logistic_regression_is_best_on_its_own_tasks():
    signs: dict[Of, int] = {"pretraining": 1, "new": -1}
    for of, sign in signs.items():
        pool, batch = logistic(16, num_sequences=256, of=of)
        pooled = discrete_predictive(batch.x, batch.y, pool)
        general = gaussian_predictive(batch.x, batch.y, 3.0, particles=128).probabilities
        error, other = ((p - batch.target).pow(2).mean() for p in (pooled, general))
        assert sign * float(other - error) > 0.02


X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 3)
POOL = TaskPool(dims=4, num_tasks=5)
NAN = torch.full((2, 3), float("nan"))


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("noise_variance", lambda: ridge(X, Y, 0.0)),
        ("noise_variance", lambda: ridge(X, Y, -1.0)),
        ("noise_variance", lambda: ridge(X, Y, float("nan"))),
        ("task_variance", lambda: ridge(X, Y, 1.0, 0.0)),
        ("task_variance", lambda: ridge(X, Y, 1.0, float("inf"))),
        ("y", lambda: ridge(X, NAN, 1.0)),
        ("x", lambda: ridge(X / 0, Y, 1.0)),
        ("noise_variance", lambda: discrete_mmse(X, Y, POOL, 0.0)),
        ("chunk", lambda: discrete_mmse(X, Y, POOL, 1.0, chunk=0)),
        ("y", lambda: discrete_mmse(X, NAN, POOL, 1.0)),
        ("num_tasks", lambda: discrete_mmse(X, Y, TaskPool(dims=4, num_tasks=None), 1.0)),
        ("dims", lambda: discrete_mmse(X, Y, TaskPool(dims=3, num_tasks=5), 1.0)),
        ("pool", lambda: discrete_mmse(X, Y, torch.full((2, 4), float("inf")), 1.0)),
        ("tasks", lambda: discrete_mmse(X, Y, torch.zeros(0, 4), 1.0)),
        ("tasks", lambda: discrete_mmse_sums(X, Y, POOL, 1.0, first=5)),
        ("tasks", lambda: discrete_predictive_sums(X, Y, POOL, last=6)),
        ("y", lambda: discrete_predictive(X, Y + 0.5, POOL)),
        ("y", lambda: discrete_predictive(X, NAN, POOL)),
        ("y", lambda: gaussian_predictive(X, Y - 1, 1.0)),
        ("x", lambda: gaussian_predictive(X / 0, Y, 1.0)),
        ("scale", lambda: gaussian_predictive(X, Y, 0.0)),
        ("particles", lambda: gaussian_predictive(X, Y, 1.0, particles=1)),
        ("shards", lambda: merge([])),
    ],
)
def test_a_value_outside_its_range_is_named(field, call):
    with pytest.raises(InvalidSettings, match=rf"setting {field} = .* is not allowed; it must be "):
        call()
