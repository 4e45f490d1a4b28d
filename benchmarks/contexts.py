"""Speed of labelled contexts, each part against what the reference does: one text, or one query, at a time.

    python -m benchmarks.contexts --data DIR
    python -m benchmarks.contexts --data DIR --parts embed-texts,tenants --threads 2

Both sides run in turn in one process with the same number of threads, and medians over the rounds are quoted. A slow
side does a share of its work, evenly spread, and its time is scaled; the note says which. Every part first checks that
both sides say the same, to 1e-4, and the run stops where they do not. `embed-texts` needs sentence-transformers:
pip install 'metasepia[bench]'.
"""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks import datasets, loo_path, report
from benchmarks.datasets import TextSet
from cluster import settings as settings_of
from metasepia import encoders
from metasepia.encoders import TextEncoder
from metasepia.reasoning import shipped
from metasepia.reasoning.context import Context, answer, compile_context
from metasepia.reasoning.module import CompiledRow, ReasoningModule
from metasepia.reasoning.reduction import Reduction, ReductionRecipe
from metasepia.reasoning.rows import CompiledRows, plan_rows
from metasepia.reasoning.shipped import LoadedModule
from metasepia.reasoning.training import PRESETS
from metasepia.synthetic.tasks import ProbabilisticLogisticRegression, Seeds

TOLERANCE = 1e-4
PAPERS_REDUCTION = ReductionRecipe(floor=1e-3, components=16, views=1)
"""Whitened principal components, one view. The paper has no floor; without one the check below compares rounding."""
BATCH_SIZES = (8, 16, 32, 64, 128, 256)
ENCODER_WIDTH = 384
NUM_TENANTS = 64


@dataclass
class Clock:
    """Seconds of each round, on the wall and of the processor; the second says more on a busy machine."""

    wall_s: list[float] = dataclasses.field(default_factory=list)
    cpu_s: list[float] = dataclasses.field(default_factory=list)

    def time(self, work: Callable[[], Any], *, scale: float = 1.0) -> Any:
        """The result of `work`, whose time counts `scale` times."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = work()
        self.wall_s.append((time.perf_counter() - wall_s) * scale)
        self.cpu_s.append((time.process_time() - cpu_s) * scale)
        return result

    def plus(self, other: "Clock") -> "Clock":
        """Round by round."""
        walls, cpus = ((a, b) for a, b in ((self.wall_s, other.wall_s), (self.cpu_s, other.cpu_s)))
        return Clock([a + b for a, b in zip(*walls, strict=True)], [a + b for a, b in zip(*cpus, strict=True)])

    @property
    def median_s(self) -> float:
        return report.median(self.wall_s)

    def times_slower(self, other: "Clock") -> str:
        return f"by processor time {report.median(self.cpu_s) / report.median(other.cpu_s):.3g} times"


def check(ours: Any, theirs: Any, what: str) -> float:
    """The largest difference. Stops the run where it is too large."""
    worst = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
    if not worst <= TOLERANCE:
        raise SystemExit(f"{what} differ by {worst:.2g}, more than {TOLERANCE:g}; nothing here counts")
    return worst


def papers_module() -> LoadedModule:
    """The paper's architecture with random weights, larger than at the start so that attention is far from uniform."""
    module = ReasoningModule(PRESETS["paper"].shape, seed=0).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3.0)
    return LoadedModule("paper", "0" * 64, module, {})


@torch.inference_mode()
def whole_forward(module: ReasoningModule, x: Tensor, y: Tensor, query: Tensor) -> float:
    """The query's logit from one forward over the 2k+1 tokens of the context and itself: no y token follows it."""
    hidden = module._embed(torch.cat([x, query[None]])[None], torch.cat([y, y.new_zeros(1)])[None])[:, :-1]
    for block in module.blocks:
        hidden = block(hidden)
    return float(module._read_out(hidden[:, -1]))


def context_queries(arguments: Namespace) -> list[report.Row]:
    """Module alone: compiling the context and answering all queries, against a whole forward a query."""
    small = shipped.load("tart-paper")
    assert isinstance(small.module, ReasoningModule)
    paper = papers_module()
    assert isinstance(paper.module, ReasoningModule)
    return [
        *_module_rows(arguments, "context-queries", paper.module, 256, 20, "the paper's architecture, random weights"),
        *_module_rows(
            arguments, "context-queries-shipped", small.module, small.module.shape.max_examples, 200,
            f"the shipped {small.name}", detail=True,
        ),
    ]  # fmt: skip


