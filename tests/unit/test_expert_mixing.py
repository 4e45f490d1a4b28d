import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.expert_mixing import ExpertMixing
from metasepia.errors import InvalidRequest, UnknownName
from metasepia.experts import ExpertVectors
from metasepia.registry import SHARED, Artefact, Kind, Registry

BACKBONE = "b" * 64


class Direct:
    """The registry in this process, behind the client's face."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.num_puts = registry, 0

    async def resolve(self, kind: Kind, name: str, owner: str) -> Artefact:
        return self.registry.resolve(kind, name, owner)

    async def get(self, digest: str, owner: str | None = None) -> bytes:
        return self.registry.get(digest, owner)

    async def put(
        self,
        kind: Kind,
        blob: bytes,
        *,
        digest: str,
        name: str | None,
        owner: str,
        card: dict[str, object] | None = None,
    ) -> Artefact:
        self.num_puts += 1
        return self.registry.put(kind, blob, digest=digest, name=name, owner=owner, card=card)


def an_expert(value: float, **changes: object) -> ExpertVectors:
    z = {"up.weight": np.array([value, 1], np.float32)}
    return ExpertVectors(**({"backbone": BACKBONE, "factors": "f" * 64, "z": z} | changes))  # pyright: ignore[reportArgumentType]


EXPERTS = {
    "maths": an_expert(2.0),
    "law": an_expert(0.5),
    "other-kind": an_expert(0.5, renormalise=True),
    "other-backbone": an_expert(0.5, backbone="c" * 64),
}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry") as opened:
        for name, expert in EXPERTS.items():
            opened.put("expert", expert.to_bytes(), digest=expert.digest, name=name, owner=SHARED)
        yield opened


def register(registry: Registry, weights: dict[str, float]) -> str:
    return asyncio.run(ExpertMixing(Direct(registry)).register(BACKBONE, weights))


def test_a_registered_mixture_is_found_by_its_digest_with_the_adapter_that_rows_carry(registry: Registry) -> None:
    digest = register(registry, {"maths": 0.25, "law": 0.75})
    card = registry.resolve("mixture", digest, SHARED).card
    assert card["adapter"] == sorted([[EXPERTS["maths"].digest, 0.25], [EXPERTS["law"].digest, 0.75]])
    assert (card["backbone"], card["factors"]) == (BACKBONE, "f" * 64)


def test_registering_again_by_digests_instead_of_names_gives_the_same_one_entry(registry: Registry) -> None:
    first = register(registry, {"maths": 0.25, "law": 0.75})
    again = register(registry, {EXPERTS["law"].digest: 0.75, EXPERTS["maths"].digest: 0.25})
    assert again == first
    assert [one.digest for one in registry.list("mixture", SHARED)] == [first]


def test_two_names_of_one_expert_add_up(registry: Registry) -> None:
    digest = register(registry, {"maths": 0.25, EXPERTS["maths"].digest: 0.75})
    assert registry.resolve("mixture", digest, SHARED).card["adapter"] == [[EXPERTS["maths"].digest, 1.0]]


def test_an_unknown_expert_is_refused_with_the_known_ones_and_nothing_is_stored(registry: Registry) -> None:
    with pytest.raises(UnknownName, match="no expert named 'art'; known: law, maths"):
        register(registry, {"art": 0.5, "law": 0.5})
    assert registry.list("mixture", SHARED) == ()


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"maths": 0.5, "law": 0.6}, "sum to 1"),
        ({"maths": 0.5, "other-kind": 0.5}, "choose one kind"),
        ({"maths": 0.5, "other-backbone": 0.5}, "was made for backbone cccc"),
    ],
)
def test_what_cannot_be_served_is_not_registered(registry: Registry, weights: dict[str, float], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        register(registry, weights)
    assert registry.list("mixture", SHARED) == ()
