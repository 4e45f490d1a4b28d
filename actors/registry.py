"""The one writer of the catalogue, as a detached named actor on the node that has the volume, and the client for it."""

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorClass, ActorProxy
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import logs, meters, tracing
from actors.apart import apart
from actors.messages import RegistryInfo
from cluster import resources
from cluster.settings import RegistrySettings, Settings
from metasepia.access.keys import Changes as KeyChanges
from metasepia.access.keys import Key, NewKey, Report, Usage
from metasepia.access.store import KeyStore
from metasepia.errors import InvalidSettings, MetasepiaError, Unavailable
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import Artefact, Changes, Kind
from metasepia.registry.replays import Claim, KeptAnswer, ReplayStore

NAME, NAMESPACE = "registry", "metasepia"
PURGE_EVERY_S = 3600.0
HEAD = "node:__internal_head__"
"""The resource that Ray gives to the head node alone."""


class RegistryWriter:
    """Serves `Registry` to other processes; all behaviour is in metasepia.registry.catalogue.

    The directory is opened by the first call and not by the constructor: a lock or a disk that refuses is then an error
    for that caller, in our words, and the next call tries again.
    """

    def __init__(self, root: str, settings: RegistrySettings) -> None:
        logs.begin()
        self._root, self._settings = Path(root), settings
        self._opening = threading.Lock()
        self._open: Registry | None = None
        self._keys: KeyStore | None = None
        self._replays: ReplayStore | None = None
        self._purged_s = float("-inf")

    @ray.method(concurrency_group="writes")
    def put(
        self, kind: Kind, blob: bytes, digest: str, name: str | None, owner: str, card: dict[str, Any], replace: bool
    ) -> Artefact:
        stored = self._registry().put(kind, blob, digest=digest, name=name, owner=owner, card=card, replace=replace)
        if time.monotonic() > self._purged_s + PURGE_EVERY_S:
            self._purged_s = time.monotonic()
            self._registry().purge(self._settings.retention_days * 86400)
        return stored

    @ray.method
    def resolve(self, kind: Kind, name: str, owner: str, deleted: bool) -> Artefact:
        return self._registry().resolve(kind, name, owner, deleted=deleted)

    @ray.method
    def get(self, digest: str, owner: str | None) -> bytes:
        return self._registry().get(digest, owner)

    @ray.method
    def list(self, kind: Kind | None, owner: str, deleted: bool, after: str, limit: int) -> tuple[Artefact, ...]:
        return self._registry().list(kind, owner, deleted=deleted, after=after, limit=limit)

    @ray.method
    def changes(self, kind: Kind, owner: str, since: tuple[int, int] | None) -> Changes:
        return self._registry().changes(kind, owner, since)

    @ray.method(concurrency_group="writes")
    def delete(self, kind: Kind, name: str, owner: str, digest: str) -> Artefact:
        return self._registry().delete(kind, name, owner, digest=digest)

    @ray.method
    def owners(self, kind: Kind) -> tuple[str, ...]:
        return self._registry().owners(kind)

    @ray.method(concurrency_group="keys")
    def create_key(self, new: NewKey) -> Key:
        return self._key_store().create(new)

    @ray.method(concurrency_group="keys")
    def revoke_key(self, id_: str) -> Key:
        return self._key_store().revoke(id_)

    @ray.method(concurrency_group="keys")
    def get_key(self, id_: str) -> Key:
        return self._key_store().get(id_)

    @ray.method(concurrency_group="keys")
    def list_keys(self, after: str, limit: int) -> tuple[Key, ...]:
        return self._key_store().page(after=after, limit=limit)

    @ray.method(concurrency_group="keys")
    def exchange_keys(self, report: Report, since: tuple[int, int, int] | None) -> KeyChanges:
        return self._key_store().exchange(report, since)

    @ray.method(concurrency_group="keys")
    def usage(self, first_day: int, last_day: int, tenant: str | None, limit: int) -> tuple[Usage, ...]:
        return self._key_store().usage(first_day, last_day, tenant=tenant, limit=limit)

    @ray.method(concurrency_group="replays")
    def claim_replay(self, tenant: str, key: str, holder: str, lease_s: float) -> Claim:
        return self._replay_store().claim(tenant, key, holder, lease_s)

    @ray.method(concurrency_group="replays")
    def keep_replay(self, tenant: str, key: str, holder: str, answer: KeptAnswer, durable: bool) -> bool:
        return self._replay_store().keep(tenant, key, holder, answer, durable)

    @ray.method(concurrency_group="replays")
    def let_go_of_replay(self, tenant: str, key: str, holder: str) -> None:
        self._replay_store().let_go(tenant, key, holder)

    @ray.method
    def info(self) -> RegistryInfo:
        registry = self._registry()
        return RegistryInfo(root=str(registry.root), epoch=registry.epoch, pid=os.getpid())

    def _registry(self) -> Registry:
        with self._opening:
            if self._open is None:
                # A predecessor that was killed may hold the lock until the kernel has taken it down.
                self._open = Registry(self._root, lock_timeout_s=2.0)
            return self._open

    def _replay_store(self) -> ReplayStore:
        registry = self._registry()
        with self._opening:
            if self._replays is None:
                self._replays = ReplayStore(
                    registry.root,
                    max_bytes=int(self._settings.max_replays_mib * 2**20),
                    keep_s=self._settings.keep_replays_h * 3600,
                )
            return self._replays

    def _key_store(self) -> KeyStore:
        registry = self._registry()
        with self._opening:
            if self._keys is None:
                self._keys = KeyStore(registry.root, registry.epoch, max_keys=self._settings.max_keys)
            return self._keys


