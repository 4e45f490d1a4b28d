"""The stage `task` of `auto` at the door: data sets registered in a real registry, a pretended encoder of two axes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.messages import Media, Texts
from metasepia.dispatch.task import KEY, TextRegion
from metasepia.errors import Overloaded
from metasepia.registry.entries import LOCAL
from tests.doors import Bench
from tests.unit.test_gateway_auto import LAW, MATHS, ROUTER, an_expert, auto, put
from tests.unit.test_prompts import write_byte_tokenizer

ENCODER = "f" * 64
SHORT, LONG, BETWEEN = "abc", "a" * 20, "a" * 7
"""The encoder's vector is the text's length beside 1."""


def region(length: int, encoder: str = ENCODER, threshold: float = 0.999) -> dict[str, Any]:
    """Of texts about so long."""
    centre = np.array([[length, 1.0]], np.float32) / np.hypot(length, 1)
    return {KEY: TextRegion(encoder=encoder, centroids=centre, held_out=np.full(99, threshold)).to_card()}


def register(bench: Bench, name: str, expert: str | None, **card: Any) -> None:
    facts: dict[str, object] = {"status": "done", "kind": "data_set", "expert": expert, **card}
    digest = f"{len(bench.real.registry.list('embedding', LOCAL)):064x}"
    bench.real.registry.put(
        "embedding", b"vector of " + name.encode(), digest=digest, name=name, owner=LOCAL, card=facts
    )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_experts(tmp_path / "registry")
    put(made, "maths", MATHS)
    put(made, "law", LAW)
    register(made, "sums", "maths", **region(3))
    register(made, "contracts", "law", **region(20))
    made.says("x")
    return made


@pytest.fixture(autouse=True)
def settings_ask_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door's own chain has the stage, as a deployment's would."""
    opened = Bench._open

    def with_task(self: Bench, *args: Any, **kwargs: Any) -> None:
        opened(self, *args, **{"dispatch": ("task",), **kwargs})

    monkeypatch.setattr(Bench, "_open", with_task)


def asked(bench: Bench, text: str) -> tuple[str, str, float]:
    answer = auto(bench, "task", messages=[{"role": "user", "content": text}])
    return answer["model"], answer["receipt"]["dispatch"], answer["receipt"]["margin"]


def test_the_data_set_that_a_message_could_be_of_names_the_expert_and_the_receipt_the_stage(bench: Bench) -> None:
    model, stage, margin = asked(bench, SHORT)
    assert (model, stage) == ("tiny:maths", "task") and margin == pytest.approx(0.001, abs=2e-4)
    assert asked(bench, LONG)[0] == "tiny:law"
    assert [row.want for row in bench.backbone.rows] == ["tokens", "tokens"]


def test_a_message_of_no_data_set_is_answered_by_the_base(bench: Bench) -> None:
    model, stage, margin = asked(bench, "ab")  # shorter than any
    assert (model, stage) == ("tiny", "abstained") and margin < 0


def test_of_a_conversation_the_last_message_by_its_user_is_read(bench: Bench) -> None:
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "yes"}]
    answer = auto(bench, "task", messages=[*messages, {"role": "user", "content": SHORT}])
    assert answer["model"] == "tiny:maths"


def test_a_message_beyond_the_encoders_window_is_left_to_the_next_stage(bench: Bench) -> None:
    assert asked(bench, " ".join(["a"] * 9)) == ("tiny", "abstained", 0)  # its window is 8 words
    assert asked(bench, " ".join(["ab"] * 7))[0] == "tiny:law"


def test_a_plain_completion_is_not_read(bench: Bench) -> None:
    body = {"model": "auto", "prompt": SHORT, "max_tokens": 4, "dispatch": ["task"]}
    assert bench.post("/v1/completions", body).json()["receipt"]["dispatch"] == "abstained"
    assert bench.encoder.texts == []


