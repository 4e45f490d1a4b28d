"""The row decoder against an oracle that runs each row alone, over the whole sequence, with rebuilt weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from metasepia.backbone import ReferenceBackbone
from metasepia.decoding.choices import choose, gumbel, scores_of
from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.steps import Advance, Begin, NewRow, StepPlan, StepResult
from metasepia.errors import CorruptArtefact, NotSupported, UnknownName
from metasepia.experts.factors import factors_of
from metasepia.experts.svf import attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Adapter, HiddenStatesWanted, Sampling
from tests import tiny

DIGEST = "b" * 64
GREEDY = Sampling(temperature=0.0, max_tokens=64)
Checkpoint = Callable[[str], Path]


def model_of(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def prompt(length: int, data_seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([data_seed, length]).integers(0, 256, length).tolist())


def new(key: int, token_ids: tuple[int, ...], adapter: Adapter = (), want: Any = "tokens", **fields: Any) -> NewRow:
    defaults: dict[str, Any] = {"sampling": GREEDY, "seed": 0, "score_from": 1, "hidden": HiddenStatesWanted()}
    return NewRow(key=key, token_ids=token_ids, adapter=adapter, want=want, **defaults | fields)


class Driver:
    """Runs a decoder and keeps what it emitted: {key: tokens}, fed back at each step."""

    def __init__(self, decoder: RowDecoder) -> None:
        self.decoder, self.step = decoder, 0
        self.prompts: dict[int, NewRow] = {}
        self.emitted: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.live: dict[int, int] = {}
        self.groups: list[int] = []
        self.last = StepResult(step=0)

    def run(self, *begin: NewRow, drop: tuple[int, ...] = (), columns: int = 7) -> StepResult:
        self.step += 1
        for key in drop:
            self.live.pop(key, None)
        if begin:
            self.groups.append(self.step)
            self.prompts |= {row.key: row for row in begin}
        self.last = self.decoder.run(
            StepPlan(
                step=self.step,
                drop=drop,
                feed=tuple(self.live.items()),
                begin=(Begin(group=self.step, rows=begin),) if begin else (),
                advance=tuple(Advance(group=group, num_columns=columns) for group in self.groups),
            )
        )
        for key, one in self.last.chosen.items():
            self.emitted.setdefault(key, []).append(one.token_id)
            self.logprobs.setdefault(key, []).append(one.logprob)
            self.live[key] = one.token_id
        return self.last

    def read(self, *begin: NewRow, columns: int) -> StepResult:
        """Begins rows and advances until their prompts are read."""
        arrays, executed, failed = {}, {}, {}
        for start in range(0, max(len(row.token_ids) for row in begin), columns):
            result = self.run(*(begin if start == 0 else ()), columns=columns)
            arrays |= result.arrays
            executed |= result.executed
            failed |= result.failed
        self.groups.clear()
        return StepResult(step=self.step, arrays=arrays, executed=executed, failed=failed)

    def assert_emitted_what_the_oracle_finds_best(self, oracle: ReferenceBackbone, key: int) -> None:
        """Greedy tokens, teacher-forced: each within 1e-4 of the largest logit from the oracle's maximum."""
        row, tokens = self.prompts[key], self.emitted[key]
        logits = oracle.logits((*row.token_ids, *tokens), row.adapter)[len(row.token_ids) - 1 : -1]
        of_tokens = logits[torch.arange(len(tokens)), tokens]
        assert (logits.amax(-1) - of_tokens <= 1e-4 * logits.abs().amax(-1)).all()
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(self.logprobs[key]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_that_join_and_leave_emit_what_each_would_alone(family: str, tiny_checkpoint: Checkpoint) -> None:
    model = model_of(tiny_checkpoint(family))
    driver = Driver(RowDecoder(model, backbone=DIGEST))
    driver.run(new(0, prompt(3)), new(1, prompt(40)))
    for _ in range(7):
        driver.run()
    driver.run(new(2, prompt(1)))
    driver.run()
    driver.run(new(3, prompt(60)), new(4, prompt(29)), new(5, prompt(2)))
    for _ in range(12):
        driver.run()
    driver.run(drop=(1,))  # the longest leaves, then the first
    driver.run(drop=(0,))
    for _ in range(30):
        driver.run()
    oracle = ReferenceBackbone(model, DIGEST)
    assert sorted(driver.emitted) == [0, 1, 2, 3, 4, 5]
    for key in driver.emitted:
        driver.assert_emitted_what_the_oracle_finds_best(oracle, key)


@pytest.fixture(scope="module")
def with_experts(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory):
    """A tiny Llama with run-time experts, the same whole as oracle, and three experts (one renormalised)."""
    directory, home = tiny_checkpoint("llama"), tmp_path_factory.mktemp("home")
    suffixes = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    factors = factors_of(model_of(directory), suffixes, DIGEST, home, progress=False)
    rng = np.random.default_rng(0)
    experts = [
        ExpertVectors(
            backbone=DIGEST,
            factors=factors.digest,
            z={n: (1 + 0.5 * rng.standard_normal(len(f.s))).astype(np.float32) for n, f in factors.factors.items()},
            renormalise=renormalise,
        )
        for renormalise in (False, False, True)
    ]
    model = model_of(directory)
    layers = attach(model, factors)
    oracle = ReferenceBackbone(model_of(directory), DIGEST, factors=factors)
    for expert in experts:
        layers.put(expert.digest, expert)
        oracle.put_expert(expert)
    return model, layers, oracle, [expert.digest for expert in experts]


def test_each_row_of_a_batch_goes_through_its_own_expert(with_experts) -> None:
    model, layers, oracle, (a, b, c) = with_experts
    driver = Driver(RowDecoder(model, backbone=DIGEST, experts=layers, factors=oracle.factors.digest))
    adapters: list[Adapter] = [(), ((a, 1.0),), ((a, 0.25), (b, 0.75)), ((c, 1.0),)]
    driver.run(*(new(key, prompt(5 + key), adapter) for key, adapter in enumerate(adapters[:3])), columns=9)
    driver.run(new(3, prompt(5), adapters[3]))
    for _ in range(12):
        driver.run()
    for key, adapter in enumerate(adapters):
        driver.assert_emitted_what_the_oracle_finds_best(oracle, key)
        executed = driver.last.executed[key]
        assert (executed.adapter, executed.path) == (adapter, "factors" if adapter else "plain")
        assert (executed.backbone, executed.factors) == (DIGEST, oracle.factors.digest)


def test_an_expert_that_is_not_held_fails_its_own_row_only(with_experts) -> None:
    model, layers, oracle, (a, _, _) = with_experts
    driver = Driver(RowDecoder(model, backbone=DIGEST, experts=layers))
    result = driver.run(new(0, prompt(5), ((a, 1.0),)), new(1, prompt(5), (("e" * 64, 1.0),)))
    assert isinstance(result.failed[1], UnknownName) and a in str(result.failed[1])
    assert 1 not in driver.run().chosen
    driver.assert_emitted_what_the_oracle_finds_best(oracle, 0)


def test_an_expert_dropped_in_flight_fails_its_rows_only(with_experts) -> None:
    model, layers, oracle, (a, _, _) = with_experts
    name = next(iter(oracle.factors.factors))
    passing = ExpertVectors(backbone=DIGEST, factors=oracle.factors.digest, z={name: np.full(3, 1.5, np.float32)})
    layers.put(passing.digest, passing)
    driver = Driver(RowDecoder(model, backbone=DIGEST, experts=layers))
    driver.run(new(0, prompt(5), ((passing.digest, 1.0),)), new(1, prompt(6), ((a, 1.0),)))
    layers.drop(passing.digest)
    assert isinstance(driver.run().failed[0], UnknownName)
    driver.run(drop=(0,))
    driver.assert_emitted_what_the_oracle_finds_best(oracle, 1)


def test_logits_that_are_not_finite_fail_their_own_row_only(with_experts) -> None:
    model, layers, oracle, _ = with_experts
    huge = ExpertVectors(
        backbone=DIGEST,
        factors=oracle.factors.digest,
        z={n: np.full(len(f.s), 1e38, np.float32) for n, f in oracle.factors.factors.items()},
    )
    layers.put(huge.digest, huge)
    driver = Driver(RowDecoder(model, backbone=DIGEST, experts=layers))
    result = driver.run(new(0, prompt(7)), new(1, prompt(6), ((huge.digest, 1.0),)))
    assert isinstance(result.failed[1], CorruptArtefact) and "not finite" in str(result.failed[1])
    driver.run(drop=(1,))
    driver.run(new(2, prompt(3)))  # takes the place in the cache where the bad row was
    driver.run()
    assert {key: len(tokens) for key, tokens in driver.emitted.items()} == {0: 4, 2: 2}
    for key in (0, 2):
        driver.assert_emitted_what_the_oracle_finds_best(oracle, key)


@pytest.mark.parametrize("family", ["mistral", "bloom"])
@pytest.mark.parametrize("columns", [5, 64])
def test_scores_are_the_oracles_whatever_the_batch_and_the_pieces(
    family: str, columns: int, tiny_checkpoint: Checkpoint
) -> None:
    model = model_of(tiny_checkpoint(family))
    driver, oracle = Driver(RowDecoder(model, backbone=DIGEST)), ReferenceBackbone(model, DIGEST)
    rows = [new(k, prompt(n), want="logprobs", score_from=s) for k, (n, s) in enumerate([(31, 20), (2, 1), (9, 9)])]
    result = driver.read(*rows, columns=columns)
    for row in rows:
        targets = torch.tensor(row.token_ids[row.score_from :], dtype=torch.long)[:, None]
        expected = oracle.logits(row.token_ids)[row.score_from - 1 : -1].log_softmax(-1).gather(-1, targets)[:, 0]
        np.testing.assert_allclose(result.arrays[row.key], expected.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
@pytest.mark.parametrize("columns", [5, 64])
def test_hidden_states_are_those_of_true_tokens_only(pooling: Any, columns: int, tiny_checkpoint: Checkpoint) -> None:
    model = model_of(tiny_checkpoint("mistral"))
    driver = Driver(RowDecoder(model, backbone=DIGEST))
    wanted = HiddenStatesWanted(layers=(0, 1, -1), pooling=pooling)
    rows = [new(k, prompt(n), want="hidden_states", hidden=wanted) for k, n in enumerate([17, 1, 30])]
    result = driver.read(*rows, columns=columns)
    for row in rows:
        with torch.no_grad():
            output = model(torch.tensor([row.token_ids]), output_hidden_states=True, use_cache=False)
        states = torch.stack([output.hidden_states[layer][0] for layer in wanted.layers])
        expected = {"mean": states.mean(1), "last": states[:, -1], "none": states}[pooling]
        np.testing.assert_allclose(result.arrays[row.key], expected.numpy(), atol=1e-4, rtol=1e-4)


def test_rows_dropped_while_their_prompts_are_read_leave_the_others_alone(tiny_checkpoint: Checkpoint) -> None:
    model = model_of(tiny_checkpoint("llama"))
    driver = Driver(RowDecoder(model, backbone=DIGEST))
    driver.run(new(0, prompt(30)), new(1, prompt(28)), columns=10)
    for step in range(6):
        driver.run(drop=(0,) if step == 0 else (), columns=10)
    assert list(driver.emitted) == [1]
    driver.assert_emitted_what_the_oracle_finds_best(ReferenceBackbone(model, DIGEST), 1)


def test_a_model_with_a_state_space_is_refused_by_name() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(NotSupported, match="MambaForCausalLM"):
        RowDecoder(MambaForCausalLM(config), backbone=DIGEST)


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    hot = Sampling(temperature=1.0)
    alone = [choose(logits[i : i + 1], [hot], [7 + i], [11 * i])[0] for i in range(3)]
    together = choose(logits.flip(0), [hot] * 3, [9, 8, 7], [22, 11, 0])[::-1]
    assert alone == together
    draws = {choose(logits[:1], [hot], [seed], [position])[0].token_id for seed in range(9) for position in range(9)}
    assert len(draws) > 10


def test_draws_follow_the_tempered_nucleus() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
    probabilities = (logits[0] / 0.7).softmax(-1)
    nucleus = probabilities * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])  # 0.69, 0.16 and 0.08 reach 0.9
    expected = (nucleus / nucleus.sum()).numpy()
    sampling = Sampling(temperature=0.7, top_p=0.9)
    draws = choose(logits.expand(4000, -1), [sampling] * 4000, [3] * 4000, range(4000))
    counts = np.bincount([one.token_id for one in draws], minlength=5)
    np.testing.assert_allclose(counts / 4000, expected, atol=4 * (0.25 / 4000) ** 0.5)
    assert counts[3] == counts[4] == 0
    untempered = logits[0].log_softmax(-1)
    assert all(one.logprob == pytest.approx(untempered[one.token_id].item()) for one in draws[:20])


