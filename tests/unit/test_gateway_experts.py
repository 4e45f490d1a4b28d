"""/v1/experts and /v1/mixtures over a real registry: what is taken, what is refused by its field, what names mean."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from cluster.door_settings import HttpSettings
from metasepia.dispatch.centroid import TaskCentroid
from metasepia.experts.lora import LoraAdapter, read_adapter
from metasepia.experts.peft_files import write_peft
from metasepia.experts.vectors import ExpertVectors
from metasepia.registry.entries import LOCAL, SHARED
from tests.doors import DIGEST, INDEX, OTHER, SHAPES, UP, Bench
from tests.unit.test_prompts import write_byte_tokenizer


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path)).with_experts(tmp_path / "registry")
    made.says("x")
    return made


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One for all tests that register nothing."""
    home = tmp_path_factory.mktemp("refusing")
    return Bench(write_byte_tokenizer(home)).with_experts(home / "registry", HttpSettings(max_upload_mib=8.0))


def an_expert(value: float = 1.5, **changes: Any) -> ExpertVectors:
    z = {UP: np.full(4, value, np.float32)}
    return ExpertVectors(**({"backbone": DIGEST, "factors": INDEX.digest, "z": z} | changes))


def a_lora(rank: int = 2, **changes: Any) -> LoraAdapter:
    draw = np.random.default_rng(rank)
    a = {n: draw.normal(size=(rank, columns)).astype(np.float32) for n, (_, columns) in SHAPES.items()}
    b = {n: draw.normal(size=(rows, rank)).astype(np.float32) for n, (rows, _) in SHAPES.items()}
    return LoraAdapter(**({"backbone": DIGEST, "a": a, "b": b} | changes))


def upload(bench: Bench, name: str | None, blob: bytes | None, method: str = "POST", **fields: Any) -> httpx.Response:
    """As a form; in `fields`, bytes are files and texts are fields."""
    parts: dict[str, Any] = {key: (None if isinstance(value, str) else key, value) for key, value in fields.items()}
    if blob is not None:
        parts["file"] = ("expert.safetensors", blob)
    path = "/v1/experts"
    if method == "PUT":
        path += f"/{name}"
    elif name is not None:
        parts["name"] = (None, name)
    return bench.run(lambda client: client.request(method, path, files=parts))


def error(response: httpx.Response) -> dict[str, Any]:
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def put_shared(bench: Bench, name: str, expert: ExpertVectors) -> None:
    card: dict[str, object] = {"backbone": expert.backbone, "form": "svf"}
    bench.real.registry.put("expert", expert.to_bytes(), digest=expert.digest, name=name, owner=SHARED, card=card)


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_an_expert_is_uploaded_asked_listed_and_given_back_byte_for_byte(bench: Bench):
    expert = an_expert()
    made = upload(bench, "maths", expert.to_bytes(), card=json.dumps({"description": "sums"})).json()
    assert (made["digest"], made["model"], made["form"], made["parameters"]) == (expert.digest, "tiny:maths", "svf", 4)
    assert bench.chat(model="tiny:maths").json()["receipt"]["adapter"] == [[expert.digest, 1.0]]
    assert bench.chat(model=f"tiny:{expert.digest}").json()["receipt"]["adapter"] == [[expert.digest, 1.0]]
    for key in ("maths", expert.digest):
        shown = bench.get(f"/v1/experts/{key}").json()
        assert shown.pop("card")["description"] == "sums"
        assert shown == made
        content = bench.get(f"/v1/experts/{key}/content")
        assert (content.content, content.headers["etag"]) == (expert.to_bytes(), f'"{expert.digest}"')
    assert bench.get("/v1/experts").json()["data"] == [made]
    listed = bench.get("/v1/models").json()["data"][-1]
    assert (listed["id"], listed["parent"], listed["root"]) == ("tiny:maths", "tiny", expert.digest)
    assert bench.get("/v1/models/tiny:maths").json() == listed


