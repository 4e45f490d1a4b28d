"""The stage `task` of `auto`: which registered data set a request's text could be one of, by an encoder's vector.

Data sets come from two shelves: experts whose own card says where their texts lie, and task embeddings (POST /v1/tasks)
that name an expert. All are read by the first text encoder of the settings; what another one described is left out.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.messages import Texts
from cluster.settings import DispatchMargins
from metasepia.dispatch.centroid import Dispatched
from metasepia.dispatch.task import RegionTable, TextRegion
from metasepia.errors import CorruptArtefact, InvalidRequest, WindowExceeded
from metasepia.registry.entries import Artefact
from serve.models.shelf import Shelf
from serve.parts import Catalogue, TextEncoder
from serve.requests.deadlines import Deadline
from serve.requests.failures import unwrap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """A registered data set that has an expert."""

    expert: str
    """The expert's name, or its digest, as its card says."""
    region: TextRegion


class TaskStage:
    """Regions of data sets, read anew after a change, and the encoder that they are of."""

    def __init__(
        self, catalogue: Catalogue, owner: str, encoders: Sequence[TextEncoder], margins: DispatchMargins
    ) -> None:
        self._encoders, self._margins = tuple(encoders), margins
        self._data_sets: Shelf[DataSet | None] = Shelf(catalogue, "embedding", owner, _data_set)
        self._encoder: TextEncoder | None = None
        self._read: tuple[object, object] = (None, None)
        self._table: RegionTable | None = None

    async def table(self, targets: Mapping[str, str], described: Mapping[str, TextRegion]) -> RegionTable | None:
        """What the stage chooses from; None where it has nothing. `targets`: digests of the experts that may be chosen,
        by name; `described`: by digest, where an expert's own card says that its texts lie. The same objects, the same
        table.
        """
        if not self._encoders:
            return None
        data_sets = await self._data_sets.all()
        if self._read[0] is not data_sets or self._read[1] is not described:
            digests = dict(targets) | {digest: digest for digest in targets.values()}
            regions = list(described.items())
            # A data set whose expert is gone, or was made for another backbone, waits for one of its name.
            regions += [
                (digests[one.expert], one.region)
                for one in data_sets.values()
                if one is not None and one.expert in digests
            ]
            encoder = await self._first()
            made = None
            if encoder is not None:
                level, margin = self._margins.task_level, self._margins.task
                made = RegionTable((await encoder.info()).digest, regions, level=level, margin=margin)
            self._table, self._read = made, (data_sets, described)
        return self._table if self._table is not None and len(self._table) else None

    async def choose(self, text: str, table: RegionTable, deadline: Deadline) -> Dispatched:
        """Abstains for a text beyond the encoder's window: a part of it is no text that regions were calibrated on."""
        assert self._encoder is not None  # there is a table
        try:
            message = Texts(encoder=table.encoder, texts=(text,), deadline_unix_s=deadline.unix_s)
            vectors, _ = await self._encoder.embed(message)
        except Exception as error:
            if isinstance(unwrap(error), WindowExceeded | InvalidRequest):
                return Dispatched(expert=None, margin=0.0, stage="task")
            raise unwrap(error) from None
        return table.choose(vectors[0])

    async def _first(self) -> TextEncoder | None:
        if self._encoder is None:
            for one in self._encoders:
                if (await one.info()).modality == "text":
                    self._encoder = one
                    break
        return self._encoder


def region_of(artefact: Artefact) -> TextRegion | None:
    """What a card says; a broken entry is left out, and told."""
    try:
        return TextRegion.of_card(artefact.card, artefact.name)
    except CorruptArtefact as error:
        logger.warning("%s", error)
        return None


def _data_set(artefact: Artefact) -> DataSet | None:
    """None for a task without an expert, and for one that is not embedded yet."""
    expert = artefact.card.get("expert")
    if not isinstance(expert, str) or artefact.card.get("status", "done") != "done":
        return None
    region = region_of(artefact)
    return None if region is None else DataSet(expert, region)
