"""Pictures to vectors: what is decoded, what is refused, and the recipes against slow ways."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, ViTConfig

from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, NotSupported
from metasepia.modalities import pictures
from metasepia.modalities.loading import load
from metasepia.modalities.pixels import PixelEncoder
from metasepia.modalities.vision import VisionEncoder


def file_of(image: Image.Image, format: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **more)
    return file.getvalue()


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)


def test_a_grey_picture_of_the_right_size_is_itself_without_mean_and_length(noise: np.ndarray):
    flat = noise.ravel().astype(np.float64)
    expected = (flat - flat.mean()) / np.linalg.norm(flat - flat.mean())
    for one in (noise, file_of(Image.fromarray(noise))):
        np.testing.assert_allclose(PixelEncoder(16).embed([one])[0], expected, atol=1e-6)


def test_a_picture_that_shrinks_is_weighted_by_a_triangle_over_all_its_pixels():
    noise = np.random.default_rng(1).integers(0, 256, (24, 24), dtype=np.uint8)
    centres, pixels = (np.arange(8) + 0.5) * 3, np.arange(24) + 0.5
    weights = np.maximum(0, 1 - np.abs(pixels - centres[:, None]) / 3)
    weights /= weights.sum(axis=1, keepdims=True)
    small = (weights @ noise @ weights.T).ravel()
    small -= small.mean()
    np.testing.assert_allclose(PixelEncoder(8).embed([noise])[0], small / np.linalg.norm(small), atol=1e-4)


def test_brightness_and_contrast_do_not_count_but_inversion_does(noise: np.ndarray):
    dim = (noise // 4 * 2 + 30).astype(np.uint8)
    one, other, inverse = PixelEncoder(16).embed([(noise // 4 * 4).astype(np.uint8), dim, 255 - noise // 4 * 4])
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(one, -inverse, atol=1e-6)


def test_one_colour_is_the_vector_of_zeros():
    plain = Image.new("RGB", (5, 7), "red")
    assert not PixelEncoder().embed([file_of(plain)]).any()


def test_colour_formats_alpha_and_depth_give_one_vector(noise: np.ndarray):
    grey = Image.fromarray(noise)
    white = np.full_like(noise, 255)
    hidden = np.where(np.indices(noise.shape)[0] < 8, 0, 255).astype(np.uint8)
    half_hidden = np.dstack([noise, noise, noise, hidden])
    on_white = np.where(hidden > 0, noise, white)
    same = [
        file_of(grey, "BMP"),
        file_of(grey.convert("RGB")),
        file_of(grey, "TIFF"),
        file_of(grey, "WEBP", lossless=True),
        file_of(Image.fromarray(noise.astype(np.uint16) * 257)),
        np.dstack([noise] * 3),
    ]
    expected = PixelEncoder(16).embed([noise])
    np.testing.assert_allclose(PixelEncoder(16).embed(same), np.repeat(expected, len(same), 0), atol=1e-6)
    np.testing.assert_allclose(
        PixelEncoder(16).embed([half_hidden, file_of(Image.fromarray(half_hidden))]),
        np.repeat(PixelEncoder(16).embed([on_white]), 2, 0),
        atol=1e-6,
    )


def test_a_picture_taken_sideways_is_turned_upright(noise: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by a quarter, clockwise
    sideways = file_of(Image.fromarray(noise), exif=exif)
    np.testing.assert_allclose(
        PixelEncoder(16).embed([sideways]), PixelEncoder(16).embed([np.rot90(noise, -1).copy()]), atol=1e-6
    )


def test_the_first_frame_counts(noise: np.ndarray):
    first, second = Image.fromarray(noise), Image.fromarray(255 - noise)
    moving = file_of(first, "TIFF", save_all=True, append_images=[second])
    np.testing.assert_allclose(PixelEncoder(16).embed([moving]), PixelEncoder(16).embed([noise]), atol=1e-6)


WHOLE = file_of(Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b"", "not a picture in one of the formats PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in one of the formats"),
        (WHOLE[: len(WHOLE) // 2], "the picture is broken"),
        (WHOLE[:200] + b"\xff" * (len(WHOLE) - 200), "the picture is broken"),
        (file_of(Image.new("F", (4, 4)), "TIFF"), "its pixels are of mode F"),
        (np.zeros((4, 4), np.float32), "must be uint8"),
        (np.zeros((4, 4, 2), np.uint8), "must be uint8"),
        (np.zeros((0, 4), np.uint8), "must be uint8"),
    ],
)
def test_what_is_not_a_whole_picture_is_refused_by_its_place(bad: Any, complaint: str):
    with pytest.raises(InvalidRequest, match=complaint) as raised:
        PixelEncoder().embed([WHOLE, bad])
    assert raised.value.param == "items[1]"


@pytest.mark.parametrize("side", [4097, 20_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int, monkeypatch: pytest.MonkeyPatch):
    bomb = file_of(Image.new("1", (side, side)))
    assert len(bomb) < 200_000 and side * side > pictures.MAX_PIXELS
    encoder = PixelEncoder()
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InvalidRequest, match=r"items\[0\]: .*at most 16777216 are decoded|more pixels than 16777216"):
        encoder.tokenize([bomb])


def test_a_large_picture_costs_more_of_a_round():
    small, large = PixelEncoder().tokenize([np.zeros((8, 8), np.uint8), np.zeros((1000, 1000), np.uint8)])
    assert (len(small), len(large)) == (1, 101)


def test_no_batch_is_larger_than_asked_and_lengths_do_not_mix():
    lengths = [3, 1, 3, 3, 1, 9]
    batches = PixelEncoder(max_batch_tokens=6).plan(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
    assert all(sum(lengths[i] for i in batch) <= 6 or len(batch) == 1 for batch in batches)


def test_the_digest_is_that_of_the_recipe():
    assert load("image", "pixels").digest == load("image", "pixels:16").digest == PixelEncoder(16).digest
    assert load("image", "pixels:8").digest != PixelEncoder(16).digest


@pytest.mark.parametrize(
    "source", ["pixels:", "pixels:1", "pixels:129", "pixels:x", "pixels:-4", "nowhere", "package:x-y"]
)
def test_a_source_that_is_none_is_refused(source: str):
    with pytest.raises(InvalidSettings, match=source):
        load("image", source)


def test_pixels_need_no_torch():
    program = (
        "import sys; from metasepia.modalities.loading import load; e = load('image', 'pixels'); e.embed([e.probe]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
    "do_rescale": True, "do_normalize": True, "image_mean": [0.4] * 3, "image_std": [0.3] * 3,
}  # fmt: skip


def vision_directory(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.mark.parametrize("config", [ViTConfig(**SIZES), Dinov2Config(**SIZES)], ids=lambda one: one.model_type)
def test_a_vision_transformer_agrees_with_transformers_one_picture_at_a_time(tmp_path: Path, config: Any):
    folder = vision_directory(tmp_path, config)
    rng = np.random.default_rng(0)
    some = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(5)]
    model = AutoModel.from_pretrained(folder).eval()
    expected = []
    for one in some:
        pixels = (torch.from_numpy(one).permute(2, 0, 1)[None].float() / 255 - 0.4) / 0.3
        with torch.no_grad():
            mean = model(pixel_values=pixels).last_hidden_state[0].mean(dim=0)
        expected.append((mean / mean.norm()).numpy())
    encoder = load("image", str(folder), max_batch_tokens=40)
    np.testing.assert_allclose(encoder.embed(some), expected, atol=1e-5)
    assert encoder.embed([encoder.probe]).shape == (1, 16)


def test_a_vision_directory_that_is_none_is_refused(tmp_path: Path):
    folder = vision_directory(tmp_path, ViTConfig(**SIZES))
    digest = VisionEncoder.load(folder).digest
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "convnext"}))
    with pytest.raises(NotSupported, match="of type 'convnext' is not supported; use one of beit"):
        VisionEncoder.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"image_mean": [0.5] * 3}))
    assert VisionEncoder.load(folder).digest != digest
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CorruptArtefact, match=r"preprocessor_config\.json"):
        VisionEncoder.load(folder)
