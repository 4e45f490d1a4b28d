import numpy as np
import pytest
import torch

from metasepia.errors import InvalidSettings
from metasepia.instructions.interventions import centroids, move, other_tasks
from metasepia.instructions.measures import Evaluation
from metasepia.instructions.model import MASKS, InstructionModel, MaskKind, hides_words
from metasepia.instructions.profiles import PROFILES, plan_of
from metasepia.instructions.tasks import INPUT, INSTRUCTION_END, LAST, InstructionTasks, draw
from metasepia.instructions.trial import InstructionTrial
from metasepia.instructions.work import InstructionPack, kept_of
from metasepia.stacked.decoder import DecoderShape
from metasepia.sweeps.store import ROWS

SHAPE = DecoderShape(layers=3, width=16, heads=2, tokens=13)
"""With two blocks nothing reads the closing state after the second: the masks bottleneck and reread would be one."""
TASKS = InstructionTasks()
BATCH = draw([TASKS, TASKS], [0, 1], 0, num_sequences=20)
TINY = {**PROFILES["tiny"].fixed, "layers": 2, "width": 16, "num_tasks": 3, "num_keywords": 4}


def model(mask: MaskKind = "causal") -> InstructionModel:
    torch.manual_seed(0)
    made = InstructionModel(SHAPE, len(TASKS.vocabulary), [0, 1], mask)
    for parameter in made.parameters():  # far from the near-zero start, so that words matter
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return made


def trial(**changed) -> dict:
    return InstructionTrial.from_json({**TINY, **changed}).to_json()


@torch.no_grad()
@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_an_answer_knows_the_instruction_by_the_closing_state_alone_as_far_as_the_mask_says(layers):
    others = BATCH.tokens.clone()
    others[:, :, :INSTRUCTION_END] = BATCH.tokens[:, :, :INSTRUCTION_END].flip(1)  # everyone another's instruction
    for mask in MASKS:
        one = model(mask)
        _, states = one(BATCH.tokens, keep=True)

        def as_before(layer, now, states=states):
            now = now.clone()
            if layer in layers:
                now[:, :, INSTRUCTION_END] = states[layer][:, :, INSTRUCTION_END]
            return now

        alike = torch.allclose(one(others, edit=as_before), one(BATCH.tokens), atol=1e-5)
        assert alike is (mask == "bottleneck" or (mask == "reread" and layers == (1, 2)))


def test_masks_are_causal_and_hide_words_and_padding_from_a_position_on():
    mask = hides_words(INSTRUCTION_END + 1)
    assert not mask.triu(1).any() and mask.diagonal().all()
    assert torch.equal(mask[: INSTRUCTION_END + 1], torch.ones_like(mask).tril()[: INSTRUCTION_END + 1])
    assert mask[LAST].nonzero().flatten().tolist() == [INSTRUCTION_END, INPUT, LAST]
    closed = hides_words(INSTRUCTION_END)
    assert closed[INSTRUCTION_END].nonzero().flatten().tolist() == [INSTRUCTION_END]


@torch.no_grad()
def test_without_a_mask_the_states_are_the_stacked_decoders_own():
    one = model()
    final, expected = one.decoder(one.embed(BATCH.tokens), keep=True)
    logits, states = one(BATCH.tokens, keep=True)
    for mine, its in zip(states, expected, strict=True):
        torch.testing.assert_close(mine, its)
    torch.testing.assert_close(logits, torch.einsum("mbw,mvw->mbv", final[:, :, -1], one.table))
    torch.testing.assert_close(one(BATCH.tokens), logits)
    assert torch.equal(one.embed(BATCH.tokens)[1, 3, 5], one.table[1, BATCH.tokens[1, 3, 5]])


@torch.no_grad()
def test_at_layer_0_the_closing_state_is_a_constant():
    _, states = model()(BATCH.tokens, keep=True)
    closing = states[0][:, :, INSTRUCTION_END]
    assert torch.equal(closing, closing[:, :1].expand_as(closing))
    assert len(states) == SHAPE.layers + 1


