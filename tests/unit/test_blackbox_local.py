"""Backbones and functions as black boxes, against the oracle that runs each sequence alone."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from metasepia.backbone import ReferenceBackbone
from metasepia.blackbox.boxes import Progress
from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.callables import FromCallable
from metasepia.blackbox.heads import OutputRows
from metasepia.blackbox.local import HEAD, ROWS, LocalModel
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.tokens import TextTokens, Tokeniser
from metasepia.decoding.engine import Engine
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidRequest, InvalidSettings, NotSupported, Overloaded, Unavailable, WindowExceeded
from metasepia.experts.lora import LoraAdapter
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk
from tests import tiny

DIGEST = "b" * 64
TEXTS = ["the lamp broke", "thank you", "a longer text than the others are, by far", "ok"]
LETTERS = Prompt(template="Review of a thing: {text}\nIt is", labels={"bad": "b", "good": "g", "neither": "n"})
WORDS = Prompt(template="Review of a thing: {text}\nIt is", labels={"bad": " bad", "bat": " bat"})


def model_of(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


class World:
    """One family's tiny model, as an engine and as the oracle."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        model = model_of(directory)
        self.prepared = dataclasses.replace(
            tiny.prepared(DIGEST), path=str(directory), tokenizer_dir=str(directory), **changes
        )
        self.tokens = TextTokens(self.prepared)
        self.oracle = ReferenceBackbone(model_of(directory), DIGEST)
        self.engine = Engine(model, self.prepared)

    def box(self, prompt: Prompt, **more: Any) -> LocalModel:
        return LocalModel(self.engine, self.tokens, prompt, prepared=self.prepared, **more)

    def teacher_forced(self, prompt: Prompt, *, chat: bool, adapter: Any = ()) -> np.ndarray:
        """Sums of log-probabilities by plain forwards, one sequence at a time."""
        sums = np.zeros((len(TEXTS), len(prompt.names)))
        for i, text in enumerate(TEXTS):
            before = self.tokens.chat(prompt.messages(text)) if chat else self.tokens.plain(prompt.document(text))
            for j, word in enumerate(prompt.verbalisers):
                ids = (*before, *self.tokens.continuation(word))
                logs = self.oracle.logits(ids, adapter).double().log_softmax(-1)
                sums[i, j] = sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids)))
        return sums


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Callable[[str], Path]) -> Iterator[World]:
    made = World(tiny_checkpoint("llama"))
    yield made
    made.engine.close()


def answer(box: Any, texts: Sequence[str] = TEXTS, **more: Any) -> Answers:
    return asyncio.run(asyncio.wait_for(box.answer(list(texts), **more), 60))


def softmax(sums: np.ndarray) -> np.ndarray:
    weights = np.exp(sums - sums.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", [LETTERS, WORDS], ids=["one token", "several tokens"])
def test_labels_have_their_teacher_forced_probabilities(world: World, prompt: Prompt, chat: bool):
    box = world.box(prompt, chat=chat)
    answers = answer(box)
    np.testing.assert_allclose(answers.probabilities, softmax(world.teacher_forced(prompt, chat=chat)), atol=1e-5)
    assert answers.labels == prompt.names
    assert answers.standard_error is None
    assert box.source()["way"] == (HEAD if prompt is LETTERS else ROWS)
    assert (box.source()["path"], box.source()["chat"]) == ("plain", chat)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "qwen2"])
def test_other_families_are_scored_by_their_own_output_layers(tiny_checkpoint: Callable[[str], Path], family: str):
    made = World(tiny_checkpoint(family))
    try:
        box = made.box(LETTERS, chat=False)
        np.testing.assert_allclose(
            answer(box).probabilities, softmax(made.teacher_forced(LETTERS, chat=False)), atol=1e-5
        )
        assert box.source()["way"] == HEAD
    finally:
        made.engine.close()


