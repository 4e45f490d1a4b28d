"""Named contexts: labelled examples under a name made from their content, `ctx-<digest>`, and as a registry's blob.

The digest is over what was given (texts, media bytes or vectors with their labels, unlabelled inputs, seed, encoder,
module, protocol, reduction) and not over computed vectors, whose last bits differ between machines. Examples and
unlabelled inputs are multisets: another order is the same context, a duplicate counts twice. Texts and labels are taken
as given, character for character. No torch: the gateway reads this.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metasepia.digests import digest_of, is_digest
from metasepia.errors import CorruptArtefact, InvalidRequest

PREFIX = "ctx-"
InputKind = Literal["text", "vector", "image", "audio"]
INPUT_KINDS: tuple[str, ...] = get_args(InputKind)
Protocol = Literal["stream", "vanilla", "loo"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)

Content = str | bytes
"""A text; the bytes of a file of an image or a sound; the bytes of a vector's float32 numbers, little-endian."""

_FORMAT = 1


@dataclass(frozen=True)
class Example:
    """One labelled input."""

    content: Content
    label: str

    @cached_property
    def digest(self) -> str:
        return digest_of_content(self.content)


@dataclass(frozen=True)
class EncoderName:
    """What turned the inputs into vectors: a text or media encoder, or a backbone's hidden states."""

    id: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class NamedContext:
    """What a context is, before anything is computed; its examples in their one order."""

    kind: InputKind
    examples: tuple[Example, ...]
    """Sorted by label, then by content digest."""
    unlabelled: tuple[Content, ...] = ()
    """Sorted by content digest."""
    seed: int = 0
    encoder: EncoderName | None
    """None for vectors."""
    module: str
    """Digest of the reasoning module."""
    protocol: Protocol = "stream"
    reduction: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the reduction's recipe."""
    given: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """`given[i]` is the place of example i in the list that `of` was given."""
    given_unlabelled: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(
        cls,
        kind: InputKind,
        examples: Sequence[Example],
        *,
        encoder: EncoderName | None,
        module: str,
        unlabelled: Sequence[Content] = (),
        seed: int = 0,
        protocol: Protocol = "stream",
        reduction: Mapping[str, Any] | None = None,
    ) -> "NamedContext":
        """Raises InvalidRequest: fewer than two classes, labels that only look different, vectors of unequal width."""
        check_labels([one.label for one in examples])
        if kind == "vector":
            _check_widths([one.content for one in examples], "examples[{}].vector", examples[0].content)
            _check_widths(unlabelled, "unlabelled[{}].vector", examples[0].content)
        order = sorted(range(len(examples)), key=lambda i: (examples[i].label, examples[i].digest))
        digests = [digest_of_content(one) for one in unlabelled]
        order_unlabelled = sorted(range(len(unlabelled)), key=digests.__getitem__)
        return cls(
            kind=kind,
            examples=tuple(examples[i] for i in order),
            unlabelled=tuple(unlabelled[i] for i in order_unlabelled),
            seed=seed,
            encoder=encoder,
            module=module,
            protocol=protocol,
            reduction=dict(reduction or {}),
            given=tuple(order),
            given_unlabelled=tuple(order_unlabelled),
        )

    @cached_property
    def digest(self) -> str:
        """Of the content; the encoder and module enter by their digests, not by their names."""
        return digest_of(
            {
                "kind": "context",
                "input": self.kind,
                "examples": [[one.label, one.digest] for one in self.examples],
                "unlabelled": [digest_of_content(one) for one in self.unlabelled],
                "seed": self.seed,
                "encoder": self.encoder.digest if self.encoder else None,
                "module": self.module,
                "protocol": self.protocol,
                "reduction": dict(self.reduction),
            }
        )

    @property
    def id(self) -> str:
        return PREFIX + self.digest

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({one.label for one in self.examples}))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(one.label for one in self.examples)

    def extended(self, more: Sequence[Example]) -> "NamedContext":
        """The context of these examples and `more`; `given` counts this context's examples first.

        Raises InvalidRequest as `of` does, naming the places in `more`.
        """
        check_labels([one.label for one in more], self.labels)
        if self.kind == "vector":
            _check_widths([one.content for one in more], "examples[{}].vector", self.examples[0].content)
        return NamedContext.of(
            self.kind,
            [*self.examples, *more],
            encoder=self.encoder,
            module=self.module,
            unlabelled=self.unlabelled,
            seed=self.seed,
            protocol=self.protocol,
            reduction=self.reduction,
        )


