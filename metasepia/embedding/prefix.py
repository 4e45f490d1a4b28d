"""Task embeddings by tuned prefixes: TuPaTE (EMNLP 2022) inside FUTE (arXiv:2402.14522).

A prefix of keys and values in the layers of a frozen surrogate is tuned, from initial values that all tasks share, to
answer as the task does. The embedding is what the tuning changed. Where we differ from the reference:

- The head is fitted to the task's answers in closed form (ridge) and stands still, instead of beginning at random. A
  renamed, permuted or flipped label then turns head and answers alike, so the prefix, and the embedding, do not see it;
  label sets of any size, and open answers, share one space. The prefix learns what the head leaves.
- A task that did not answer the probe texts (a data set, say) first does so through a head on the frozen vectors.
- One step along the normalised gradient instead of many epochs: on our development tasks the first step finds the
  direction, and three or four steps place tasks no better. `epochs` and `optimiser` give the long way.

`PAPER` has the reference's values.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasepia.embedding.answers import Answers
from metasepia.embedding.heads import Features, Ridge
from metasepia.embedding.prefix_training import BATCH_TOKENS, KeptTexts, Loss, Schedule, Tuned, chunks, tune
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import Space
from metasepia.embedding.surrogate import Surrogate
from metasepia.encoders import TextEncoder
from metasepia.errors import InvalidRequest, InvalidSettings
from metasepia.kinds import check_kinds

VERSION = 1
"""Of the arithmetic; part of the space."""
KEPT_TOKENS = {"cpu": 80_000, "cuda": 1_000_000}
"""Tokens of distinct texts whose states are held at a time (6 KiB each for MiniLM); tasks beyond are tuned after."""
CONSTANT = "it answers every text alike, so it tells no two texts apart"
LEAST_SHARE = 1e-3
"""A label rarer than this in the answers counts as this rare, where it scales a head."""


@dataclass(frozen=True, kw_only=True)
class PrefixSettings:
    """How prefixes are tuned and read; part of the space."""

    prefix_len: int = 16
    """1 to 256 positions, of keys and of values, in each head."""
    layers: int | None = None
    """The last so many layers have a prefix; None: all. The layers below are computed once a text."""
    texts: int = 256
    """At most so many texts a task: the first of the probe texts, or of its own by seed."""
    max_tokens: int = 128
    """Of a text, special tokens included; the surrogate reads its beginning."""
    epochs: int = 1
    batch_size: int = 256
    """Texts of a task in a step; more than it has: all."""
    optimiser: Literal["descent", "adamw"] = "descent"
    """descent: along the gradient, `learning_rate` far whatever its length. adamw: arXiv:1711.05101."""
    learning_rate: float = 1.0
    weight_decay: float = 0.0
    """adamw's; never of biases."""
    warm_up: float = 0.05
    """Share of the steps in which the rate rises; from there it falls linearly to 0."""
    clip: float = 1.0
    """adamw's: the gradient's largest norm."""
    dropout: float = 0.0
    """Of the prefix's values, one draw a step (the reference: one a row)."""
    patience: int = 4
    """A task ends after so many epochs without a smaller training loss (the reference: on held-out texts)."""
    loss: Loss = "bce"
    """Of soft labels: bce, the reference's, with a mean over the labels; ce; mse. Open answers always have mse."""
    head: Literal["fitted", "random"] = "fitted"
    """fitted: see above. random: the same normal values for all tasks, labels in the order of their class means along
    a fixed direction."""
    head_trains: bool = False
    components: int = 48
    """The fitted head reads so many leading principal components of the texts' vectors, or all there are."""
    ridge: float = 0.04
    """Of the fitted head, in units of the variance of those components. Smaller: the head learns the answers by heart,
    and noise is left for the prefix; larger: it is the class means."""
    imitate: Literal["needed", "always", "never"] = "needed"
    """needed: a task that did not answer the probe texts is imitated on them. always: every task is. never: such a task
    is tuned on its own texts."""
    centre: Literal["none", "echo"] = "none"
    """echo: what all tasks share, to follow the text, is taken away: the embedding of the task whose open answers are
    its texts is projected out. It depends on the texts alone, not on the other tasks."""
    weighed: bool = True
    """Sampled answers count less the less certain they are."""
    reduce: Literal["layers", "positions"] = "layers"
    """The mean over the layers (FUTE), or over the prefix's positions (TuPaTE)."""
    initial_seed: int = 0
    """Of the initial prefix, and of a random head."""

    def __post_init__(self) -> None:
        check_kinds(self)
        bounds = {"prefix_len": 256, "texts": 20_000, "max_tokens": 8192, "epochs": 10_000, "batch_size": 20_000}
        bounds["components"] = 16_384
        for name, most in {**bounds, "patience": 10_000}.items():
            least = {"texts": 16, "max_tokens": 3}.get(name, 1)
            if not least <= getattr(self, name) <= most:
                raise InvalidSettings(name, getattr(self, name), f"between {least} and {most}")
        for name in ("learning_rate", "clip", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidSettings(name, getattr(self, name), "positive and finite")
        for name in ("weight_decay", "warm_up", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidSettings(name, getattr(self, name), "at least 0 and below 1")
        if self.layers is not None and self.layers < 1:
            raise InvalidSettings("layers", self.layers, "1 or more, or None for all")
        if self.initial_seed < 0:
            raise InvalidSettings("initial_seed", self.initial_seed, "0 or more")


PAPER: Mapping[str, Any] = {
    **{"texts": 1000, "epochs": 120, "batch_size": 32, "optimiser": "adamw", "learning_rate": 1e-2},
    **{"weight_decay": 0.01, "dropout": 0.15, "head": "random", "head_trains": True, "imitate": "never"},
    **{"centre": "none", "weighed": False},
}
"""The reference's values for data sets, `PrefixSettings(**PAPER)`. It tunes models with other ones (one epoch at 1e-3,
batches of 128); here one space has one set of values."""


class PrefixMethod:
    """Tuned prefixes in one space. Not thread-safe: its encoder is not.

    On a CPU the same tasks in the same call give the same bits; beside other tasks a vector differs by rounding.
    """

    def __init__(self, encoder: TextEncoder, probes: ProbeTexts, settings: PrefixSettings | None = None) -> None:
        self.settings = settings or PrefixSettings()
        self.surrogate = Surrogate(encoder)
        self.probes = probes
        num_layers = self.surrogate.num_layers if self.settings.layers is None else self.settings.layers
        if num_layers > self.surrogate.num_layers:
            raise InvalidSettings("layers", num_layers, f"at most the surrogate's {self.surrogate.num_layers}")
        self._first_layer = self.surrogate.num_layers - num_layers
        self.space = Space(
            surrogate=encoder.digest,
            method="prefix",
            settings={**dataclasses.asdict(self.settings), "version": VERSION},
            probes=probes.digest,
        )
        self._initial = self._drawn(num_layers)
        self._asked = probes.texts[: self.settings.texts]
        self._asked_vectors: np.ndarray | None = None

    @property
    def dims(self) -> int:
        layers, two, heads, prefix_len, head_dim = self._initial.shape
        return two * heads * head_dim * (prefix_len if self.settings.reduce == "layers" else layers)

    def embed(
        self, tasks: Sequence[Answers], *, seed: int = 0, told: Callable[[int, int], None] | None = None
    ) -> Float[np.ndarray, "tasks dims"]:
        """Unit-norm float32 vectors. `seed` draws the order of the texts, and which where there are too many.

        Raises InvalidRequest for a task that answers every text alike, or whose answers its texts do not explain at
        all, and WindowExceeded for a text or reply beyond the encoder's window.
        """
        for place, task in enumerate(tasks):
            if task.is_constant:
                raise InvalidRequest(
                    _named(place, tasks), "it answers every text alike, so it tells no two texts apart"
                )
        asked = [self._asks(task, seed) for task in tasks]
        vectors, done = np.empty((len(tasks), self.dims), np.float32), 0

        def heard(count: int) -> None:
            nonlocal done
            done += count
            if told is not None:
                told(done, len(tasks))

        for group in self._groups([texts for texts, _, _ in asked]):
            found = self._embed_group([asked[i] for i in group], [tasks[i].is_open for i in group], seed, heard)
            for place, vector in zip(group, found, strict=True):
                norm = float(np.linalg.norm(vector))
                if not np.isfinite(norm):
                    raise InvalidRequest(_named(place, tasks), "its prefix grew beyond all bounds; lower learning_rate")
                if norm <= 1e-12:
                    raise InvalidRequest(_named(place, tasks), "its texts do not explain its answers: no prefix helps")
                vectors[place] = vector / norm
        return vectors

    def _embed_group(
        self, asked: "Sequence[_Asked]", are_open: Sequence[bool], seed: int, told: Callable[[int], None]
    ) -> Float[np.ndarray, "tasks dims"]:
        """Not yet of unit norm."""
        distinct = list(dict.fromkeys(text for texts, _, _ in asked for text in texts))
        places = {text: i for i, text in enumerate(distinct)}
        kept = KeptTexts(self.surrogate, self.surrogate.tokenize(distinct, self.settings.max_tokens), self._first_layer)
        vectors = self._at_the_start(kept)
        rows = [np.array([places[text] for text in texts], np.int64) for texts, _, _ in asked]
        tuned = [
            self._begun(vectors, of_task, targets, weights, "mse" if is_open else self.settings.loss)
            for of_task, (_, targets, weights), is_open in zip(rows, asked, are_open, strict=True)
        ]
        echoes: dict[bytes, int] = {}
        if self.settings.centre == "echo":
            for of_task in rows:
                if of_task.tobytes() not in echoes:
                    echoes[of_task.tobytes()] = len(tuned)
                    tuned.append(self._echo(vectors, of_task))
        changes = tune(kept, tuned, self._initial, self._schedule, seed=seed) - self._initial
        reduced = changes.mean(dim=1 if self.settings.reduce == "layers" else 4).flatten(1).double().cpu().numpy()
        told(len(asked))
        if not echoes:
            return reduced
        shared = reduced[[echoes[of_task.tobytes()] for of_task in rows]]
        shared /= np.linalg.norm(shared, axis=1, keepdims=True)
        own = reduced[: len(asked)]
        return own - (own * shared).sum(1, keepdims=True) * shared

    @property
    def _schedule(self) -> Schedule:
        return Schedule(**{field.name: getattr(self.settings, field.name) for field in dataclasses.fields(Schedule)})

    def _drawn(self, num_layers: int) -> Float[Tensor, "layers 2 heads prefix head_dim"]:
        """Xavier-uniform, as the reference draws it: torch counts the fans of a [2, heads, prefix, head_dim] tensor."""
        surrogate, length = self.surrogate, self.settings.prefix_len
        fan = (2 + surrogate.heads) * length * surrogate.head_dim
        bound = (6 / fan) ** 0.5
        shape = (num_layers, 2, surrogate.heads, length, surrogate.head_dim)
        drawn = np.random.default_rng([self.settings.initial_seed, 0]).uniform(-bound, bound, shape)
        return torch.from_numpy(drawn.astype(np.float32)).to(surrogate.device)

    def _asks(self, task: Answers, seed: int) -> "_Asked":
        """Texts, targets and weights that the prefix is tuned on.

        In an order that the task's own does not change. Weights have mean 1.
        """
        places: dict[str, int] = {text: i for i, text in enumerate(task.texts)}
        answered = all(text in places for text in self._asked)
        if self.settings.imitate == "always" or (not answered and self.settings.imitate == "needed"):
            return self._asked, self._imitated(task), np.ones(len(self._asked), np.float32)
        if answered:
            rows = [places[text] for text in self._asked]
        else:
            rows = _in_canonical_order(task)
            if len(rows) > self.settings.texts:
                chosen = np.random.default_rng([seed, 3]).permutation(len(rows))[: self.settings.texts]
                rows = [rows[i] for i in sorted(chosen.tolist())]
        texts = tuple(task.texts[i] for i in rows)
        if task.is_open:
            replies = [task.replies[i] for i in rows]
            return texts, self._vectors_of(replies), np.ones(len(rows), np.float32)
        return texts, task.probabilities[rows], self._weights(task, rows)

    def _imitated(self, task: Answers) -> Float[np.ndarray, "probes outputs"]:
        """What a head on the frozen vectors, fitted to the task's own texts, answers to the probe texts."""
        targets = self._vectors_of(task.replies) if task.is_open else task.probabilities
        given = targets[:, np.ptp(targets, axis=0) > 0].astype(np.float64)
        head = Ridge.fit(Features.of(self._vectors_of(task.texts)), given)
        if self._asked_vectors is None:
            self._asked_vectors = self._vectors_of(self._asked)
        probes = self._asked_vectors
        answers = head.scores(probes) if task.is_open else head.probabilities(probes, given)
        return answers.astype(np.float32)

    def _vectors_of(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors = self.surrogate.encoder.embed(list(distinct))
        return vectors[[distinct[text] for text in texts]]

    def _weights(self, task: Answers, rows: Sequence[int]) -> Float[np.ndarray, " rows"]:
        """In inverse proportion to the answers' own variance over texts and that of sampling together."""
        if task.standard_error is None or not self.settings.weighed:
            return np.ones(len(rows), np.float32)
        signal = float(task.probabilities[rows].astype(np.float64).var(axis=0).sum())
        weights = 1 / (signal + (task.standard_error[rows].astype(np.float64) ** 2).sum(axis=1) + 1e-12)
        return (weights / weights.mean()).astype(np.float32)

    def _groups(self, texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
        """Tasks that are tuned together, in order: those whose distinct texts fit in KEPT_TOKENS; one at least."""
        bound, groups = KEPT_TOKENS[self.surrogate.device], []
        seen: set[str] = set()
        tokens, group = 0, []
        for place, of_task in enumerate(texts):
            new = set(of_task) - seen
            added = sum(len(ids) for ids in self.surrogate.tokenize(sorted(new), self.settings.max_tokens))
            if group and tokens + added > bound:
                groups.append(group)
                seen, tokens, group = set(), 0, []
                new = set(of_task)
                added = sum(len(ids) for ids in self.surrogate.tokenize(sorted(new), self.settings.max_tokens))
            seen |= new
            tokens += added
            group.append(place)
        return [*groups, group] if group else groups

    @torch.no_grad()
    def _at_the_start(self, kept: KeptTexts) -> Float[Tensor, "texts width"]:
        """The texts' vectors under the initial prefix: what the heads are fitted to, once for all tasks."""
        count = len(kept.lengths)
        vectors = torch.empty(count, self.surrogate.width, device=self.surrogate.device)
        for some in chunks(kept.lengths, np.zeros(count, np.int64), BATCH_TOKENS[self.surrogate.device]):
            vectors[torch.from_numpy(some)] = kept.vectors(some, self._initial[None], [len(some)])
        return vectors

    def _begun(
        self,
        vectors: Float[Tensor, "texts width"],
        rows: Int[np.ndarray, " rows"],
        targets: Float[np.ndarray, "rows outputs"],
        weights: Float[np.ndarray, " rows"],
        loss: Loss,
    ) -> Tuned:
        device = vectors.device
        answers, counted = torch.from_numpy(targets).to(device), torch.from_numpy(weights).to(device)
        own = vectors[torch.from_numpy(rows)]
        if self.settings.head == "fitted" or loss == "mse":
            weight, bias = fitted_head(own, answers, counted, loss, self.settings)
        else:
            answers = answers[:, _by_class_mean(own, answers)]
            drawn = np.random.default_rng([self.settings.initial_seed, 1]).normal(
                0, 0.02, (targets.shape[1], len(own[0]))
            )
            weight, bias = torch.from_numpy(drawn.T.astype(np.float32)).to(device), torch.zeros(targets.shape[1])
        return Tuned(
            texts=rows,
            targets=answers,
            weights=counted,
            loss=loss,
            weight=weight,
            bias=bias.to(device),
            head_trains=self.settings.head_trains,
        )

    def _echo(self, vectors: Float[Tensor, "texts width"], rows: Int[np.ndarray, " rows"]) -> Tuned:
        """The task that asks for the text's own vector."""
        own = vectors[torch.from_numpy(rows)].cpu().numpy()
        return self._begun(vectors, rows, own, np.ones(len(rows), np.float32), "mse")


_Asked = tuple[tuple[str, ...], np.ndarray, np.ndarray]
"""Texts, targets, weights."""


def fitted_head(
    vectors: Float[Tensor, "rows width"],
    targets: Float[Tensor, "rows outputs"],
    weights: Float[Tensor, " rows"],
    loss: Loss,
    settings: PrefixSettings,
) -> tuple[Float[Tensor, "width outputs"], Float[Tensor, " outputs"]]:
    """Ridge regression of the answers on principal components, in float64; for `bce` and `ce` taken as logits about the
    labels' shares.

    At a share p of a label, logits move by 1 / (p (1 - p)) of what probabilities do (`ce`: 1 / p), to first order.
    A permutation of the labels permutes the head.
    """
    x, y = vectors.double(), targets.double()
    share = (weights.double() / weights.double().sum())[:, None]
    mean, prior = (share * x).sum(0), (share * y).sum(0)
    x, y = x - mean, y - prior
    variances, components = torch.linalg.eigh(x.T @ (share * x))
    variances, components = variances[-settings.components :], components[:, -settings.components :]
    shrunk = (variances + settings.ridge * variances.sum()).clamp(min=1e-12)  # all texts the same: no head
    weight = components @ ((components.T @ (x.T @ (share * y))) / shrunk[:, None])
    if loss == "mse":
        return weight.float(), (prior - mean @ weight).float()
    rare = prior.clamp(LEAST_SHARE, 1 - LEAST_SHARE)
    weight = weight / (rare * (1 - rare) if loss == "bce" else rare)
    base = rare.logit() if loss == "bce" else rare.log()
    return weight.float(), (base - mean @ weight).float()


def _by_class_mean(vectors: Float[Tensor, "rows width"], targets: Float[Tensor, "rows labels"]) -> Tensor:
    """The labels' order for a head that is the same for all tasks: by their class means along a fixed direction."""
    direction = torch.from_numpy(np.random.default_rng(0).normal(size=vectors.shape[1])).to(vectors.device)
    means = (targets.double() - targets.double().mean(0)).T @ vectors.double()
    return (means @ direction).argsort()


def _in_canonical_order(task: Answers) -> list[int]:
    """Rows by text and answer, so that the order of the examples changes nothing."""
    given = task.replies if task.is_open else [tuple(row) for row in task.probabilities.tolist()]
    return sorted(range(task.num_texts), key=lambda i: (task.texts[i], given[i]))


def _named(place: int, tasks: Sequence[Answers]) -> str:
    return "task" if len(tasks) == 1 else f"tasks[{place}]"
