"""Decoding, scoring and hidden states of many rows at once, on one tensor-parallel rank.

A `RowDecoder` holds the rows in flight and their key/value cache. It is driven by `StepPlan`s, small plain values that
go to each rank alike; every rank runs the same forwards in the same order, and rank 0's `StepResult` goes back to the
scheduler. It works for any causal attention model of transformers: rows are left-padded, so rotary, learned and ALiBi
positions and sliding windows see the same distances as the row alone. Llama-shaped models run through `FusedModel`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from metasepia.decoding.cache import RowCache, Segment
from metasepia.decoding.choices import choose, top
from metasepia.decoding.fused_model import FusedModel
from metasepia.decoding.live import LiveRows
from metasepia.decoding.steps import Advance, Begin, NewRow, StepPlan, StepResult
from metasepia.errors import CorruptArtefact, MetasepiaError, NotSupported, UnknownName
from metasepia.experts.expert_linear import Reduce
from metasepia.experts.svf import ExpertLayers
from metasepia.models.shards import LayerShard
from metasepia.rows import Adapter, Executed, Path

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
PLAIN: tuple[Adapter, Path] = ((), "plain")


@dataclass
class _Group:
    """Rows whose prompts are being read, left-padded to `width`; columns [0, done) are read."""

    rows: list[NewRow | None]
    """None: dropped meanwhile; its arithmetic goes on unread."""
    token_ids: Int[Tensor, "rows width"]
    firsts: list[int]
    """Column of each row's first token."""
    adapters: list[Adapter]
    cache: RowCache | None
    done: int = 0
    """Read, or taken from a kept prefix."""
    parts: list[list[Tensor]] = field(default_factory=list)
    """By row: log-probabilities or hidden states, piece by piece."""

    @property
    def width(self) -> int:
        return self.token_ids.shape[1]

    @property
    def kind(self) -> NewRow:
        return next(row for row in self.rows if row is not None)


