"""The verbs of a backbone over one stream of answers a row. No torch: the owner of a gang speaks so too."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from metasepia.rows import HiddenStates, Row, Scores, TokenChunk, Want

if TYPE_CHECKING:
    from metasepia.backbone import Capability


class AsksRows(ABC):
    """A `Backbone` whose rows are all asked for by `_ask`."""

    capabilities: "frozenset[Capability]" = frozenset(("generate", "score", "hidden_states", "row_adapters"))

    @abstractmethod
    def _ask(self, row: Row, want: Want) -> AsyncGenerator[TokenChunk | Scores | HiddenStates]:
        """Everything that the row is answered with, in order, whatever the row itself wants.

        Raises what refused the row. Closing the iterator drops the row.
        """

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        """The row's tokens as they are chosen. Closing the iterator drops the row. Raises what refused the row."""
        async with aclosing(self._ask(row, "tokens")) as answers:
            async for answer in answers:
                assert isinstance(answer, TokenChunk)
                yield answer

    async def score(self, row: Row) -> Scores:
        """Log-probabilities of the row's own tokens."""
        return await self._ask_once(row, "logprobs")

    async def hidden_states(self, row: Row) -> HiddenStates:
        return await self._ask_once(row, "hidden_states")

    async def _ask_once(self, row: Row, want: Want) -> Any:
        async with aclosing(self._ask(row, want)) as answers:
            async for answer in answers:
                return answer
        raise AssertionError("no answer")
