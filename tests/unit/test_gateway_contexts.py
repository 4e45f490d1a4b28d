"""Named contexts at the door: what is made, found, refused, and told of it."""

import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from actors.messages import Build, Classify
from cluster.door_settings import HttpSettings
from metasepia.reasoning.named import EmbeddedContext
from tests.doors import DIGEST, HTTP, OTHER, Bench
from tests.unit.test_prompts import write_byte_tokenizer

UNKNOWN = "ctx-" + "0" * 64
EXAMPLES = [
    {"text": "a", "label": "short"},
    {"text": "a" * 40, "label": "long"},
    {"text": "b" * 50, "label": "long"},
]
VECTORS = [{"vector": [1.0, 0.0], "label": "x"}, {"vector": [0, 1], "label": "y"}]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(write_byte_tokenizer(tmp_path)).with_contexts(tmp_path / "registry")


def make(bench: Bench, **body: Any) -> dict[str, Any]:
    response = bench.post("/v1/contexts", {"examples": EXAMPLES} | body)
    assert response.status_code == 200, response.text
    return response.json()


def classify(bench: Bench, id_: str, inputs: Any = ("c" * 39, "cc"), **more: Any) -> dict[str, Any]:
    response = bench.post("/v1/classify", {"model": id_, "inputs": list(inputs)} | more)
    assert response.status_code == 200, response.text
    return response.json()


def refused(bench: Bench, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    response = bench.post(path, body)
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_context_is_made_once_and_answers_inputs_alone(bench: Bench):
    made = make(bench)
    assert (made["object"], made["classes"], made["num_examples"]) == ("context", ["long", "short"], 3)
    assert (made["encoder"], made["module"], made["protocol"]) == ("minilm-fake", "nearest", "stream")
    assert made["self_check"] == {"accuracy": 0.75, "left_out": 3, "method": "leave-one-out"}
    assert not made["cached"] and made["build_ms"] > 0
    bench.encoder.texts.clear()
    answer = classify(bench, made["id"])
    assert bench.encoder.texts == ["c" * 39, "cc"]
    assert [one["label"] for one in answer["results"]] == ["long", "short"]
    digests = {"context": made["id"][4:], "module": "d" * 64, "encoder": OTHER}
    for receipt in (made["receipt"], answer["receipt"]):
        assert {name: receipt[name] for name in digests} == digests
    assert answer["model"] == made["id"]


def test_the_same_examples_in_another_order_are_the_same_context_and_nothing_is_computed_again(bench: Bench):
    made = make(bench, unlabelled=["u", "v"])
    bench.encoder.texts.clear()
    again = make(bench, examples=EXAMPLES[::-1], unlabelled=["v", "u"])
    assert (again["id"], again["cached"]) == (made["id"], True)
    assert again["self_check"] == made["self_check"] and again["receipt"]["context"] == made["id"][4:]
    assert bench.encoder.texts == [] and len(bench.reasoning.asked) == 1
    assert make(bench)["id"] != made["id"]  # unlabelled texts are part of it


def test_a_context_is_in_the_registry_with_its_vectors_before_it_is_acknowledged(bench: Bench):
    made = make(bench, unlabelled=["u"])
    assert bench.catalogue.registry is not None
    stored = EmbeddedContext.from_bytes(bench.catalogue.registry.get(made["id"][4:]), made["id"][4:])
    assert stored.vectors.shape == (3, 2) and stored.unlabelled is not None
    for example, vector in zip(stored.named.examples, stored.vectors, strict=True):
        assert vector[0] / vector[1] == pytest.approx(len(example.content))


def test_a_self_check_without_time_is_null(bench: Bench):
    bench.reasoning.has_time = False
    assert make(bench)["self_check"] is None and make(bench)["cached"]


def test_one_that_cannot_be_built_is_not_registered(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    async def fail(_: Build) -> None:
        raise MemoryError

    monkeypatch.setattr(bench.reasoning, "build", fail)
    assert bench.post("/v1/contexts", {"examples": EXAMPLES}).status_code == 500
    assert bench.get("/v1/contexts").json()["data"] == []


def test_the_receipt_of_examples_in_the_request_names_the_context_that_they_would_be(bench: Bench):
    body = {"examples": EXAMPLES, "inputs": ["c"], "unlabelled": ["u"], "seed": 3}
    answer = bench.post("/v1/classify", body).json()
    made = make(bench, unlabelled=["u"], seed=3)
    assert answer["receipt"]["context"] == made["id"][4:]
    asked = bench.reasoning.asked[0]
    assert isinstance(asked, Classify) and not isinstance(asked.context, str)
    assert asked.context.unlabelled is not None and asked.context.seed == 3


def test_contexts_are_models_and_can_be_listed_by_pages_and_had_one_by_one(bench: Bench):
    ids = sorted(make(bench, seed=seed)["id"] for seed in range(3))
    listed = {one["id"]: one for one in bench.get("/v1/models").json()["data"]}
    assert list(listed)[-3:] == ids
    info = listed[ids[0]]["x_info"]
    assert (info["kind"], info["classes"], info["num_examples"]) == ("context", ["long", "short"], 3)
    assert info["encoder"] == {"id": "minilm-fake", "digest": OTHER}
    assert bench.get(f"/v1/models/{ids[0]}").json() == listed[ids[0]]
    first = bench.get("/v1/contexts?limit=2").json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = bench.get(f"/v1/contexts?limit=2&after={first['last_id']}").json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2:], False)
    assert bench.get(f"/v1/contexts/{ids[0]}").json() == first["data"][0]


