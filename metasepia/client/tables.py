"""Inputs in whatever people hold them, and answers put back beside them: lists, numpy arrays, pandas frames and series,
Arrow tables and arrays, and anything that gives itself as an Arrow stream (polars, duckdb).

pandas and pyarrow are looked for among the loaded modules: who gives none of theirs never loads them.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metasepia.client.errors import BadInput
from metasepia.client.results import Classification

Put = Callable[[Classification, str], Any]


@dataclass(frozen=True)
class Taken:
    """Inputs as the server reads them."""

    items: list[Any]
    put_back: Put
    """The classification in the form that the inputs had; the prefix is of new columns' names."""


def inputs_of(given: Any, text: str | None, vector: str | None, prefix: str) -> Taken:
    """Raises BadInput naming the item or column."""
    if text is not None and vector is not None:
        raise BadInput("vector", f"the inputs are in the column {text!r} already; give one of text and vector")
    column = text if text is not None else vector
    if _frame(given) is not None:
        items = _frame_column(given, column, vector is not None, prefix)
        return Taken(items, lambda found, prefix: _with_columns(given, found, prefix))
    if (table := _table(given)) is not None:
        items = _table_column(table, column, vector is not None, prefix)
        return Taken(items, lambda found, prefix: _with_arrays(table, found, prefix))
    if column is not None:
        raise BadInput("text" if text is not None else "vector", "names a column, and the inputs are no table")
    return Taken(plain(given, "inputs"), lambda found, prefix: found)


def examples_of(given: Any, text: str | None, vector: str | None, label: str, name: str = "examples") -> list[Any]:
    """Examples as the server reads them: from a table with columns of inputs and labels, pairs, or objects.

    Raises BadInput naming the item or column.
    """
    column = text if text is not None else vector if vector is not None else "text"
    table = _table(given) if _frame(given) is None else None
    if _frame(given) is not None or table is not None:
        held = given if table is None else table
        read = _frame_column if table is None else _table_column
        inputs = read(held, column, vector is not None, None)
        labels = read(held, label, False, None, "label")
        kind = "text" if vector is None else None
        return [({kind: one} if kind else one) | {"label": said} for one, said in zip(inputs, labels, strict=True)]
    if isinstance(given, Mapping):
        raise BadInput(name, 'must be a list of {"text": ..., "label": ...}, of pairs (text, label), or a table')
    found: list[Any] = []
    for place, one in enumerate(_listed(given, name)):
        if isinstance(one, tuple | list) and len(one) == 2:
            content = plain([one[0]], name)[0]
            found.append((content if isinstance(content, dict) else {"text": content}) | {"label": one[1]})
        elif isinstance(one, Mapping):
            found.append(dict(one))
        else:
            raise BadInput(f"{name}[{place}]", f'{one!r:.60} is neither {{"text", "label"}} nor a pair (text, label)')
    return found


