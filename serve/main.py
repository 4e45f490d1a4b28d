"""`python -m serve.main [--profile laptop]`: the whole graph in the foreground, until SIGINT or SIGTERM.

Says "ready" only when a real forward through every part has answered, and prints three requests to paste. A first
signal lets what is under way finish, within `admission.drain_s`, and then ends every process in order; a second one
kills them.
"""

import argparse
import asyncio
import contextlib
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from rich.console import Console

from actors import registry
from actors.registry import RegistryClient
from cluster import connect, resources, starting
from cluster import settings as settings_of
from cluster.door_settings import ENDING_S
from cluster.exposure import check_exposure
from cluster.settings import Settings
from metasepia.digests import is_digest, short
from metasepia.errors import InvalidSettings, MetasepiaError, Unavailable, UnknownName
from metasepia.models.prepared import PreparedBackbone
from metasepia.registry.entries import LOCAL
from serve import graph, prepare, processes, shipped
from serve.grpc_door import start as grpc_start
from serve.proxy import connections
from serve.proxy import envelope as middleware

READY_TIMEOUT_S = 600.0
DRAINED_S = 2.0
"""For gateways to say that they are done."""
ROOT = Path(__file__).parents[1]

console = Console(file=sys.stdout, highlight=False, soft_wrap=True)


class NotStarted(Exception):
    """Serve could not bring a deployment up; the text says which, and what its constructor raised."""


class Foreground:
    """One start of the graph, from settings to the last process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._run = uuid.uuid4().hex
        self._ending = threading.Event()
        self._ready = False
        os.environ[processes.MARK] = self._run
        # Daemons of a cluster of our own inherit these: the proxy imports `serve.proxy.envelope` by name.
        os.environ.update(middleware.ENVIRONMENT | connections.environment(settings.http))
        os.environ.update(grpc_start.environment(settings))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its steps are not ours to tell

    def run(self) -> int:
        """Starts, waits, ends. The exit status: 0 after a signal, 1 when the start failed."""
        self._catch_signals()
        status = 0
        try:
            self._start()
            self._catch_signals()  # Ray puts handlers of its own in their place
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            if self._ready:
                self._drain()
            console.print("ending every process; once more to kill them")
        except (MetasepiaError, NotStarted) as error:
            console.print(f"[red]not started:[/] {error}")
            status = 1
        except Exception:
            console.print_exception()
            console.print("[red]not started:[/] see above; Ray's logs are in /tmp/ray/session_latest/logs")
            status = 1
        finally:
            self._end()
        return status

    def _start(self) -> None:
        begin, http = time.monotonic(), self._settings.http
        check_exposure(self._settings)
        starting.check_all(self._settings)
        if self._settings.ray.address == "local":
            resources.check_fits(
                self._settings, {"CPU": self._settings.ray.num_cpus, "GPU": self._settings.ray.num_gpus}
            )
        with _step("weights and factors"):
            _run_prepare()
            prepared = prepare.ready(self._settings)
            shipped.module_cards(self._settings.reasoning.modules)
        with _step("Ray"):
            available = connect.connect(self._settings.ray, environment=self._settings.telemetry.environment)
            self._catch_signals()
            resources.check_fits(self._settings, available)
        with _step("registry"):
            client = registry.start(self._settings)
            asyncio.run(shipped.import_all(client))
            asyncio.run(check_pins(self._settings, prepared, client))
        with _step("Serve graph"):
            options = HTTPOptions(host=http.host, port=http.port, keep_alive_timeout_s=90)
            grpc_options = grpc_start.options(self._settings.grpc)
            serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, grpc_options=grpc_options)
            application = graph.application(self._settings, client)
            try:
                serve.run(application, name=graph.NAME)
            except RuntimeError as error:
                raise NotStarted(_why(error)) from error
            if self._settings.grpc.enabled:
                grpc_start.check_listening(self._settings.grpc_host, self._settings.grpc.port)
        with _step("first forward through every part"):
            self._wait_until_ready()
        self._ready = True
        self._write_card()
        self._say_ready(time.monotonic() - begin)

    @property
    def _url(self) -> str:
        return f"http://{self._settings.http.host}:{self._settings.http.port}"

    @property
    def _card(self) -> Path:
        return self._settings.home / "serve.json"

    def _wait_until_ready(self) -> None:
        give_up, reason = time.monotonic() + READY_TIMEOUT_S, ""
        while time.monotonic() < give_up:
            try:
                answer = httpx.get(f"{self._url}/health", timeout=15)
                if answer.status_code == 200:
                    return
                reason = answer.json()["error"]["message"]
            except (httpx.HTTPError, ValueError, KeyError) as error:
                reason = str(error)
            time.sleep(0.25)
        raise Unavailable(f"the graph ({reason})", 0.0)

    def _write_card(self) -> None:
        me = psutil.Process()
        card = {"pid": me.pid, "created_unix_s": me.create_time(), "url": self._url, "run": self._run}
        card["ray"] = ray.get_runtime_context().gcs_address  # where `actors.keys` finds the registry
        self._card.parent.mkdir(parents=True, exist_ok=True)
        self._card.write_text(json.dumps(card) + "\n")

    def _say_ready(self, seconds: float) -> None:
        key = self._settings.keys.required
        if key:
            console.print("keys: asked for; `python -m actors.keys create --tenant NAME --scopes infer` makes one")
            models = [{"id": one.id, "x_info": {"kind": "backbone"}} for one in self._settings.backbones]
        else:
            console.print(f"keys: off; whoever reaches {self._url} may do everything (keys.required turns them on)")
            models = httpx.get(f"{self._url}/v1/models", timeout=30).json()["data"]
        console.print(
            f"[bold green]ready[/] in {seconds:.0f} s on {self._url}; Ctrl-C ends it. Three requests to paste:\n"
        )
        for line in curl_lines(self._url, models, [one.id for one in self._settings.encoders], key=key):
            print("\n" + line, flush=True)

    def _catch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        if self._ending.is_set():
            self._kill_all()
        self._ending.set()
        raise KeyboardInterrupt

    def _drain(self) -> None:
        """What is under way may finish; every gateway refuses what comes. Whatever happens here, the end goes on."""
        budget_s = self._settings.admission.drain_s
        console.print(f"finishing what is under way, for up to {budget_s:g} s; once more to kill everything")
        # Ray and Serve end themselves, and their proxies, when they are signalled: this comes before that.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
            left = serve.get_app_handle(graph.NAME).broadcast("drain", budget_s).results(timeout_s=budget_s + DRAINED_S)
            if sum(left):
                console.print(f"{sum(left)} requests did not end in time")

    def _end(self) -> None:
        """Serve, then Ray, then whatever still carries our mark. A watchdog ends it when one of them hangs."""
        self._ending.set()
        self._catch_signals()
        watchdog = threading.Timer(ENDING_S, self._kill_all)
        watchdog.daemon = True
        watchdog.start()
        with contextlib.suppress(OSError):
            self._card.unlink()
        if ray.is_initialized():
            # Ray tells of every process that it loses, to whatever sys.stdout is; here they are meant to end. What
            # fails is ended below.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                with contextlib.suppress(Exception):
                    serve.shutdown()
                if self._settings.ray.address == "local":
                    with contextlib.suppress(Exception):
                        ray.shutdown()
        left = processes.end(self._run, polite_s=5.0) if self._settings.ray.address == "local" else []
        if left:
            console.print(f"killed {len(left)} processes that were left")
        watchdog.cancel()

    def _kill_all(self) -> NoReturn:
        with contextlib.suppress(OSError):
            self._card.unlink()
        processes.end(self._run, polite_s=0.0)
        os._exit(1)


async def check_pins(settings: Settings, prepared: Mapping[str, PreparedBackbone], catalogue: RegistryClient) -> None:
    """Raises InvalidSettings, in words, for a pinned expert that is not there or is another backbone's."""
    for one in settings.backbones:
        if one.pinned:
            allowed, backbone = f"an expert of {one.id}", prepared[one.id].digest
            try:
                found = await catalogue.resolve("expert", one.pinned, LOCAL, deleted=is_digest(one.pinned))
            except UnknownName as error:
                raise InvalidSettings(f"backbones[{one.id}].pinned", one.pinned, f"{allowed} ({error})") from None
            if found.card.get("backbone") != backbone:
                allowed += f"; it was made for backbone {short(str(found.card.get('backbone')))}, not {short(backbone)}"
                raise InvalidSettings(f"backbones[{one.id}].pinned", one.pinned, allowed)


