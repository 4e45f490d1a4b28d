"""k8s/ agrees with the code: sizes of pods with what the graph places, times with what it takes to end, ports."""

import json
from typing import Any

import pytest

from cluster import connect, pods, resources
from cluster.door_settings import ENDING_S
from cluster.pods import Node
from serve.grpc_door import proxy as grpc_proxy
from serve.grpc_door import start as grpc_start
from serve.proxy import envelope as middleware
from tests import k8s
from tests.k8s import FOLDERS, SERVED, Object, Pod, num_bytes, num_cpus

GIB = 2**30
INSIDE = {"gcs-server", "client"}
"""Ports of Ray that only its own nodes come to."""


def memory(pod: Pod) -> int:
    return num_bytes(pod.spec["containers"][0]["resources"]["limits"]["memory"])


def volume(pod: Pod, name: str) -> Object:
    return next(one for one in pod.spec["volumes"] if one["name"] == name)


def labelled(overlay: str, selector: Object) -> list[Pod]:
    """The pods that a selector means, by the labels that we give them."""
    wanted = selector.get("matchLabels", selector).items()
    return [one for one in k8s.pods(overlay) if wanted <= one.labels.items()]


@pytest.mark.parametrize("overlay", SERVED)
def test_each_pod_has_what_the_plan_says(overlay: str) -> None:
    settings = k8s.settings(overlay)
    for planned in pods.pods(settings):
        pod = k8s.pod(overlay, planned.name)
        offered, container = pod.group["rayStartParams"], pod.spec["containers"][0]
        assert float(offered["num-cpus"]) == planned.cpus
        assert num_cpus(container["resources"]["requests"]["cpu"]) >= planned.cpus
        shared = int(offered["object-store-memory"])
        assert memory(pod) >= planned.memory_bytes + shared
        assert num_bytes(volume(pod, "shm")["emptyDir"]["sizeLimit"]) > shared
        assert container["resources"]["limits"].get("nvidia.com/gpu", "0") == str(planned.gpus)
        assert offered.get("num-gpus", "0") == str(planned.gpus)
        disk = volume(pod, "home")
        if "emptyDir" in disk:
            assert num_bytes(disk["emptyDir"]["sizeLimit"]) > 1.25 * planned.disk_bytes
    worker = k8s.pod(overlay, "worker")
    assert int(worker.group["rayStartParams"]["object-store-memory"]) == int(settings.ray.object_store_gib * GIB)


@pytest.mark.parametrize("overlay", SERVED)
def test_as_many_workers_as_the_replicas_need(overlay: str) -> None:
    settings, worker = k8s.settings(overlay), k8s.pod(overlay, "worker").group
    assert worker["minReplicas"] == worker["replicas"] == pods.min_workers(settings)
    assert worker["maxReplicas"] == pods.max_workers(settings)
    assert {k8s.pod(overlay, "keeper").group[name] for name in ("replicas", "minReplicas", "maxReplicas")} == {1}


