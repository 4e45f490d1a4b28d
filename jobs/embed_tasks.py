"""Embeds many tasks at once: data sets, models, and prompts on models, into one space a method.

    python -m jobs.embed_tasks SPEC.toml --out runs/tasks
    python -m jobs.embed_tasks SPEC.toml --out runs/tasks --workers 8 --method agreement --method prefix
    python -m jobs.embed_tasks SPEC.toml --out runs/tasks --dry-run

SPEC.toml says what: see `jobs.embedding.spec`. OUT, a folder or a `pyarrow.fs` URI, then has embeddings.parquet (a row
an embedding; embeddings-METHOD.parquet for several methods), answers/ (Parquet, what each task says of its texts),
map.html and report.json. The same command goes on after a kill: answers and embeddings that are there are not computed
or paid for again, and the bytes of embeddings.parquet do not depend on kills or the number of workers.

A task that fails is told with its words, and the others are embedded. Exit status: 0 all are embedded, 1 some failed,
2 nothing was begun, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.embedding.spec import read
from metasepia.embedding.space import METHODS
from metasepia.errors import InvalidSettings, MetasepiaError

if TYPE_CHECKING:
    from jobs.embedding.running import Run

BATCH = 16
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return _run(arguments)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is kept in {arguments.out}", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    for name in ("workers", "batch"):
        if getattr(arguments, name) < 1:
            raise InvalidSettings(name, getattr(arguments, name), "at least 1")
    spec = read(arguments.spec, arguments.method)
    # Here and not above: a mistake in the specification is told before anything heavy is imported.
    from jobs.embedding.files import RunFiles
    from jobs.embedding.plan import tasks_of
    from jobs.embedding.report import problems, write_results
    from jobs.embedding.running import Run, execute
    from metasepia.blackbox.cache import AnswerCache
    from metasepia.blackbox.meter import Meter
    from metasepia.embedding.store import EmbeddingStore

    files = RunFiles(arguments.out)
    meter = Meter(max_cost=spec.max_cost, max_tokens=spec.max_tokens)
    with AnswerCache(cache_path(files.uri, arguments.home)) as cache:
        tasks = tasks_of(spec, arguments.home, cache, meter)
        run = Run(spec=spec, tasks=tasks, files=files, home=arguments.home, meter=meter, batch=arguments.batch)
        run.find_kept()
        print("\n".join(describe(run)), flush=True)
        if arguments.dry_run:
            return 0
        run.check_keys()
        from metasepia.encoders import TextEncoder

        encoder = TextEncoder.load(spec.encoder, spec.device)
        execute(
            run,
            encoder=encoder,
            workers=arguments.workers,
            address=arguments.address,
            progress=not arguments.quiet,
        )
    for path in write_results(run):
        print(path)
    if arguments.store is not None:
        store = EmbeddingStore(arguments.store)
        added = store.add(one for found in run.embedded.values() for one in found)
        print(f"{store.uri}: {added} embeddings added")
    failed = problems(run)
    for name, words in failed.items():
        print(f"failed: {name}: {words}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(tasks)} tasks failed; the same command tries them again", file=sys.stderr)
    return int(bool(failed))


def describe(run: "Run") -> list[str]:
    """What will be done, and at most how much endpoints will take."""
    from jobs.embedding.plan import EndpointUnit

    counts = {kind: sum(task.kind == kind for task in run.tasks) for kind in ("data_set", "model", "prompt")}
    told = ", ".join(f"{count} {kind.replace('_', ' ')}s" for kind, count in counts.items() if count)
    asked = [task for task in run.todo if task.asks]
    lines = [
        f"{run.spec.title}: {told}; methods {', '.join(one.name for one in run.spec.methods)}; "
        f"{run.num_kept} answered before, {len(asked)} to be asked for {len(run.spec.probes)} texts each"
    ]
    boxes = [task.unit.box for task in run.todo if isinstance(task.unit, EndpointUnit)]
    if boxes:
        found = [box.estimate(run.spec.probes.texts) for box in boxes]
        tokens = sum(one.prompt_tokens + one.completion_tokens for one in found)
        costs = [one.cost for one in found if one.cost is not None]
        unpriced = f"; {len(found) - len(costs)} prompts have no prices" if len(costs) < len(found) else ""
        lines.append(
            f"endpoints: at most {sum(one.requests for one in found):,} requests, {tokens:,} tokens"
            + (f", cost {sum(costs):.4f}" if costs else "")
            + unpriced
        )
    return lines


def cache_path(out: str, home: Path) -> Path:
    """Where single answers of endpoints are kept: beside the results, or under `home` where these are not local."""
    return (home if "://" in out else Path(out)) / "answers.sqlite"


def parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m jobs.embed_tasks",
        description=about + "\n\n" + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("spec", type=Path, metavar="SPEC.toml")
    add("--out", required=True, metavar="URI", help="folder or pyarrow.fs URI")
    add("--method", action="append", default=[], metavar="NAME", help=f"one or more of {', '.join(METHODS)}")
    add("--workers", type=int, default=2, help="processes at a time (2); the results do not depend on it")
    add("--batch", type=int, default=BATCH, metavar="TASKS", help=f"tasks embedded in one call ({BATCH})")
    add("--address", help="of a Ray cluster, or auto (default: Ray is started here, and stopped)")
    add("--home", type=Path, default=Path(".metasepia"), help="prepared backbones, factors, the registry (.metasepia)")
    add("--store", metavar="URI", help="also add the embeddings to this store, which only grows")
    add("--dry-run", action="store_true", help="say what would be done, and what it would cost at most")
    add("--quiet", action="store_true", help="no progress")
    return p


if __name__ == "__main__":
    sys.exit(main())
