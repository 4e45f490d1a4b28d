"""The forward of Llama-shaped models against transformers' own, and the rows in their bands."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from metasepia.decoding import fused_model
from metasepia.decoding.cache import RowCache, Segment
from metasepia.decoding.fused_model import FusedModel
from metasepia.decoding.live import LiveRows
from metasepia.decoding.steps import NewRow
from metasepia.experts.svf import attach
from metasepia.models.shards import LayerShard
from metasepia.rows import HiddenStatesWanted, Sampling
from tests import tiny

Checkpoint = Callable[[str], Path]
FAMILIES = ("llama", "mistral", "qwen2")
LENGTHS = (23, 9, 1)


def model_of(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def fused(model: Any, *arguments: Any) -> FusedModel:
    made = FusedModel.of(model, *arguments)
    assert made is not None
    return made


def rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    width = max(map(len, sequences))
    firsts = [width - len(one) for one in sequences]
    ids = torch.tensor([[0] * first + one for first, one in zip(firsts, sequences, strict=True)])
    positions = (torch.arange(width) - torch.tensor(firsts)[:, None]).clamp(min=0)
    return ids, positions, firsts


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


@torch.inference_mode()
def decoded(model: FusedModel, sequences: list[list[int]], steps: int, keys_by_dim: bool = False) -> torch.Tensor:
    """[rows, steps, vocab]: the last `steps` tokens of each row one by one, after its others in two pieces."""
    read = [one[:-steps] for one in sequences]
    ids, positions, firsts = padded(read)
    width, half = ids.shape[1], ids.shape[1] // 2
    cache = RowCache(len(sequences), width + steps, keys_by_dim=keys_by_dim)
    for span in (slice(0, half), slice(half, width)):
        model.forward(ids[:, span], positions[:, span], [Segment(cache, firsts)])
        cache.extend(span.stop - span.start)
    found = []
    for step in range(steps):
        token = torch.tensor([[one[len(one) - steps + step]] for one in sequences])
        position = torch.tensor([[len(one) - steps + step] for one in sequences])
        found.append(model.forward(token, position, [Segment(cache, firsts)])[0][:, 0])
        cache.extend(1)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_sequences_of_unlike_lengths_give_transformers_logits_and_hidden_states(
    family: str, tiny_checkpoint: Checkpoint
) -> None:
    model = model_of(tiny_checkpoint(family))
    ids, positions, firsts = padded(rows())
    layers = (0, 1, 2, -1)
    with torch.inference_mode():
        logits, hidden = fused(model).forward(ids, positions, [Segment(None, firsts)], keep=5, layers=layers)
        assert hidden is not None
        for i, one in enumerate(rows()):
            want = model(torch.tensor([one]), output_hidden_states=True)
            assert far(logits[i, -min(5, len(one)) :], want.logits[0, -5:]) < 1e-4
            for layer, got in zip(layers, hidden[:, i, firsts[i] :], strict=True):
                assert far(got, want.hidden_states[layer][0]) < 1e-4


@pytest.mark.parametrize("keys_by_dim", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_fed_one_by_one_give_transformers_logits(
    family: str, keys_by_dim: bool, tiny_checkpoint: Checkpoint
) -> None:
    model = model_of(tiny_checkpoint(family))
    sequences = [[*one, *range(40, 48)] for one in rows()]
    got = decoded(fused(model), sequences, 8, keys_by_dim)
    for i, one in enumerate(sequences):
        with torch.inference_mode():
            want = model(torch.tensor([one])).logits[0, -8:]
        assert far(got[i], want) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(family: str, tiny_checkpoint: Checkpoint) -> None:
    exact, model = model_of(tiny_checkpoint(family)), model_of(tiny_checkpoint(family), torch.bfloat16)
    for name, weight in exact.named_parameters():
        weight.copy_(model.get_parameter(name))
    sequences = [[*one, *range(40, 48)] for one in rows()]
    got = decoded(fused(model), sequences, 8, keys_by_dim=True)
    ours, theirs = 0.0, 0.0
    for i, one in enumerate(sequences):
        with torch.inference_mode():
            want = exact(torch.tensor([one])).logits[0, -8:]
            ours += float((got[i].float() - want).square().mean())
            theirs += float((model(torch.tensor([one])).logits[0, -8:].float() - want).square().mean())
    assert got.dtype == torch.bfloat16
    assert 0 < ours < 1.5 * theirs


def test_two_caches_of_one_batch_are_kept_apart(tiny_checkpoint: Checkpoint) -> None:
    model = fused(model_of(tiny_checkpoint("mistral")))
    sequences = rows()
    with torch.inference_mode():
        apart = []
        caches = [RowCache(1, 40) for _ in sequences]
        for cache, one in zip(caches, sequences, strict=True):
            model.forward(torch.tensor([one]), torch.arange(len(one))[None], [Segment(cache, [0])])
            cache.extend(len(one))
        token, positions = torch.tensor([[7]] * 3), torch.tensor([[len(one)] for one in sequences])
        for i, cache in enumerate(caches):
            apart.append(model.forward(token[:1], positions[i : i + 1], [Segment(cache, [0])])[0])
        together, _ = model.forward(token, positions, [Segment(cache, [0]) for cache in caches])
    assert far(together, torch.cat(apart)) < 1e-5


def shards_of(model: Any, rank: int) -> dict[str, LayerShard]:
    """Of two ranks of a Llama with three key/value heads of eight dimensions: two on the first, one on the other."""
    sizes = {"q_proj": (32, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (32, 16), "lm_head": (40, 8)}
    rows = ("o_proj", "down_proj", "lm_head")
    return {
        f"{name}.weight": LayerShard("row" if leaf in rows else "column", sizes.get(leaf, (64, 32)), rank)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (leaf := name.rpartition(".")[2])
    }


def test_two_ranks_of_a_cut_model_give_the_whole_ones_logits(tiny_checkpoint: Checkpoint) -> None:
    model, barrier = model_of(tiny_checkpoint("llama")), threading.Barrier(2, timeout=60)
    parts: dict[int, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}
    sequences = [[*one, *range(40, 48)] for one in rows()]

    def rank(number: int) -> None:
        def reduce(part: torch.Tensor) -> torch.Tensor:
            parts[number] = part
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        mine = copy.deepcopy(model)
        mine.lm_head.weight = nn.Parameter(mine.lm_head.weight.clone(), requires_grad=False)  # no more the embedding
        shards = shards_of(mine, number)
        for name, shard in shards.items():
            module = mine.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(module.weight[shard.part_of(2)].clone(), requires_grad=False)
        attach(mine, None, shards, reduce, backbone="b" * 64)
        found[number] = decoded(fused(mine, shards, reduce), sequences, 8, keys_by_dim=True)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert torch.equal(found[0], found[1])
    for i, one in enumerate(sequences):
        with torch.inference_mode():
            assert far(found[0][i], model(torch.tensor([one])).logits[0, -8:]) < 1e-4


def test_other_families_and_namesakes_run_their_own_forward(tiny_checkpoint: Checkpoint) -> None:
    somebody_elses: Any = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__module__": "elsewhere"})
    assert FusedModel.of(model_of(tiny_checkpoint("bloom"))) is None
    assert FusedModel.of(somebody_elses._from_config(tiny.config_of("llama"))) is None


def test_weights_are_packed_once_a_model_and_not_kept_beyond_it(tiny_checkpoint: Checkpoint) -> None:
    model = model_of(tiny_checkpoint("llama"))
    first, second = fused(model), fused(model)
    assert first._head._matrix is second._head._matrix
    assert first._blocks[0]._project._matrix is second._blocks[0]._project._matrix
    gone = weakref.ref(model)
    before = len(fused_model._STORED)
    del model, first, second
    gc.collect()
    assert gone() is None and len(fused_model._STORED) < before


# -- bands -------------------------------------------------------------------------------------------------------------


def new(key: int, length: int) -> NewRow:
    return NewRow(
        key=key,
        token_ids=(0,) * length,
        adapter=(),
        want="tokens",
        sampling=Sampling(),
        seed=0,
        score_from=1,
        hidden=HiddenStatesWanted(),
    )


def fill(cache: RowCache, row: int, values: torch.Tensor) -> None:
    """One column for every row of a cache, with `values` [rows]."""
    states = values[:, None, None, None].expand(-1, 1, 1, 2)
    cache.update(states, -states, row)


def joined(live: LiveRows, key: int, length: int) -> None:
    source = RowCache(1, length)
    for column in range(length):
        fill(source, 0, torch.tensor([100.0 * key + column]))
        source.extend(1)
    live.join([(new(key, length), 0)], source)


def contents(live: LiveRows) -> dict[int, tuple[list[float], int]]:
    """By key: what the cache holds of the row, and how long the cache's longest row is."""
    found: dict[int, tuple[list[float], int]] = {}
    segments = live.segments()  # rows that outgrew their band move now
    ordered = iter(live)
    for segment in segments:
        assert segment.cache is not None
        cache = segment.cache
        for i, first in enumerate(segment.firsts):
            row = next(ordered)
            keys = cache._keys[0][i, 0, cache.begin + first : cache.end, 0]
            assert torch.equal(keys, -cache._values[0][i, 0, cache.begin + first : cache.end, 0])
            found[row.new.key] = keys.tolist(), cache.width
    return found


