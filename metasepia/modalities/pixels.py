"""Pictures as their own vectors, without weights: what there is to classify by when nothing was learnt.

The recipe: grey by ITU-R BT.601 (white under what is transparent), resized to `side` x `side` without keeping the
aspect (bilinear, over the whole area when it shrinks), read row by row; then the mean is taken away and the length made
1, so that brightness and contrast do not count. A picture of one colour is the vector of zeros.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from metasepia.digests import digest_of
from metasepia.errors import InvalidSettings
from metasepia.modalities import pictures
from metasepia.modalities.media import MediaEncoder, Prepared, unit_norm
from metasepia.modalities.pictures import Picture

SIDE = 16
"""The default. On halves of mnist and digits8x8 sides from 8 to 20 differ by two points at most."""


class PixelEncoder(MediaEncoder[Picture]):
    """The recipe above; one digest for one side."""

    modality = "image"

    def __init__(self, side: int = SIDE, *, max_batch_tokens: int = 1024) -> None:
        """Raises InvalidSettings for a side that is not from 2 to 128."""
        if not 2 <= side <= 128:
            raise InvalidSettings("source", f"pixels:{side}", "pixels:<side>, a side from 2 to 128")
        self.side, self.width, self.max_batch_tokens = side, side * side, max_batch_tokens
        self.window = pictures.tokens_of(pictures.MAX_PIXELS)
        recipe = {"grey": "bt601-on-white", "resize": "bilinear", "side": side, "mean": 0, "unit_norm": True}
        self.digest = digest_of({"kind": "encoder", "modality": "image", "pixels": recipe})
        file = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
        self.probe = file.getvalue()

    @classmethod
    def load(cls, source: str, *, max_batch_tokens: int = 1024) -> "PixelEncoder":
        """From `pixels` or `pixels:<side>`. Raises InvalidSettings."""
        _, colon, side = source.partition(":")
        if not colon:
            return cls(max_batch_tokens=max_batch_tokens)
        if not (side.isascii() and side.isdigit()):
            raise InvalidSettings("source", source, "pixels, or pixels:<side>, a side from 2 to 128")
        return cls(int(side), max_batch_tokens=max_batch_tokens)

    def tokenize(self, items: Sequence[Picture]) -> list[Prepared[Picture]]:
        return pictures.prepare(items)

    def forward(self, prepared: Sequence[Prepared[Picture]]) -> Float[np.ndarray, "items width"]:
        flat = np.stack([self._grey(pictures.decode(one)).ravel() for one in prepared])
        return unit_norm(flat - flat.mean(axis=1, keepdims=True))

    def _grey(self, image: Image.Image) -> Float[np.ndarray, "side side"]:
        """From 0 (black) to 255, fractions kept."""
        if image.mode == "RGB":
            grey = image.convert("L").convert("F")
        else:  # 16 bits; Pillow's own conversion would cut them off at 255
            grey = Image.fromarray(np.asarray(image).astype(np.float32) / 257)
        return np.asarray(grey.resize((self.side, self.side), Image.Resampling.BILINEAR))
