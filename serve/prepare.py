"""Makes weights and factors ready, with progress: `python -m serve.prepare [--profile laptop]`.

`serve.main` runs it as a process of its own first: it may load torch, and main stays for as long as the graph runs.
"""

import argparse
import json
import sys
from pathlib import Path

from cluster import plan
from cluster import settings as settings_of
from cluster.settings import Settings
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from serve.accepting import find_index


def prepare(settings: Settings) -> dict[str, PreparedBackbone]:
    """The backbones by id, with what is missing made first. Where nothing is, no torch is loaded: under a second."""
    found: dict[str, PreparedBackbone] = {}
    for backbone in settings.backbones:
        try:
            prepared = found[backbone.id] = checkpoints.prepare(backbone.source, settings.home)
        except InvalidSettings as error:
            raise InvalidSettings(f"backbones[{backbone.id}].{error.field}", error.value, error.allowed) from error
        plan.check(backbone, json.loads(Path(prepared.path, "config.json").read_text()))
        layers = backbone.expert_layers
        if layers and find_index(prepared.digest, layers, settings.home, backbone.expert_rank) is None:
            from metasepia.experts.factors import factors_of_backbone

            factors_of_backbone(prepared, layers, settings.home, rank=backbone.expert_rank)
    return found


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
