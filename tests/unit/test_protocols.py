"""Prompts of labelled texts: pieces, spans by offsets, what is shared, refusals."""

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from metasepia.errors import InvalidRequest, WindowExceeded
from metasepia.reasoning.protocols import Demonstrations, PromptTokenizer, Template
from tests import tiny

TEXTS = ["a fine film", "Label: positive\nSentence: dull", "meh", "🙂 שלום"]
LABELS = ["positive", "negative", "negative", "positive"]


def bytewise(window: int = 10_000, **options: str) -> PromptTokenizer:
    template = Template(**options)
    return PromptTokenizer(tiny.tokenizer().backend_tokenizer, window, template=template)


def merging() -> Tokenizer:
    """Byte pairs trained without a pre-tokeniser, so that it merges across the border of text and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"Sentence: {text}.\nLabel: {label}\n" for text, label in zip(TEXTS, LABELS, strict=True)] * 4
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),  # pyright: ignore[reportCallIssue]
    )
    return tokenizer


def text_of(tokenizer: PromptTokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer._tokenizer.decode(list(token_ids), skip_special_tokens=False)


def test_a_left_out_example_comes_last_without_its_label_and_its_span_is_its_text() -> None:
    tokenizer = bytewise()
    shown = Demonstrations(tokenizer, TEXTS, LABELS, seed=3)
    whole = [f"Sentence: {TEXTS[i]}\nLabel: {LABELS[i]}\n" for i in shown.order]
    assert text_of(tokenizer, shown.token_ids) == "".join(whole)
    for at, i in enumerate(shown.order):
        prompt = shown.left_out(i)
        assert text_of(tokenizer, prompt.token_ids) == "".join(whole[:at] + whole[at + 1 :]) + f"Sentence: {TEXTS[i]}"
        assert text_of(tokenizer, prompt.token_ids[slice(*prompt.span)]) == TEXTS[i]
        assert prompt.shared == len("".join(whole[:at]).encode())
        assert prompt.token_ids[: prompt.shared] == shown.token_ids[: prompt.shared]
        vanilla = shown.vanilla(i)
        assert text_of(tokenizer, vanilla.token_ids[slice(*vanilla.span)]) == TEXTS[i]


def test_examples_and_queries_pool_the_same_tokens_where_the_tokenizer_merges_across_the_border() -> None:
    inner = merging()
    ids = inner.encode("Sentence: meh.\nLabel: negative\n").ids
    assert not any(inner.decode(ids[:n]) == "Sentence: meh." for n in range(len(ids)))  # it does merge ".\n"
    tokenizer = PromptTokenizer(inner, 10_000)
    shown = Demonstrations(tokenizer, ["meh.", "fine."], ["negative", "positive"])
    query = shown.query("meh.", "inputs[0]")
    for prompt in (shown.left_out(0), shown.vanilla(0)):
        pooled, its = prompt.token_ids[slice(*prompt.span)], query.token_ids[slice(*query.span)]
        assert pooled == its
    assert "meh." in inner.decode(list(query.token_ids[slice(*query.span)]))


def test_the_order_is_the_contents_and_the_seeds_and_not_the_callers() -> None:
    tokenizer = bytewise()
    shown = Demonstrations(tokenizer, TEXTS, LABELS, seed=5)
    again = Demonstrations(tokenizer, TEXTS[::-1], LABELS[::-1], seed=5)
    assert shown.token_ids == again.token_ids
    assert shown.left_out(0) == again.left_out(3)
    seeds = {Demonstrations(tokenizer, TEXTS, LABELS, seed=seed).token_ids for seed in range(8)}
    assert len(seeds) > 1


def test_the_words_of_a_class_take_turns() -> None:
    tokenizer = bytewise(text="{x} -> {label};")
    shown = Demonstrations(tokenizer, TEXTS, LABELS, words={"negative": ["bad", "poor"]})
    text = text_of(tokenizer, shown.token_ids)
    assert [text.count(f" -> {word};") for word in ("bad", "poor", "positive", "negative")] == [1, 1, 2, 0]


def test_a_text_that_spells_a_special_token_is_text() -> None:
    tokenizer = bytewise()
    head, span = tokenizer.head(tiny.SPECIAL[0], "x")
    assert 256 not in head
    assert span[1] - span[0] == len(tiny.SPECIAL[0])


def test_a_beginning_that_the_tokenizer_adds_is_kept_and_an_end_is_not() -> None:
    from tokenizers.processors import TemplateProcessing

    inner = tiny.tokenizer().backend_tokenizer
    inner.post_processor = TemplateProcessing(
        single=f"{tiny.SPECIAL[0]} $A {tiny.SPECIAL[2]}",
        special_tokens=[(tiny.SPECIAL[0], 256), (tiny.SPECIAL[2], 258)],
    )
    tokenizer = PromptTokenizer(inner, 10_000)
    shown = Demonstrations(tokenizer, TEXTS, LABELS)
    assert [i for i, token in enumerate(shown.token_ids) if token >= 256] == [0]
    assert tokenizer.alone("fine", "x").token_ids[0] == 256


def test_a_prompt_beyond_the_window_is_refused_with_the_way_out() -> None:
    num_tokens = sum(len(f"Sentence: {t}\nLabel: {y}\n".encode()) for t, y in zip(TEXTS, LABELS, strict=True))
    with pytest.raises(
        WindowExceeded, match=f'examples: {num_tokens} tokens do not fit .* {num_tokens - 1} .*"stream"'
    ):
        Demonstrations(bytewise(num_tokens - 1), TEXTS, LABELS)
    shown = Demonstrations(bytewise(num_tokens + 14), TEXTS, LABELS)
    assert len(shown.query("full", "inputs[0]").token_ids) == num_tokens + 14
    with pytest.raises(WindowExceeded, match=rf"inputs\[1\]: {num_tokens + 15} tokens .* fewer or shorter examples"):
        shown.query("fully", "inputs[1]")


@pytest.mark.parametrize(
    ("texts", "labels", "options", "match"),
    [
        ([], [], {}, "at least one"),
        (["a"], ["x", "y"], {}, "2 labels for 1 texts"),
        (["a", ""], ["x", "y"], {}, r"examples\[1\].text: the text has no tokens"),
        (["a", "b"], ["x", "y"], {"words": {"y": []}}, "at least one word"),
        (["a", "b"], ["x", "y"], {"seed": -1}, "at least 0, got -1"),
    ],
)
def test_examples_that_no_prompt_can_show_are_refused(texts, labels, options, match) -> None:
    with pytest.raises(InvalidRequest, match=match):
        Demonstrations(bytewise(), texts, labels, **options)


@pytest.mark.parametrize("text", ["{label} {x}", "{x}", "{x} {x} {label}", ""])
def test_a_template_without_a_text_before_a_label_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="template"):
        Template(text=text)
