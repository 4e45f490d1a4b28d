"""Part `same-task`: is the nearest neighbour of an embedding one of the same task?

What "the same task" is stands in `task_embeddings_tasks`. A task counts where it can be learnt at all: a
LogisticRegression on words or on the encoder's vectors must be `LEARNT` above the largest class on held-out texts; the
others are left out and named. Each regime is a leave-one-out search for the nearest neighbour, with AUC of same against
different pairs; intervals are bootstraps over families.

- `shared`: models alone, all asked the shipped probe texts. For every data set: TF-IDF with LogisticRegression and a
  head on the encoder's vectors, learnt from one half; naive Bayes on characters, and the first two with labels in
  another order and with other names, from the other half; a noisy oracle (a fifth of its answers are another label);
  SmolLM2 under three wordings, and its experts. The exact Gram matrix of the answers is the baseline.
- `cross`: the same, and a neighbour must be another kind of model, of another data set if the task has one.
- `all`: models and both halves of every data set, as labelled data.
  These three are of models that do their task at all: `LEARNT` above the largest class, as above; a model at chance
  holds no task to be known again. That rule came after a look at all families; `shared-models` and `all-models` are
  of every model.
- `label sets`: halves of data sets; candidates of the query's own data set or label set are left out of its family.
- `texts`: halves of data sets; candidates of the query's data set are left out of its family, other tasks on the same
  texts are not.
- `open-instructions`, `open-templates`: tasks of open answers, by halves of their pairs, and two templates of one data
  set.

Where the Gram matrix does not apply, the baseline is the cosine of the mean encoder vectors of the tasks' texts.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline

from benchmarks import report
from benchmarks.task_embeddings_answers import PlainScorer
from benchmarks.task_embeddings_tasks import DEV, EMBEDDED, FAMILY, LabelledTask, OpenTask, read_open, read_tasks
from benchmarks.task_embeddings_transfer import head
from benchmarks.task_embeddings_vectors import Bench, gram
from benchmarks.task_embeddings_wordings import THREE
from metasepia.embedding.answers import Answers

LEARNT = 0.1
NOISE = 0.2
NUM_ASKED = 150
"""Held-out texts that show whether a wording does its task."""
RESAMPLES = 10_000
RENAMED = "answer {}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that is embedded."""

    name: str
    family: str
    data: str
    """The data set whose question it answers."""
    texts_of: str
    form: str
    """half, or the kind of model."""
    answers: Answers
    texts: tuple[str, ...]
    """Of its data set, for the text centroid."""
    does: bool = True
    """A model: whether it does its task at all, LEARNT above the largest class on held-out texts."""

    @property
    def is_model(self) -> bool:
        return self.form != "half"


Allowed = Callable[[Entry, Entry], bool]


def halves_of(tasks: Sequence[LabelledTask]) -> list[Entry]:
    made = []
    for task in tasks:
        for half, examples in enumerate(task.halves):
            texts = tuple(text for text, _ in examples[:EMBEDDED])
            answers = Answers.of_labelled(texts, [label for _, label in examples[:EMBEDDED]])
            made.append(_entry(task, f"half {half}", "half", answers, texts))
    return made


def models_of(tasks: Sequence[LabelledTask], bench: Bench) -> list[Entry]:
    """Fitted classifiers and noisy oracles, asked the probe texts."""
    probes, made = bench.probes.texts, []
    vectors = bench.encoder.embed(probes)
    for task in tasks:
        (texts, labels), (other_texts, other_labels) = (
            ([text for text, _ in half], [label for _, label in half]) for half in task.halves
        )
        letters = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)), MultinomialNB(alpha=0.1))
        first, second = words_model().fit(texts, labels), words_model().fit(other_texts, other_labels)
        letters.fit(other_texts, other_labels)
        seen = head(bench.encoder.embed(texts), labels)
        seen_other = head(bench.encoder.embed(other_texts), other_labels)
        turned = dict(zip(second.classes_, np.roll(second.classes_, 1), strict=True))
        renamed = {label: RENAMED.format(place) for place, label in enumerate(reversed(seen_other.classes_))}
        shown = [text for text, _ in task.held_out]
        held = bench.encoder.embed(shown)
        does = {
            "words": does_it(task, first.predict(shown)),
            "letters": does_it(task, letters.predict(shown)),
            "head": does_it(task, np.asarray(seen.predict(held))),
            "words, turned": does_it(task, second.predict(shown)),
            "head, renamed": does_it(task, np.asarray(seen_other.predict(held))),
        }
        said = {
            "words": (first.classes_, first.predict_proba(probes)),
            "letters": (letters.classes_, letters.predict_proba(probes)),
            "head": (seen.classes_, seen.predict_proba(vectors)),
            "words, turned": ([turned[one] for one in second.classes_], second.predict_proba(probes)),
            "head, renamed": ([renamed[one] for one in seen_other.classes_], seen_other.predict_proba(vectors)),
            "oracle": _oracle(task, bench, first, seen),
        }
        for form, (classes, probabilities) in said.items():
            answers = Answers.of_probabilities(probes, [str(one) for one in classes], np.asarray(probabilities))
            made.append(_model(task, form, answers, does.get(form, True)))
    return made


