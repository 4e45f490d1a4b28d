"""Text to tokens and back, without torch. The tokenizer here has a token for each byte and two special ones."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from metasepia.errors import CorruptArtefact, InvalidRequest, NotSupported
from serve.models.prompts import Prompts, StopStrings, StreamedText

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<s>{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<s>bot:{% endif %}"
)


def write_byte_tokenizer(directory: Path, template: str | None = TEMPLATE) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    return Prompts(write_byte_tokenizer(tmp_path), "tiny")


def test_a_chat_becomes_the_tokens_of_its_template(prompts: Prompts):
    token_ids = prompts.chat([{"role": "user", "content": "hi"}])
    assert prompts.tokenizer.decode(list(token_ids), skip_special_tokens=False) == "<s>user:hi</s><s>bot:"


def test_messages_that_the_template_refuses_are_the_clients_mistake(prompts: Prompts):
    with pytest.raises(InvalidRequest, match="system comes first"):
        prompts.chat([{"role": "user", "content": "hi"}, {"role": "system", "content": "late"}])


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path):
    escaping = Prompts(write_byte_tokenizer(tmp_path, "{{ messages.__class__.__mro__ }}"), "tiny")
    with pytest.raises(InvalidRequest, match="unsafe"):
        escaping.chat([{"role": "user", "content": "hi"}])


def test_a_checkpoint_without_a_template_sends_chats_elsewhere(tmp_path: Path):
    with pytest.raises(NotSupported, match="/v1/completions"):
        Prompts(write_byte_tokenizer(tmp_path, None), "tiny").chat([])


def test_a_directory_without_a_tokenizer_is_corrupt(tmp_path: Path):
    with pytest.raises(CorruptArtefact, match=r"tokenizer\.json"):
        Prompts(tmp_path, "tiny")


def test_the_least_number_of_tokens_is_no_more_than_there_are(prompts: Prompts):
    for text in ("", "plain", "naïve €5 🦑" * 100):
        assert prompts.at_least(text) <= len(prompts.plain(text))
    assert prompts.at_least("x" * 2**20) > 2**10


@pytest.mark.parametrize("text", ["plain", "naïve €5 🦑🦑 汉字 e\u0301", "👩‍👩‍👧‍👦" * 3, "", "a\ufffdb"])
def test_streamed_pieces_never_split_a_character_and_add_up(prompts: Prompts, text: str):
    streamed = StreamedText(prompts)
    pieces = [streamed.add([token]) for token in prompts.plain(text)]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + streamed.rest() == text


def test_bytes_that_are_no_text_add_up_to_what_decoding_all_gives(prompts: Prompts):
    rng = random.Random(0)
    for _ in range(50):
        token_ids = [rng.randrange(258) for _ in range(rng.randrange(1, 60))]
        streamed = StreamedText(prompts)
        text = ""
        for begin in range(0, len(token_ids), 3):
            text += streamed.add(token_ids[begin : begin + 3])
        assert text + streamed.rest() == prompts.text(token_ids)


def test_bytes_that_are_no_text_are_not_held_back_for_ever(prompts: Prompts):
    byte_ff = prompts.tokenizer.token_to_id("ÿ")
    assert byte_ff is not None
    streamed = StreamedText(prompts)
    assert len("".join(streamed.add([byte_ff]) for _ in range(100))) >= 90


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["one\n", "\ntwo"], ["\n\n"], "one"),
        (["abc", "abd"], ["abd"], "abc"),
        (["aab"], ["ab"], "a"),
        (["a", "a", "b"], ["ab"], "a"),
        (["xyz"], ["z", "y"], "x"),
        (["never"], ["END"], "never"),
        (["ends with E", "N"], ["END"], "ends with EN"),
        (["free"], [], "free"),
    ],
)
def test_text_is_cut_at_the_first_stop_string_wherever_the_pieces_break(pieces, stops, text):
    matcher = StopStrings(stops)
    assert "".join(matcher.add(piece) for piece in pieces) + matcher.rest() == text


def test_what_may_begin_a_stop_string_is_held_back():
    matcher = StopStrings(["END"])
    assert (matcher.add("the E"), matcher.add("xit")) == ("the ", "Exit")
