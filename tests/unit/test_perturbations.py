import numpy as np
import pytest

from jobs.perturbations import DISTRACTORS, LEVELS, PREFIXES, TEXT_KINDS, Pool, Trial, balanced_accuracy, draw, reworded

TEXTS = ["The parcel arrived two weeks late", "Wonderful service, thank you", "naïve café über"]
VECTOR_KINDS = [kind for kind in LEVELS if kind not in TEXT_KINDS]


def pool(num_classes: int = 3, num: int = 240) -> Pool:
    rng = np.random.default_rng(0)
    y = np.arange(num) % num_classes
    x = (rng.standard_normal((num, 5)) * [3, 1, 1, 1, 1]).astype(np.float32)
    half = num // 2
    return Pool(train=x[:half], train_labels=y[:half], test=x[half:], test_labels=y[half:])


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_the_first_level_changes_nothing_and_later_ones_do(kind: str):
    plain = draw(pool(), "typos", 0, 24, seed=1)
    first, last = (draw(pool(), kind, LEVELS[kind][at], 24, seed=1) for at in (0, -1))
    for name in ("examples", "labels", "queries", "weights"):
        np.testing.assert_array_equal(getattr(first, name), getattr(plain, name))
    assert any(not np.array_equal(getattr(last, n), getattr(plain, n)) for n in ("examples", "labels", "weights"))
    again = draw(pool(), kind, LEVELS[kind][-1], 24, seed=1)
    np.testing.assert_array_equal(again.examples, last.examples)
    assert not np.array_equal(draw(pool(), kind, LEVELS[kind][0], 24, seed=2).examples, first.examples)


def test_examples_are_balanced_and_two_a_class_at_least():
    assert np.bincount(draw(pool(), "typos", 0, 24, 0).labels).tolist() == [8, 8, 8]
    assert np.bincount(draw(pool(num_classes=10), "typos", 0, 4, 0).labels).tolist() == [2] * 10


def test_label_noise_changes_its_share_of_labels_and_spares_one_of_each_class():
    plain, noisy = (draw(pool(), "label noise", level, 40, 0) for level in (0, 0.3))
    np.testing.assert_array_equal(plain.examples, noisy.examples)
    assert (plain.labels != noisy.labels).sum() == 12
    lost = draw(pool(), "label noise", 0.9, 6, 0)
    right = lost.labels == draw(pool(), "label noise", 0, 6, 0).labels
    assert set(lost.labels[right]) == {0, 1, 2}


def test_embedding_noise_has_the_length_that_its_level_says():
    one = pool()
    noise = draw(one, "embedding noise", 2, 60, 0).queries - one.test
    spread = np.sqrt(((one.train - one.train.mean(0)) ** 2).sum(1).mean())
    assert np.sqrt((noise**2).sum(1).mean()) == pytest.approx(2 * spread, rel=0.1)


def test_covariate_shift_moves_examples_one_way_and_weighs_queries_the_other():
    one = pool()
    plain, shifted = (draw(one, "covariate shift", level, 30, 0) for level in (0, 2))
    moved = shifted.examples[:, 0].mean() - plain.examples[:, 0].mean()  # coordinate 0 is the widest by far
    weighted = np.average(one.test[:, 0], weights=shifted.weights) - one.test[:, 0].mean()
    assert abs(moved) > 1 and moved * weighted < 0
    assert np.bincount(shifted.labels).tolist() == [10, 10, 10]


def test_imbalance_reaches_its_ratio_and_keeps_the_number_of_examples():
    counts = np.bincount(draw(pool(2), "class imbalance", 7, 32, 0).labels)
    assert sorted(counts.tolist()) == [4, 28]
    assert {int(np.bincount(draw(pool(2), "class imbalance", 7, 32, seed).labels).argmax()) for seed in range(9)} == {
        0,
        1,
    }


def test_duplicates_repeat_a_quarter_of_the_examples_with_their_labels():
    plain, repeated = (draw(pool(), "duplicates", level, 24, 0) for level in (1, 4))
    assert len(repeated.labels) == 24 + 6 * 3
    label_of = {x.tobytes(): y for x, y in zip(plain.examples, plain.labels, strict=True)}
    assert all(label_of[x.tobytes()] == y for x, y in zip(repeated.examples, repeated.labels, strict=True))


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_rewording_is_nothing_at_level_zero_and_follows_the_seed(kind: str):
    assert reworded(TEXTS, kind, 0, seed=3) == TEXTS
    changed = reworded(TEXTS, kind, LEVELS[kind][-1], seed=3)
    assert all(a != b for a, b in zip(changed, TEXTS, strict=True))
    assert changed == reworded(TEXTS, kind, LEVELS[kind][-1], seed=3) != reworded(TEXTS, kind, LEVELS[kind][-1], seed=4)


def test_typos_keep_first_and_last_letters_words_and_what_is_no_word():
    text = "Reading 1234 long-winded sentences, always (carefully)!"
    (changed,) = reworded([text], "typos", 1.0, seed=0)
    assert "1234" in changed and len(changed.split()) == len(text.split())
    for before, after in zip(text.split(), changed.split(), strict=True):
        assert (before[0], before[-1]) == (after[0], after[-1])


def test_prefixes_stand_in_front_and_distractors_leave_the_text_whole():
    for text, changed in zip(TEXTS, reworded(TEXTS, "prefixes", 2, seed=0), strict=True):
        assert changed.endswith(text) and sum(phrase in changed for phrase in PREFIXES) == 2
    for text, changed in zip(TEXTS, reworded(TEXTS, "distractors", 4, seed=0), strict=True):
        assert text in changed and sum(sentence in changed for sentence in DISTRACTORS) == 4


def test_the_accuracy_is_the_mean_of_the_classes_weighted_recalls():
    nothing = np.zeros((5, 2), np.float32)
    trial = Trial(examples=nothing, labels=np.zeros(5, int), queries=nothing, truth=np.array([0, 0, 0, 0, 1]),
                  weights=np.array([1.0, 1.0, 1.0, 3.0, 9.0]))  # fmt: skip
    assert balanced_accuracy(np.array([0, 0, 0, 1, 1]), trial) == pytest.approx((0.5 + 1) / 2)
