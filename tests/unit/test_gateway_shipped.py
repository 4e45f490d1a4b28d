"""What comes with the package finds its way into the registry, and finds it again."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from metasepia.errors import UnknownName
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.catalogue import Registry
from serve import shipped

DIGEST = "a" * 64


class LocalClient:
    """A registry without the actor."""

    def __init__(self, root: Path) -> None:
        self.registry = Registry(root)

    async def put(self, *arguments: Any, **fields: Any) -> Any:
        return self.registry.put(*arguments, **fields)


def _shipped(folder: Path) -> ExpertVectors:
    expert = ExpertVectors(backbone="b" * 64, factors="f" * 64, z={"w": np.ones(3, np.float32)})
    (folder / "experts" / "maths").mkdir(parents=True)
    (folder / "experts" / "maths" / "expert.safetensors").write_bytes(expert.to_bytes())
    (folder / "experts" / "maths" / "card.json").write_text(json.dumps({"name": "maths", "description": "adds"}))
    (folder / "modules" / "small").mkdir(parents=True)
    (folder / "modules" / "small" / "model.safetensors").write_bytes(b"weights")
    (folder / "modules" / "small" / "card.json").write_text(json.dumps({"digest": DIGEST}))
    (folder / "modules" / "default.json").write_text(json.dumps({"module": "small"}))
    return expert


def test_importing_twice_leaves_one_expert_and_one_module(tmp_path: Path):
    expert = _shipped(tmp_path)
    client = LocalClient(tmp_path / "registry")
    for _ in range(2):
        asyncio.run(shipped.import_experts(cast(Any, client), tmp_path / "experts"))
        asyncio.run(shipped.import_modules(cast(Any, client), tmp_path / "modules"))
    found = client.registry.resolve("expert", "maths", "shared")
    assert (found.digest, found.card["backbone"], found.card["description"]) == (expert.digest, "b" * 64, "adds")
    assert client.registry.get(expert.digest) == expert.to_bytes()
    assert [one.digest for one in client.registry.list("module", "shared")] == [DIGEST]
    assert len(client.registry.list("expert", "shared", deleted=True)) == 1


def test_the_default_module_is_the_one_that_default_json_names(tmp_path: Path):
    _shipped(tmp_path)
    for name in ("default", "small", str(tmp_path / "modules" / "small" / "model.safetensors")):
        assert shipped.module_card(name, tmp_path / "modules") == shipped.ModuleCard("small", DIGEST)
    with pytest.raises(UnknownName, match="known: small"):
        shipped.module_card("large", tmp_path / "modules")
