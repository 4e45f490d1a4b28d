"""`metasepia` on files and in pipes: what goes in and comes out, how it ends, and what it loads before it has to."""

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metasepia import cli, cli_reference, cli_status
from metasepia.shell import ENDINGS
from tests.doors import Bench
from tests.endpoint import Endpoint, Http
from tests.listening import listening
from tests.serving import free_port
from tests.unit.test_prompts import write_byte_tokenizer

Said = tuple[int, str, str]
REVIEWS = 'id,review\n007,aaaaaa\n008,b\n"9,5","two\nlines, and ""quotes"""\n'
EXAMPLES = "review,label\naaaa,long\na,short\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("door")
    bench = Bench(write_byte_tokenizer(home)).with_contexts(home / "registry")
    bench.says("hello there")
    with listening(bench.app) as url:
        yield url


@pytest.fixture
def say(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., Said]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text(REVIEWS)
    (tmp_path / "examples.csv").write_text(EXAMPLES)

    def run(*arguments: object, stdin: str = "") -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        status = cli.main(["--url", url, "--retries", "0", *map(str, arguments)])
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def program(*arguments: str, stdin: int | None = None, start_new_session: bool = False) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "metasepia.cli", *arguments],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=start_new_session,
    )  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_csvs_values_come_out_as_they_went_in_with_the_labels_behind_them(say: Callable[..., Said]):
    status, out, _ = say("classify", "reviews.csv", "--text", "review", "--examples", "examples.csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert status == 0
    assert [row[:3] for row in rows] == [
        ["id", "review", "label"], ["007", "aaaaaa", "long"], ["008", "b", "short"],
        ["9,5", 'two\nlines, and "quotes"', "long"],
    ]  # fmt: skip
    assert rows[0][3:] == ["probability_long", "probability_short"]


def test_one_format_in_and_another_out_hold_the_same(say: Callable[..., Said], tmp_path: Path):
    by = ("--text", "review", "--examples", "examples.csv")
    for out in ("a.parquet", "a.jsonl", "a.tsv"):
        status, said, told = say("classify", "reviews.csv", *by, "--out", out)
        assert (status, said) == (0, "") and "3 texts labelled" in told
    table = pq.read_table(tmp_path / "a.parquet")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert table.to_pylist() == lines
    tabbed = list(csv.DictReader((tmp_path / "a.tsv").open(newline=""), delimiter="\t"))
    assert [one["label"] for one in lines] == [one["label"] for one in tabbed]
    again = say("classify", "a.parquet", *by, "--prefix", "b_", "--to", "jsonl")[1]
    assert [json.loads(one)["b_label"] for one in again.splitlines()] == ["long", "short", "long"]


def test_a_parquet_files_types_are_kept(say: Callable[..., Said], tmp_path: Path):
    kinds = pa.schema([("review", pa.dictionary(pa.int32(), pa.string())), ("when", pa.timestamp("us", "UTC"))])
    pq.write_table(pa.table({"review": ["aaaa", "b"], "when": [0, 1]}, kinds), tmp_path / "typed.parquet")
    by = ("--text", "review", "--examples", "examples.csv", "--out", "out.parquet")
    assert say("classify", "typed.parquet", *by)[0] == 0
    assert pq.read_schema(tmp_path / "out.parquet").field("when").type == kinds.field("when").type


def test_lines_of_text_and_json_come_from_standard_input(say: Callable[..., Said]):
    by = ("classify", "--examples", "examples.csv", "--examples-text", "review")
    assert say(*by, stdin="aaaaaa\n\nb\n")[1].splitlines()[1:] == ["aaaaaa,long,1.0,0.0", "b,short,0.0,1.0"]
    out = say(*by, "--to", "jsonl", stdin='{"text": "b", "nested": {"x": [1]}}\n')[1]
    assert json.loads(out)["nested"] == {"x": [1]} and json.loads(out)["label"] == "short"
    answer = json.loads(say(*by, "--json", stdin="b\n")[1])
    assert answer["results"][0]["label"] == "short" and answer["receipts"]
    assert say(*by, "--json", "--out", "x.csv", stdin="b\n")[0] == 2


def test_a_context_made_of_a_file_classifies_and_goes_away(say: Callable[..., Said]):
    status, out, _ = say("contexts", "create", "examples.csv", "--text", "review")
    id_, about = out.splitlines()
    assert status == 0 and id_.startswith("ctx-") and "2 examples of long, short" in about
    assert id_ in say("contexts", "list")[1]
    assert "short" in say("classify", "--context", id_, stdin="b\n")[1]
    assert say("contexts", "delete", id_)[:2] == (0, f"{id_}: deleted\n")
    assert say("classify", "--context", id_, stdin="b\n")[0] == 3


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.csv", "", "empty.csv is empty"),
        ("blank.jsonl", " \n ", "blank.jsonl is empty"),
        ("twice.csv", "a,a\n1,2\n", "2 columns are named 'a'"),
        ("other.csv", "text,n\nx,1\n", "other.csv has no column 'review'; there are text, n"),
        ("ragged.csv", "review,n\nx\n", "row 1: 1 values under 2 names"),
        ("quote.csv", 'review\n"x', "quote.csv is no CSV"),
        ("bad.jsonl", "{", "bad.jsonl is neither a JSON array nor JSON lines"),
        ("list.jsonl", "[[1]]", "line 1: an object or a text must be there"),
        ("null.jsonl", '{"review": "x"}\n{"review": null}\n', "line 2: nothing in 'review'"),
        ("number.jsonl", '{"review": 7}\n', "line 1: 7 in 'review', where a text must be"),
        ("latin.csv", b"review\n\xe9\n", "latin.csv is not UTF-8 (byte 7)"),
        ("not.parquet", "review", "not.parquet is no Parquet file"),
        ("what.xlsx", "x", "of what kind? --from says it"),
        ("there.csv", "review,label\nx,y\n", "a column 'label' already; --prefix"),
    ],
)
def test_files_that_cannot_be_classified_are_refused_in_words(
    say: Callable[..., Said], tmp_path: Path, name: str, content: str | bytes, complaint: str
):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, error = say("classify", name, "--text", "review", "--examples", "examples.csv")
    assert (status in (1, 2), out) == (True, "")
    assert complaint in error and "Traceback" not in error


