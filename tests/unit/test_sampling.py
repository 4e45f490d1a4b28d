import numpy as np
import torch

from metasepia.synthetic import sampling
from metasepia.synthetic.tasks import ProbabilisticLogisticRegression, Seeds


def splitmix64(key: int, index: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = np.uint64(key % 2**64) + index.astype(np.uint64) * np.uint64(sampling.GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def test_bits_are_those_of_splitmix64_in_unsigned_arithmetic():
    index = np.arange(1000) * 7_919_000_017
    ours = sampling.bits(sampling.key_of("x", 3, 4), torch.from_numpy(index)).numpy().view(np.uint64)
    np.testing.assert_array_equal(ours, splitmix64(sampling.key_of("x", 3, 4), index))


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    drawn = sampling.normal(sampling.key_of("x", 0, 0), torch.arange(400_000)).double()
    moments = [drawn.mean(), drawn.var(), drawn.pow(3).mean(), drawn.pow(4).mean()]
    np.testing.assert_allclose(torch.stack(moments), [0, 1, 0, 3], atol=0.03)


def test_logistic_numbers_fall_below_t_with_probability_sigmoid_t():
    drawn = sampling.logistic(sampling.key_of("y", 0, 0), torch.arange(400_000))
    for t in (-3.0, -0.5, 0.0, 1.0, 4.0):
        assert abs(float((drawn < t).float().mean()) - float(torch.sigmoid(torch.tensor(t)))) < 0.004


def test_choices_are_uniform():
    counts = torch.bincount(sampling.choice(10, sampling.key_of("alpha", 0, 0), torch.arange(100_000)), minlength=10)
    assert len(counts) == 10
    np.testing.assert_allclose(counts / 100_000, 0.1, atol=0.005)


FAMILY = ProbabilisticLogisticRegression(dims=5, alphas=(1.0, 10.0))


def batch(seeds: Seeds, step: int, num_sequences: int = 4, num_pairs: int = 6, active_dims: int | None = None):
    return FAMILY.batch(seeds, step, num_sequences=num_sequences, num_pairs=num_pairs, active_dims=active_dims)


def test_a_smaller_batch_is_the_beginning_of_a_larger_one():
    small, large = batch(Seeds(), 9), batch(Seeds(), 9, num_sequences=7, num_pairs=11)
    assert torch.equal(small.x, large.x[:4, :6]) and torch.equal(small.y, large.y[:4, :6])
    assert torch.equal(small.w, large.w[:4])


def test_each_seed_and_the_step_change_what_they_name_and_nothing_else():
    first = batch(Seeds(task=0, data=1, noise=2), 5)
    other_task, other_data = batch(Seeds(task=9, data=1, noise=2), 5), batch(Seeds(task=0, data=9, noise=2), 5)
    other_noise = batch(Seeds(task=0, data=1, noise=9), 5)
    assert torch.equal(first.x, other_task.x) and not torch.equal(first.w, other_task.w)
    assert torch.equal(first.w, other_data.w) and not torch.equal(first.x, other_data.x)
    assert torch.equal(first.w, other_noise.w) and torch.equal(first.x, other_noise.x)
    later = batch(Seeds(task=0, data=1, noise=2), 6)
    assert not torch.equal(first.x, later.x) and not torch.equal(first.w, later.w)


def test_labels_follow_the_probabilities_that_w_gives():
    one = FAMILY.batch(Seeds(), 0, num_sequences=400, num_pairs=100)
    predicted, observed = one.probabilities, one.y
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (predicted >= low) & (predicted < low + 0.2)
        assert abs(float(observed[inside].mean() - predicted[inside].mean())) < 0.03


def test_inactive_dims_of_x_are_zero_and_w_keeps_all():
    some, whole = batch(Seeds(), 0, active_dims=2), batch(Seeds(), 0)
    assert torch.equal(some.x[..., :2], whole.x[..., :2]) and not some.x[..., 2:].any()
    assert torch.equal(some.w, whole.w)
