"""A Kubernetes API server of our own on loopback: etcd and kube-apiserver from PATH, with the definitions of KubeRay.

No node, no operator: objects are checked, defaulted and stored, and nothing runs. `k8s/build-apiserver` makes the
binaries out of Debian's source package where a cluster's own are not at hand.
"""

import contextlib
import json
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

NEEDED = ("etcd", "kube-apiserver", "kubectl", "openssl")
START_S = 60.0


class ApiServer:
    """What tests ask of it."""

    def __init__(self, url: str, token: str) -> None:
        self._kubectl = ["kubectl", "--server", url, "--insecure-skip-tls-verify", "--token", token]

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        done = subprocess.run([*self._kubectl, *arguments], input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, objects: Sequence[dict[str, Any]], *more: str) -> str:
        """Server-side, as `kubectl apply -k` does in README.md."""
        text = yaml.safe_dump_all(objects)
        return self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", *more, given=text)

    def answers(self, *arguments: str) -> bool:
        return subprocess.run([*self._kubectl, *arguments], capture_output=True, check=False).returncode == 0

    def until_known(self, *kinds: str) -> None:
        """Definitions are taken at once and served a little later."""
        give_up = time.monotonic() + START_S
        while not self.answers("get", ",".join(kinds)):
            assert time.monotonic() < give_up, kinds
            time.sleep(0.5)


MERGING = ("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type", "x-kubernetes-validations")


def plain(schema: Any) -> Any:
    """Without what says how objects are merged and compared, of which an older server refuses a part, and without
    defaults: what is a field, and of which kind, stays.
    """
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: plain(one) for name, one in schema.items() if name not in (*MERGING, "default")}


def definition(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The CustomResourceDefinition of one of KubeRay's kinds, out of its schema alone."""
    plural = kind.lower() + ("s" if not kind.endswith("s") else "es")
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": plain(schema)}}
    return custom("ray.io", kind, plural, version)


def custom(group: str, kind: str, plural: str, version: dict[str, Any]) -> dict[str, Any]:
    names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {"group": group, "names": names, "scope": "Namespaced", "versions": [version]},
    }


@contextlib.contextmanager
def running(folder: Path) -> Iterator[ApiServer]:
    """Skips where a binary is missing; ends both processes."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on PATH (k8s/build-apiserver)")
    etcd, peers, secure = (_free_port() for _ in range(3))
    token, key = secrets.token_hex(16), folder / "sa.key"
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    here, there = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peers}"
    commands = [
        f"etcd --data-dir {folder}/etcd --listen-client-urls {here} --advertise-client-urls {here} "
        f"--listen-peer-urls {there} --initial-advertise-peer-urls {there} --initial-cluster default={there}",
        f"kube-apiserver --etcd-servers={here} --cert-dir={folder}/certs --secure-port={secure} "
        "--bind-address=127.0.0.1 --service-cluster-ip-range=10.96.0.0/16 --authorization-mode=RBAC "
        f"--service-account-issuer=https://localhost --service-account-signing-key-file={key} "
        f"--service-account-key-file={key} --token-auth-file={folder}/tokens.csv "
        "--disable-admission-plugins=ServiceAccount",
    ]
    with contextlib.ExitStack() as ends:
        for command in commands:
            log = ends.enter_context((folder / f"{command.split()[0]}.log").open("w"))
            process = subprocess.Popen(shlex.split(command), stdout=log, stderr=log)
            ends.callback(process.wait, 20)
            ends.callback(process.terminate)
        server = ApiServer(f"https://127.0.0.1:{secure}", token)
        give_up = time.monotonic() + START_S
        while not server.answers("get", "--raw", "/readyz"):
            assert time.monotonic() < give_up, (folder / "kube-apiserver.log").read_text()[-2000:]
            time.sleep(0.5)
        yield server


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def stored(server: ApiServer, kind: str, name: str) -> dict[str, Any]:
    return json.loads(server.kubectl("get", kind, name, "--namespace", "metasepia", "--output", "json"))