def test_an_output_layer_that_is_more_than_its_rows_is_found_out_and_not_relied_upon(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """As where logits are scaled or capped: the first text is scored both ways."""
    read = OutputRows.of

    def scaled(prepared: PreparedBackbone, token_ids: Sequence[int]) -> OutputRows:
        found = read(prepared, token_ids)
        assert found is not None
        return OutputRows(found.weight * np.float32(1.5))

    monkeypatch.setattr(OutputRows, "of", scaled)
    box = world.box(LETTERS, chat=False)
    np.testing.assert_allclose(answer(box).probabilities, softmax(world.teacher_forced(LETTERS, chat=False)), atol=1e-5)
    assert box.source()["way"] == ROWS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_rows_are_the_stored_numbers_whatever_their_type(tmp_path: Path, dtype: torch.dtype):
    model: Any = tiny.llama(tie_word_embeddings=False)
    model = model.to(dtype)
    model.save_pretrained(tmp_path)
    prepared = dataclasses.replace(tiny.prepared(), path=str(tmp_path))
    found = OutputRows.of(prepared, [5, 95, 0])
    assert found is not None
    torch.testing.assert_close(torch.tensor(found.weight), model.lm_head.weight[[5, 95, 0]].float(), rtol=0, atol=0)
    assert OutputRows.of(prepared, [10_000]) is None


def test_an_expert_answers_by_its_own_weights_and_has_its_own_digest(world: World):
    rng = np.random.default_rng(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (96, 48)}
    expert = LoraAdapter(
        backbone=DIGEST,
        a={name: rng.standard_normal((2, side[1])).astype(np.float32) for name, side in shapes.items()},
        b={name: rng.standard_normal((side[0], 2)).astype(np.float32) for name, side in shapes.items()},
    )
    world.engine.put_expert(expert)
    world.oracle.put_expert(expert)
    adapter = ((expert.digest, 1.0),)
    base, box = world.box(WORDS, chat=False), world.box(WORDS, chat=False, adapter=adapter)
    want = softmax(world.teacher_forced(WORDS, chat=False, adapter=adapter))
    got = answer(box).probabilities
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - answer(base).probabilities).max() > 0.01
    assert box.digest != base.digest
    assert box.source()["path"] == "lora"


def test_scores_by_token_or_character_divide_what_is_summed(world: World):
    prompt = dataclasses.replace(WORDS, labels={"bad": " bad", "good": " very good"})
    sums = world.teacher_forced(prompt, chat=False)
    by_token = answer(world.box(prompt, chat=False, normalise="token")).probabilities
    np.testing.assert_allclose(by_token, softmax(sums / [4, 10]), atol=1e-5)
    by_character = answer(world.box(prompt, chat=False, normalise="character")).probabilities
    np.testing.assert_allclose(by_character, softmax(sums / [3, 9]), atol=1e-5)
    assert by_character.min() > 1e-3  # both say something


def test_calibrated_scores_are_divided_by_those_of_nothing(world: World):
    plain = answer(world.box(LETTERS, chat=False), [*TEXTS, "N/A", "[MASK]"]).probabilities.astype(float)
    got = answer(world.box(LETTERS, chat=False, calibrate=("N/A", "[MASK]"))).probabilities
    ratio = plain[:4] / plain[4:].mean(0)
    np.testing.assert_allclose(got, ratio / ratio.sum(1, keepdims=True), atol=1e-5)


def test_replies_are_greedy_and_end_with_the_models_own_token(world: World):
    prompt = Prompt(template="Review: {text}", max_tokens=6)
    replies = answer(world.box(prompt, chat=False)).replies
    for text, reply in zip(TEXTS, replies, strict=True):
        ids = list(world.tokens.plain(prompt.document(text)))
        begin = len(ids)
        while len(ids) < begin + 6:
            token = int(world.oracle.logits(tuple(ids))[-1].argmax())
            if token in world.prepared.eos_token_ids:
                break
            ids.append(token)
        assert reply == world.tokens.text(ids[begin:])