def _module_rows(
    arguments: Namespace, id: str, module: ReasoningModule, k: int, sampled: int, which: str, *, detail: bool = False
) -> list[report.Row]:
    count = 1000
    task = ProbabilisticLogisticRegression(dims=module.shape.dims)
    batch = task.batch(Seeds(), 0, num_sequences=1, num_pairs=k + count)
    x, y, queries = batch.x[0, :k], batch.y[0, :k], batch.x[0, k:]
    ours, compiling, theirs = Clock(), Clock(), Clock()

    def all_queries() -> Tensor:
        rows: list[CompiledRow] = compiling.time(lambda: module.compile_rows([x], [y]))
        return module.answer(rows, [queries])[0]

    def their_answers(some: Sequence[int]) -> list[float]:
        return [whole_forward(module, x, y, queries[i]) for i in some]

    all_queries()
    their_answers([0])
    compiling = Clock()
    worst = 0.0
    for i in range(arguments.rounds):
        some = range(i, count, count // sampled)  # other queries in each round
        answers = ours.time(all_queries)
        slow = theirs.time(partial(their_answers, some), scale=count / len(some))
        worst = max(worst, check(answers[list(some)], slow, "logits"))
    note = (
        f"{which}; its time includes compiling; the other timed on {sampled} of {count} queries a round; "
        f"{theirs.times_slower(ours)}; {_threads(arguments)}; logits differ by at most {worst:.0e}"
    )
    what = f"module alone, k = {k}, {count:,} queries against one forward over {2 * k + 1} tokens a query"
    compile_ms = 1000 * compiling.median_s
    return [
        report.rate(id, what, count / ours.median_s, count / theirs.median_s, "queries/s", note, detail=detail),
        report.duration(f"{id}-compile", f"of it: compiling k = {k}", compile_ms, None, "ms", detail=True),
    ]


def stream_path(arguments: Namespace) -> list[report.Row]:
    """Texts to answers: batches and one compiled context, against one text and one query at a time."""
    k, count, share = 64, 1000, 10
    texts = _texts(arguments.data, "sst2")
    shots = texts.draw(k, 0)
    taken = {text for text, _ in shots}
    queries = [text for text, _ in (*texts.test, *texts.train) if text not in taken][:count]
    labels = [label for _, label in shots]
    loaded, encoder, one_by_one = papers_module(), _encoder(), OneByOne.load()
    module = loaded.module
    assert isinstance(module, ReasoningModule)

    def ours_all() -> tuple[Context, Reduction, np.ndarray]:
        vectors = encoder.embed([text for text, _ in shots] + queries)
        context = Context.of(vectors[:k], labels, recipe=PAPERS_REDUCTION)
        compiled = compile_context(context, loaded)
        assert isinstance(compiled, CompiledRows)
        return context, compiled.reduction, answer(module, [(compiled, vectors[k:])])[0][:, 1]

    def their_context(context: Context, reduction: Reduction) -> tuple[Tensor, Tensor]:
        """The reduced examples and their labels in the order that the module sees.

        Reduction and order are ours, for both turn on the last digits of vectors.
        """
        vectors = np.stack([one_by_one.embed(text) for text, _ in shots])
        (row,) = plan_rows(context, module.shape).rows
        order = np.array(context.given)[row.order]
        is_second = torch.tensor([float(labels[i] == context.classes[1]) for i in order])
        return torch.from_numpy(reduction.apply(vectors)[0][order]), is_second

    def their_answers(reduction: Reduction, x: Tensor, y: Tensor, some: Sequence[int]) -> list[float]:
        reduced = (reduction.apply(one_by_one.embed(queries[i])[None])[0, 0] for i in some)
        return [whole_forward(module, x, y, torch.from_numpy(one)) for one in reduced]

    context, reduction, _ = ours_all()
    their_answers(reduction, *their_context(context, reduction), [0])
    ours, context_time, query_time = Clock(), Clock(), Clock()
    worst = 0.0
    for i in range(arguments.rounds):
        some = range(i % share, len(queries), share)
        context, reduction, answers = ours.time(ours_all)
        made = context_time.time(partial(their_context, context, reduction))
        slow = query_time.time(partial(their_answers, reduction, *made, some), scale=len(queries) / len(some))
        worst = max(worst, check(answers[list(some)], torch.tensor(slow).sigmoid(), "probabilities"))
    theirs = context_time.plus(query_time)
    note = (
        f"the paper's architecture, random weights; the other timed on one of {share} queries, other ones each round; "
        f"{theirs.times_slower(ours)}; {_threads(arguments)}; probabilities differ by at most {worst:.0e}"
    )
    what = f"whole path, stream, k = {k}, {len(queries):,} texts of sst2 against one text, then one forward, at a time"
    return [report.duration("stream-path", what, ours.median_s, theirs.median_s, "s", note)]


def loo_whole_path(arguments: Namespace) -> list[report.Row]:
    return loo_path.rows(arguments.data, threads=arguments.threads)


def embed_texts(arguments: Namespace) -> list[report.Row]:
    """Our encoder against sentence-transformers on the same weights, at each of its batch sizes."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise SystemExit("embed-texts needs sentence-transformers: pip install 'metasepia[bench]'") from None
    per_set = 128
    mixed = [text for name in ("sst2", "ag_news") for text, _ in _texts(arguments.data, name).sample_test(per_set)]
    texts = [mixed[i] for i in np.random.default_rng(0).permutation(len(mixed))]
    encoder = _encoder()
    other = SentenceTransformer(str(encoders.find(_encoder_source())), device="cpu")

    def encode(batch_size: int) -> np.ndarray:
        return other.encode(texts, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True)

    encoder.embed(texts[:64])
    other.encode(texts[:64])
    ours, theirs = Clock(), {size: Clock() for size in BATCH_SIZES}
    worst = 0.0
    for _ in range(arguments.rounds):
        vectors = ours.time(lambda: encoder.embed(texts))
        for size, clock in theirs.items():
            worst = max(worst, check(vectors, clock.time(partial(encode, size)), "vectors"))
    best = min(BATCH_SIZES, key=lambda size: theirs[size].median_s)
    num_tokens = sum(encoder.count_tokens(texts))
    note = (
        f"sentence-transformers at batch size {best}, its best of {', '.join(map(str, BATCH_SIZES))}; "
        f"{num_tokens / len(texts):.0f} tokens a text; {theirs[best].times_slower(ours)}; {_threads(arguments)}; "
        f"vectors differ by at most {worst:.0e}"
    )
    rates = {str(size): len(texts) / clock.median_s for size, clock in theirs.items()}
    what = f"MiniLM, {len(texts)} texts of sst2 and ag_news mixed"
    fastest = len(texts) / ours.median_s
    return [report.rate("embed-texts", what, fastest, rates[str(best)], "texts/s", note, extra={"batch_sizes": rates})]


def tenants(arguments: Namespace) -> list[report.Row]:
    """Contexts of many tenants, a query each, answered at once against one after the other."""
    default = shipped.load()
    rows = [_tenants_row(arguments, "tenants", default, None, f"the default module ({default.name})")]
    rows.append(
        _tenants_row(
            arguments, "tenants-paper", papers_module(), PAPERS_REDUCTION, "the paper's architecture, random weights"
        )
    )
    if default.name != "tart-paper":
        small = shipped.load("tart-paper")
        which = f"the shipped tart-paper, whose every query is {ReductionRecipe().views} tokens already, one a view"
        rows.append(_tenants_row(arguments, "tenants-tart-paper", small, None, which, detail=True))
    return rows


def _tenants_row(
    arguments: Namespace, id: str, loaded: LoadedModule, recipe: ReductionRecipe | None, which: str, **more: Any
) -> report.Row:
    k = 32
    rng = np.random.default_rng(0)
    asked = []
    for tenant in range(NUM_TENANTS):
        vectors = rng.standard_normal((k + 1, ENCODER_WIDTH)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        labels = [("no", "yes")[i % 2] for i in range(k)]
        context = Context.of(vectors[:k], labels, seed=tenant, recipe=recipe)
        asked.append((compile_context(context, loaded), vectors[k:]))

    def at_once() -> np.ndarray:
        return np.concatenate(answer(loaded.module, asked))

    def in_turn() -> np.ndarray:
        return np.concatenate([answer(loaded.module, [one])[0] for one in asked])

    at_once()
    in_turn()
    ours, theirs = Clock(), Clock()
    worst = 0.0
    for _ in range(4 * arguments.rounds):
        worst = max(worst, check(ours.time(at_once), theirs.time(in_turn), "probabilities"))
    note = f"{which}; {theirs.times_slower(ours)}; {_threads(arguments)}; probabilities differ by at most {worst:.0e}"
    what = f"{NUM_TENANTS} tenants' contexts of k = {k}, one query each, at once against one after the other"
    return report.rate(
        id, what, NUM_TENANTS / ours.median_s, NUM_TENANTS / theirs.median_s, "queries/s", note, **more
    )  # fmt: skip


class OneByOne:
    """The reference's way to embed: plain transformers, a text a forward."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @classmethod
    def load(cls) -> "OneByOne":
        folder = encoders.find(_encoder_source())
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))

    @torch.inference_mode()
    def embed(self, text: str) -> np.ndarray:
        hidden = self._model(**self._tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()


PARTS: Mapping[str, Callable[[Namespace], Sequence[report.Row]]] = {
    "context-queries": context_queries,
    "stream-path": stream_path,
    "loo-path": loo_whole_path,
    "embed-texts": embed_texts,
    "tenants": tenants,
}


def _encoder_source() -> str:
    return settings_of.read("laptop", {}).encoders[0].source


def _encoder() -> TextEncoder:
    return encoders.load(_encoder_source())


def _texts(data: Path, name: str) -> TextSet:
    path = data / f"{name}.parquet"
    found = datasets.read(path) if path.is_file() else None
    if found is None:
        raise SystemExit(f"{data} has no {name}.parquet with columns text and label_name")
    return found


def _threads(arguments: Namespace) -> str:
    return f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files, one a set")
    report.add_parts(parser, PARTS)
    parser.add_argument("--threads", type=int, default=1, help="of both sides; what the served processes have is 1")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.threads < 1 or arguments.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    torch.set_num_threads(arguments.threads)
    started_on = report.machine()
    report.publish("contexts", report.rows_of(PARTS, arguments), json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
