"""Whether this machine, a cluster or a served graph is fit: `python -m cluster.doctor [--profile P]`.

    python -m cluster.doctor --profile laptop               before `make serve`
    python -m cluster.doctor --profile gpu --address auto   before joining a Ray cluster
    python -m cluster.doctor --url http://127.0.0.1:8000    a graph that runs

Starts nothing and loads no torch; takes seconds. Exit status: 0 fit, 1 fit with warnings, 2 something is refused.
"""

import argparse
import json
import os
import sys

from cluster import settings as settings_of
from cluster.doctor_checks import Asked, Found, all_found, as_json
from metasepia.errors import MetasepiaError

STATUS = {"ok": 0, "warn": 1, "refuse": 2}


def lines(found: list[Found]) -> list[str]:
    """One a finding, its way out below it."""
    said: list[str] = []
    for one in found:
        said.append(f"{one.verdict:<7}{one.check:<10}{one.seen}")
        if one.way_out:
            said.append(f"{'':<17}-> {one.way_out}")
    count = {verdict: sum(one.verdict == verdict for one in found) for verdict in STATUS}
    said.append(f"{count['ok']} ok, {count['warn']} warnings, {count['refuse']} refused")
    return said


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", help="a profile's name, or a path to a .toml file (default: laptop)")
    parser.add_argument("--address", help="of a Ray cluster to join: auto, or host:port")
    parser.add_argument("--url", help="of a served graph")
    parser.add_argument("--key", default=os.environ.get("METASEPIA_KEY"), help="an API key for it, or METASEPIA_KEY")
    parser.add_argument("--grace-s", type=float, help="seconds that whoever stops the graph waits before it kills")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(arguments)
    try:
        settings = settings_of.read(asked.profile)
    except MetasepiaError as error:
        found = [Found(check="settings", verdict="refuse", seen=str(error))]
    else:
        told = Asked(address=asked.address, url=asked.url, key=asked.key, grace_s=asked.grace_s)
        found = all_found(settings, told)
    print(json.dumps(as_json(found), indent=1) if asked.json else "\n".join(lines(found)))
    return max(STATUS[one.verdict] for one in found)


if __name__ == "__main__":
    sys.exit(main())