@pytest.mark.parametrize("overlay", SERVED)
def test_ray_finds_room_for_every_bundle(overlay: str) -> None:
    nodes: list[Node] = []
    for pod in k8s.pods(overlay):
        offered = pod.group["rayStartParams"]
        offers = {"CPU": float(offered["num-cpus"]), "GPU": float(offered.get("num-gpus", 0))}
        offers |= json.loads(json.loads(offered.get("resources", '"{}"')))
        nodes += [Node(name=pod.name, offers=offers) for _ in range(pod.group.get("replicas", 1))]
    settings = k8s.settings(overlay)
    assert pods.place(resources.all_parts(settings), nodes) == []
    resources.check_fits(settings, {kind: sum(node.offers.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")})
    # Only the keeper offers what the registry asks for, and it asks for nothing else.
    asked = resources.registry(settings.registry)
    (name,) = asked["resources"]
    assert asked["num_cpus"] == 0
    assert [node.name for node in nodes if node.offers.get(name, 0) >= resources.NODE_SHARE] == ["keeper"]


@pytest.mark.parametrize("overlay", SERVED)
def test_the_grace_of_a_pod_covers_every_budget_within_it(overlay: str) -> None:
    admission = k8s.settings(overlay).admission
    drain_s = float(k8s.environment(overlay)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert drain_s >= admission.drain_s
    assert admission.grace_s <= drain_s + ENDING_S
    for pod in k8s.pods(overlay):
        hook = pod.spec["containers"][0].get("lifecycle", {}).get("preStop")
        pause_s = float(hook["exec"]["command"][1]) if hook else 0.0
        assert pod.spec["terminationGracePeriodSeconds"] >= pause_s + drain_s + ENDING_S
        if "serve" in pod.ports:  # a load balancer hears of it only after the probe's next turn
            probe = pod.spec["containers"][0]["readinessProbe"]
            assert pause_s >= probe["periodSeconds"] * probe["failureThreshold"] + 5


@pytest.mark.parametrize("overlay", FOLDERS)
def test_a_pod_is_given_longer_to_start_than_to_be_slow(overlay: str) -> None:
    for pod in k8s.pods(overlay):
        if pod.name == "submitter":
            continue
        container = pod.spec["containers"][0]
        start, alive = container["startupProbe"], container["livenessProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 300
        assert alive["periodSeconds"] * alive["failureThreshold"] >= 60
        assert "restartPolicy" not in pod.spec  # Ray's autoscaler v2 counts on Never, which KubeRay puts there


@pytest.mark.parametrize("overlay", SERVED)
def test_pods_have_the_environment_that_the_graph_counts_on(overlay: str) -> None:
    environ, settings = k8s.environment(overlay), k8s.settings(overlay)
    expected = middleware.ENVIRONMENT | connect.worker_env() | {"PYTHONPATH": "/app"}
    expected |= {name: value for name, value in grpc_start.environment(settings).items() if name != grpc_proxy.HOST}
    expected |= {f"RAY_{name}": str(bound) for name, bound in connect.BOUNDS_OF_GCS.items()}
    assert expected.items() <= environ.items()
    (application,) = k8s.serve_config(overlay)["applications"]
    assert environ["METASEPIA_PROFILE"] == application["args"]["profile"]
    assert environ["METASEPIA_HOME"] == str(settings.home)
    for pod in k8s.pods(overlay):
        assert {"configMapRef": {"name": "metasepia-env"}} in pod.spec["containers"][0]["envFrom"]
        mounts = {one["mountPath"]: one["name"] for one in pod.spec["containers"][0]["volumeMounts"]}
        assert mounts[str(settings.home)] == "home" and mounts["/dev/shm"] == "shm"
        assert volume(pod, "shm")["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volume(k8s.pod(overlay, "keeper"), "home")
    writers = [one.name for one in k8s.pods(overlay) if "persistentVolumeClaim" in volume(one, "home")]
    assert writers == ["keeper"]


@pytest.mark.parametrize("overlay", SERVED)
def test_selectors_mean_pods_and_named_ports_are_theirs(overlay: str) -> None:
    for service in k8s.of_kind(overlay, "Service"):
        chosen = labelled(overlay, service["spec"]["selector"])
        assert chosen
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in one.ports for one in chosen)
            assert {one.ports[port["targetPort"]] for one in chosen} == {port["port"]}
    for budget in k8s.of_kind(overlay, "PodDisruptionBudget"):
        (pod,) = labelled(overlay, budget["spec"]["selector"])
        assert set(budget["spec"]) == {"minAvailable", "selector"}  # the one form that works without a scale
        assert 0 < budget["spec"]["minAvailable"] < pod.group["minReplicas"]  # or no node could be drained
    for pod in k8s.pods(overlay):
        for spread in pod.spec.get("topologySpreadConstraints", []):
            assert labelled(overlay, spread["labelSelector"]) == [pod]
    claims = {one["metadata"]["name"] for one in k8s.of_kind(overlay, "PersistentVolumeClaim")}
    accounts = {one["metadata"]["name"] for one in k8s.of_kind(overlay, "ServiceAccount")}
    maps = {one["metadata"]["name"] for one in k8s.of_kind(overlay, "ConfigMap")}
    for pod in k8s.pods(overlay):
        claimed = [one["persistentVolumeClaim"] for one in pod.spec["volumes"] if "persistentVolumeClaim" in one]
        assert {one["claimName"] for one in claimed} <= claims
        assert pod.spec.get("serviceAccountName", "metasepia") in accounts
        named = [one["configMapRef"]["name"] for c in pod.containers for one in c["envFrom"] if "configMapRef" in one]
        assert set(named) <= maps


def test_policies_open_every_port_for_others_and_nothing_else() -> None:
    """From outside: what is left of a pod's ports without those that only Ray's nodes use among themselves."""
    policies = k8s.of_kind("secure", "NetworkPolicy")
    opened: dict[str, set[Any]] = {one.name: set() for one in k8s.pods("secure")}
    closed: set[str] = set()
    for policy in policies:
        chosen = labelled("secure", policy["spec"]["podSelector"])
        assert chosen
        closed |= {one.name for one in chosen if {"Ingress", "Egress"} <= set(policy["spec"]["policyTypes"])}
        for rule in policy["spec"].get("ingress", []):
            if any("namespaceSelector" in one for one in rule["from"]):
                for pod in chosen:
                    ports = {one["port"] for one in rule["ports"]}
                    assert ports <= set(pod.ports)
                    opened[pod.name] |= ports
            else:
                ours = [one.name for source in rule["from"] for one in labelled("secure", source["podSelector"])]
                assert sorted(ours) == sorted(opened) and "ports" not in rule
    assert closed == set(opened)
    doors = {"serve", "grpc"}
    assert opened == {
        "head": set(k8s.pod("secure", "head").ports) - INSIDE,
        "keeper": set(k8s.pod("secure", "keeper").ports) - doors,
        "worker": set(k8s.pod("secure", "worker").ports),
    }


def test_what_is_highly_available_has_two_of_what_serves_and_a_head_that_remembers() -> None:
    (cluster,) = k8s.clusters("ha")
    assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    settings = k8s.settings("ha")
    for part in resources.all_parts(settings):
        if part.name.startswith(("backbone", "encoder", "reasoning")):
            assert part.min_replicas >= 2
    spread = {one["topologyKey"]: one for one in k8s.pod("ha", "worker").spec["topologySpreadConstraints"]}
    assert spread["kubernetes.io/hostname"]["whenUnsatisfiable"] == "DoNotSchedule"


def test_a_sweep_goes_on_after_its_cluster_and_leaves_nothing_running() -> None:
    (job,) = k8s.of_kind("jobs", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0 and spec["backoffLimit"] > 0
    assert "--resume" in spec["entrypoint"] and "jobs.sweep_tasks" in spec["entrypoint"]
    (environ,) = (one["data"] for one in k8s.of_kind("jobs", "ConfigMap"))
    assert {"SWEEP_OUT", "SWEEP_PROFILE"} <= set(environ)
    stop_s = float(environ["RAY_JOB_STOP_WAIT_TIME_S"])
    for pod in k8s.pods("jobs"):
        if pod.name != "submitter":
            assert pod.spec["terminationGracePeriodSeconds"] >= stop_s + ENDING_S
