"""Pictures through the door: a real encoder of pixels behind it, scikit-learn's digits in front."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cluster.door_settings import HttpSettings
from cluster.settings import EncoderSettings
from metasepia.modalities.pixels import PixelEncoder
from tests.doors import Bench, NearEncoder
from tests.unit.test_prompts import write_byte_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    pixels = NearEncoder(EncoderSettings(id="pixels", source="pixels", modality="image"))
    bench = Bench(write_byte_tokenizer(tmp_path), HttpSettings(max_body_mib=2), media=[pixels])
    yield bench.with_contexts(tmp_path / "registry")
    pixels.worker.stop()


def file_of(pixels: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def spelt(file: bytes) -> str:
    return base64.b64encode(file).decode()


@pytest.fixture(scope="module")
def digits() -> tuple[list[str], list[str]]:
    """Files in base64, and their digits, for zeros and ones."""
    pictures, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(labels < 2)[:60]
    files = [file_of((pictures[i].reshape(8, 8) * 15).astype(np.uint8)) for i in chosen]
    return [spelt(one) for one in files], [str(labels[i]) for i in chosen]


def examples(digits: tuple[list[str], list[str]], count: int) -> list[dict[str, str]]:
    return [{"image": image, "label": label} for image, label in zip(*digits, strict=True)][:count]


def test_digits_are_told_apart_by_their_pixels(bench: Bench, digits):
    inputs = [{"image": image} for image in digits[0][20:]]
    body = {"examples": examples(digits, 20), "inputs": inputs}
    answer = bench.post("/v1/classify", body)
    assert answer.status_code == 200, answer.text
    said = [one["label"] for one in answer.json()["results"]]
    assert np.mean([a == b for a, b in zip(said, digits[1][20:], strict=True)]) > 0.9
    assert answer.json()["receipt"]["encoder"] == PixelEncoder().digest
    assert answer.json()["usage"]["prompt_tokens"] == 60


def test_a_context_of_pictures_is_named_by_their_bytes_and_answers(bench: Bench, digits):
    some = examples(digits, 20)
    made = bench.post("/v1/contexts", {"examples": some, "encoder": "pixels"}).json()
    as_urls = [{**one, "image": "data:image/png;base64," + one["image"]} for one in reversed(some)]
    again = bench.post("/v1/contexts", {"examples": as_urls, "encoder": "pixels"}).json()
    assert made["id"] == again["id"] and again["cached"] and made["encoder"] == "pixels"
    answer = bench.post("/v1/classify", {"model": made["id"], "inputs": [{"image": digits[0][25]}]})
    assert answer.json()["results"][0]["label"] == digits[1][25]


def test_pictures_are_embedded_as_the_library_embeds_them(bench: Bench):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 3), dtype=np.uint8)
    body = {"model": "pixels", "input": [{"image": spelt(file_of(pixels))}]}
    vector = bench.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(vector, PixelEncoder().embed([pixels])[0], atol=1e-6)


PNG = spelt(file_of(np.eye(8, dtype=np.uint8)))
BOMB = spelt(file_of(np.zeros((5000, 5000), np.uint8)))


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("not base64!", "in base64"),
        ("", "in base64"),
        (7, "in base64"),
        (spelt(b"a text, not a picture"), "not a picture in one of the formats PNG"),
        (PNG[:60] + "A" * (len(PNG) - 60), "broken"),
        (BOMB, "5000 x 5000 pixels; at most 16777216"),
    ],
)
def test_a_bad_picture_is_refused_by_the_name_of_its_field(bench: Bench, image: Any, complaint: str):
    body = {"examples": [{"image": PNG, "label": "a"}, {"image": PNG, "label": "b"}],
            "inputs": [{"image": PNG}, {"image": image}]}  # fmt: skip
    answer = bench.post("/v1/classify", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "inputs[1].image", "invalid_value")
    assert complaint in error["message"]


def test_media_for_the_wrong_encoder_are_refused_with_the_one_that_reads_them(bench: Bench):
    pictures = [{"image": PNG, "label": "a"}, {"image": PNG, "label": "b"}]
    texts = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
    for some, encoder, other, inputs in (
        (pictures, "minilm-fake", "pixels", [{"image": PNG}]),
        (pictures, "tiny", "pixels", [{"image": PNG}]),
        (texts, "pixels", "minilm-fake", ["x"]),
    ):
        answer = bench.post("/v1/classify", {"examples": some, "inputs": inputs, "encoder": encoder})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "not_supported"
        assert encoder in answer.json()["error"]["message"] and other in answer.json()["error"]["message"]
    sound = [{"audio": PNG, "label": "a"}, {"audio": PNG, "label": "b"}]
    answer = bench.post("/v1/classify", {"examples": sound, "inputs": [{"audio": PNG}]})
    assert answer.status_code == 400 and "audio" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("item", "param"),
    [("a text", "input[0]"), ({"image": "?"}, "input[0].image"), ({"video": PNG}, "input[0]"), ([1, 2], "input[0]")],
)
def test_embedding_something_else_by_an_encoder_of_pictures_is_refused(bench: Bench, item: Any, param: str):
    answer = bench.post("/v1/embeddings", {"model": "pixels", "input": [item]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param or param in answer.json()["error"]["message"]


def test_the_list_of_models_says_what_an_encoder_reads(bench: Bench):
    listed = {one["id"]: one["x_info"] for one in bench.get("/v1/models").json()["data"]}
    assert listed["pixels"]["modality"] == "image" and listed["minilm-fake"]["modality"] == "text"


def test_health_decodes_a_picture(bench: Bench):
    assert bench.get("/health").json()["parts"]["encoder pixels"]["ready"]
