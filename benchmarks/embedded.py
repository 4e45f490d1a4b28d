"""Vectors of texts, computed once and kept under METASEPIA_HOME by the embedder's digest and the text.

Texts are taken whole, up to the embedder's window; what is longer is cut at the window and counted.

    python -m benchmarks.embedded --data DIR --embedder encoder,backbone
"""

import argparse
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks import datasets
from cluster import settings as settings_of
from metasepia import encoders
from metasepia.digests import digest_of
from metasepia.errors import WindowExceeded
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone

CHUNK = 64
"""Texts computed between two writes."""


class Embedder(Protocol):
    """What makes unit-norm vectors out of texts that fit its window (metasepia.encoders.TextEncoder, MeanStates)."""

    digest: str
    window: int

    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...


class MeanStates:
    """A causal backbone as an embedder: mean over tokens of the last hidden states, unit norm.

    What the served graph does with `encoder: <backbone>`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, digest: str, window: int, batch: int = 16
    ) -> None:
        self.digest, self.window = digest_of({"kind": "mean states", "backbone": digest}), window
        self._model, self._tokenizer, self._batch = model, tokenizer, batch

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(self._tokenizer(text)["input_ids"]) for text in texts]

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        ids = [self._tokenizer(text)["input_ids"] for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.zeros((len(ids), self._model.config.hidden_size), dtype=np.float32)
        for begin in range(0, len(order), self._batch):
            some = order[begin : begin + self._batch]
            width = max(len(ids[i]) for i in some)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in some])
            tokens = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in some])
            states = self._model.base_model(tokens, attention_mask=mask).last_hidden_state
            means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[some] = torch.nn.functional.normalize(means, dim=1).float().numpy()
        return vectors


class EmbeddedTexts:
    """The vectors of any texts by one embedder; each is computed once and kept in a file of `folder`."""

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.embedder = embedder
        self._file = sqlite3.connect(folder / f"{embedder.digest}.sqlite", timeout=600)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB, was_cut INTEGER)")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 [texts, width], unit norm."""
        if not texts:
            raise ValueError("no texts")
        self.compute(texts)
        return np.stack([np.frombuffer(self._row(text)[0], np.float32) for text in texts])

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many different texts were longer than the window."""
        return sum(self._row(text)[1] for text in set(texts))

    def compute(self, texts: Sequence[str], advance: Callable[[int], None] = lambda _: None) -> None:
        """Computes what is missing, short texts first; tells `advance` how many texts are done."""
        missing = sorted({text for text in texts if self._find(text) is None}, key=len)
        advance(len(texts) - len(missing))
        for begin in range(0, len(missing), CHUNK):
            chunk = missing[begin : begin + CHUNK]
            cut = [cut_to_window(text, self.embedder) for text in chunk]
            vectors = np.ascontiguousarray(self.embedder.embed(cut), np.float32)
            rows = [(_key(t), v.tobytes(), t != c) for t, v, c in zip(chunk, vectors, cut, strict=True)]
            with self._file:
                self._file.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", rows)
            advance(len(chunk))

    def _row(self, text: str) -> tuple[bytes, int]:
        row = self._find(text)
        if row is None:
            raise KeyError(text)
        return row

    def _find(self, text: str) -> tuple[bytes, int] | None:
        return self._file.execute("SELECT vector, was_cut FROM vectors WHERE text = ?", (_key(text),)).fetchone()


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def cut_to_window(text: str, embedder: Embedder) -> str:
    """The text, or the longest beginning of it that fits the window."""

    def fits(length: int) -> bool:
        try:
            return embedder.count_tokens([text[:length]])[0] <= embedder.window
        except WindowExceeded:
            return False

    if fits(len(text)):
        return text
    short, long = 0, len(text)
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if fits(middle) else (short, middle)
    return text[:short]


class Models:
    """The encoder and the backbone of a profile, loaded when first asked for."""

    def __init__(self, profile: str = "laptop") -> None:
        settings = settings_of.read(profile)
        self._settings, self._folder = settings, settings.home / "embedded"
        self._embedded: dict[str, EmbeddedTexts] = {}
        self._backbone: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def _prepared(self) -> PreparedBackbone:
        return checkpoints.prepare(self._settings.backbones[0].source, self._settings.home)

    def backbone(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._backbone is None:
            prepared = self._prepared()
            tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
            self._backbone = checkpoints.load(prepared, torch.float32, "cpu"), tokenizer
        return self._backbone

    def embedded(self, embedder: str) -> EmbeddedTexts:
        """`encoder` or `backbone`: the first of the profile."""
        if embedder not in self._embedded:
            if embedder == "encoder":
                made: Embedder = encoders.load(self._settings.encoders[0].source)
            else:
                prepared = self._prepared()
                made = MeanStates(*self.backbone(), digest=prepared.digest, window=prepared.window)
            self._embedded[embedder] = EmbeddedTexts(made, self._folder)
        return self._embedded[embedder]

    @property
    def encoder_source(self) -> str:
        return self._settings.encoders[0].source

    @property
    def backbone_window(self) -> int:
        return self._prepared().window

    def name(self, embedder: str) -> str:
        return (self._settings.encoders if embedder == "encoder" else self._settings.backbones)[0].id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files")
    parser.add_argument("--embedder", default="encoder", help="encoder, backbone, or both with a comma")
    parser.add_argument("--binary", action="store_true", help="only the sets of two classes")
    arguments = parser.parse_args()
    sets = [one for one in datasets.read_all(arguments.data) if len(one.labels) == 2 or not arguments.binary]
    disable_progress_bar()  # transformers' own, of loading weights
    models = Models()
    with Progress() as progress:
        for embedder in arguments.embedder.split(","):
            embedded = models.embedded(embedder)
            for one in sets:
                texts = [text for text, _ in one.train + one.test]
                task = progress.add_task(f"{embedder} {one.name}", total=len(texts))
                embedded.compute(texts, lambda done, task=task: progress.advance(task, done))


if __name__ == "__main__":
    main()
