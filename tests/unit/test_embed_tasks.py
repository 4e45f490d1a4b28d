"""The job that embeds many tasks, with its actors in this process: what it leaves, what it keeps, what fails alone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from transformers import BertConfig, BertModel

from jobs import embed_tasks
from jobs.embedding import actors, pool
from jobs.embedding.files import Answered, RunFiles, from_parquet, to_parquet
from jobs.embedding.progress import Told
from jobs.embedding.still import StillBackbone
from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.errors import CacheFailed
from metasepia.blackbox.meter import Meter
from metasepia.embedding import store
from metasepia.embedding.answers import Answers
from metasepia.errors import CorruptArtefact, InvalidRequest
from metasepia.experts.svf import attach
from metasepia.rows import Row
from tests import tiny
from tests.endpoint import Endpoint, Http

RULES = '''
"""Functions that answer texts; each call leaves a line."""
import pathlib
import numpy as np

def _called(name, texts):
    with (pathlib.Path(__file__).parent / "calls").open("a") as file:
        file.write(f"{name} {len(texts)}\\n")

def question(texts):
    _called("question", texts)
    return ["yes" if "?" in text else "no" for text in texts]

def long(texts):
    _called("long", texts)
    share = np.array([min(0.9, len(text) / 100) for text in texts])
    return np.stack([1 - share, share], axis=1)

def echo(texts):
    _called("echo", texts)
    return [text.split()[0] for text in texts]

def same(texts):
    return ["no" for text in texts]

def broken(texts):
    raise ZeroDivisionError("nothing to divide by")
'''
SPEC = """
title = "A test"
encoder = "encoder"
[probes]
number = 24
[[method]]
name = "agreement"
settings = {{ dims = 128 }}
[[data_set]]
path = "good.csv"
[[data_set]]
path = "one_label.csv"
[[model]]
callable = "{module}:question"
labels = ["no", "yes"]
[[model]]
callable = "{module}:same"
labels = ["no", "yes"]
[[model]]
callable = "{module}:long"
labels = ["no", "yes"]
[[model]]
callable = "{module}:broken"
[[model]]
callable = "{module}:echo"
"""


class Direct:
    """Stands for an actor: calls come back at once. The first `deaths` calls find the process dead."""

    deaths = 0

    def __init__(self, process: Any) -> None:
        self._process = process

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._process, name)

        class Method:
            @staticmethod
            async def remote(*arguments: Any) -> Any:
                if name != "told" and Direct.deaths:
                    Direct.deaths -= 1
                    raise ActorDiedError()
                try:
                    return await asyncio.to_thread(method, *arguments)
                except ZeroDivisionError as error:
                    raise RayTaskError(name, "traceback", error) from error

        return Method


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Actors are objects here; gives how many workers each call of the job asked a cluster for."""
    asked: list[int] = []

    class Cluster:
        def __init__(self, address: str | None, workers: int, gpus: float) -> None:
            asked.append(workers)

        def __enter__(self) -> int:
            return asked[-1]

        def __exit__(self, *_: object) -> None: ...

    def actor_of(process: type) -> Any:
        class Actor:
            @staticmethod
            def options(**options: Any) -> Any:
                return Actor

            @staticmethod
            def remote(*arguments: Any) -> Direct:
                return Direct(process(*arguments))

        return Actor

    monkeypatch.setattr(pool, "cluster", Cluster)
    monkeypatch.setattr(pool.ray, "kill", lambda actor: None)
    monkeypatch.setattr(actors, "AnsweringActor", actor_of(actors.AnsweringProcess))
    monkeypatch.setattr(actors, "EmbeddingActor", actor_of(actors.EmbeddingProcess))
    yield asked
    Direct.deaths = 0


