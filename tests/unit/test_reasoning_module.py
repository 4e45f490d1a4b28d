import copy
import dataclasses

import pytest
import torch

from metasepia.reasoning.module import ModuleShape, ReasoningModule, attend
from metasepia.synthetic.tasks import ProbabilisticLogisticRegression, Seeds

SHAPE = ModuleShape(dims=4, pairs=33, layers=3, width=32, heads=4)


@pytest.fixture(scope="module")
def module() -> ReasoningModule:
    built = ReasoningModule(SHAPE, seed=1).requires_grad_(False)
    for parameter in built.parameters():  # larger than at the start, so that attention is far from uniform
        parameter.mul_(3.0)
    return built


def problems(num_sequences: int, num_pairs: int, step: int = 0):
    task = ProbabilisticLogisticRegression(dims=SHAPE.dims)
    return task.batch(Seeds(), step, num_sequences=num_sequences, num_pairs=num_pairs)


def test_no_prediction_depends_on_its_own_label_or_on_later_pairs(module: ReasoningModule):
    batch = problems(2, 9)
    before = module(batch.x, batch.y)
    x, y = batch.x.clone(), batch.y.clone()
    y[:, 5:] = 1 - y[:, 5:]
    x[:, 6:] += 1.0
    after = module(x, y)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=0)
    assert (before[:, 6:] - after[:, 6:]).abs().min() > 1e-5


def test_the_y_token_holds_the_label_in_coordinate_0_and_zeros_elsewhere(module: ReasoningModule):
    batch = problems(1, 2)
    tokens = torch.stack([batch.x[0, 0], torch.tensor([float(batch.y[0, 0]), 0, 0, 0]), batch.x[0, 1]])
    hidden = (module.read_in(tokens) + module.positions[:3]).unsqueeze(0)
    for block in module.blocks:
        hidden = block(hidden)
    by_hand = module.read_out(module.norm(hidden))[0, 2, 0]
    torch.testing.assert_close(module(batch.x, batch.y)[0, 1], by_hand, atol=1e-5, rtol=0)


def test_many_queries_of_many_compiled_contexts_equal_one_forward_each(module: ReasoningModule):
    lengths, counts = (5, 32, 1, 17), (3, 130, 64, 1)
    batches = [problems(1, n + q, step=i) for i, (n, q) in enumerate(zip(lengths, counts, strict=True))]
    rows = module.compile_rows(
        [b.x[0, :n] for b, n in zip(batches, lengths, strict=True)],
        [b.y[0, :n] for b, n in zip(batches, lengths, strict=True)],
    )
    fused = module.answer(rows, [b.x[0, n:] for b, n in zip(batches, lengths, strict=True)])
    for one, answers, n in zip(batches, fused, lengths, strict=True):
        for i, query in enumerate(one.x[0, n:]):
            x = torch.cat([one.x[0, :n], query[None]])[None]
            alone = module(x, torch.cat([one.y[0, :n], torch.zeros(1)])[None])[0, n]
            torch.testing.assert_close(answers[i], alone, atol=1e-5, rtol=0)


def test_an_answer_is_the_same_whatever_other_queries_share_the_forward(module: ReasoningModule):
    batch = problems(1, 20)
    (row,) = module.compile_rows([batch.x[0, :10]], [batch.y[0, :10]])
    (together,) = module.answer([row], [batch.x[0, 10:]])
    (alone,) = module.answer([row], [batch.x[0, 13:14]])
    torch.testing.assert_close(together[3], alone[0], atol=1e-5, rtol=0)


def test_rows_compiled_apart_together_and_of_other_lengths_answer_alike_in_any_order(module: ReasoningModule):
    batch = problems(6, 20)
    lengths = (12, 12, 5, 12, 7, 12)
    x, y = (
        [one[:n] for one, n in zip(batch.x, lengths, strict=True)],
        [one[:n] for one, n in zip(batch.y, lengths, strict=True)],
    )
    together = module.compile_rows(x, y)
    apart = [module.compile_rows([a], [b])[0] for a, b in zip(x, y, strict=True)]
    queries = [one[14 : 14 + n] for one, n in zip(batch.x, (3, 3, 0, 3, 1, 6), strict=True)]
    plain = [module.answer([row], [some])[0] for row, some in zip(apart, queries, strict=True)]
    for order in ([0, 1, 2, 3, 4, 5], [3, 1, 0, 2, 5, 4], [0, 0, 1, 3, 4, 2]):
        answers = module.answer([together[i] for i in order], [queries[i] for i in order])
        for i, one in zip(order, answers, strict=True):
            torch.testing.assert_close(one, plain[i], atol=1e-5, rtol=0)


def test_no_queries_have_no_answers(module: ReasoningModule):
    batch = problems(1, 5)
    (row,) = module.compile_rows([batch.x[0]], [batch.y[0]])
    assert [one.shape for one in module.answer([row, row], [batch.x[0, :0], batch.x[0, :0]])] == [(0,), (0,)]


def test_rows_compiled_together_count_their_bytes_once(module: ReasoningModule):
    batch = problems(3, 9)
    rows = module.compile_rows(list(batch.x), list(batch.y))
    assert sum(row.num_bytes for row in rows) == rows[0].block.untyped_storage().nbytes()
    assert rows[0].num_bytes == SHAPE.layers * 2 * 18 * SHAPE.width * 4


def test_a_module_whose_weights_change_answers_with_the_new_ones():
    built, batch = ReasoningModule(SHAPE, seed=2), problems(1, 9)

    def answered() -> torch.Tensor:
        (row,) = built.compile_rows([batch.x[0, :8]], [batch.y[0, :8]])
        return built.answer([row], [batch.x[0, 8:]])[0]

    answered()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4.0)
    torch.testing.assert_close(answered(), built(batch.x, batch.y)[0, 8:].detach(), atol=1e-5, rtol=0)
    copied = copy.deepcopy(built)
    assert copied.state_dict().keys() == ReasoningModule(SHAPE).state_dict().keys()
    built = copied
    torch.testing.assert_close(answered(), built(batch.x, batch.y)[0, 8:].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("device_type", ["cpu", "any other"])
def test_a_key_that_joins_by_the_sum_beneath_attention_counts_like_all_others(device_type: str):
    q, keys, values = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    reached = q if device_type == "cpu" else q.as_subclass(_Elsewhere)
    out, log_sum = attend(reached, keys[:, :, :6], values[:, :, :6])
    score = (q * keys[:, :, 6:]).sum(-1) / 8**0.5
    joined = torch.lerp(out, values[:, :, 6:].expand_as(out), torch.sigmoid(score - log_sum)[..., None])
    whole = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(joined.as_subclass(torch.Tensor), whole, atol=1e-5, rtol=0)


class _Elsewhere(torch.Tensor):
    """A CPU tensor that calls its device another: takes the path of all devices but the CPU."""

    @property
    def device(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("meta")


def test_the_paper_shape_has_the_papers_working_parameters():
    shape = ModuleShape(dims=16, pairs=258, layers=12, width=256, heads=8)
    with torch.device("meta"):
        num = sum(p.numel() for p in _empty(shape).parameters())
    # The reference has 22,480,129, of which 12,865,792 are GPT-2's unused token table.
    assert abs(num - (22_480_129 - 12_865_792)) < 1000


def _empty(shape: ModuleShape) -> ReasoningModule:
    return ReasoningModule(dataclasses.replace(shape))
