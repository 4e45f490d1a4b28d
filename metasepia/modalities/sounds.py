"""Decoding sounds that strangers send: length and rate before decoding, one channel, one rate.

Needs the extra `audio` (soundfile) for files; samples as an array need nothing.
"""

import importlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.signal import resample_poly

from metasepia.errors import InvalidRequest, NotSupported
from metasepia.modalities.media import Prepared

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
"""Of what libsndfile knows."""
RATES_HZ = (4_000, 192_000)
MAX_CHANNELS = 8
MIN_S = 0.02
RATE_HZ = 16_000
"""That of the encoders here."""
EXTRA = 'pip install "metasepia[audio]"'


@dataclass(frozen=True)
class Samples:
    """A sound as numbers from -1 to 1."""

    samples: np.ndarray
    """float32 [frames] or [frames, channels]"""
    rate_hz: int


Sound = bytes | Samples
"""The bytes of a file in one of `FORMATS`, or samples."""


def num_samples_of(sounds: Sequence[Sound], max_s: float) -> list[int]:
    """How many samples each sound has at `RATE_HZ`, by its header.

    Raises InvalidRequest naming `items[i]` for what is not a sound, is empty, shorter than `MIN_S` or longer than
    `max_s`, or has a rate or channels out of range; NotSupported for files without the extra.
    """
    return [_num_samples(sound, f"items[{i}]", max_s) for i, sound in enumerate(sounds)]


def decode(prepared: Prepared[Sound]) -> Float[np.ndarray, " samples"]:
    """The mean of the channels at `RATE_HZ`. Raises InvalidRequest for a body that is broken, or not finite."""
    sound, name = prepared.content, prepared.name
    if isinstance(sound, Samples):
        samples, rate_hz = sound.samples, sound.rate_hz
    else:
        try:
            with _opened(sound, name) as file:
                samples, rate_hz = file.read(dtype="float32", always_2d=True), file.samplerate
        except _soundfile().LibsndfileError as error:
            raise InvalidRequest(name, f"the sound is broken ({error.error_string})") from None
    mono = samples.astype(np.float32) if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32)
    if not len(mono):
        raise InvalidRequest(name, "the sound is broken (its header promises samples and there are none)")
    if not np.isfinite(mono).all():
        raise InvalidRequest(name, "its samples hold NaN or infinity")
    ratio = Fraction(RATE_HZ, rate_hz).limit_denominator(
        1000
    )  # exact for every common rate; bounds the filter's length
    return resample_poly(mono, ratio.numerator, ratio.denominator).astype(np.float32)


def _num_samples(sound: Sound, name: str, max_s: float) -> int:
    if isinstance(sound, Samples):
        if sound.samples.ndim not in (1, 2):
            raise InvalidRequest(name, f"samples must be [frames] or [frames, channels], got {sound.samples.ndim} axes")
        num_frames, rate_hz = len(sound.samples), sound.rate_hz
        num_channels = sound.samples.shape[1] if sound.samples.ndim == 2 else 1
    else:
        with _opened(sound, name) as file:
            num_frames, rate_hz, num_channels = file.frames, file.samplerate, file.channels
            if file.format not in FORMATS:
                raise InvalidRequest(name, f"a {file.format} file; send one of {', '.join(FORMATS)}")
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        raise InvalidRequest(name, f"{rate_hz} samples a second; from {RATES_HZ[0]} to {RATES_HZ[1]} are read")
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise InvalidRequest(name, f"{num_channels} channels; at most {MAX_CHANNELS} are read")
    length_s = num_frames / rate_hz
    if num_frames <= 0:
        raise InvalidRequest(name, "the sound is empty")
    if length_s < MIN_S:
        raise InvalidRequest(name, f"{length_s:.3g} s of sound; at least {MIN_S:g} s are needed")
    if length_s > max_s:
        raise InvalidRequest(name, f"{length_s:.1f} s of sound; at most {max_s:g} s are read: send a part of it")
    return math.ceil(length_s * RATE_HZ)


def _opened(sound: bytes, name: str) -> Any:
    soundfile = _soundfile()
    try:
        return soundfile.SoundFile(io.BytesIO(sound))
    except soundfile.LibsndfileError as error:
        raise InvalidRequest(
            name, f"not a sound in one of the formats {', '.join(FORMATS)} ({error.error_string})"
        ) from None


def check_extra() -> None:
    """Raises NotSupported naming the extra where it is not installed."""
    _soundfile()


def _soundfile() -> Any:
    try:
        return importlib.import_module("soundfile")  # of the extra: type checkers may not have it
    except ImportError:
        raise NotSupported("reading sounds without the package soundfile", EXTRA) from None
