import builtins
import itertools
import json

import numpy as np
import pytest

from metasepia.embedding import nearest, store
from metasepia.embedding.nearest import IndexedTasks, NearestTasks
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.errors import CorruptArtefact, DifferentSpaces, InvalidRequest, InvalidSettings, NotSupported

SPACE = Space(surrogate="a" * 64, method="agreement", settings={}, probes="b" * 64)
OTHER = Space(surrogate="a" * 64, method="agreement", settings={"dims": 8}, probes="b" * 64)


def embeddings(data_seed: int, count: int, dims: int = 24, space: Space = SPACE) -> list[TaskEmbedding]:
    vectors = np.random.default_rng(data_seed).standard_normal((count, dims))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return [
        TaskEmbedding(space=space, vector=vector, kind="model", name=f"task {i}", source={})
        for i, vector in enumerate(vectors)
    ]


def by_numpy(given: list[TaskEmbedding], queries: np.ndarray, k: int) -> np.ndarray:
    cosines = queries @ np.stack([one.vector for one in given]).T
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("part_bytes", [1, 24 * 4 * 70, 1 << 25])
def test_search_in_parts_finds_what_one_product_finds(part_bytes, monkeypatch):
    monkeypatch.setattr(nearest, "PART_BYTES", part_bytes)
    given = embeddings(0, 500)
    queries = np.stack([one.vector for one in embeddings(1, 9)])
    places, cosines = NearestTasks.of(given).search_many(queries, 7)
    np.testing.assert_array_equal(places, by_numpy(given, queries, 7))
    expected = np.take_along_axis(queries @ np.stack([one.vector for one in given]).T, places, 1)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_of_equal_vectors_the_first_comes_first():
    given = embeddings(0, 3)
    found = NearestTasks.of([given[1], *[given[0]] * 4, given[2]]).search(given[0], 4)
    assert [one.place for one in found] == [1, 2, 3, 4]


def test_a_written_index_answers_as_the_one_in_memory(tmp_path):
    given = embeddings(0, 300)
    store.write(str(tmp_path / "mine.parquet"), given[100:])
    rest = store.batches(str(tmp_path / "mine.parquet"), rows=64)
    written = NearestTasks.write(tmp_path / "index", itertools.chain([given[:100], []], rest))
    assert written.search(given[5], 6) == NearestTasks.of(given).search(given[5], 6)
    assert written.search(given[5], 1)[0].digest == given[5].digest


def test_half_precision_changes_cosines_by_less_than_a_thousandth(tmp_path):
    given = embeddings(0, 300)
    exact = NearestTasks.of(given).search_many(np.stack([one.vector for one in given]), 3)
    half = NearestTasks.write(tmp_path / "index", [given], storage="float16")
    np.testing.assert_allclose(half.search_many(np.stack([one.vector for one in given]), 3)[1], exact[1], atol=1e-3)
    assert (tmp_path / "index" / "vectors.bin").stat().st_size == 300 * 24 * 2


def test_left_out_tasks_are_replaced_by_the_next_nearest():
    given = embeddings(0, 50)
    tasks = NearestTasks.of(given)
    four = tasks.search(given[0], 4)
    assert tasks.search(given[0], 3, leave_out=[given[0].digest]) == four[1:]


def test_embeddings_of_different_spaces_never_mix(tmp_path):
    ours, theirs = embeddings(0, 5), embeddings(1, 5, space=OTHER)
    with pytest.raises(DifferentSpaces):
        NearestTasks.of([*ours, *theirs])
    with pytest.raises(DifferentSpaces):
        NearestTasks.of(ours).search(theirs[0])
    with pytest.raises(DifferentSpaces):
        NearestTasks.write(tmp_path / "index", [ours, theirs])
    with pytest.raises(CorruptArtefact):  # what was begun is no index
        NearestTasks.open(tmp_path / "index")


def test_what_is_no_search_is_refused():
    tasks = NearestTasks.of(embeddings(0, 5))
    with pytest.raises(InvalidRequest, match="24 numbers"):
        tasks.search(np.ones(3, np.float32))
    with pytest.raises(InvalidRequest, match="1 or more"):
        tasks.search(np.ones(24, np.float32), 0)
    with pytest.raises(InvalidRequest, match="there are none"):
        NearestTasks.of([])
    assert len(tasks.search(embeddings(0, 1)[0], 10)) == 5


def test_a_torn_index_is_corrupt_and_a_strange_folder_is_left_alone(tmp_path):
    NearestTasks.write(tmp_path / "index", [embeddings(0, 5)])
    vectors = tmp_path / "index" / "vectors.bin"
    vectors.write_bytes(vectors.read_bytes()[:-4])
    with pytest.raises(CorruptArtefact, match=r"vectors\.bin has"):
        NearestTasks.open(tmp_path / "index")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InvalidSettings, match="new, empty"):
        NearestTasks.write(tmp_path / "mine", [embeddings(0, 5)])
    head = tmp_path / "index" / "index.json"
    head.write_text(json.dumps({"format": 99, "dtype": "float32"}))
    with pytest.raises(CorruptArtefact, match="format 99"):
        NearestTasks.open(tmp_path / "index")


def test_an_index_finds_nearly_all_neighbours_with_exact_cosines(tmp_path):
    pytest.importorskip("faiss")
    centres = np.random.default_rng(0).standard_normal((40, 24))
    noise = np.random.default_rng(1).standard_normal((1200, 24))
    vectors = np.repeat(centres, 30, 0) + 0.5 * noise
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    given = [
        TaskEmbedding(space=SPACE, vector=vector, kind="model", name=f"t{i}", source={})
        for i, vector in enumerate(vectors)
    ]
    tasks = NearestTasks.of(given)
    index = IndexedTasks.build(tasks, tmp_path / "index.faiss", code_bytes=8)
    shares = []
    for one in given[::40]:
        exact = {each.place: each.cosine for each in tasks.search(one, 10)}
        found = {each.place: each.cosine for each in index.search(one, 10)}
        shares.append(len(exact.keys() & found.keys()) / 10)
        for place in exact.keys() & found.keys():
            assert found[place] == pytest.approx(exact[place], abs=1e-6)
    assert np.mean(shares) > 0.9
    with pytest.raises(CorruptArtefact, match="build it again"):
        IndexedTasks.open(NearestTasks.of(given[:1100]), tmp_path / "index.faiss")
    with pytest.raises(DifferentSpaces):
        index.search(embeddings(0, 1, space=OTHER)[0])


def test_without_faiss_the_error_says_what_to_install(tmp_path, monkeypatch):
    importing = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "faiss":
            raise ImportError(name)
        return importing(name, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(NotSupported, match=r"pip install 'metasepia\[search\]'"):
        IndexedTasks.build(NearestTasks.of(embeddings(0, 5)), tmp_path / "index.faiss")
