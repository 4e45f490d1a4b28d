"""A door that asks for keys, over a real registry for everything that tenants make."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from actors.keys import NearKeys
from actors.messages import EncoderInfo
from cluster.door_settings import HttpSettings, KeySettings
from cluster.settings import MixingSettings
from metasepia.access.keys import NewKey, Scope, mint
from metasepia.access.store import KeyStore
from metasepia.experts.vectors import index_path
from serve.access.authentication import Access
from serve.mixing_replica import ExpertMixingPart
from serve.task_replica import TaskEmbeddingPart
from tests.doors import INDEX, Bench, NearSearches, RealCatalogue
from tests.tasks import SETTINGS, TopicModel, WordEncoder
from tests.unit.test_prompts import write_byte_tokenizer

HTTP = HttpSettings(max_body_mib=0.25, max_examples=256)
REQUIRED = KeySettings(required=True)


class Clock:
    """Time as a test says: the machine's, which may jump, and the steady one beside it."""

    def __init__(self, unix_s: float = 1_700_000_000.0) -> None:
        self.unix_s, self.steady_s = unix_s, 0.0

    def wall(self) -> float:
        return self.unix_s

    def monotonic(self) -> float:
        return self.steady_s

    def pass_(self, seconds: float) -> None:
        self.unix_s += seconds
        self.steady_s += seconds


class WideEncoder(WordEncoder):
    """Has room for contexts too."""

    async def info(self) -> EncoderInfo:
        return dataclasses.replace(await super().info(), window=256)


class KeyedBench(Bench):
    """With every part real that keeps what tenants make; the models are fakes."""

    def __init__(self, tmp_path: Path, settings: KeySettings = REQUIRED, clock: Clock | None = None) -> None:
        super().__init__(write_byte_tokenizer(tmp_path), HTTP)
        self._runner = asyncio.Runner()
        root = tmp_path / "registry"
        self.real, self.backbone, self.encoder = RealCatalogue(root), TopicModel(tmp_path), WideEncoder()
        self.reasoning.blobs = self.real.registry.get
        index_path(INDEX.digest, root).parent.mkdir(exist_ok=True)
        index_path(INDEX.digest, root).write_text(INDEX.to_json())
        clocks: dict[str, Any] = {} if clock is None else {"wall": clock.wall, "monotonic": clock.monotonic}
        self.store = KeyStore(self.real.registry.root, self.real.registry.epoch, **clocks)
        self.access = Access(settings, NearKeys(self.store))
        if clock is not None:
            self.access.keyring._monotonic = clock.monotonic
        self.part = ExpertMixingPart(self.real, [self.backbone], MixingSettings(max_searches=8), root)

        def load() -> Any:
            raise AssertionError("no method was to be trained")

        self.task_part = TaskEmbeddingPart(SETTINGS, self.real, self.encoder, load, [self.backbone])
        self._open(HTTP, (), self.part, self.real, NearSearches(self.part), ("centroid",), self.task_part, SETTINGS)
        self.ray_jobs: list[dict[str, Any]] = []
        self.door.jobs._fresh._ask = lambda: self.ray_jobs

    def run(self, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        """In one event loop, as a server's: what a request leaves running goes on with the next."""

        async def main() -> Any:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await talk(client)

        return self._runner.run(main())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()

    def key(self, tenant: str, *scopes: Scope, lifetime_s: float | None = None, **limits: int) -> str:
        """The whole key, as its owner has it."""
        id_, text, sha256 = mint()
        new = NewKey(id=id_, sha256=sha256, tenant=tenant, scopes=scopes, lifetime_s=lifetime_s, **limits)  # pyright: ignore[reportArgumentType]
        self.store.create(new.check())
        return text

    def ask(
        self, method: str, path: str, key: str | None = None, body: Any = None, headers: Mapping[str, str] = {}
    ) -> httpx.Response:
        return self.run(lambda client: ask(client, method, path, key, body, headers))


async def ask(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    key: str | None = None,
    body: Any = None,
    headers: Mapping[str, str] = {},
) -> httpx.Response:
    """A `body` with a `file` goes as a form."""
    shown = dict(headers) | ({} if key is None else {"authorization": f"Bearer {key}"})
    if isinstance(body, dict) and "file" in body:
        fields = {name: value for name, value in body.items() if name != "file"}
        return await client.request(method, path, data=fields, files={"file": body["file"]}, headers=shown)
    return await client.request(method, path, json=body, headers=shown)
