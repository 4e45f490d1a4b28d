"""`python -m actors.keys create --tenant NAME --scopes infer`: keys from the machine itself, the first one above all.

Works beside a graph that runs, through its registry, and without one, on the directory of `settings.home`: there is one
writer either way. Who may run this may read the directory too, so it asks for no key. The new key goes to stdout, alone
and once; everything else to stderr.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Protocol

from actors.registry import RegistryClient
from cluster import settings as settings_of
from cluster.connect import connect
from cluster.settings import Settings
from metasepia.access.keys import SCOPES, Changes, Key, NewKey, Report, Usage, mint
from metasepia.access.store import KeyStore
from metasepia.errors import Locked, MetasepiaError, Unavailable
from metasepia.registry.catalogue import Registry


class Keys(Protocol):
    """What is used of the registry."""

    async def create_key(self, new: NewKey) -> Key: ...
    async def revoke_key(self, id_: str) -> Key: ...
    async def list_keys(self, *, after: str = "", limit: int = 1000) -> Sequence[Key]: ...


class NearKeys:
    """A store in this process, called as one in another is."""

    def __init__(self, store: KeyStore) -> None:
        self.store = store

    async def create_key(self, new: NewKey) -> Key:
        return self.store.create(new)

    async def revoke_key(self, id_: str) -> Key:
        return self.store.revoke(id_)

    async def get_key(self, id_: str) -> Key:
        return self.store.get(id_)

    async def list_keys(self, *, after: str = "", limit: int = 1000) -> Sequence[Key]:
        return self.store.page(after=after, limit=limit)

    async def exchange_keys(self, report: Report, since: tuple[int, int, int] | None) -> Changes:
        return self.store.exchange(report, since)

    async def usage(self, first_day: int, last_day: int, *, tenant: str | None, limit: int) -> Sequence[Usage]:
        return self.store.usage(first_day, last_day, tenant=tenant, limit=limit)


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Keys]:
    """The keys of `settings.home`: through the registry of the graph that has them open, else the files themselves.

    Raises Unavailable where the graph's Ray cannot be found, and what `Registry` raises.
    """
    if settings.ray.address == "local":
        try:
            registry = Registry(settings.home / "registry")
        except Locked as error:
            ray = dataclasses.replace(settings.ray, address=_address(settings, error))
        else:
            with (
                registry,
                contextlib.closing(
                    KeyStore(registry.root, registry.epoch, max_keys=settings.registry.max_keys)
                ) as store,
            ):
                yield NearKeys(store)
            return
    else:
        ray = settings.ray
    connect(ray)
    yield RegistryClient()


def _address(settings: Settings, locked: Locked) -> str:
    """Of the Ray that the graph over this home runs in, as its own card says."""
    try:
        return str(json.loads((settings.home / "serve.json").read_text())["ray"])
    except (OSError, ValueError, KeyError):
        what = f"the registry of the graph that has the keys open ({locked.holder}; it is starting or ending)"
        raise Unavailable(what, 10.0) from None


async def create(keys: Keys, options: argparse.Namespace) -> None:
    id_, text, sha256 = mint()
    days: float | None = options.expires_in_days
    new = NewKey(
        id=id_,
        sha256=sha256,
        tenant=options.tenant,
        scopes=tuple(options.scopes),
        label=options.label,
        lifetime_s=None if days is None else days * 86_400,
        requests_per_minute=options.requests_per_minute,
        tokens_per_day=options.tokens_per_day,
    )
    key = await keys.create_key(new.check(operator=True))
    print(f"key {key.id} of {key.tenant}: {', '.join(key.scopes)}. Shown this once:", file=sys.stderr)
    print(text)


async def show(keys: Keys, _options: argparse.Namespace) -> None:
    now, after = datetime.now(UTC).timestamp(), ""
    while page := await keys.list_keys(after=after):
        for key in page:
            print(f"{key.id}  {key.status(now):8}  {key.tenant}  {','.join(key.scopes)}  {key.label}")
        after = page[-1].id


async def revoke(keys: Keys, options: argparse.Namespace) -> None:
    key = await keys.revoke_key(options.id)
    print(f"key {key.id} of {key.tenant} is revoked", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="laptop, gpu, or a path to a .toml file; METASEPIA_PROFILE otherwise")
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("create", help="make a key")
    one.set_defaults(run=create)
    one.add_argument("--tenant", required=True, help="whose it is; `local` owns what was made while there were no keys")
    one.add_argument("--scopes", required=True, nargs="+", choices=SCOPES)
    one.add_argument("--label", default="")
    one.add_argument("--expires-in-days", type=float, metavar="DAYS", help="never, where not given")
    one.add_argument("--requests-per-minute", type=int, metavar="N", help="0: no limit; the settings' where not given")
    one.add_argument("--tokens-per-day", type=int, metavar="N", help="likewise")
    verbs.add_parser("list", help="all of them, without secrets").set_defaults(run=show)
    one = verbs.add_parser("revoke", help="end one for good")
    one.set_defaults(run=revoke)
    one.add_argument("id")
    return parser


async def _run(options: argparse.Namespace) -> None:
    async with opened(settings_of.read(options.profile)) as keys:
        await options.run(keys, options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        asyncio.run(_run(options))
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