def test_a_raw_body_with_its_fields_in_the_query_is_the_same_upload(bench: Bench):
    made = bench.run(
        lambda client: client.post(
            "/v1/experts?name=maths&backbone=tiny",
            content=an_expert().to_bytes(),
            headers={"content-type": "application/octet-stream"},
        )
    ).json()
    assert (made["id"], made["digest"]) == ("maths", an_expert().digest)


def test_a_file_that_begins_as_a_pickle_does_because_of_its_headers_length_is_taken(bench: Bench):
    blob = an_expert().to_bytes()
    length = int.from_bytes(blob[:8], "little")
    padding = (0x80 - length) % 256
    longer = (length + padding).to_bytes(8, "little") + blob[8 : 8 + length] + b" " * padding + blob[8 + length :]
    assert longer[:1] == b"\x80"
    assert upload(bench, "maths", longer).json()["digest"] == an_expert().digest


def test_pefts_two_files_are_one_low_rank_expert(bench: Bench):
    config, weights = write_peft(a_lora(), "tiny")
    made = upload(bench, "low", weights, config=config, backbone="tiny").json()
    assert (made["form"], made["rank"], made["factors_digest"]) == ("lora", 2, None)
    blob = bench.get("/v1/experts/low/content").content
    read = read_adapter(blob, "low")
    assert isinstance(read, LoraAdapter)
    np.testing.assert_allclose(read.b[UP] @ read.a[UP], a_lora().b[UP] @ a_lora().a[UP], rtol=1e-6)
    assert bench.chat(model="tiny:low").json()["receipt"]["adapter"] == [[made["digest"], 1.0]]
    again = upload(bench, "again", blob).json()
    assert again["digest"] == made["digest"]


def test_a_file_with_more_than_its_content_is_kept_without_it(bench: Bench):
    """Equal digests must be equal bytes: what a client hides in a header's padding is not given back."""
    blob = an_expert().to_bytes()
    padded = (int.from_bytes(blob[:8], "little") + 8).to_bytes(8, "little")
    length = int.from_bytes(blob[:8], "little")
    assert upload(bench, "x", padded + blob[8 : 8 + length] + b" " * 8 + blob[8 + length :]).status_code == 200
    assert bench.get("/v1/experts/x/content").content == blob


def test_a_card_cannot_say_what_the_content_says_otherwise(bench: Bench):
    card = json.dumps({"digest": OTHER, "backbone": OTHER, "form": "lora", "factors": OTHER, "kind": "module"})
    made = upload(bench, "x", an_expert().to_bytes(), card=card).json()
    shown = bench.get("/v1/experts/x").json()
    assert (made["digest"], made["form"], shown["card"]["digest"]) == (an_expert().digest, "svf", an_expert().digest)
    assert shown["card"]["backbone"] == DIGEST


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_name_in_use_is_a_409_and_put_replaces_it_at_once(bench: Bench):
    one, two = an_expert(1.5), an_expert(0.5)
    upload(bench, "x", one.to_bytes())
    assert upload(bench, "x", one.to_bytes()).json()["digest"] == one.digest  # the same again changes nothing
    refused = upload(bench, "x", two.to_bytes())
    assert (refused.status_code, error(refused)["code"], error(refused)["param"]) == (409, "already_exists", "name")
    assert bench.chat(model="tiny:x").json()["receipt"]["adapter"] == [[one.digest, 1.0]]
    assert upload(bench, "x", two.to_bytes(), "PUT").json()["digest"] == two.digest
    assert bench.chat(model="tiny:x").json()["receipt"]["adapter"] == [[two.digest, 1.0]]
    assert [entry["digest"] for entry in bench.get("/v1/experts").json()["data"]] == [two.digest]


def test_a_deleted_name_is_410_everywhere_and_can_be_made_again(bench: Bench):
    digest = upload(bench, "x", an_expert().to_bytes()).json()["digest"]
    first = bench.delete("/v1/experts/x").json()
    assert (first["object"], first["deleted"]) == ("expert.deleted", True)
    assert bench.delete("/v1/experts/x").json() == first
    for response in (bench.get("/v1/experts/x"), bench.get("/v1/experts/x/content"), bench.chat(model="tiny:x")):
        assert (response.status_code, error(response)["code"]) == (410, "deleted")
    assert bench.get("/v1/experts").json()["data"] == []
    assert upload(bench, "x", an_expert().to_bytes()).json()["digest"] == digest
    assert bench.chat(model="tiny:x").status_code == 200


