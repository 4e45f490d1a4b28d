"""Pictures to vectors by any vision transformer in a Hugging Face directory: the mean of its last hidden states.

The directory's own preprocessor_config.json prepares the pixels (on Pillow, so that no other machine's backend gives
other numbers). float32 on every device.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel

from metasepia.digests import digest_of_safetensors
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported
from metasepia.modalities import pictures
from metasepia.modalities.media import MediaEncoder, Prepared, unit_norm
from metasepia.modalities.pictures import Picture

FAMILIES = ("beit", "clip_vision_model", "deit", "dinov2", "siglip_vision_model", "swin", "vit")
"""Those whose last hidden states are [pictures, patches, width]."""
_PREPROCESSOR = "preprocessor_config.json"


class VisionEncoder(MediaEncoder[Picture]):
    """Owns a vision transformer and the processor of its pixels."""

    modality = "image"

    def __init__(self, model: Any, processor: Any, *, digest: str, max_batch_tokens: int) -> None:
        self._model, self._processor, self.digest = model, processor, digest
        self.width, self.device, self.max_batch_tokens = model.config.hidden_size, model.device.type, max_batch_tokens
        file = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, "PNG")
        self.probe = file.getvalue()
        ready = self._pixels([Prepared("probe", self.probe, 1)])
        with torch.inference_mode():
            self._num_tokens: int = self._model(pixel_values=ready).last_hidden_state.shape[1]
        self.window = self._num_tokens + pictures.tokens_of(pictures.MAX_PIXELS)

    @classmethod
    def load(
        cls, folder: Path, device: Literal["cpu", "cuda"] = "cpu", *, max_batch_tokens: int = 1024
    ) -> "VisionEncoder":
        """From a directory with config.json, preprocessor_config.json and safetensors weights.

        Raises NotSupported for a model of no family in `FAMILIES`, CorruptArtefact for files that are missing, do not
        parse or do not load whole, InvalidSettings for a device that is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise InvalidSettings("device", "cuda", "cpu on a machine without a CUDA device")
        try:
            parts = {name: json.loads((folder / name).read_text()) for name in ("config.json", _PREPROCESSOR)}
        except (OSError, ValueError) as error:
            raise CorruptArtefact(str(folder), f"no readable config.json or {_PREPROCESSOR} ({error})") from None
        family = parts["config.json"].get("model_type")
        if family not in FAMILIES:
            raise NotSupported(f"a picture encoder of type {family!r}", f"use one of {', '.join(FAMILIES)}")
        try:
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            model, loaded = AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CorruptArtefact(str(folder), f"transformers cannot load it ({error})") from error
        missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key and "head." not in key)
        if missing or loaded["mismatched_keys"]:
            raise CorruptArtefact(
                str(folder), f"its weights lack {', '.join(missing[:5]) or 'the shapes of its config'}"
            )
        recipe = {"decode": "rgb-on-white", "pooling": "mean", "unit_norm": True}
        header = {"kind": "encoder", "modality": "image", "vision": recipe, **parts}
        digest = digest_of_safetensors(header, sorted(folder.glob("*.safetensors")))
        model = model.requires_grad_(False).eval().to(device)
        return cls(model, processor, digest=digest, max_batch_tokens=max_batch_tokens)

    def tokenize(self, items: Sequence[Picture]) -> list[Prepared[Picture]]:
        """A token for each patch, and what decoding costs."""
        prepared = pictures.prepare(items)
        return [Prepared(one.name, one.content, one.num_tokens + self._num_tokens) for one in prepared]

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """As they come: all have one size once they are prepared."""
        batches: list[list[int]] = []
        room = 0
        for i, length in enumerate(lengths):
            if length > room:
                batches.append([])
                room = self.max_batch_tokens
            batches[-1].append(i)
            room -= length
        return batches

    @torch.inference_mode()
    def forward(self, prepared: Sequence[Prepared[Picture]]) -> Float[np.ndarray, "items width"]:
        states = self._model(pixel_values=self._pixels(prepared)).last_hidden_state
        return unit_norm(states.mean(dim=1).float().cpu().numpy())

    def _pixels(self, prepared: Sequence[Prepared[Picture]]) -> torch.Tensor:
        images = [_colour(pictures.decode(one)) for one in prepared]
        return self._processor(images, return_tensors="pt")["pixel_values"].to(self.device)


def _colour(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits a channel."""
    if image.mode == "RGB":
        return image
    return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8)).convert("RGB")
