import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from jobs.tasks import Example
from jobs.tasks.base import ListedTask
from jobs.train_experts import main
from jobs.training import TrainingRun, train
from jobs.workbench import Workbench, evaluate, read_labels
from metasepia.dispatch.centroid import TaskCentroid
from metasepia.errors import InvalidSettings, NoLearningSignal, NotSupported
from metasepia.experts.peft_files import CONFIG, WEIGHTS
from metasepia.experts.vectors import ExpertVectors

STEPS = 8
RESULT = ("expert.safetensors", "log.jsonl", "checkpoint.safetensors")
QUICK = ["--valid", "4", "--held-out", "8", "--checkpoint-every", "3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Letters(ListedTask):
    """Rewards the share of ASCII in whatever is said: any model's answers differ in it."""

    max_tokens: int = 2

    def reward(self, answer: str, example: Example) -> float:
        return -1.0 if not answer else 2 * sum(map(str.isascii, answer)) / len(answer) - 1


def _examples(count: int, first: int) -> list[Example]:
    return [Example(prompt=f"Say {i}!", answer=f"a{i}", group=str(i)) for i in range(first, first + count)]


ASCII = Letters(
    name="ascii",
    about="Says ASCII.",
    examples={"train": _examples(8, 0), "valid": _examples(4, 10), "test": _examples(9, 20)},
)
NEVER = dataclasses.replace(ASCII, name="never")
object.__setattr__(NEVER, "reward", lambda answer, example: -1.0)


def arguments(checkpoint: Path, home: Path, out: Path, *more: str) -> list[str]:
    """A run on a tiny random model that takes seconds."""
    where = ["--backbone", str(checkpoint), "--home", str(home), "--out", str(out)]
    return [*where, "--steps", str(STEPS), "--batch", "4", *QUICK, *more]


SFT = ("--task", "desk")
REINFORCE = ("--task", f"{__name__}:ASCII", "--method", "reinforce", "--samples", "2", "--kl", "0.01")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Callable[[str], Path], home: Path) -> Workbench:
    return Workbench.open(str(tiny_checkpoint("llama")), home)


@pytest.fixture(scope="module", params=["sft", "reinforce"])
def whole(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Sequence[str]]:
    """A run that nothing interrupted, and the options that made it."""
    options = {"sft": SFT, "reinforce": REINFORCE}[request.param]
    out = tmp_path_factory.mktemp("whole")
    main(arguments(tiny_checkpoint("llama"), home, out, *options))
    return out, options


def test_a_run_killed_between_steps_goes_on_to_the_same_bytes(
    whole: tuple[Path, Sequence[str]], tiny_checkpoint: Callable[[str], Path], home: Path, tmp_path: Path
) -> None:
    finished, options = whole
    again = arguments(tiny_checkpoint("llama"), home, tmp_path, *options)
    slowly = "import sys, time, metasepia.training.tuning as t; from jobs.train_experts import main\n"
    slowly += "step = t.Trainer._update\n"
    slowly += "t.Trainer._update = lambda *a: (time.sleep(0.3), step(*a))[1]; main(sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", slowly, *again],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        give_up_s = time.monotonic() + 120
        while not (tmp_path / "checkpoint.safetensors").exists():  # written after the third step of eight
            assert child.poll() is None and time.monotonic() < give_up_s
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "expert.safetensors").exists()
    main(again)
    for name in RESULT:
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_leaves_an_expert_with_papers_that_agree_with_it(whole: tuple[Path, Sequence[str]]) -> None:
    out, options = whole
    card = json.loads((out / "card.json").read_text())
    expert = ExpertVectors.from_bytes((out / "expert.safetensors").read_bytes())
    assert card["digest"] == expert.digest
    assert card["parameters"] == 2 * 3 * 48
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == card["steps"] == STEPS
    assert TaskCentroid.of_card(card) is not None
    readme = (out / "README.md").read_text()
    assert f"| {card['held_out']['exact']['base']:.3f} | {card['held_out']['exact']['expert']:.3f} |" in readme
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) not in card["command"] and options[1] in card["command"]
    if "reinforce" in options:
        # Generated by another copy of the model with the vectors as an expert, and read by the one that is trained.
        assert max(entry["off_policy"] for entry in log) < 1e-3
        assert all(entry["kl"] >= 0 for entry in log) and log[-1]["kl"] > 0


def test_rewards_rise_where_answers_are_free(bench: Workbench) -> None:
    run = TrainingRun(task=ASCII, method="reinforce", steps=10, batch=4, samples=8, learning_rate=0.3, valid=0)
    log = train(run, bench, progress=False).log
    mean = [sum(entry["reward"] for entry in part) / 2 for part in (log[:2], log[-2:])]
    assert mean[1] > mean[0] + 0.3


def test_lora_learns_from_rewards_by_the_same_rollouts(bench: Workbench) -> None:
    run = TrainingRun(task=ASCII, method="reinforce", adapter="lora", steps=2, batch=2, samples=2, valid=2)
    log = train(run, bench, progress=False).log
    assert log[1]["largest_change"] > 0 and max(entry["off_policy"] for entry in log) < 1e-3


def test_a_task_that_never_rewards_ends_in_words(bench: Workbench) -> None:
    run = TrainingRun(task=NEVER, method="reinforce", steps=12, batch=4, valid=0, max_flat_batches=3)
    with pytest.raises(NoLearningSignal, match=r"3 batches in a row had the same reward, -1: .*--choice-steps"):
        train(run, bench, progress=False)


