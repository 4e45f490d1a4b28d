"""Where the parts of a graph lie: on given nodes, as Ray places them, and in the pods of Kubernetes that hold them.

Memory of ranks is planned (`metasepia.models.planning`); that of the other processes is what they hold at most by the
settings, and a process's own share, as measured on a CPU. The sizes of pods in k8s/ are held to these by test.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import plan, resources
from cluster.resources import Part
from cluster.settings import BackboneSettings, Settings
from metasepia.models import planning
from metasepia.models.planning import GIB

MIB = 2**20
TORCH_BYTES = planning.PROCESS_BYTES["cpu"]
"""A process that has torch."""
PLAIN_BYTES = 320 * MIB
"""A Ray worker without torch: gateway, registry."""
NODE_BYTES = 1 * GIB
"""Ray itself on a node: raylet, agents, Serve's proxy and a few idle workers."""
HEAD_BYTES = 3 * GIB
"""The head besides: GCS, dashboard, Serve's controller, drivers of jobs; their memory grows with the cluster."""
ENCODER_BYTES = 256 * MIB
"""Weights of an encoder such as MiniLM, with what a forward takes."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node of a cluster offers, by Ray's names of resources, and what has been put there."""

    name: str
    offers: Mapping[str, float]
    placed: list[tuple[str, Mapping[str, float]]] = field(default_factory=list)

    def free(self, kind: str) -> float:
        taken = sum(bundle.get(kind, 0.0) for _, bundle in self.placed)
        return round(self.offers.get(kind, 0.0) - taken, 6)

    def takes(self, part: Part) -> bool:
        return all(part.amount(kind) <= self.free(kind) + 1e-6 for kind in ("CPU", "GPU"))


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod of one kind: what its container has to be given."""

    name: str
    cpus: float
    """Logical CPUs that its Ray node offers."""
    gpus: int
    memory_bytes: int
    """Without the object store, which is shared memory and counts as the pod's too."""
    object_store_bytes: int
    disk_bytes: int
    """Of `home`: weights and factors."""
    holds: tuple[str, ...]


def memory_of(settings: Settings, part: Part) -> int:
    """Main memory of one replica of a part. Raises as `plan.config_of` does."""
    simple = {
        "gateway": PLAIN_BYTES + int(settings.admission.max_queued_mib * MIB),
        "registry": PLAIN_BYTES,
        "expert mixing": TORCH_BYTES,
        "task embedding": TORCH_BYTES + int(settings.tasks.index_mib * MIB),
        "reasoning pool": TORCH_BYTES + int(settings.reasoning.cache_mib * MIB),
    }
    if part.name in simple:
        return simple[part.name]
    for e in settings.encoders:
        if part.name == f"encoder {e.id}":
            return TORCH_BYTES + ENCODER_BYTES + int(e.cache_mib * MIB)
    backbone = next(b for b in settings.backbones if part.name.startswith(f"backbone {b.id} "))
    return _gang_bytes(backbone, settings.home)


def _gang_bytes(backbone: BackboneSettings, home: Path) -> int:
    """Of the replica and all ranks; a rank on a GPU has its tensors there, and the largest here while it is read."""
    made = planning.plan(plan.config_of(backbone, home), plan.need_of(backbone))
    rank = made.num_bytes if backbone.device == "cpu" else TORCH_BYTES + made.largest.num_bytes
    spares = backbone.spares * backbone.tp_size * TORCH_BYTES
    return PLAIN_BYTES + backbone.tp_size * rank + spares


def place(parts: Sequence[Part], nodes: Sequence[Node]) -> list[str]:
    """Puts the first replicas of every part on the nodes, the largest first, and says which had no room."""
    homeless: list[str] = []
    order = sorted(parts, key=lambda one: (one.amount("GPU"), one.amount("CPU")), reverse=True)
    for part in order:
        for _ in range(part.min_replicas):
            node = next((one for one in nodes if one.takes(part)), None)
            if node is None:
                homeless.append(part.name)
            else:
                node.placed.extend((part.name, bundle) for bundle in part.bundles)
    return homeless