@pytest.mark.parametrize("keys_by_dim", [False, True])
def test_rows_keep_their_columns_from_band_to_band(keys_by_dim: bool) -> None:
    live, rng = LiveRows(bounds=(4, 8), keys_by_dim=keys_by_dim), torch.Generator().manual_seed(0)
    expected: dict[int, list[float]] = {}
    for step in range(60):
        if step % 3 == 0:
            length = int(torch.randint(1, 12, (1,), generator=rng))
            joined(live, step, length)
            expected[step] = [100.0 * step + column for column in range(length)]
        if step % 7 == 6:
            leaver = sorted(expected)[int(torch.randint(len(expected), (1,), generator=rng))]
            live.leave(lambda row, leaver=leaver: row.new.key == leaver)
            del expected[leaver]
        segments = live.segments()
        ordered = list(live)
        for segment in segments:
            assert segment.cache is not None
            mine, ordered = ordered[: len(segment.firsts)], ordered[len(segment.firsts) :]
            fill(segment.cache, 0, torch.tensor([1000.0 * step + row.new.key for row in mine]))
        for row in live:
            expected[row.new.key].append(1000.0 * step + row.new.key)
        live.extend()
        found = contents(live)
        assert {key: values for key, (values, _) in found.items()} == expected
        for values, width in found.values():
            assert width <= next((bound for bound in (4, 8) if len(values) <= bound), 200)
    assert max(map(len, expected.values())) > 8


def test_a_band_without_rows_holds_no_memory() -> None:
    live = LiveRows(bounds=(4,))
    joined(live, 0, 3)
    joined(live, 1, 9)
    live.leave(lambda row: row.new.key == 1)
    assert len(live) == 1 and [bool(cache._keys) for cache in live._caches] == [True, False]
    live.leave(lambda row: True)
    assert live.segments() == [] and not any(cache._keys for cache in live._caches)
