"""Prompts as rows of a served backbone against the library's own reading of them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from metasepia.backbone import ReferenceBackbone
from metasepia.errors import InvalidRequest, WindowExceeded
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.reasoning.named import EncoderName, Example, NamedContext
from metasepia.reasoning.prompted import PromptedEncoder
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk
from serve.contexts.prompted import Prompted
from serve.models.prompts import Prompts
from serve.requests.deadlines import Deadline
from tests import tiny

EXAMPLES = [Example("fine", "good"), Example("dull and long", "bad"), Example("so so", "bad"), Example("a gem", "good")]


class OneProcess:
    """A backbone without a gang, and the rows that it was asked."""

    id = "tiny"

    def __init__(self, directory: Path, home: Path) -> None:
        self.prepared: PreparedBackbone = checkpoints.prepare(str(directory), home)
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)
        self._reference = ReferenceBackbone(self.model, self.prepared.digest)
        self.asked: list[Row] = []

    async def score(self, rows: Sequence[Row]) -> list[Scores]:
        raise NotImplementedError

    async def hidden_states(self, rows: Sequence[Row]) -> list[HiddenStates]:
        self.asked += rows
        return [await self._reference.hidden_states(row) for row in rows]

    def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        raise NotImplementedError

    async def load(self) -> dict[str, float]:
        return {}


def context(examples: Sequence[Example], protocol: str, backbone: OneProcess) -> NamedContext:
    encoder = EncoderName(backbone.id, backbone.prepared.digest)
    return NamedContext.of("text", examples, encoder=encoder, module="0" * 64, protocol=protocol, seed=4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("protocol", ["vanilla", "loo"])
def test_rows_give_the_librarys_vectors_and_name_the_prefix(
    protocol: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = OneProcess(tiny_checkpoint("llama"), tmp_path)
    named = context(EXAMPLES, protocol, backbone)
    prompts = Prompts(Path(backbone.prepared.tokenizer_dir), backbone.id)
    texts = [str(one.content) for one in named.examples]
    fields = [f"examples[{i}].text" for i in named.given]

    async def served() -> tuple[np.ndarray, np.ndarray]:
        deadline = Deadline(60.0, time.time() + 60)
        prompted = await Prompted.of(named, fields, backbone, prompts)
        examples = await prompted.examples(deadline)
        queries = await prompted.queries(["meh", "great"], ["inputs[0]", "inputs[1]"], deadline)
        assert queries.num_tokens == sum(len(row.token_ids) for row in backbone.asked[-2:])
        return examples.vectors, queries.vectors

    examples, queries = asyncio.run(served())
    encoder = PromptedEncoder(backbone.model, tiny.tokenizer(), backbone.prepared.window)
    own = encoder.examples(protocol, texts, named.labels, seed=named.seed)
    np.testing.assert_allclose(examples, own.vectors, atol=1e-4)
    np.testing.assert_allclose(queries, own.embed(["meh", "great"]), atol=1e-4)
    prefixes = {row.prefix for row in backbone.asked}
    assert len(prefixes) == 1
    assert all(row.token_ids[: len(row.prefix)] == row.prefix for row in backbone.asked[-2:])


def test_what_the_window_does_not_hold_and_a_text_without_tokens_are_refused_by_their_fields(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = OneProcess(tiny_checkpoint("llama"), tmp_path)
    prompts = Prompts(Path(backbone.prepared.tokenizer_dir), backbone.id)

    async def read(examples: Sequence[Example], query: str) -> None:
        named = context(examples, "loo", backbone)
        prompted = await Prompted.of(named, [f"examples[{i}].text" for i in named.given], backbone, prompts)
        await prompted.queries([query], ["inputs[0]"], Deadline(60.0, time.time() + 60))

    with pytest.raises(WindowExceeded, match=r"examples: \d+ tokens do not fit the window of 256 .* \"stream\""):
        asyncio.run(read([*EXAMPLES, Example("long " * 50, "bad")], "meh"))
    with pytest.raises(WindowExceeded, match=r"inputs\[0\]: \d+ tokens .* fewer or shorter examples"):
        asyncio.run(read(EXAMPLES, "long " * 40))
    with pytest.raises(InvalidRequest, match=r"examples\[4\]\.text: the text has no tokens"):
        asyncio.run(read([*EXAMPLES, Example("", "bad")], "meh"))
