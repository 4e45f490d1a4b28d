import dataclasses

import pytest
import torch

from metasepia.errors import InvalidSettings
from metasepia.synthetic.regression import (
    PooledRegression,
    RegressionBatch,
    TaskPool,
    batch_of_many,
    batches_of_many,
    path_between,
)
from metasepia.synthetic.tasks import ProbabilisticLogisticRegression, Seeds


def linear(num_tasks: int | None, *, dims: int = 3, points: int = 5, scale: float = 1.0, pool_seed: int = 102):
    pool = TaskPool(dims=dims, num_tasks=num_tasks, scale=scale, seed=pool_seed)
    return PooledRegression(kind="linear", pool=pool, points=points, noise_variance=0.25)


def logistic(num_tasks: int | None, *, dims: int = 3, points: int = 5, scale: float = 3.0) -> PooledRegression:
    return PooledRegression(kind="logistic", pool=TaskPool(dims=dims, num_tasks=num_tasks, scale=scale), points=points)


def assert_equal(ours: RegressionBatch, theirs: RegressionBatch) -> None:
    for field in dataclasses.fields(RegressionBatch):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert one.dtype == other.dtype and torch.equal(one, other), field.name


def one_of(stack: RegressionBatch, *index: int) -> RegressionBatch:
    return RegressionBatch(**{f.name: getattr(stack, f.name)[index] for f in dataclasses.fields(stack)})


PROBLEMS = [
    linear(4),
    linear(None),
    linear(1 << 20, scale=0.3, pool_seed=7),
    dataclasses.replace(linear(1), noise_variance=2.0),
    linear(None, scale=5.0),
]
SEEDS = [Seeds(), Seeds(), Seeds(task=0, data=8, noise=2), Seeds(task=5, data=1, noise=6), Seeds(task=9, data=8)]


@pytest.mark.parametrize("of", ["pretraining", "new"])
def test_a_stack_of_batches_has_the_bits_of_each_batch_alone(of):
    stack = batch_of_many(PROBLEMS, SEEDS, 3, num_sequences=6, of=of)
    for i, (problem, seeds) in enumerate(zip(PROBLEMS, SEEDS, strict=True)):
        assert_equal(one_of(stack, i), problem.batch(seeds, 3, num_sequences=6, of=of))


def test_several_steps_at_once_have_the_bits_of_step_by_step():
    problems = [logistic(4), logistic(None), logistic(300)]
    steps = batches_of_many(problems, SEEDS[:3], [5, 0, 6], num_sequences=4)
    for i, step in enumerate([5, 0, 6]):
        assert_equal(one_of(steps, i), batch_of_many(problems, SEEDS[:3], step, num_sequences=4))


def test_a_pool_is_the_beginning_of_every_larger_one_and_of_the_same_pool_in_fewer_dims():
    small, large = TaskPool(dims=3, num_tasks=8), TaskPool(dims=5, num_tasks=64)
    assert torch.equal(small.tasks(), large.tasks()[:8, :3])
    assert not torch.equal(small.tasks(), dataclasses.replace(small, seed=103).tasks())


def test_parts_of_a_pool_are_those_of_the_whole():
    pool = TaskPool(dims=2, num_tasks=50, scale=2.0)
    assert torch.equal(torch.cat([pool.tasks(0, 7), pool.tasks(7, 49), pool.tasks(49)]), pool.tasks())


def test_tasks_by_their_place_are_those_of_the_list():
    pool, places = TaskPool(dims=2, num_tasks=1 << 20), torch.tensor([5, 1_048_575, 5, 0])
    assert torch.equal(pool.at(places), torch.cat([pool.tasks(i, i + 1) for i in places.tolist()]))


def test_tasks_have_the_variance_of_the_scale():
    tasks = TaskPool(dims=4, num_tasks=50_000, scale=3.0).tasks().double()
    torch.testing.assert_close(tasks.T.cov(), 9 * torch.eye(4, dtype=torch.float64), atol=0.25, rtol=0)


@pytest.mark.parametrize("make", [linear, logistic])
def test_each_sequence_has_the_task_of_the_pool_that_its_index_names(make):
    batch = make(10).batch(Seeds(), 2, num_sequences=40)
    assert torch.equal(batch.w, make(10).pool.tasks()[batch.task])


