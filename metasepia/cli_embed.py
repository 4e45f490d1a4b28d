"""`metasepia embed` and `metasepia states`: vectors of texts, and a backbone's hidden states."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia import cli_sheets
from metasepia.shell import MISUSE, REFUSED, Failed, add_verb, given, show, whole_file

if TYPE_CHECKING:
    import metasepia.client.results


def embed(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    kind = _kind(options)
    sheet = cli_sheets.read(options.input, getattr(options, "from"))
    texts, model = sheet.texts(options.text), options.model or _encoder(client)
    found = client.embed(texts, model=model, **given(options, "dimensions", "batch_size"))
    if kind == "json":
        about = {"model": found.model, "usage": found.usage.raw, "receipts": found.receipts}
        show(options, about | {"vectors": found.vectors.tolist()}, lambda: None)
    elif kind == "npy":
        import numpy as np

        with whole_file(options.out) as beside, beside.open("wb") as file:
            np.save(file, found.vectors)
    else:
        columns = {"vector": found.to_arrow().to_pylist()} if kind != "parquet" else {"vector": found.vectors.tolist()}
        cli_sheets.write(sheet.with_columns(columns), options.out, kind)
    if options.out is not None:
        print(f"{options.out}: {len(found.vectors):,} vectors of {found.vectors.shape[1]} numbers", file=sys.stderr)


def states(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    sheet = cli_sheets.read(options.input, getattr(options, "from"))
    found = client.hidden_states(
        sheet.texts(options.text),
        model=options.model,
        layers=options.layers,
        pooling=options.pooling,
        **given(options, "task", "batch_size"),
    )
    import pyarrow.parquet as pq

    with whole_file(options.out) as beside:
        pq.write_table(found.table, beside)
    about = {"file": str(options.out), "rows": found.table.num_rows, "model": found.model, "usage": found.usage.raw}
    words = f"{options.out}: {found.table.num_rows:,} states of {found.num_inputs:,} texts"
    show(options, about | {"task": found.task}, lambda: print(words))


def _kind(options: argparse.Namespace) -> str:
    if options.json and options.out is not None:
        raise Failed("--json prints and --out writes; give one of them", MISUSE)
    if options.json:
        return "json"
    if options.out is not None and options.out.suffix.lower() == ".npy":
        return "npy"
    kind = cli_sheets.kind_of(options.out, options.to)
    return "jsonl" if kind in ("table", "csv") and options.to is None and options.out is None else kind


def _encoder(client: "metasepia.client.Client") -> str:
    found = [one.id for one in client.models() if one.kind == "encoder"]
    if not found:
        raise Failed("this server has no encoder; --model names a backbone", REFUSED)
    return found[0]


def _layers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs `metasepia embed` and `metasepia states`."""
    one = add_verb(things, "embed", embed, "vectors of texts", shared)
    _add_input(one)
    one.add_argument("--model", metavar="ID", help="an encoder or a backbone; the first encoder where not given")
    one.add_argument("--dimensions", type=int, metavar="N", help="fewer numbers a vector, where the model can")
    one.add_argument("--out", type=Path, metavar="FILE", help=".npy, .parquet, .jsonl, .csv; JSON lines to stdout")
    one.add_argument("--to", choices=("csv", "jsonl", "parquet"), help="by --out's suffix where not given")
    one = add_verb(things, "states", states, "a backbone's hidden states by layer, to Parquet", shared)
    _add_input(one)
    one.add_argument("--model", required=True, metavar="NAME", help="<backbone> or <backbone>:<expert>")
    one.add_argument("--layers", type=_layers, default=[-1], metavar="L,L", help="0 to n, or from the end (-1)")
    one.add_argument("--pooling", choices=("last", "mean", "none"), default="last", help="%(default)s")
    one.add_argument("--task", metavar="NAME", help="whose running centroids observe these states")
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help="Parquet")


def _add_input(to: argparse.ArgumentParser) -> None:
    to.add_argument("input", type=Path, nargs="?", default=Path("-"), help="as of classify; - is stdin")
    to.add_argument("--from", choices=cli_sheets.FORMATS, help="of the input; by its suffix where not given")
    to.add_argument("--text", metavar="COLUMN", help="`text`, or the only one, where not given")
    to.add_argument("--batch-size", type=int, metavar="N", help="texts of one request (512)")
