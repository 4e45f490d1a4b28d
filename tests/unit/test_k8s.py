"""k8s/ as Kubernetes, KubeRay and Serve read it: every overlay builds, and no field is one that they do not know."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.exposure import exposure
from serve import graph
from serve.grpc_door import proxy as grpc_proxy
from tests import k8s
from tests.k8s import FOLDERS, K8S, SERVED, Object

ROOT = K8S.parent
KUBERAY = ROOT.parent / "shared" / "kuberay"
OLDEST, NEWEST = "1.30", "1.37"
"""Of Kubernetes: the first with the fields used here, and one of today."""
MONITOR_FIELDS = {"selector", "endpoints"}


def closed(schema: Any) -> Any:
    """A schema under which an unknown field is an error: an API server drops it in silence."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(one) for name, one in schema.items()}
    keeps = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if isinstance(made.get("properties"), dict) and "type" in made and not keeps:
        made["additionalProperties"] = False
    return made


@functools.cache
def crd(kind: str) -> Any:
    path = KUBERAY / f"{kind}.v1.schema.json"
    if not path.is_file():
        pytest.skip("KubeRay's schemas are not beside the repository")
    return jsonschema.Draft202012Validator(closed(json.loads(path.read_text())))


@pytest.mark.parametrize("overlay", FOLDERS)
def test_every_object_is_named_once_and_in_the_namespace(overlay: str) -> None:
    found = [(one["kind"], one["metadata"]["name"]) for one in k8s.objects(overlay)]
    assert len(set(found)) == len(found) > 2
    assert {one["metadata"].get("namespace") for one in k8s.objects(overlay) if one["kind"] != "Namespace"} == {
        "metasepia"
    }


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", FOLDERS)
def test_kubernetes_knows_every_field(overlay: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    known = [one for one in k8s.objects(overlay) if one["apiVersion"] not in ("ray.io/v1", "monitoring.coreos.com/v1")]
    for one in known:
        validate(one, version, strict=True)
    for pod in k8s.pods(overlay):  # inside Ray's objects, where the schemas of KubeRay are older or absent
        metadata = {"name": "one"} | pod.template.get("metadata", {})
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}, version, strict=True)


def test_an_unknown_field_is_an_error_to_the_check_itself() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    pod = k8s.pod("cpu", "worker")
    wrong = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod.spec | {"tolerance": []}}
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong, NEWEST, strict=True)
    (cluster,) = k8s.clusters("cpu")
    with pytest.raises(jsonschema.ValidationError, match="headGroup"):
        crd("RayCluster").validate({"spec": cluster | {"headGroup": {}}})


@pytest.mark.parametrize("overlay", FOLDERS)
def test_kuberay_knows_every_field(overlay: str) -> None:
    found = [one for one in k8s.objects(overlay) if one["apiVersion"] == "ray.io/v1"]
    assert found
    for one in found:
        errors = [f"{error.json_path}: {error.message}" for error in crd(one["kind"]).iter_errors(one)]
        assert errors == []


@pytest.mark.parametrize("overlay", SERVED)
def test_serve_reads_its_configuration_and_finds_the_graph(overlay: str) -> None:
    config = ServeDeploySchema.model_validate(k8s.serve_config(overlay))
    (application,) = config.applications
    assert application.name == graph.NAME and application.route_prefix == "/"
    module, _, attribute = str(application.import_path).partition(":")
    assert (module, getattr(graph, attribute)) == ("serve.graph", graph.build)
    assert config.grpc_options.grpc_servicer_functions == grpc_proxy.FUNCTIONS
    assert k8s.settings(overlay).home == Path("/var/lib/metasepia")
    parts = {f"backbone-{one.id}" for one in k8s.settings(overlay).backbones}
    parts |= {f"encoder-{one.id}" for one in k8s.settings(overlay).encoders}
    parts |= {"gateway", "reasoning-pool", "expert-mixing", "task-embedding"}
    assert {one.name for one in application.deployments} <= parts


@pytest.mark.parametrize("overlay", SERVED)
def test_the_configuration_is_that_of_the_repository_but_for_its_settings(overlay: str) -> None:
    ours, theirs = k8s.serve_config(overlay), yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    for config in (ours, theirs):
        del config["http_options"]["host"]
        for name in ("args", "runtime_env"):  # the environment is the pods'
            config["applications"][0].pop(name, None)
    assert ours == theirs


@pytest.mark.parametrize("overlay", SERVED)
def test_ports_of_the_doors_are_one_number_everywhere(overlay: str) -> None:
    config, settings = k8s.serve_config(overlay), k8s.settings(overlay)
    worker = k8s.pod(overlay, "worker").ports
    assert worker["serve"] == config["http_options"]["port"] == settings.http.port
    assert worker["grpc"] == config["grpc_options"]["port"] == settings.grpc.port
    assert config["http_options"]["host"] == settings.http.host == "0.0.0.0"  # a pod has no other
    assert settings.keys.required and settings.ray.auth_mode == "token" and exposure(settings) == ()