def test_a_file_that_cannot_be_written_says_so_and_leaves_nothing(say: Callable[..., Said], tmp_path: Path):
    by = ("classify", "reviews.csv", "--text", "review", "--examples", "examples.csv", "--out")
    assert "cannot be written" in say(*by, "nowhere/out.csv")[2]
    (tmp_path / "out.csv").mkdir()
    assert say(*by, "out.csv")[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.csv", "out.csv", "reviews.csv"]


def test_what_has_no_answer_is_empty_the_rest_is_written_and_the_status_tells(say: Callable[..., Said], tmp_path: Path):
    (tmp_path / "long.txt").write_text("\n".join(["b", "b", "word " * 9, "b", "aaaa"]))
    by = ("--examples", "examples.csv", "--examples-text", "review", "--batch-size", "2", "--out", "out.csv")
    status, _, error = say("classify", "long.txt", *by)
    assert status == 7 and "3 of 5 items are done and written; items 2 to 3 are not: inputs[2]" in error
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["label"] for row in rows] == ["short", "short", "", "", "long"]


def test_vectors_and_states_go_to_files(say: Callable[..., Said], tmp_path: Path):
    import numpy as np

    assert say("embed", "reviews.csv", "--text", "review", "--out", "v.npy")[0] == 0
    vectors = np.load(tmp_path / "v.npy")
    lines = say("embed", "reviews.csv", "--text", "review")[1].splitlines()
    np.testing.assert_allclose([json.loads(one)["vector"] for one in lines], vectors, rtol=1e-6)
    status, out, _ = say("states", "--model", "tiny", "--layers=0,-1", "--out", "s.parquet", stdin="ab\nc\n")
    assert (status, out) == (0, "s.parquet: 4 states of 2 texts\n")
    assert pq.read_table(tmp_path / "s.parquet")["input"].to_pylist() == [0, 0, 1, 1]


# -- talk --------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_whole_streamed_or_as_json(say: Callable[..., Said]):
    assert say("chat", "hi")[:2] == (0, "hello there\n")
    assert say("chat", "--no-stream", stdin="hi")[:2] == (0, "hello there\n")
    assert json.loads(say("chat", "hi", "--json", "--model", "tiny:maths")[1])["model"] == "tiny:maths"
    assert say("complete", "hi", "--stop", "lo", "--stop", "x")[1] == "hel\n"
    assert say("chat", "hi", "--expert", "nobody")[0] == 3
    assert say("chat", stdin=" ")[0] == 1
    assert "is of a backbone" in say("chat", "hi", "--expert", "a", "--model", "auto")[2]


def test_a_conversation_remembers_and_takes_back_what_was_refused(url: str):
    keyboard, screen = pty.openpty()
    talk = program("--url", url, "--retries", "0", "chat", "--max-tokens", "20", stdin=screen, start_new_session=True)
    os.close(screen)
    os.write(keyboard, b"hi\n/nothing\n/model nobody\nlost\n/model tiny\n/new\nagain\n/quit\n")
    out, error = (one.decode() for one in talk.communicate(timeout=60))
    os.close(keyboard)
    assert talk.returncode == 0, error
    assert out.count("hello there") == 2 and "no model named 'nobody'" in error and "/new begins again" in error


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_every_ending_has_its_status(say: Callable[..., Said], tmp_path: Path, capsysbinary: Any):
    def ends(status: int, code: str = "x") -> int:
        error = {"error": {"message": "no", "type": "x", "param": None, "code": code}}
        with Endpoint(behave=lambda n, body: Http(status, error)) as endpoint:
            return cli.main(["--url", endpoint.url, "--retries", "0", "complete", "x", "--model", "m"])

    found = {status: ends(status) for status in (400, 401, 403, 404, 409, 410, 413, 429, 500, 503, 504)}
    assert found == {400: 1, 401: 6, 403: 6, 404: 3, 409: 1, 410: 3, 413: 1, 429: 4, 500: 1, 503: 4, 504: 4}
    assert "METASEPIA_KEY or --key-file" in capsysbinary.readouterr().err.decode()
    assert cli.main(["--url", f"http://127.0.0.1:{free_port()}", "--retries", "0", "models"]) == 5
    assert "nobody answers" in capsysbinary.readouterr().err.decode()
    with Endpoint() as endpoint:
        assert cli.main(["--url", endpoint.url, "models"]) == 5
    assert "not as a Metasepia server does: 501 text/html" in capsysbinary.readouterr().err.decode()
    assert cli.main(["--url", "localhost:8000", "models"]) == 1
    assert say("models", "--key-file", tmp_path / "none")[0] == 1
    assert set(found.values()) | {0, 2, 5, 7, 130} == set(ENDINGS)


