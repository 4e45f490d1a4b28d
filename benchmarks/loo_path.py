"""The whole path of the protocol `loo` on the default backbone: texts to prompts to vectors to answers.

Ours reads every shared prefix once. Against it stands what the reference does: every prompt encoded whole, one at a
time (without the logits that it computes and throws away). That takes many minutes, so a part of its prompts, evenly
spread, is timed, half before and half after ours, and scaled by the tokens of all of them; `sampled=0` times them all.
The run stops if a vector differs from the whole prompt's by more than 1e-4.

    python -m benchmarks.loo_path --data DIR
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from benchmarks import datasets, report
from cluster import settings as settings_of
from metasepia.models import checkpoints
from metasepia.reasoning import shipped
from metasepia.reasoning.context import answer, compile_context
from metasepia.reasoning.examples import Context
from metasepia.reasoning.prompted import PromptedEncoder, Work
from metasepia.reasoning.protocols import LOO, Demonstrations, Prompt, PromptTokenizer
from metasepia.reasoning.shipped import LoadedModule

SET = "sst2"
TOLERANCE = 1e-4


@dataclass
class Spent:
    """Seconds on the clock and of the processor; the second says more on a busy machine."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> "Spent":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter() - self._began[0]
        self.cpu_s += time.process_time() - self._began[1]


@dataclass(frozen=True)
class Texts:
    examples: Sequence[str]
    labels: Sequence[str]
    queries: Sequence[str]


def answered(module: LoadedModule, vectors: np.ndarray, labels: Sequence[str], queries: np.ndarray) -> np.ndarray:
    return answer(module.module, [(compile_context(Context.of(vectors, labels), module), queries)])[0]


@torch.inference_mode()
def whole(model: PreTrainedModel, prompt: Prompt) -> np.ndarray:
    """The unit-norm mean state over the prompt's span, the slow way."""
    states = model.base_model(torch.tensor([prompt.token_ids]), use_cache=False).last_hidden_state[0]
    return torch.nn.functional.normalize(states[slice(*prompt.span)].float().mean(0), dim=-1).numpy()


def check(prompts: Sequence[Prompt], ours: np.ndarray, theirs: dict[int, np.ndarray]) -> float:
    """The largest difference. Stops the run where it is too large."""
    worst = max(float(np.abs(ours[i] - vector).max()) for i, vector in theirs.items())
    if not worst <= TOLERANCE:
        raise SystemExit(f"a vector differs by {worst:.2g} from that of its whole prompt; nothing here counts")
    return worst


def rows(
    data: Path, *, threads: int = 1, num_examples: int = 32, num_texts: int = 200, sampled: int = 16
) -> list[report.Row]:
    """`loo-path` and the share of tokens that came out of the prefix, on sst2 of `data`."""
    torch.set_num_threads(threads)
    found = datasets.read(data / f"{SET}.parquet")
    if found is None:
        raise SystemExit(f"{data} has no {SET}.parquet with columns text, label_name, split")
    draw, test = found.draw(num_examples, 0), found.sample_test(num_texts, 0)
    texts = Texts([text for text, _ in draw], [label for _, label in draw], [text for text, _ in test])
    home, source = settings_of.read("laptop", {}).home, settings_of.read("laptop", {}).backbones[0].source
    prepared = checkpoints.prepare(source, home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    tokenizer = Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))
    module = shipped.load()
    encoder = PromptedEncoder(model, tokenizer, prepared.window)
    encoder.stream(texts.queries[:2])  # what a process does once

    shown = Demonstrations(PromptTokenizer(tokenizer, prepared.window), texts.examples, texts.labels)
    prompts = [shown.left_out(i) for i in range(num_examples)]
    prompts += [shown.query(text, "inputs") for text in texts.queries]
    sample = range(0, len(prompts), max(1, len(prompts) // sampled) if sampled else 1)
    theirs: dict[int, np.ndarray] = {}
    ours_s, theirs_s, after_s = Spent(), Spent(), Spent()

    def some_of_theirs(part: Sequence[int]) -> None:
        with theirs_s:
            theirs.update({i: whole(model, prompts[i]) for i in part})

    some_of_theirs(sample[::2])
    with ours_s:
        examples = encoder.examples(LOO, texts.examples, texts.labels)
        queries = examples.embed(texts.queries)
        answered(module, examples.vectors, texts.labels, queries)
    some_of_theirs(sample[1::2])
    vectors = np.concatenate([examples.vectors, queries])
    worst = check(prompts, vectors, theirs)
    with after_s:  # what both do with their vectors
        answered(module, examples.vectors, texts.labels, queries)
    num_tokens = sum(len(one.token_ids) for one in prompts)
    scale = num_tokens / sum(len(prompts[i].token_ids) for i in sample)
    wall_s, cpu_s = theirs_s.wall_s * scale + after_s.wall_s, theirs_s.cpu_s * scale + after_s.cpu_s
    work: Work = examples.work
    what = f"loo, k = {num_examples}, {len(texts.queries)} texts, {prepared.source.removeprefix('package:llm-')}"
    note = (
        f"the other timed on {len(sample)} of {len(prompts)} prompts; by processor time {cpu_s / ours_s.cpu_s:.1f} "
        f"times; {threads} thread{'s' if threads > 1 else ''}; vectors differ by at most {worst:.0e}"
    )
    return [
        report.duration("loo-path", f"whole path, {what}", ours_s.wall_s, wall_s, "s", note),
        report.rate(
            "loo-path-tokens", "of it: tokens of all prompts for each token read", work.asked / work.computed, None, "",
            f"hit ratio of the prefix {work.hit_ratio:.3f}", detail=True,
        ),
    ]  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of Parquet files, one a set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sampled", type=int, default=16, help="prompts of the slow way that are timed; 0: all")
    parser.add_argument("--num-texts", type=int, default=200)
    arguments = parser.parse_args()
    started_on = report.machine()
    found = rows(arguments.data, threads=arguments.threads, sampled=arguments.sampled, num_texts=arguments.num_texts)
    report.publish("loo_path", found, json_file=arguments.json, started_on=started_on)


if __name__ == "__main__":
    main()
