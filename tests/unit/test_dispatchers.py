"""The dispatch stages that read text, over a pretended backbone; and that "other" leaves no expert behind."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from metasepia.decoding.engine import Engine
from metasepia.dispatch.dispatcher import (
    Described,
    Dispatcher,
    category_of,
    dispatch_messages,
    route_by_classifier,
    route_by_prompt,
)
from metasepia.errors import CorruptArtefact
from metasepia.experts.factors import factors_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Adapter, Executed, Row, Scores, TokenChunk
from tests.unit.test_engine import DIGEST, LIMITS, PREPARED

MATHS = Described(digest="a" * 64, name="maths", about="Adds numbers.")
LAW = Described(digest="b" * 64, name="law", about="Reads contracts.")
ROUTER = Dispatcher(
    digest="c" * 64, prompt="Who? {text}", labels={"count": "maths", "court": "law", "other": None, "gone": "art"}
)
EXPERTS = {"maths": MATHS.digest, "law": LAW.digest}


class Letters:
    """A token a character."""

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return tuple(map(ord, "".join(one["content"] for one in messages)))

    def continuation(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def text(self, token_ids: Any) -> str:
        return "".join(map(chr, token_ids))


class Pretended:
    digest = DIGEST

    def __init__(self, says: str = "", likes: Mapping[str, float] | None = None) -> None:
        self.says, self.likes, self.rows = says, dict(likes or {}), list[Row]()

    async def generate(self, row: Row) -> AsyncGenerator[TokenChunk]:
        self.rows.append(row)
        for letter in self.says:
            yield TokenChunk(request_id=row.request_id, token_ids=(ord(letter),), logprobs=(math.log(0.5),))

    async def score(self, row: Row) -> Scores:
        """Probabilities of labels, on the last token."""
        self.rows.append(row)
        answer = Letters().text(row.token_ids[row.score_from :])
        logprobs = np.zeros(len(answer), np.float32)
        logprobs[-1] = math.log(self.likes.get(answer, 1e-6))
        executed = Executed(
            backbone=DIGEST, factors=None, adapter=row.adapter, path="factors", dtype="float32", tp_size=1
        )
        return Scores(request_id=row.request_id, logprobs=logprobs, executed=executed)


def by_prompt(backbone: Pretended, **options: Any) -> Any:
    return asyncio.run(route_by_prompt(backbone, "2 + 2?", [MATHS, LAW], Letters(), **options))


def by_classifier(backbone: Pretended, **options: Any) -> Any:
    return asyncio.run(route_by_classifier(backbone, "2 + 2?", ROUTER, EXPERTS, Letters(), **options))


@pytest.mark.parametrize(
    ("answer", "category"),
    [
        (r"\boxed{maths}", "maths"),
        (r"I think \boxed{law}, no: \boxed{ Maths. }", "maths"),
        (r"\boxed{\text{law}}", "law"),
        (r"$\boxed{'law'}$", "law"),
        (r"\boxed{other}", "other"),
        (r"\boxed{art}", None),
        ("maths", None),
        ("", None),
    ],
)
def test_the_category_is_read_from_the_last_box(answer: str, category: str | None) -> None:
    assert category_of(answer, ["maths", "law"]) == category


def test_the_dispatch_prompt_names_every_expert_with_what_it_is_for_and_other() -> None:
    system = dispatch_messages("2 + 2?", [MATHS, LAW])[0]["content"]
    assert "- maths: Adds numbers." in system and "- law: Reads contracts." in system and "- other" in system
    assert "\\boxed{category}" in system


def test_prompt_chooses_what_the_base_model_boxes_and_reads_no_further() -> None:
    backbone = Pretended("So: \\boxed{law} because")
    found = by_prompt(backbone)
    assert (found.expert, found.stage, found.is_other) == (LAW.digest, "prompt", False)
    assert found.margin == pytest.approx(0.5)
    assert backbone.rows[0].adapter == () and backbone.rows[0].sampling.temperature == 0


def test_prompt_abstains_where_it_cannot_be_parsed_or_is_unsure_or_does_not_fit() -> None:
    assert by_prompt(Pretended("maths")).abstains
    assert by_prompt(Pretended(r"\boxed{maths}"), min_margin=0.6).abstains
    unasked = Pretended(r"\boxed{maths}")
    assert by_prompt(unasked, window=100).abstains and unasked.rows == []
    assert asyncio.run(route_by_prompt(unasked, "2 + 2?", [], Letters())).abstains and unasked.rows == []


def test_other_is_no_abstention_but_the_base() -> None:
    for found in (by_prompt(Pretended(r"\boxed{other}")), by_classifier(Pretended(likes={"other": 0.9}))):
        assert found.expert is None and found.is_other and not found.abstains


def test_classifier_chooses_the_likeliest_label_by_the_dispatch_expert_with_its_lead_as_margin() -> None:
    backbone = Pretended(likes={"count": 0.6, "court": 0.2})
    found = by_classifier(backbone)
    assert (found.expert, found.stage) == (MATHS.digest, "classifier")
    assert found.margin == pytest.approx((0.6 - 0.2) / 0.8, abs=1e-4)
    assert {row.adapter for row in backbone.rows} == {((ROUTER.digest, 1.0),)}
    assert {row.prefix for row in backbone.rows} == {Letters().continuation("Who? 2 + 2?")}


def test_classifier_abstains_where_it_is_unsure_or_means_an_expert_that_is_gone_or_does_not_fit() -> None:
    likes = {"count": 0.4, "court": 0.3}
    assert by_classifier(Pretended(likes=likes), min_margin=0.2).abstains
    assert by_classifier(Pretended(likes={"gone": 0.9})).abstains
    unasked = Pretended(likes=likes)
    assert by_classifier(unasked, window=12).abstains and unasked.rows == []


def test_a_label_is_scored_with_the_token_that_ends_it() -> None:
    backbone = Pretended(likes={"count!": 0.9})
    assert by_classifier(backbone, stop_token_ids=(ord("!"), 5)).expert == MATHS.digest


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("yes", "cannot be read"),
        ({"prompt": "who?", "labels": {"a": "maths", "b": None}}, "{text} once"),
        ({"prompt": "{text}", "labels": {"a": "maths"}}, "2 to 64 labels"),
        ({"prompt": "{text}", "labels": {"a": "maths", " ": None}}, "2 to 64 labels"),
        ({"prompt": "{text}", "labels": {"a": 7, "b": None}}, "each of a name or null"),
        ({"prompt": "{text}"}, "cannot be read"),
    ],
)
def test_a_broken_dispatcher_entry_is_refused(entry: object, problem: str) -> None:
    with pytest.raises(CorruptArtefact, match=problem):
        Dispatcher.of_card({"dispatcher": entry}, "c" * 64)


def test_an_expert_without_the_entry_dispatches_nothing() -> None:
    assert Dispatcher.of_card({}, "c" * 64) is None


def test_other_after_any_expert_request_runs_on_the_base_weights_bit_for_bit(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In the reference the expert of the last category stays loaded."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval().requires_grad_(False)
    factors = factors_of(model, ("mlp.up_proj",), DIGEST, tmp_path, progress=False)
    draw = np.random.default_rng(0)
    z = {name: draw.uniform(0, 3, length).astype(np.float32) for name, length in factors.index.lengths.items()}
    expert = ExpertVectors(backbone=DIGEST, factors=factors.digest, z=z)
    prompt = tuple(map(int, draw.integers(0, 255, 20)))

    async def asked(engine: Engine, adapter: Adapter) -> np.ndarray:
        row = Row(request_id="r", backbone=DIGEST, token_ids=prompt, adapter=adapter, want="logprobs")
        return (await engine.score(row)).logprobs

    async def dispatched(engine: Engine, likes: Mapping[str, float]) -> np.ndarray:
        """The first pass by a dispatch expert, the second as it says."""
        experts = {"maths": expert.digest}
        found = await route_by_classifier(Pretended(likes=likes), "2 + 2?", ROUTER, experts, Letters())
        return await asked(engine, () if found.expert is None else ((found.expert, 1.0),))

    async def main(engine: Engine) -> None:
        before = await asked(engine, ())
        engine.put_expert(expert)
        by_expert = await dispatched(engine, {"count": 0.9})
        assert np.abs(by_expert - before).max() > 1e-2
        np.testing.assert_array_equal(await dispatched(engine, {"other": 0.9}), before)

    with Engine(model, PREPARED, experts=attach(model, factors), limits=LIMITS) as engine:
        asyncio.run(main(engine))
