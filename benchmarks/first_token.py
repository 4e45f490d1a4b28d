"""A fresh process from nothing to its first token, by one of two ways; `benchmarks.engine` times it from outside.

    python -m benchmarks.first_token {ours,theirs} HOME SOURCE THREADS EXPERT

Theirs is transformers alone. Ours prepares, attaches the cached factors, holds the expert in the file EXPERT, and
answers a row that runs on it. Prints the token's id; nothing is imported before it is needed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = tuple(range(1000, 1016))


def theirs(home: Path, source: str, threads: int, expert: Path) -> int:
    from metasepia.models.checkpoints import prepare  # no torch: it only says where the weights are

    directory = prepare(source, home).path

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.tensor([PROMPT])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return int(answer[0, -1])


def ours(home: Path, source: str, threads: int, expert: Path) -> int:
    import asyncio

    import torch

    from metasepia.decoding.engine import Engine
    from metasepia.experts.factors import factors_of
    from metasepia.experts.svf import attach
    from metasepia.experts.vectors import ExpertVectors
    from metasepia.models import checkpoints
    from metasepia.rows import Row, Sampling

    torch.set_num_threads(threads)
    prepared = checkpoints.prepare(source, home)
    model = checkpoints.load(prepared, torch.float32, "cpu")
    factors = factors_of(model, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), prepared.digest, home)
    one = ExpertVectors.from_bytes(expert.read_bytes())
    row = Row(
        request_id="first",
        backbone=prepared.digest,
        token_ids=PROMPT,
        adapter=((one.digest, 1.0),),
        sampling=Sampling(temperature=0.0, max_tokens=1),
    )
    with Engine(model, prepared, experts=attach(model, factors)) as engine:
        engine.put_expert(one)

        async def first() -> int:
            return (await anext(engine.generate(row))).token_ids[0]

        return asyncio.run(first())


def main() -> None:
    sides: dict[str, Callable[[Path, str, int, Path], int]] = {"ours": ours, "theirs": theirs}
    side, home, source, threads, expert = sys.argv[1:]
    print(sides[side](Path(home), source, int(threads), Path(expert)), flush=True)


if __name__ == "__main__":
    main()