# Writes wait for the disk, one after another: they must not take the threads that answer reads. Keys wait for neither:
# a revocation is not to stand behind a large expert.
RegistryWriterActor: ActorClass[RegistryWriter] = ray.remote(  # pyright: ignore[reportCallIssue]
    concurrency_groups={"writes": 2, "keys": 1, "replays": 1}
)(RegistryWriter)


@dataclass(frozen=True, kw_only=True)
class RegistryPlace:
    """Where the cluster's registry is, if it has to be created."""

    root: str
    node_id: str | None
    """The node that has the volume; None: the cluster's head."""
    settings: RegistrySettings

    @classmethod
    def of(cls, settings: Settings, node_id: str | None = None) -> "RegistryPlace":
        root = str((settings.home / "registry").expanduser().resolve())
        return cls(root=root, node_id=node_id, settings=settings.registry)


def start(settings: Settings, node_id: str | None = None, *, timeout_s: float = 60.0) -> "RegistryClient":
    """Gets or creates the registry of this cluster and waits until it answers.

    `node_id` is the node that has the volume of `settings.home`; None: this one, unless the settings name a resource of
    it. Raises Locked, InvalidSettings,
    CorruptArtefact and Unavailable as `Registry` does; InvalidSettings also when the cluster's has another home.
    """
    place = RegistryPlace.of(settings, node_id or ray.get_runtime_context().get_node_id())
    give_up_s = time.monotonic() + timeout_s
    while True:
        try:
            info = ray.get(_find(place).info.remote(), timeout=max(0.01, give_up_s - time.monotonic()))
            break
        except RayTaskError as error:
            raise _own(error) from None
        except (RayActorError, GetTimeoutError) as error:  # an earlier writer, found while it was being ended
            if time.monotonic() > give_up_s:
                raise Unavailable(f"the registry ({error})", 5.0) from error
            time.sleep(0.1)
    _check_home(info, place)
    return RegistryClient(place)


def stop() -> None:
    """Ends the cluster's registry, if there is one; what it acknowledged is on disk."""
    try:
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        return


