"""The states that a backbone gives to texts: read once, batch by batch, each batch's part written once and whole.

OUT/states/manifest.json            what is read: digests of backbone and texts, layers, poolings, how texts are cut
OUT/states/part-00012.safetensors   of batch 12: a tensor [texts, layers, hidden] a pooling, and `embedding`
OUT/states.parquet                  all of it, where it is to be kept: a column a pooling and layer

A part that is there is not computed again, so a killed run goes on where it was. Batches are fixed by the texts and
`batch_tokens` alone, so a run that was killed leaves the same bytes as one that was not (same machine and threads).
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from metasepia.digests import digest_of
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.layerwise.texts import TaskTexts
from metasepia.models.prepared import PreparedBackbone

Pooling = Literal["last", "mean", "rest"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "rest")
EMBEDDING = "embedding"
ROW_GROUP = 1024


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How texts become states."""

    layers: tuple[int, ...] = ()
    """0 is the embedding, n the output of block n, the last after the final norm; negative counts from the end. Empty:
    all of them."""
    poolings: tuple[Pooling, ...] = ("last",)
    """The state at the last token, the mean over all tokens, or over the rest after the first. The first token of
    Llama-like models draws attention to itself and has a state hundreds of times larger than any other."""
    prompt: Literal["plain", "chat"] = "plain"
    """chat: the text is a user's message in the checkpoint's template, and `last` is where its answer would begin."""
    max_tokens: int = 512
    """Longer texts are cut to so many tokens, the template's included; never above the backbone's window."""
    batch_tokens: int = 2048
    """Texts times the longest one's tokens in a forward; a longer text is a batch of its own."""

    def __post_init__(self) -> None:
        if not self.poolings or len(set(self.poolings)) < len(self.poolings) or set(self.poolings) - set(POOLINGS):
            raise InvalidSettings("pooling", self.poolings, f"one or more of {', '.join(POOLINGS)}, each once")
        for name, value in (("max_tokens", self.max_tokens), ("batch_tokens", self.batch_tokens)):
            if value < 1:
                raise InvalidSettings(name, value, "at least 1")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers wanted of a backbone with so many blocks, ascending. Raises InvalidSettings for one it lacks."""
        for layer in self.layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise InvalidSettings("layers", layer, f"from 0 to {num_layers}, or from -{num_layers + 1} to -1")
        return tuple(sorted({layer % (num_layers + 1) for layer in self.layers} or range(num_layers + 1)))


@runtime_checkable
class States(Protocol):
    """States in the order of the texts, one layer at a time in memory."""

    def layer(self, pooling: Pooling, layer: int) -> Float32[np.ndarray, "texts hidden"]: ...

    def embedding(self) -> Float32[np.ndarray, "texts hidden"]:
        """The mean of the input embeddings of each text's tokens: what the words are, without order or context."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is read, before any of it is."""

    sequences: tuple[tuple[int, ...], ...]
    """Token ids of each text."""
    num_cut: int
    """Texts that were longer."""
    layers: tuple[int, ...]
    settings: ReadSettings
    header: dict[str, Any]
    """What the states are a function of; as canonical JSON spells it."""

    @cached_property
    def digest(self) -> str:
        return digest_of(self.header)

    @cached_property
    def batches(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the texts of each batch; the longest first, so that what does not fit memory fails at once."""
        order = sorted(range(len(self.sequences)), key=lambda i: (-len(self.sequences[i]), i))
        batches: list[list[int]] = []
        for i in order:
            room = self.settings.batch_tokens // len(self.sequences[batches[-1][0]]) if batches else 0
            if batches and len(batches[-1]) < room:
                batches[-1].append(i)
            else:
                batches.append([i])
        return tuple(map(tuple, batches))


def plan(
    texts: TaskTexts,
    tokenizer: Any,
    prepared: PreparedBackbone,
    settings: ReadSettings,
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> Plan:
    """Tokenises and cuts. Raises InvalidSettings for a layer that the backbone lacks, or a chat without a template."""
    layers = settings.layers_of(prepared.num_layers)
    if settings.prompt == "chat" and not getattr(tokenizer, "chat_template", None):
        raise InvalidSettings("prompt", "chat", f"plain: the tokenizer of {prepared.source} has no chat template")
    most = min(settings.max_tokens, prepared.window)
    pairs = [_tokens(tokenizer, text, settings.prompt, most) for text in texts.texts]
    header = {
        "kind": "layerwise states",
        "backbone": prepared.digest,
        "texts": texts.digest,
        "layers": list(layers),
        "poolings": list(settings.poolings),
        "prompt": settings.prompt,
        "max_tokens": most,
        "batch_tokens": settings.batch_tokens,
        "dtype": dtype,
        "device": device.partition(":")[0],
    }
    return Plan(
        sequences=tuple(ids for ids, _ in pairs),
        num_cut=sum(cut for _, cut in pairs),
        layers=layers,
        settings=settings,
        header=header,
    )


def _tokens(tokenizer: Any, text: str, prompt: str, most: int) -> tuple[tuple[int, ...], bool]:
    """Token ids, at most so many, and whether the text was cut. Of a chat the message is cut, not the template."""
    if prompt == "plain":
        ids = tuple(tokenizer(text).input_ids) or tuple(tokenizer(f" {text}").input_ids)
        return ids[:most], len(ids) > most

    def wrapped(message: str) -> tuple[int, ...]:
        chat = [{"role": "user", "content": message}]
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tuple(tokenizer(whole, add_special_tokens=False).input_ids)

    ids = wrapped(text)
    if len(ids) <= most:
        return ids, False
    inner = tokenizer(text, add_special_tokens=False).input_ids
    keep = len(inner) - (len(ids) - most)
    while keep > 0:  # a cut word may be spelt with more tokens
        ids = wrapped(tokenizer.decode(inner[:keep], skip_special_tokens=True))
        if len(ids) <= most:
            return ids, True
        keep -= len(ids) - most
    raise InvalidSettings("max_tokens", most, "long enough for the chat template and a part of each text")


class StoredParts:
    """The parts of a plan in a folder."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        """Opens the folder or makes it. Raises InvalidSettings where it holds parts of another plan, and says what
        differs; CorruptArtefact for a manifest that cannot be read.
        """
        self.directory, self.plan = directory, plan
        manifest = directory / "manifest.json"
        if manifest.is_file():
            try:
                before = json.loads(manifest.read_text())
            except ValueError as error:
                raise CorruptArtefact(str(manifest), f"no JSON ({error}); start again with --restart") from error
            if before != plan.header:
                names = sorted(plan.header.keys() | before.keys())
                differ = ", ".join(name for name in names if before.get(name) != plan.header.get(name))
                raise InvalidSettings(
                    "out", str(directory.parent), f"another folder (or --restart): it holds states of other {differ}"
                )
        else:
            directory.mkdir(parents=True, exist_ok=True)
            _write_whole(manifest, (json.dumps(plan.header, indent=1) + "\n").encode())

    def path(self, batch: int) -> Path:
        return self.directory / f"part-{batch:05d}.safetensors"

    def missing(self) -> tuple[int, ...]:
        """Batches without a whole part."""
        return tuple(i for i in range(len(self.plan.batches)) if not self._is_whole(i))

    def put(self, batch: int, tensors: dict[str, np.ndarray]) -> None:
        # one field: safetensors writes several in any order, and the bytes are to be the same each time
        _write_whole(self.path(batch), save(tensors, metadata={"plan": self.plan.digest}))

    def layer(self, pooling: Pooling, layer: int) -> Float32[np.ndarray, "texts hidden"]:
        place = self.plan.layers.index(layer)
        return self._gathered(lambda part: part.get_slice(pooling)[:, place])

    def embedding(self) -> Float32[np.ndarray, "texts hidden"]:
        return self._gathered(lambda part: part.get_tensor(EMBEDDING))

    def remove(self) -> None:
        self.forget(self.directory)

    @staticmethod
    def forget(directory: Path) -> None:
        """Removes manifest and parts, whosever they are, and nothing else."""
        for path in [directory / "manifest.json", *directory.glob("part-*.safetensors"), *directory.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # absent, or somebody else's files are in it
            directory.rmdir()

    def _is_whole(self, batch: int) -> bool:
        try:
            with safe_open(self.path(batch), framework="numpy") as part:
                known = part.metadata() or {}
                shape = part.get_slice(EMBEDDING).get_shape()
        except (OSError, SafetensorError):  # absent, or cut short by a machine that lost its power
            return False
        return known.get("plan") == self.plan.digest and shape[0] == len(self.plan.batches[batch])

    def _gathered(self, of: Callable[[Any], np.ndarray]) -> Float32[np.ndarray, "texts hidden"]:
        found: list[np.ndarray] = []
        for batch in range(len(self.plan.batches)):
            with safe_open(self.path(batch), framework="numpy") as part:
                found.append(of(part))
        order = [text for texts in self.plan.batches for text in texts]
        return np.concatenate(found)[np.argsort(order)]


class KeptStates:
    """The states in a Parquet file that `keep` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def found(cls, path: Path, plan: Plan) -> "KeptStates | None":
        """Those of this very plan, or None."""
        try:
            metadata = pq.ParquetFile(path).schema_arrow.metadata or {}
        except (OSError, pa.ArrowException):
            return None
        return cls(path) if metadata.get(b"plan") == plan.digest.encode() else None

    def layer(self, pooling: Pooling, layer: int) -> Float32[np.ndarray, "texts hidden"]:
        return self._column(_column(pooling, layer))

    def embedding(self) -> Float32[np.ndarray, "texts hidden"]:
        return self._column(EMBEDDING)

    def _column(self, name: str) -> Float32[np.ndarray, "texts hidden"]:
        column: Any = pq.ParquetFile(self.path).read(columns=[name]).column(name).combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1)