def pods(settings: Settings) -> list[Pod]:
    """The head, on which nothing else runs, the keeper of `home`, and the worker: one of it holds one replica of every
    part, and where parts have several there are as many workers.
    """
    parts = resources.all_parts(settings)
    kept = [one for one in parts if one.at_home]
    rest = [one for one in parts if not one.at_home]
    shm = int(settings.ray.object_store_gib * GIB)
    disk = sum(_disk(one, settings.home) for one in settings.backbones)

    def pod(name: str, cpus: float, held: Sequence[Part], own: int) -> Pod:
        return Pod(
            name=name,
            cpus=cpus,
            gpus=math.ceil(sum(one.amount("GPU") for one in held) - 1e-6),
            memory_bytes=own + sum(memory_of(settings, one) for one in held),
            object_store_bytes=shm,
            disk_bytes=disk if held else 0,
            holds=tuple(one.name for one in held),
        )

    return [
        pod("head", 0, [], NODE_BYTES + HEAD_BYTES),
        pod("keeper", 0, kept, NODE_BYTES),
        pod("worker", math.ceil(sum(one.amount("CPU") for one in rest) - 1e-6), rest, NODE_BYTES),
    ]


def _disk(backbone: BackboneSettings, home: Path) -> int:
    made = planning.plan(plan.config_of(backbone, home), plan.need_of(backbone))
    return made.weights_on_disk + made.factors_on_disk


def max_workers(settings: Settings) -> int:
    """As many as the part with the most replicas may have."""
    return max(one.max_replicas for one in resources.all_parts(settings))


def min_workers(settings: Settings) -> int:
    return max(one.min_replicas for one in resources.all_parts(settings))


def lines(settings: Settings) -> list[str]:
    """The pods as text."""
    said = ["pods on Kubernetes, where the keeper has the disk of home and Ray places nothing else there:"]
    counts = {"worker": f"{min_workers(settings)} to {max_workers(settings)}"}
    for one in pods(settings):
        memory = (one.memory_bytes + one.object_store_bytes) / GIB
        gpus = f", {one.gpus} GPUs" if one.gpus else ""
        disk = f", {one.disk_bytes / GIB:.1f} GiB of disk for weights and factors" if one.disk_bytes else ""
        held = ", ".join(one.holds) or "nothing of ours"
        size = f"{one.cpus:g} logical CPUs{gpus}, {memory:.1f} GiB ({one.object_store_bytes / GIB:.1f} of it shared)"
        said.append(f"  {one.name:<8}{counts.get(one.name, '1'):>7}: {size}{disk}; holds {held}")
    return said


def nodes_of(text: str) -> list[Node]:
    """Nodes as people write them: `2x16`, `16cpu`, `1x64cpu+8gpu`, several with commas between. Raises ValueError."""
    found: list[Node] = []
    for one in text.split(","):
        number, _, offers = one.strip().rpartition("x")
        amounts: dict[str, float] = {}
        for amount in offers.split("+"):
            digits = amount.rstrip("abcdefghijklmnopqrstuvwxyz")
            kind = amount[len(digits) :] or "cpu"
            if kind not in ("cpu", "gpu"):
                raise ValueError(f"{amount!r} is neither CPUs nor GPUs; write 16cpu+8gpu")
            amounts[kind.upper()] = float(digits)
        for _ in range(int(number or 1)):
            found.append(Node(name=f"node {len(found) + 1}", offers=amounts))
    return found


def placement_lines(settings: Settings, nodes: Sequence[Node]) -> tuple[list[str], bool]:
    """Which bundle goes where, and whether all have room."""
    homeless = place(resources.all_parts(settings), nodes)
    said = ["placement of what the graph begins with:"]
    for node in nodes:
        offers = ", ".join(f"{node.offers.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if node.offers.get(kind))
        said.append(f"  {node.name} ({offers or 'nothing'}):")
        for name, bundle in node.placed:
            taken = " + ".join(f"{amount:g} {kind}" for kind, amount in bundle.items() if amount)
            said.append(f"    {name}: {taken or 'no CPU'}")
        left = ", ".join(f"{node.free(kind):g} {kind}" for kind in ("CPU", "GPU") if node.offers.get(kind))
        said.append(f"    free: {left or 'nothing'}")
    said += [f"  NO ROOM for {name}" for name in homeless]
    return said, not homeless


def as_json(settings: Settings) -> dict[str, Any]:
    """The parts and pods for programs."""
    parts = [
        {
            "name": one.name,
            "bundles": list(one.bundles),
            "min_replicas": one.min_replicas,
            "max_replicas": one.max_replicas,
            "memory_bytes": memory_of(settings, one),
        }
        for one in resources.all_parts(settings)
    ]
    return {"parts": parts, "pods": [dataclasses.asdict(one) for one in pods(settings)]}
