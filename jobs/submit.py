"""Submits a job of `jobs/` to a Ray cluster, follows it, and goes on with it after whatever ended it.

    python -m jobs.submit sweep_tasks -- --profile laptop --out s3://bucket/runs/laptop
    python -m jobs.submit batch --address http://head:8265 --results s3://bucket/results \\
        -- --input s3://bucket/in.parquet --output {results}/out.parquet --task embed --model minilm-l6

The job's id is made of its name and arguments. So the same command attaches where that job runs, tells where it has
finished, and starts it again (as ID-try2) where it failed, was stopped or died with its driver: jobs go on from their
stores. Ctrl-C leaves, and the job goes on; --stop ends it, after which it has 30 s to write down how far it is.

The repository's code goes along, not its data, and the job runs in a copy that goes with it: give places as whole paths
or URIs. `{results}` in an argument is the job's folder under --results, where `_job.json` says what it was, when, and
how it ended. `ray job submit --working-dir . -- python -m jobs.NAME ...` does the same without id and index. Exit
status: 0 succeeded (or told to run, with --no-wait), 1 failed, 2 not submitted, 3 stopped, 130 left.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metasepia.digests import digest_of
from metasepia.errors import InvalidSettings, MetasepiaError

if TYPE_CHECKING:
    from ray.job_submission import JobInfo, JobSubmissionClient

ROOT = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8265"
GRACE_S = 30
"""From SIGTERM to SIGKILL; Ray's own default is 3."""
START_S = 60.0
"""How long a cluster that has just begun may have no agent that takes a job."""
PATIENCE_S = 300.0
"""How long a job is followed while nobody tells of it: its cluster's head may be restarting."""
STOPPED, LEFT = 3, 130
MAX_UPLOAD_MIB = 64.0
EXCLUDES = ["/*", "!.", "!/metasepia", "!/cluster", "!/actors", "!/jobs", "!/serve", "!/benchmarks", "__pycache__"]
"""As in a .gitignore: what the working directory leaves out. Ray asks about the directory itself, as `.`, too."""
SPECIFICATION = "specification"
"""Of the job's metadata: the whole digest."""
_AGENT = " Two clusters on one machine want the same port 52365 for it: end one, or --dashboard-agent-listen-port"
_WAITING = ("PENDING", "RUNNING")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    arguments, given = parser().parse_args(words[:at]), words[at + 1 :]
    try:
        return asyncio.run(_run(arguments, given))
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("left; the job goes on, and the same command attaches to it again (--stop ends it)", file=sys.stderr)
        return LEFT


def names() -> list[str]:
    """Jobs that can be submitted."""
    files = (path for path in (ROOT / "jobs").glob("*.py") if path.stem not in ("submit", "submitted"))
    return sorted(path.stem for path in files if '__name__ == "__main__"' in path.read_text())


def specification(name: str, given: Sequence[str], results: str | None) -> str:
    """The digest of what is asked; where it runs is no part of it."""
    return digest_of({"job": name, "arguments": list(given), "results": results})


def id_of(name: str, digest: str) -> str:
    return f"{name.replace('_', '-')}-{digest[:16]}"


async def _run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    if arguments.name not in names():
        raise InvalidSettings("name", arguments.name, f"one of {', '.join(names())}")
    digest = specification(arguments.name, given, arguments.results)
    base = arguments.id or id_of(arguments.name, digest)
    client = _client(arguments.address)
    attempt, found = _latest(client, base)
    if found is not None and (found.metadata or {}).get(SPECIFICATION) != digest:
        allowed = "an id of its own: a job of another specification has this one (it is in the way, and stays)"
        raise InvalidSettings("id", base, allowed)
    id_, status = attempt_of(base, attempt), None if found is None else str(found.status.value)
    if arguments.stop:
        return await _stop(client, id_, status)
    if status in _WAITING:
        print(f"{id_} is {status.lower()} already; following it", flush=True)
    elif status == "SUCCEEDED" and not arguments.again:
        print(f"{id_} has succeeded already (--again runs it once more)")
        return 0
    else:
        if status is not None:
            # Another id: Ray takes none twice, and one that was freed may still have its last supervisor.
            print(f"{id_} was {status.lower()}; it is started again and goes on from what it stored", flush=True)
            id_ = attempt_of(base, attempt + 1)
        _submit(client, base, id_, digest, arguments, given)
    if arguments.no_wait:
        print(id_)
        return 0
    return await _follow(client, id_)


def attempt_of(base: str, attempt: int) -> str:
    """The id of one attempt, counted from 1."""
    return base if attempt == 1 else f"{base}-try{attempt}"


def _latest(client: "JobSubmissionClient", base: str) -> "tuple[int, JobInfo | None]":
    """The last attempt and what Ray knows of it; the first, and None, where there is none."""
    attempt, found = 1, _find(client, base)
    while (later := _find(client, attempt_of(base, attempt + 1)) if found is not None else None) is not None:
        attempt, found = attempt + 1, later
    return attempt, found