def test_unknown_names_are_404_with_the_known_ones_and_run_nothing(bench: Bench):
    upload(bench, "maths", an_expert().to_bytes())
    for path in ("/v1/experts/law", "/v1/experts/law/content", f"/v1/experts/{OTHER}", "/v1/experts/..%2Fx"):
        response = bench.get(path)
        assert response.status_code == 404
        assert "known: maths" in error(response)["message"] or error(response)["code"] == "not_found"
    assert error(bench.get("/v1/experts/law"))["param"] == "name"
    assert error(bench.delete("/v1/experts/law"))["param"] == "name"
    response = bench.chat(model="tiny:law")
    assert (response.status_code, error(response)["param"]) == (404, "model")
    assert "known: tiny, tiny:maths" in error(response)["message"]
    assert bench.backbone.rows == []


def test_a_clients_own_expert_hides_the_shipped_one_which_cannot_be_deleted(bench: Bench):
    shipped, own = an_expert(1.5), an_expert(0.5)
    put_shared(bench, "desk", shipped)
    refused = bench.delete("/v1/experts/desk")
    assert (refused.status_code, error(refused)["code"]) == (400, "not_supported")
    upload(bench, "desk", own.to_bytes())
    assert bench.chat(model="tiny:desk").json()["receipt"]["adapter"] == [[own.digest, 1.0]]
    assert [entry["owner"] for entry in bench.get("/v1/experts").json()["data"]] == [LOCAL]
    assert [one["root"] for one in bench.get("/v1/models").json()["data"] if one["parent"]] == [own.digest]
    bench.delete("/v1/experts/desk")
    assert bench.chat(model="tiny:desk").json()["receipt"]["adapter"] == [[shipped.digest, 1.0]]


def test_pages_hold_every_name_once_also_where_a_name_has_two_owners(bench: Bench):
    for index in range(7):
        put_shared(bench, f"e{index}", an_expert(1.0 + index))
    for index in (2, 3, 4):
        upload(bench, f"e{index}", an_expert(0.5 / (1 + index)).to_bytes())
    seen: list[tuple[str, str]] = []
    path = "/v1/experts?limit=2"
    while True:
        page = bench.get(path).json()
        seen += [(one["id"], one["owner"]) for one in page["data"]]
        if not page["has_more"]:
            break
        path = f"/v1/experts?limit=2&after={page['last_id']}"
    assert seen == [(f"e{i}", LOCAL if i in (2, 3, 4) else SHARED) for i in range(7)]
    assert error(bench.get("/v1/experts?limit=0"))["param"] == "limit"


def test_however_many_experts_there_are_a_request_lists_none_of_them(bench: Bench):
    for index in range(60):
        put_shared(bench, f"e{index}", an_expert(1.0 + index / 1000))
    assert len(bench.get("/v1/models").json()["data"]) == 62
    before = bench.real.listed.count("expert")
    for index in range(5):
        upload(bench, f"new{index}", an_expert(2.0 + index).to_bytes())
        assert bench.chat(model=f"tiny:e{index}").status_code == 200
        assert bench.chat(model="tiny:nobody").status_code == 404
        assert bench.get(f"/v1/models/tiny:new{index}").status_code == 200
    assert len(bench.get("/v1/models").json()["data"]) == 67
    assert bench.real.listed.count("expert") == before