def test_options_of_the_connection_stand_before_or_after_the_verb(url: str, capsysbinary: Any, tmp_path: Path):
    nobody = f"http://127.0.0.1:{free_port()}"
    assert cli.main(["--url", nobody, "models", "--url", url]) == 0
    (tmp_path / "key").write_text("msk_mine\n")
    choice = {"index": 0, "text": "hi", "finish_reason": "stop"}
    answer = {"id": "x", "model": "m", "created": 1, "choices": [choice], "usage": {}}
    with Endpoint(behave=lambda n, body: Http(200, answer)) as endpoint:
        line = [
            "complete",
            "x",
            "--model",
            "m",
            "--no-stream",
            "--url",
            endpoint.url,
            "--key-file",
            str(tmp_path / "key"),
        ]
        assert cli.main(line) == 0
        assert endpoint.requests[0][1]["authorization"] == "Bearer msk_mine"


def test_ctrl_c_ends_with_130_and_without_a_traceback():
    with Endpoint(behave=lambda n, body: Http(delay_s=3.0)) as endpoint:
        asking = program("--url", endpoint.url, "complete", "x", "--model", "m")
        give_up = time.monotonic() + 30
        while not endpoint.requests and time.monotonic() < give_up:
            time.sleep(0.02)
        asking.send_signal(signal.SIGINT)
        _, error = asking.communicate(timeout=10)
    assert asking.returncode == 130 and error == b""


def test_a_reader_that_leaves_is_no_error(url: str, tmp_path: Path):
    (tmp_path / "many.txt").write_text("b\n" * 20_000)
    (tmp_path / "examples.jsonl").write_text('{"text": "aaaa", "label": "x"}\n{"text": "a", "label": "y"}\n')
    with program(
        "--url", url, "classify", str(tmp_path / "many.txt"), "--examples", str(tmp_path / "examples.jsonl")
    ) as writing:  # fmt: skip
        assert writing.stdout is not None and writing.stderr is not None
        writing.stdout.readline()
        writing.stdout.close()
        assert (writing.stderr.read(), writing.wait(60)) == (b"", 0)


# -- help and status ---------------------------------------------------------------------------------------------------


def verbs() -> list[list[str]]:
    """Every line of words that has a help of its own."""
    return [[], *[line.words for line in cli_reference.lines_of(cli.parser()) if not line.is_elsewhere]]


def test_help_of_every_verb_loads_nothing_heavy_and_takes_less_than_half_a_second_of_the_processor():
    heavy = ("torch", "numpy", "pandas", "pyarrow", "httpx", "rich", "ray", "metasepia.client", "asyncio")
    code = f"""
import contextlib, io, json, sys, time
import metasepia.cli as cli
started = time.process_time()
longest = 0.0
for words in {verbs()!r}:
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    longest = max(longest, time.process_time() - begin)
    assert said.getvalue().startswith("usage: metasepia") and len(said.getvalue()) > 60, words
loaded = [one for one in {heavy!r} if one in sys.modules]
print(json.dumps([loaded, started + longest]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, seconds = json.loads(done.stdout)
    assert loaded == [] and seconds < 0.5


def test_the_programs_of_the_repository_are_run_here_and_are_not_there_elsewhere(tmp_path: Path):
    planned = program("plan", "laptop")
    assert planned.wait(60) == 0
    code = "import pathlib, metasepia.cli as c, metasepia.cli_repository as r; r.ROOT = pathlib.Path('/nonexistent')"
    for verb in ("serve", "bench", "doctor"):
        asked = [sys.executable, "-c", f"{code}; raise SystemExit(c.main([{verb!r}, '--help']))"]
        done = subprocess.run(asked, capture_output=True, text=True)
        assert done.returncode == 1 and "is the repository's" in done.stderr


def test_a_status_is_a_page_with_plots_of_the_last_minutes(say: Callable[..., Said]):
    status, out, _ = say("status")
    assert status == 0 and "encoder minilm-fake" in out and "\x1b" not in out
    assert json.loads(say("status", "--json")[1])["version"]
    assert cli_status.sparks([0.0, None, 4.0, 8.0]) == "  ▄█"
    assert len(cli_status.lines({"ready": True, "version": "1", "parts": []}, "http://x")) == 2
