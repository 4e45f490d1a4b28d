"""Mixtures of experts: what one generation of a few-shot search costs, and what choosing an expert first costs.

    python -m benchmarks.mixtures
    python -m benchmarks.mixtures --parts search --threads 1

SmolLM2-135M in one process at tp_size 1, and the experts that come with the package. Both sides of a ratio run in turn
with the same number of threads, on the same candidates and shots; medians over the rounds are quoted. `search` first
checks that both sides give each candidate the same score, to 1e-4 of it, and stops where they do not. `dispatch` sends
held-out messages, half of them for no expert, through each stage of `auto` and then answers them, one at a time.
"""

import asyncio
import dataclasses
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from cluster import settings as settings_of
from jobs.tasks.desk import DESK
from jobs.tasks.dispatch import DISPATCH
from jobs.tasks.sentiment import SENTIMENT
from jobs.tasks.support import SUPPORT
from metasepia.decoding.engine import Engine
from metasepia.decoding.inflight import Limits
from metasepia.dispatch.centroid import CentroidTable, Dispatched, TaskCentroid
from metasepia.dispatch.dispatcher import Described, Dispatcher, route_by_classifier, route_by_prompt
from metasepia.experts.factors import FactorSet, factors_of
from metasepia.experts.mixing import ExpertMixer, adapter_of, base_of
from metasepia.experts.shipped import CARD, EXPERTS, FILE, card_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter, Row, Sampling
from metasepia.search.fewshot import Asked, Scoring, Shot, common_prefix
from serve.models.prompts import Prompts

LAYERS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TASKS = (DESK, SENTIMENT, SUPPORT)
NUM_CANDIDATES, NUM_SHOTS, SHOT_LEN = 32, 8, 60
TOLERANCE = 1e-4
LIMITS = Limits(
    max_rows=16, max_batch_tokens=16_384, max_queued_tokens=1 << 20, max_prefix_tokens=8192, step_target_s=2.0
)
"""Nobody streams here, so steps may be as long as a candidate's shots take."""
SHIPPED = tuple(task.name for task in TASKS)
ANSWER_LEN = 64
Choose = Callable[[str], Awaitable[Dispatched]]