def tiny_encoder(folder: Path) -> None:
    """A text encoder of random weights, one token a byte."""
    if not folder.exists():
        sizes: dict[str, Any] = {
            "vocab_size": tiny.VOCAB_SIZE,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        torch.manual_seed(0)
        BertModel(BertConfig(**sizes, intermediate_size=24, initializer_range=0.3)).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A specification with two data sets, five functions, and what it needs."""
    module = f"rules_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{module}.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [f"{'good' if i % 2 else 'bad'} film number {i},{'yes' if i % 2 else 'no'}" for i in range(30)]
    (tmp_path / "good.csv").write_text("text,label\n" + "\n".join(rows))
    (tmp_path / "one_label.csv").write_text("text,label\nx,1\ny,1\n")
    (tmp_path / "spec.toml").write_text(SPEC.format(module=module))
    tiny_encoder(tmp_path / "encoder")
    return tmp_path


def run(folder: Path, *more: str, out: str = "out") -> int:
    words = [str(folder / "spec.toml"), "--out", str(folder / out), "--home", str(folder / "home"), "--quiet", *more]
    return embed_tasks.main(words)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split("\n")[:-1]


def report(folder: Path, out: str = "out") -> dict[str, Any]:
    return json.loads((folder / out / "report.json").read_text())


def test_every_task_that_can_be_is_embedded_and_the_others_are_told(folder: Path, in_process: list[int], capsys: Any):
    assert run(folder, "--workers", "3") == 1
    assert in_process == [3]
    found = store.read(str(folder / "out" / "embeddings.parquet"))
    assert [(one.name, one.kind) for one in found] == [
        ("good", "data_set"),
        ("question", "model"),
        ("long", "model"),
        ("echo", "model"),
    ]
    assert found[0].source["path"] == "good.csv" and found[1].source["callable"].endswith(":question")
    told = {one["name"]: one for one in report(folder)["tasks"]}
    assert [name for name, one in told.items() if one["status"] == "failed"] == ["one_label", "same", "broken"]
    assert "every text has the label '1'" in told["one_label"]["why"]
    assert "answers every text alike" in told["same"]["why"]
    assert "ZeroDivisionError: nothing to divide by" in told["broken"]["why"]
    said = capsys.readouterr().err
    assert "3 of 7 tasks failed" in said and "failed: broken: ZeroDivisionError" in said
    assert report(folder)["spaces"][0]["count"] == 4
    assert "good" in (folder / "out" / "map.html").read_text()
    assert len(list((folder / "out" / "answers").glob("*.parquet"))) == 5


def test_nothing_is_asked_twice_and_the_bytes_stay(folder: Path, in_process: list[int]):
    run(folder)
    first = (folder / "out" / "embeddings.parquet").read_bytes()
    assert sorted(calls(folder)) == ["echo 24", "long 24", "question 24"]
    (folder / "out" / "embeddings.parquet").unlink()
    assert run(folder, "--workers", "1") == 1
    assert (folder / "out" / "embeddings.parquet").read_bytes() == first
    assert len(calls(folder)) == 3 and report(folder)["this_run"]["tasks_answered_before"] == 5
    parts = list((folder / "out" / "parts").glob("*.parquet"))
    torn = next((folder / "out" / "answers").glob("long-*.parquet"))
    torn.write_bytes(torn.read_bytes()[:-7])
    for part in parts:
        part.unlink()
    run(folder)
    assert calls(folder)[3:] == ["long 24"], "what is torn is asked again, and nothing else"
    assert (folder / "out" / "embeddings.parquet").read_bytes() == first


def test_batches_and_neighbours_leave_the_embeddings_as_they_are(folder: Path, in_process: list[int]):
    run(folder)
    run(folder, "--batch", "2", out="other")
    one, other = (store.read(str(folder / out / "embeddings.parquet")) for out in ("out", "other"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.vector, b.vector, atol=1e-6)


def test_a_function_that_was_changed_is_asked_again(folder: Path, in_process: list[int]):
    run(folder)
    module = next(folder.glob("rules_*.py"))
    module.write_text(module.read_text() + "\n# changed\n")
    run(folder)
    assert len(calls(folder)) == 6


def test_a_process_that_dies_is_replaced_and_one_unit_may_kill_three(folder: Path, in_process: list[int]):
    Direct.deaths = 2
    assert run(folder, "--workers", "1") == 1
    assert [one["status"] for one in report(folder)["tasks"]].count("embedded") == 4
    Direct.deaths = 3
    run(folder, "--workers", "1", out="killed")
    told = report(folder, "killed")["tasks"][0]
    assert told["name"] == "good" and told["status"] == "failed" and "its process died 3 times" in told["why"]
    assert run(folder, out="killed") == 1
    assert report(folder, "killed")["tasks"][0]["status"] == "embedded"


def test_several_methods_leave_a_file_each_and_a_store_takes_all(folder: Path, in_process: list[int]):
    spec = folder / "spec.toml"
    head, _, rest = spec.read_text().partition("[[data_set]]")
    spec.write_text(head + '[[method]]\nname = "fisher"\nsettings = { layers = 1, steps = 2 }\n[[data_set]]' + rest)
    assert run(folder, "--method", "agreement", "--store", str(folder / "store")) == 1
    assert (folder / "out" / "embeddings.parquet").is_file()
    kept = store.EmbeddingStore(str(folder / "store"))
    assert kept.count(kept.spaces()[0].digest) == 4
    run(folder, "--method", "agreement", "--store", str(folder / "store"))
    assert kept.count(kept.spaces()[0].digest) == 4


def test_a_dry_run_says_what_it_would_do_and_does_nothing(folder: Path, in_process: list[int], capsys: Any):
    assert run(folder, "--dry-run") == 0
    assert "2 data sets, 5 models; methods agreement; 0 answered before, 5 to be asked for 24 texts" in (
        capsys.readouterr().out
    )
    assert not (folder / "calls").exists() and not (folder / "out" / "answers").exists()


def test_mistakes_are_refused_before_anything_runs(folder: Path, in_process: list[int], capsys: Any):
    assert run(folder, "--workers", "0") == 2
    spec = folder / "spec.toml"
    whole = spec.read_text()
    for before, after, said in (
        ("dims = 128", "dims = 3", "settings.dims = 3"),
        ("dims = 128", "dim = 128", "settings.dim = 128"),
        (":question", ':question"\nname = "good', "good' is not allowed"),
        ('callable = "rules', 'callable = "absent_rules', "absent_rules"),
        ("good.csv", "absent.csv", "absent.csv"),
    ):
        spec.write_text(whole.replace(before, after, 1))
        assert run(folder) == 2, after
        assert said in capsys.readouterr().err
    assert not (folder / "calls").exists() and in_process == []


# -- endpoints


def endpoint_spec(folder: Path, url: str, more: str = "", key: str = "") -> None:
    tiny_encoder(folder / "encoder")
    (folder / "spec.toml").write_text(
        'title = "Endpoints"\nencoder = "encoder"\n[probes]\nnumber = 16\n'
        f'[[model]]\nname = "served"\nendpoint = "{url}"\nmodel = "tiny-1"\n'
        f'{key}prices = {{ prompt_per_million = 100.0, completion_per_million = 100.0 }}\nway = "sampling"\n'
        "num_samples = 2\nbackoff_s = 0.01\nmax_attempts = 2\n"
        '[[method]]\nname = "agreement"\nsettings = { dims = 64 }\n'
        '[[prompt]]\nname = "a"\ntemplate = "A? {text}"\nlabels = { x = "good", y = "bad" }\n'
        f'[[prompt]]\nname = "b"\ntemplate = "B? {{text}}"\nlabels = {{ x = "good", y = "bad" }}\n{more}'
    )


def test_an_endpoint_is_paid_once_and_its_noise_is_measured(tmp_path: Path, in_process: list[int], capsys: Any):
    with Endpoint() as endpoint:
        endpoint_spec(tmp_path, endpoint.url)
        assert run(tmp_path) == 0
        found = store.read(str(tmp_path / "out" / "embeddings.parquet"))
        assert [one.name for one in found] == ["served/a", "served/b"]
        assert all(one.noise is not None and one.noise > 0 for one in found)
        assert found[0].source["model"] == "tiny-1" and found[0].source["way"] == "sampling"
        assert report(tmp_path)["this_run"]["cost"] > 0
        assert "cost " in capsys.readouterr().out
        asked = len(endpoint.requests)
        assert max(endpoint.answered.values()) == 1
        assert run(tmp_path) == 0
        assert len(endpoint.requests) == asked


def test_an_endpoint_that_refuses_fails_alone_and_goes_on_later(tmp_path: Path, in_process: list[int]):
    broken = [True]

    def behave(count: int, body: dict[str, Any]) -> Http | None:
        refuses = broken[0] and "B?" in json.dumps(body)
        return Http(403, {"error": {"message": "not with this model"}}) if refuses else None

    with Endpoint(behave=behave) as endpoint:
        endpoint_spec(tmp_path, endpoint.url)
        assert run(tmp_path) == 1
        told = report(tmp_path)["tasks"]
        assert [one["status"] for one in told] == ["embedded", "failed"]
        assert "refuses (status 403)" in told[1]["why"] and "not with this model" in told[1]["why"]
        broken[0] = False
        assert run(tmp_path) == 0
        assert max(endpoint.answered.values()) == 1, "what was answered before is not asked again"


def test_a_model_that_is_silent_is_waited_for_once_and_asked_again_by_the_same_command(
    tmp_path: Path, in_process: list[int]
):
    silent = [True]
    with Endpoint(behave=lambda count, body: Http(drop=True) if silent[0] else None) as endpoint:
        endpoint_spec(tmp_path, endpoint.url)
        assert run(tmp_path) == 1
        told = report(tmp_path)["tasks"]
        assert "gave no answer" in told[0]["why"] and told[1]["why"].startswith("not asked: served gave no answer to a")
        assert len(endpoint.requests) == 2, "the attempts of one request"
        silent[0] = False
        assert run(tmp_path) == 0


def test_answers_that_cannot_be_kept_end_the_run(
    tmp_path: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def full(*_: object) -> None:
        raise CacheFailed("answers.sqlite", "cannot be written: the disk is full")

    monkeypatch.setattr(AnswerCache, "put", full)
    with Endpoint() as endpoint:
        endpoint_spec(tmp_path, endpoint.url)
        assert run(tmp_path) == 2
        assert "the disk is full" in capsys.readouterr().err
        assert not any("B?" in json.dumps(body) for _, _, body in endpoint.requests)


def test_a_missing_key_is_told_before_anything_is_asked_and_never_written(
    tmp_path: Path, in_process: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    with Endpoint() as endpoint:
        endpoint_spec(tmp_path, endpoint.url, key='key_env = "EXAMPLE_KEY"\n')
        monkeypatch.delenv("EXAMPLE_KEY", raising=False)
        assert run(tmp_path) == 2
        assert "EXAMPLE_KEY" in capsys.readouterr().err and not endpoint.requests
        monkeypatch.setenv("EXAMPLE_KEY", "sk-very-secret-0123456789")
        assert run(tmp_path) == 0
        assert endpoint.requests[0][1]["authorization"] == "Bearer sk-very-secret-0123456789"
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or b"sk-very-secret" not in path.read_bytes(), path


def test_a_limit_on_cost_stops_what_would_cross_it(tmp_path: Path, in_process: list[int]):
    with Endpoint() as endpoint:
        endpoint_spec(tmp_path, endpoint.url, more="[limits]\nmax_cost = 0.06\n")
        assert run(tmp_path) == 1
        assert report(tmp_path)["this_run"]["cost"] <= 0.06
        assert any("max_cost" in one.get("why", "") for one in report(tmp_path)["tasks"])


# -- files


@pytest.mark.parametrize("kind", ["exact", "sampled", "open"])
def test_answers_come_back_as_they_were_kept(kind: str):
    texts = ("one", "two", "thrée")
    answers = {
        "exact": Answers.of_labelled(texts, ["a", "b", "a"]),
        "sampled": Answers.of_counts(texts, ["b", "a"], np.array([[3.0, 1], [0, 4], [2, 2]])),
        "open": Answers.of_replies(texts, ["x", "y", ""]),
    }[kind]
    content = to_parquet(Answered(answers=answers, source={"way": "sampling", "n": 4}), "k" * 64)
    found = from_parquet(content, "k" * 64)
    assert found.answers.digest == answers.digest and found.source == {"way": "sampling", "n": 4}
    assert to_parquet(found, "k" * 64) == content
    with pytest.raises(CorruptArtefact, match="key kkkk"):
        from_parquet(content, "j" * 64)


def test_a_batch_counts_only_when_it_is_whole(tmp_path: Path):
    files = RunFiles(str(tmp_path))
    assert files.embedded("part") is None
    files.keep_embedded("part", [], {"a": "why"})
    assert files.embedded("part") == ([], {"a": "why"})
    (tmp_path / "parts" / "part.json").write_text('{"count": 2, "refused": {}}')
    assert files.embedded("part") is None
    (tmp_path / "parts" / "part.json").write_text('{"count": ')
    assert files.embedded("part") is None


def test_told_counts_what_is_at_work_once(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("jobs.embedding.progress.time.monotonic", lambda: now[0])
    meter = Meter()
    told = Told(tasks=3, texts=200, embeddings=3, meter=meter)
    told.estimate = 0.5
    told.live["a"] = 50, 400
    now[0] = 10.0
    assert str(told) == (
        "answers 0/3 tasks, 50/200 texts, 5.0 a second, 400 tokens, 0.5 min left, cost 0.0000 of at most 0.5000, "
        "embeddings 0/3"
    )
    told.finish("a", 100, 800)
    meter.prompt_tokens, meter.cost = 100, 0.1
    assert (told.texts_now, told.tokens) == (100, 900)
    assert "cost 0.1000 of at most 0.5000" in str(told)


# -- a backbone on a clock that stands still


def test_rows_asked_for_in_one_order_have_the_same_bits_each_time_and_errors_reach_who_asked():
    rows = [
        Row(request_id=str(i), backbone="b" * 64, token_ids=tuple(range(1, 4 + i * 3)), score_from=1) for i in range(9)
    ]

    async def ask(backbone: StillBackbone, slow: bool) -> list[bytes]:
        async def one(row: Row) -> bytes:
            return (await backbone.score(row)).logprobs.tobytes()

        if slow:
            await asyncio.sleep(0.05)
        return list(await asyncio.gather(*map(one, rows)))

    model = tiny.llama()
    layers = attach(model, backbone="b" * 64)

    def backbone() -> StillBackbone:
        return StillBackbone(model, tiny.prepared(), layers)

    first = asyncio.run(ask(backbone(), slow=False))
    assert asyncio.run(ask(backbone(), slow=True)) == first
    alone = asyncio.run(backbone().score(rows[4])).logprobs
    np.testing.assert_allclose(np.frombuffer(first[4], alone.dtype), alone, atol=1e-5)
    with pytest.raises(InvalidRequest):
        asyncio.run(backbone().score(Row(request_id="x", backbone="b" * 64, token_ids=(1,), score_from=5)))

    failing = backbone()
    failing._scheduler._run = lambda plan: (_ for _ in ()).throw(RuntimeError("the decoder broke"))
    with pytest.raises(RuntimeError, match="the decoder broke"):
        asyncio.run(failing.score(rows[0]))
    assert not torch.is_inference_mode_enabled()
