"""Finds a causal checkpoint, digests it, converts a GGUF once, and loads it.

A source is `package:<distribution>` (its GGUF is found by path; the package is never imported), a Hugging Face
directory with safetensors, or a .gguf file.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from metasepia.prepared import PreparedBackbone


def prepare(source: str, home: Path) -> PreparedBackbone:
    """Makes `source` ready under `home`/backbones/<digest>, or finds it there.

    Safe for two processes at once and after a kill: everything is written beside its place and renamed. Raises
    InvalidSettings for a source that does not exist, is not causal, or holds pickled weights.
    """
    raise NotImplementedError


def load(prepared: PreparedBackbone, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model in evaluation mode, no parameter asking for a gradient. Raises CorruptArtefact for unreadable files."""
    raise NotImplementedError
