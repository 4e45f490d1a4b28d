"""Task embeddings by Fisher information (TaskEmb, arXiv:2005.00770; Task2Vec, arXiv:1902.03545; in FUTE, 2402.14522).

A surrogate is made to answer as the task does; the embedding is the diagonal of the Fisher information of its upper
layers, E[g^2] over texts and over answers, by each text's own gradient, sketched to a few thousand numbers. The
expectation over answers is exact, not sampled: p (1 - p) times one squared gradient for two labels.

Where we differ from the authors' code: it squares the mean gradient, (E g)^2, which `reference` gives; it tunes all
layers, of which the head alone is the default here; and the Fisher information is that of the probe texts under the
model's own answers, so that tasks told by different texts differ by what they do and not by what they read.
Squares know no signs and the head no order: labels renamed, permuted or flipped give the same bits.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metasepia.embedding.answers import Answers
from metasepia.embedding.fisher_sketch import CountSketch, GradientSums
from metasepia.embedding.fisher_training import (
    LINEARS,
    Batch,
    Expectation,
    Head,
    Loss,
    Tuning,
    fit_head,
    tune,
)
from metasepia.embedding.methods import CONSTANT
from metasepia.embedding.probes import ProbeTexts
from metasepia.embedding.space import Space
from metasepia.embedding.surrogate import FrozenLinear, Layer, Surrogate
from metasepia.encoders import TextEncoder
from metasepia.errors import InvalidRequest, InvalidSettings
from metasepia.kinds import check_kinds

VERSION = 1
"""Of the arithmetic; part of the space."""
MOST_BYTES = 256 << 20
"""Of sums of squares, or of tuned layers' weights, gradients and moments: so many tasks share a forward."""
KEPT_TEXTS = 4
"""Sets of texts whose vectors and states stay between calls."""
LEAST_NORM = 1e-6
"""Of a head's weights; below it the surrogate learnt nothing from the answers."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class FisherSettings:
    """Which Fisher information of which surrogate. The defaults are the best of a pilot on texts of its own."""

    layers: int = 2
    """The last so many layers' linear weights and biases are what the information is of; 1 to all."""
    tuned_layers: int = 0
    """The last so many layers are tuned beside the head; 0: the head alone, as Task2Vec does. FUTE tunes all."""
    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 32
    weight_decay: float = 0.01
    """These four only where layers are tuned."""
    ridge: float = 3e-3
    """Holds the head's weights: ridge / 2 |weight|^2 beside the mean loss; above 0."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Of labels: cross-entropy on the soft answers, or each label for itself, as the reference. Open ones: Gaussian."""
    over: Literal["probes", "task"] = "probes"
    """The texts whose gradients are squared: the probe texts, or the task's own."""
    expectation: Literal["model", "answers"] = "model"
    """Over answers drawn from the surrogate (the Fisher information), or from the task: empirical, over="task" only."""
    reference: bool = False
    """(E g)^2 of the loss on the task's own texts and answers, whatever `over` and `expectation` say: the authors'."""
    directions: int = 4
    """Backward passes a text at most; k labels need k - 1. Of more, random sums are taken, without bias."""
    normalise: Literal["tensor", "none"] = "tensor"
    """Each weight's information to unit norm, so that no layer drowns the others; or as it is."""
    most_texts: int = 1024
    """Of a task's own texts for tuning and for over="task", chosen by their hashes; the head is fitted to all."""
    sketch: int = 4096
    """Numbers in the embedding."""
    sketch_seed: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("layers", "epochs", "batch_size", "directions", "most_texts"):
            if not getattr(self, name) >= 1:
                raise InvalidSettings(name, getattr(self, name), "1 or more")
        for name in ("tuned_layers", "sketch_seed"):
            if not getattr(self, name) >= 0:
                raise InvalidSettings(name, getattr(self, name), "0 or more")
        if not 16 <= self.sketch <= 1 << 20:
            raise InvalidSettings("sketch", self.sketch, f"16 to {1 << 20}")
        for name in ("learning_rate", "ridge"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidSettings(name, getattr(self, name), "positive and finite")
        if not 0 <= self.weight_decay < float("inf"):
            raise InvalidSettings("weight_decay", self.weight_decay, "0 or more, finite")
        if self.expectation == "answers" and self.over == "probes":
            raise InvalidSettings(
                "expectation", "answers", "model where over = 'probes': they are not the task's texts"
            )

    @property
    def over_task(self) -> bool:
        return self.reference or self.over == "task"

    @property
    def expected(self) -> Expectation:
        return "loss" if self.reference else self.expectation


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A task in a form that knows neither the names of its labels nor the order of its texts."""

    texts: tuple[str, ...]
    answers: Float[np.ndarray, "texts outputs"]
    loss: Loss

    def first(self, count: int) -> "_Form":
        return _Form(texts=self.texts[:count], answers=self.answers[:count], loss=self.loss)


class FisherMethod:
    """Answers to vectors. Not thread-safe: its encoder is not."""

    def __init__(self, encoder: TextEncoder, probes: ProbeTexts, settings: FisherSettings | None = None) -> None:
        """Raises InvalidSettings for more layers than the encoder has, WindowExceeded for a probe text too long."""
        self.settings = settings = settings or FisherSettings()
        self.surrogate = Surrogate(encoder)
        for name in ("layers", "tuned_layers"):
            if getattr(settings, name) > self.surrogate.num_layers:
                raise InvalidSettings(
                    name, getattr(settings, name), f"at most the encoder's {self.surrogate.num_layers}"
                )
        self.probes = probes
        self.space = Space(
            surrogate=encoder.digest,
            method="fisher",
            settings={"version": VERSION, **asdict(settings)},
            probes=probes.digest,
        )
        self._sketch = CountSketch(settings.sketch, settings.sketch_seed)
        encoder.tokenize(probes.texts)
        self._vectors: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()
        self._states: OrderedDict[tuple[object, ...], list[Batch]] = OrderedDict()

    @property
    def dims(self) -> int:
        return self.settings.sketch

    @property
    def _tasks_at_once(self) -> int:
        layer = self.surrogate.layers[-1]
        numbers = sum(getattr(layer, name).weight.numel() for name in LINEARS)
        kept = self.settings.layers if not self.settings.tuned_layers else 4 * self.settings.tuned_layers
        return max(1, MOST_BYTES // (4 * numbers * kept))

    def embed(
        self, tasks: Sequence[Answers], *, seed: int = 0, told: Callable[[int, int], None] | None = None
    ) -> Float[np.ndarray, "tasks dims"]:
        """Unit-norm vectors; `seed` orders the batches where layers are tuned. See `EmbeddingMethod.embed`."""
        vectors = np.empty((len(tasks), self.dims), np.float32)
        for done, (place, tensors) in enumerate(self.informations(tasks, seed=seed), start=1):
            vector = self._sketch(self._normalised(tensors))
            norm = float(np.linalg.norm(vector))
            if not norm > 0:
                raise InvalidRequest(f"tasks[{place}]", CONSTANT)
            vectors[place] = vector / norm
            if told is not None:
                told(done, len(tasks))
        return vectors

    def informations(
        self, tasks: Sequence[Answers], *, seed: int = 0
    ) -> Iterator[tuple[int, dict[str, Float[Tensor, "..."]]]]:
        """The diagonal of each task's Fisher information by parameter, before any normalising, with the task's place.

        In an order of its own: tasks told by the same texts come together, since they share the frozen layers' work.
        """
        checked: set[tuple[str, ...]] = set()
        for place, answers in enumerate(tasks):
            if answers.is_constant:
                raise InvalidRequest(f"tasks[{place}]", CONSTANT)
            if answers.texts not in checked:
                self.surrogate.encoder.tokenize(answers.texts)
                checked.add(answers.texts)
        forms = [self._form(answers) for answers in tasks]
        by_texts: dict[tuple[str, ...], list[int]] = {}
        for place, form in enumerate(forms):
            by_texts.setdefault(form.texts, []).append(place)
        heads: dict[int, Head] = {place: self._head(forms[place], place) for own in by_texts.values() for place in own}
        together: dict[tuple[object, ...], list[int]] = {}
        for texts, places in by_texts.items():
            for place in places:
                tuned = (texts, forms[place].loss) if self.settings.tuned_layers else ()
                together.setdefault((texts if self.settings.over_task else (), *tuned), []).append(place)
        for places in together.values():
            for begin in range(0, len(places), self._tasks_at_once):
                chunk = places[begin : begin + self._tasks_at_once]
                found = self._of_chunk([forms[i] for i in chunk], [heads[i] for i in chunk], seed)
                yield from zip(chunk, found, strict=True)

    def _of_chunk(self, forms: Sequence[_Form], heads: Sequence[Head], seed: int) -> list[dict[str, Tensor]]:
        """Of tasks that share the texts looked at, and where layers are tuned those tuned on and the loss."""
        settings, all_layers = self.settings, self.surrogate.layers
        texts = forms[0].first(settings.most_texts).texts if settings.over_task else self.probes.texts
        answers = [torch.from_numpy(form.first(settings.most_texts).answers) for form in forms]
        first = len(all_layers) - max(settings.layers, settings.tuned_layers)
        batches = self._batches(texts, first)
        if not settings.tuned_layers:
            return self._summed(all_layers[first:], heads, batches, answers)
        first_tuned = len(all_layers) - settings.tuned_layers
        tuned = tune(
            self.surrogate,
            first_tuned,
            self._batches(forms[0].first(settings.most_texts).texts, first_tuned, settings.batch_size),
            heads,
            answers,
            Tuning(
                epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                batch_size=settings.batch_size,
                weight_decay=settings.weight_decay,
            ),
            seed,
        )
        return [
            self._summed([*all_layers[first:first_tuned], *own], [head], batches, [one])[0]
            for (own, head), one in zip(tuned, answers, strict=True)
        ]

    def _summed(
        self, layers: Sequence[Layer], heads: Sequence[Head], batches: Sequence[Batch], answers: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        if self.settings.reference:
            means = self._sums(layers, heads, batches, answers, squared=False)
            return [{name: tensor.square() for name, tensor in one.items()} for one in means]
        return self._sums(layers, heads, batches, answers if self.settings.over_task else None, squared=True)

    def _sums(
        self,
        layers: Sequence[Layer],
        heads: Sequence[Head],
        batches: Sequence[Batch],
        answers: Sequence[Tensor] | None,
        *,
        squared: bool,
    ) -> list[dict[str, Tensor]]:
        """For each head over the same layers: one forward a batch, and a backward for each head and direction.

        Without answers the expectation is over the heads' own.
        """
        settings, surrogate = self.settings, self.surrogate
        expected = "model" if answers is None else settings.expected
        sums = [GradientSums(squared=squared) for _ in heads]
        looked_at = len(layers) - settings.layers
        for batch in batches:
            mask, hidden = batch.padded.mask, batch.states
            lengths, bias = mask.sum(1).tolist(), surrogate.attention_bias(mask)
            recordings: list[_Recording] = []
            with torch.no_grad():
                for layer in layers[:looked_at]:
                    hidden = surrogate.forward_layer(layer, hidden, bias)
            with torch.enable_grad():
                for depth, layer in enumerate(layers[looked_at:], surrogate.num_layers - settings.layers):
                    parts = {name: _Recording(getattr(layer, name), f"layers.{depth}.{name}") for name in LINEARS}
                    recordings += parts.values()
                    hidden = surrogate.forward_layer(replace(layer, **parts), hidden, bias)
                vectors = surrogate.vectors(hidden, mask)
            inputs = [one.input for one in recordings]
            outputs = [one.output for one in recordings]
            for t, (head, total) in enumerate(zip(heads, sums, strict=True)):
                given = None if answers is None else answers[t][batch.places].to(surrogate.device)
                directions = head.gradients(vectors.detach(), given, expected, settings.directions, batch.places)
                for direction in directions.unbind(1):
                    grads = torch.autograd.grad(vectors, outputs, direction, retain_graph=True)
                    for one, x, grad in zip(recordings, inputs, grads, strict=True):
                        total.add(one.name, grad, x, lengths)
        return [one.sums for one in sums]

    def _normalised(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.settings.normalise == "none":
            total = torch.stack([tensor.norm() for tensor in tensors.values()]).norm()
            return {name: tensor / total.clamp(min=1e-30) for name, tensor in tensors.items()}
        share = len(tensors) ** -0.5
        return {name: tensor * (share / tensor.norm().clamp(min=1e-30)) for name, tensor in tensors.items()}

    def _form(self, answers: Answers) -> _Form:
        keys = [hashlib.sha256(text.encode()).digest() for text in answers.texts]
        if answers.is_open:
            order = sorted(range(answers.num_texts), key=lambda i: (keys[i], answers.replies[i]))
            replies = [answers.replies[i] for i in order]
            distinct = sorted(set(replies))
            vectors = dict(zip(distinct, self.surrogate.embed(distinct), strict=True))
            told = np.stack([vectors[reply] for reply in replies])
            return _Form(texts=tuple(answers.texts[i] for i in order), answers=told, loss="gaussian")
        rows = np.sort(answers.probabilities, axis=1)
        order = sorted(range(answers.num_texts), key=lambda i: (keys[i], rows[i].tobytes()))
        told = answers.probabilities[order]
        columns = sorted(range(told.shape[1]), key=lambda label: told[:, label].tobytes())
        return _Form(
            texts=tuple(answers.texts[i] for i in order),
            answers=np.ascontiguousarray(told[:, columns]),
            loss=self.settings.loss,
        )

    def _head(self, form: _Form, place: int) -> Head:
        head = fit_head(self._vectors_of(form.texts), form.answers, form.loss, self.settings.ridge)
        if not head.weight.norm() > LEAST_NORM:
            raise InvalidRequest(f"tasks[{place}]", CONSTANT)
        return head.to(self.surrogate.device)

    def _vectors_of(self, texts: tuple[str, ...]) -> Float[np.ndarray, "texts width"]:
        """By the encoder, a set of texts at a time: whom a text shares a batch with changes its last bits."""
        if texts not in self._vectors:
            self._vectors[texts] = self.surrogate.encoder.embed(texts)
        return _last(self._vectors, texts)

    def _batches(self, texts: tuple[str, ...], first: int, size: int | None = None) -> list[Batch]:
        """The texts with what enters layer `first`: by the encoder's plan, or `size` at a time in order of length.

        Those of the last few calls are kept: prompts that answer the same texts come one after another.
        """
        key = (texts, first, size)
        if key not in self._states:
            token_ids = self.surrogate.tokenize(texts, self.surrogate.window)
            lengths = [len(ids) for ids in token_ids]
            groups = self.surrogate.encoder.plan(lengths)
            if size is not None:
                order = sorted(range(len(texts)), key=lambda i: lengths[i])
                groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
            batches: list[Batch] = []
            with torch.no_grad():
                for group in groups:
                    padded = self.surrogate.padded([token_ids[i] for i in group])
                    states = self.surrogate.hidden_states(padded, first)[-1]
                    batches.append(Batch(places=group, padded=padded, states=states))
            self._states[key] = batches
        return _last(self._states, key)


def _last(kept: "OrderedDict[_Key, _Value]", key: _Key) -> _Value:
    """The value, which is then the last to go."""
    kept.move_to_end(key)
    while len(kept) > KEPT_TEXTS:
        kept.popitem(last=False)
    return kept[key]


class _Recording(FrozenLinear):
    """A linear layer that keeps what enters and leaves it, so that gradients there can be asked for."""

    def __init__(self, linear: FrozenLinear, name: str) -> None:
        self.linear, self.name = linear, name
        self.input = self.output = torch.empty(0)

    def __call__(self, x: Float[Tensor, "texts seq in"]) -> Float[Tensor, "texts seq out"]:
        y = self.linear(x)
        if not y.requires_grad:  # nothing before it needs gradients
            y.requires_grad_()
        self.input, self.output = x.detach(), y
        return y