def test_a_centroid_is_the_mean_of_its_tasks_states():
    states, task = torch.randn(2, 20, 4), BATCH.task
    means = centroids(states, task, 9)
    for one in range(2):
        for of in set(task[one].tolist()):
            torch.testing.assert_close(means[one, of], states[one][task[one] == of].mean(0))
    assert not means[:, 8].any()


def test_patches_put_centroids_where_they_should_and_nowhere_else():
    means, states = torch.randn(3, 2, 8, 16), torch.randn(2, 20, 13, 16)
    target = torch.stack([other_tasks(one, torch.full_like(one, 3), 8) for one in BATCH.task])
    assert (target != BATCH.task).all()

    def after(patch, layer=1):
        return move(1, patch, means, BATCH.task, target)(layer, states)

    at = (1, 4, INSTRUCTION_END)
    own, other = means[1, 1, BATCH.task[1, 4]], means[1, 1, target[1, 4]]
    torch.testing.assert_close(after("replace")[at], other)
    torch.testing.assert_close(after("own")[at], own)
    torch.testing.assert_close(after("add")[at], states[at] + other - own)
    torch.testing.assert_close(after("hold", 2)[at], means[2, 1, target[1, 4]])
    untouched = [i for i in range(13) if i != INSTRUCTION_END]
    assert torch.equal(after("add")[:, :, untouched], states[:, :, untouched])
    assert after("replace", 2) is states and after("hold", 0) is states


@torch.no_grad()
def test_held_from_layer_1_an_answer_knows_its_target_and_input_alone():
    means = torch.randn(SHAPE.layers + 1, 2, 8, 16)
    target = torch.full_like(BATCH.task, 5)
    answers = model("reread")(BATCH.tokens, edit=move(1, "hold", means, BATCH.task, target))
    for one in range(2):
        for given in range(TASKS.num_inputs):
            alike = answers[one][BATCH.input[one] == given]
            # Block 1 reads the closing state of layer 0, a constant; all later ones read centroids.
            torch.testing.assert_close(alike, alike[:1].expand_as(alike))


def test_another_task_is_never_ones_own_and_may_be_any_other():
    shift = torch.arange(4).repeat(5)
    task = torch.arange(5).repeat_interleave(4)
    pairs = set(zip(task.tolist(), other_tasks(task, shift, 5).tolist(), strict=True))
    assert pairs == {(a, b) for a in range(5) for b in range(5) if a != b}


def test_a_pack_learns_what_each_model_learns_alone_and_measures_the_same():
    trials = [trial(seed=0), trial(seed=1, num_tasks=2, learning_rate=1e-3)]
    together = InstructionPack(trials)
    alone = [InstructionPack([one]) for one in trials]
    for work in (together, *alone):
        work.advance(40)
    rows = together.measure().to_pylist()
    for place, work in enumerate(alone):
        expected = {(r["metric"], r["position"], r["split"]): r["value"] for r in work.measure().to_pylist()}
        got = {(r["metric"], r["position"], r["split"]): r["value"] for r in rows if r["trial"] == place}
        assert got.keys() == expected.keys()
        for key in expected:
            assert got[key] == pytest.approx(expected[key], abs=1e-4), key


def test_a_pack_goes_on_from_its_state_to_the_same_bytes_and_keeps_states_to_draw():
    plan = plan_of("tiny")
    trials = plan.trials_of(0)
    whole, resumed = InstructionPack(trials), InstructionPack(trials)
    for stop in whole.stops:
        whole.advance(stop)
        state = whole.state()
        if stop == whole.stops[-2]:
            resumed.restore({name: tensor.clone() for name, tensor in state.items()})
    resumed.advance(whole.stops[-1])
    begun_once, begun_twice = whole.state(), resumed.state()
    assert begun_once.keys() == begun_twice.keys()
    assert all(torch.equal(begun_once[name], begun_twice[name]) for name in begun_once)
    table = whole.measure()
    assert resumed.measure().equals(table) and table.schema.equals(ROWS)
    kept = kept_of(begun_twice)
    assert tuple(kept) == InstructionTrial.from_json(plan.trials[0]).kept_stops
    unseen = whole.evaluation.look(whole.model, "unseen").states[:, 0]
    torch.testing.assert_close(kept[whole.stops[-1]], unseen[:, : kept[0].shape[1]])


