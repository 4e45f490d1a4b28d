"""Prompts read by a causal model, a shared prefix once: `vanilla` and `loo` of `protocols` in one process.

Encoded one at a time, whole, k examples and n queries of about L tokens are k k L + n (k + 1) L tokens for `loo`. Here
the prompt of all k examples is read once and its keys and values kept; the prompt that leaves example d out takes its
first d examples from there (half of the work), and a query costs its own L tokens: about (k / 2 + 1) k L + n L.

What is not shared is read many prompts at a time, packed one after another into one sequence: a mask lets each token
see the prefix as far as its prompt shares it, and its own prompt; positions count within the prompt. No key is copied
a prompt, and nothing is padded. Families whose attention cannot be told so (ALiBi: BLOOM, MPT) read prompts that
share equally much as a padded batch instead.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from metasepia.decoding.generation import check_attends
from metasepia.errors import InvalidRequest, NotSupported
from metasepia.reasoning.protocols import LOO, VANILLA, Demonstrations, Prompt, PromptTokenizer, Template

PACK_TOKENS = {"cpu": 256, "cuda": 4096}
"""Tokens of one forward: enough to keep the device busy, few enough that packed prompts, which are masked from each
other but computed all the same, cost little."""


@dataclass(frozen=True)
class Work:
    """Tokens of prompts, and those of them that were computed."""

    asked: int = 0
    """Of all prompts, whole."""
    computed: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.asked + other.asked, self.computed + other.computed)

    @property
    def hit_ratio(self) -> float:
        """Of the tokens asked for, how many came out of the prefix; from 0 to 1."""
        return 1 - self.computed / self.asked if self.asked else 0.0


class PrefixCache(Cache):
    """Keys and values of one sequence, [1, heads, columns, head dim] a layer; tokens are read after its first ones.

    A forward sees the first `visible` columns. What it adds is kept behind them where `grows`, else forgotten.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.visible, self.grows = 0, True
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def upto(self, visible: int, *, grows: bool) -> "PrefixCache":
        """The same columns, the first `visible` of them, without copying. This one stays as it is."""
        made = PrefixCache()
        made.visible, made.grows = visible, grows
        made._keys, made._values = list(self._keys), list(self._values)
        return made

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.visible == 0:
            keys, values = key_states, value_states
        else:
            rows = key_states.shape[0]
            keys, values = (
                torch.cat([kept[layer_idx][:, :, : self.visible].expand(rows, -1, -1, -1), new], dim=2)
                for kept, new in ((self._keys, key_states), (self._values, value_states))
            )
        if self.grows:
            for kept, whole in ((self._keys, keys), (self._values, values)):
                if len(kept) <= layer_idx:
                    kept.append(whole)
                else:
                    kept[layer_idx] = whole
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.visible

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.visible + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


