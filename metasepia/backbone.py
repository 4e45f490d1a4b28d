"""What a backbone is to everybody else, and the slow one-process backbone that the others are checked against."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from metasepia.decoding.choices import choose, top
from metasepia.errors import DeadlineExceeded, InvalidRequest, UnknownName
from metasepia.experts.factors import FactorSet
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.mixing import ExpertMixer, check_same_kind, check_simplex
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Adapter, Executed, HiddenStates, Row, Scores, TokenChunk

Capability = Literal["generate", "score", "hidden_states", "row_adapters"]


class Backbone(Protocol):
    """A frozen causal model that answers rows. A route refuses in words what `capabilities` lacks."""

    @property
    def capabilities(self) -> frozenset[Capability]: ...

    @property
    def digest(self) -> str: ...

    def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        """Chunks in order, the last with `finish`; it and the first have `executed`. Raises what the row's fate is:
        DeadlineExceeded, ...
        """
        ...

    async def score(self, row: Row) -> Scores: ...

    async def hidden_states(self, row: Row) -> HiddenStates: ...


class ReferenceBackbone:
    """One process, one row at a time, expert weights rebuilt, every forward over the whole sequence without a cache.

    The oracle of the tests, and where gradients are taken (`model`).
    """

    capabilities: frozenset[Capability] = frozenset(("generate", "score", "hidden_states", "row_adapters"))

    def __init__(
        self,
        model: PreTrainedModel,
        digest: str,
        *,
        factors: FactorSet | None = None,
        experts: Mapping[str, ExpertVectors | LoraAdapter] | None = None,
    ) -> None:
        """`experts` by digest; expert vectors need `factors`, low-rank adapters do not."""
        self.model, self.digest = model, digest
        self.factors, self._experts = factors, dict(experts or {})
        self._lock = threading.Lock()

    def put_expert(self, expert: ExpertVectors | LoraAdapter) -> None:
        self._experts[expert.digest] = expert

    def weights(self, adapter: Adapter) -> dict[str, Float[Tensor, "out in"]]:
        """The rebuilt weights of an adapter by parameter name, n U diag(s z) Vh or W + B A; empty for the base.

        Raises UnknownName for an expert that is not held, InvalidRequest for weights off the simplex.
        """
        if not adapter:
            return {}
        held = [self._experts[digest] for digest, _ in adapter if digest in self._experts]
        if held:
            check_same_kind(held)
        rebuilt = (
            self._low_rank(adapter) if any(isinstance(one, LoraAdapter) for one in held) else self._scaled(adapter)
        )
        like = self.model.get_parameter
        return {name: weight.to(like(name).device, like(name).dtype) for name, weight in rebuilt.items()}

    def _scaled(self, adapter: Adapter) -> dict[str, Tensor]:
        if self.factors is None:
            raise UnknownName("expert", adapter[0][0], ())
        experts = {digest: one for digest, one in self._experts.items() if isinstance(one, ExpertVectors)}
        mixed = ExpertMixer(experts, tuple(self.factors.index.lengths)).mix(dict(adapter))
        return {name: self.factors[name].scaled(torch.tensor(z), mixed.renormalise) for name, z in mixed.z.items()}

    def _low_rank(self, adapter: Adapter) -> dict[str, Tensor]:
        check_simplex(adapter)
        rebuilt: dict[str, Tensor] = {}
        for digest, weight in adapter:
            one = self._experts.get(digest)
            if not isinstance(one, LoraAdapter):
                raise UnknownName("expert", digest, tuple(sorted(self._experts)))
            if isinstance(weight, tuple):
                raise InvalidRequest("weights", "low-rank adapters are mixed by one weight each, not by layer")
            for name, a in one.a.items():
                before = rebuilt.get(name, self.model.get_parameter(name).detach().float().cpu())
                rebuilt[name] = before + weight * (torch.tensor(one.b[name]) @ torch.tensor(a))
        return rebuilt

    @torch.no_grad()
    def logits(self, token_ids: tuple[int, ...], adapter: Adapter = ()) -> Float[Tensor, "tokens vocab"]:
        """The logits after each token: row i predicts token i + 1. float32."""
        return self._forward(token_ids, adapter)[0]

    async def generate(self, row: Row) -> AsyncIterator[TokenChunk]:
        self._check(row)
        started, answer = time.time(), list(row.sent)
        while True:
            finish = "length" if len(answer) >= row.sampling.max_tokens else None
            chosen = None
            if finish is None:
                if time.time() > row.deadline_unix_s:
                    raise DeadlineExceeded("generation", row.deadline_unix_s - started)
                sequence = (*row.token_ids, *answer)
                logits, _ = await asyncio.to_thread(self._forward, sequence, row.adapter)
                chosen = choose(logits[-1:], [row.sampling], [row.seed], [len(sequence)], [row.top_logprobs])[0]
                if chosen.token_id in row.sampling.stop_token_ids:
                    finish, chosen = "stop", None
                else:
                    answer.append(chosen.token_id)
                    finish = "length" if len(answer) >= row.sampling.max_tokens else None
            yield TokenChunk(
                request_id=row.request_id,
                token_ids=() if chosen is None else (chosen.token_id,),
                logprobs=() if chosen is None else (chosen.logprob,),
                top=() if chosen is None or not chosen.top else (chosen.top,),
                finish=finish,
                executed=self._executed(row) if finish or len(answer) == len(row.sent) + 1 else None,
            )
            if finish:
                return

    async def score(self, row: Row) -> Scores:
        self._check(row)
        logits, _ = await asyncio.to_thread(self._forward, row.token_ids, row.adapter)
        targets = torch.tensor(row.token_ids[row.score_from :], dtype=torch.long)
        logprobs = logits[row.score_from - 1 : -1].log_softmax(-1)
        own = logprobs.gather(-1, targets[:, None])[:, 0].numpy()
        scores = Scores(request_id=row.request_id, logprobs=own, executed=self._executed(row))
        if not row.top_logprobs:
            return scores
        best, ids = top(logprobs, row.top_logprobs)
        return dataclasses.replace(scores, top_ids=ids.numpy(), top_logprobs=best.double().numpy())

    async def hidden_states(self, row: Row) -> HiddenStates:
        self._check(row)
        _, hidden = await asyncio.to_thread(self._forward, row.token_ids, row.adapter)
        states = hidden[list(row.hidden.layers)]
        if row.hidden.pooling == "mean":
            states = states.double().mean(1).float()
        elif row.hidden.pooling == "spans":
            means = [states[:, begin:end].double().mean(1) for begin, end in row.hidden.spans]
            states = torch.stack(means, dim=1).float()
        elif row.hidden.pooling == "last":
            states = states[:, -1]
        return HiddenStates(request_id=row.request_id, states=states.numpy(), executed=self._executed(row))

    @torch.no_grad()
    def _forward(
        self, token_ids: tuple[int, ...], adapter: Adapter
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "layers tokens hidden"]]:
        ids = torch.tensor([token_ids], device=self.model.device)
        # functional_call puts the weights into the one model while it runs: a parameter looked up then is not found.
        with self._lock:
            weights = self.weights(adapter)
            output = torch.func.functional_call(
                self.model, weights, (ids,), {"use_cache": False, "output_hidden_states": True}
            )
        return output.logits[0].float().cpu(), torch.stack(output.hidden_states)[:, 0].float().cpu()

    def _check(self, row: Row) -> None:
        if row.backbone != self.digest:
            raise UnknownName("backbone", row.backbone, (self.digest,))
        if not row.token_ids:
            raise InvalidRequest("token_ids", "a row needs at least one token")

    def _executed(self, row: Row) -> Executed:
        return Executed(
            backbone=self.digest,
            factors=self.factors.digest if self.factors else None,
            adapter=row.adapter,
            path="materialised" if row.adapter else "plain",
            dtype=str(self.model.dtype).removeprefix("torch."),
            tp_size=1,
        )