class Watched:
    """A backbone that counts what it is asked, and may be full."""

    def __init__(self, engine: Engine, *, full: int = 0, fails: bool = False) -> None:
        self.engine, self.full, self.fails = engine, full, fails
        self.rows: list[Row] = []
        self.in_flight = self.most = 0

    @property
    def digest(self) -> str:
        return self.engine.digest

    def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        return self.engine.generate(row)

    async def score(self, row: Row) -> Scores:
        return await self._counted(self.engine.score, row)

    async def hidden_states(self, row: Row) -> HiddenStates:
        return await self._counted(self.engine.hidden_states, row)

    async def _counted(self, ask: Any, row: Row) -> Any:
        self.rows.append(row)
        if len(self.rows) <= self.full:
            raise Overloaded("the backbone's queue", 0.01)
        if self.fails:
            raise Unavailable("the backbone", 1.0)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            return await ask(row)
        finally:
            self.in_flight -= 1


def test_one_token_labels_cost_one_background_row_a_text_and_equal_texts_are_read_once(world: World):
    watched = Watched(world.engine)
    answers = answer(LocalModel(watched, world.tokens, LETTERS, chat=False, prepared=world.prepared), TEXTS * 3)
    wants = [row.want for row in watched.rows]
    assert wants.count("hidden_states") == 4 + 1  # the first text is scored both ways
    assert wants.count("logprobs") == 3
    assert {row.priority for row in watched.rows} == {-1}
    assert all(row.token_ids[: len(row.prefix)] == row.prefix and len(row.prefix) >= 16 for row in watched.rows)
    np.testing.assert_array_equal(answers.probabilities[:4], answers.probabilities[8:])


def test_rows_of_many_labels_share_the_whole_prompt(world: World):
    prompt = Prompt(
        template="A thing: {text}\nIt is", labels={name: f" {name}" for name in ("bad", "good", "odd", "so")}
    )
    watched = Watched(world.engine)
    answer(LocalModel(watched, world.tokens, prompt, chat=False, prepared=world.prepared))
    assert all(len(row.prefix) == row.score_from for row in watched.rows)


def test_a_full_backbone_is_waited_for(world: World):
    watched = Watched(world.engine, full=5)
    got = answer(LocalModel(watched, world.tokens, WORDS, chat=False, prepared=world.prepared))
    want = answer(world.box(WORDS, chat=False)).probabilities
    np.testing.assert_allclose(got.probabilities, want, rtol=1e-5)
    assert want.std() > 0.1


def test_what_a_row_raises_is_raised_itself(world: World):
    with pytest.raises(Unavailable):
        answer(LocalModel(Watched(world.engine, fails=True), world.tokens, WORDS, chat=False))


def test_rows_in_flight_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metasepia.blackbox.local.MAX_ROWS", 4)
    watched = Watched(world.engine)
    answer(LocalModel(watched, world.tokens, WORDS, chat=False), [f"text {i}" for i in range(12)])
    assert watched.most <= 4