class SharedPrefixReader:
    """Mean hidden states (last layer, after the final norm) of spans of prompts, any causal attention model."""

    def __init__(self, model: PreTrainedModel, *, pack_tokens: int | None = None, packs: bool | None = None) -> None:
        """`packs` None: packed prompts where a trial gives the states that prompts have alone, else padded batches.

        Raises NotSupported for a model that keeps more of its past than keys and values.
        """
        check_attends(model)
        self._body, self._device, self._dtype = model.base_model, model.device, model.dtype
        self._pack_tokens = pack_tokens or PACK_TOKENS["cpu" if self._device.type == "cpu" else "cuda"]
        config = model.config.get_text_config()
        self._sliding: int | None = getattr(config, "sliding_window", None)
        self.packs = self._can_pack(config) if packs is None else packs

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> tuple[PrefixCache, Float[Tensor, "tokens hidden"]]:
        """A sequence's keys and values, to be shared, and the hidden states of its tokens."""
        cache, states = PrefixCache(), []
        for begin in range(0, len(token_ids), self._pack_tokens):
            piece = token_ids[begin : begin + self._pack_tokens]
            states.append(self._forward([piece], cache)[0])
            cache.visible += len(piece)
        return cache, torch.cat(states) if states else torch.empty(0)

    @torch.inference_mode()
    def pooled(self, prompts: Sequence[Prompt], prefix: PrefixCache) -> Float[Tensor, "prompts hidden"]:
        """The mean state over each prompt's span, read after the part that it shares with `prefix`. float32."""
        found: dict[int, Tensor] = {}
        for group in self._groups(prompts):
            some = [prompts[i] for i in group]
            if len(some) == 1:
                found[group[0]] = self._alone(some[0], prefix)
            else:
                read = self._packed if self.packs else self._batched
                found |= zip(group, read(some, prefix), strict=True)
        return torch.stack([found[i] for i in range(len(prompts))])

    def _groups(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Prompts for one forward each, as indices: those that share about equally much, up to the pack's tokens."""
        group: list[int] = []
        num_tokens = 0
        for i in sorted(range(len(prompts)), key=lambda i: (prompts[i].shared, _own(prompts[i]))):
            # Padded batches: in order of length, so this one is the longest of its batch.
            num_tokens = num_tokens + _own(prompts[i]) if self.packs else (len(group) + 1) * _own(prompts[i])
            differs = not self.packs and group and prompts[group[0]].shared != prompts[i].shared
            if group and (num_tokens > self._pack_tokens or differs):
                yield group
                group, num_tokens = [], _own(prompts[i])
            group.append(i)
        if group:
            yield group

    def _alone(self, prompt: Prompt, prefix: PrefixCache) -> Float[Tensor, " hidden"]:
        """One prompt, in pieces: a piece attends to nothing that is masked, beside its own triangle."""
        cache, states = prefix.upto(prompt.shared, grows=_own(prompt) > self._pack_tokens), []
        for begin in range(prompt.shared, len(prompt.token_ids), self._pack_tokens):
            piece = prompt.token_ids[begin : begin + self._pack_tokens]
            states.append(self._forward([piece], cache)[0])
            cache.visible += len(piece)
        return _mean(torch.cat(states), prompt)

    def _batched(self, prompts: Sequence[Prompt], prefix: PrefixCache) -> Iterator[Float[Tensor, " hidden"]]:
        """Padded on the right, where causal attention never looks: no mask, so any family counts its own positions."""
        width = max(map(_own, prompts))
        rows = [[*one.token_ids[one.shared :], *[0] * (width - _own(one))] for one in prompts]
        states = self._forward(rows, prefix.upto(prompts[0].shared, grows=False))
        yield from (_mean(row, one) for row, one in zip(states, prompts, strict=True))

    def _packed(self, prompts: Sequence[Prompt], prefix: PrefixCache) -> Iterator[Float[Tensor, " hidden"]]:
        """One after another in one row; see `_mask`."""
        visible = max(one.shared for one in prompts)
        lengths = torch.tensor([_own(one) for one in prompts])
        shared = torch.tensor([one.shared for one in prompts]).repeat_interleave(lengths)
        prompt = torch.arange(len(prompts)).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(one.shared, len(one.token_ids)) for one in prompts])
        mask = _mask(visible, shared, prompt, positions, self._sliding)
        row = [token for one in prompts for token in one.token_ids[one.shared :]]
        states = self._forward([row], prefix.upto(visible, grows=False), mask=mask, positions=positions)[0]
        yield from map(_mean, states.split(lengths.tolist()), prompts)

    def _forward(
        self,
        rows: Sequence[Sequence[int]],
        cache: PrefixCache,
        *,
        mask: Bool[Tensor, "new columns"] | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "rows new hidden"]:
        options: dict[str, Any] = {}
        if mask is not None and positions is not None:
            # Additive: eager attention takes no other.
            added = torch.zeros(mask.shape, dtype=self._dtype).masked_fill(~mask, torch.finfo(self._dtype).min)
            options["attention_mask"] = added[None, None].to(self._device)
            options["position_ids"] = positions[None].to(self._device)
        ids = torch.tensor(rows, device=self._device)
        output = self._body(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, **options)
        return output.last_hidden_state

    def _can_pack(self, config: Any) -> bool:
        """Whether packed prompts give what prompts alone do: by what the model says of itself, then by a trial."""
        accepts = inspect.signature(self._body.forward).parameters
        kinds = set(getattr(config, "layer_types", None) or ())
        mixed = len(kinds) > 1 or (kinds != {"sliding_attention"} and bool(kinds) and self._sliding is not None)
        implementation = getattr(config, "_attn_implementation", None)
        if "position_ids" not in accepts or mixed or implementation not in ("sdpa", "eager"):
            return False
        if getattr(config, "alibi", False):
            return False
        ids = [i % config.vocab_size for i in range(3, 19)]
        trial = [Prompt((*ids[:6], *ids[k:]), (7, 6 + 16 - k), 6) for k in (9, 7)]
        with torch.inference_mode():
            prefix, _ = self.read(ids[:6])
            want = torch.stack([self._alone(one, prefix) for one in trial])
            try:
                got = torch.stack(list(self._packed(trial, prefix)))
            except (RuntimeError, ValueError, TypeError, IndexError):  # such a mask, or such positions, are refused
                return False
        tolerance = 1e-3 if self._dtype == torch.float32 else 5e-2
        return bool((want - got).norm() <= tolerance * want.norm())


def _own(prompt: Prompt) -> int:
    """Tokens that are not shared."""
    return len(prompt.token_ids) - prompt.shared


def _mean(states: Float[Tensor, "tokens hidden"], prompt: Prompt) -> Float[Tensor, " hidden"]:
    """Over the prompt's span; `states` begin with the first token that is not shared."""
    begin, end = (at - prompt.shared for at in prompt.span)
    return states[begin:end].float().mean(0).cpu()


