"""Every overlay given to a real API server, dry and for good; only where one can be started (tests/apiserver.py)."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import apiserver, k8s
from tests.apiserver import ApiServer
from tests.k8s import FOLDERS, K8S

KUBERAY = K8S.parents[1] / "shared" / "kuberay"
MONITOR = {
    "name": "v1",
    "served": True,
    "storage": True,
    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
}
"""Prometheus' operator is not what is tested: its objects are stored as they are."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if not KUBERAY.is_dir():
        pytest.skip("KubeRay's schemas are not beside the repository")
    with apiserver.running(tmp_path_factory.mktemp("apiserver")) as running:
        kinds = ("RayCluster", "RayService", "RayJob")
        definitions = [
            apiserver.definition(kind, json.loads((KUBERAY / f"{kind}.v1.schema.json").read_text())) for kind in kinds
        ]
        for kind in ("ServiceMonitor", "PrometheusRule"):
            definitions.append(apiserver.custom("monitoring.coreos.com", kind, f"{kind.lower()}s", MONITOR))
        running.apply(definitions)
        running.until_known("rayclusters", "rayservices", "rayjobs", "servicemonitors", "prometheusrules")
        yield running


def known(server: ApiServer, overlay: str) -> list[dict[str, Any]]:
    """Its objects, with PodDisruptionBudgets as a server before 1.21 calls them, where it is one."""
    versions = server.kubectl("api-versions").split()
    made: list[dict[str, Any]] = []
    for one in k8s.objects(overlay):
        old = one["apiVersion"] == "policy/v1" and "policy/v1" not in versions
        made.append(one | {"apiVersion": "policy/v1beta1"} if old else one)
    return made


@pytest.mark.parametrize("overlay", FOLDERS)
def test_a_server_takes_it_and_keeps_every_field(server: ApiServer, overlay: str) -> None:
    objects = known(server, overlay)
    server.apply([one for one in objects if one["kind"] == "Namespace"] or k8s.of_kind("cpu", "Namespace"))
    server.apply(objects, "--dry-run=server")
    server.apply(objects)
    for one in objects:
        if one["kind"] in ("RayService", "RayJob", "RayCluster", "NetworkPolicy", "PodDisruptionBudget"):
            found = apiserver.stored(server, one["kind"], one["metadata"]["name"])
            assert lost(one["spec"], found["spec"]) == []


def lost(given: Any, found: Any, where: str = "spec") -> list[str]:
    """What was given and is not there, or is another: an API server drops what it does not know."""
    if isinstance(given, dict):
        return [bad for name in given for bad in lost(given[name], (found or {}).get(name), f"{where}.{name}")]
    if isinstance(given, list):
        if len(given) != len(found or []):
            return [where]
        return [bad for i, (a, b) in enumerate(zip(given, found, strict=True)) for bad in lost(a, b, f"{where}[{i}]")]
    return [] if given == found else [f"{where}: {given!r} became {found!r}"]


def test_a_server_refuses_what_the_definitions_do(server: ApiServer) -> None:
    (service,) = k8s.of_kind("cpu", "RayService")
    wrong = json.loads(json.dumps(service))
    wrong["metadata"]["name"] = "wrong"
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] = "one"
    server.apply(k8s.of_kind("cpu", "Namespace"))
    with pytest.raises(AssertionError, match="minReplicas"):
        server.apply([wrong])
