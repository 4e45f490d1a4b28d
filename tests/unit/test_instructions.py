import re

import pytest
import torch

from metasepia.errors import InvalidSettings
from metasepia.instructions import tasks as module
from metasepia.instructions.tasks import INPUT, INSTRUCTION_END, LAST, PAD, SEPARATOR, InstructionTasks, draw, held_out


def texts(tasks: InstructionTasks, **kwargs) -> tuple[list[str], module.InstructionBatch]:
    batch = draw([tasks], [0], 0, **{"num_sequences": 200, **kwargs})
    return [tasks.words(one) for one in batch.tokens[0]], batch


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_each_instruction_is_of_its_own_family_and_of_no_other_tasks(split):
    tasks = InstructionTasks(num_tasks=16, seed=3)
    compiled = [(family.task, re.compile(family.expression)) for family in tasks.families]
    instructions, batch = texts(tasks, split=split)
    for text, task, family in zip(instructions, batch.task[0].tolist(), batch.family[0].tolist(), strict=True):
        assert tasks.families[family].task == task
        assert [i for i, (_, one) in enumerate(compiled) if one.fullmatch(text)] == [family]


def test_every_string_of_a_small_language_is_drawn_in_one_split_and_one_only():
    tasks = InstructionTasks(num_tasks=2, families_per_task=1, num_keywords=3, num_fillers=1)
    seen = set(texts(tasks, num_sequences=6000)[0])
    unseen = set(texts(tasks, num_sequences=3000, split="unseen")[0])
    assert not seen & unseen
    # two families, 2 ** 3 repetitions, (0, 1 or 2 of one filler) ** 2
    assert len(seen | unseen) == 2 * 8 * 9


def test_training_never_meets_a_held_out_string_of_any_stream_or_step():
    tasks = InstructionTasks(num_fillers=2)
    trained = {
        text for step in range(20) for text in map(tasks.words, draw([tasks], [1], step, num_sequences=100).tokens[0])
    }
    evaluated = set(texts(tasks, split="unseen", stream="evaluation", num_sequences=1000)[0])
    assert not trained & evaluated
    assert len(evaluated) > 300 and len(trained) > 900


def test_about_a_quarter_of_the_strings_is_held_out():
    # Without the splits: every word sequence of the generator's form, whatever its hash.
    words = torch.randint(2, 42, (20_000, module.MAX_INSTRUCTION), generator=torch.Generator().manual_seed(0))
    assert held_out(words).float().mean().item() == pytest.approx(1 / module.HELD_OUT, abs=0.015)


def test_a_sequence_is_pads_instruction_separator_input_separator_and_its_answer_is_the_tables():
    tasks = InstructionTasks()
    batch = draw([tasks], [5], 7, num_sequences=300)
    tokens, task, given = batch.tokens[0], batch.task[0], batch.input[0]
    assert (tokens[:, [INSTRUCTION_END, LAST]] == SEPARATOR).all()
    assert (tokens[:, INPUT] == tasks.first_input + given).all()
    assert (batch.output[0] == tasks.answers()[task, given]).all()
    pads = tokens[:, :INSTRUCTION_END] == PAD
    assert (pads.long().diff(dim=1) <= 0).all()  # pads stand on the left alone
    assert set(tokens[:, :INSTRUCTION_END][~pads].tolist()) <= set(range(2, tasks.first_input))
    assert {len(row[row != PAD]) for row in tokens[:, :INSTRUCTION_END]} == set(range(3, 11))


def test_a_stacked_batch_is_each_sets_own_bit_for_bit():
    sets = [InstructionTasks(num_tasks=4, seed=0), InstructionTasks(num_tasks=8, seed=1), InstructionTasks(seed=0)]
    stacked = draw(sets, [0, 1, 0], 3, num_sequences=50, split="unseen")
    for i, tasks in enumerate(sets):
        alone = draw([tasks], [[0, 1, 0][i]], 3, num_sequences=50, split="unseen")
        for name in ("tokens", "task", "family", "input", "output"):
            assert torch.equal(getattr(stacked, name)[i], getattr(alone, name)[0])


def test_a_batch_depends_on_seed_step_and_stream_and_a_smaller_one_is_its_beginning():
    tasks = InstructionTasks()
    whole = draw([tasks], [0], 0, num_sequences=64).tokens
    assert torch.equal(whole, draw([tasks], [0], 0, num_sequences=64).tokens)
    assert torch.equal(whole[:, :20], draw([tasks], [0], 0, num_sequences=20).tokens)
    others = [
        draw([tasks], [1], 0, num_sequences=64),
        draw([tasks], [0], 1, num_sequences=64),
        draw([tasks], [0], 0, num_sequences=64, stream="evaluation"),
    ]
    assert all((whole == other.tokens).all(2).float().mean() < 0.1 for other in others)


def test_sets_of_tasks_are_nested_and_functions_and_families_differ():
    small, large = InstructionTasks(num_tasks=4, seed=9), InstructionTasks(num_tasks=40, seed=9)
    assert large.families[:12] == small.families
    assert torch.equal(large.answers()[:4], small.answers())
    assert len(large.answers().unique(dim=0)) == 40
    assert len({family.keywords for family in large.families}) == 120
    assert not torch.equal(small.answers(), InstructionTasks(num_tasks=4, seed=10).answers())


def test_as_many_tasks_as_there_are_functions_get_them_all():
    tasks = InstructionTasks(num_tasks=8, num_inputs=3, num_outputs=2)
    assert len(tasks.answers().unique(dim=0)) == 8


def test_few_keywords_are_shared_so_that_hardly_any_word_tells_the_task():
    tasks = InstructionTasks(num_keywords=12)
    users = {
        word: {family.task for family in tasks.families if word in family.keywords} for word in module.KEYWORDS[:12]
    }
    assert sum(len(of) >= 3 for of in users.values()) >= 10


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_tasks": 0}, "num_tasks = 0 .* at least 2"),
        ({"num_tasks": 1}, "num_tasks = 1 .* at least 2"),
        ({"num_tasks": 441, "num_keywords": 12}, "at most 440: 12 keywords give 1320 families, and a task takes 3"),
        ({"num_tasks": 5, "num_inputs": 2, "num_outputs": 2}, "at most 4: there are no more different functions"),
        ({"num_keywords": 2}, "num_keywords = 2 .* at least 3, at most 40"),
        ({"num_fillers": 0}, "num_fillers = 0"),
        ({"num_outputs": 21}, "at most 20"),
        ({"num_tasks": True}, "whole number"),
        ({"seed": -1}, "seed = -1"),
    ],
)  # fmt: skip
def test_what_no_set_of_tasks_can_be_is_refused_in_words(changed, words):
    with pytest.raises(InvalidSettings, match=words):
        InstructionTasks(**changed)


def test_sets_with_other_words_are_not_stacked():
    with pytest.raises(InvalidSettings, match="alike in words"):
        draw([InstructionTasks(), InstructionTasks(num_fillers=3)], [0, 0], 0, num_sequences=4)