def test_examples_are_told_in_the_order_that_explanations_number_them(bench: Bench):
    made = make(bench)
    page = bench.get(f"/v1/contexts/{made['id']}/examples?limit=2").json()
    rest = bench.get(f"/v1/contexts/{made['id']}/examples?begin=2").json()
    assert (page["has_more"], rest["has_more"]) == (True, False)
    told = page["data"] + rest["data"]
    assert [one["example"] for one in told] == [0, 1, 2]
    assert sorted((one["text"], one["label"]) for one in told) == sorted((e["text"], e["label"]) for e in EXAMPLES)
    explained = classify(bench, made["id"], explain=True)["results"][0]["explain"]
    assert [(one["example"], one["text"]) for one in explained["influence"]] == [
        (one["example"], one["text"]) for one in told
    ]


def test_more_examples_make_another_context_and_only_they_are_embedded(bench: Bench):
    whole = make(bench)
    part = make(bench, examples=EXAMPLES[:2], unlabelled=[])
    bench.encoder.texts.clear()
    grown = bench.post(f"/v1/contexts/{part['id']}/examples", {"examples": EXAMPLES[2:]}).json()
    assert (grown["id"], grown["cached"]) == (whole["id"], True)
    more = [{"text": "new " * 3, "label": "new"}]
    third = bench.post(f"/v1/contexts/{whole['id']}/examples", {"examples": more}).json()
    assert bench.encoder.texts == ["new " * 3]
    assert (third["classes"], third["num_examples"], third["cached"]) == (["long", "new", "short"], 4, False)
    assert third["id"] == make(bench, examples=[*more, *EXAMPLES])["id"]
    assert classify(bench, third["id"], ["new " * 3])["results"][0]["label"] == "new"


def test_more_examples_are_checked_as_the_first_were_and_together_with_them(tmp_path: Path):
    http = HttpSettings(max_examples=256, max_classes=3)
    bench = Bench(write_byte_tokenizer(tmp_path), http).with_contexts(tmp_path / "registry")
    path = f"/v1/contexts/{make(bench, examples=[*EXAMPLES, {'text': 'x', 'label': 'é'}])['id']}/examples"
    cases: list[tuple[list[Any], str, str]] = [
        ([], "examples", "there are none"),
        ([{"text": "y", "label": "short"}, {"text": "y", "label": "e\u0301"}], "examples[1].label", "two spellings"),
        ([{"text": "y", "label": "new"}], "examples", "at most 3 (http.max_classes)"),
        ([{"text": f"y {i}", "label": "short"} for i in range(253)], "examples", "257 are too many"),
        ([{"vector": [1], "label": "short"}], "examples[0].vector", "vector among text"),
    ]
    for examples, param, says in cases:
        error = refused(bench, path, {"examples": examples})
        assert (error["param"], says in error["message"]) == (param, True), error