class RegistryClient:
    """Calls on the registry, each with a deadline. It may be sent to other processes.

    Every operation may be repeated: a put of the same digest under the same name changes nothing, a delete says which
    digest it means. So a call that met the writer's death is made again, on the restarted writer or a new one, until
    its deadline; then Unavailable. So is a call whose writer does not answer by then: it may have been done.
    """

    def __init__(self, place: RegistryPlace | None = None, *, timeout_s: float = 15.0) -> None:
        """`place` None: a registry that `start` has created is found, one that was ended is not created again."""
        self._place, self._timeout_s = place, timeout_s
        self._writer: ActorProxy[RegistryWriter] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _client, (self._place, self._timeout_s)

    async def put(
        self,
        kind: Kind,
        blob: bytes,
        *,
        digest: str,
        name: str | None,
        owner: str,
        card: dict[str, object] | None = None,
        replace: bool = True,
        timeout_s: float | None = None,
    ) -> Artefact:
        """See `Registry.put`; durable when this returns."""
        return await self._call("put", kind, blob, digest, name, owner, card or {}, replace, timeout_s=timeout_s)

    async def resolve(
        self, kind: Kind, name: str, owner: str, *, deleted: bool = False, timeout_s: float | None = None
    ) -> Artefact:
        """See `Registry.resolve`."""
        return await self._call("resolve", kind, name, owner, deleted, timeout_s=timeout_s)

    async def get(self, digest: str, owner: str | None = None, *, timeout_s: float | None = None) -> bytes:
        """See `Registry.get`."""
        return await self._call("get", digest, owner, timeout_s=timeout_s)

    async def list(
        self,
        kind: Kind | None,
        owner: str,
        *,
        deleted: bool = False,
        after: str = "",
        limit: int = 1000,
        timeout_s: float | None = None,
    ) -> tuple[Artefact, ...]:
        """See `Registry.list`."""
        return await self._call("list", kind, owner, deleted, after, limit, timeout_s=timeout_s)

    async def changes(
        self, kind: Kind, owner: str, since: tuple[int, int] | None, *, timeout_s: float | None = None
    ) -> Changes:
        """See `Registry.changes`."""
        return await self._call("changes", kind, owner, since, timeout_s=timeout_s)

    async def delete(self, kind: Kind, name: str, owner: str, *, timeout_s: float | None = None) -> Artefact:
        """See `Registry.delete`; takes away what the name points to now, and never what replaces it meanwhile."""
        give_up_s = time.monotonic() + (timeout_s or self._timeout_s)
        found = await self.resolve(kind, name, owner, timeout_s=timeout_s)
        left_s = max(0.01, give_up_s - time.monotonic())
        return await self._call("delete", kind, found.name, owner, found.digest, timeout_s=left_s)

    async def owners(self, kind: Kind, *, timeout_s: float | None = None) -> tuple[str, ...]:
        """See `Registry.owners`."""
        return await self._call("owners", kind, timeout_s=timeout_s)

    async def create_key(self, new: NewKey, *, timeout_s: float | None = None) -> Key:
        """See `KeyStore.create`; durable when this returns."""
        return await self._call("create_key", new, timeout_s=timeout_s)

    async def revoke_key(self, id_: str, *, timeout_s: float | None = None) -> Key:
        """See `KeyStore.revoke`; durable when this returns."""
        return await self._call("revoke_key", id_, timeout_s=timeout_s)

    async def get_key(self, id_: str, *, timeout_s: float | None = None) -> Key:
        """See `KeyStore.get`."""
        return await self._call("get_key", id_, timeout_s=timeout_s)

    async def list_keys(self, *, after: str = "", limit: int = 1000, timeout_s: float | None = None) -> tuple[Key, ...]:
        """See `KeyStore.page`."""
        return await self._call("list_keys", after, limit, timeout_s=timeout_s)

    async def claim_replay(
        self, tenant: str, key: str, holder: str, lease_s: float, *, timeout_s: float | None = None
    ) -> Claim:
        """See `ReplayStore.claim`."""
        return await self._call("claim_replay", tenant, key, holder, lease_s, timeout_s=timeout_s)

    async def keep_replay(
        self, tenant: str, key: str, holder: str, answer: KeptAnswer, durable: bool, *, timeout_s: float | None = None
    ) -> bool:
        """See `ReplayStore.keep`."""
        return await self._call("keep_replay", tenant, key, holder, answer, durable, timeout_s=timeout_s)

    async def let_go_of_replay(self, tenant: str, key: str, holder: str, *, timeout_s: float | None = None) -> None:
        """See `ReplayStore.let_go`."""
        await self._call("let_go_of_replay", tenant, key, holder, timeout_s=timeout_s)

    async def exchange_keys(
        self, report: Report, since: tuple[int, int, int] | None, *, timeout_s: float | None = None
    ) -> KeyChanges:
        """See `KeyStore.exchange`; the same report counts once."""
        return await self._call("exchange_keys", report, since, timeout_s=timeout_s)

    async def usage(
        self, first_day: int, last_day: int, *, tenant: str | None, limit: int, timeout_s: float | None = None
    ) -> tuple[Usage, ...]:
        """See `KeyStore.usage`."""
        return await self._call("usage", first_day, last_day, tenant, limit, timeout_s=timeout_s)

    async def info(self, *, timeout_s: float | None = None) -> RegistryInfo:
        """Which directory, which epoch, which process; also the check that the registry answers."""
        return await self._call("info", timeout_s=timeout_s)

    async def check_home(self) -> None:
        """Raises InvalidSettings where the cluster's registry has another home than this client was made for."""
        if self._place is not None:
            _check_home(await self.info(timeout_s=60.0), self._place)

    async def _call(self, method: str, *args: object, timeout_s: float | None) -> Any:
        begin, outcome = time.monotonic(), "Cancelled"
        try:
            with tracing.span(f"registry {method}"):
                answer = await self._ask(method, *args, timeout_s=timeout_s)
            outcome = "done"
            return answer
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            meters.REGISTRY_CALLS.inc(call=method, outcome=outcome)
            meters.REGISTRY_TIME.observe(time.monotonic() - begin, call=method)

    async def _ask(self, method: str, *args: object, timeout_s: float | None) -> Any:
        give_up_s = time.monotonic() + (timeout_s or self._timeout_s)
        pause_s = 0.05
        while True:
            try:
                writer = self._writer or await asyncio.to_thread(_find, self._place)
                self._writer = writer
                answer = asyncio.wrap_future(apart(getattr(writer, method), *args).future())
                return await asyncio.wait_for(answer, max(0.01, give_up_s - time.monotonic()))
            except RayTaskError as error:
                raise _own(error) from None
            except ActorDiedError:
                self._writer = None  # for good: the next attempt finds or creates another
            except RayActorError:
                pass  # Ray is restarting it
            except TimeoutError:
                raise Unavailable("the registry", 1.0) from None
            if time.monotonic() + pause_s > give_up_s:
                raise Unavailable("the registry", 1.0)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)