def test_tasks_of_a_pool_are_taken_uniformly():
    counts = torch.bincount(linear(10).batch(Seeds(), 0, num_sequences=50_000).task, minlength=10)
    assert len(counts) == 10
    torch.testing.assert_close(counts / 50_000, torch.full((10,), 0.1), atol=0.006, rtol=0)


def test_without_a_pool_every_sequence_has_a_task_of_its_own():
    batch = linear(None).batch(Seeds(), 0, num_sequences=100)
    assert (batch.task == -1).all() and len(batch.w.unique(dim=0)) == 100


def test_each_seed_and_the_step_change_what_they_name_and_nothing_else():
    problem, seeds = linear(1000), Seeds(task=0, data=1, noise=2)
    first = problem.batch(seeds, 5, num_sequences=8)
    noise = first.y - first.target
    for name, changed in (("task", {"w", "task"}), ("data", {"x"}), ("noise", {"noise"})):
        other = problem.batch(dataclasses.replace(seeds, **{name: 9}), 5, num_sequences=8)
        differs = {part for part in ("x", "w", "task") if not torch.equal(getattr(first, part), getattr(other, part))}
        # The noise is a difference of rounded numbers.
        if not torch.allclose(noise, other.y - other.target, atol=1e-5):
            differs.add("noise")
        assert differs == changed
    later = problem.batch(seeds, 6, num_sequences=8)
    assert not torch.equal(first.x, later.x) and not torch.equal(first.task, later.task)
    assert torch.equal(later.w, problem.pool.tasks()[later.task])


@pytest.mark.parametrize("make", [linear, logistic])
@pytest.mark.parametrize("num_tasks", [6, None])
def test_a_smaller_batch_is_the_beginning_of_a_larger_one(make, num_tasks):
    small = make(num_tasks).batch(Seeds(), 9, num_sequences=4)
    large = make(num_tasks, points=11).batch(Seeds(), 9, num_sequences=7)
    assert torch.equal(small.x, large.x[:4, :5]) and torch.equal(small.y, large.y[:4, :5])
    assert torch.equal(small.w, large.w[:4]) and torch.equal(small.task, large.task[:4])


def test_y_of_linear_is_its_target_and_noise_of_the_variance_asked_for():
    batch = linear(64).batch(Seeds(), 0, num_sequences=20_000)
    exact = (batch.x.double() @ batch.w.double()[..., None])[..., 0]
    torch.testing.assert_close(batch.target.double(), exact, atol=2e-6, rtol=1e-6)
    noise = (batch.y - batch.target).double()
    assert abs(float(noise.var()) - 0.25) < 0.004 and abs(float(noise.mean())) < 0.006
    assert abs(float((noise * batch.target).mean())) < 0.01


def test_labels_of_logistic_follow_their_target():
    batch = logistic(64).batch(Seeds(), 0, num_sequences=8000)
    exact = torch.sigmoid((batch.x.double() @ batch.w.double()[..., None])[..., 0])
    torch.testing.assert_close(batch.target.double(), exact, atol=2e-6, rtol=1e-5)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (batch.target >= low) & (batch.target < low + 0.2)
        assert abs(float(batch.y[inside].mean() - batch.target[inside].mean())) < 0.02


def test_logistic_regression_without_a_pool_is_the_family_of_the_reasoning_module_number_for_number():
    ours = logistic(None, dims=4, scale=10.0).batch(Seeds(), 7, num_sequences=6)
    family = ProbabilisticLogisticRegression(dims=4, alphas=(10.0,))
    theirs = family.batch(Seeds(), 7, num_sequences=6, num_pairs=5)
    assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y) and torch.equal(ours.w, theirs.w)
    torch.testing.assert_close(ours.target, theirs.probabilities)


