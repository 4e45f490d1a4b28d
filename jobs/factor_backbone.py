"""Factors a backbone's expert layers ahead of serving it: one weight at a time, from the files, in pieces if need be.

    python -m jobs.factor_backbone --backbone DIR --rank 64 --device cuda

Each layer is on disk once it is done; a run that is ended (Ctrl-C, kill, power) is gone on with by the same command and
gives the same file. Only one weight and its factors are in memory. `python -m cluster.plan` tells the file's size and
which `--rank` a device has room for; with a rank only experts truncated to it can be served (`expert_rank`).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import settings
from metasepia.errors import InvalidSettings, MetasepiaError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        _factor(options)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ended; the layers that are done are on disk, and the same command goes on after them", file=sys.stderr)
        return 130
    return 0


def _factor(options: argparse.Namespace) -> None:
    import torch

    from metasepia.experts.factors import factors_of_backbone
    from metasepia.experts.vectors import found_factors
    from metasepia.models import checkpoints

    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidSettings("--device", options.device, "cpu: torch finds no CUDA device here")
    if options.rank < 0:
        raise InvalidSettings("--rank", options.rank, "0, which keeps all singular vectors, or a number of them")
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.monotonic()
    prepared = checkpoints.prepare(options.backbone, options.home)
    layers = tuple(part.strip() for part in options.layers.split(",") if part.strip())
    factors = factors_of_backbone(prepared, layers, options.home, rank=options.rank, device=options.device)
    path = found_factors(factors.digest, options.home, options.rank)
    assert path is not None
    what = f"the leading {options.rank} singular vectors" if options.rank else "all singular vectors"
    print(f"backbone {prepared.digest}")
    print(f"factors {factors.digest}: {len(factors.factors)} layers, {what}, {factors.num_singular} singular values")
    print(f"{path}: {path.stat().st_size / 2**30:.2f} GiB, {time.monotonic() - begin:.0f} s")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    backbone = settings.BackboneSettings(id="backbone", source="")
    parser = argparse.ArgumentParser(
        prog="python -m jobs.factor_backbone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbone", required=True, help="as a profile's `source`: a directory, .gguf or package:NAME")
    parser.add_argument(
        "--layers", default=",".join(backbone.expert_layers), help="ends of the layers' names (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=0, help="leading singular vectors to keep; 0 keeps all (default)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to factor (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0 leaves it to torch (default)")
    parser.add_argument(
        "--home", type=Path, default=Path(".metasepia"), help="where factors are kept (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