class RowDecoder:
    """The rows in flight on one rank, and their cache.

    `run` is deterministic in the sequence of plans, so ranks given the same plans (and experts) stay in lock-step.
    Anything that `run` raises is a failure of the whole gang: the decoder's rows are lost and must be submitted again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        backbone: str,
        experts: ExpertLayers | None = None,
        factors: str | None = None,
        tp_size: int = 1,
        chooses: bool = True,
        shards: Mapping[str, LayerShard] | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """`backbone` and `factors` are digests for `Executed`; `chooses` is False on ranks whose results go unread.
        `shards` says by parameter name how layers were cut; `reduce` sums over the ranks.

        Raises NotSupported for a model that keeps more of its past than keys and values (a state space, say).
        """
        accepts = check_attends(model)
        self._model, self._experts, self._chooses = model, experts, chooses
        self._positions, self._keeps = "position_ids" in accepts, "logits_to_keep" in accepts
        self._device = model.device
        self._known: dict[str, Any] = {"backbone": backbone, "factors": factors, "tp_size": tp_size}
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._fused = FusedModel.of(model, shards, reduce)
        self._live = LiveRows(bounds=()) if self._fused is None else LiveRows(keys_by_dim=self._fused.keys_by_dim)
        self._groups: dict[int, _Group] = {}
        self._kept: dict[int, RowCache] = {}
        """Prefixes by key, one row each."""

    @torch.no_grad()
    def run(self, plan: StepPlan) -> StepResult:
        """Runs one step. Where `chooses` is False the forwards are run and the result holds no answers."""
        result = StepResult(step=plan.step)
        if plan.drop:
            self._drop(set(plan.drop))
        if plan.feed:
            self._feed(dict(plan.feed), result)
        for begin in plan.begin:
            self._begin(begin, result)
        for advance in plan.advance:
            self._advance(advance, result)
        return result

    # -- live rows -----------------------------------------------------------------------------------------------------

    def _drop(self, keys: set[int]) -> None:
        for key in keys & self._kept.keys():
            del self._kept[key]
        self._live.leave(lambda row: row.new.key in keys)
        for name, group in list(self._groups.items()):
            group.rows = [None if row is None or row.key in keys else row for row in group.rows]
            if not any(group.rows):
                del self._groups[name]

    def _feed(self, tokens: dict[int, int], result: StepResult) -> None:
        for row in self._live:
            error = self._refusal(row.new.adapter)
            if error is not None:
                result.failed[row.new.key] = error
        self._live.leave(lambda row: row.new.key in result.failed)
        segments, rows = self._live.segments(), list(self._live)
        if not rows:
            return
        logits, executed, _ = self._forward(
            torch.tensor([[tokens[row.new.key]] for row in rows]),
            torch.tensor([[row.length] for row in rows]),
            segments,
            [row.new.adapter for row in rows],
        )
        self._live.extend()
        self._choose(logits[:, -1], [row.new for row in rows], [row.length for row in rows], executed, result)

    def _choose(
        self,
        logits: Float[Tensor, "rows vocab"],
        rows: Sequence[NewRow],
        positions: Sequence[int],
        executed: Sequence[Executed],
        result: StepResult,
    ) -> None:
        if not self._chooses:
            return
        seeds, tops = [row.seed for row in rows], [row.top_logprobs for row in rows]
        chosen = choose(logits, [row.sampling for row in rows], seeds, positions, tops)
        for row, one, what in zip(rows, chosen, executed, strict=True):
            if np.isfinite(one.logprob):
                result.chosen[row.key], result.executed[row.key] = one, what
            else:
                result.failed[row.key] = _not_finite(row.adapter)

    # -- rows being read -----------------------------------------------------------------------------------------------

    def _refusal(self, adapter: Adapter) -> MetasepiaError | None:
        """Why this shard cannot run an adapter; the same on each rank, because experts come and go in one order."""
        for digest, _ in adapter:
            if self._experts is None or not self._experts.holds(digest):
                return UnknownName("expert", digest, () if self._experts is None else self._experts.held)
        return None

    def _begin(self, begin: Begin, result: StepResult) -> None:
        rows: list[NewRow] = []
        for row in begin.rows:
            error = self._refusal(row.adapter)
            if error is None and row.adapter and self._experts is not None:
                try:
                    self._experts.select([row.adapter])
                except MetasepiaError as refused:
                    error = refused
            if error is None:
                rows.append(row)
            else:
                result.failed[row.key] = error
        if not rows:
            return
        width = max(len(row.token_ids) for row in rows)
        firsts = [width - len(row.token_ids) for row in rows]
        token_ids = torch.tensor([[0] * first + list(row.token_ids) for first, row in zip(firsts, rows, strict=True)])
        cache = RowCache(len(rows), width)
        # All rows end at one column, so a shorter one reads again what a longer one has not read before.
        cache.end = width - max(len(row.token_ids) - (row.reuse[1] if row.reuse else 0) for row in rows)
        for i, (first, row) in enumerate(zip(firsts, rows, strict=True)):
            if row.reuse and first < cache.end:
                cache.preload(i, self._kept[row.reuse[0]], first, cache.end)
        self._groups[begin.group] = _Group(
            rows=list(rows),
            token_ids=token_ids,
            firsts=firsts,
            adapters=[row.adapter for row in rows],
            cache=cache,
            done=cache.end,
            parts=[[] for _ in rows],
        )

    def _advance(self, advance: Advance, result: StepResult) -> None:
        group = self._groups.get(advance.group)
        if group is None:  # all its rows failed or left
            return
        start, stop = group.done, min(group.done + advance.num_columns, group.width)
        want = group.kind.want
        if want in ("logprobs", "hidden_states") and (start, stop) == (0, group.width):
            group.cache = None  # read at once, and nothing follows
        keep = 1
        if want == "logprobs":  # from the first column that predicts a scored token of any row
            first = min(group.firsts[i] + row.score_from - 1 for i, row in enumerate(group.rows) if row is not None)
            keep = max(1, stop - max(start, first))
        logits, executed, hidden = self._forward(
            group.token_ids[:, start:stop],
            (torch.arange(start, stop) - torch.tensor(group.firsts)[:, None]).clamp(min=0),
            [Segment(group.cache, group.firsts)],
            group.adapters,
            keep=keep,
            layers=group.kind.hidden.layers if want == "hidden_states" else None,
        )
        group.done = stop
        if group.cache is not None:
            group.cache.extend(stop - start)
        if want == "logprobs":
            self._score(group, logits, stop)
        elif want == "hidden_states":
            self._pool(group, hidden, start, stop)
        if stop == group.width:
            del self._groups[advance.group]
            self._finish(group, logits, executed, result)

    def _score(self, group: _Group, logits: Float[Tensor, "rows kept vocab"], stop: int) -> None:
        """Log-probabilities of the tokens one column after each of the kept columns, which end at `stop`."""
        start = stop - logits.shape[1]
        last = min(stop, group.width - 1)
        if start >= last or not self._chooses:
            return
        logits = logits[:, : last - start].float()
        targets = group.token_ids[:, start + 1 : last + 1].to(logits.device)
        mass = logits.logsumexp(-1)
        logprobs = (logits.gather(-1, targets[..., None])[..., 0] - mass).cpu()
        most = max(row.top_logprobs for row in group.rows if row is not None)
        best, ids = top(logits, most)
        best = best - mass[..., None]
        for i, row in enumerate(group.rows):
            if row is not None:
                scored_from = group.width - len(row.token_ids) + row.score_from
                first = max(0, scored_from - start - 1)
                part = logprobs[i, first:]
                if number := min(row.top_logprobs, best.shape[-1]):
                    beside = [ids[i, first:, :number].double(), best[i, first:, :number].double()]
                    part = torch.cat([part.double()[:, None], *(one.cpu() for one in beside)], -1)
                group.parts[i].append(part)

    def _pool(
        self, group: _Group, hidden: Float[Tensor, "layers rows new hidden"] | None, start: int, stop: int
    ) -> None:
        if hidden is None or not self._chooses:
            return
        for i, row in enumerate(group.rows):
            if row is None:
                continue
            first = group.width - len(row.token_ids)
            if row.hidden.pooling == "spans":
                cuts = [
                    hidden[:, i, max(0, first + begin - start) : max(0, first + end - start)].float().cpu()
                    for begin, end in row.hidden.spans
                ]
                group.parts[i].append(torch.stack([cut.sum(1, dtype=torch.float64) for cut in cuts], dim=1))
                continue
            states = hidden[:, i, max(0, first - start) :].float().cpu()
            if row.hidden.pooling == "mean":
                group.parts[i].append(states.sum(1, dtype=torch.float64))
            elif row.hidden.pooling == "none":
                group.parts[i].append(states)
            elif stop == group.width:
                group.parts[i].append(states[:, -1])

    def _finish(self, group: _Group, logits: Tensor, executed: Sequence[Executed], result: StepResult) -> None:
        rows = [(i, row) for i, row in enumerate(group.rows) if row is not None]
        if group.kind.want == "prefix":
            assert group.cache is not None and len(rows) == 1
            self._kept[rows[0][1].key] = group.cache
        elif group.kind.want == "tokens":
            assert group.cache is not None
            self._live.join([(row, i) for i, row in rows], group.cache)
            indices = [i for i, _ in rows]
            lengths = [len(row.token_ids) for _, row in rows]
            self._choose(logits[indices, -1], [row for _, row in rows], lengths, [executed[i] for i in indices], result)
        elif self._chooses:
            for i, row in rows:
                array = _joined(row, group.parts[i])
                if np.isfinite(array).all():
                    result.arrays[row.key], result.executed[row.key] = array, executed[i]
                else:
                    result.failed[row.key] = _not_finite(row.adapter)

    # -- the model -----------------------------------------------------------------------------------------------------

    def _forward(
        self,
        token_ids: Int[Tensor, "rows new"],
        positions: Int[Tensor, "rows new"],
        segments: Sequence[Segment],
        adapters: Sequence[Adapter],
        *,
        keep: int = 1,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, list[Executed], Float[Tensor, "layers rows new hidden"] | None]:
        """Logits of the last `keep` columns, what was executed for each row, and the hidden states of `layers`."""
        if self._experts is not None:
            self._experts.select(adapters)
        token_ids, positions = token_ids.to(self._device), positions.to(self._device)
        if self._fused is not None:
            logits, hidden = self._fused.forward(token_ids, positions, segments, keep=keep, layers=layers)
        else:
            logits, hidden = self._own_forward(token_ids, positions, *segments, keep=keep, layers=layers)
        ran = [PLAIN] * len(adapters) if self._experts is None else self._experts.executed
        return logits, [self._executed(adapter, path) for adapter, path in ran], hidden

    def _own_forward(
        self, token_ids: Tensor, positions: Tensor, segment: Segment, *, keep: int, layers: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own forward, for any family."""
        cache, new = segment.cache, token_ids.shape[1]
        columns = torch.arange(new if cache is None else cache.width + new)
        mask = (columns >= torch.tensor(segment.firsts)[:, None]).long()
        options: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        if self._positions:
            options["position_ids"] = positions
        if self._keeps:
            options["logits_to_keep"] = keep
        if layers is not None:
            options["output_hidden_states"] = True
        output = self._model(input_ids=token_ids, attention_mask=mask.to(self._device), return_dict=True, **options)
        hidden = None if layers is None else torch.stack([output.hidden_states[layer] for layer in layers])
        return output.logits[:, -keep:], hidden

    def _executed(self, adapter: Adapter, path: Path) -> Executed:
        return Executed(adapter=adapter, path=path, dtype=self._dtype, **self._known)


