"""Parquet to Parquet through a running graph: labels, embeddings, completions or hidden states of every row.

    python -m jobs.batch --input IN.parquet --output OUT.parquet --task classify --model ctx-4f0c...
    python -m jobs.batch --input s3://bucket/in --output s3://bucket/out --task complete --column prompt \\
        --model-column model --option max_tokens=64 --url http://graph:8000

IN is a file or a folder of *.parquet files, OUT a file (its name ends in .parquet) or a folder of parts; both are
paths or `pyarrow.fs` URIs. OUT has IN's columns and rows, in IN's order, with the columns of the answers and `error`:
null, or why this row has no answer. A column of models picks the model of each row. The same command goes on after a
kill: what is there is not asked again, and the bytes do not depend on kills (as far as the graph answers equal
requests equally).

It speaks HTTP, so it needs the graph's address and no Ray: keys, quotas and admission are those of any client. A graph
that is full or away is waited for. Exit status: 0 every row has its answer, 1 some have errors, 2 nothing was begun,
3 the graph went away or refused the key (the same command goes on), 130 interrupted.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, get_args

from jobs.batching.spec import BatchSpec, TaskName
from metasepia.errors import InvalidSettings, MetasepiaError

INTERRUPTED = 130
GONE = 3


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # Here and not above: help and misuse need no Arrow.
    from jobs.batching.asking import Stopped

    try:
        return asyncio.run(_run(arguments))
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"stopped: {error}; the same command goes on", file=sys.stderr)
        return GONE
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED


async def _run(arguments: argparse.Namespace) -> int:
    from jobs.batching.asking import Asker
    from jobs.batching.parts import Parts
    from jobs.batching.reading import Source
    from jobs.batching.running import Batch, Progress
    from jobs.batching.tasks import task_of
    from jobs.progress_bar import Bar

    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    if not 1 <= arguments.concurrency <= 512:
        raise InvalidSettings("concurrency", arguments.concurrency, "from 1 to 512")
    source = Source.at(arguments.input)
    model_column = arguments.model_column
    if model_column is None and "model" in source.schema.names:
        model_column = "model"
    spec = BatchSpec(
        task=arguments.task,
        pieces=source.pieces,
        column=arguments.column,
        model=arguments.model,
        model_column=model_column,
        options=dict(map(_option, arguments.option)),
        prefix=arguments.prefix,
        keep=tuple(arguments.keep) if arguments.keep else None,
        media=arguments.media,
        rows_a_part=arguments.rows_a_part,
        rows_a_request=arguments.rows_a_request,
    )
    asker = Asker(arguments.url, arguments.key or os.environ.get("METASEPIA_KEY"), arguments.patience_s)
    try:
        batch = Batch(spec, source, task_of(spec), asker, arguments.concurrency)
        parts = Parts(arguments.output, spec, batch.error_column)
        done = sum(len(spec.rows_of(part)) for part in parts.done())
        progress = Progress(spec, done)
        if not arguments.quiet:
            before = f", {done} of them answered before" if done else ""
            print(f"{progress.title}: {arguments.task} of {spec.num_rows} rows{before}; {parts.uri}", flush=True)
        with Bar(progress, shown=not arguments.quiet) as bar:
            await batch.run(parts, progress, bar)
        num_errors = await asyncio.to_thread(parts.finish, batch.schema)
    finally:
        await asker.close()
    print(f"{parts.uri}: {spec.num_rows} rows" + (f", {num_errors} of them with an error" if num_errors else ""))
    return int(num_errors > 0)


def _option(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise InvalidSettings("option", text, "NAME=VALUE, a field of the request's body, as max_tokens=64")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m jobs.batch",
        description=about + "\n\n" + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--input", required=True, metavar="IN", help="a Parquet file, or a folder of them")
    add("--output", required=True, metavar="OUT", help="OUT.parquet, or a folder")
    add("--task", required=True, choices=get_args(TaskName))
    add("--column", default="text", help="the column that is asked about (text)")
    add("--model", help="of rows that name none: a context, an encoder, a backbone, <backbone>:<expert>")
    add("--model-column", metavar="COLUMN", help="the column of models (model, where there is one)")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="a field of every request's body, as JSON")
    add("--keep", action="append", metavar="COLUMN", help="only these columns of IN are in OUT; several times")
    add("--prefix", default="", help="begins the names of the columns added")
    add("--media", choices=("image", "audio"), help="what bytes in the column are")
    add("--rows-a-part", type=int, default=4096, metavar="ROWS", help="written at a time, and lost at a kill (4096)")
    add("--rows-a-request", type=int, default=64, metavar="ROWS", help="asked at a time (64); completions: one")
    add("--concurrency", type=int, default=8, metavar="REQUESTS", help="under way at once (8)")
    add("--patience-s", type=float, default=900.0, metavar="SECONDS", help="for a graph that is full or away (900)")
    add("--url", "--address", default=os.environ.get("METASEPIA_URL", "http://127.0.0.1:8000"), help="of the graph")
    add("--key", help="of a graph that asks for keys; METASEPIA_KEY otherwise, which no process list shows")
    add("--quiet", action="store_true", help="no progress")
    return p


if __name__ == "__main__":
    sys.exit(main())