def test_training_learns_the_tasks_and_their_states_cluster():
    easy = trial(seed=0, num_steps=160, learning_rate=5e-3, width=32, batch_size=32, num_keywords=9)
    work = InstructionPack([easy])

    def figures():
        return {(r["metric"], r["split"], r["position"]): r["value"] for r in work.measure().to_pylist()}

    before = figures()
    work.advance(160)
    after = figures()
    accuracy = ("accuracy", "unseen", LAST)
    assert before[accuracy] < 0.5 and after[accuracy] > 0.95
    ari = ("ari/task/layer2", "unseen", INSTRUCTION_END)
    assert after[ari] > 0.8 and after[ari] > before[ari] + 0.3
    assert after["ari/task/layer0", "unseen", INSTRUCTION_END] == 0
    assert abs(after["ari_shuffled/task/layer2", "unseen", INSTRUCTION_END]) < 0.1


def test_evaluation_strings_are_unseen_and_targets_are_other_tasks_answers():
    tried = InstructionTrial.from_json(trial(seed=4))
    evaluation = Evaluation([tried], "cpu")
    words = [{tried.tasks.words(one) for one in evaluation.batches[split].tokens[0]} for split in ("seen", "unseen")]
    assert not words[0] & words[1]
    unseen = evaluation.batches["unseen"]
    expected = tried.tasks.answers()[evaluation._target[0], unseen.input[0]]
    assert torch.equal(evaluation._target_output[0], expected)
    shuffled = np.sort(evaluation._shuffled[0].numpy())
    assert (shuffled == np.sort(evaluation.batches["seen"].task[0].numpy())).all()


def test_a_model_that_diverges_is_recorded_and_its_neighbour_goes_on():
    work = InstructionPack([trial(seed=0), trial(seed=1)])
    with torch.no_grad():
        work.model.table[0, 0, 0] = float("nan")
    work.advance(work.stops[1])
    rows = work.measure().to_pylist()
    assert [(r["metric"], r["status"], r["value"]) for r in rows if r["trial"] == 0] == [("diverged", "diverged", 0.0)]
    neighbour = InstructionPack([trial(seed=1)])
    neighbour.advance(work.stops[1])
    losses = [r["value"] for r in (*rows, *neighbour.measure().to_pylist()) if r["metric"] == "loss"]
    assert losses[:2] == pytest.approx(losses[2:], abs=1e-5)


def test_stops_begin_at_0_are_dense_early_and_end_at_the_end():
    stops = InstructionTrial(num_steps=600, num_measures=12).stops
    assert stops[0] == 0 and stops[-1] == 600
    assert sum(stop <= 150 for stop in stops) == 7 and len(stops) == 13
    for steps in (1, 2, 3, 10):
        short = InstructionTrial(num_steps=steps)
        assert short.stops[0] == 0 and short.stops[-1] == steps and set(short.kept_stops) <= set(short.stops)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_tasks": 0}, "num_tasks = 0"),
        ({"layers": 0}, "layers = 0 .* 1 or more"),
        ({"width": 30}, "width = 30 .* multiple of the 4 heads"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"measured_sequences": 3}, "measured_sequences = 3 .* two a task"),
        ({"tasks": 8}, "tasks = 8 .* one of .*num_tasks"),
    ],
)
def test_a_trial_that_cannot_be_is_refused_in_words(changed, words):
    with pytest.raises(InvalidSettings, match=words):
        InstructionTrial.from_json(changed)


def test_a_pack_of_two_shapes_is_refused():
    with pytest.raises(InvalidSettings, match=r"width = 32 .* 16, as its pack's first"):
        InstructionPack([trial(), trial(width=32)])
