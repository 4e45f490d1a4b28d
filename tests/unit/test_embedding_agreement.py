import dataclasses

import numpy as np
import pytest

from metasepia.embedding.agreement import AgreementMethod, AgreementSettings, Sketch, aligned, u_centred
from metasepia.embedding.answers import Answers
from metasepia.embedding.heads import Features, Ridge
from metasepia.embedding.methods import NamedTask, embed_tasks, method, within_window
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import METHODS, cosine
from metasepia.errors import DifferentSpaces, InvalidRequest, InvalidSettings, WindowExceeded

WIDTH = 24
MOODS, THINGS = ["good", "bad", "fine"], ["film", "song", "book", "dish"]


class Words:
    """An encoder as methods use it: the sum of a direction for each word, at unit norm."""

    digest, width, window = "e" * 64, WIDTH, 12

    def tokenize(self, texts):
        for i, text in enumerate(texts):
            if len(text.split()) > self.window:
                raise WindowExceeded(f"texts[{i}]", len(text.split()), self.window)
        return [list(range(len(text.split()))) for text in texts]

    def embed(self, texts) -> np.ndarray:
        self.tokenize(texts)
        vectors = np.stack([sum((_word(word) for word in text.split()), np.ones(WIDTH)) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _word(word: str) -> np.ndarray:
    return np.random.default_rng([ord(c) for c in word]).standard_normal(WIDTH)


def sentences(data_seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(data_seed)
    parts = (MOODS, THINGS, ["Ann", "Bob", "Eve", "Dan", "Flo"], list("pqrstuvwxyz"))
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(str(rng.choice(part)) for part in parts) + f" {rng.integers(1000)}"] = None
    return list(made)


PROBES = ProbeTexts.of_texts(sentences(0, 120))


def mood(text: str) -> str:
    return "happy" if text.startswith("good") else "sad"


def thing(text: str) -> str:
    return text.split()[1]


def asked(of, texts=PROBES.texts) -> Answers:
    return Answers.of_labelled(list(texts), [of(text) for text in texts])


def soft(data_seed: int, labels: int = 3) -> Answers:
    p = np.random.default_rng(data_seed).dirichlet(np.ones(labels), len(PROBES))
    return Answers.of_probabilities(PROBES.texts, [f"l{i}" for i in range(labels)], p)


def agreement(**settings) -> AgreementMethod:
    return AgreementMethod(Words(), PROBES, AgreementSettings(**settings))


def test_renamed_and_permuted_labels_give_the_same_bits():
    one = soft(0)
    renamed = dataclasses.replace(one, labels=("x", "y", "z"))
    flipped = dataclasses.replace(one, probabilities=one.probabilities[:, [2, 0, 1]])
    vectors = agreement().embed([one, renamed, flipped])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    np.testing.assert_allclose(vectors[0], vectors[2], atol=2e-6)  # sums in another order


def test_the_order_of_texts_does_not_matter():
    order = np.random.default_rng(1).permutation(len(PROBES)).tolist()
    vectors = agreement().embed([soft(0), soft(0).only(order)])
    np.testing.assert_array_equal(*vectors)


def test_a_task_embeds_the_same_alone_and_among_others():
    alone = agreement().embed([soft(1)])[0]
    among = agreement().embed([soft(0), asked(mood, sentences(1, 40)), soft(1)])[2]
    np.testing.assert_array_equal(alone, among)


def test_with_a_coordinate_for_each_pair_cosines_are_exact_alignments():
    exact = agreement(dims=8000)
    tasks = [soft(0), soft(1, 5), asked(mood), asked(thing)]
    cosines = exact.embed(tasks) @ exact.embed(tasks).T
    beyond = Words().embed(PROBES.texts)
    for i, a in enumerate(tasks):
        for j, b in enumerate(tasks):
            assert cosines[i, j] == pytest.approx(aligned(a.probabilities, b.probabilities, beyond), abs=1e-5)


def test_alignment_is_that_of_the_definition():
    a, b = soft(0).probabilities.astype(float), asked(thing).probabilities.astype(float)
    n = len(a)

    def centred(p):  # Szekely and Rizzo (2014), entry by entry
        k = p @ p.T
        np.fill_diagonal(k, 0)
        out = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    out[i, j] = k[i, j] - k[i].sum() / (n - 2) - k[j].sum() / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        return out

    x, y = centred(a), centred(b)
    assert aligned(a, b) == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-12)


def test_a_sketch_keeps_dot_products_in_expectation_and_within_its_error():
    a, b = (u_centred(one.probabilities) for one in (asked(mood), asked(lambda text: mood(text) + thing(text))))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    dims = 512
    errors = []
    for seed in range(60):
        sketch = Sketch.of(len(PROBES), dims, seed)
        # Half of a symmetric matrix is dealt out.
        errors.append(2 * sketch.of_matrix(a) @ sketch.of_matrix(b) - (a * b).sum())
    assert abs(np.mean(errors)) < 3 * np.std(errors) / np.sqrt(60)
    assert np.std(errors) < 1.3 * np.sqrt((1 + (a * b).sum() ** 2) / dims)


def test_unrelated_answers_have_cosine_zero_in_expectation():
    method = agreement(dims=8000)
    vectors = method.embed([soft(data_seed, 6) for data_seed in range(40)])
    cosines = (vectors @ vectors.T)[np.triu_indices(40, 1)]
    # Uncorrected it would be about labels / probes, 0.05 here.
    assert abs(cosines.mean()) < 0.004


def test_noise_of_sampled_answers_moves_no_expected_cosine():
    truth = soft(0, 2)
    drawn = [
        Answers.of_probabilities(
            PROBES.texts, truth.labels, np.random.default_rng(s).multinomial(1, truth.probabilities.astype(float)) * 1.0
        )
        for s in range(200)
    ]
    exact = u_centred(truth.probabilities)
    mean = np.mean([u_centred(one.probabilities) for one in drawn], 0)
    error = (mean * exact).sum() / (exact**2).sum() - 1
    assert abs(error) < 0.1
    biased = np.mean([one.probabilities.astype(float) @ one.probabilities.astype(float).T for one in drawn], 0)
    assert np.diag(biased).mean() > 1.2 * np.diag(truth.probabilities @ truth.probabilities.T).mean()


def test_a_data_set_is_nearest_to_the_model_that_does_its_task():
    method = agreement()
    sets = [asked(mood, sentences(1, 200)), asked(thing, sentences(2, 200))]
    models = [asked(mood), asked(thing), soft(0)]
    cosines = method.embed(sets) @ method.embed(models).T
    np.testing.assert_array_equal(cosines.argmax(1), [0, 1])


@pytest.mark.parametrize("imitate", ["needed", "always", "half"])
def test_open_replies_that_say_the_same_lie_near_the_labels(imitate):
    method = agreement(imitate=imitate, replies=0.0)
    labelled = asked(thing)
    spoken = Answers.of_replies(PROBES.texts, [f"it is a {thing(text)}" for text in PROBES.texts])
    other = Answers.of_replies(PROBES.texts, [f"it is {mood(text)}" for text in PROBES.texts])
    vectors = method.embed([labelled, spoken, other])
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > abs(vectors[0] @ vectors[2])


def test_open_answers_are_also_told_by_what_their_mean_reply_is():
    plain, told = agreement(replies=0.0), agreement(replies=0.5)
    tasks = [
        Answers.of_replies(PROBES.texts, [f"{word} {thing(text)}" for text in PROBES.texts]) for word in ("ja", "no")
    ]
    apart = [float(v[0] @ v[1]) for v in (plain.embed(tasks), told.embed(tasks))]
    assert apart[0] > 0.8 and apart[1] < apart[0] - 0.1


def test_the_head_is_fitted_where_a_task_answered_other_texts():
    method = agreement()
    answers = method.answers_to_probes(asked(mood, sentences(3, 300)))
    right = answers.argmax(1) == asked(mood).probabilities.argmax(1)
    assert right.mean() > 0.95
    np.testing.assert_allclose(answers.sum(1), 1)
    own = method.answers_to_probes(soft(0))
    np.testing.assert_allclose(own, soft(0).probabilities)


def test_a_text_answered_several_times_counts_by_its_mean():
    twice = Answers.of_labelled([*PROBES.texts] * 2, [mood(t) for t in PROBES.texts] + ["sad"] * len(PROBES))
    mean = agreement().answers_to_probes(twice)
    once = asked(mood).probabilities
    np.testing.assert_allclose(mean, (once + np.eye(2)[1]) / 2)


def test_left_out_scores_are_those_of_heads_fitted_without_the_text():
    vectors = Words().embed(sentences(0, 30))
    targets = asked(thing, sentences(0, 30)).probabilities.astype(float)
    head = Ridge.fit(Features.of(vectors), targets)
    for place in (0, 7, 29):
        rest = np.delete(vectors, place, 0).astype(float), np.delete(targets, place, 0)
        mean, centre = rest[0].mean(0), rest[1].mean(0)
        x = rest[0] - mean
        weights = np.linalg.solve(x.T @ x + head.penalty * np.eye(WIDTH), x.T @ (rest[1] - centre))
        expected = (vectors[place] - mean) @ weights + centre - head.intercept
        np.testing.assert_allclose(head.left_out[place], expected, atol=1e-6)


def test_heads_are_the_same_by_either_side_of_the_decomposition():
    vectors = Words().embed(sentences(0, WIDTH + 1))
    targets = asked(thing, sentences(0, WIDTH + 1)).probabilities.astype(float)
    tall = Features.of(vectors)
    u, s, vh = np.linalg.svd(vectors - vectors.astype(float).mean(0), full_matrices=False)
    wide = Features(vectors.astype(float).mean(0), u, s, vh)
    query = Words().embed(sentences(5, 9))
    np.testing.assert_allclose(
        Ridge.fit(tall, targets).scores(query), Ridge.fit(wide, targets).scores(query), atol=1e-6
    )


def test_probabilities_of_heads_are_calibrated_on_other_texts():
    rng = np.random.default_rng(0)
    texts = sentences(4, 900)

    def noisy(text):
        return mood(text) if rng.random() < 0.8 else {"happy": "sad", "sad": "happy"}[mood(text)]

    labels = [noisy(text) for text in texts]
    vectors, targets = Words().embed(texts), np.array([[one == "happy", one == "sad"] for one in labels], float)
    head = Ridge.fit(Features.of(vectors[:300]), targets[:300])
    p = head.probabilities(vectors[300:], targets[:300])
    sure = p.max(1) > 0.7
    right = p.argmax(1) == targets[300:].argmax(1)
    assert abs(p.max(1)[sure].mean() - right[sure].mean()) < 0.06


def test_embedding_twice_gives_the_same_bits():
    tasks = [
        soft(0),
        asked(thing, sentences(1, 50)),
        Answers.of_replies(sentences(2, 50), [thing(text) for text in sentences(2, 50)]),
    ]
    np.testing.assert_array_equal(agreement().embed(tasks, seed=1), agreement().embed(tasks, seed=2))


def test_sampled_answers_carry_their_noise_and_exact_ones_have_none():
    def sampled(draws: int, p: np.ndarray) -> NamedTask:
        drawn = np.stack([np.random.default_rng([draws, i]).multinomial(draws, row) for i, row in enumerate(p)])
        return f"{draws} draws", "model", Answers.of_counts(PROBES.texts, ["h", "s"], drawn * 1.0), {}

    clear = asked(mood).probabilities.astype(float) * 0.8 + 0.1
    named = [sampled(2, np.full((120, 2), 0.5)), sampled(4, clear), sampled(400, clear)]
    found = embed_tasks(agreement(), [*named, ("exact", "data_set", asked(mood), {"path": "x"})])
    guesses, few, many, exact = (one.noise for one in found)
    assert exact is None and guesses is not None and few is not None and many is not None
    assert guesses > 0.5 and few > 5 * many > 0
    assert found[3].source["path"] == "x" and found[3].source["answers"] == asked(mood).digest


def test_a_constant_answerer_is_refused_or_told_and_the_others_are_embedded():
    constant = Answers.of_replies(PROBES.texts, ["As a language model I cannot say."] * 120)
    told: list[tuple[str, str]] = []
    named: list[NamedTask] = [("shy", "prompt", constant, {}), ("moody", "prompt", asked(mood), {})]
    with pytest.raises(InvalidRequest, match="shy: it answers every text alike"):
        embed_tasks(agreement(), named)
    found = embed_tasks(agreement(), named, refused=lambda name, why: told.append((name, why)))
    assert [one.name for one in found] == ["moody"] and told[0][0] == "shy"
    with pytest.raises(InvalidRequest, match="tells no two texts apart"):
        agreement().embed([constant])


def test_answers_that_are_text_similarity_itself_have_nothing_to_embed():
    echo = Answers.of_replies(PROBES.texts, PROBES.texts)
    with pytest.raises(InvalidRequest, match="nothing beyond"):
        agreement(replies=0.0).embed([echo])


def test_texts_beyond_the_window_are_refused_or_left_out_and_counted_never_cut():
    long = " ".join(["word"] * 13)
    answers = Answers.of_labelled([*sentences(0, 20), long], [*"ab" * 10, "a"])
    with pytest.raises(WindowExceeded):
        within_window(Words(), answers)  # pyright: ignore[reportArgumentType]
    kept, left = within_window(Words(), answers, "leave_out")  # pyright: ignore[reportArgumentType]
    assert left == 1 and kept.digest == Answers.of_labelled(answers.texts[:20], [*"ab" * 10]).digest
    mostly = Answers.of_labelled([long + f" {i}" for i in range(5)] + ["short"], [*"abaab", "b"])
    with pytest.raises(InvalidRequest, match="5 of 6 texts"):
        within_window(Words(), mostly, "leave_out")  # pyright: ignore[reportArgumentType]


def test_a_reply_beyond_the_window_names_the_reply():
    replies = [*PROBES.texts[:-1], " ".join(["blah"] * 13)]
    with pytest.raises(WindowExceeded, match=r"replies\[119\]: 13 tokens"):
        agreement().embed([Answers.of_replies(PROBES.texts, replies)])


def test_every_setting_is_part_of_the_space():
    spaces = {
        agreement(**settings).space.digest
        for settings in (
            {},
            {"dims": 512},
            {"imitate": "half"},
            {"partial": False},
            {"replies": 0.2},
            {"sketch_seed": 1},
        )
    }
    assert len(spaces) == 6
    fewer = AgreementMethod(Words(), PROBES.first(60))
    ours, theirs = (
        embed_tasks(
            one, [("a", "model", Answers.of_labelled(one.probes.texts, ["x", "y"] * (len(one.probes) // 2)), {})]
        )[0]
        for one in (agreement(), fewer)
    )
    with pytest.raises(DifferentSpaces, match="differ in probes"):
        cosine(ours, theirs)


@pytest.mark.parametrize("wrong", [{"dims": 3}, {"replies": 1.0}, {"partial": True, "nonsense": 1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidSettings):
        method("agreement", Words(), PROBES, **wrong)  # pyright: ignore[reportArgumentType]


def test_an_unknown_method_lists_the_known():
    with pytest.raises(InvalidSettings, match=", ".join(METHODS)):
        method("voodoo", Words(), PROBES)  # pyright: ignore[reportArgumentType]
