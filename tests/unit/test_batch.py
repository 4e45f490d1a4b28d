"""Parquet through a server: order, errors by row, kills at any moment, what is refused before anything is asked."""

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.upper import Refusal, Upper, serving
from jobs import batch
from jobs.batching.reading import Source
from jobs.batching.spec import BatchSpec
from jobs.batching.tasks import CutOff, HiddenStates
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: int = 40, group: int = 7, **columns: Any) -> Path:
    texts = [f"text {'o' * (row % 23)} {row}" for row in range(rows)]
    table = pa.table({"id": list(range(rows)), "text": texts} | columns)
    pq.write_table(table, path, row_group_size=group)
    return path


def run(url: str, source: Path | str, out: Path | str, *more: str, task: str = "embed", model: str = "minilm") -> int:
    words = ["--input", str(source), "--output", str(out), "--task", task, "--model", model, "--url", url, "--quiet"]
    return batch.main([*words, "--rows-a-part", "8", "--rows-a-request", "4", *more])


@pytest.fixture
def upper() -> Iterator[Upper]:
    with serving(Upper()) as server:
        yield server


def test_every_row_has_its_own_answer_in_the_inputs_order(upper: Upper, tmp_path: Path):
    out = tmp_path / "out.parquet"
    assert run(upper.url, write(tmp_path / "in.parquet"), out) == 0
    table = pq.read_table(out)
    given = pq.read_table(tmp_path / "in.parquet")
    assert table.select(["id", "text"]).equals(given)
    alone = [upper.answer("/v1/embeddings", {"input": [text]})["data"][0] for text in given["text"].to_pylist()]
    wanted = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4").tolist() for one in alone]
    assert table["embedding"].to_pylist() == wanted
    assert table["error"].null_count == 40
    assert [path.name for path in tmp_path.iterdir() if path != tmp_path / "in.parquet"] == ["out.parquet"]


