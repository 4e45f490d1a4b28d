"""The key/value cache of a batch whose rows come and go: a preallocated buffer a layer, all rows ending at one column.

transformers' DynamicCache copies everything at every step and cannot change its rows. Here a step writes one column in
place; a row that joins is copied in so that it ends where the others end, one that leaves is overwritten by the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import Cache


class RowCache(Cache):
    """Keys and values [rows, heads, columns, head dim] of each layer; the head counts are those the model brings.

    The part in use is rows [0, num_rows) and columns [begin, end). A row of length n occupies the last n of them; what
    lies left of it is masked, and kept finite: zero times NaN would be NaN.
    """

    def __init__(self, num_rows: int, num_columns: int, *, keys_by_dim: bool = False) -> None:
        """`keys_by_dim`: keys lie in memory as [rows, heads, head dim, columns], of which `update` gives a transposed
        view: a product of few queries with them is then up to twice as fast on a CPU.
        """
        super().__init__(layers=[])
        self._keys_by_dim = keys_by_dim
        self.num_rows = num_rows
        self.begin = self.end = 0
        self._row_capacity, self._column_capacity = num_rows, num_columns
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    @property
    def width(self) -> int:
        """Columns in use: the length of the longest row."""
        return self.end - self.begin

    # -- what the model calls ------------------------------------------------------------------------------------------

    def update(
        self,
        key_states: Float[Tensor, "rows heads new dim"],
        value_states: Float[Tensor, "rows heads new dim"],
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        while len(self._keys) <= layer_idx:  # lazily: only now are the local head counts of a sharded model known
            self._keys.append(self._buffer(key_states, self._keys_by_dim))
            self._values.append(self._buffer(value_states))
        stop = self.end + key_states.shape[2]
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[: self.num_rows, :, self.end : stop] = key_states
        values[: self.num_rows, :, self.end : stop] = value_states
        return keys[: self.num_rows, :, self.begin : stop], values[: self.num_rows, :, self.begin : stop]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    # -- what the decoder calls ----------------------------------------------------------------------------------------

    def extend(self, num_columns: int) -> None:
        """Keeps the columns that the last forward wrote."""
        self.end += num_columns

    def trim(self, longest: int) -> None:
        """Gives back the columns that no row needs any more."""
        self.begin = self.end - longest

    def reserve(self, num_rows: int, longest: int) -> None:
        """Makes room for `num_rows` rows of `longest` columns, one more to be written. Copies only if it must."""
        if num_rows > self._row_capacity or longest > self.end or self.end >= self._column_capacity:
            rows = self._row_capacity if num_rows <= self._row_capacity else max(num_rows, 3 * self._row_capacity // 2)
            end = max(longest, self.width)
            # A quarter more than needed: the whole cache is copied once in so many steps instead of at each.
            self._move(rows, end, end + end // 4 + 64)

    def join(self, source: "RowCache", row: int, length: int) -> None:
        """Copies the last `length` columns of a row of another cache in as a new row. Room must be reserved."""
        slot, begin = self.num_rows, self.end - length
        assert slot < self._row_capacity and begin >= 0
        for mine, theirs, by_dim in self._pairs(source):
            for layer, origin in enumerate(theirs):
                if len(mine) <= layer:
                    mine.append(self._buffer(origin, by_dim))
                mine[layer][slot] = 0  # no other row's leftovers, which need not be finite
                mine[layer][slot, :, begin : self.end] = origin[row, :, source.end - length : source.end]
        self.num_rows += 1
        self.begin = min(self.begin, begin)

    def preload(self, row: int, source: "RowCache", begin: int, end: int) -> None:
        """Columns [begin, end) of a row become the first columns of `source`, which holds one row."""
        for mine, theirs, by_dim in self._pairs(source):
            for layer, origin in enumerate(theirs):
                if len(mine) <= layer:
                    mine.append(self._buffer(origin, by_dim))
                mine[layer][row, :, begin:end] = origin[0, :, source.begin : source.begin + end - begin]

    def leave(self, row: int) -> None:
        """Removes a row; the last row takes its index."""
        last = self.num_rows - 1
        if row != last:
            for buffers in (self._keys, self._values):
                for buffer in buffers:
                    buffer[row] = buffer[last]
        self.num_rows = last

    def _pairs(self, source: "RowCache") -> tuple[tuple[list[Tensor], list[Tensor], bool], ...]:
        return (self._keys, source._keys, self._keys_by_dim), (self._values, source._values, False)

    def _buffer(self, like: Tensor, by_dim: bool = False) -> Tensor:
        rows, columns = self._row_capacity, self._column_capacity
        if by_dim:
            return like.new_zeros((rows, like.shape[1], like.shape[3], columns)).transpose(2, 3)
        return like.new_zeros((rows, like.shape[1], columns, like.shape[3]))

    def _move(self, row_capacity: int, end: int, column_capacity: int) -> None:
        """To new buffers, layer by layer, so that one layer at a time exists twice."""
        self._row_capacity, self._column_capacity = row_capacity, column_capacity
        begin, stop, width = self.begin, self.end, self.width
        self.begin, self.end = end - width, end
        for buffers, by_dim in ((self._keys, self._keys_by_dim), (self._values, False)):
            for layer, old in enumerate(buffers):
                new = self._buffer(old, by_dim)
                new[: self.num_rows, :, self.begin : self.end] = old[: self.num_rows, :, begin:stop]
                buffers[layer] = new


@dataclass(frozen=True)
class Segment:
    """Rows of a batch, one after another, whose keys and values lie in one cache."""

    cache: RowCache | None
    """None: nothing came before, and nothing that follows will ask."""
    firsts: Sequence[int]
    """By row: the first column that is the row's own; what lies left of it is padding."""
