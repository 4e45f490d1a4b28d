"""A batch's rows, each with its adapter and its path, as the parts that share their dense weights.

Rows on the stored weights are one part, whatever they add to its product: singular values by one `Delta` a path,
low-rank adapters by one a chunk of their stack. Rows on all factors (in fp32) and on pinned weights are parts of their
own.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metasepia.experts.held import HeldExperts
from metasepia.experts.low_rank import LowRankRows, chunks
from metasepia.experts.selection import Delta, Part, Table
from metasepia.rows import Adapter
from metasepia.rows import Path as RowPath


def parts_of(
    adapters: Sequence[Adapter], paths: Mapping[Adapter, RowPath], held: HeldExperts, device: torch.device
) -> list[Part]:
    """One adapter a row, in the batch's order. No rows: one part, the whole batch on the stored weights.

    Raises UnknownName for an expert that is not held, InvalidRequest for weights off the simplex or mixed kinds.
    """
    by_path: dict[RowPath, list[int]] = {}
    for row, adapter in enumerate(adapters):
        by_path.setdefault(paths[adapter], []).append(row)
    if not by_path:
        return [Part()]
    parts: list[Part] = []
    alone = ("factors", "materialised") if held.exact else ("materialised",)
    dense = sorted(row for path, rows in by_path.items() if path not in alone for row in rows)
    if dense:
        position = {row: i for i, row in enumerate(dense)}
        deltas: list[Delta] = []
        for path, rows in by_path.items():
            if path in ("truncated", "factors") and path not in alone:
                table, norm = _tables([adapters[row] for row in rows], path, held, device)
                where = _rows([position[row] for row in rows], len(dense), device)
                deltas.append(Delta(where, table, leading=path == "truncated", norm=norm))
            elif path == "lora":
                deltas += _low_rank([(position[row], adapters[row]) for row in rows], len(dense), held, device)
        parts.append(Part("stored", _rows(dense, len(adapters), device), deltas=deltas))
    for path in alone:
        rows = by_path.get(path, [])
        if rows:
            table = None
            if path == "factors":
                table, _ = _tables([adapters[row] for row in rows], path, held, device)
            weights = "factors" if path == "factors" else "pinned"
            parts.append(Part(weights, _rows(rows, len(adapters), device), table))
    return parts


def _tables(
    adapters: list[Adapter], path: RowPath, held: HeldExperts, device: torch.device
) -> tuple[Table, Table | None]:
    distinct = list(dict.fromkeys(adapters))
    composed = [held.compose(adapter, path) for adapter in distinct]
    where = {adapter: i for i, adapter in enumerate(distinct)}
    index = None if len(distinct) == 1 else torch.tensor([where[adapter] for adapter in adapters], device=device)
    norm = None
    if any(one.norm is not None for one in composed):
        assert held.layout is not None
        ones = torch.ones(len(held.layout.places), device=held.layout.s.device)
        norm = Table(torch.stack([ones if one.norm is None else one.norm for one in composed]), index)
    return Table(torch.stack([one.values for one in composed]), index), norm


def _low_rank(rows: list[tuple[int, Adapter]], num_rows: int, held: HeldExperts, device: torch.device) -> list[Delta]:
    distinct = list(dict.fromkeys(adapter for _, adapter in rows))
    deltas: list[Delta] = []
    for chunk in chunks([held.rank(adapter) for adapter in distinct]):
        where = {distinct[i]: i - chunk.start for i in chunk}
        own = [(row, where[adapter]) for row, adapter in rows if adapter in where]
        stack = held.stack(tuple(where))
        low_rank = LowRankRows(stack, torch.tensor([i for _, i in own], device=device), len(where) > 1)
        deltas.append(Delta(_rows([row for row, _ in own], num_rows, device), low_rank=low_rank))
    return deltas


def _rows(rows: list[int], num_rows: int, device: torch.device) -> Tensor | None:
    """None for all of them."""
    return None if len(rows) == num_rows else torch.tensor(rows, device=device)