def check_attends(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward. Raises NotSupported unless every layer attends to keys and values."""
    accepts = inspect.signature(model.forward).parameters
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION
    if kinds or "past_key_values" not in accepts:
        what = f"{type(model).__name__} ({', '.join(sorted(kinds)) or 'no key/value cache'})"
        raise NotSupported(what, "use a causal model whose layers all attend to keys and values")
    return accepts


def _joined(row: NewRow, parts: Sequence[Tensor]) -> np.ndarray:
    """The pieces of a row's answer as one float32 array."""
    if row.want == "logprobs":
        return torch.cat(list(parts)).numpy() if parts else np.empty(0, np.float32)
    if row.hidden.pooling == "none":
        return torch.cat(list(parts), dim=1).numpy()
    pooled = torch.stack(list(parts)).sum(0)
    if row.hidden.pooling == "spans":
        lengths = torch.tensor([end - begin for begin, end in row.hidden.spans])
        return (pooled / lengths[:, None]).float().numpy()
    return (pooled / len(row.token_ids) if row.hidden.pooling == "mean" else pooled).float().numpy()


def _not_finite(adapter: Adapter) -> MetasepiaError:
    name = " + ".join(f"expert {digest[:12]}" for digest, _ in adapter) or "the backbone"
    return CorruptArtefact(name, "its logits are not finite numbers")
