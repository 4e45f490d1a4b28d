"""A real gang against the one-process reference: tokens, scores, hidden states, experts, refusals, placement."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.backbone import BackboneGroup
from cluster import placement
from cluster.settings import BackboneSettings
from metasepia.errors import CannotPlace, CorruptArtefact, DeadlineExceeded, NotSupported, Overloaded, UnknownName
from metasepia.experts.lora import LoraAdapter
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.reasoning.protocols import Demonstrations, PromptTokenizer
from metasepia.rows import HiddenStatesWanted, Row, Sampling
from tests import gangs, tiny

Run = Callable[..., Any]


@dataclasses.dataclass
class Case:
    group: BackboneGroup
    oracle: gangs.Oracle
    prepared: PreparedBackbone
    run: Run


@pytest.fixture(scope="module", params=[1, 2], ids=["tp_size 1", "tp_size 2"])
def case(
    request: pytest.FixtureRequest,
    cluster: dict[str, float],
    run: Run,
    home: Path,
    tiny_checkpoint: Callable[[str], Path],
) -> Iterator[Case]:
    """A gang on the tiny Llama; its experts come by `fetch`."""
    settings = BackboneSettings(
        id="tiny", source=str(tiny_checkpoint("llama")), tp_size=request.param, max_rows=8, max_queued_tokens=600
    )
    prepared = checkpoints.prepare(settings.source, home)
    oracle = gangs.Oracle.of(prepared, settings, home)
    scope = gangs.started(settings, prepared, home, fetch=oracle.fetch)
    group = run(scope.__aenter__())
    try:
        yield Case(group, oracle, prepared, run)
    finally:
        run(scope.__aexit__(None, None, None))


def test_rows_with_different_experts_decode_together_as_each_would_alone(case: Case) -> None:
    rows = gangs.rows(case.prepared, case.oracle.adapters, max_tokens=24)

    async def all_tokens() -> list[list[int]]:
        return await asyncio.gather(*(gangs.tokens_of(case.group, row) for row in rows))

    answers = case.run(all_tokens())
    for row, tokens in zip(rows, answers, strict=True):
        assert len(tokens) == 24
        assert case.oracle.regret(row, tokens) < gangs.TIGHT
    assert case.oracle.regret(dataclasses.replace(rows[1], adapter=()), answers[1]) > gangs.TIGHT


def test_scores_and_hidden_states_are_the_references(case: Case) -> None:
    rows = gangs.rows(case.prepared, case.oracle.adapters, max_tokens=1)
    wanted = HiddenStatesWanted(layers=(0, 1, -1), pooling="none")
    rows = [dataclasses.replace(row, hidden=wanted, score_from=2) for row in rows]

    async def ask(backbone: Any, row: Row) -> tuple[np.ndarray, np.ndarray]:
        return (await backbone.score(row)).logprobs, (await backbone.hidden_states(row)).states

    async def together() -> list[tuple[np.ndarray, np.ndarray]]:
        return await asyncio.gather(*(ask(case.group, row) for row in rows))

    async def in_turn() -> list[tuple[np.ndarray, np.ndarray]]:
        return [await ask(case.oracle.reference, row) for row in rows]

    for got, want in zip(case.run(together()), case.run(in_turn()), strict=True):
        for mine, its in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, its, atol=gangs.TIGHT * float(np.abs(its).max()), rtol=0)


def test_a_sampled_row_is_the_same_alone_in_company_and_on_the_reference(case: Case) -> None:
    rows = [
        dataclasses.replace(row, sampling=Sampling(temperature=0.8, top_p=0.95, max_tokens=16), seed=index)
        for index, row in enumerate(gangs.rows(case.prepared, case.oracle.adapters, max_tokens=16))
    ]

    async def one(backbone: Any, row: Row) -> list[int]:
        return [token async for chunk in backbone.generate(row) for token in chunk.token_ids]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(one(case.group, row) for row in rows))

    async def in_turn() -> list[list[int]]:
        return [await one(case.oracle.reference, row) for row in rows]

    answers = case.run(together())
    assert answers == case.run(in_turn())
    assert case.run(one(case.group, rows[2])) == answers[2]


def test_rows_that_share_a_prefix_give_the_references_vectors_and_read_it_once(case: Case) -> None:
    tokenizer = PromptTokenizer(tiny.tokenizer().backend_tokenizer, case.prepared.window)
    texts, labels = ["fine", "dull", "so so", "a gem"], ["good", "bad", "bad", "good"]
    shown = Demonstrations(tokenizer, texts, labels)
    prompts = [shown.left_out(i) for i in range(len(texts))] + [shown.query(text, "x") for text in ("meh", "great")]
    rows = [
        Row(
            request_id=f"prompt-{i}",
            backbone=case.prepared.digest,
            token_ids=prompt.token_ids,
            want="hidden_states",
            hidden=HiddenStatesWanted(layers=(-1,), pooling="spans", spans=(prompt.span,)),
            prefix=shown.token_ids,
            adapter=adapter,
        )
        for i, prompt in enumerate(prompts)
        for adapter in case.oracle.adapters[:2]
    ]

    async def ask() -> tuple[list[np.ndarray], int, int]:
        before = (await case.group.load()).reused_tokens
        turn = asyncio.Semaphore(3)  # the queue is short

        async def one(row: Row) -> np.ndarray:
            async with turn:
                return (await case.group.hidden_states(row)).states

        answers = await asyncio.gather(*(one(row) for row in rows))
        load = await case.group.load()
        return answers, load.reused_tokens - before, load.prefix_tokens

    async def in_turn() -> list[np.ndarray]:
        return [(await case.oracle.reference.hidden_states(row)).states for row in rows]

    answers, reused, kept = case.run(ask())
    for mine, its in zip(answers, case.run(in_turn()), strict=True):
        np.testing.assert_allclose(mine, its, atol=gangs.TIGHT * float(np.abs(its).max()), rtol=0)
    assert kept == 2 * len(shown.token_ids)  # one an adapter
    assert reused >= 2 * 2 * len(shown.token_ids)  # what the two queries took, at least


def test_the_gang_says_what_it_is(case: Case) -> None:
    info = case.group.info
    assert info.factors == case.oracle.factors.digest
    assert len(info.pids) == info.tp_size
    assert (info.tp_size, info.all_reduce) in ((1, "none"), (2, "shared memory"))
    executed = case.run(case.group.check())
    assert (executed.backbone, executed.tp_size, executed.path) == (case.prepared.digest, info.tp_size, "plain")


def test_an_unknown_expert_and_another_backbone_are_refused(case: Case) -> None:
    row = gangs.rows(case.prepared, [()], max_tokens=4)[0]
    unknown = dataclasses.replace(row, adapter=(("0" * 64, 1.0),))
    other = dataclasses.replace(row, backbone="1" * 64)
    with pytest.raises(UnknownName, match="0000"):
        case.run(gangs.tokens_of(case.group, unknown))
    with pytest.raises(UnknownName, match="1111"):
        case.run(gangs.tokens_of(case.group, other))


def test_an_expert_from_a_file_is_held_by_every_rank_and_a_torn_one_is_refused(case: Case, tmp_path: Path) -> None:
    ones = dataclasses.replace(
        case.oracle.experts[0], z={name: np.ones_like(z) for name, z in case.oracle.experts[0].z.items()}
    )
    whole, torn = tmp_path / "ones.safetensors", tmp_path / "torn.safetensors"
    whole.write_bytes(ones.to_bytes())
    torn.write_bytes(case.oracle.experts[1].to_bytes()[:-40])
    case.run(case.group.put_expert(ones.digest, whole))
    base = gangs.rows(case.prepared, [()], max_tokens=24)[0]
    same = dataclasses.replace(base, adapter=((ones.digest, 1.0),))
    assert case.oracle.regret(base, case.run(gangs.tokens_of(case.group, same))) < gangs.TIGHT  # z = 1 is the base
    with pytest.raises(CorruptArtefact, match="safetensors"):
        case.run(case.group.put_expert("3" * 64, torn))


def test_a_low_rank_adapter_on_layers_of_any_cut_answers_as_its_merged_weights(case: Case, tmp_path: Path) -> None:
    model, draw = case.oracle.reference.model, np.random.default_rng(7)
    layers = [f"model.layers.1.{leaf}.weight" for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    a = {name: draw.normal(0, 0.3, (3, model.get_parameter(name).shape[1])).astype(np.float32) for name in layers}
    b = {name: draw.normal(0, 0.3, (model.get_parameter(name).shape[0], 3)).astype(np.float32) for name in layers}
    adapter = LoraAdapter(backbone=case.prepared.digest, a=a, b=b)
    (tmp_path / "low.safetensors").write_bytes(adapter.to_bytes())
    case.run(case.group.put_expert(adapter.digest, tmp_path / "low.safetensors"))
    base = gangs.rows(case.prepared, [()], max_tokens=24)[0]
    row = dataclasses.replace(base, adapter=((adapter.digest, 1.0),))

    async def answer() -> tuple[list[int], str]:
        chunks = [chunk async for chunk in case.group.generate(row)]
        assert chunks[-1].executed is not None
        return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].executed.path

    tokens, path = case.run(answer())
    assert path == "lora" and case.oracle.regret(base, tokens) > gangs.TIGHT
    kept = {name: model.get_parameter(name).detach().clone() for name in layers}
    try:
        for name in layers:
            model.get_parameter(name).data += torch.from_numpy(b[name] @ a[name])
        assert case.oracle.regret(base, tokens) < gangs.TIGHT
    finally:
        for name, weight in kept.items():
            model.get_parameter(name).data = weight


def test_a_full_queue_and_a_late_row_are_refused_and_the_others_go_on(case: Case) -> None:
    rows = gangs.rows(case.prepared, [()] * 12, max_tokens=150)
    late = dataclasses.replace(rows[0], deadline_unix_s=time.time() + 0.01)

    async def ask_all() -> list[list[int] | BaseException]:
        asked = (gangs.tokens_of(case.group, row) for row in (*rows, late))
        return await asyncio.gather(*asked, return_exceptions=True)

    *answers, last = case.run(ask_all())
    assert isinstance(last, DeadlineExceeded | Overloaded)
    refused = [answer for answer in answers if isinstance(answer, Overloaded)]
    assert refused and all(answer.retry_after_s > 0 for answer in refused)
    assert all(isinstance(answer, Overloaded) or len(answer) == 150 for answer in answers)  # pyright: ignore[reportArgumentType]


def test_closing_a_stream_frees_its_place(case: Case) -> None:
    row = gangs.rows(case.prepared, [()], max_tokens=200)[0]

    async def places_in_use() -> int:
        load = await case.group.load()
        return load.num_live + load.num_waiting

    async def leave() -> tuple[int, int]:
        async with contextlib.aclosing(case.group.generate(row)) as chunks:
            await anext(chunks)
            before = await places_in_use()
        until = time.monotonic() + 2
        while (after := await places_in_use()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return before, after

    assert case.run(leave()) == (1, 0)


def test_more_than_the_cluster_has_is_refused_with_the_sum(cluster: dict[str, float]) -> None:
    begin = time.monotonic()
    with pytest.raises(CannotPlace, match=r"need 12 CPU \(big: 5 \+ 7\) and the cluster has 8"):
        placement.place([{"CPU": 5.0}, {"CPU": 7.0}], name="big")
    assert time.monotonic() - begin < 2


def test_a_family_that_cannot_be_cut_is_refused_before_a_process_is_started(
    cluster: dict[str, float], run: Run, home: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    directory = tmp_path / "other"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "mamba"'))
    prepared = PreparedBackbone(
        digest="2" * 64,
        path=str(directory),
        tokenizer_dir=str(directory),
        source="other",
        window=256,
        eos_token_ids=(),
        vocab_size=288,
        hidden_size=48,
        num_layers=2,
        model_type="mamba",
    )
    settings = BackboneSettings(id="other", source="other", tp_size=2)
    place = placement.place([{"CPU": 0.8}, {"CPU": 0.8}], name="other")
    with pytest.raises(NotSupported, match="'mamba' is not supported; it runs at tp_size 1; families that are cut"):
        run(BackboneGroup.start(settings, prepared, home, place, first_bundle=0))
