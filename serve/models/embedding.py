"""Vectors of texts, pictures and sounds: an encoder's, or of texts a backbone's mean-pooled last hidden states; of unit
norm either way."""

import base64
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from actors.messages import EncoderInfo, Media, Receipt, Texts
from metasepia.errors import InvalidRequest, NotSupported, UnknownName, WindowExceeded
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import HiddenStatesWanted, Row
from serve.models.names import Names
from serve.models.prompts import Prompts, away
from serve.parts import Backbone, TextEncoder
from serve.requests import arrow
from serve.requests.deadlines import Deadline
from serve.requests.failures import unwrap
from serve.requests.receipts import receipt_json
from serve.requests.schemas import EmbeddingsRequest

Item = str | list[int] | bytes
"""A text, a text as token ids, or the bytes of a file that holds an image or a sound."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Unit-norm vectors and what made them."""

    vectors: np.ndarray
    """float32 [texts, width]"""
    num_tokens: int
    receipt: Receipt
    """Of the encoder (`encoder`), or of a backbone (`backbone`, `path`, `dtype`, `tp_size`)."""


class Embedding:
    """Embeds with whatever answers to a name."""

    def __init__(self, names: Names, prompts: dict[str, Prompts]) -> None:
        self._names, self._prompts = names, prompts

    async def embed(
        self, name: str, items: Sequence[Item], fields: Sequence[str], deadline: Deadline, request_digest: str
    ) -> Embedded:
        """The vectors of `items`; `fields` names each one for complaints.

        Raises UnknownName with the known names, WindowExceeded and InvalidRequest naming the field.
        """
        if name in self._names.encoders:
            return await self._by_encoder(self._names.encoders[name], items, fields, deadline, request_digest)
        if name in self._names.backbones:
            return await self._by_backbone(self._names.backbones[name], items, fields, deadline, request_digest)
        raise UnknownName("encoder", name, (*self._names.encoders, *self._names.backbones))

    async def _by_encoder(
        self,
        encoder: TextEncoder,
        items: Sequence[Item],
        fields: Sequence[str],
        deadline: Deadline,
        request_digest: str,
    ) -> Embedded:
        async with deadline.limit("the embedding"):
            info = await encoder.info()
            message = _message(info, items, fields, deadline)
            try:
                vectors, num_tokens = await encoder.embed(message)
            except Exception as error:
                raise _in_fields(unwrap(error), fields) from None
        receipt = Receipt(request=request_digest, encoder=info.digest)
        return Embedded(vectors=vectors, num_tokens=num_tokens, receipt=receipt)

    async def _by_backbone(
        self,
        backbone: Backbone,
        items: Sequence[Item],
        fields: Sequence[str],
        deadline: Deadline,
        request_digest: str,
    ) -> Embedded:
        prepared, prompts = backbone.prepared, self._prompts[backbone.id]
        request_id = f"embd-{uuid.uuid4().hex}"
        num_chars = sum(len(item) for item in items)
        sequences = await away(num_chars, lambda: sequences_of(items, fields, prepared, prompts))
        rows = [
            Row(
                request_id=f"{request_id}-{index}",
                backbone=prepared.digest,
                token_ids=token_ids,
                deadline_unix_s=deadline.unix_s,
                want="hidden_states",
                hidden=HiddenStatesWanted(layers=(-1,), pooling="mean"),
            )
            for index, token_ids in enumerate(sequences)
        ]
        async with deadline.limit("the embedding"):
            answers = await backbone.hidden_states(rows)
        vectors = np.stack([one.states[0] for one in answers]).astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embedded(
            vectors=vectors,
            num_tokens=sum(len(row.token_ids) for row in rows),
            receipt=Receipt.of(answers[0].executed, request=request_digest),
        )