def _client(place: RegistryPlace | None, timeout_s: float) -> RegistryClient:
    return RegistryClient(place, timeout_s=timeout_s)


def _check_home(info: RegistryInfo, place: RegistryPlace) -> None:
    if info.root != place.root:
        allowed = f"{Path(info.root).parent}, which the registry of this cluster has open; stop it first to change home"
        raise InvalidSettings("home", str(Path(place.root).parent), allowed)


def _find(place: RegistryPlace | None) -> "ActorProxy[RegistryWriter]":
    """The cluster's registry writer, created if there is none and its place is known. Raises Unavailable."""
    if place is None:
        try:
            return ray.get_actor(NAME, namespace=NAMESPACE)
        except ValueError:
            raise Unavailable("the registry (nobody has started it)", 5.0) from None
    options: dict[str, Any] = {"name": NAME, "namespace": NAMESPACE, "get_if_exists": True}
    if place.settings.node_resource:
        pass  # `resources.registry` asks for it
    elif place.node_id is None:  # the catalogue is on one node's disk
        options["resources"] = {HEAD: 0.001}
    else:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    return RegistryWriterActor.options(**options, **resources.registry(place.settings)).remote(
        place.root, place.settings
    )


def _own(error: RayTaskError) -> Exception:
    """Our error inside Ray's, which would print a traceback where a sentence is meant."""
    return error.cause if isinstance(error.cause, MetasepiaError) else error