def _submit(
    client: "JobSubmissionClient",
    base: str,
    id_: str,
    digest: str,
    arguments: argparse.Namespace,
    given: Sequence[str],
) -> None:
    """All attempts have one folder of results, named by the first."""
    folder = None if arguments.results is None else f"{arguments.results.rstrip('/')}/{base}"
    spelt = [word if folder is None else word.replace("{results}", folder) for word in given]
    if folder is None and any("{results}" in word for word in given):
        raise InvalidSettings("results", None, "given, where an argument has {results}")
    index = [] if folder is None else ["--results", folder]
    entrypoint = shlex.join(["python", "-m", "jobs.submitted", *index, "--id", id_, arguments.name, "--", *spelt])
    size = _upload_mib()
    if size > MAX_UPLOAD_MIB:
        raise InvalidSettings("working directory", f"{size:.0f} MiB", f"at most {MAX_UPLOAD_MIB:g} MiB of code")
    runtime_env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE_S)}}
    if not arguments.in_place:
        runtime_env |= {"working_dir": str(ROOT), "excludes": EXCLUDES}
    metadata = {SPECIFICATION: digest, "job": arguments.name, "tenant": arguments.tenant}
    give_up_s = time.monotonic() + START_S
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=id_, runtime_env=runtime_env, metadata=metadata)
            break
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > give_up_s:
                allowed = f"a cluster that takes the job ({_line(error)}{_AGENT if 'agent' in str(error) else ''})"
                raise InvalidSettings("address", arguments.address, allowed) from None
            time.sleep(1.0)
    print(f"{id_}: {entrypoint}", flush=True)


async def _follow(client: "JobSubmissionClient", id_: str) -> int:
    """Prints the job's words as they come, whoever else follows it; reconnects where the connection breaks."""
    from rich.console import Console

    console, said = Console(soft_wrap=True), 0
    away_s: float | None = None
    while True:
        skip = said
        try:
            async for text in client.tail_job_logs(id_):
                new, skip = text[skip:], max(0, skip - len(text))  # a new connection begins at the beginning
                if new:
                    said += len(new)
                    console.print(new, end="", markup=False, highlight=console.is_terminal)
        except Exception as error:  # the head is restarting, or a proxy between cut us off
            console.print(f"[dim]{type(error).__name__} while following; trying again[/]")
        try:
            info = await asyncio.to_thread(_find, client, id_)
            away_s = None
        except InvalidSettings:
            info, away_s = None, away_s or time.monotonic()
            if time.monotonic() - away_s > PATIENCE_S:
                raise
        if info is not None and info.status.is_terminal():
            return _end(id_, info)
        await asyncio.sleep(1.0)


async def _stop(client: "JobSubmissionClient", id_: str, status: str | None) -> int:
    if status not in _WAITING:
        print(f"{id_} does not run" + (f"; it has {status.lower()}" if status else ""))
        return 0
    client.stop_job(id_)
    give_up_s = time.monotonic() + GRACE_S + 10
    while time.monotonic() < give_up_s:
        info = await asyncio.to_thread(_find, client, id_)
        if info is None or info.status.is_terminal():
            print(f"{id_} is stopped; the same command without --stop goes on with it")
            return 0
        await asyncio.sleep(0.5)
    print(f"{id_} was told to stop and has not yet", file=sys.stderr)
    return 1


def _end(id_: str, info: "JobInfo") -> int:
    status = str(info.status.value)
    code = "" if info.driver_exit_code is None else f" (exit status {info.driver_exit_code})"
    print(f"{id_}: {status.lower()}{code}", flush=True)
    if status == "FAILED" and info.driver_exit_code is None and info.message:
        print(str(info.message).strip().splitlines()[-1], file=sys.stderr)
    return {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(status, 1)


def _client(address: str) -> "JobSubmissionClient":
    """Raises InvalidSettings, in words, where no dashboard answers."""
    # Here and not above: help and misuse need no Ray.
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of each .gitignore at each try
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        allowed = f"that of a Ray dashboard which answers (ray.dashboard = true, RAY_AUTH_TOKEN) ({_line(error)})"
        raise InvalidSettings("address", address, allowed) from None


def _find(client: "JobSubmissionClient", id_: str) -> "JobInfo | None":
    try:
        return client.get_job_info(id_)  # pyright: ignore[reportReturnType]
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise InvalidSettings("address", "given", f"a dashboard that answers ({_line(error)})") from None


def _upload_mib() -> float:
    kept = [name.removeprefix("!/") for name in EXCLUDES if name.startswith("!/")]
    files = (path for name in kept for path in (ROOT / name).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) / 2**20


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        usage="python -m jobs.submit NAME [options] [-- the job's own arguments]",
        description=about + "\n\n" + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("name", metavar="NAME", help=f"one of {', '.join(names())}")
    add("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS), help="of Ray's dashboard (%(default)s)")
    add("--results", metavar="URI", help="a folder at a path or pyarrow.fs URI; the job has a folder of its own there")
    add("--no-wait", action="store_true", help="print the id and leave")
    add("--again", action="store_true", help="also where it has succeeded")
    add("--stop", action="store_true", help="end it, politely")
    add("--id", help="in place of the one that is made of the arguments")
    add("--tenant", default="local", help="whose job it is, for GET /v1/jobs (local)")
    add("--in-place", action="store_true", help="upload nothing: every node has this code at its working directory")
    return p


if __name__ == "__main__":
    sys.exit(main())
