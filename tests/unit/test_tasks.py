import itertools
import re
from collections import Counter

import pytest

from jobs.tasks import TASKS, LabelTask, make
from jobs.tasks.base import SPLITS
from jobs.tasks.dispatch import DISPATCH
from jobs.tasks.general import CALIBRATION, HELD_OUT
from metasepia.errors import InvalidSettings

each_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


@each_task
def test_the_splits_share_no_noun_no_stem_and_no_template(task: LabelTask) -> None:
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(task.nouns[one]) & set(task.nouns[other])
        assert not set(task.templates[one]) & set(task.templates[other])
        stems = {split: {s for own in task.stems[split].values() for s in own} for split in (one, other)}
        assert not stems[one] & stems[other]
    prompts = {example.prompt for example in task.held_out(48, 0)}
    for split in ("train", "valid"):
        drawn = {example.prompt for step in range(50) for example in task.batch(split, 16, 0, step)}
        assert drawn and not prompts & drawn
        prompts |= drawn


@each_task
def test_every_stem_and_template_has_its_place_for_the_text_and_every_stem_one_label(task: LabelTask) -> None:
    for split in SPLITS:
        stems = [stem for own in task.stems[split].values() for stem in own]
        assert all(stem.count("{}") == 1 for stem in stems)
        assert len(set(stems)) == len(stems)
        assert set(task.stems[split]) == set(task.labels)
        assert all(template.count("{text}") == 1 for template in task.templates[split])


@each_task
def test_a_sentence_never_says_its_own_label(task: LabelTask) -> None:
    for split in SPLITS:
        for label in task.labels:
            if len(label) > 1:
                assert not any(re.search(rf"\b{label}", stem, re.I) for stem in task.stems[split][label])


@each_task
def test_a_batch_is_a_function_of_seed_and_step_with_the_labels_in_turn(task: LabelTask) -> None:
    count = 4 * len(task.labels)
    batch = task.batch("train", count, seed=1, step=7)
    assert batch == task.batch("train", count, seed=1, step=7)
    assert batch != task.batch("train", count, seed=1, step=8)
    assert batch != task.batch("train", count, seed=2, step=7)
    assert Counter(example.answer for example in batch) == dict.fromkeys(task.labels, 4)


@each_task
def test_held_out_texts_are_all_different_and_no_more_are_given_than_there_are(task: LabelTask) -> None:
    most = len(task.labels) * min(len(task.sentences("test", label)) for label in task.labels)
    texts = [example.text for example in task.held_out(most, 0)]
    assert len(set(texts)) == most
    with pytest.raises(InvalidSettings, match=f"at most {most}"):
        task.held_out(most + 1, 0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("delivery", True), (" Delivery.\n", True), ("delivery team", False), ("account", False), ("", False)],
)
def test_an_answer_is_right_when_it_is_the_label_and_nothing_more(answer: str, right: bool) -> None:
    task = TASKS["support"]
    example = next(e for e in task.held_out(4, 0) if e.answer == "delivery")
    assert task.verify(answer, example) == right


def test_prompts_of_no_task_are_trained_calibrated_and_checked_on_apart() -> None:
    assert not set(CALIBRATION) & set(HELD_OUT)
    parts = [set(DISPATCH.others[split]) for split in SPLITS]
    assert not any(one & other for one, other in itertools.combinations(parts, 2))
    assert [len(part) for part in parts] == [len(DISPATCH.others[split]) for split in SPLITS]


def test_half_of_the_messages_to_dispatch_are_of_the_tasks_in_turn_and_half_of_none() -> None:
    for split in ("train", "valid"):
        batch = DISPATCH.batch(split, 12, seed=1, step=2)
        assert Counter(one.answer for one in batch) == {"support": 2, "sentiment": 2, "desk": 2, "other": 6}
        assert batch == DISPATCH.batch(split, 12, seed=1, step=2) != DISPATCH.batch(split, 12, seed=1, step=3)
    held_out = DISPATCH.held_out(DISPATCH.most, 0)
    assert len({one.prompt for one in held_out}) == DISPATCH.most
    trained = {one.prompt for step in range(200) for one in DISPATCH.batch("train", 12, 0, step)}
    assert not trained & {one.prompt for one in held_out}
    with pytest.raises(InvalidSettings, match=f"at most {DISPATCH.most}"):
        DISPATCH.held_out(DISPATCH.most + 1, 0)


def test_a_message_to_dispatch_stands_where_the_card_of_its_expert_says() -> None:
    dispatcher = DISPATCH.dispatcher
    for one in DISPATCH.held_out(12, 0):
        assert one.prompt == str(dispatcher["prompt"]).format(text=one.text)
    assert dispatcher["labels"] == {"support": "support", "sentiment": "sentiment", "desk": "desk", "other": None}
    assert make("dispatch").labels == tuple(DISPATCH.labels)