def test_new_tasks_are_in_no_pool_and_the_same_for_every_pool_with_the_points_of_pretraining():
    old = linear(4).batch(Seeds(), 1, num_sequences=9, stream="evaluation")
    new = linear(4).batch(Seeds(), 1, num_sequences=9, stream="evaluation", of="new")
    assert (new.task == -1).all() and torch.equal(old.x, new.x)
    assert not (new.w[:, None] == linear(4).pool.tasks()).all(-1).any()
    for num_tasks in (1, 4096, None):
        assert_equal(linear(num_tasks).batch(Seeds(), 1, num_sequences=9, stream="evaluation", of="new"), new)
    assert_equal(linear(None).batch(Seeds(), 1, num_sequences=9, stream="evaluation"), new)


def test_evaluation_shares_no_point_and_no_fresh_task_with_training():
    problem = linear(None)
    training, evaluation = (problem.batch(Seeds(), 0, num_sequences=50, stream=s) for s in ("training", "evaluation"))
    assert not (training.x == evaluation.x).any() and not (training.w == evaluation.w).any()


def test_a_batch_of_given_tasks_is_that_of_the_pool_if_the_tasks_are():
    for problem in (linear(7), logistic(7)):
        theirs = problem.batch(Seeds(), 4, num_sequences=6, stream="evaluation")
        ours = problem.batch_of_tasks(theirs.w, Seeds(), 4)
        assert_equal(dataclasses.replace(ours, task=theirs.task), theirs)
        assert (ours.task == -1).all()


def test_the_path_between_tasks_has_their_mean_norm_and_begins_and_ends_in_their_directions():
    first, second = TaskPool(dims=4, num_tasks=6).tasks().view(2, 3, 4)
    norm = (first.norm(dim=1) + second.norm(dim=1)) / 2
    path = path_between(first, second, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(path.norm(dim=2), norm.expand(3, 3))
    torch.testing.assert_close(path[0], second * (norm / second.norm(dim=1))[:, None])
    torch.testing.assert_close(path[2], first * (norm / first.norm(dim=1))[:, None])
    inside = 0.25 * first + 0.75 * second
    torch.testing.assert_close(torch.cosine_similarity(path[1], inside, dim=1), torch.ones(3))
    assert not path_between(first, -first, torch.tensor([0.5])).any()


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("num_tasks", lambda: linear(0)),
        ("num_tasks", lambda: linear((1 << 24) + 1)),
        ("dims", lambda: linear(4, dims=0)),
        ("dims", lambda: linear(4, dims=True)),
        ("points", lambda: linear(4, points=0)),
        ("points", lambda: linear(4, points=5000)),
        ("scale", lambda: linear(4, scale=0.0)),
        ("scale", lambda: linear(4, scale=float("nan"))),
        ("scale", lambda: logistic(4, scale=float("inf"))),
        ("noise_variance", lambda: dataclasses.replace(linear(4), noise_variance=-0.25)),
        ("noise_variance", lambda: dataclasses.replace(linear(4), noise_variance=0.0)),
        ("noise_variance", lambda: dataclasses.replace(linear(4), noise_variance=float("nan"))),
        ("noise_variance", lambda: dataclasses.replace(logistic(4), noise_variance=0.25)),
        ("num_sequences", lambda: linear(4).batch(Seeds(), 0, num_sequences=0)),
        ("points", lambda: batch_of_many([linear(4), linear(4, points=6)], [Seeds()] * 2, 0, num_sequences=1)),
        ("kind", lambda: batch_of_many([linear(4), logistic(4)], [Seeds()] * 2, 0, num_sequences=1)),
        ("seeds", lambda: batch_of_many([linear(4)], [Seeds()] * 2, 0, num_sequences=1)),
        ("seeds", lambda: batch_of_many([], [], 0, num_sequences=1)),
        ("steps", lambda: batches_of_many([linear(4)], [Seeds()], [], num_sequences=1)),
        ("num_tasks", lambda: TaskPool(dims=2, num_tasks=None).tasks()),
        ("tasks", lambda: TaskPool(dims=2, num_tasks=4).tasks(2, 5)),
        ("tasks", lambda: TaskPool(dims=2, num_tasks=4).tasks(3, 3)),
        ("dims", lambda: linear(4, dims=3).batch_of_tasks(torch.zeros(2, 4), Seeds(), 0)),
    ],
)
def test_a_setting_outside_its_range_is_named(field, make):
    with pytest.raises(InvalidSettings, match=rf"setting {field} = .* is not allowed; it must be "):
        make()
