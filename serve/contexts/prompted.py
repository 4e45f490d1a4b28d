"""Vectors by the protocols `vanilla` and `loo`: examples and queries read in a backbone's prompts, the prefix once.

What a prompt is stands in `metasepia.reasoning.protocols`; here its tokens become rows whose `prefix` is the prompt of
all examples, which the backbone reads once and keeps.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.messages import Receipt
from metasepia.errors import InvalidRequest, WindowExceeded
from metasepia.reasoning.named import NamedContext
from metasepia.reasoning.protocols import Demonstrations, Prompt, PromptTokenizer
from metasepia.rows import Executed, HiddenStatesWanted, Row
from serve.models.prompts import Prompts, away
from serve.parts import Backbone
from serve.requests.deadlines import Deadline


@dataclass(frozen=True)
class Read:
    """Unit-norm vectors, tokens of the prompts they came from, and what read them."""

    vectors: np.ndarray
    """float32 [texts, width]"""
    num_tokens: int
    executed: Executed | None
    """None where there was nothing to read."""

    def receipt(self, request_digest: str) -> Receipt:
        assert self.executed is not None
        return Receipt.of(self.executed, request=request_digest)


class Prompted:
    """The examples of a context as a backbone's prompt."""

    def __init__(self, backbone: Backbone, shown: Demonstrations, protocol: str) -> None:
        self._backbone, self._shown, self._protocol = backbone, shown, protocol

    @classmethod
    async def of(cls, named: NamedContext, fields: Sequence[str], backbone: Backbone, prompts: Prompts) -> "Prompted":
        """`fields` names each example for complaints. Raises WindowExceeded for more than the window holds."""
        texts = [str(one.content) for one in named.examples]

        def tokenise() -> Demonstrations:
            tokenizer = PromptTokenizer(prompts.tokenizer, backbone.prepared.window)
            return Demonstrations(tokenizer, texts, named.labels, seed=named.seed)

        try:
            return cls(backbone, await away(sum(map(len, texts)), tokenise), named.protocol)
        except InvalidRequest as error:
            found = re.fullmatch(r"examples\[(\d+)\]\.text", error.param or "")
            if found is None or isinstance(error, WindowExceeded):
                raise
            raise InvalidRequest(fields[int(found[1])], error.message) from None

    async def examples(self, deadline: Deadline) -> Read:
        """In the order of the context."""
        num_examples = len(self._shown)
        if self._protocol == "vanilla":
            spans = tuple(self._shown.vanilla(i).span for i in range(num_examples))
            return await self._read([self._row(self._shown.token_ids, spans, deadline)])
        return await self._read([self._of(self._shown.left_out(i), deadline) for i in range(num_examples)])

    async def queries(self, texts: Sequence[str], fields: Sequence[str], deadline: Deadline) -> Read:
        """Each text after all examples. Raises WindowExceeded and InvalidRequest naming the field."""
        pairs = list(zip(texts, fields, strict=True))
        prompts = await away(sum(map(len, texts)), lambda: [self._shown.query(*pair) for pair in pairs])
        return await self._read([self._of(prompt, deadline) for prompt in prompts])

    def _of(self, prompt: Prompt, deadline: Deadline) -> Row:
        return self._row(prompt.token_ids, (prompt.span,), deadline)

    def _row(self, token_ids: tuple[int, ...], spans: tuple[tuple[int, int], ...], deadline: Deadline) -> Row:
        return Row(
            request_id=f"embd-{uuid.uuid4().hex}",
            backbone=self._backbone.prepared.digest,
            token_ids=token_ids,
            deadline_unix_s=deadline.unix_s,
            want="hidden_states",
            hidden=HiddenStatesWanted(layers=(-1,), pooling="spans", spans=spans),
            prefix=self._shown.token_ids,
        )

    async def _read(self, rows: list[Row]) -> Read:
        if not rows:
            return Read(np.empty((0, self._backbone.prepared.hidden_size), np.float32), 0, None)
        answers = await self._backbone.hidden_states(rows)
        vectors = np.concatenate([one.states[0] for one in answers]).astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Read(vectors, sum(len(row.token_ids) for row in rows), answers[0].executed)
