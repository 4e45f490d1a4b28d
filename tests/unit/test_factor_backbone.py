"""The command that factors a backbone: it makes what serving looks for, and goes on after it was ended."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import factor_backbone
from metasepia.experts.factors import SingularFactors
from metasepia.models import checkpoints
from serve.experts.accepting import find_index


def run(directory: Path, home: Path, *more: str) -> int:
    return factor_backbone.main(["--backbone", str(directory), "--home", str(home), "--layers", "mlp.up_proj", *more])


def test_an_ended_run_says_so_and_the_next_one_finishes_it(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[object] = []
    of = SingularFactors.of

    def ended_at_the_second(weight: object) -> SingularFactors:
        made.append(weight)
        if len(made) == 2:
            raise KeyboardInterrupt
        return of(weight)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(SingularFactors, "of", ended_at_the_second)
    assert run(tiny_checkpoint("llama"), tmp_path, "--rank", "4") == 130
    assert "goes on after them" in capsys.readouterr().err
    assert run(tiny_checkpoint("llama"), tmp_path, "--rank", "4") == 0
    said = capsys.readouterr().out
    assert "2 layers, the leading 4 singular vectors, 96 singular values" in said and ".r4.safetensors" in said
    assert len(made) == 3


@pytest.mark.parametrize(("rank", "problem"), [("-1", "--rank = -1"), ("0", "existing Hugging Face directory")])
def test_what_cannot_be_is_refused_in_words(
    rank: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", tmp_path, "--rank", rank) == 1
    assert problem in capsys.readouterr().err


def test_serving_finds_the_factors_of_its_rank_and_of_a_smaller_one(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    assert run(tiny_checkpoint("llama"), tmp_path, "--rank", "8") == 0
    backbone = checkpoints.prepare(str(tiny_checkpoint("llama")), tmp_path).digest
    found = {rank: find_index(backbone, ("mlp.up_proj",), tmp_path, rank) is not None for rank in (0, 3, 8, 9)}
    assert found == {0: False, 3: True, 8: True, 9: False}