def _mask(
    visible: int, shared: Tensor, prompt: Tensor, positions: Tensor, sliding: int | None
) -> Bool[Tensor, "new columns"]:
    """Which columns each packed token sees: `visible` columns of the prefix, then the packed tokens themselves.

    Of the prefix what its prompt shares, and of its own prompt what is not behind it; with a sliding window only the
    last `sliding` positions of those, itself included.
    """
    columns = torch.arange(visible)
    of_prefix = columns[None] < shared[:, None]
    of_pack = (prompt[:, None] == prompt[None]) & (positions[None] <= positions[:, None])
    mask = torch.cat([of_prefix, of_pack], dim=1)
    if sliding is not None:
        mask &= positions[:, None] - torch.cat([columns, positions])[None] < sliding
    return mask


class PromptedEncoder:
    """Texts to unit-norm vectors through a causal model's prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | PreTrainedTokenizerBase,
        window: int,
        *,
        template: Template | None = None,
        pack_tokens: int | None = None,
    ) -> None:
        """`window` as `PreparedBackbone` has it. Raises NotSupported for a tokenizer without offsets (a slow one)."""
        if not isinstance(tokenizer, Tokenizer):
            fast = getattr(tokenizer, "backend_tokenizer", None)
            if not isinstance(fast, Tokenizer):
                raise NotSupported(f"the tokenizer {type(tokenizer).__name__}, which has no offsets,", "use a fast one")
            tokenizer = fast
        self._tokenizer = PromptTokenizer(tokenizer, window, template=template)
        self._reader = SharedPrefixReader(model, pack_tokens=pack_tokens)

    def examples(
        self,
        protocol: str,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        seed: int = 0,
        words: Mapping[str, Sequence[str]] | None = None,
    ) -> "PromptedExamples":
        """The examples' vectors by `vanilla` or `loo`, and what queries are read after.

        Raises what `Demonstrations` does, and InvalidRequest for another protocol.
        """
        if protocol not in (VANILLA, LOO):
            raise InvalidRequest("protocol", f"a prompt needs {VANILLA!r} or {LOO!r}, got {protocol!r}")
        shown = Demonstrations(self._tokenizer, texts, labels, seed=seed, words=words)
        prefix, states = self._reader.read(shown.token_ids)
        if protocol == VANILLA:
            prompts = [shown.vanilla(i) for i in range(len(texts))]
            means = torch.stack([states[begin:end].float().mean(0).cpu() for begin, end in (p.span for p in prompts)])
            work = Work(len(shown.token_ids), len(shown.token_ids))
        else:
            prompts = [shown.left_out(i) for i in range(len(texts))]
            means = self._reader.pooled(prompts, prefix)
            asked = sum(len(one.token_ids) for one in prompts)
            work = Work(asked, len(shown.token_ids) + sum(map(_own, prompts)))
        return PromptedExamples(self._reader, shown, prefix, _unit(means), work)

    def stream(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """Each text alone, without a template, packed. Raises InvalidRequest and WindowExceeded naming `texts[i]`."""
        prompts = [self._tokenizer.alone(text, f"texts[{i}]") for i, text in enumerate(texts)]
        return _unit(self._reader.pooled(prompts, PrefixCache()))


class PromptedExamples:
    """k examples as a prompt that has been read: their vectors, and queries that cost only their own tokens."""

    def __init__(
        self,
        reader: SharedPrefixReader,
        shown: Demonstrations,
        prefix: PrefixCache,
        vectors: Float[np.ndarray, "examples width"],
        work: Work,
    ) -> None:
        self._reader, self._shown, self._prefix = reader, shown, prefix
        self.vectors = vectors
        """In the caller's order."""
        self.work = work
        """Of the examples and of every query so far."""

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """The vectors of queries; none depends on another. Equal texts are read once.

        Raises InvalidRequest and WindowExceeded naming `inputs[i]`.
        """
        prompts: dict[str, Prompt] = {}
        for i, text in enumerate(texts):
            if text not in prompts:
                prompts[text] = self._shown.query(text, f"inputs[{i}]")
        if not prompts:
            return np.empty((0, self.vectors.shape[1]), dtype=np.float32)
        means = self._reader.pooled(list(prompts.values()), self._prefix)
        place = {text: at for at, text in enumerate(prompts)}
        asked = sum(len(prompts[text].token_ids) for text in texts)
        self.work += Work(asked, sum(map(_own, prompts.values())))
        return _unit(means)[[place[text] for text in texts]]


def _unit(means: Float[Tensor, "texts width"]) -> Float[np.ndarray, "texts width"]:
    return torch.nn.functional.normalize(means.float(), dim=-1).numpy()