def _message(info: EncoderInfo, items: Sequence[Item], fields: Sequence[str], deadline: Deadline) -> Texts | Media:
    """Raises NotSupported naming the field of an item that the encoder does not read."""
    texts: list[str] = []
    files: list[bytes] = []
    for item, field in zip(items, fields, strict=True):
        if info.modality == "text" and isinstance(item, str):
            texts.append(item)
        elif info.modality != "text" and isinstance(item, bytes):
            files.append(item)
        else:
            kinds: dict[type, str] = {str: "a text", bytes: "a file", list: "token ids"}
            wanted = "texts" if info.modality == "text" else f'objects like {{"{info.modality}": "<base64>"}}'
            raise NotSupported(f"{field} as {kinds[type(item)]} for the encoder {info.id}", f"send {wanted}")
    if info.modality == "text":
        return Texts(encoder=info.digest, texts=tuple(texts), deadline_unix_s=deadline.unix_s)
    return Media(encoder=info.digest, items=tuple(files), deadline_unix_s=deadline.unix_s)


def sequences_of(
    items: Sequence[Item], fields: Sequence[str], prepared: PreparedBackbone, prompts: Prompts
) -> list[tuple[int, ...]]:
    """Token ids of each text. Raises WindowExceeded and InvalidRequest naming the field."""
    found: list[tuple[int, ...]] = []
    for item, field in zip(items, fields, strict=True):
        if isinstance(item, bytes):
            raise NotSupported(f"{field} as a file for a causal backbone", "send texts, or name another encoder")
        if isinstance(item, str) and (num_tokens := prompts.at_least(item)) > prepared.window:
            raise WindowExceeded(field, num_tokens, prepared.window)
        token_ids = prompts.plain(item) if isinstance(item, str) else tuple(item)
        if not token_ids:
            raise InvalidRequest(field, "the text has no tokens")
        if len(token_ids) > prepared.window:
            raise WindowExceeded(field, len(token_ids), prepared.window)
        if not all(0 <= token < prepared.vocab_size for token in token_ids):
            raise InvalidRequest(field, f"token ids must be from 0 to {prepared.vocab_size - 1}")
        found.append(token_ids)
    return found


def _in_fields(error: BaseException, fields: Sequence[str]) -> BaseException:
    """An encoder's complaint about `texts[i]` or `items[i]`, about the request's field instead."""
    param = getattr(error, "param", None)
    found = re.fullmatch(r"(?:texts|items)\[(\d+)\]", param) if isinstance(param, str) else None
    if found is None or int(found[1]) >= len(fields):
        return error
    field = fields[int(found[1])]
    if isinstance(error, WindowExceeded):
        return WindowExceeded(field, error.num_tokens, error.window)
    return InvalidRequest(field, error.message) if isinstance(error, InvalidRequest) else error


def shortened(
    vectors: Float[np.ndarray, "texts width"], dimensions: int | None
) -> Float[np.ndarray, "texts dimensions"]:
    """The first `dimensions` numbers of each, of unit norm again. Raises InvalidRequest for more than there are."""
    width = vectors.shape[1]
    if dimensions is None or dimensions == width:
        return vectors
    if dimensions > width:
        raise InvalidRequest("dimensions", f"the vectors have {width} numbers; ask for as many or fewer")
    kept = vectors[:, :dimensions]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


def embeddings_json(request: EmbeddingsRequest, embedded: Embedded) -> dict[str, Any]:
    """OpenAI's answer, with our receipt beside it."""
    vectors = np.ascontiguousarray(shortened(embedded.vectors, request.dimensions), dtype="<f4")
    spelt: list[Any] = (
        [base64.b64encode(vector.tobytes()).decode("ascii") for vector in vectors]
        if request.encoding_format == "base64"
        else vectors.tolist()
    )
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(spelt)]
    return {"object": "list", "data": data, **_about(request, embedded)}


def embeddings_arrow(request: EmbeddingsRequest, embedded: Embedded) -> bytes:
    """The same as an Arrow stream."""
    return arrow.embeddings(shortened(embedded.vectors, request.dimensions), _about(request, embedded))


def _about(request: EmbeddingsRequest, embedded: Embedded) -> dict[str, Any]:
    return {
        "model": request.model,
        "created": int(time.time()),
        "usage": {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens},
        "receipt": receipt_json(embedded.receipt),
    }