def curl_lines(url: str, models: list[dict[str, Any]], encoders: list[str], *, key: bool = False) -> list[str]:
    """Three requests to paste: classify, chat (with the first expert and its card's own example), embed. With `key`
    they show the one that METASEPIA_KEY holds.
    """
    experts = sorted((one for one in models if one["x_info"]["kind"] == "expert"), key=lambda one: one["id"])
    expert = experts[0] if experts else None
    card = expert["x_info"]["card"] if expert else {}
    prompt = card.get("example_prompt", "Name the capital of France.")
    examples = [
        {"text": "The lamp broke after two days", "label": "complaint"},
        {"text": "Thank you for the kind and quick help", "label": "praise"},
        {"text": "I was charged twice for one order", "label": "complaint"},
        {"text": "Lovely packaging and fast delivery", "label": "praise"},
    ]
    chat = {
        "model": (expert or models[0])["id"],
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 8,
        "temperature": 0,
    }
    bodies: list[tuple[str, object]] = [
        ("classify", {"examples": examples, "inputs": ["The zip tore the first time I used it"]}),
        ("chat/completions", chat),
        ("embeddings", {"model": encoders[0], "input": ["one body", "any colour"]}),
    ]
    header = ' -H "authorization: Bearer $METASEPIA_KEY"' if key else ""
    return [
        f"curl -s {url}/v1/{path}{header} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"
        for path, body in bodies
    ]


def _why(error: RuntimeError) -> str:
    """What Serve knows of the deployments that failed; its exception only names them."""
    lines = [str(error)]
    for name, one in serve.status().applications[graph.NAME].deployments.items():
        if one.message and one.status.value in ("UNHEALTHY", "DEPLOY_FAILED"):
            lines.append(f"{name}: " + "\n".join(one.message.strip().splitlines()[-8:]))
    return "\n".join(lines)


def _run_prepare() -> None:
    """In a process of its own, which may load torch; its progress goes to our terminal."""
    done = subprocess.run([sys.executable, "-m", "serve.prepare", *sys.argv[1:]], cwd=ROOT, check=False)
    if done.returncode:
        raise NotStarted("weights and factors could not be prepared; the reason stands above")


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    begin = time.monotonic()
    console.print(f"{what} ...")
    yield
    console.print(f"{what}: {time.monotonic() - begin:.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", help="laptop, gpu, or a path to a .toml file; METASEPIA_PROFILE otherwise")
    arguments = parser.parse_args()
    try:
        settings = settings_of.read(arguments.profile)
    except InvalidSettings as error:
        console.print(f"[red]not started:[/] {error}")
        return 2
    return Foreground(settings).run()


if __name__ == "__main__":
    sys.exit(main())