def test_an_unknown_context_is_a_404_and_a_deleted_one_a_410_until_it_is_made_again(bench: Bench):
    made = make(bench)
    path = f"/v1/contexts/{made['id']}"
    gone = bench.delete(path).json()
    assert (gone["id"], gone["deleted"]) == (made["id"], True)
    assert bench.delete(path).json() == gone
    for response in (
        bench.get(path),
        bench.get(f"/v1/models/{made['id']}"),
        bench.post("/v1/classify", {"model": made["id"], "inputs": ["x"]}),
        bench.post(f"{path}/examples", {"examples": EXAMPLES}),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (410, "deleted")
        assert "was deleted at 20" in response.json()["error"]["message"]
    assert made["id"] not in [one["id"] for one in bench.get("/v1/models").json()["data"]]
    again = make(bench)
    assert (again["id"], again["cached"]) == (made["id"], False)
    for name in (UNKNOWN, "ctx-12", "minilm-fake"):
        error = refused(bench, "/v1/classify", {"model": name, "inputs": ["x"]}, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert f"known: {made['id']}" in error["message"]
    assert bench.delete(f"/v1/contexts/{UNKNOWN}").status_code == 404
    assert bench.get(f"/v1/contexts/{UNKNOWN}").status_code == 404


def test_a_context_of_another_encoder_backbone_or_module_is_a_409_that_names_both(bench: Bench):
    by_encoder, by_backbone, by_vectors = make(bench), make(bench, encoder="tiny"), make(bench, examples=VECTORS)
    bench.encoder.digest = "1" * 64
    error = refused(bench, "/v1/classify", {"model": by_encoder["id"], "inputs": ["x"]}, 409)
    assert error["code"] == "outdated"
    assert "encoder minilm-fake (ffffffffffff)" in error["message"]
    assert "minilm-fake (111111111111)" in error["message"] and "create it again" in error["message"]
    assert not bench.get(f"/v1/contexts/{by_encoder['id']}").json()["usable"]
    assert make(bench)["id"] != by_encoder["id"]
    classify(bench, by_backbone["id"])
    bench.backbone.prepared = dataclasses.replace(bench.backbone.prepared, digest=OTHER)
    refused(bench, f"/v1/contexts/{by_backbone['id']}/examples", {"examples": EXAMPLES}, 409)
    classify(bench, by_vectors["id"], [{"vector": [1, 2]}])
    bench.reasoning.modules = bench.reasoning.modules[1:]
    error = refused(bench, "/v1/classify", {"model": by_vectors["id"], "inputs": [{"vector": [1, 2]}]}, 409)
    assert "reasoning module nearest (dddddddddddd), and this server has paper" in error["message"]


def test_a_backbone_and_another_module_can_be_named(bench: Bench):
    made = make(bench, encoder="tiny", module="paper")
    assert (made["encoder"], made["module"], made["receipt"]["backbone"]) == ("tiny", "paper", DIGEST)
    assert made["receipt"]["module"] == "9" * 64
    error = refused(bench, "/v1/contexts", {"examples": EXAMPLES, "module": "none"}, 404)
    assert error["param"] == "module" and "known: default, nearest, paper" in error["message"]
    assert refused(bench, "/v1/contexts", {"examples": EXAMPLES, "encoder": "no"}, 404)["param"] == "encoder"
    assert refused(bench, "/v1/contexts", {"examples": EXAMPLES, "protocol": "loo"})["param"] == "protocol"


def test_vectors_need_no_encoder_and_nothing_is_embedded(bench: Bench):
    made = make(bench, examples=VECTORS, unlabelled=[{"vector": [3, 4]}])
    assert (made["encoder"], made["input"], made["width"]) == (None, "vector", 2)
    answer = classify(bench, made["id"], [{"vector": [5, 1]}, {"vector": [0, 0.5]}])
    assert [one["label"] for one in answer["results"]] == ["x", "y"]
    assert answer["receipt"]["encoder"] is None and bench.encoder.texts == []
    body = {"examples": VECTORS, "inputs": [{"vector": [5, 1]}], "unlabelled": [{"vector": [3, 4]}]}
    answer = bench.post("/v1/classify", body).json()
    assert answer["results"][0]["label"] == "x" and answer["receipt"]["context"] == made["id"][4:]


def test_vectors_of_unequal_width_are_refused_by_their_field(bench: Bench):
    made = make(bench, examples=VECTORS)
    three = {"vector": [1, 2, 3]}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/contexts", {"examples": [*VECTORS, three | {"label": "x"}]}, "examples[2].vector"),
        ("/v1/contexts", {"examples": VECTORS, "unlabelled": [three]}, "unlabelled[0].vector"),
        ("/v1/classify", {"examples": VECTORS, "inputs": [three]}, "inputs[0].vector"),
        ("/v1/classify", {"model": made["id"], "inputs": [three]}, "inputs[0].vector"),
        ("/v1/classify", {"model": made["id"], "inputs": [{"vector": [1, 2]}, three]}, "inputs[1].vector"),
        (f"/v1/contexts/{made['id']}/examples", {"examples": [three | {"label": "x"}]}, "examples[0].vector"),
    ]
    for path, body, param in cases:
        error = refused(bench, path, body)
        assert (error["param"], "3 numbers" in error["message"]) == (param, True), error


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e39"])
def test_numbers_that_are_not_finite_are_refused_by_their_field(bench: Bench, number: str):
    body = '{"examples": [{"vector": [1, 0], "label": "x"}, {"vector": [0, NUMBER], "label": "y"}]}'
    response = bench.run(lambda client: client.post("/v1/contexts", content=body.replace("NUMBER", number)))
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("examples[1].vector")


@pytest.mark.parametrize(
    ("examples", "param", "says"),
    [
        ([{"text": "x", "label": "a"}, {"text": "y", "label": "a"}], "examples", "every example carries the label 'a'"),
        ([{"text": "x", "label": "a"}], "examples", "give examples of two labels or more"),
        ([], "examples", "there are none"),
        ([{"text": str(i), "label": "ab"[i % 2]} for i in range(10_000)], "examples", "this server takes 4096"),
        ([{"text": "x" * 100_000, "label": "a"}], "examples[0].text", "100000 characters; at most 50000"),
        ([{"text": "w " * 9, "label": "a"}, {"text": "y", "label": "b"}], "examples[0].text", "do not fit the window"),
        ([{"text": "x", "label": "e\u0301"}, {"text": "y", "label": "\u00e9"}], "examples[1].label", "two spellings"),
        ([{"text": "x", "label": "a"}, {"vector": [1], "label": "b"}], "examples[1].vector", "vector among text"),
        ([{"image": base64.b64encode(b"png").decode(), "label": c} for c in "ab"], None, "not supported"),
    ],
    ids=["one class", "one", "none", "10,000", "100,000 characters", "window", "spellings", "mixed", "image"],
)
def test_examples_that_are_no_context_are_refused_in_both_routes_alike(tmp_path, examples, param, says):
    bench = Bench(write_byte_tokenizer(tmp_path), HttpSettings(max_body_mib=8)).with_contexts(tmp_path / "registry")
    for path, rest in (("/v1/contexts", {}), ("/v1/classify", {"inputs": [_like(examples)]})):
        error = refused(bench, path, {"examples": examples} | rest)
        assert says in error["message"] and (param is None or error["param"] == param), error


def _like(examples: list[dict[str, Any]]) -> Any:
    return {"image": examples[0]["image"]} if examples and "image" in examples[0] else "x"


def test_two_examples_and_one_character_are_enough(bench: Bench):
    made = make(bench, examples=[{"text": "x", "label": "a"}, {"text": "y" * 9, "label": "b"}])
    assert classify(bench, made["id"], ["z"])["results"][0]["label"] in ("a", "b")


def test_labels_that_differ_by_case_emoji_and_right_to_left_text_come_back_as_they_were_given(bench: Bench):
    labels = ["Spam", "spam", "🦑👩‍👩‍👧", "مرحبا"]
    made = make(bench, examples=[{"text": f"{label} {i}", "label": label} for i, label in enumerate(labels)])
    assert sorted(made["classes"]) == sorted(labels)
    assert set(classify(bench, made["id"], ["🦑 مرحبا"])["results"][0]["probabilities"]) == set(labels)


@pytest.mark.parametrize(
    "field", [{"examples": EXAMPLES}, {"unlabelled": ["x"]}, {"encoder": "tiny"}, {"seed": 1}, {"module": "paper"}]
)
def test_what_belongs_to_a_context_cannot_be_given_beside_it(bench: Bench, field):
    made = make(bench)
    error = refused(bench, "/v1/classify", {"model": made["id"], "inputs": ["x"]} | field)
    assert error["param"] == next(iter(field)) and "is part of the context" in error["message"]


def test_inputs_of_another_kind_than_the_contexts_are_refused(bench: Bench):
    texts, vectors = make(bench), make(bench, examples=VECTORS)
    for model, input_ in ((texts, {"vector": [1, 2]}), (vectors, "x")):
        error = refused(bench, "/v1/classify", {"model": model["id"], "inputs": [input_]})
        assert error["param"].startswith("inputs[0]")
    assert refused(bench, "/v1/contexts", {"examples": VECTORS, "encoder": "tiny"})["param"] == "encoder"


def test_an_answer_below_the_threshold_has_no_label_and_keeps_its_probabilities(bench: Bench):
    bench.reasoning.certainty = 0.6
    made = make(bench)
    for body in ({"model": made["id"]}, {"examples": EXAMPLES}):
        for threshold, label in ((0.61, None), (0.59, "short"), (0, "short")):
            answer = bench.post("/v1/classify", body | {"inputs": ["c"], "abstain_below": threshold}).json()
            (result,) = answer["results"]
            assert result["label"] == label
            assert result["probabilities"] == pytest.approx({"long": 0.4, "short": 0.6})


def test_an_explanation_numbers_the_requests_examples_as_it_gave_them(bench: Bench):
    lengths = [30, 2, 60, 5]
    examples = [{"text": "x" * n, "label": "ab"[i % 2]} for i, n in enumerate(lengths)]
    answer = bench.post("/v1/classify", {"examples": examples, "inputs": ["c" * 60], "explain": True}).json()
    explained = answer["results"][0]["explain"]
    assert [(one["example"], one["label"]) for one in explained["influence"]] == list(enumerate("abab"))
    # The fake's influence is the similarity, which grows with the length for a long input.
    influence = [one["log_probability"]["a"] for one in explained["influence"]]
    assert sorted(range(4), key=lambda i: influence[i]) == sorted(range(4), key=lambda i: lengths[i])
    assert [one["example"] for one in explained["nearest"]] == sorted(range(4), key=lambda i: -lengths[i])
    assert explained["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert "explain" not in bench.post("/v1/classify", {"examples": examples, "inputs": ["c"]}).json()["results"][0]


def test_explanations_are_bounded_and_the_refusal_names_limit_and_way_out(tmp_path: Path):
    http = HttpSettings(max_explained_examples=16, max_explained=256)
    bench = Bench(write_byte_tokenizer(tmp_path), http).with_contexts(tmp_path / "registry")
    many = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(17)]
    inputs = ["x"] * 9
    for count, says in ((17, "at most 16 (http.max_explained_examples)"), (16, "send at most 8 inputs at a time")):
        made = make(bench, examples=many[:count])
        for body in ({"model": made["id"]}, {"examples": many[:count]}):
            error = refused(bench, "/v1/classify", body | {"inputs": inputs, "explain": True})
            assert error["param"] == "explain" and says in error["message"]
    classify(bench, make(bench, examples=many[:16])["id"], inputs[:8], explain=True)


def test_a_context_is_no_model_for_text(bench: Bench):
    made = make(bench)
    error = bench.chat(model=made["id"]).json()["error"]
    assert error["code"] == "not_supported" and "/v1/classify" in error["message"]
    assert refused(bench, "/v1/embeddings", {"model": made["id"], "input": "x"})["code"] == "not_supported"
    assert "ctx-" not in bench.chat(model="nobody").json()["error"]["message"]  # there may be thousands


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1001", "after=zzz"])
def test_a_page_that_is_none_is_refused(bench: Bench, query: str):
    response = bench.get(f"/v1/contexts?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, query.split("=")[0])


def test_the_default_limits_are_those_of_the_reference():
    assert (HTTP.max_examples, HTTP.max_unlabelled, HTTP.max_classes) == (4096, 4096, 512)