def test_a_cached_local_model_asks_nothing_twice(world: World, tmp_path: Path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        first = answer(world.box(WORDS, chat=False, cache=cache))
        watched = Watched(world.engine)
        told: list[Progress] = []
        box = LocalModel(watched, world.tokens, WORDS, chat=False, prepared=world.prepared, cache=cache)
        again = answer(box, [*TEXTS, "new"], told=told.append)
    assert again.only(range(4)).digest == first.digest
    assert len(watched.rows) == 2
    assert (told[0].done, told[0].cached, told[-1].done) == (4, 4, 5)


def test_texts_and_templates_that_do_not_fit_the_window_are_named(world: World):
    with pytest.raises(WindowExceeded, match=r"texts\[1\]: "):
        answer(world.box(WORDS, chat=False), ["short", "x" * 300])
    with pytest.raises(WindowExceeded, match=r"prompt\.template: "):
        world.box(Prompt(template="y" * 300 + "{text}"), chat=False)


def test_a_chat_without_a_template_is_refused_and_texts_go_as_they_are_when_nobody_says(
    world: World, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
):
    plain = tiny.save("llama", tmp_path)
    (plain / "chat_template.jinja").unlink()
    tokens = TextTokens(dataclasses.replace(world.prepared, tokenizer_dir=str(plain)))
    with pytest.raises(NotSupported, match="no chat template"):
        Tokeniser(tokens, WORDS, True)
    assert not Tokeniser(tokens, WORDS, None).chat
    assert Tokeniser(world.tokens, WORDS, None).chat


def test_spaces_at_a_templates_end_go_with_the_verbaliser(world: World):
    spaced = Prompt(template="It: {text} is ", labels={"a": "bad", "b": "good"})
    written = Prompt(template="It: {text} is", labels={"a": " bad", "b": " good"})
    assert Tokeniser(world.tokens, spaced, False)("x") == Tokeniser(world.tokens, written, False)("x")


# -- functions ---------------------------------------------------------------------------------------------------------


def test_a_functions_probabilities_come_out_under_sorted_labels():
    table = {text: [0.2, 0.5, 0.3] if i % 2 else [0.1, 0.1, 0.8] for i, text in enumerate(TEXTS)}
    asked: list[str] = []

    def predict(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([table[text] for text in texts])

    answers = answer(FromCallable(predict, ["c", "a", "b"], batch_size=3), [*TEXTS, TEXTS[0]])
    assert answers.labels == ("a", "b", "c")
    np.testing.assert_allclose(answers.probabilities[1], [0.5, 0.3, 0.2])
    np.testing.assert_array_equal(answers.probabilities[0], answers.probabilities[4])
    assert asked == TEXTS


def test_a_function_may_name_labels_or_reply_or_be_a_coroutine():
    async def later(texts: Sequence[str]) -> list[str]:
        return ["long" if len(text) > 5 else "short" for text in texts]

    named = answer(FromCallable(later, ["short", "long"]))
    np.testing.assert_array_equal(named.probabilities, [[1, 0], [1, 0], [1, 0], [0, 1]])
    assert answer(FromCallable(later)).replies == ("long", "long", "long", "short")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda texts: None, "must give a list or an array, got NoneType"),
        (lambda texts: "text", "must give a list or an array, got str"),
        (lambda texts: [0.5] * 3, "gave 3 answers to 4 texts"),
        (lambda texts: np.ones((4, 3)) / 3, r"shape \[4, 3\]; one probability a label is \[4, 2\]"),
        (lambda texts: np.ones(4), r"shape \[4\]"),
        (lambda texts: [[0.5, 0.6]] * 4, "for 'the lamp broke'; probabilities are finite"),
        (lambda texts: [[0.5, 0.5], [1.5, -0.5]] * 2, "for 'thank you'; probabilities are finite"),
        (lambda texts: [[float("nan"), 1.0]] * 4, "probabilities are finite"),
        (lambda texts: [[0.5, 0.5], [1.0]] * 2, "no array of numbers"),
        (lambda texts: ["good", "maybe", "good", "bad"], "gave 'maybe' for 'thank you', which is none of its labels"),
        (lambda texts: ["good", 3, "good", "bad"], "gave int for 'thank you' among texts"),
    ],
)
def test_a_function_that_breaks_the_contract_is_told_where(given: Any, words: str):
    with pytest.raises(InvalidRequest, match=words):
        answer(FromCallable(given, ["bad", "good"], name="mine"))


def test_a_functions_own_error_comes_out_with_a_note_of_the_texts():
    def predict(texts: Sequence[str]) -> list[str]:
        raise KeyError("no such model")

    with pytest.raises(KeyError) as raised:
        answer(FromCallable(predict, ["a", "b"], name="mine"))
    assert "'mine' for 4 texts from 'the lamp broke' on" in raised.value.__notes__[0]


@pytest.mark.parametrize("labels", [["one"], ["a", "a"], "ab"])
def test_labels_that_are_no_choice_are_refused(labels: Any):
    with pytest.raises(InvalidSettings, match="two labels or more"):
        FromCallable(lambda texts: texts, labels)


def test_a_function_stands_under_its_name_and_version():
    def predict(texts: Sequence[str]) -> Sequence[str]:
        return texts

    assert FromCallable(predict, version="1").digest != FromCallable(predict, version="2").digest
    assert FromCallable(predict, name="a").digest == FromCallable(lambda texts: texts, name="a").digest