def test_lora_is_trained_by_the_same_command_into_a_peft_directory(
    tiny_checkpoint: Callable[[str], Path], home: Path, bench: Workbench, tmp_path: Path
) -> None:
    from peft import PeftModel

    main(arguments(tiny_checkpoint("llama"), home, tmp_path, *SFT, "--adapter", "lora", "--rank", "4"))
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["form"], card["rank"], card["trained_layers"]) == ("lora", 4, 4)
    assert card["parameters"] == 2 * 4 * ((48 + 48) + (48 + 24))
    assert (tmp_path / CONFIG).is_file() and (tmp_path / WEIGHTS).is_file()
    assert "LoRA" in (tmp_path / "README.md").read_text()
    from transformers import AutoModelForCausalLM

    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.prepared.path), str(tmp_path))
    run = TrainingRun(task=_desk(), adapter="lora", rank=4, steps=STEPS, batch=4, valid=0)
    again = train(run, bench, progress=False)
    assert again.adapter.digest == card["digest"]
    prompt = torch.tensor([bench.asker.prompt("Which desk?")])
    with torch.no_grad():
        torch.testing.assert_close(
            peft(input_ids=prompt).logits, again.trainable.model(input_ids=prompt).logits, rtol=1e-4, atol=1e-4
        )


def _desk():
    from jobs.tasks import TASKS

    return TASKS["desk"]


def test_the_model_in_training_and_the_served_expert_answer_alike(bench: Workbench) -> None:
    run = TrainingRun(task=_desk(), steps=6, batch=8, learning_rate=0.05, valid=0, rank=20)
    trained = train(run, bench, progress=False)
    examples = _desk().held_out(24, 0)
    served = evaluate(bench, _desk(), examples, trained.adapter)
    assert served == read_labels(trained.trainable.model, bench.asker, _desk(), examples)
    assert served != evaluate(bench, _desk(), examples, None)


def test_the_best_validation_is_kept_and_patience_ends_a_run(bench: Workbench) -> None:
    # So large a rate that it soon gets worse.
    common = {"task": _desk(), "batch": 8, "learning_rate": 0.5, "valid": 24, "valid_every": 1, "steps": 12}
    last = train(TrainingRun(**common), bench, progress=False)
    kept = train(TrainingRun(**common, keep="best-valid", patience=2), bench, progress=False)
    best = max(value for _, value in kept.validated)
    assert kept.kept_step == next(step for step, value in kept.validated if value == best)
    assert sum(step > kept.kept_step for step, _ in kept.validated) == 2
    assert kept.stopped is not None and kept.steps < last.steps
    assert kept.adapter.digest != last.adapter.digest


@pytest.mark.parametrize(("family", "layers"), [("qwen2", None), ("gpt_neox", ("dense_h_to_4h", "attention.dense"))])
def test_other_families_and_layers_are_trained_too(
    tiny_checkpoint: Callable[[str], Path], home: Path, family: str, layers: tuple[str, ...] | None
) -> None:
    run = TrainingRun(task=_desk(), steps=4, batch=4, valid=0, layers=layers)
    trained = train(run, Workbench.open(str(tiny_checkpoint(family)), home), progress=False)
    assert trained.log[-1]["loss"] < trained.log[0]["loss"]


def test_a_model_with_transposed_weights_is_refused_in_words(home: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests import tiny

    GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=24, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NotSupported, match=r"transposed weight.*torch\.nn\.Linear"):
        train(
            TrainingRun(task=_desk(), layers=("mlp.c_fc",), steps=1),
            Workbench.open(str(tmp_path), home),
            progress=False,
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"samples": 2, "temperature": 0.0}, "samples = 2"),
        ({"baseline": "group"}, "samples = 1"),
        ({"temperature": 3.0}, "from 0 to 2"),
        ({"temperature": float("nan")}, "from 0 to 2"),
        ({"kl": -1.0}, "at least 0"),
        ({"keep": "best-valid", "valid": 0}, "valid = 0"),
        ({"adapter": "lora", "renormalise": True}, "no singular values"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_runs_that_cannot_be_are_refused_in_words(fields: dict, words: str) -> None:
    with pytest.raises(InvalidSettings, match=words):
        TrainingRun(task=_desk(), **fields)
    with pytest.raises(InvalidSettings, match="no labels"):
        TrainingRun(task=ASCII, choice_steps=3)


def test_the_shipped_experts_commands_still_mean_what_their_cards_say(tmp_path: Path) -> None:
    from jobs.train_experts import parsed

    for path in (Path(__file__).parents[2] / "metasepia/assets/experts").glob("*/card.json"):
        card = json.loads(path.read_text())
        words = card["command"].removeprefix("python -m jobs.train_experts ").split()
        _, run = parsed(words)
        for name in ("method", "steps", "batch", "learning_rate", "seed", "renormalise"):
            assert getattr(run, name) == card[name], name
        assert (run.task.name, run.backbone, run.first_block) == (card["task"], card["backbone_source"], 0)
        assert (run.adapter, run.form, run.rank, run.clip, run.schedule) == ("svf", "paper", None, None, "constant")


def test_parity_is_the_references_recipe_but_for_what_is_said() -> None:
    from jobs.train_experts import parsed

    words = ["--task", "desk", "--out", "x", "--method", "reinforce", "--parity", "--kl", "0.1", "--clip", "1"]
    _, run = parsed(words)
    assert (run.temperature, run.baseline, run.form, run.renormalise) == (0.0, "none", "reference", True)
    assert (run.learning_rate, run.clip, run.kl, run.kl_form) == (2e-3, 1.0, 0.1, "reference")
