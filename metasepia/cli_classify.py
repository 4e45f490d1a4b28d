"""`metasepia classify`: a label for each text of a file, by examples or by a context."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia import cli_sheets
from metasepia.cli_contexts import add_context_options
from metasepia.shell import MISUSE, PARTLY, Failed, add_verb, given, show

if TYPE_CHECKING:
    import metasepia.client.results


def classify(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    if (options.examples is None) == (options.context is None):
        raise Failed("give --examples FILE or --context ctx-..., and not both", MISUSE)
    if options.json and options.out is not None:
        raise Failed("--json prints and --out writes; give one of them (--to jsonl writes JSON lines)", MISUSE)
    if str(options.input) == "-" and sys.stdin.isatty():
        print("texts to classify, one a line; end with Ctrl-D", file=sys.stderr)
    kind = None if options.json else cli_sheets.kind_of(options.out, options.to)
    sheet = cli_sheets.read(options.input, getattr(options, "from"))
    asked: Any = given(options, "encoder", "module", "protocol", "seed", "abstain_below", "batch_size")
    if options.examples is not None:
        asked["examples"] = cli_sheets.examples(options.examples, options.examples_text or options.text, options.label)
    else:
        asked["model"] = options.context
    texts, asking = sheet.texts(options.text), client.with_options(concurrency=options.concurrency)
    failure = None
    try:
        found = asking.classify(texts, **asked)
    except Exception as error:
        from metasepia.client import PartlyDone

        if not isinstance(error, PartlyDone):
            raise
        found, failure = error.partial, error
    if kind is None:
        show(options, _json(found), lambda: None)
    else:
        cli_sheets.write(sheet.with_columns(_columns(found, options.prefix)), options.out, kind)
    if failure is not None:
        raise Failed(f"{failure}".replace("in .partial", "written"), PARTLY)
    if options.out is not None:
        print(f"{options.out}: {len(found):,} texts labelled", file=sys.stderr)


def _columns(found: "metasepia.client.results.Classification", prefix: str) -> dict[str, list[Any]]:
    """NaN, of what has no answer, as nothing."""
    columns = found.columns(prefix)
    return {name: [None if value != value else value for value in values] for name, values in columns.items()}


def _json(found: "metasepia.client.results.Classification") -> dict[str, Any]:
    results = [
        {"label": label, "probabilities": None if row[0] != row[0] else dict(zip(found.classes, row, strict=True))}
        for label, row in zip(found.labels, found.probabilities, strict=True)
    ]
    return {"model": found.model, "results": results, "usage": found.usage.raw, "receipts": found.receipts}


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verb `metasepia classify`."""
    one = add_verb(things, "classify", classify, "label texts by examples or by a context", shared)
    one.add_argument(
        "input", type=Path, nargs="?", default=Path("-"), help="CSV, TSV, JSONL, Parquet or lines of text; - is stdin"
    )
    by = one.add_argument_group("by")
    by.add_argument("--context", metavar="ID", help="ctx-..., of `metasepia contexts`")
    by.add_argument("--examples", type=Path, metavar="FILE", help="texts with labels")
    by.add_argument("--text", metavar="COLUMN", help="of the texts; `text`, or the only one, where not given")
    by.add_argument("--examples-text", metavar="COLUMN", help="of the examples' texts, where it is another one")
    by.add_argument("--label", default="label", metavar="COLUMN", help="of the examples' labels (%(default)s)")
    add_context_options(by)
    by.add_argument("--abstain-below", type=float, metavar="P", help="no label where the best probability is lower")
    out = one.add_argument_group("files")
    out.add_argument("--from", choices=cli_sheets.FORMATS, help="of the input; by its suffix where not given")
    out.add_argument("--out", type=Path, metavar="FILE", help="standard output where not given")
    out.add_argument(
        "--to", choices=("csv", "tsv", "jsonl", "parquet", "table"), help="by --out's suffix; or table, csv"
    )
    out.add_argument("--prefix", default="", help="of the new columns, label and probability_<label>")
    out.add_argument("--batch-size", type=int, metavar="N", help="texts of one request (512)")
    out.add_argument("--concurrency", type=int, default=4, metavar="N", help="requests at once (%(default)s)")