def keep(states: States, texts: TaskTexts, plan: Plan, path: Path) -> None:
    """Writes all states as one Parquet file, whole or not at all: a row a text, in the order of the texts."""
    columns: dict[str, Any] = {"task": list(texts.tasks), "template": list(texts.templates), "text": list(texts.texts)}
    columns["num_tokens"] = pa.array([len(ids) for ids in plan.sequences], pa.int32())
    columns[EMBEDDING] = _vectors(states.embedding())
    for pooling in plan.settings.poolings:
        for layer in plan.layers:
            columns[_column(pooling, layer)] = _vectors(states.layer(pooling, layer))
    table = pa.table(columns).replace_schema_metadata({"plan": plan.digest, "header": json.dumps(plan.header)})
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, scratch, compression="zstd", row_group_size=ROW_GROUP)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read(model: Any, plan: Plan, parts: StoredParts) -> Iterator[int]:
    """Computes the missing parts, and yields how many tokens each took. `model` is a Hugging Face causal model."""
    for batch in parts.missing():
        texts = plan.batches[batch]
        sequences = [plan.sequences[i] for i in texts]
        parts.put(batch, pooled(model, sequences, plan.layers, plan.settings.poolings))
        yield sum(map(len, sequences))


@torch.no_grad()
def pooled(
    model: Any, sequences: Sequence[Sequence[int]], layers: Sequence[int], poolings: Sequence[Pooling]
) -> dict[str, np.ndarray]:
    """A tensor [texts, layers, hidden] a pooling, and `embedding` [texts, hidden]; float32, means summed in float64.

    Rows are padded at the right, where a causal model's tokens do not see it. A text of one token is its own rest.
    """
    lengths = torch.tensor([len(one) for one in sequences])
    width = int(lengths.max())
    token_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        token_ids[row, : len(sequence)] = torch.tensor(sequence)
    mask = torch.arange(width) < lengths[:, None]
    token_ids, mask, lengths = (one.to(model.device) for one in (token_ids, mask, lengths))
    decoder = model.base_model  # without the logits, which are wider than all states together
    output = decoder(input_ids=token_ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
    found: dict[str, np.ndarray] = {}
    for pooling in poolings:
        states = [_pool(output.hidden_states[layer], mask, lengths, pooling) for layer in layers]
        found[pooling] = torch.stack(states, dim=1).cpu().numpy()
    found[EMBEDDING] = _pool(model.get_input_embeddings()(token_ids), mask, lengths, "mean").cpu().numpy()
    return found


def _pool(
    states: Float[Tensor, "batch seq hidden"], mask: Tensor, lengths: Tensor, pooling: Pooling
) -> Float32[Tensor, "batch hidden"]:
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1].float()
    if pooling == "rest":
        mask = mask.clone()
        mask[lengths > 1, 0] = False
    weights = mask.double()[..., None]
    return ((states.double() * weights).sum(1) / weights.sum(1)).float()


def _column(pooling: str, layer: int) -> str:
    return f"{pooling}_{layer:02d}"


def _vectors(states: Float32[np.ndarray, "texts hidden"]) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1])


def _write_whole(path: Path, content: bytes) -> None:
    """So that the name is never that of a half-written file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
