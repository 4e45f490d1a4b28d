"""What a user would do without us: show the backbone k labelled examples in its prompt and ask for the label.

Balanced demonstrations, label words compared by their first token, contextual calibration with a content-free input
(Zhao et al., arXiv:2102.09690). The prompt's keys and values are computed once for all queries of a draw.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class InContextPrompting:
    """A causal model as a few-shot classifier by its prompt alone."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 10) -> None:
        self._model, self._tokenizer, self._batch = model, tokenizer, batch

    @torch.inference_mode()
    def predict(
        self, examples: Sequence[tuple[str, str]], ks: Sequence[int], inputs: Sequence[str]
    ) -> dict[int, list[str]]:
        """For each k the label of each input, given the first k of the (text, label) examples in their order.

        Raises ValueError where two labels begin with the same token: the comparison would be void.
        """
        labels = sorted({label for _, label in examples})
        words = [label.replace("_", " ").replace("-", " ") for label in labels]
        first = [self._tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in words]
        if len(set(first)) < len(first):
            raise ValueError(f"labels {labels} do not differ in their first token")
        word_of = dict(zip(labels, words, strict=True))
        cache, prefix_len, shown = None, 0, 0
        answers: dict[int, list[str]] = {}
        for k in sorted(ks):  # the prompt of a larger k begins with that of a smaller one
            more = "".join(f"Sentence: {text}\nLabel: {word_of[label]}\n\n" for text, label in examples[shown:k])
            ids = self._tokenizer(more, return_tensors="pt", add_special_tokens=False)["input_ids"]
            cache = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            prefix_len, shown = prefix_len + ids.shape[1], k
            scores = self._label_scores(cache, prefix_len, ["N/A", *inputs], first)
            answers[k] = [labels[i] for i in (scores[1:] - scores[0]).argmax(-1).tolist()]
        return answers

    def _label_scores(
        self, cache: object, prefix_len: int, inputs: Sequence[str], first: Sequence[int]
    ) -> torch.Tensor:
        scores = []
        for begin in range(0, len(inputs), self._batch):
            texts = [f"Sentence: {text}\nLabel:" for text in inputs[begin : begin + self._batch]]
            ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            width = max(map(len, ids))
            tokens = torch.tensor([one + [0] * (width - len(one)) for one in ids])
            mask = torch.tensor([[1] * (prefix_len + len(one)) + [0] * (width - len(one)) for one in ids])
            grown = copy.deepcopy(cache)
            grown.batch_repeat_interleave(len(ids))  # pyright: ignore[reportAttributeAccessIssue]
            logits = self._model(tokens, past_key_values=grown, attention_mask=mask).logits
            last = logits[torch.arange(len(ids)), torch.tensor([len(one) - 1 for one in ids])]
            scores.append(last.log_softmax(-1)[:, list(first)])
        return torch.cat(scores)
