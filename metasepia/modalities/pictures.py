"""Opening pictures that strangers send: formats, size before decoding, one grey or colour plane."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metasepia.errors import InvalidRequest
from metasepia.modalities.media import Prepared

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Of what Pillow knows, those that hold pixels and nothing that runs."""
MAX_PIXELS = 2**24
"""A larger picture is refused by its header, before any of it is decoded."""
PIXELS_A_TOKEN = 10_000
"""Decoding so many pixels takes about as long as a token of text."""

Picture = bytes | np.ndarray
"""The bytes of a file in one of `FORMATS` (its first frame counts), or uint8 [height, width] or [height, width, 3 or
4]."""


def tokens_of(num_pixels: int) -> int:
    return 1 + num_pixels // PIXELS_A_TOKEN


def prepare(pictures: Sequence[Picture]) -> list[Prepared[Picture]]:
    """Raises InvalidRequest naming `items[i]` for what is not a picture, has no pixels or more than `MAX_PIXELS`."""
    prepared: list[Prepared[Picture]] = []
    for i, picture in enumerate(pictures):
        name = f"items[{i}]"
        with _opened(picture, name) as image:
            width, height = image.size
        if width * height > MAX_PIXELS:
            limit = f"at most {MAX_PIXELS} are decoded: send a smaller picture"
            raise InvalidRequest(name, f"{width} x {height} pixels; {limit}")
        prepared.append(Prepared(name, picture, tokens_of(width * height)))
    return prepared


def decode(prepared: Prepared[Picture]) -> Image.Image:
    """The upright picture in mode RGB, or I;16 where it is 16-bit grey; what is transparent shows white.

    Raises InvalidRequest for a body that is cut short or broken, and for pixels that are not 8 or 16 bits a channel.
    """
    with _opened(prepared.content, prepared.name) as image:
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # decoders meet strangers' bytes and raise whatever they please
            raise InvalidRequest(prepared.name, f"the picture is broken ({error})") from None
        if image.mode in ("I", "F"):
            raise InvalidRequest(prepared.name, f"its pixels are of mode {image.mode}; save it with 8 bits a channel")
        if image.mode.startswith("I;16"):
            return image
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def _opened(picture: Picture, name: str) -> Image.Image:
    if isinstance(picture, np.ndarray):
        grey_or_colour = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        if picture.dtype != np.uint8 or not grey_or_colour or not picture.size:
            shape = f"{picture.dtype} {list(picture.shape)}"
            raise InvalidRequest(name, f"must be uint8 [height, width] or [height, width, 3 or 4], got {shape}")
        return Image.fromarray(picture)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit, and an error
            return Image.open(io.BytesIO(picture), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidRequest(name, f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InvalidRequest(name, f"more pixels than {MAX_PIXELS}: send a smaller picture") from None
    except Exception as error:  # as in `decode`
        raise InvalidRequest(name, f"the picture is broken ({error})") from None
