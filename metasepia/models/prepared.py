"""A prepared backbone: what any process may know of it without torch. Written by `checkpoints.prepare`.

<home>/backbones/<digest>/metasepia.json           these fields
<home>/backbones/<digest>/tokenizer.json           for the `tokenizers` package
<home>/backbones/<digest>/tokenizer_config.json, chat_template.jinja
<home>/backbones/<digest>/*.safetensors, config.json   only where the source is a GGUF, converted once
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metasepia.errors import CorruptArtefact

CARD = "metasepia.json"


@dataclass(frozen=True, kw_only=True)
class PreparedBackbone:
    """A causal checkpoint on this machine, digested, with its tokenizer beside it. Plain values only."""

    digest: str
    """Of the checkpoint as stored, its config, tokenizer and chat template; not of dtype or tp_size."""
    path: str
    """Hugging Face directory of the weights (config.json and safetensors)."""
    tokenizer_dir: str
    """Directory of tokenizer.json, tokenizer_config.json and, where the model has one, chat_template.jinja."""
    source: str
    """As the settings spelt it."""
    window: int
    """Longest sequence in tokens, prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer; empty where the checkpoint names none."""
    vocab_size: int
    """Width of the logits."""
    hidden_size: int
    num_layers: int
    model_type: str
    """The family, as config.json names it: llama, mistral, qwen2, gpt_neox, bloom..."""


def read(directory: Path) -> PreparedBackbone:
    """The backbone prepared in `directory`. Raises CorruptArtefact for a missing or wrong metasepia.json."""
    card = directory / CARD
    try:
        tree: dict[str, Any] = json.loads(card.read_text())
        tree["eos_token_ids"] = tuple(tree["eos_token_ids"])
        tree |= {name: str((directory / tree[name]).resolve()) for name in ("path", "tokenizer_dir")}
        return PreparedBackbone(**tree)
    except FileNotFoundError as error:
        raise CorruptArtefact(str(card), "it does not exist; run metasepia.models.checkpoints.prepare first") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtefact(str(card), f"it is not the card of a prepared backbone ({error}); delete it") from error


def write(prepared: PreparedBackbone, directory: Path) -> None:
    """Writes metasepia.json into `directory`. Paths may be relative to it, so that `home` can be moved."""
    (directory / CARD).write_text(json.dumps(dataclasses.asdict(prepared), indent=1) + "\n")