def _oracle(task: LabelledTask, bench: Bench, words, seen) -> tuple[list[str], np.ndarray]:
    """One-hot answers of the rule, or of a head on both halves where there is none; a fifth of them another label."""
    probes, labels = bench.probes.texts, list(task.labels)
    if task.rule is not None:
        right = ["yes" if task.rule(text) else "no" for text in probes]
    else:
        whole = head(bench.encoder.embed([text for text, _ in task.train]), [label for _, label in task.train])
        right = [str(one) for one in whole.predict(bench.encoder.embed(probes))]
    rng = np.random.default_rng([7, *task.name.encode()])
    said = np.zeros((len(probes), len(labels)))
    for row, label in enumerate(right):
        place = labels.index(label)
        if rng.random() < NOISE:
            place = (place + 1 + int(rng.integers(len(labels) - 1))) % len(labels)
        said[row, place] = 1
    return labels, said


def prompts_of(tasks: Sequence[LabelledTask], bench: Bench, scorer: PlainScorer) -> list[Entry]:
    """SmolLM2 under three wordings of a task, asked the probe texts. A family's wordings count once."""
    made, first = [], {task.family: task for task in reversed(tasks)}
    for name, wordings in THREE.items():
        task = next((task for task in tasks if task.name == name), None) or first.get(FAMILY.get(name, name))
        if task is None:
            continue
        for place, wording in enumerate(wordings):
            logprobs = scorer.scores(wording, bench.probes.texts)["logprobs"]
            answers = Answers.of_probabilities(bench.probes.texts, sorted(wording.words), softmax(logprobs))
            held_out = [(text, label) for text, label in task.held_out[:NUM_ASKED] if label in wording.words]
            said = scorer.scores(wording, [text for text, _ in held_out])["logprobs"].argmax(1)
            words = sorted(wording.words)
            right = does_it(task, np.array([words[i] for i in said]), [label for _, label in held_out])
            made.append(_model(task, f"SmolLM2, wording {place}", answers, right))
    return made


def softmax(logprobs: np.ndarray) -> np.ndarray:
    shifted = np.exp(logprobs - logprobs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def does_it(task: LabelledTask, said: np.ndarray, truth: Sequence[str] | None = None) -> bool:
    right = np.array([label for _, label in task.held_out] if truth is None else truth)
    return bool(
        (np.asarray(said) == right).mean() >= np.unique(right, return_counts=True)[1].max() / len(right) + LEARNT
    )


def _model(task: LabelledTask, form: str, answers: Answers, does: bool) -> Entry:
    return _entry(task, form, form, answers, [text for text, _ in task.train], does)


def _entry(
    task: LabelledTask, name: str, form: str, answers: Answers, texts: Sequence[str], does: bool = True
) -> Entry:
    return Entry(
        name=f"{task.name}, {name}",
        family=task.family,
        data=task.name,
        texts_of=task.texts_of,
        form=form,
        answers=answers,
        texts=tuple(texts),
        does=does,
    )


def learnable(task: LabelledTask, bench: Bench) -> bool:
    (texts, labels), (shown, truth) = (zip(*part, strict=True) for part in (task.train, task.held_out))
    sides = (
        words_model().fit(texts, labels).predict(shown),
        head(bench.encoder.embed(texts), labels).predict(bench.encoder.embed(shown)),
    )
    right = max(float(np.mean(np.asarray(said) == np.array(truth))) for said in sides)
    return right >= np.unique(truth, return_counts=True)[1].max() / len(truth) + LEARNT


def words_model() -> Pipeline:
    return make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))


