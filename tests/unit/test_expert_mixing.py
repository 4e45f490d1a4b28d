import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.expert_mixing import ExpertMixing
from metasepia.errors import InvalidRequest, UnknownName
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.vectors import ExpertVectors, FactorIndex
from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import SHARED, Artefact, Kind

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
        replace: bool = True,
    ) -> Artefact:
        self.num_puts += 1
        return self.registry.put(kind, blob, digest=digest, name=name, owner=owner, card=card, replace=replace)


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


def test_the_base_takes_part_under_its_name_and_alone_it_is_refused(registry: Registry) -> None:
    digest = register(registry, {"maths": 0.25, "base": 0.75})
    card = registry.resolve("mixture", digest, SHARED).card
    base = ExpertVectors.identity(BACKBONE, "f" * 64).digest
    assert dict(card["adapter"]) == {EXPERTS["maths"].digest: 0.25, base: 0.75}  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert card["experts"] == ["base", "maths"]
    with pytest.raises(InvalidRequest, match="base alone is the backbone itself"):
        register(registry, {"base": 1.0})


def test_the_base_is_mixed_in_the_form_of_the_experts_beside_it(registry: Registry) -> None:
    digest = register(registry, {"other-kind": 0.5, "base": 0.5})
    adapter = registry.resolve("mixture", digest, SHARED).card["adapter"]
    assert ExpertVectors.identity(BACKBONE, "f" * 64, renormalise=True).digest in dict(adapter)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_weights_by_layer_are_as_many_as_the_backbone_has_factored_layers(registry: Registry) -> None:
    def layers(factors: str) -> FactorIndex:
        return FactorIndex(digest=factors, backbone=BACKBONE, lengths={"up.weight": 2, "down.weight": 2})

    mixing = ExpertMixing(Direct(registry), layers)
    digest = asyncio.run(mixing.register(BACKBONE, {"maths": [0.25, 1.0], "law": [0.75, 0.0]}))
    adapter = registry.resolve("mixture", digest, SHARED).card["adapter"]
    assert adapter == sorted([[EXPERTS["maths"].digest, [0.25, 1.0]], [EXPERTS["law"].digest, [0.75, 0.0]]])
    with pytest.raises(InvalidRequest, match="one for each of the 2 factored layers, got 3"):
        asyncio.run(mixing.register(BACKBONE, {"maths": [0.25, 1.0, 0.5], "law": [0.75, 0.0, 0.5]}))


def test_low_rank_adapters_are_mixed_among_themselves_only(registry: Registry) -> None:
    for name, seed in (("one", 0.5), ("two", 0.25)):
        pair = {"a": {"up.weight": np.full((1, 3), seed, np.float32)}, "b": {"up.weight": np.ones((2, 1), np.float32)}}
        lora = LoraAdapter(backbone=BACKBONE, **pair)
        registry.put("expert", lora.to_bytes(), digest=lora.digest, name=name, owner=SHARED)
    card = registry.resolve("mixture", register(registry, {"one": 0.5, "two": 0.5}), SHARED).card
    assert card["experts"] == ["one", "two"] and card["factors"] is None
    with pytest.raises(InvalidRequest, match="low-rank adapters cannot be mixed with expert vectors"):
        register(registry, {"one": 0.5, "maths": 0.5})
    with pytest.raises(InvalidRequest, match="base can be mixed with expert vectors"):
        register(registry, {"one": 0.5, "base": 0.5})


def test_a_mixture_registered_again_keeps_what_its_card_says_of_a_search(registry: Registry) -> None:
    mixing = ExpertMixing(Direct(registry))
    candidates = asyncio.run(mixing.candidates(BACKBONE, ["maths", "law"], SHARED))
    adapter = tuple(sorted((digest, 0.5) for _, digest in candidates.named))
    digest = asyncio.run(mixing.put(BACKBONE, adapter, candidates, SHARED, {"search": {"id": "search-1"}}))
    assert register(registry, {"maths": 0.5, "law": 0.5}) == digest
    assert registry.resolve("mixture", digest, SHARED).card["search"] == {"id": "search-1"}
