"""What a profile places where, and what each rank will hold: `python -m cluster.plan PROFILE`.

    python -m cluster.plan gpu --nodes 2x16cpu+8gpu      onto nodes that one might have
    python -m cluster.plan laptop --address auto         onto those of a cluster that runs
    python -m cluster.plan laptop --pods                 the pods that Kubernetes would need

A backbone is planned from its checkpoint's config.json, or from the profile's `shapes` where the checkpoint is not on
this machine. Nothing is started and no weight is read. The exit status is 1 when a rank or a part does not fit.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import resources
from cluster import settings as settings_of
from cluster.settings import BackboneSettings, Settings
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.models import checkpoints, planning
from metasepia.models.planning import GIB, Need, Plan

if TYPE_CHECKING:
    from cluster import pods


def need_of(backbone: BackboneSettings) -> Need:
    names = [one.name for one in dataclasses.fields(Need) if one.name != "pinned"]
    return Need(**{name: getattr(backbone, name) for name in names}, pinned=bool(backbone.pinned))


def config_of(backbone: BackboneSettings, home: Path) -> dict[str, Any]:
    """The checkpoint's config.json; the profile's shapes where there is no checkpoint."""
    if backbone.shapes is not None and not Path(backbone.source, "config.json").is_file():
        return dataclasses.asdict(backbone.shapes)
    return json.loads(Path(checkpoints.prepare(backbone.source, home).path, "config.json").read_text())


def check(backbone: BackboneSettings, config: Mapping[str, Any]) -> None:
    """Raises InvalidSettings for a checkpoint of other shapes than the profile's, or ranks that would not fit.

    Settings without `rank_memory_gib` are not held to a plan.
    """
    expected = {} if backbone.shapes is None else dataclasses.asdict(backbone.shapes)
    for name, value in expected.items():
        found = config.get(name, value)
        if found != value:
            where = f"backbones[{backbone.id}].shapes.{name}"
            raise InvalidSettings(where, value, f"{found}, as the checkpoint's config.json says")
    if not backbone.rank_memory_gib:
        return
    need, memory = need_of(backbone), int(backbone.rank_memory_gib * GIB)
    total = planning.plan(config, need).num_bytes
    if total > memory:
        changes = " or ".join(planning.remedies(config, need, memory)) or "a larger device, or several changes"
        allowed = f"at least {total / GIB:.1f}, which a rank takes; or change {changes} (python -m cluster.plan)"
        raise InvalidSettings(f"backbones[{backbone.id}].rank_memory_gib", backbone.rank_memory_gib, allowed)


def lines(settings: Settings) -> tuple[list[str], bool]:
    """The plan as text, and whether every backbone fits."""
    said, fits = [], True
    for backbone in settings.backbones:
        config = config_of(backbone, settings.home)
        need = need_of(backbone)
        made = planning.plan(config, need)
        more, fit = _backbone_lines(backbone, config, need, made)
        said += more
        fits = fits and fit
    rows = resources.parts(settings)
    cpus, gpus = round(sum(row[1] for row in rows), 6), round(sum(row[2] for row in rows), 6)
    said.append(f"placed: {cpus:g} CPUs and {gpus:g} GPUs of {settings.ray.num_cpus:g} and {settings.ray.num_gpus:g}")
    said += [f"  {part}: {one:g} CPUs" + (f", {two:g} GPUs" if two else "") for part, one, two in rows]
    for part in resources.all_parts(settings):
        if part.min_replicas < part.max_replicas:
            said.append(f"  {part.name} has {part.min_replicas} to {part.max_replicas} replicas, by what is queued")
    return said, fits


def _backbone_lines(
    backbone: BackboneSettings, config: Mapping[str, Any], need: Need, made: Plan
) -> tuple[list[str], bool]:
    ranks = f"{need.tp_size} rank{'s' if need.tp_size > 1 else ''}"
    of = f" of {backbone.rank_memory_gib:g} GiB" if backbone.rank_memory_gib else ""
    said = [f"{backbone.id}: {config['model_type']}, {need.dtype} on {need.device}, {ranks}{of}; each rank holds"]
    said += [_line(part.what, part.num_bytes, part.note) for part in made.parts if part.num_bytes]
    free = int(backbone.rank_memory_gib * GIB) - made.num_bytes
    fits = free >= 0 or not backbone.rank_memory_gib
    room = "" if not backbone.rank_memory_gib else f"{free / GIB:.2f} free" if fits else f"{-free / GIB:.2f} TOO MUCH"
    said.append(_line("in all", made.num_bytes, room))
    said.append(_line("largest tensor", made.largest.num_bytes, made.largest.what))
    said.append(_line("weights on disk", made.weights_on_disk))
    if made.factors_on_disk:
        said.append(_line("factors on disk", made.factors_on_disk, "made once by python -m jobs.factor_backbone,"))
        said.append(_line("", made.factoring.num_bytes, f"in the memory of {made.factoring.note}"))
    if backbone.spares:
        spare = planning.PROCESS_BYTES["cpu"]
        said.append(_line("each spare", spare, f"{need.tp_size} of them, of the machine's memory"))
    if not fits:
        memory = int(backbone.rank_memory_gib * GIB)
        changes = planning.remedies(config, need, memory)
        enough = (
            f"Enough would be {' or '.join(changes)}." if changes else "No change of one or two settings is enough."
        )
        said.append(f"  It does not fit. {enough}")
    return said, fits


def _line(what: str, num_bytes: int, note: str = "") -> str:
    return f"  {what:<16}{num_bytes / GIB:>8.2f} GiB  {note}".rstrip()


def _nodes_of(address: str, settings: Settings) -> "list[pods.Node]":
    """The living nodes of a cluster that runs, joined for the question and left again."""
    import ray

    from cluster import connect, pods

    connect.connect(dataclasses.replace(settings.ray, address=address))
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()
    return [pods.Node(name=str(node["NodeManagerHostname"]), offers=node["Resources"]) for node in alive]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", nargs="?", help="a profile's name, or a path to a .toml file (default: laptop)")
    onto = parser.add_mutually_exclusive_group()
    onto.add_argument("--nodes", help="nodes to place on, such as 2x16cpu or 1x64cpu+8gpu,4x16cpu")
    onto.add_argument("--address", help="a Ray cluster to place on: auto, host:port or ray://host:port")
    parser.add_argument("--pods", action="store_true", help="the pods that Kubernetes would need")
    parser.add_argument("--json", action="store_true", help="parts and pods for programs")
    asked = parser.parse_args(arguments)
    from cluster import pods  # which asks this module for the memory of ranks

    try:
        settings = settings_of.read(asked.profile)
        if asked.json:
            print(json.dumps(pods.as_json(settings), indent=1))
            return 0
        said, fits = lines(settings)
        if asked.nodes or asked.address:
            nodes = pods.nodes_of(asked.nodes) if asked.nodes else _nodes_of(asked.address, settings)
            more, room = pods.placement_lines(settings, nodes)
            said, fits = said + more, fits and room
        if asked.pods:
            said += pods.lines(settings)
    except (MetasepiaError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(said))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
