"""Embeddings at rest: what was put is what is got, bytes that depend on nothing else, spaces that never mix."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metasepia.digests import digest_of
from metasepia.embedding import store, store_files
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.embedding.store import Batch, EmbeddingStore, batches, read, write
from metasepia.errors import CorruptArtefact, DifferentSpaces, InvalidSettings, UnknownName
from metasepia.sweeps.failures import StorageFailed

SPACE = Space(surrogate=digest_of(1), method="agreement", settings={"sketch": 8}, probes=digest_of(2))
OTHER = Space(surrogate=digest_of(1), method="fisher", settings={"sketch": 4}, probes=digest_of(2))


def embeddings(count: int, *, space: Space = SPACE, dims: int = 8, first: int = 0) -> Iterator[TaskEmbedding]:
    kinds = ("data_set", "model", "prompt")
    for place in range(first, first + count):
        vector = np.random.default_rng([dims, place]).standard_normal(dims)
        yield TaskEmbedding(
            space=space,
            vector=(vector / np.linalg.norm(vector)).astype(np.float32),
            kind=kinds[place % 3],
            name=f"task é {place}",
            source={"labels": ["no", "yes"], "num_texts": place},
            noise=0.1 / (1 + place) if place % 3 else None,
        )


def digests(found: list[TaskEmbedding]) -> list[str]:
    return [one.digest for one in found]


def at_file(tmp_path: Path) -> str:
    return str(tmp_path / "folder" / "embeddings.parquet")


def test_what_is_read_is_what_was_written_in_order(tmp_path: Path):
    given = list(embeddings(10))
    assert write(at_file(tmp_path), iter(given)) == 10
    found = read(at_file(tmp_path))
    assert digests(found) == digests(given)
    assert [one.noise for one in found] == [one.noise for one in given]
    assert all(np.array_equal(a.vector, b.vector) for a, b in zip(found, given, strict=True))
    assert found[0].space == SPACE and found[0].source == given[0].source


def test_columns_are_those_that_other_tools_expect(tmp_path: Path):
    write(at_file(tmp_path), embeddings(3))
    table = pq.read_table(at_file(tmp_path))
    assert table.column_names == ["name", "kind", "space", "vector", "noise", "source", "digest"]
    assert table.schema.field("vector").type == pa.list_(pa.field("item", pa.float32(), False), 8)
    assert table.column("source")[1].as_py() == '{"labels":["no","yes"],"num_texts":1}'
    assert table.column("space").unique().to_pylist() == [SPACE.digest]


def test_bytes_depend_on_the_embeddings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        write(str(tmp_path / name), embeddings(20))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b"]
    monkeypatch.setattr(store, "ROWS_AT_A_TIME", 7)
    write(str(tmp_path / "c"), embeddings(20))
    assert pq.ParquetFile(tmp_path / "c").num_row_groups == 3
    assert digests(read(str(tmp_path / "c"))) == digests(read(str(tmp_path / "a")))


def test_a_file_holds_one_space(tmp_path: Path):
    with pytest.raises(DifferentSpaces, match="method"):
        write(at_file(tmp_path), [*embeddings(2), *embeddings(2, space=OTHER, dims=4)])
    assert not os.listdir(tmp_path / "folder"), "nothing half-written is left"
    with pytest.raises(InvalidSettings, match="one or more"):
        write(at_file(tmp_path), [])


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(at_file(tmp_path), embeddings(2))

    def failing() -> Iterator[TaskEmbedding]:
        yield from embeddings(3)
        raise RuntimeError("no more")

    monkeypatch.setattr(store, "ROWS_AT_A_TIME", 1)
    with pytest.raises(RuntimeError, match="no more"):
        write(at_file(tmp_path), failing())
    monkeypatch.setattr(store_files, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StorageFailed, match="No space left"):
        write(at_file(tmp_path), embeddings(3))
    assert len(read(at_file(tmp_path))) == 2
    assert os.listdir(tmp_path / "folder") == ["embeddings.parquet"]


def test_batches_hold_few_rows_and_all_of_them(tmp_path: Path):
    write(at_file(tmp_path), embeddings(25))
    found = list(batches(at_file(tmp_path), rows=10))
    assert [len(one) for one in found] == [10, 10, 5]
    joined = np.concatenate([one.vectors for one in found])
    assert np.array_equal(joined, np.stack([one.vector for one in embeddings(25)]))


def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InvalidSettings, match="there is none"):
        read(str(tmp_path / "absent.parquet"))
    (tmp_path / "text").write_text("name,kind")
    with pytest.raises(CorruptArtefact, match=r"text cannot be used: it is torn or no Parquet file"):
        read(str(tmp_path / "text"))
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "foreign")
    with pytest.raises(CorruptArtefact, match="holds no task embeddings"):
        read(str(tmp_path / "foreign"))
    write(str(tmp_path / "whole"), embeddings(2))
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(CorruptArtefact, match="torn"):
        read(str(tmp_path / "torn"))


def test_a_row_that_was_changed_is_found_by_its_digest(tmp_path: Path):
    write(at_file(tmp_path), embeddings(3))
    table = pq.read_table(at_file(tmp_path))
    names = pa.array(["task é 0", "another", "task é 2"])
    changed = table.set_column(0, table.schema.field("name"), names)
    pq.write_table(changed, at_file(tmp_path))
    with pytest.raises(CorruptArtefact, match=r"'another'.*its digest is"):
        read(at_file(tmp_path))
    others = pa.array([OTHER.digest] * 3)
    pq.write_table(table.set_column(2, table.schema.field("space"), others), at_file(tmp_path))
    with pytest.raises(CorruptArtefact, match="another space"):
        read(at_file(tmp_path))


def test_a_store_keeps_spaces_apart_and_each_embedding_once(tmp_path: Path):
    kept = EmbeddingStore(str(tmp_path / "store"))
    assert kept.spaces() == [] and kept.count(SPACE.digest) == 0
    mixed = [*embeddings(4), *embeddings(3, space=OTHER, dims=4), *embeddings(2, first=4), *embeddings(2)]
    assert kept.add(mixed) == 9, "two are there twice"
    assert {one.digest for one in kept.spaces()} == {SPACE.digest, OTHER.digest}
    assert (kept.count(SPACE.digest), kept.count(OTHER.digest)) == (6, 3)
    assert digests(kept.read(SPACE.digest)) == digests(list(embeddings(6)))
    assert kept.add(mixed) == 0
    assert len(list((tmp_path / "store" / SPACE.digest).iterdir())) == 1, "nothing new, no new file"
    assert kept.add(embeddings(3, first=6)) == 3
    assert digests(kept.read(SPACE.digest)) == digests(list(embeddings(9)))
    assert digests(kept.read(SPACE.digest, kinds=["model"])) == digests(
        [one for one in embeddings(9) if one.kind == "model"]
    )


def test_merging_adds_what_is_missing_from_stores_and_files(tmp_path: Path):
    ours, theirs = EmbeddingStore(str(tmp_path / "a")), EmbeddingStore(str(tmp_path / "b"))
    ours.add(embeddings(5))
    theirs.add([*embeddings(4, first=3), *embeddings(2, space=OTHER, dims=4)])
    assert ours.merge(theirs) == 4 and ours.merge(theirs) == 0
    assert digests(ours.read(SPACE.digest)) == digests(list(embeddings(7)))
    write(at_file(tmp_path), embeddings(9))
    assert ours.merge_file(at_file(tmp_path)) == 2
    assert ours.count(SPACE.digest) == 9


def test_many_rows_become_several_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "BYTES_OF_A_FILE", 1500)
    monkeypatch.setattr(store, "ROWS_AT_A_TIME", 8)
    kept = EmbeddingStore(str(tmp_path))
    assert kept.add(embeddings(60)) == 60
    files = sorted(path.name for path in (tmp_path / SPACE.digest).iterdir())
    assert len(files) > 3 and [name[:8] for name in files] == [f"{i:08d}" for i in range(1, len(files) + 1)]
    assert digests(kept.read(SPACE.digest)) == digests(list(embeddings(60)))
    mapped = kept.vectors(SPACE.digest, tmp_path / "vectors.npy")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, np.stack([one.vector for one in embeddings(60)]))


def test_what_came_before_an_error_is_kept(tmp_path: Path):
    def failing() -> Iterator[TaskEmbedding]:
        yield from embeddings(3)
        yield from embeddings(1, space=OTHER, dims=4)
        raise KeyboardInterrupt

    kept = EmbeddingStore(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        kept.add(failing())
    assert kept.count(SPACE.digest) == 3


def test_a_name_finds_what_was_added_last(tmp_path: Path):
    kept = EmbeddingStore(str(tmp_path))
    kept.add(embeddings(3))
    newer = next(embeddings(1, first=7)).renamed("task é 1")
    kept.add([newer])
    assert kept.find(SPACE.digest, "task é 1").digest == newer.digest
    assert kept.find(SPACE.digest, "task é 2").digest == list(embeddings(3))[2].digest
    with pytest.raises(UnknownName, match=r"no embedding named 'x'; known: task é 0, task é 1, task é 2"):
        kept.find(SPACE.digest, "x")
    with pytest.raises(UnknownName, match=f"no space named 'y'; known: {SPACE.digest}"):
        kept.read("y")


def test_two_that_add_at_once_leave_two_files(tmp_path: Path):
    kept = EmbeddingStore(str(tmp_path))
    grown = [store._Growing(Batch.of(list(embeddings(2, first=first)))) for first in (0, 2)]
    for one, first in zip(grown, (0, 2), strict=True):
        one.add(Batch.of(list(embeddings(2, first=first))))
    names = kept._names
    kept._names = lambda space: []  # neither saw the other's
    for one in grown:
        kept._keep(one)
    kept._names = names
    assert sorted(digests(kept.read(SPACE.digest))) == sorted(digests(list(embeddings(4))))


@pytest.mark.soak
def test_a_million_rows_pass_through_little_memory(tmp_path: Path):
    count, dims = 1_000_000, 64
    block = np.random.default_rng(0).standard_normal((1000, dims)).astype(np.float32)
    block /= np.linalg.norm(block, axis=1, keepdims=True)

    def many() -> Iterator[Batch]:
        for start in range(0, count, 1000):
            names = [f"task {place}" for place in range(start, start + 1000)]
            yield Batch(
                space=SPACE,
                vectors=block,
                names=names,
                kinds=["model"] * 1000,
                noise=[None] * 1000,
                sources=["{}"] * 1000,
                digests=[digest_of(name) for name in names],
            )

    kept = EmbeddingStore(str(tmp_path))
    assert kept._add(many()) == count == kept.count(SPACE.digest)
    before = pa.total_allocated_bytes()
    seen = 0
    for batch in kept.batches(SPACE.digest):
        seen += len(batch)
        assert pa.total_allocated_bytes() - before < 256 << 20
    assert seen == count