def plain(given: Any, name: str) -> list[Any]:
    """A list of texts, vectors or objects; a single text is a list of one. Raises BadInput naming the item."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping | bytes):
        raise BadInput(name, "must be a list of texts, objects or vectors")
    return [_item(one, f"{name}[{place}]") for place, one in enumerate(_listed(given, name))]


def texts_of(given: Any) -> list[Any]:
    """A list of texts or objects; a single one is a list of one. Raises BadInput naming the item."""
    found = plain([given] if isinstance(given, Mapping) else given, "input")
    for place, one in enumerate(found):
        if isinstance(one, dict) and "vector" in one:
            raise BadInput(f"input[{place}]", "a vector is no text; give texts, or lists of token ids")
    return found


def _item(one: Any, where: str) -> Any:
    if isinstance(one, str | Mapping):
        return one if isinstance(one, str) else dict(one)
    _check_there(one, where)
    listed: Callable[[], Any] | None = getattr(one, "tolist", None)
    one = one if listed is None else listed()
    if isinstance(one, list | tuple) and one and all(type(number) in (int, float) for number in one):
        return {"vector": list(one)}
    raise BadInput(where, f"{one!r:.60} is neither a text nor a vector nor an object")


def _check_there(one: Any, where: str) -> None:
    if one is None or (isinstance(one, float) and math.isnan(one)) or type(one).__name__ in ("NAType", "NaTType"):
        raise BadInput(where, f"there is no text ({one!r}); leave such rows out (frame.dropna(subset=[...]))")


def _listed(given: Any, name: str) -> Iterable[Any]:
    if hasattr(given, "to_pylist"):
        return given.to_pylist()
    if isinstance(given, Iterable):
        return given
    raise BadInput(name, f"{type(given).__name__} is no list of inputs")


# -- pandas ------------------------------------------------------------------------------------------------------------


def _frame(given: Any) -> Any:
    pandas = sys.modules.get("pandas")
    return given if pandas is not None and isinstance(given, pandas.DataFrame) else None


def _frame_column(frame: Any, column: str | None, vectors: bool, prefix: str | None, param: str = "text") -> list[Any]:
    names = [str(one) for one in frame.columns]
    _check_columns(names, column, prefix, param)
    values = frame.iloc[:, names.index(str(column))].tolist()
    return _column_items(values, str(column), vectors, [str(one) for one in frame.index], param)


def _with_columns(frame: Any, found: Classification, prefix: str) -> Any:
    import pandas

    columns = {name: pandas.Series(values, index=frame.index) for name, values in found.columns(prefix).items()}
    return pandas.concat([frame, pandas.DataFrame(columns, index=frame.index)], axis=1)


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _table(given: Any) -> Any:
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is not None and isinstance(given, pyarrow.Table | pyarrow.RecordBatch):
        return pyarrow.table(given) if isinstance(given, pyarrow.RecordBatch) else given
    if pyarrow is not None and isinstance(given, pyarrow.Array | pyarrow.ChunkedArray):
        return None
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(given, pandas.Series | pandas.Index):
        return None
    if hasattr(given, "__arrow_c_stream__") and hasattr(given, "columns"):
        import pyarrow

        return pyarrow.table(given)
    return None


def _table_column(table: Any, column: str | None, vectors: bool, prefix: str | None, param: str = "text") -> list[Any]:
    names = list(table.column_names)
    _check_columns(names, column, prefix, param)
    values = table.column(names.index(str(column))).to_pylist()
    return _column_items(values, str(column), vectors, None, param)


def _with_arrays(table: Any, found: Classification, prefix: str) -> Any:
    import pyarrow

    for name, values in found.columns(prefix).items():
        kind = pyarrow.string() if name == f"{prefix}label" else pyarrow.float64()
        table = table.append_column(name, pyarrow.array(values, kind))
    return table


# -- both --------------------------------------------------------------------------------------------------------------


def _check_columns(names: Sequence[str], column: str | None, prefix: str | None, param: str) -> None:
    known = ", ".join(map(repr, names[:20])) or "none"
    if column is None:
        raise BadInput(param, f"name the column that holds the inputs; there are {known}")
    if names.count(column) > 1:
        raise BadInput(param, f"{names.count(column)} columns are named {column!r}; rename one of them")
    if column not in names:
        raise BadInput(param, f"no column {column!r}; there are {known}")
    if prefix is not None:
        taken = [one for one in names if one == f"{prefix}label" or one.startswith(f"{prefix}probability_")]
        if taken:
            raise BadInput("prefix", f"a column {taken[0]!r} is there already; give new columns another prefix")


def _column_items(
    values: Sequence[Any], column: str, vectors: bool, index: Sequence[str] | None, param: str
) -> list[Any]:
    found: list[Any] = []
    for place, value in enumerate(values):
        where = f"{column}[{index[place] if index else place}]"
        _check_there(value, where)
        if not vectors and not isinstance(value, str):
            wanted = "texts" if param == "text" else "labels as texts: frame[column].astype(str) makes them so"
            raise BadInput(where, f"{value!r:.60}: the column must hold {wanted}")
        item = _item(value, where)
        if vectors and not (isinstance(item, dict) and "vector" in item):
            raise BadInput(where, f"{value!r:.60}: the column must hold vectors")
        found.append(item)
    return found
