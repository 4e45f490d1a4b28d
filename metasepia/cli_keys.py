"""`metasepia keys`: keys of a running server, and what they have used. Its own key needs the scope `admin`.

The first key is made at the machine itself, by `python -m actors.keys`.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from metasepia.shell import add_noun, add_verb, given, show, show_fields, show_list

if TYPE_CHECKING:
    import metasepia.client.results

SCOPES = ("infer", "contexts", "experts:write", "admin")
_DAY_S = 86_400


def list_keys(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    found = client.keys()
    show_list(options, [one.raw for one in found], ("id", "status", "tenant", "scopes", "label"))


def show_key(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    show_fields(options, client.key(options.id).raw)


def create_key(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    asked: Any = given(options, "label", "requests_per_minute", "tokens_per_day")
    if options.expires_in_days is not None:
        asked["expires_in_s"] = options.expires_in_days * _DAY_S
    made = client.create_key(tenant=options.tenant, scopes=options.scopes, **asked).raw

    def words() -> None:
        about = f"key {made['id']} of {made['tenant']}: {', '.join(made['scopes'])}. Shown this once:"
        print(about, file=sys.stderr)
        print(made["key"])

    show(options, made, words)


def revoke_keys(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    for id_ in options.ids:
        gone = client.revoke_key(id_)
        show(options, gone.raw, lambda gone=gone: print(f"{gone.id}: revoked"))


def show_usage(client: "metasepia.client.Client", options: argparse.Namespace) -> None:
    asked: Any = given(options, "tenant", "first", "last")
    columns = ("day", "tenant", "key", "requests", "prompt_tokens", "completion_tokens")
    show_list(options, [one.raw for one in client.usage(**asked)], columns)


def add_verbs(things: Any, shared: argparse.ArgumentParser) -> None:
    """The verbs of `metasepia keys`."""
    verbs = add_noun(things, "keys", "who may come in, and what they use")
    add_verb(verbs, "list", list_keys, "all of them, without secrets", shared)
    add_verb(verbs, "show", show_key, "one", shared).add_argument("id")
    add = add_verb(verbs, "create", create_key, "make one, and print it this once", shared)
    add.add_argument("tenant", help="owner of what its requests make")
    add.add_argument("--scopes", nargs="+", choices=SCOPES, required=True)
    add.add_argument("--label", help="for people; shown in lists")
    add.add_argument("--expires-in-days", type=float, metavar="DAYS", help="never, where not given")
    add.add_argument("--requests-per-minute", type=int, metavar="N", help="0: no limit; the server's where not given")
    add.add_argument("--tokens-per-day", type=int, metavar="N", help="likewise")
    add_verb(verbs, "revoke", revoke_keys, "end them for good", shared).add_argument("ids", nargs="+", metavar="id")
    usage = add_verb(verbs, "usage", show_usage, "requests and tokens by day", shared)
    usage.add_argument("--tenant", help="all that the key may see, where not given")
    usage.add_argument("--first", metavar="DAY", help="like 2026-01-31; 30 days before the last where not given")
    usage.add_argument("--last", metavar="DAY", help="today, where not given")
