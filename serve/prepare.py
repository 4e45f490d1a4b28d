"""Makes weights and factors ready, with progress: `python -m serve.prepare [--profile laptop]`.

`serve.main` runs it as a process of its own first: it may load torch, and main stays for as long as the graph runs.
"""

import argparse
import sys
from pathlib import Path

from cluster import settings as settings_of
from cluster.settings import BackboneSettings, Settings
from metasepia import checkpoints
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.experts import FactorIndex
from metasepia.prepared import PreparedBackbone


def prepare(settings: Settings) -> dict[str, PreparedBackbone]:
    """The backbones by id, with what is missing made first. Where nothing is, no torch is loaded: under a second."""
    found: dict[str, PreparedBackbone] = {}
    for backbone in settings.backbones:
        try:
            prepared = found[backbone.id] = checkpoints.prepare(backbone.source, settings.home)
        except InvalidSettings as error:
            raise InvalidSettings(f"backbones[{backbone.id}].{error.field}", error.value, error.allowed) from error
        if not _has_factors(backbone, prepared, settings.home):
            import torch

            from metasepia.factors import factors_of

            model = checkpoints.load(prepared, torch.float32, "cpu")
            factors_of(model, backbone.expert_layers, prepared.digest, settings.home)
    return found


def _has_factors(backbone: BackboneSettings, prepared: PreparedBackbone, home: Path) -> bool:
    """Whether some factors on disk are of this backbone and cover the layers asked for, and no others."""
    for path in (home / "factors").glob("*.json"):
        index = FactorIndex.read(path.stem, home)
        covered = {s for s in backbone.expert_layers if any(_ends(n, s) for n in index.lengths)}
        extra = [n for n in index.lengths if not any(_ends(n, s) for s in backbone.expert_layers)]
        if index.backbone == prepared.digest and covered == set(backbone.expert_layers) and not extra:
            return path.with_suffix(".safetensors").is_file()
    return not backbone.expert_layers


def _ends(parameter: str, suffix: str) -> bool:
    return f".{parameter}".removesuffix(".weight").endswith(f".{suffix}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile")
    try:
        prepare(settings_of.read(parser.parse_args().profile))
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
