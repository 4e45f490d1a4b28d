"""What a rank's memory rises to while it starts: weights and factors read by shard, against the whole read and cut.

A random model of TinyLlama-1.1B's shape (2.0 GiB in bfloat16, in several files) and factors for its feed-forward layers
are written to a temporary directory. `--tp-size` plain processes meet as a gang does, by the functions of
`actors.tensor_parallel`, and each reports its high-water mark (VmHWM, mapped pages and all) above what it held before:
imports, the process group, and a small model of the same family loaded once. The bound is the rank's own share plus one
whole block of the model. Both sides take turns, a fresh gang each time.

    python -m benchmarks.loading
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

ROOT = Path(__file__).parents[1]
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 64}
FACTORED = ("mlp.up_proj", "mlp.down_proj")
SIDES = ("by shard", "whole")
MIB = 2**20


# -- one rank ----------------------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Rise:
    """How far this process's memory rises above what it holds now."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self.before, self.begin = status_bytes("VmRSS"), time.monotonic()

    def end(self) -> dict[str, float]:
        return {
            "before": self.before,
            "rise": status_bytes("VmHWM") - self.before,
            "seconds": time.monotonic() - self.begin,
        }


def run_rank(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from datetime import timedelta

    import torch
    from transformers import AutoModelForCausalLM

    from actors import tensor_parallel
    from metasepia.experts.factors import cut_factors, factors_of_backbone
    from metasepia.models import checkpoints

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    world, rank = options.tp_size, options.rank
    if world > 1:
        store = torch.distributed.TCPStore(
            "127.0.0.1",
            options.port,
            world,
            is_master=rank == 0,
            timeout=timedelta(seconds=120),
            wait_for_workers=False,
        )
        tensor_parallel.join_process_group(rank, world, "127.0.0.1", options.port, 120.0, "cpu", store=store)
    by_shard = options.side == "by shard"

    def load(directory: Path) -> Any:
        if by_shard:
            prepared = checkpoints.prepare(str(directory), options.directory / "home")
            return tensor_parallel.load_shard(prepared, world, torch.bfloat16, "cpu")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        return tensor_parallel.cut(model, world, torch.bfloat16)

    load(options.directory / "small")
    large = options.directory / "large"
    rise = Rise()
    model = load(large)
    weights = rise.end()
    share = sum(one.nbytes for one in model.parameters())
    shards = tensor_parallel.layer_shards(model)
    prepared = checkpoints.prepare(str(large), options.directory / "home")
    rise = Rise()
    whole = factors_of_backbone(prepared, FACTORED, options.directory / "home", progress=False)
    mine = {name: shards[name] for name in whole.factors if name in shards}
    if by_shard:
        whole = cut_factors(
            whole.digest, whole.backbone, options.directory / "home", mine, dtype=torch.bfloat16, device="cpu"
        )
    held = []
    for name in whole.factors:
        one = whole[name]
        rows, columns = (slice(None), slice(None)) if by_shard or name not in mine else mine[name].part_of(2)
        held += [one.u[rows].to(torch.bfloat16), one.vh[:, columns].to(torch.bfloat16)]
        del one
    factors = rise.end()
    if world > 1:
        torch.distributed.barrier()
    return {
        "weights": weights | {"share": share},
        "factors": factors | {"share": sum(one.nbytes for one in held)},
    }


# -- the model ---------------------------------------------------------------------------------------------------------


def write_model(directory: Path, layers: int, shape: dict[str, Any]) -> None:
    """Config, a tokenizer of letters, and weights in one file a block: never more than a block in memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from metasepia.models import planning
    from metasepia.stored import INDEX

    directory.mkdir()
    config = shape | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 0, "bos_token_id": 0}))
    letters = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>").save_pretrained(directory)
    noise, weight_map = torch.Generator().manual_seed(0), {}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, sides in planning.tensors_of(config).items():
        part = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{part}.safetensors", {})[name] = sides
    for file, tensors in files.items():
        made = {n: 0.02 * torch.randn(sides, generator=noise).bfloat16() for n, sides in tensors.items()}
        save_file(made, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_factors(directory: Path, home: Path, backbone: str) -> None:
    """A file of the right shapes, unfactored: reading it is what is measured."""
    import torch

    from metasepia.experts.factor_files import FactorFile
    from metasepia.experts.factors import expert_layers_of
    from metasepia.experts.vectors import FactorIndex, factors_path, index_path
    from metasepia.models.loading import skeleton

    layers = expert_layers_of(skeleton(directory, torch.float32), FACTORED)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in layers.items()}
    digest = FactorIndex.digest_for(backbone, tuple(shapes))
    path = factors_path(digest, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = FactorFile(path, shapes)
    for name in file.missing():
        rows, columns = shapes[name]
        side = min(rows, columns)
        file.put(name, torch.rand(rows, side), torch.rand(side), torch.rand(side, columns))
    file.finish()
    lengths = {name: min(shape) for name, shape in shapes.items()}
    index_path(digest, home).write_text(FactorIndex(digest=digest, backbone=backbone, lengths=lengths).to_json())


# -- both sides --------------------------------------------------------------------------------------------------------


def run_gang(side: str, directory: Path, tp_size: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.loading", "--directory", str(directory), "--side", side]
    command += ["--tp-size", str(tp_size), "--port", str(port)]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for rank in range(tp_size)
    ]
    try:
        for rank in ranks:
            _, error = rank.communicate(timeout=900)
            if rank.returncode:
                sys.exit(f"a rank failed:\n{error.decode()[-3000:]}")
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(tp_size)]


def rows_of(runs: dict[str, list[list[dict[str, Any]]]], what: str, one_layer: int, tp_size: int) -> list[report.Row]:
    """Of each run its fullest rank; of the runs the median."""

    def fullest(side: str, value: str) -> float:
        return report.median([max(rank[what][value] for rank in ranks) for ranks in runs[side]])

    ours, whole = (fullest(side, "rise") / MIB for side in SIDES)
    share = fullest("by shard", "share") / MIB
    bound = share + one_layer / MIB
    seconds = [fullest(side, "seconds") for side in SIDES]
    cut = f"tp_size {tp_size}, fullest rank"
    return [
        report.duration(
            f"{what}-peak", f"{what}: memory risen to while loading, {cut}", ours, whole, "MiB",
            "against the whole, then cut",
        ),
        report.duration(
            f"{what}-bound", f"{what}: the same", ours, bound, "MiB",
            f"against its share ({share:.0f}) and one whole layer ({one_layer / MIB:.0f})", extra={"share_mib": share},
        ),
        report.duration(f"{what}-seconds", f"{what}: time of it", seconds[0], seconds[1], "s", "files in the cache"),
    ]  # fmt: skip


def measure(layers: int, tp_size: int, repeats: int) -> list[report.Row]:
    from metasepia.models import checkpoints, planning

    with tempfile.TemporaryDirectory(prefix="metasepia-loading-") as scratch:
        directory = Path(scratch)
        write_model(directory / "large", layers, SHAPE)
        write_model(directory / "small", 1, SHAPE | SMALL)
        rise = Rise()
        backbone = checkpoints.prepare(str(directory / "large"), directory / "home").digest
        prepare = rise.end()
        write_factors(directory / "large", directory / "home", backbone)
        size = sum(file.stat().st_size for file in (directory / "large").glob("*.safetensors"))
        runs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
        for _ in range(repeats):
            for side in SIDES:
                runs[side].append(run_gang(side, directory, tp_size))
    tensors = planning.tensors_of(SHAPE | {"num_hidden_layers": layers})
    block = sum(2 * _product(sides) for name, sides in tensors.items() if ".layers.0." in name)
    largest = max(2 * _product(sides) for sides in tensors.values())
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    one_factored = 4 * (hidden * inner + hidden * hidden)
    before = report.median([max(rank["weights"]["before"] for rank in ranks) for ranks in runs["by shard"]])
    return [
        report.figure("model", f"the model on disk, {layers} blocks", size / MIB, "MiB"),
        report.figure("before", "a rank before it: imports, group, a small model", before / MIB, "MiB"),
        *rows_of(runs, "weights", max(block, largest), tp_size),
        *rows_of(runs, "factors", one_factored, tp_size),
        report.figure(
            "prepare", "preparing it (digest of all files): memory risen to", max(0.0, prepare["rise"]) / MIB, "MiB"
        ),
    ]


def _product(sides: Sequence[int]) -> int:
    product = 1
    for side in sides:
        product *= side
    return product


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--layers", type=int, default=22, help="blocks of the model (default: 22, 1.1 billion numbers)")
    parser.add_argument("--tp-size", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="gangs of each side (default: 3)")
    for name in ("--directory", "--side", "--rank", "--port"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        options.directory, options.rank, options.port = Path(options.directory), int(options.rank), int(options.port)
        (options.directory / f"rank{options.rank}.json").write_text(json.dumps(run_rank(options)))
        os._exit(0)  # gloo's threads may abort an ordinary exit
    started_on = report.machine()
    rows = measure(options.layers, options.tp_size, options.repeats)
    report.publish("loading", rows, json_file=options.json, started_on=started_on)


if __name__ == "__main__":
    main()
