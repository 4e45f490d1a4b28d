"""Part `speed`: embeddings an hour of prompts on SmolLM2, the model's answers included, ours against one at a time.

Ours: the prompts' label scores as background rows of one engine (`metasepia.blackbox.local`, shared beginnings, one
row a text), then all prompts' prefixes in one batched forward.
One at a time, as FUTE's published code does it: batch size 1,
`generate` of at most 5 tokens with transformers, its repetition penalties, scores read from the first token that is no
blank; its tokenizer is made from disk for every text (a row without that stands beside it); then one prefix at a time
by its settings for language models (3 epochs of AdamW at 1e-3), on our surrogate and our fast linear layers, which is
generous to it. Both sides answer the same texts.

Processor time of the process, so that neighbours on the machine count little; the sides take turns, medians are quoted.
"Two cores" are two hours of processor time.
"""

import asyncio
import dataclasses
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.task_embeddings_answers import BACKBONE
from benchmarks.task_embeddings_vectors import Bench
from benchmarks.task_embeddings_wordings import TEN, Wording
from metasepia.blackbox.local import LocalModel
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.tokens import TextTokens
from metasepia.decoding.engine import Engine
from metasepia.embedding.answers import Answers
from metasepia.embedding.methods import method
from metasepia.embedding.prefix import PAPER, PrefixMethod, PrefixSettings
from metasepia.models import checkpoints

ASKED = ("sst2", "ag_news", "trec")
"""Data sets whose wordings are embedded."""
REFERENCE = {**PAPER, "epochs": 3, "learning_rate": 1e-3, "batch_size": 32, "imitate": "needed"}
CPU_S = 2 * 3600
"""Processor seconds in an hour of two cores."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """Processor seconds an embedding."""

    answers: float
    reload: float
    """Of the tokenizer, within none of the others."""
    embedding: float


def ours(engine: Engine, tokens: TextTokens, wordings: Sequence[Wording], texts: Sequence[str], using: Any) -> Spent:
    boxes = [
        LocalModel(
            engine,
            tokens,
            Prompt(template=one.template, labels={label: f" {word}" for label, word in one.words.items()}),
            chat=False,
            prepared=engine.prepared,
        )
        for one in wordings
    ]

    async def asked() -> list[Answers]:
        return list(await asyncio.gather(*(box.answer(texts) for box in boxes)))

    began = time.process_time()
    answers = asyncio.run(asked())
    answered = time.process_time()
    using.embed(answers)
    ended = time.process_time()
    return Spent((answered - began) / len(wordings), 0.0, (ended - answered) / len(wordings))


@torch.inference_mode()
def generated(model: Any, tokenizer_dir: str, wording: Wording, texts: Sequence[str]) -> tuple[Answers, float, float]:
    """The reference's way to soft labels; its processor seconds without and of making the tokenizer for each text."""
    from transformers import AutoTokenizer

    labels = sorted(wording.words)
    scores = np.zeros((len(texts), len(labels)))
    reload = spent = 0.0
    for row, text in enumerate(texts):
        began = time.process_time()
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        made = time.process_time()
        inputs = tokenizer(wording.template.replace("{text}", text), return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, repetition_penalty=1.2, no_repeat_ngram_size=3,
            output_scores=True, return_dict_in_generate=True, pad_token_id=2,
        )  # fmt: skip
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        step = next((i for i, token in enumerate(new) if tokenizer.decode([token]).strip()), 0)
        for column, label in enumerate(labels):
            spellings = (f" {wording.words[label]}", wording.words[label])
            firsts = [tokenizer(one, add_special_tokens=False).input_ids[0] for one in spellings]
            scores[row, column] = max(float(output.scores[step][0, token]) for token in firsts)
        reload += made - began
        spent += time.process_time() - made
    finite = np.where(np.isfinite(scores), scores, -1e4)
    return Answers.of_probabilities(texts, labels, _softmax(finite)), spent, reload


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def speed(bench: Bench, arguments: Namespace) -> list[report.Row]:
    """The part."""
    prepared = checkpoints.prepare(BACKBONE, arguments.home)
    texts = bench.probes.first(arguments.speed_texts).texts
    probes = bench.probes.first(arguments.speed_texts)
    wordings = [one for name in ASKED for one in TEN[name][: arguments.speed_prompts]]
    sides = {name: method(name, bench.encoder, probes) for name in bench.methods}
    reference = PrefixMethod(bench.encoder, probes, PrefixSettings(**REFERENCE))
    plain: Any = checkpoints.load(prepared, torch.float32, "cpu").eval()
    tokens = TextTokens(prepared)
    found: dict[str, list[Spent]] = {}
    with Engine(checkpoints.load(prepared, torch.float32, "cpu"), prepared) as engine:
        first = wordings[:1]  # compiles, packs and reads files on both sides
        for name in sides:
            ours(engine, tokens, first, texts, sides[name])
        generated(plain, prepared.tokenizer_dir, first[0], texts[:2])
        for turn in range(arguments.speed_rounds):
            for name, using in sides.items():
                found.setdefault(name, []).append(ours(engine, tokens, wordings, texts, using))
            wording = wordings[turn * len(wordings) // arguments.speed_rounds]
            answers, spent, reload = generated(plain, prepared.tokenizer_dir, wording, texts)
            began = time.process_time()
            reference.embed([answers])
            found.setdefault("reference", []).append(Spent(spent, reload, time.process_time() - began))
            print(f"  round {turn + 1}: {found['reference'][-1]}, {found[next(iter(sides))][-1]}", flush=True)
    theirs = _median(found["reference"])
    rows = []
    for name in sides:
        own = _median(found[name])
        total = own.answers + own.embedding
        sizes = f"{len(wordings)} prompts, {len(texts)} texts, {arguments.speed_rounds} rounds"
        note = f"answers {own.answers:.2f} s and embedding {own.embedding:.2f} s CPU a prompt, against "
        note += f"{theirs.answers:.2f} s, {theirs.reload:.2f} s for tokenizers and {theirs.embedding:.2f} s; {sizes}"
        for id, what, against in (
            ("", "one at a time as published", theirs.answers + theirs.reload + theirs.embedding),
            ("-kept-tokenizer", "one at a time, the tokenizer kept", theirs.answers + theirs.embedding),
        ):
            rows.append(
                report.rate(
                    f"speed-{name}{id}",
                    f"embeddings an hour on two cores, SmolLM2's answers included: {name} against {what}",
                    CPU_S / total,
                    CPU_S / against,
                    "an hour",
                    note,
                    detail=bool(id) and name != "prefix",
                )
            )
    return rows


def _median(each: Sequence[Spent]) -> Spent:
    fields = (field.name for field in dataclasses.fields(Spent))
    return Spent(*(report.median([getattr(one, name) for one in each]) for name in fields))