@dataclass
class Subject:
    """The model twice, with expert layers and without, and the shipped experts."""

    prepared: PreparedBackbone
    engine: Engine
    plain: Any
    factors: FactorSet
    experts: dict[str, ExpertVectors]
    """By digest, the base among them."""
    prompts: Prompts

    @classmethod
    def of(cls) -> "Subject":
        settings = settings_of.read("laptop")
        prepared = checkpoints.prepare(settings.backbones[0].source, settings.home)
        plain = checkpoints.load(prepared, torch.float32, "cpu")
        factors = factors_of(plain, LAYERS, prepared.digest, settings.home, progress=False)
        model = checkpoints.load(prepared, torch.float32, "cpu")
        layers = attach(model, factors)
        shipped = [ExpertVectors.from_bytes((EXPERTS / task.name / FILE).read_bytes()) for task in TASKS]
        engine = Engine(model, prepared, experts=layers, limits=LIMITS)
        for expert in shipped:
            engine.put_expert(expert)
        experts = {one.digest: one for one in (*shipped, base_of(shipped[0]))}
        prompts = Prompts(Path(prepared.tokenizer_dir), prepared.source)
        return cls(prepared, engine, plain, factors, experts, prompts)

    def shots(self) -> list[Shot]:
        """Chats of the shipped experts' tasks with their answers, of `SHOT_LEN` tokens each."""
        found: dict[str, Shot] = {}
        for task, step in ((task, step) for step in range(400) for task in TASKS):
            example = task.batch("valid", 1, seed=0, step=step)[0]
            prompt = self.prompts.chat([{"role": "user", "content": example.prompt}])
            answer = (*self.prompts.continuation(example.answer), self.prepared.eos_token_ids[0])
            shot = Shot(prompt=prompt, answer=answer)
            if len(prompt) + len(answer) == SHOT_LEN:
                found.setdefault(shot.id, shot)
            if len(found) == NUM_SHOTS:
                return list(found.values())
        raise SystemExit(f"only {len(found)} examples have {SHOT_LEN} tokens")

    def candidates(self, seed: int) -> list[Adapter]:
        """Different mixtures each round: what was read for one round must not serve the next."""
        draw = np.random.default_rng(seed)
        return [
            adapter_of(dict(zip(self.experts, alpha.tolist(), strict=True)))
            for alpha in draw.dirichlet(np.ones(len(self.experts)), NUM_CANDIDATES)
        ]

    def materialised(self, candidates: Sequence[Adapter], shots: Sequence[Shot]) -> list[float]:
        """Each candidate in turn: its weights rebuilt for all layers and copied into the model, its shots one batch."""
        mixer = ExpertMixer(self.experts)
        tokens = torch.tensor([[*shot.prompt, *shot.answer] for shot in shots])
        keep = max(len(shot.answer) for shot in shots) + 1
        scores: list[float] = []
        with torch.inference_mode():
            for candidate in candidates:
                for name, z in mixer.mix(dict(candidate)).z.items():
                    self.plain.get_parameter(name).copy_(self.factors[name].scaled(torch.from_numpy(z)))
                logits = self.plain(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[:, :-1]
                targets = tokens[:, -keep + 1 :]
                logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
                means = [logprobs[i, -len(shot.answer) :].mean() for i, shot in enumerate(shots)]
                scores.append(float(torch.stack(means).mean()))
        return scores

    def stages(self) -> dict[str, Choose]:
        """The stages of `auto` over the shipped experts, each by itself."""
        cards = {name: card_of(EXPERTS / name) for name in SHIPPED}
        digests = {name: one.digest for name, one in zip(SHIPPED, self.experts.values(), strict=False)}
        centroids = {digests[name]: TaskCentroid.of_card(card, name) for name, card in cards.items()}
        table = CentroidTable(self.prepared.digest, {d: one for d, one in centroids.items() if one is not None})
        described = [
            Described(digest=digests[name], name=name, about=str(card["description"])) for name, card in cards.items()
        ]
        ends = self.prepared.eos_token_ids

        async def centroid(text: str) -> Dispatched:
            prompt = self.prompts.chat([{"role": "user", "content": text}])
            row = Row(request_id="r", backbone=self.prepared.digest, token_ids=prompt, want="hidden_states")
            asked = [dataclasses.replace(row, hidden=wanted) for wanted in table.wanted]
            states = await asyncio.gather(*map(self.engine.hidden_states, asked))
            return table.choose({wanted: one.states for wanted, one in zip(table.wanted, states, strict=True)})

        async def prompt(text: str) -> Dispatched:
            return await route_by_prompt(self.engine, text, described, self.prompts, stop_token_ids=ends)

        found: dict[str, Choose] = {"centroid": centroid, "prompt": prompt}
        path = EXPERTS / "dispatch"
        if (path / CARD).is_file():
            router = ExpertVectors.from_bytes((path / FILE).read_bytes())
            self.engine.put_expert(router)
            dispatcher = Dispatcher.of_card(card_of(path), router.digest, "dispatch")
            assert dispatcher is not None

            async def classifier(text: str) -> Dispatched:
                return await route_by_classifier(
                    self.engine, text, dispatcher, digests, self.prompts, stop_token_ids=ends
                )

            found["classifier"] = classifier
        return found

    async def answer(self, text: str, adapter: Adapter) -> None:
        prompt = self.prompts.chat([{"role": "user", "content": text}])
        sampling = Sampling(temperature=0.0, max_tokens=ANSWER_LEN, stop_token_ids=self.prepared.eos_token_ids)
        row = Row(request_id="r", backbone=self.prepared.digest, token_ids=prompt, adapter=adapter, sampling=sampling)
        async for _ in self.engine.generate(row):
            pass

    async def searched(self, candidates: Sequence[Adapter], shots: Sequence[Shot], *, share: bool) -> list[float]:
        """All candidates at once, as a search asks for them."""
        asked = Asked(self.engine, shots, Scoring(share_prefix=share))
        return [score.value for score in await asked.scores(candidates)]


def search(subject: Subject, options: Namespace) -> list[report.Row]:
    shots = subject.shots()
    shared = len(common_prefix([shot.prompt for shot in shots]))
    asyncio.run(subject.searched(subject.candidates(10_000), shots, share=True))  # weights are packed at first use
    subject.materialised(subject.candidates(10_000)[:1], shots)
    seconds: dict[str, list[float]] = {"ours": [], "nothing shared": [], "against": []}
    worst = 0.0
    for number in range(options.rounds):
        candidates = subject.candidates(2 * number)
        ours, took = _timed(lambda c=candidates: asyncio.run(subject.searched(c, shots, share=True)))
        seconds["ours"].append(took)
        theirs, took = _timed(lambda c=candidates: subject.materialised(c, shots))
        seconds["against"].append(took)
        alone = subject.candidates(2 * number + 1)
        _, took = _timed(lambda c=alone: asyncio.run(subject.searched(c, shots, share=False)))
        seconds["nothing shared"].append(took)
        worst = max(worst, float(np.max(np.abs(np.subtract(ours, theirs) / np.array(theirs)))))
        if not worst <= TOLERANCE:
            raise SystemExit(f"the two sides' scores differ by {worst:.2g} of them; nothing here counts")
    median = {name: report.median(values) for name, values in seconds.items()}
    what = f"a generation: {NUM_CANDIDATES} mixtures x {NUM_SHOTS} shots of {SHOT_LEN} tokens"
    same = f"{options.threads} threads; scores equal to {worst:.0e}"
    rows = [
        report.duration(
            "search-generation", what, median["ours"], median["against"], "s",
            f"against rebuilding and loading each in turn; {shared} tokens begin every shot; {same}", part="search",
        ),
        report.duration(
            "search-generation-unshared", f"{what}, no prefix kept", median["nothing shared"], median["against"], "s",
            "the same when shots begin with nothing in common", part="search", detail=True,
        ),
    ]  # fmt: skip
    return rows


def dispatch(subject: Subject, options: Namespace) -> list[report.Row]:
    """Of each stage the first pass, which chooses, against the second, which answers with what was chosen."""
    messages = [one.text for one in DISPATCH.held_out(options.messages, seed=0)]
    rows: list[report.Row] = []
    for stage, choose in subject.stages().items():
        seconds = asyncio.run(_passes(subject, choose, messages))
        first, second = (sum(column) / len(column) for column in zip(*seconds, strict=True))
        rows.append(
            report.duration(
                f"first-pass-{stage}", f"auto by {stage}: choosing, against answering in {ANSWER_LEN} tokens or fewer",
                first, second, "s", f"{first / second:.0%} of the second pass; {len(messages)} messages, one at a time",
                part="dispatch",
            )
        )  # fmt: skip
    return rows


async def _passes(subject: Subject, choose: Choose, messages: Sequence[str]) -> list[tuple[float, float]]:
    await choose("Hello, what can you do for me?")  # weights are packed at first use
    seconds: list[tuple[float, float]] = []
    for message in messages:
        begin = time.perf_counter()
        chosen = await choose(message)
        between = time.perf_counter()
        await subject.answer(message, () if chosen.expert is None else ((chosen.expert, 1.0),))
        seconds.append((between - begin, time.perf_counter() - between))
    return seconds


def _timed(work: Callable[[], list[float]]) -> tuple[list[float], float]:
    begin = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begin


PARTS = {"search": search, "dispatch": dispatch}


def main() -> None:
    parser = report.parser(__doc__)
    report.add_parts(parser, PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--messages", type=int, default=24, help="that `dispatch` sends through each stage")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    started_on = report.machine()
    subject = Subject.of()
    rows = [row for part in options.parts for row in PARTS[part](subject, options)]
    subject.engine.close()
    report.publish("mixtures", rows, json_file=options.json, started_on=started_on)


if __name__ == "__main__":
    main()