@dataclass(frozen=True)
class EmbeddedContext:
    """A named context with the vectors of its inputs: all that compiling it needs."""

    named: NamedContext
    vectors: np.ndarray
    """float32 [examples, width], in the order of `named.examples`"""
    unlabelled: np.ndarray | None = None
    """float32 [unlabelled, width]"""

    def to_bytes(self) -> bytes:
        """One safetensors file: arrays, and everything else as JSON under the metadata's one key."""
        named = self.named
        header: dict[str, Any] = {
            "format": _FORMAT,
            "kind": named.kind,
            "labels": named.labels,
            "seed": named.seed,
            "encoder": [named.encoder.id, named.encoder.digest] if named.encoder else None,
            "module": named.module,
            "protocol": named.protocol,
            "reduction": dict(named.reduction),
            "num_unlabelled": len(named.unlabelled),
        }
        tensors: dict[str, np.ndarray] = {"vectors": _float32(self.vectors)}
        if self.unlabelled is not None:
            tensors["unlabelled"] = _float32(self.unlabelled)
        contents = [*(one.content for one in named.examples), *named.unlabelled]
        if named.kind == "text":
            header["texts"] = contents
        elif named.kind != "vector":  # a vector is its own content
            media = [one if isinstance(one, bytes) else one.encode() for one in contents]
            header["lengths"] = [len(one) for one in media]
            tensors["media"] = np.frombuffer(b"".join(media), np.uint8)
        return save(tensors, metadata={"context": json.dumps(header, ensure_ascii=False, sort_keys=True)})

    @classmethod
    def from_bytes(cls, blob: bytes, digest: str) -> "EmbeddedContext":
        """Raises CorruptArtefact for bytes that are not a context, or not the one with this digest."""
        try:
            tensors = load(blob)
            header_len = int.from_bytes(blob[:8], "little")
            header = json.loads(json.loads(blob[8 : 8 + header_len])["__metadata__"]["context"])
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']}, this program reads {_FORMAT}")
            labels, num_unlabelled = header["labels"], header["num_unlabelled"]
            contents = _contents(header, tensors)
            vectors, unlabelled = tensors["vectors"], tensors.get("unlabelled")
            if not len(labels) == len(vectors) == len(contents) - num_unlabelled:
                raise ValueError(f"{len(labels)} labels, {len(vectors)} vectors and {len(contents)} inputs")
            if num_unlabelled != (0 if unlabelled is None else len(unlabelled)):
                raise ValueError("its unlabelled inputs and their vectors differ in number")
            named = NamedContext(
                kind=header["kind"],
                examples=tuple(map(Example, contents, labels)),
                unlabelled=tuple(contents[len(labels) :]),
                seed=header["seed"],
                encoder=EncoderName(*header["encoder"]) if header["encoder"] else None,
                module=header["module"],
                protocol=header["protocol"],
                reduction=header["reduction"],
                given=tuple(range(len(labels))),
                given_unlabelled=tuple(range(num_unlabelled)),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtefact(f"context {PREFIX}{digest}", f"it does not parse ({error})") from error
        if named.digest != digest:
            raise CorruptArtefact(f"context {PREFIX}{digest}", f"its content has the digest {named.digest}")
        return cls(named, vectors, unlabelled)


def digest_of_name(name: str) -> str | None:
    """The digest in `ctx-<digest>`; None for a name of another form."""
    digest = name.removeprefix(PREFIX)
    return digest if name.startswith(PREFIX) and is_digest(digest) else None


def digest_of_content(content: Content) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def vector_content(numbers: Sequence[Any], param: str) -> bytes:
    """A vector as content. Raises InvalidRequest, naming `param`, for NaN, infinities and what float32 cannot hold."""
    with np.errstate(over="ignore"):
        try:
            vector = np.asarray(numbers, dtype=np.float64).astype("<f4") + np.float32(0)  # -0 is 0
        except OverflowError:  # an integer beyond any float
            vector = np.array([np.inf], "<f4")
    if vector.ndim != 1 or not vector.size:
        raise InvalidRequest(param, "must be a list of numbers")
    if not np.isfinite(vector).all():
        raise InvalidRequest(param, "holds NaN, infinity or a number that float32 cannot hold (3.4e38)")
    return vector.tobytes()


def vectors_of_contents(contents: Iterable[Content]) -> np.ndarray:
    """float32 [contents, width] of vectors as content."""
    return np.stack([np.frombuffer(one, "<f4") for one in contents if isinstance(one, bytes)]).astype(np.float32)


def check_labels(labels: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raises InvalidRequest for labels of fewer than two classes, and for two that Unicode holds for the same.

    `known` are labels that are in order and count too.

    Labels are compared character for character: `Spam` and `spam` are two classes. Two spellings of one
    text (an accented letter as one character or as two, say) cannot be told apart by a reader and are refused.
    """
    classes = list(dict.fromkeys([*known, *labels]))
    if len(classes) < 2:
        carried = f"every example carries the label {classes[0]!r}" if classes else "there are none"
        raise InvalidRequest("examples", f"{carried}; give examples of two labels or more")
    spellings: dict[str, str] = {}
    for label in classes:
        other = spellings.setdefault(unicodedata.normalize("NFC", label), label)
        if other != label:
            raise InvalidRequest(
                f"examples[{labels.index(label)}].label",
                f"{label!a} and {other!a} are two spellings of the same characters (Unicode NFC); use one of them",
            )


def _check_widths(contents: Sequence[Content], place: str, first: Content) -> None:
    for i, one in enumerate(contents):
        if len(one) != len(first):
            raise InvalidRequest(
                place.format(i), f"{len(one) // 4} numbers, where examples[0].vector has {len(first) // 4}"
            )


def _contents(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> list[Content]:
    if header["kind"] == "text":
        return list(header["texts"])
    if header["kind"] == "vector":
        return [row.astype("<f4").tobytes() for name in ("vectors", "unlabelled") for row in tensors.get(name, ())]
    media, contents, at = tensors["media"].tobytes(), [], 0
    for length in header["lengths"]:
        contents.append(media[at : at + length])
        at += length
    return contents


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype="<f4")