def test_noise_of_neighbouring_positions_does_not_overlap() -> None:
    first, second = gumbel(5, 0, 1000), gumbel(5, 1, 1000)
    assert not np.isin(first, second).any()
    assert gumbel(5, 0, 3).round(6).tolist() == first[:3].round(6).tolist()
    assert gumbel(-1, 0, 3).tolist() != gumbel(5, 0, 3).tolist()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.7, top_p=0.8)])
def test_the_chosen_token_has_the_largest_score(sampling: Sampling):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits, [sampling] * 3, [1, 2, 3], [4, 5, 6])
    for row, seed, position, one in zip(logits, (1, 2, 3), (4, 5, 6), chosen, strict=True):
        assert int(scores_of(row, sampling, seed, position).argmax()) == one.token_id


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999999, 1.0])
def test_a_draw_that_looks_at_few_tokens_is_the_draw_that_looks_at_all(temperature: float, top_p: float):
    sampling = Sampling(temperature=temperature, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    flat, ties = torch.zeros(3, 400), torch.randint(0, 3, (3, 400), generator=generator).float()
    for logits in (3 * torch.randn(30, 400, generator=generator), flat, ties):
        chosen = choose(logits, [sampling] * len(logits), range(len(logits)), [5] * len(logits))
        wanted = [int(scores_of(row, sampling, seed, 5).argmax()) for seed, row in enumerate(logits)]
        assert [one.token_id for one in chosen] == wanted
