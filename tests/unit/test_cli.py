"""The command `metasepia` against a real door behind a real HTTP server in this process; its parts are small fakes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.door_settings import HttpSettings
from metasepia import cli, shell
from metasepia.embedding import probes
from metasepia.experts.peft_files import CONFIG, WEIGHTS, write_peft
from metasepia.experts.vectors import ExpertVectors
from tests.doors import Bench
from tests.listening import listening
from tests.serving import free_port
from tests.tasks import PROBES, a_task_bench, data_set
from tests.unit.test_gateway_experts import a_lora, an_expert
from tests.unit.test_prompts import write_byte_tokenizer

Said = tuple[int, str, str]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("door")
    bench = Bench(write_byte_tokenizer(home)).with_experts(home / "registry", HttpSettings(max_upload_mib=1.0))
    with listening(bench.app) as url:
        yield url


@pytest.fixture
def say(url: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: object) -> Said:
        status = cli.main(["--url", url, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def expert_directory(path: Path, expert: ExpertVectors, **card: Any) -> Path:
    path.mkdir()
    (path / "expert.safetensors").write_bytes(expert.to_bytes())
    (path / "card.json").write_text(json.dumps(card))
    return path


@pytest.fixture
def tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Said]]:
    """Says things to a door whose part embeds tasks."""
    monkeypatch.setattr(probes, "shipped", lambda: PROBES)
    with listening(a_task_bench(tmp_path).app) as url:

        def run(*arguments: object) -> Said:
            status = cli.main(["--url", url, "tasks", *map(str, arguments)])
            captured = capsys.readouterr()
            return status, captured.out, captured.err

        yield run


def test_tasks_are_added_asked_compared_shown_and_deleted(tasks: Callable[..., Said], tmp_path: Path) -> None:
    for name, examples in (("set", data_set("topic")), ("tones", data_set("tone"))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, examples)))
        assert tasks("add", path, "--name", name)[:2] == (0, f"{name}\n")
    asked = tasks("ask", "tiny", "--name", "prompt", "--template", "{text}?", "--labels", "animal=yes", "tool=no")
    assert asked[:2] == (0, "prompt\n"), asked
    nearest = tasks("nearest", "set", "-k", 1)[1].splitlines()
    assert nearest[0].split() == ["cosine", "id", "kind", "expert"] and nearest[1].split()[1] == "prompt"
    compared = tasks("compare", "set", "tones")[1].splitlines()
    assert compared[1].split()[:2] == ["set", "1.0000"]
    assert [line.split()[0] for line in tasks("list", "--kind", "data_set")[1].splitlines()[1:]] == ["set", "tones"]
    assert tasks("map", "--out", tmp_path / "map.html")[0] == 0 and "tones" in (tmp_path / "map.html").read_text()
    assert tasks("delete", "tones")[:2] == (0, "tones: deleted\n")
    gone = tasks("show", "tones")
    assert gone[0] == 3 and "was deleted" in gone[2]
    refused = tasks("ask", "tiny", "--template", "nothing")
    assert refused[0] == 1 and "prompt.template" in refused[2]
    assert tasks("ask", "tiny", "--template", "{text}", "--labels", "a", "a=b")[0] == 2


def test_an_expert_goes_in_is_shown_replaced_brought_back_and_deleted(say: Callable[..., Said], tmp_path: Path):
    one, two = an_expert(1.25), an_expert(0.75)
    directory = expert_directory(tmp_path / "maths", one, description="sums")
    assert say("experts", "add", "maths", directory) == (0, f"tiny:maths: svf, digest {one.digest}\n", "")
    status, _, error = say("experts", "add", "maths", expert_directory(tmp_path / "other", two))
    assert (status, "replace it with PUT" in error) == (1, True)
    assert "description sums" in " ".join(say("experts", "show", "maths")[1].split())
    assert say("experts", "replace", "maths", tmp_path / "other" / "expert.safetensors")[0] == 0
    listed = say("experts", "list")[1]
    assert two.digest[:12] in listed
    assert one.digest[:12] not in listed
    out = tmp_path / "back"
    assert say("experts", "download", "maths", "--out", out)[0] == 0
    assert (out / "expert.safetensors").read_bytes() == two.to_bytes()
    assert json.loads((out / "card.json").read_text())["digest"] == two.digest
    assert say("experts", "delete", "maths") == (0, "maths: deleted\n", "")
    status, _, error = say("experts", "show", "maths")
    assert (status, "was deleted at" in error) == (3, True)


def test_a_peft_directory_is_one_expert_and_a_pickled_one_is_refused_here(say: Callable[..., Said], tmp_path: Path):
    for name, content in zip((CONFIG, WEIGHTS), write_peft(a_lora(), "tiny"), strict=True):
        (tmp_path / name).write_bytes(content)
    status, out, _ = say("--timeout", 30, "experts", "add", "low", tmp_path, "--json")
    made = json.loads(out)
    assert (status, made["form"], made["rank"]) == (0, "lora", 2)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    status, _, error = say("experts", "add", "low2", tmp_path)
    assert (status, "adapter_model.bin is pickled" in error) == (1, True)


def test_mixtures_are_made_of_weights_listed_shown_and_deleted(say: Callable[..., Said], tmp_path: Path):
    for name, value in (("m1", 1.5), ("m2", 0.5)):
        say("experts", "replace", name, expert_directory(tmp_path / name, an_expert(value)))
    made = say("mixtures", "add", "m1=0.25", "m2=0.5", "base=0.25", "--backbone", "tiny", "--name", "blend")
    assert made == (0, "tiny:mix@blend\n", "")
    assert "blend" in say("mixtures", "list")[1]
    assert an_expert(1.5).digest in say("mixtures", "show", "blend")[1]
    assert say("mixtures", "delete", "blend") == (0, "blend: deleted\n", "")
    status, _, error = say("mixtures", "add", "m1=0.25", "--backbone", "tiny")
    assert (status, "sum to 1" in error) == (1, True)
    assert say("mixtures", "add", "m1=x", "--backbone", "tiny")[0] == 2


def test_a_search_is_waited_for_and_names_the_model_that_it_found(say: Callable[..., Said], tmp_path: Path):
    for name, value in (("s1", 1.5), ("s2", 0.5)):
        say("experts", "replace", name, expert_directory(tmp_path / name, an_expert(value)))
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(4)))
    options = ("--backbone", "tiny", "--experts", "s1,s2", "--shots", 2, "--population", 4, "--generations", 2)
    status, out, error = say("mixtures", "search", examples, *options)
    assert (status, out.startswith("tiny:mix@")) == (0, True), error
    (job,) = json.loads(say("jobs", "list", "--kind", "search", "--json")[1])
    assert (job["name"], job["status"]) == ("mixture search", "succeeded")
    assert f"{job['id']}  search" in say("jobs", "list", "--kind", "search")[1]
    (tmp_path / "bad").write_text("{")
    assert say("mixtures", "search", tmp_path / "bad", "--backbone", "tiny")[0] == 1
    (tmp_path / "none").write_text("[]")
    status, _, error = say("mixtures", "search", tmp_path / "none", "--backbone", "tiny")
    assert (status, "examples: there are none" in error) == (1, True)


def test_what_the_door_refuses_is_said_in_its_words_with_a_status_of_its_kind(
    say: Callable[..., Said], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    status, _, error = say("experts", "add", "big", tmp_path / "big")
    assert (status, "longer than 1 MiB" in error and "413 body_too_large" in error) == (1, True)
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04" + bytes(100))
    status, _, error = say("experts", "add", "x", tmp_path / "pickle.pt")
    assert (status, "only safetensors are read" in error) == (1, True)
    assert say("experts", "add", "../x", expert_directory(tmp_path / "e", an_expert()))[0] == 1
    assert say("experts", "show", "nobody")[0] == 3
    assert say("experts", "add", "x", tmp_path / "nowhere")[0] == 1
    assert cli.main(["--url", f"http://127.0.0.1:{free_port()}", "experts", "list"]) == 5
    assert "nobody answers" in capsys.readouterr().err
    with pytest.raises(SystemExit) as misuse:
        say("experts", "fly")
    assert misuse.value.code == 2


@pytest.mark.parametrize(
    ("value", "said"), [(["infer", "admin"], "infer, admin"), ([], "-"), ([None, 1200], "-, 1,200")]
)
def test_several_values_in_a_cell_are_written_for_people(value: list[Any], said: str):
    assert shell.cell(value, "scopes") == said
