"""Where the shipped experts' texts lie: that the regions in their cards choose unseen prompts, and who makes them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs import describe_expert
from jobs.describe_expert import ENCODER
from jobs.tasks import general, make
from jobs.tasks.desk import DESK
from jobs.workbench import HELD_OUT_SEED
from metasepia.dispatch.task import KEY, RegionTable, TextRegion
from metasepia.encoders import TextEncoder
from metasepia.errors import InvalidSettings
from metasepia.experts.shipped import CARD, EXPERTS, card_of

SHIPPED = ("desk", "sentiment", "support")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load(ENCODER)


@pytest.fixture(scope="module")
def table(encoder: TextEncoder) -> RegionTable:
    regions = {name: TextRegion.of_card(card_of(EXPERTS / name), name) for name in SHIPPED}
    found = [(name, one) for name, one in regions.items() if one is not None]
    made = RegionTable(encoder.digest, found, level=0.05, margin=0.02)
    assert len(made) == len(SHIPPED)
    return made


@pytest.mark.parametrize("name", SHIPPED)
def test_prompts_of_unseen_stems_and_templates_are_sent_to_their_expert_and_to_no_other(
    name: str, encoder: TextEncoder, table: RegionTable
) -> None:
    prompts = [one.prompt for one in make(name).held_out(24, HELD_OUT_SEED)]
    chosen = [table.choose(one).expert for one in encoder.embed(prompts)]
    assert chosen.count(name) >= 19 and set(chosen) <= {name, None}


def test_general_prompts_are_left_to_the_base(encoder: TextEncoder, table: RegionTable) -> None:
    chosen = [table.choose(one).expert for one in encoder.embed(general.HELD_OUT)]
    assert chosen.count(None) >= 19


def test_the_job_writes_the_region_into_the_card_and_leaves_the_rest_as_it_was(
    tmp_path: Path, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoder, "load", lambda *_: encoder)
    folder = shutil.copytree(EXPERTS / "desk", tmp_path / "desk")
    before = json.loads((folder / CARD).read_text())
    describe_expert.main([str(folder), "--prompts", "24", "--seed", "1"])
    after = json.loads((folder / CARD).read_text())
    assert {key: after[key] for key in after if key != KEY} == {key: before[key] for key in before if key != KEY}
    region = TextRegion.of_card(after)
    assert region is not None and len(region.held_out) <= 24 < len(card_of(EXPERTS / "desk")[KEY]["held_out"])
    describe_expert.main([str(folder), "--prompts", "24", "--seed", "1"])
    assert json.loads((folder / CARD).read_text()) == after


def test_the_shipped_region_is_the_jobs(encoder: TextEncoder) -> None:
    made = describe_expert.region_of(DESK, encoder, 384, 0)
    shipped = TextRegion.of_card(card_of(EXPERTS / "desk"))
    assert shipped is not None and shipped.encoder == made.encoder
    np.testing.assert_allclose(shipped.held_out, made.held_out, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "holds no expert.safetensors"),
        ([str(EXPERTS / "dispatch")], "nothing is routed to it"),
        ([str(EXPERTS / "desk"), "--prompts", "3"], "must be 19 or more"),
    ],
)
def test_what_cannot_be_described_is_refused(
    arguments: list[str],
    says: str,
    encoder: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(TextEncoder, "load", lambda *_: encoder)
    with pytest.raises(SystemExit):
        describe_expert.main(arguments)
    assert says in capsys.readouterr().err


def test_a_validation_split_too_small_for_a_level_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(InvalidSettings, match="19 validation prompts or more"):
        describe_expert.region_of(DESK, encoder, 12, 0)
