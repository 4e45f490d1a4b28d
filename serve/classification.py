"""The adaptation path of in-context reasoning (TART): examples and inputs embedded, then one question to the pool."""

import dataclasses
from typing import Any

import numpy as np

from actors.messages import Classified, Classify, LabelledVectors
from serve.deadlines import Deadline
from serve.embedding import Embedding
from serve.parts import Reasoning
from serve.receipts import receipt_json
from serve.schemas import ClassifyRequest


class Classification:
    """Answers /v1/classify: one embedding of all texts, one question to the pool."""

    def __init__(self, embedding: Embedding, reasoning: Reasoning, default_encoder: str) -> None:
        self._embedding, self._reasoning, self._default = embedding, reasoning, default_encoder

    async def classify(self, request: ClassifyRequest, request_digest: str, deadline: Deadline) -> dict[str, Any]:
        """The answer's JSON. `model` is `<encoder>+<reasoning module>`.

        Raises UnknownName for the encoder, WindowExceeded naming the text.
        """
        encoder = request.encoder or self._default
        texts = [one.text for one in request.examples] + request.inputs
        fields = [f"examples[{i}].text" for i in range(len(request.examples))]
        fields += [f"inputs[{i}]" for i in range(len(request.inputs))]
        embedded = await self._embedding.embed(encoder, texts, fields, deadline, request_digest)
        num_examples = len(request.examples)
        async with deadline.limit("the classification"):
            classified = await self._reasoning.classify(
                Classify(
                    module=self._reasoning.digest,
                    context=LabelledVectors(
                        vectors=np.ascontiguousarray(embedded.vectors[:num_examples]),
                        labels=tuple(one.label for one in request.examples),
                        seed=request.seed,
                    ),
                    queries=np.ascontiguousarray(embedded.vectors[num_examples:]),
                    deadline_unix_s=deadline.unix_s,
                )
            )
        receipt = dataclasses.replace(
            embedded.receipt, context=classified.context, module=classified.module, seed=request.seed
        )
        return {
            "model": f"{encoder}+{self._reasoning.name}",
            "results": results_json(classified),
            "usage": {"prompt_tokens": embedded.num_tokens, "total_tokens": embedded.num_tokens},
            "receipt": receipt_json(receipt),
        }


def results_json(classified: Classified) -> list[dict[str, Any]]:
    """For each query the likeliest label (the first in order of `classes` at a tie) and all probabilities."""
    best = classified.probabilities.argmax(axis=1)
    return [
        {"label": classified.classes[at], "probabilities": dict(zip(classified.classes, row, strict=True))}
        for at, row in zip(best.tolist(), classified.probabilities.astype(float).tolist(), strict=True)
    ]