def test_two_experts_about_as_near_are_none(bench: Bench) -> None:
    register(bench, "other-sums", "law", **region(4, threshold=0.9))
    assert asked(bench, SHORT)[:2] == ("tiny", "abstained")
    bench.real.registry.delete("embedding", "other-sums", LOCAL)
    assert asked(bench, SHORT)[0] == "tiny:maths"


def test_a_data_set_follows_the_name_of_its_expert_and_chooses_nothing_without_one(bench: Bench) -> None:
    better = an_expert(1.7)
    put(bench, "maths", better)
    answer = auto(bench, "task", messages=[{"role": "user", "content": SHORT}])
    assert answer["receipt"]["adapter"] == [[better.digest, 1.0]]
    bench.real.registry.delete("expert", "maths", LOCAL)
    assert asked(bench, SHORT)[:2] == ("tiny", "abstained")
    assert asked(bench, LONG)[0] == "tiny:law"


def test_an_experts_own_card_may_say_where_its_texts_lie(bench: Bench) -> None:
    assert asked(bench, BETWEEN)[0] == "tiny"
    put(bench, "law", LAW, **region(7, threshold=0.9995))
    assert asked(bench, BETWEEN)[0] == "tiny:law"


@pytest.mark.parametrize(
    ("expert", "card"),
    [
        ("maths", {"status": "running", **region(7)}),
        ("maths", {"status": "failed", **region(7)}),
        ("maths", region(7, encoder="0" * 64)),
        ("maths", {KEY: {"centroids": "broken"}}),
        ("maths", {}),
        ("foreign", region(7)),
        ("router", region(7)),
        (None, region(7)),
    ],
    ids=["running", "failed", "another encoder", "broken", "no region", "unknown", "a dispatcher", "no expert"],
)
def test_what_cannot_be_used_is_left_out_and_the_others_choose(
    bench: Bench, expert: str | None, card: dict[str, Any]
) -> None:
    put(bench, "router", ROUTER, dispatcher={"prompt": "{text}?", "labels": {"m": "maths", "o": None}})
    register(bench, "more", expert, **card)
    assert asked(bench, BETWEEN)[:2] == ("tiny", "abstained")
    assert asked(bench, SHORT)[0] == "tiny:maths"


def test_it_is_asked_in_its_turn(bench: Bench) -> None:
    bench.says("\\boxed{law}")
    put(bench, "law", LAW, description="Reads contracts.")
    messages = [{"role": "user", "content": SHORT}]
    assert auto(bench, "task", "prompt", messages=messages)["model"] == "tiny:maths"
    assert auto(bench, "centroid", "task", messages=messages)["receipt"]["dispatch"] == "task"


def test_an_encoder_that_is_full_is_told_and_not_routed_around(bench: Bench) -> None:
    async def full(items: Texts | Media) -> Any:
        raise Overloaded("the queue of encoder minilm-fake", 3.0)

    bench.encoder.embed = full
    response = bench.chat(model="auto", dispatch=["task"], messages=[{"role": "user", "content": SHORT}])
    assert response.status_code == 429 and response.headers["retry-after"] == "3"


def test_auto_is_listed_while_there_is_a_data_set_to_choose_by(bench: Bench) -> None:
    def is_listed() -> bool:
        return "auto" in [one["id"] for one in bench.get("/v1/models").json()["data"]]

    assert is_listed()
    for name in ("sums", "contracts"):
        bench.real.registry.delete("embedding", name, LOCAL)
    assert not is_listed()
    assert bench.chat(model="auto").status_code == 404


def test_regions_are_not_read_out_in_lists(bench: Bench) -> None:
    put(bench, "law", LAW, description="Reads contracts.", **region(7))
    listed = {one["id"]: one for one in bench.get("/v1/models").json()["data"]}
    assert listed["tiny:law"]["x_info"]["card"]["description"] and KEY not in listed["tiny:law"]["x_info"]["card"]
