"""`metasepia status` and `metasepia models`: what the server is and how it does."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metasepia.shell import add_verb, cell, failed, seconds, show, table

if TYPE_CHECKING:
    import metasepia.client.results

BARS = " ▁▂▃▄▅▆▇█"


def status(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    if not options.watch:
        _once(client, options)
        return
    if options.json or not sys.stdout.isatty():
        while True:
            _once(client, options)
            sys.stdout.flush()
            time.sleep(options.every)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            try:
                said = "\n".join(lines(client.status(), client.url))
            except Exception as error:
                ending = failed(error)
                if ending is None:
                    raise
                said = f"metasepia: {ending.message}"  # it may be starting again; go on looking
            live.update(Text(said), refresh=True)
            time.sleep(options.every)


def _once(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.status()
    show(options, found, lambda: print("\n".join(lines(found, client.url))))


def lines(found: dict[str, Any], url: str) -> list[str]:
    """A page of `GET /v1/status`, for people."""
    ready = "ready" if found.get("ready") else "NOT READY"
    up = found.get("uptime_s")
    said = [f"{url}  metasepia {found.get('version')}  {ready}" + ("" if up is None else f"  up {_time(up)}"), ""]
    for part in found.get("parts", ()):
        replicas = part.get("replicas") or {}
        count = f"{replicas['running']} running" if isinstance(replicas, dict) and "running" in replicas else ""
        state = "ready" if part.get("ready") else f"not ready: {part.get('reason')}"
        said.append(f"  {part['name']:28} {count:12} {state}".rstrip())
    for title in ("backbones", "encoders"):
        for name, facts in found.get(title, {}).items():
            said.append(f"  {name:28} {_facts(facts)}")
    for title in ("reasoning", "task_embedding", "admission", "rates"):
        if facts := found.get(title):
            said.append(f"  {title.replace('_', ' '):28} {_facts(facts)}")
    if latency := found.get("latency"):
        said += ["", f"  {'route':36} {'p50 ms':>9} {'p99 ms':>9} {'requests':>9}"]
        for route, one in latency.items():
            said.append(
                f"  {route:36} {_number(one.get('p50_ms')):>9} {_number(one.get('p99_ms')):>9} {one['count']:>9,}"
            )
    series = (found.get("history") or {}).get("series", {})
    if any(series.values()):
        minutes = max(map(len, series.values())) * found["history"]["step_s"] / 60
        said += ["", f"  last {minutes:.0f} minutes"]
        said += [f"  {name:20} {sparks(values[-60:])}  {_number(_last(values))}" for name, values in series.items()]
    return said


def sparks(values: Sequence[float | int | None]) -> str:
    """A bar of eighths for each number, from 0 to the greatest."""
    most = max((one for one in values if one is not None), default=0.0) or 1.0
    return "".join(" " if one is None else BARS[round(one / most * (len(BARS) - 1))] for one in values)


def _last(values: Sequence[float | int | None]) -> float | int | None:
    return next((one for one in reversed(values) if one is not None), None)


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in facts.items())


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else json.dumps(value)


def _time(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{minutes // 1440} d {minutes // 60 % 24} h" if minutes >= 1440 else f"{minutes // 60} h {minutes % 60} min"


def models(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.models()
    rows = [[one.id, one.kind or "-", one.parent or "-", cell(one.x_info.get("digest"), "digest")] for one in found]
    show(options, [one.raw for one in found], lambda: table(("id", "kind", "parent", "digest"), rows))


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs `metasepia status` and `metasepia models`."""
    one = add_verb(things, "status", status, "how the server does", shared)
    one.add_argument("--watch", action="store_true", help="look again and again, until Ctrl-C")
    one.add_argument("--every", type=seconds, default=2.0, metavar="S", help="seconds between two looks (%(default)g)")
    add_verb(things, "models", models, "everything that a request can name as its model", shared)