# -- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Of one regime and one similarity."""

    hits: np.ndarray
    """Of the queries that have a right answer among their candidates."""
    families: tuple[str, ...]
    """Of these queries."""
    auc: float
    wrong: tuple[tuple[str, str], ...]
    """Queries and what was nearest instead."""

    def mean(self, keep: Callable[[str], bool] = lambda _: True) -> float:
        """Mean over families of the share of hits."""
        each = self.by_family()
        kept = [value for family, value in each.items() if keep(family)]
        return float(np.mean(kept)) if kept else float("nan")

    def by_family(self) -> dict[str, float]:
        names = np.array(self.families)
        return {family: float(self.hits[names == family].mean()) for family in dict.fromkeys(self.families)}

    def interval(self) -> tuple[float, float]:
        each = np.array(list(self.by_family().values()))
        drawn = np.random.default_rng(0).integers(len(each), size=(RESAMPLES, len(each)))
        low, high = np.quantile(each[drawn].mean(1), [0.025, 0.975])
        return float(low), float(high)


def judge(
    similarity: np.ndarray, names: Sequence[str], families: Sequence[str], allowed: Callable[[int, int], bool]
) -> Judged:
    """`allowed(query, candidate)`; a query without a candidate of its family asks nothing."""
    hits, asked, wrong = [], [], []
    same, different = [], []
    for q in range(len(names)):
        candidates = np.array([c for c in range(len(names)) if c != q and allowed(q, c)])
        alike = np.array([families[c] == families[q] for c in candidates])
        if not alike.any() or alike.all():
            continue
        scores = similarity[q, candidates]
        nearest = candidates[int(scores.argmax())]
        hits.append(families[nearest] == families[q])
        asked.append(families[q])
        if not hits[-1]:
            wrong.append((names[q], names[nearest]))
        same += scores[alike].tolist()
        different += scores[~alike].tolist()
    return Judged(np.array(hits, float), tuple(asked), area(np.array(same), np.array(different)), tuple(wrong))


def area(above: np.ndarray, below: np.ndarray) -> float:
    """Probability that one of `above` is larger than one of `below`, ties half: the area under the ROC curve."""
    if not len(above) or not len(below):
        return float("nan")
    ordered = np.sort(below)
    less, upto = np.searchsorted(ordered, above, "left"), np.searchsorted(ordered, above, "right")
    return float((less + upto).mean() / (2 * len(ordered)))


def in_shared(a: Entry, b: Entry) -> bool:
    return a.is_model and b.is_model


def in_cross(a: Entry, b: Entry) -> bool:
    """Another kind of model: of the query's own family only where model and, if it has others, data set differ."""
    if not in_shared(a, b):
        return False
    return a.family != b.family or (kind_of(a) != kind_of(b) and (a.data != b.data or a.family not in SEVERAL))


def kind_of(entry: Entry) -> str:
    return entry.form.split(",")[0]


SEVERAL = {*FAMILY.values(), "number", "question", "first person", "length"}
"""Families with several data sets."""


def in_label_sets(a: Entry, b: Entry) -> bool:
    if a.is_model or b.is_model:
        return False
    return a.family != b.family or (a.data != b.data and a.answers.labels != b.answers.labels)


def in_texts(a: Entry, b: Entry) -> bool:
    if a.is_model or b.is_model:
        return False
    return a.family != b.family or a.texts_of != b.texts_of


REGIMES: Mapping[str, tuple[str, Allowed]] = {
    "shared": ("models that do their task, asked the same texts", lambda a, b: in_shared(a, b) and a.does and b.does),
    "cross": (
        "the same, of another kind and from other data",
        lambda a, b: in_cross(a, b) and a.does and b.does,
    ),
    "all": ("models that do their task and data halves together", lambda a, b: a.does and b.does),
    "all-models": ("models, also those that fail, and data halves", lambda a, b: True),
    "shared-models": ("models, also those that fail, asked the same texts", in_shared),
    "label-sets": ("data halves, other label set", in_label_sets),
    "texts": ("data halves, other texts", in_texts),
}


