"""A pin that cannot be served ends the start, in words."""

import asyncio
import dataclasses
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cluster import settings as settings_of
from metasepia.errors import InvalidSettings
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import LOCAL, Artefact
from serve.main import check_pins
from tests import tiny

DIGEST = sha256(b"z").hexdigest()
PREPARED = tiny.prepared()


class Catalogue:
    """As much of `RegistryClient` as a look-up needs."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def resolve(self, kind: Any, name: str, owner: str, *, deleted: bool = False) -> Artefact:
        return self._registry.resolve(kind, name, owner, deleted=deleted)


def check(registry: Registry, pinned: str) -> None:
    settings = settings_of.read("laptop", {})
    backbone = dataclasses.replace(settings.backbones[0], pinned=pinned)
    settings = dataclasses.replace(settings, backbones=(backbone,))
    asyncio.run(check_pins(settings, {backbone.id: PREPARED}, Catalogue(registry)))  # pyright: ignore[reportArgumentType]


def test_a_pin_is_an_expert_of_the_backbone_by_name_or_digest(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        card: dict[str, object] = {"backbone": PREPARED.digest}
        registry.put("expert", b"z", digest=DIGEST, name="hot", owner=LOCAL, card=card)
        check(registry, "")
        check(registry, "hot")
        registry.delete("expert", "hot", LOCAL)
        check(registry, DIGEST)
        with pytest.raises(InvalidSettings, match=r"\.pinned = 'hot' .* an expert of .*no expert named 'hot'"):
            check(registry, "hot")


def test_a_pin_of_another_backbone_is_refused(tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        registry.put("expert", b"z", digest=DIGEST, name="hot", owner=LOCAL, card={"backbone": "c" * 64})
        with pytest.raises(InvalidSettings, match="it was made for backbone cccccccccccc, not"):
            check(registry, "hot")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("PINNED", "'Hot'", r"pinned = 'Hot' is not allowed"),
        ("MAX_EXPERT_MIB", "0", r"max_expert_mib = 0\.0 is not allowed; it must be from 0\.001 to 1e\+07"),
    ],
)
def test_a_wrong_setting_of_experts_is_refused(key: str, value: str, words: str) -> None:
    with pytest.raises(InvalidSettings, match=words):
        settings_of.read("laptop", {f"METASEPIA_BACKBONES__0__{key}": value})


def test_a_pin_needs_expert_layers() -> None:
    backbone = settings_of.read("laptop", {}).backbones[0]
    with pytest.raises(InvalidSettings, match="pinned = 'hot' is not allowed; it must be empty where expert_layers"):
        dataclasses.replace(backbone, pinned="hot", expert_layers=())