def test_an_uploaded_expert_with_a_centroid_is_chosen_by_auto_until_it_is_deleted(bench: Bench):
    ones = np.ones(4, np.float32)
    centroid = TaskCentroid(
        backbone=DIGEST, layer=-1, pooling="mean", centre=0 * ones, centroid=ones, threshold=0.5
    ).to_card()
    assert bench.chat(model="auto").status_code == 404
    made = upload(bench, "x", an_expert().to_bytes(), card=json.dumps({"dispatch": centroid})).json()
    answer = bench.chat(model="auto").json()
    assert (answer["model"], answer["receipt"]["adapter"]) == ("tiny:x", [[made["digest"], 1.0]])
    put = upload(bench, "x", an_expert(0.5).to_bytes(), "PUT", card=json.dumps({"dispatch": centroid})).json()
    assert bench.chat(model="auto").json()["receipt"]["adapter"] == [[put["digest"], 1.0]]
    bench.delete("/v1/experts/x")
    assert bench.chat(model="auto").status_code == 404
    for change in ({"centre": [1.0] * 3, "centroid": [1.0] * 3}, {"layer": 99}):
        wrong = upload(bench, "y", an_expert().to_bytes(), card=json.dumps({"dispatch": centroid | change}))
        assert (wrong.status_code, error(wrong)["param"]) == (400, "card.dispatch")


# -- what is refused ---------------------------------------------------------------------------------------------------


def _nan(expert: ExpertVectors) -> bytes:
    blob = bytearray(expert.to_bytes())
    blob[-4:] = np.float32(np.nan).tobytes()
    return bytes(blob)