@pytest.mark.parametrize("overlay", SERVED)
def test_what_prometheus_reads_is_there(overlay: str) -> None:
    (monitor,) = k8s.of_kind(overlay, "ServiceMonitor")
    assert set(monitor["spec"]) <= MONITOR_FIELDS
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    services = [one for one in k8s.of_kind(overlay, "Service") if wanted <= one["metadata"]["labels"].items()]
    assert [one["metadata"]["name"] for one in services] == ["metasepia-metrics"]
    ports = {port["name"] for port in services[0]["spec"]["ports"]}
    assert {one["port"] for one in monitor["spec"]["endpoints"]} <= ports


@pytest.mark.parametrize("overlay", FOLDERS)
def test_no_secret_is_written_down_and_every_image_has_a_version(overlay: str) -> None:
    assert k8s.of_kind(overlay, "Secret") == []
    text = yaml.safe_dump_all(k8s.objects(overlay))
    images = set(re.findall(r"image: (\S+)", text))
    assert images and all(re.fullmatch(r"registry\.example/metasepia:0\.1\.0-(cpu|gpu)", one) for one in images)
    secretive = re.compile(r"token|password|secret|key", re.IGNORECASE)
    for pod in k8s.pods(overlay):
        for container in pod.containers:
            assert not any(secretive.search(one["name"]) and "value" in one for one in container.get("env", []))
    for one in k8s.of_kind(overlay, "ConfigMap"):
        assert not any(secretive.search(name) for name in one["data"] if name.isupper() and "TOKENIZERS" not in name)


@pytest.mark.parametrize("overlay", FOLDERS)
def test_pods_may_do_nothing_that_they_need_not(overlay: str) -> None:
    for pod in k8s.pods(overlay):
        assert pod.spec["securityContext"]["runAsNonRoot"] and pod.spec["securityContext"]["runAsUser"] > 0
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        assert all("hostPath" not in volume for volume in pod.spec["volumes"])
        assert pod.name == "head" or pod.spec["automountServiceAccountToken"] is False
        for container in pod.containers:
            _is_closed(container["securityContext"])
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # the root cannot be written
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits["memory"] == requests["memory"] or pod.name == "submitter"
    for cluster in k8s.clusters(overlay):
        _is_closed(cluster["autoscalerOptions"]["securityContext"])
        assert cluster["authOptions"]["mode"] == "token"


def _is_closed(context: Object) -> None:
    assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]} and context["runAsNonRoot"] is True
    assert not context.get("privileged")


def test_the_image_is_small_pinned_and_not_roots() -> None:
    text = (K8S / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=python:3\.11\.7-[a-z-]+$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}", "build", "runtime"}
    names, parts = re.findall(r"^FROM .* AS (\S+)$", text, re.MULTILINE), re.split(r"^FROM ", text, flags=re.MULTILINE)
    stages = dict(zip(names, parts[1:], strict=True))
    for final in ("runtime", "cpu", "gpu"):
        assert not re.search(r"apt-get|pip install|build-essential", stages[final])
    assert "USER 1000:1000" in stages["runtime"] and "PYTHONPATH=/app" in stages["runtime"]
    copied = {line.split()[1] for line in stages["runtime"].splitlines() if line.startswith("COPY")}
    packages = {one.parent.name for one in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert packages <= copied
    sent = (K8S / "Dockerfile.dockerignore").read_text()
    needed = {word for stage in stages.values() for word in re.findall(r"^COPY (?!--)(.+) \S+$", stage, re.MULTILINE)}
    assert all(f"!{name}" in sent for line in needed for name in line.split())


@pytest.mark.parametrize("overlay", SERVED)
def test_prometheus_is_given_every_rule(overlay: str) -> None:
    (found,) = k8s.of_kind(overlay, "PrometheusRule")
    assert found["spec"] == yaml.safe_load((ROOT / "alerts" / "metasepia.yaml").read_text())


@pytest.mark.parametrize("overlay", SERVED)
def test_grafana_is_given_every_dashboard(overlay: str) -> None:
    (found,) = (one for one in k8s.of_kind(overlay, "ConfigMap") if "grafana_dashboard" in one["metadata"]["labels"])
    files = {one.name: one.read_text() for one in (ROOT / "dashboards").glob("*.json")}
    assert found["data"] == files and files


def test_the_readme_names_what_is_there() -> None:
    text = (K8S / "README.md").read_text()
    commands = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for folder in re.findall(r"-k (k8s/\S+)|cd (k8s/\S+)", commands):
        assert (ROOT / "".join(folder) / "kustomization.yaml").is_file()
    for module in re.findall(r"python -m ((?:actors|cluster|jobs|serve)\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    served = k8s.objects("cpu")
    for kind, name in re.findall(r"\b(service|rayservice)/([a-z-]+)", commands):
        assert name.endswith("-head-svc") or (kind, name) in {
            (one["kind"].lower(), one["metadata"]["name"]) for one in served
        }
    (cluster,) = k8s.clusters("secure")
    assert f"create secret generic {cluster['authOptions']['secretName']}" in commands