def same_task(bench: Bench, arguments: Namespace) -> list[report.Row]:
    """The part."""
    tasks = [task for task in read_tasks(arguments.data) if arguments.only is None or task.family in arguments.only]
    kept = [task for task in tasks if learnable(task, bench)]
    left = sorted({task.name for task in tasks} - {task.name for task in kept})
    print(f"  {len(kept)} data sets of {len({t.family for t in kept})} tasks; not learnt: {', '.join(left) or 'none'}")
    scorer = PlainScorer(arguments.home, arguments.runs)
    entries = [*halves_of(kept), *models_of(kept, bench)]
    entries += prompts_of(kept, bench, scorer) if arguments.prompts else []
    similarities = similarities_of(entries, bench)
    rows = []
    for regime, (what, allowed) in REGIMES.items():
        names, families = [one.name for one in entries], [one.family for one in entries]
        found = {
            side: judge(matrix, names, families, lambda q, c, allowed=allowed: allowed(entries[q], entries[c]))
            for side, matrix in similarities.items()
            if side not in (GRAM, CENTROID) or side == BASELINES.get(regime)
        }
        baseline = BASELINES.get(regime)
        failing = [one.form.split(",")[0] for one in entries if not one.does]
        counted = ", ".join(f"{failing.count(form)} {form}" for form in dict.fromkeys(failing))
        models = f"{sum(one.is_model for one in entries)} models of {len(kept)} data sets"
        note = f"{models}, that fail: {counted or 'none'}" + (
            f"; not learnt and left out: {', '.join(left)}" if left else ""
        )
        rows += rows_of(regime, what, found, baseline, note if regime == "shared" else "")
    for regime, name, by in (
        ("open-instructions", "instruction_induction", "task"),
        ("open-templates", "p3_t0_templates", "dataset"),
    ):
        path = arguments.data / f"{name}.parquet"
        if path.is_file() and arguments.only is None:
            rows += open_rows(regime, read_open(path, by=by), bench)
    return rows


GRAM, CENTROID = "Gram of the answers", "text centroid"
BASELINES: Mapping[str, str] = {
    "shared": GRAM,
    "shared-models": GRAM,
    "cross": GRAM,
    "label-sets": CENTROID,
    "texts": CENTROID,
}
"""A model's own texts are not known, and a data set has no answers to the probes: between them neither applies."""


def similarities_of(entries: Sequence[Entry], bench: Bench) -> dict[str, np.ndarray]:
    """By side, [entries, entries]; the Gram matrix is of the models alone and 0 elsewhere."""
    found: dict[str, np.ndarray] = {}
    models = [place for place, one in enumerate(entries) if one.is_model]
    exact = np.zeros((len(entries), len(entries)))
    exact[np.ix_(models, models)] = gram([entries[place].answers for place in models])
    centroids = bench.centroids([one.texts for one in entries])
    for name in bench.methods:
        vectors = bench.embed(name, [one.answers for one in entries])
        found[name] = (vectors @ vectors.T).astype(np.float64)
    return {**found, GRAM: exact, CENTROID: centroids @ centroids.T}


def open_rows(regime: str, tasks: Sequence[OpenTask], bench: Bench) -> list[report.Row]:
    answers = [Answers.of_replies(*zip(*one.pairs, strict=True)) for one in tasks]
    names, families = [one.name for one in tasks], [one.family for one in tasks]
    inputs = bench.centroids([one.texts for one in answers])
    replies = bench.centroids([one.replies for one in answers])
    sides = {CENTROID: inputs @ inputs.T, "reply centroid": replies @ replies.T}
    for name in bench.methods:
        vectors = bench.embed(name, answers)
        sides[name] = (vectors @ vectors.T).astype(np.float64)
    found = {side: judge(matrix, names, families, lambda q, c: True) for side, matrix in sides.items()}
    what = {"open-instructions": "open answers, halves of a task", "open-templates": "open answers, two templates"}
    return rows_of(regime, what[regime], found, CENTROID, f"{len(tasks)} sets of pairs")


def rows_of(regime: str, what: str, found: Mapping[str, Judged], baseline: str | None, note: str) -> list[report.Row]:
    """A row a side of ours against the baseline; other baselines stand alone, in detail."""
    against, rows = None if baseline is None else found[baseline], []
    for side, one in found.items():
        low, high = one.interval()
        each = one.by_family()
        least = sorted(each, key=each.__getitem__)[:3]
        said = [
            f"95 % {low:.3f} to {high:.3f} over {len(each)} tasks, {len(one.hits)} queries",
            f"AUC {one.auc:.3f}" + (f" ({baseline} {against.auc:.3f})" if against and one is not against else ""),
            f"tasks not for choosing settings {one.mean(lambda f: f not in DEV):.3f}",
            f"least: {', '.join(f'{name} {each[name]:.2f}' for name in least)}",
            note,
        ]
        made = report.rate(
            f"same-{regime}-{side.replace(' ', '-').lower()}",
            f"nearest neighbour is the same task, {what}: {side}",
            one.mean(),
            against.mean() if against and one is not against else None,
            "of queries",
            "; ".join(part for part in said if part),
            detail=regime in ("all-models", "shared-models")
            or (side in (GRAM, CENTROID, "reply centroid") and side != baseline),
            extra={
                "baseline": baseline,
                "auc": one.auc,
                "interval": [low, high],
                "by_family": each,
                "wrong": [list(pair) for pair in one.wrong[:40]],
            },
        )
        rows.append(made)
    return rows
