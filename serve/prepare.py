"""Makes weights and factors ready, with progress: `python -m serve.prepare [--profile laptop]`.

Every part of the graph finds them by `ready`, on whatever node it is; where something is missing, a process of its own
makes it first, since that loads torch and a gateway stays for as long as the graph runs. `serve.main` does so before
it starts anything, so that people see how far it is.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from cluster import plan, starting, tables
from cluster import settings as settings_of
from cluster.settings import Settings
from metasepia.errors import InvalidSettings, MetasepiaError, Unavailable
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from serve.experts.accepting import find_index

ROOT = Path(__file__).parents[1]


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


def ready(settings: Settings) -> dict[str, PreparedBackbone]:
    """`prepare` without torch in this process. Several may ask at once: one makes what is missing, the others wait.

    Raises InvalidSettings for a source that is none, Unavailable with the words of what failed.
    """
    if not _is_ready(settings):
        done = subprocess.run(
            [sys.executable, "-m", "serve.prepare", "--settings", "-"],
            input=json.dumps(tables.tree_of(settings)), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise Unavailable(f"a part of the graph (its weights were not made ready: {words[-1]})", 60.0)
    return prepare(settings)


def _is_ready(settings: Settings) -> bool:
    for one in settings.backbones:
        found = checkpoints.find(one.source, settings.home)
        if found is None:
            return False
        if one.expert_layers and find_index(found.digest, one.expert_layers, settings.home, one.expert_rank) is None:
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile")
    parser.add_argument("--settings", choices=["-"], help="read them as JSON from standard input")
    arguments = parser.parse_args()
    try:
        given = json.load(sys.stdin) if arguments.settings else None
        settings = settings_of.read(arguments.profile) if given is None else tables.build(Settings, given)
        try:
            prepare(settings)
        except OSError as error:  # a disk that fills up on the way, above all
            raise starting.refusal(settings.home, error) from error
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