def _with(change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    blob = an_expert().to_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    return save({name: change(one) for name, one in load(blob).items()}, header)


BAD_FILES: dict[str, tuple[bytes | None, str, str]] = {
    "none": (None, "file", "required"),
    "empty": (b"", "file", "required"),
    "for another backbone": (an_expert(backbone=OTHER).to_bytes(), "file", "made for backbone ffffffffffff"),
    "for other factors": (an_expert(factors=OTHER).to_bytes(), "file", "made for factors ffffffffffff"),
    "too long a vector": (an_expert(z={UP: np.ones(5, np.float32)}).to_bytes(), "file", "5 multipliers"),
    "an unknown layer": (an_expert(z={"x.weight": np.ones(4, np.float32)}).to_bytes(), "file", "none of the 2"),
    "a matrix": (_with(lambda one: one[:, None]), "file", "must be a float32 vector"),
    "half precision": (_with(lambda one: one.astype(np.float16)), "file", "must be a float32 vector"),
    "NaN": (_nan(an_expert()), "file", "NaN or infinity"),
    "overflowing": (an_expert(1e30).to_bytes(), "file", "multiplies by up to"),
    "a nuclear norm of zero": (an_expert(0.0, renormalise=True, z={UP: np.zeros(4, np.float32)}).to_bytes(), "file",
                               "renormalising divides"),
    "truncated": (an_expert().to_bytes()[:-3], "file", "not a safetensors file"),
    "cut in its header": (an_expert().to_bytes()[:20], "file", "not a safetensors file"),
    "a pickle": (b"\x80\x04\x95" + bytes(50), "file", "pickle"),
    "a zipped pickle": (b"PK\x03\x04" + bytes(50), "file", "pickle"),
    "a text": (b"hello, this is no tensor", "file", "not a safetensors file"),
    "a header of megabytes": ((5 << 20).to_bytes(8, "little") + b"[" * (6 << 20), "file", "its header has"),
    "no format": (save({UP: np.ones(4, np.float32)}), "file", "names no format"),
    "a LoRA of wrong shapes": (a_lora(a={n: np.ones((2, 3), np.float32) for n in SHAPES}).to_bytes(), "file",
                               "for a weight ["),
    "a LoRA that overflows": (a_lora(b={n: np.full((s[0], 2), 1e30, np.float32) for n, s in SHAPES.items()}).to_bytes(),
                              "file", "elements of up to"),
}  # fmt: skip


@pytest.mark.parametrize(("blob", "param", "words"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_no_expert_of_this_backbone_is_a_400_in_words(refusing: Bench, blob, param, words):
    response = upload(refusing, "x", blob)
    assert (response.status_code, error(response)["param"]) == (400, param)
    assert words in error(response)["message"]
    assert refusing.get("/v1/experts").json()["data"] == []


@pytest.mark.parametrize(
    "name",
    ["../etc/passwd", "..", "a/b", "a\\b", "UPPER", "", " ", "x" * 65, "auto", "base", "mix@x", "ctx-1", "é", "f" * 64,
     "x\x00y", ".hidden", "-x"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_or_are_reserved_are_refused(refusing: Bench, name: str):
    response = upload(refusing, name, an_expert().to_bytes())
    assert (response.status_code, error(response)["param"]) == (400, "name"), response.text


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"backbone": "nobody"}, 404, "backbone"),
        ({"card": "{"}, 400, "card"),
        ({"card": "[]"}, 400, "card"),
        ({"card": '{"x": NaN}'}, 400, "card.x"),
        ({"card": json.dumps({"x": "y" * 2**20}).encode()}, 400, "card"),
        ({"card": '{"x":' + "[" * 100 + "]" * 100 + "}"}, 400, "card"),
        ({"card": '{"dispatch": {"layer": 1}}'}, 400, "card.dispatch"),
        ({"card": '{"dispatcher": {"prompt": "x", "labels": {}}}'}, 400, "card.dispatcher"),
        ({"card": '{"description": 7}'}, 400, "card.description"),
        ({"card": json.dumps({"description": "x" * 401})}, 400, "card.description"),
        ({"config": "{"}, 400, "file"),
        ({"config": '{"peft_type": "LOHA"}'}, 400, None),
        ({"surprise": "x"}, 400, "surprise"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(refusing: Bench, fields, status, param):
    response = upload(refusing, "x", an_expert().to_bytes(), **fields)
    assert (response.status_code, error(response)["param"]) == (status, param), response.text


def test_a_missing_or_contradicting_name_and_a_field_given_twice_are_refused(refusing: Bench):
    assert error(upload(refusing, None, an_expert().to_bytes()))["param"] == "name"
    twice = refusing.run(
        lambda client: client.post(
            "/v1/experts",
            files=[("file", b"1"), ("file", b"2"), ("name", (None, "x"))],  # type: ignore[arg-type]
        )
    )
    assert error(twice)["message"] == "file: this field is given twice"
    form: dict[str, Any] = {"file": ("f", an_expert().to_bytes()), "name": (None, "y")}
    other = refusing.run(lambda client: client.put("/v1/experts/x", files=form))
    assert (other.status_code, error(other)["param"]) == (400, "name")


@pytest.mark.parametrize(
    ("headers", "content", "code"),
    [
        ({"content-type": "application/json"}, b"{}", "not_supported"),
        ({}, b"x", "not_supported"),
        ({"content-type": "multipart/form-data"}, b"x", "invalid_value"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"no boundary at all", "invalid_value"),
        ({"content-type": "application/octet-stream", "content-encoding": "gzip"}, b"x", "invalid_value"),
    ],
)
def test_bodies_of_another_kind_are_refused_in_words(refusing: Bench, headers, content, code):
    response = refusing.run(lambda client: client.post("/v1/experts?name=x", content=content, headers=headers))
    assert (response.status_code, error(response)["code"]) == (400, code)


async def _call(bench: Bench, headers: dict[str, str], chunks: int, chunk: bytes) -> tuple[int, int, int]:
    """Status of a raw upload, the chunks that were asked for, and the most bytes the door held meanwhile."""
    import tracemalloc

    asked, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": chunk, "more_body": asked < chunks}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/experts", "query_string": b"name=x", "headers": raw,
             "http_version": "1.1", "server": ("door", 80), "client": None, "root_path": ""}  # fmt: skip
    tracemalloc.start()
    try:
        await bench.app(scope, receive, send)  # pyright: ignore[reportArgumentType]
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return sent[0]["status"], asked, held


@pytest.mark.parametrize("kind", ["application/octet-stream", "multipart/form-data; boundary=b"])
def test_a_gigabyte_is_refused_unread_by_its_length_and_early_without_one(bench: Bench, tmp_path: Path, kind: str):
    bench.with_experts(tmp_path / "again", HttpSettings(max_upload_mib=2.0))
    told = asyncio.run(_call(bench, {"content-type": kind, "content-length": str(2**30)}, 1024, bytes(2**20)))
    assert told[:2] == (413, 0)
    start = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n' if "multipart" in kind else b""
    chunk = start.ljust(2**20, b"x")
    status, asked, held = asyncio.run(_call(bench, {"content-type": kind}, 1024, chunk))
    assert (status, asked) == (413, 2 + 64 + 1)
    assert held < 6 * 2**20


def test_uploads_beyond_what_may_come_in_together_are_told_to_come_back(bench: Bench):
    bench.door.experts._uploads._coming = 4 * 64 * 2**20
    response = upload(bench, "x", an_expert().to_bytes())
    assert (response.status_code, error(response)["code"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    bench.door.experts._uploads._coming = 0
    assert upload(bench, "x", an_expert().to_bytes()).status_code == 200


# -- mixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(bench: Bench) -> Bench:
    upload(bench, "maths", an_expert(1.5).to_bytes())
    upload(bench, "law", an_expert(0.5).to_bytes())
    return bench


def test_a_mixture_is_found_by_digest_and_name_listed_and_deleted(mixed: Bench):
    weights = {"maths": 0.25, "law": 0.75}
    plain = mixed.post("/v1/mixtures", {"backbone": "tiny", "weights": weights}).json()
    named = mixed.post("/v1/mixtures", {"backbone": "tiny", "weights": weights, "name": "both"}).json()
    assert (plain["model"], named["model"]) == (f"tiny:mix@{plain['digest']}", "tiny:mix@both")
    adapter = sorted([[an_expert(1.5).digest, 0.25], [an_expert(0.5).digest, 0.75]])
    for model in (plain["model"], named["model"]):
        assert mixed.chat(model=model).json()["receipt"]["adapter"] == adapter
        assert model in [one["id"] for one in mixed.get("/v1/models").json()["data"]]
    assert {one["id"] for one in mixed.get("/v1/mixtures").json()["data"]} == {plain["digest"], "both"}
    shown = mixed.get("/v1/mixtures/both").json()
    assert shown["weights"] == [{"digest": digest, "weight": weight} for digest, weight in adapter]
    assert shown["owner"] == LOCAL
    assert mixed.delete("/v1/mixtures/both").json() == mixed.delete("/v1/mixtures/both").json()
    assert mixed.chat(model="tiny:mix@both").status_code == 410
    assert mixed.chat(model=plain["model"]).status_code == 200
    reserved = mixed.post("/v1/mixtures", {"backbone": "tiny", "weights": weights, "name": "search"})
    assert (reserved.status_code, error(reserved)["param"]) == (400, "name")
    unknown = mixed.get("/v1/mixtures/nobody")
    assert (unknown.status_code, error(unknown)["param"]) == (404, "digest")


@pytest.mark.parametrize(
    ("weights", "param"),
    [
        ({"maths": 0.5, "law": 0.4}, "weights"),
        ({"maths": 1.5, "law": -0.5}, "weights"),
        ({"maths": -0.1}, "weights"),
        ({}, "weights"),
        ({"maths": "1"}, "weights"),
    ],
    ids=str,
)
def test_weights_off_the_simplex_are_refused_by_their_field(refusing: Bench, weights: dict[str, Any], param: str):
    response = refusing.post("/v1/mixtures", {"backbone": "tiny", "weights": weights})
    assert response.status_code == 400
    assert str(error(response)["param"]).startswith(param)
    assert refusing.get("/v1/mixtures").json()["data"] == []


# -- what a completion asks for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "y" * 100}]}, "messages"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
    ids=str,
)
def test_a_completion_outside_a_range_names_the_field(refusing: Bench, fields: dict[str, Any], param: str):
    response = refusing.chat(**fields)
    assert (response.status_code, error(response)["param"]) == (400, param)
    assert refusing.backbone.rows == []
