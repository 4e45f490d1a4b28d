"""What is kept at a path is kept in an object store too, whole or not at all, and no secret is ever printed."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sweep_fits import Fits, plan_of
from benchmarks.upper import Upper, serving
from jobs import batch
from metasepia.embedding.space import Space, TaskEmbedding
from metasepia.embedding.store import EmbeddingStore
from metasepia.embedding.store_files import StreamedFiles
from metasepia.errors import InvalidSettings
from metasepia.sweeps.failures import StorageFailed
from metasepia.sweeps.files import Files, shown
from metasepia.sweeps.run import run_pack
from metasepia.sweeps.store import SweepStore
from tests import s3
from tests.unit import test_batch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bucket() -> Iterator[s3.Bucket]:
    with s3.serving() as made:
        yield made


def test_a_sweep_in_a_bucket_has_the_bytes_of_one_on_a_disk(bucket: s3.Bucket, tmp_path: Path):
    plan = plan_of()
    tables: list[bytes | None] = []
    for uri in (bucket.uri("sweep"), str(tmp_path)):
        store = SweepStore.open(uri, plan)
        for pack in range(len(plan.packs)):
            run_pack(Fits, SweepStore.read(store.address), pack)
        store.write_table()
        tables.append(Files.at(uri).read("table.parquet"))
    assert tables[0] is not None
    assert tables[0] == tables[1]


def test_embeddings_in_a_bucket_are_found_again(bucket: s3.Bucket):
    store = EmbeddingStore(bucket.uri("embeddings"))
    space = Space(surrogate="a" * 64, method="agreement", settings={}, probes="b" * 64)
    made = [
        TaskEmbedding(space=space, name=f"task-{index}", kind="data_set", vector=vector, source={})
        for index, vector in enumerate(np.eye(3, 4, dtype=np.float32))
    ]
    assert store.add(made) == 3
    assert store.add(made) == 0
    found = EmbeddingStore(bucket.uri("embeddings")).read(space.digest)
    assert sorted((one.name, one.vector.tolist()) for one in found) == [(o.name, o.vector.tolist()) for o in made]


def test_a_batch_goes_from_bucket_to_bucket_and_on_after_a_kill(bucket: s3.Bucket, tmp_path: Path):
    local = test_batch.write(tmp_path / "in.parquet", 60)
    Files.at(bucket.uri("batch")).write("in.parquet", local.read_bytes())
    source, out = bucket.uri("batch/in.parquet"), bucket.uri("batch/out.parquet")
    victim: list[subprocess.Popen[bytes]] = []

    def strike(server: Upper, path: str, body: object) -> None:
        if len(server.bodies) == 9 and victim:
            victim[0].send_signal(signal.SIGKILL)
            time.sleep(0.2)

    with serving(Upper(strike)) as upper:
        victim.append(subprocess.Popen(test_batch.command(upper.url, source, out), cwd=ROOT))
        assert victim[0].wait(60) == -signal.SIGKILL
        assert subprocess.run(test_batch.command(upper.url, source, out), cwd=ROOT, check=False).returncode == 0
        subprocess.run(test_batch.command(upper.url, local, tmp_path / "once.parquet"), cwd=ROOT, check=True)
    assert Files.at(bucket.uri("batch")).read("out.parquet") == (tmp_path / "once.parquet").read_bytes()
    assert Files.at(bucket.uri("batch/out.parquet.parts")).names("") == []


def test_a_stream_that_fails_leaves_no_object(bucket: s3.Bucket):
    files = StreamedFiles.at(bucket.uri("streams"))
    with pytest.raises(ZeroDivisionError), files.create("half.parquet") as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert files.names("") == []


def test_what_a_person_sees_of_a_uri_has_no_secret(bucket: s3.Bucket, capsys: pytest.CaptureFixture[str]):
    secret = f"s3://user:hunter2@{bucket.uri('x').removeprefix('s3://')}"
    assert shown(secret) == "s3://things/x"
    assert shown("/a path?with=marks") == "/a path?with=marks"
    files = Files.at(secret)
    told = [files.uri, files.path_of("part")]
    with pytest.raises(InvalidSettings) as refused:
        Files.at("s3://user:hunter2@things/x?nonsense=1")
    told.append(str(refused.value))
    with pytest.raises(StorageFailed) as failed:
        Files.at(f"s3://user:hunter2@nowhere/{bucket.uri('x').partition('things/')[2]}").write("part", b"x")
    told.append(str(failed.value))
    assert batch.main(["--input", secret, "--output", secret, "--task", "embed", "--model", "m"]) == 2
    told.append(capsys.readouterr().err)
    for text in told:
        assert "hunter2" not in text
        assert s3.SECRET not in text
        assert "things/x" in text or "nowhere" in text
