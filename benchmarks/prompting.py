"""What a user would do without us: show the backbone k labelled examples in its prompt and ask for the label.

Balanced demonstrations, label words compared by the first token in which they differ, contextual calibration with a
content-free input (Zhao et al., arXiv:2102.09690). The prompt's keys and values are computed once for all queries of a
draw, and queries lie side by side in one row, each seeing the prompt and itself alone: no query is padded, no cache is
copied.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from metasepia.errors import WindowExceeded

PACK_TOKENS = 512
"""Tokens of the queries that share a forward, one query at least."""


class InContextPrompting:
    """A causal model as a few-shot classifier by its prompt alone."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, window: int) -> None:
        self._model, self._tokenizer, self._window = model, tokenizer, window

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises ValueError where no single token tells all labels apart: the comparison would be void."""
        self._telling_tokens([_word(label) for label in labels])

    def fits(self, examples: Sequence[tuple[str, str]], inputs: Sequence[str]) -> bool:
        """Whether all examples and the longest input fit the window together."""
        return len(self._ids(_shown(examples))) + max(len(self._ids(_asked(text))) for text in inputs) <= self._window

    @torch.inference_mode()
    def predict(
        self, examples: Sequence[tuple[str, str]], ks: Sequence[int], inputs: Sequence[str]
    ) -> dict[int, list[str]]:
        """For each k the label of each input, given the first k of the (text, label) examples in their order.

        Raises ValueError as `check_labels` does, WindowExceeded where examples and a query do not fit together.
        """
        labels = sorted({label for _, label in examples})
        begin, first = self._telling_tokens([_word(label) for label in labels])
        queries = [self._ids(_asked(text)) + begin for text in ("N/A", *inputs)]
        cache, prefix_len, shown = DynamicCache(config=self._model.config), 0, 0
        answers: dict[int, list[str]] = {}
        for k in sorted(ks):  # the prompt of a larger k begins with that of a smaller one
            more = self._ids(_shown(examples[shown:k]))
            prefix_len, shown = prefix_len + len(more), k
            if (longest := prefix_len + max(map(len, queries))) > self._window:
                raise WindowExceeded("examples", longest, self._window)
            self._model(torch.tensor([more]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            scores = self._label_scores(cache, prefix_len, queries, first)
            answers[k] = [labels[i] for i in (scores[1:] - scores[0]).argmax(-1).tolist()]
        return answers

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _telling_tokens(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens that all words begin with (a space before digits, in many tokenizers), and each one's next."""
        ids = [self._ids(" " + word) for word in words]
        shared = 0
        while all(len(one) > shared + 1 for one in ids) and len({one[shared] for one in ids}) == 1:
            shared += 1
        telling = [one[shared] for one in ids]
        if len(set(telling)) < len(telling):
            raise ValueError(f"the labels {', '.join(words)} are not told apart by one token")
        return ids[0][:shared], telling

    def _label_scores(
        self, cache: DynamicCache, prefix_len: int, queries: Sequence[Sequence[int]], first: Sequence[int]
    ) -> torch.Tensor:
        """Log-probabilities [queries, labels]; the cache is left as it was."""
        scores = []
        for pack in packs([len(query) for query in queries], PACK_TOKENS):
            lengths = [len(queries[i]) for i in pack]
            owner = torch.arange(len(pack)).repeat_interleave(torch.tensor(lengths))
            sees = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
            sees = torch.cat([torch.ones(len(owner), prefix_len, dtype=torch.bool), sees], dim=1)
            logits = self._model(
                torch.tensor([[token for i in pack for token in queries[i]]]),
                past_key_values=cache,
                attention_mask=sees[None, None],
                position_ids=torch.cat([torch.arange(prefix_len, prefix_len + n) for n in lengths])[None],
                logits_to_keep=torch.tensor(lengths).cumsum(0) - 1,
            ).logits[0]
            cache.crop(-sum(lengths))
            scores.append(logits.log_softmax(-1)[:, list(first)])
        return torch.cat(scores)


def packs(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in their order, cut into runs of at most `max_tokens`, one at least."""
    runs: list[list[int]] = []
    left = 0
    for i, length in enumerate(lengths):
        if not runs or length > left:
            runs.append([])
            left = max_tokens
        runs[-1].append(i)
        left -= length
    return runs


def _shown(examples: Sequence[tuple[str, str]]) -> str:
    return "".join(f"Sentence: {text}\nLabel: {_word(label)}\n\n" for text, label in examples)


def _asked(text: str) -> str:
    return f"Sentence: {text}\nLabel:"


def _word(label: str) -> str:
    """A label as it stands in the prompt."""
    return label.replace("_", " ").replace("-", " ")
