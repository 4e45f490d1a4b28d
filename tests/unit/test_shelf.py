"""The door's copy of what the registry lists: as true as the registry, and read again only as far as it changed."""

import asyncio
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from metasepia.registry.catalogue import Registry
from metasepia.registry.entries import LOCAL, SHARED, Artefact, Kind
from serve.models import shelf
from serve.models.shelf import Shelf, page_of
from tests.doors import RealCatalogue


def put(registry: Registry, name: str, blob: bytes, owner: str) -> None:
    registry.put("expert", blob, digest=sha256(blob).hexdigest(), name=name, owner=owner)


def names_of(shelf: Shelf[Artefact]) -> list[tuple[str, str]]:
    return [(name, one.owner) for name, one in asyncio.run(shelf.all()).items()]


@pytest.fixture
def catalogue(tmp_path: Path) -> RealCatalogue:
    return RealCatalogue(tmp_path)


@pytest.mark.parametrize("page", [3, 4, 5, 100])
def test_pages_cut_between_two_owners_of_a_name_lose_nothing(catalogue: RealCatalogue, monkeypatch: Any, page: int):
    monkeypatch.setattr(shelf, "_PAGE", page)
    for index in range(6):
        put(catalogue.registry, f"e{index}", b"%d" % index, SHARED)
        if index % 2:
            put(catalogue.registry, f"e{index}", b"own %d" % index, LOCAL)
    wanted = [(f"e{i}", LOCAL if i % 2 else SHARED) for i in range(6)]
    assert names_of(Shelf(catalogue, "expert", LOCAL, lambda one: one)) == wanted


def test_a_copy_follows_every_change_without_listing_again(catalogue: RealCatalogue):
    kept: list[str] = []
    copy = Shelf(catalogue, "expert", LOCAL, lambda one: kept.append(one.name) or one)
    put(catalogue.registry, "a", b"1", SHARED)
    assert names_of(copy) == [("a", SHARED)]
    put(catalogue.registry, "b", b"2", LOCAL)
    put(catalogue.registry, "a", b"3", LOCAL)
    assert names_of(copy) == [("a", LOCAL), ("b", LOCAL)]
    catalogue.registry.delete("expert", "a", LOCAL)
    assert names_of(copy) == [("a", SHARED), ("b", LOCAL)]
    assert (catalogue.listed, kept) == (["expert"], ["a", "b", "a"])
    seen = asyncio.run(copy.all())
    assert asyncio.run(copy.all()) is seen


def test_what_is_written_while_the_list_is_read_is_in_the_next_answer(catalogue: RealCatalogue):
    read = catalogue.list

    async def slow(kind: Kind, owner: str, *, after: str = "", limit: int = 1000) -> Sequence[Artefact]:
        page = await read(kind, owner, after=after, limit=limit)
        put(catalogue.registry, "late", b"1", LOCAL)
        return page

    catalogue.list = slow  # pyright: ignore[reportAttributeAccessIssue]
    copy = Shelf(catalogue, "expert", LOCAL, lambda one: one)
    assert names_of(copy) == []
    assert names_of(copy) == [("late", LOCAL)]


def test_a_page_has_as_many_names_as_asked_for(catalogue: RealCatalogue):
    for index in range(5):
        for owner in (SHARED, LOCAL):
            put(catalogue.registry, f"e{index}", f"{owner}{index}".encode(), owner)
    page, more = asyncio.run(page_of(catalogue, "expert", LOCAL, "e0", 3))
    assert ([(one.name, one.owner) for one in page], more) == ([(f"e{i}", LOCAL) for i in (1, 2, 3)], True)
    page, more = asyncio.run(page_of(catalogue, "expert", LOCAL, "e3", 3))
    assert ([one.name for one in page], more) == (["e4"], False)
