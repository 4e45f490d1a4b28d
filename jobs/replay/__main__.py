"""Recomputes an answer from its receipt and its request, and says what differs.

    python -m jobs.replay --receipt answer.json --request request.json

ANSWER is what the server sent (an answer with a receipt in it, or a stream as it came), or the receipt alone; then
nothing is compared but digests. Contexts, classifications, embeddings and completions are recomputed here, in one
process, from what the digests name: the registry's blobs, the settings' backbones, encoders and modules. Exit status:
0 where everything is as the receipt says, 1 where something differs or cannot be found, 2 for files that are no answer.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster import settings as settings_of
from jobs.replay.completions import replay_completion
from jobs.replay.files import read_answer
from jobs.replay.parts import Parts
from jobs.replay.report import Report, print_report
from jobs.replay.vectors import replay_classification, replay_context, replay_embeddings
from metasepia.digests import digest_of
from metasepia.errors import InvalidRequest, MetasepiaError


def replay(given: Mapping[str, Any], request: dict[str, Any], parts: Parts) -> Report:
    """`given` is an answer or a receipt. Raises InvalidRequest for what is neither, or for no such request."""
    receipt = given.get("receipt", given)
    answered = given if "receipt" in given else None
    if not isinstance(receipt, Mapping) or not isinstance(receipt.get("request"), str):
        raise InvalidRequest("receipt", "no receipt: an object with the digest of a request, or an answer that has one")
    report = Report()
    report.check("request", receipt["request"], digest_of(request))
    try:
        if "messages" in request or "prompt" in request:
            replay_completion(request, receipt, answered, parts, report)
        elif "inputs" in request:
            replay_classification(request, receipt, answered, parts, report)
        elif "input" in request:
            replay_embeddings(request, receipt, answered, parts, report)
        elif "examples" in request:
            replay_context(request, receipt, answered, parts, report)
        else:
            raise InvalidRequest("request", "it has none of messages, prompt, inputs, input and examples")
    except InvalidRequest:
        raise
    except MetasepiaError as error:
        report.missing("recomputing", error)
    return report


def main(argv: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m jobs.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--receipt", type=Path, required=True, help="the answer, as JSON or as a stream; or its receipt")
    p.add_argument("--request", type=Path, required=True, help="the body that was sent")
    p.add_argument("--profile", help="settings: laptop, gpu, or a path")
    arguments = p.parse_args(argv)
    try:
        given, request = read_answer(arguments.receipt), read_answer(arguments.request)
        report = replay(given, request, parts or Parts(settings_of.read(arguments.profile)))
    except (MetasepiaError, OSError, KeyError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print_report(report, Console(soft_wrap=True))
    return 0 if report.same else 1


if __name__ == "__main__":
    sys.exit(main())