def test_a_folder_of_files_becomes_a_folder_of_parts_that_readers_of_parquet_folders_read(upper: Upper, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for index, rows in enumerate((5, 1, 30)):  # parts of eight rows go over the files' ends
        write(tmp_path / "in" / f"{index}.parquet", rows)
    assert run(upper.url, tmp_path / "in", tmp_path / "out", task="classify", model="ctx-1") == 0
    table, given = pq.read_table(tmp_path / "out"), pq.read_table(tmp_path / "in")
    assert table["id"].to_pylist() == given["id"].to_pylist()
    assert table["label"].to_pylist() == ["long" if len(t) >= 10 else "short" for t in given["text"].to_pylist()]
    assert sum(len(body["inputs"]) for body in upper.bodies) == 36


def test_the_column_of_models_picks_each_rows_expert_and_seeds_differ_by_row(upper: Upper, tmp_path: Path):
    models = ["big:desk", None, "big:support", "big:desk"] * 3
    write(tmp_path / "in.parquet", 12, model=models)
    assert run(upper.url, tmp_path / "in.parquet", tmp_path / "out.parquet", "--option", "seed=5", task="complete") == 0
    answers = pq.read_table(tmp_path / "out.parquet")["completion"].to_pylist()
    assert [one.split(":")[0] for one in answers] == [(m or "minilm").split(":")[0] for m in models]
    seeds = [int(one.rsplit(":", 2)[1]) for one in answers]
    assert seeds == [5 + row for row in range(12)]


def test_a_bad_row_has_its_error_and_costs_no_other_row_its_answer(tmp_path: Path):
    def refuse(_: Upper, path: str, body: dict[str, Any]) -> Refusal | None:
        for index, text in enumerate(body["input"]):
            if text == "cursed":
                return 400, {"code": "invalid_value", "message": "no", "param": f"input[{index}]"}, {}
            if text == "unnamed":  # the refusal does not say which
                return 413, {"code": "body_too_large", "message": "too long", "param": "body"}, {}
        return None

    texts = ["fine", "cursed", None, "fine", "unnamed", "fine", "cursed", "fine"] * 2
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    with serving(Upper(refuse)) as upper:
        assert run(upper.url, tmp_path / "in.parquet", tmp_path / "out.parquet") == 1
    table = pq.read_table(tmp_path / "out.parquet")
    codes = [None if one is None else one.split(":")[0] for one in table["error"].to_pylist()]
    kinds = {"fine": None, "cursed": "invalid_value", None: "invalid_cell", "unnamed": "body_too_large"}
    assert codes == [kinds[text] for text in texts]
    assert [one is None for one in table["embedding"].to_pylist()] == [text != "fine" for text in texts]


def test_a_model_that_is_not_there_is_the_error_of_its_rows_alone(tmp_path: Path):
    def refuse(_: Upper, path: str, body: dict[str, Any]) -> Refusal | None:
        unknown = 404, {"code": "model_not_found", "message": "no model", "param": "model"}, {}
        return unknown if body["model"] == "gone" else None

    write(tmp_path / "in.parquet", 16, model=["gone", "here"] * 8)
    with serving(Upper(refuse)) as upper:
        assert run(upper.url, tmp_path / "in.parquet", tmp_path / "out.parquet") == 1
        asked = [body["model"] for body in upper.bodies]
    assert pq.read_table(tmp_path / "out.parquet")["error"].is_null().to_pylist() == [False, True] * 8
    assert asked.count("gone") == 2 * 1  # a request a part, none of them asked again


def test_a_full_or_restarting_server_is_waited_for_and_one_that_stays_away_ends_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def refuse(upper: Upper, path: str, body: dict[str, Any]) -> Refusal | None:
        busy = 429, {"code": "overloaded", "message": "full"}, {"retry-after": "0"}
        return busy if len(upper.bodies) % 4 == 1 else None

    write(tmp_path / "in.parquet")
    with serving(Upper(refuse)) as upper:
        assert run(upper.url, tmp_path / "in.parquet", tmp_path / "out") == 0
    assert pq.read_table(tmp_path / "out").num_rows == 40
    # Nobody listens there now.
    assert run(upper.url, tmp_path / "in.parquet", tmp_path / "away", "--patience-s", "0.4") == batch.GONE
    assert "does not answer" in capsys.readouterr().err


def test_a_key_that_is_refused_ends_the_batch_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    closed: Refusal = (401, {"code": "invalid_api_key", "message": "who are you"}, {})
    write(tmp_path / "in.parquet")
    with serving(Upper(lambda *_: closed)) as upper:
        begin = time.monotonic()
        assert run(upper.url, tmp_path / "in.parquet", tmp_path / "out", "--key", "msk_secret") == batch.GONE
    assert time.monotonic() - begin < 5
    said = capsys.readouterr()
    assert "invalid_api_key" in said.err
    assert "msk_secret" not in said.err + said.out


def command(url: str, source: Path | str, out: Path | str) -> list[str]:
    words = ["--input", str(source), "--output", str(out), "--task", "embed", "--model", "m", "--url", url, "--quiet"]
    return [sys.executable, "-m", "jobs.batch", *words, "--rows-a-part", "8", "--rows-a-request", "4"]


def test_after_sigkill_and_sigterm_the_same_command_gives_the_bytes_of_an_undisturbed_run(tmp_path: Path):
    source = write(tmp_path / "in.parquet", 120)
    with serving(Upper()) as upper:
        subprocess.run(command(upper.url, source, tmp_path / "once.parquet"), cwd=ROOT, check=True)
        keys = set(upper.keys)
    victim: list[subprocess.Popen[bytes]] = []
    kill_at = [(7, signal.SIGKILL), (22, signal.SIGTERM), (10**9, signal.SIGKILL)]
    seen: list[str] = []
    status = -1
    for count, number in kill_at:

        def strike(server: Upper, path: str, body: dict[str, Any], count: int = count, number: int = number) -> None:
            if len(server.bodies) == count and victim:
                os.kill(victim[-1].pid, number)
                time.sleep(0.2)

        with serving(Upper(strike)) as upper:
            victim.append(subprocess.Popen(command(upper.url, source, tmp_path / "often.parquet"), cwd=ROOT))
            status = victim[-1].wait(60)
            seen += upper.keys
            if number == signal.SIGTERM:
                assert status == batch.INTERRUPTED
    assert status == 0
    assert (tmp_path / "often.parquet").read_bytes() == (tmp_path / "once.parquet").read_bytes()
    assert not (tmp_path / "often.parquet.parts").exists()
    # The same requests have the same keys, and parts that were there were not asked again.
    assert set(seen) == keys
    assert len(seen) < 3 * len(keys)


def test_a_second_call_asks_nothing_and_another_batch_is_refused_the_same_place(
    upper: Upper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = write(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    for place in (out, tmp_path / "folder"):
        assert run(upper.url, source, place) == 0
        asked, content = len(upper.bodies), out.read_bytes()
        assert run(upper.url, source, place) == 0
        assert (len(upper.bodies), out.read_bytes()) == (asked, content)
        assert run(upper.url, source, place, model="other") == 2
        assert "another batch" in capsys.readouterr().err
    write(tmp_path / "in.parquet", 41)
    assert run(upper.url, source, tmp_path / "folder") == 2
    assert "of another pieces" in capsys.readouterr().err


def test_a_torn_part_is_named(upper: Upper, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write(tmp_path / "in.parquet")
    assert run(upper.url, source, tmp_path / "out") == 0
    (tmp_path / "out" / "_SUCCESS").unlink()
    torn = sorted((tmp_path / "out").glob("part-*"))[2]
    torn.write_bytes(torn.read_bytes()[:-3])
    assert run(upper.url, source, tmp_path / "out") == 2
    assert torn.name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--column", "prose"], "a column of the input: id, text"),
        (["--keep", "nothing"], "a column of the input"),
        (["--option", "x"], "NAME=VALUE"),
        (["--concurrency", "0"], "from 1 to 512"),
        (["--rows-a-request", "0"], "from 1 to 2048"),
        (["--input", "/nowhere"], "there is none"),
        (["--input", "s3://user:hunter2@bucket/x?nonsense=1"], "s3://bucket/x"),
        (["--task", "hidden_states", "--option", 'pooling="none"'], "last or mean"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("http://127.0.0.1:9", write(tmp_path / "in.parquet"), tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "hunter2" not in said
    assert not (tmp_path / "out").exists()


def test_answers_that_would_hide_an_input_column_want_a_prefix(
    upper: Upper, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = write(tmp_path / "in.parquet", 4, error=["a"] * 4)
    assert run(upper.url, source, tmp_path / "out") == 2
    assert "--prefix" in capsys.readouterr().err
    assert run(upper.url, source, tmp_path / "out", "--prefix", "our_") == 0
    assert {"error", "our_error", "our_embedding"} <= set(pq.read_table(tmp_path / "out").column_names)


def test_rows_are_read_a_piece_at_a_time_whatever_the_row_groups(tmp_path: Path):
    path = write(tmp_path / "in.parquet", 5000, group=5000)
    wanted = [range(begin, begin + 100) for begin in range(0, 5000, 100) if begin % 300]
    source = Source.at(str(path))
    found = [table["id"].to_pylist() for table in source.parts(wanted, ["id"])]
    assert found == [list(one) for one in wanted]


def test_no_rows_are_a_whole_output_too(upper: Upper, tmp_path: Path):
    assert run(upper.url, write(tmp_path / "in.parquet", 0), tmp_path / "out.parquet") == 0
    assert pq.read_table(tmp_path / "out.parquet").column_names == ["id", "text", "embedding", "error"]


@pytest.fixture
def through_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Requests go to a door in this process."""
    bench = Bench(write_byte_tokenizer(tmp_path))
    made = httpx.AsyncClient

    def client(**_: Any) -> httpx.AsyncClient:
        return made(transport=httpx.ASGITransport(app=bench.app), base_url="http://door")

    monkeypatch.setattr("jobs.batching.asking.httpx.AsyncClient", client)
    return bench


def test_the_doors_own_answers_are_understood(through_the_door: Bench, tmp_path: Path):
    through_the_door.says("done")
    write(tmp_path / "in.parquet", 3, model=["tiny", "tiny", "nobody"])
    here, source = "http://door", tmp_path / "in.parquet"
    assert run(here, source, tmp_path / "chat.parquet", "--option", "max_tokens=8", task="chat") == 1
    table = pq.read_table(tmp_path / "chat.parquet")
    assert table["completion"].to_pylist() == ["done", "done", None]
    assert "nobody" in table["error"].to_pylist()[2]
    assert run(here, source, tmp_path / "states.parquet", "--option", "layers=[0, -1]", task="hidden_states") == 1
    states = pq.read_table(tmp_path / "states.parquet")
    assert [None if one is None else len(one) for one in states["state_-1"].to_pylist()] == [4, 4, None]


def test_a_stream_of_states_that_is_cut_off_is_no_answer():
    spec = BatchSpec(task="hidden_states", pieces=(), column="text", model="m", model_column=None)
    with pytest.raises(CutOff):
        HiddenStates(spec).answers(b"", 1)
