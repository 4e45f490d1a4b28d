"""Pictures and sounds to vectors: `media.py` is what the encoders share, `loading.py` finds one by its source; pictures
by `pixels.py` (no weights) or `vision.py` (a Hugging Face directory), sounds by `sounds.py` (decoding) and `whisper.py`
(Whisper's encoder, its weights from a Hugging Face directory or, by `ctranslate2_files.py`, from a CTranslate2 one)."""
