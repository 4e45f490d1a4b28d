"""Calls about what is kept under names: contexts, experts, mixtures, and the searches that find mixtures."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from metasepia.client import tables
from metasepia.client.answering import Protocol
from metasepia.client.calls import Answer, Ask, Pause, Request, Steps, ask, ask_list, encoded, everything, request
from metasepia.client.errors import BadInput
from metasepia.client.results import ContextInfo, Deletion, Expert, Mixture, Search

POLL_S = 1.0
"""Between two looks at a job."""
EXAMPLES_AT_ONCE = 10_000
FILE, CARD = "expert.safetensors", "card.json"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


# -- contexts ----------------------------------------------------------------------------------------------------------


def create_context(
    examples: Any,
    *,
    text: str | None = None,
    vector: str | None = None,
    label: str = "label",
    unlabelled: Any = None,
    encoder: str | None = None,
    module: str | None = None,
    protocol: Protocol | None = None,
    seed: int | None = None,
) -> Steps[ContextInfo]:
    """A classifier made of labelled examples; nothing is trained. The same examples are the same context.

    `examples`: pairs (text, label), `{"text", "label"}` each, or a table with the columns `text` and `label`.
    """
    body: dict[str, Any] = {
        "examples": tables.examples_of(examples, text, vector, label),
        "unlabelled": None if unlabelled is None else tables.plain(unlabelled, "unlabelled"),
        "encoder": encoder, "module": module, "protocol": protocol, "seed": seed,
    }  # fmt: skip
    return ContextInfo.of((yield from ask(request("CreateContext", body))))


def extend_context(
    id: str, examples: Any, *, text: str | None = None, vector: str | None = None, label: str = "label"
) -> Steps[ContextInfo]:
    """Another context: these examples beside those of the old one, which stays."""
    body = {"examples": tables.examples_of(examples, text, vector, label)}
    return ContextInfo.of((yield from ask(request("ExtendContext", body, id=id))))


def contexts() -> Steps[list[ContextInfo]]:
    """All of them, in order of id."""
    return [ContextInfo.of(one) for one in (yield from everything(request("ListContexts")))]


def context(id: str) -> Steps[ContextInfo]:
    """One of them."""
    return ContextInfo.of((yield from ask(request("GetContext", id=id))))


def context_examples(id: str) -> Steps[list[dict[str, Any]]]:
    """Its examples in its own order: `example` (the number that explanations name), `label`, and `text` of texts."""
    found: list[dict[str, Any]] = []
    while True:
        asked = request("ListContextExamples", params={"begin": len(found), "limit": EXAMPLES_AT_ONCE}, id=id)
        page = yield from ask_list(asked)
        found += page
        if len(page) < EXAMPLES_AT_ONCE:
            return found


def delete_context(id: str) -> Steps[Deletion]:
    """Takes it away; made again it has the same id."""
    return Deletion.of((yield from ask(request("DeleteContext", id=id))))


# -- experts -----------------------------------------------------------------------------------------------------------


def add_expert(name: str, path: str | Path, *, backbone: str | None = None, card: Any = None) -> Steps[Expert]:
    """Registers an expert under a new name.

    `path`: `expert.safetensors`, a directory with one (and `card.json`), or a PEFT LoRA directory. `card`: an object,
    or a file of JSON. Raises BadInput for a directory that holds neither.
    """
    return Expert.of((yield from ask(_upload(request("AddExpert"), {"name": name}, path, backbone, card))))


def replace_expert(name: str, path: str | Path, *, backbone: str | None = None, card: Any = None) -> Steps[Expert]:
    """Registers an expert under a name, new or in use: later requests get this one."""
    return Expert.of((yield from ask(_upload(request("ReplaceExpert", name=name), {}, path, backbone, card))))


def _upload(asked: Request, fields: dict[str, str], path: str | Path, backbone: str | None, card: Any) -> Request:
    files = {part: file.read_bytes() for part, file in expert_files(Path(path)).items()}
    if isinstance(card, str | Path):
        files["card"] = existing(Path(card)).read_bytes()
    elif card is not None:
        files["card"] = encoded(card)
    fields |= {} if backbone is None else {"backbone": backbone}
    return dataclasses.replace(asked, fields=fields, files=files)


def expert_files(path: Path) -> dict[str, Path]:
    """The files to send: of an expert's directory, of PEFT's, or one file. Raises BadInput where there is none."""
    if path.is_dir() and (path / FILE).is_file():
        return {"file": path / FILE} | ({"card": path / CARD} if (path / CARD).is_file() else {})
    if path.is_dir():
        for name in (PEFT_FILE, PEFT_CONFIG):
            if not (path / name).is_file():
                pickled = (
                    " (adapter_model.bin is pickled and not read)" if (path / "adapter_model.bin").exists() else ""
                )
                needs = f"{FILE}, or {PEFT_FILE} and {PEFT_CONFIG}{pickled}"
                raise BadInput(str(path), f"holds no {name}; a directory needs {needs}")
        return {"file": path / PEFT_FILE, "config": path / PEFT_CONFIG}
    return {"file": existing(path)}


def existing(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(str(path), "there is no such file")
    return path


def experts() -> Steps[list[Expert]]:
    """All of them, in order of names."""
    return [Expert.of(one) for one in (yield from everything(request("ListExperts")))]


def expert(name: str) -> Steps[Expert]:
    """One by its name or digest, with its card."""
    return Expert.of((yield from ask(request("GetExpert", name=name))))


def expert_content(name: str) -> Steps[bytes]:
    """The safetensors file of one, by its name or digest."""
    answer: Answer = yield Ask(request("GetExpertContent", accept="*/*", name=name))
    return answer.content


def download_expert(name: str, directory: str | Path) -> Steps[Expert]:
    """Writes file and card to a directory, made where it is not there."""
    shown = yield from expert(name)
    content = yield from expert_content(shown.digest)  # by digest: the name may move meanwhile
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_bytes(content)
    (out / CARD).write_text(json.dumps(shown.card, indent=1, ensure_ascii=False) + "\n")
    return shown


def delete_expert(name: str) -> Steps[Deletion]:
    """Takes the name away."""
    return Deletion.of((yield from ask(request("DeleteExpert", name=name))))


# -- mixtures ----------------------------------------------------------------------------------------------------------


def create_mixture(
    weights: Mapping[str, float | Sequence[float]], *, backbone: str, name: str | None = None
) -> Steps[Mixture]:
    """Weights on experts that sum to one, `base` for the backbone itself; a list has one for each factored layer."""
    given = {key: value if isinstance(value, int | float) else list(value) for key, value in weights.items()}
    body = {"backbone": backbone, "weights": given, "name": name}
    return Mixture.of((yield from ask(request("CreateMixture", body))))


def mixtures() -> Steps[list[Mixture]]:
    """All of them."""
    return [Mixture.of(one) for one in (yield from everything(request("ListMixtures")))]


def mixture(id: str) -> Steps[Mixture]:
    """One by its digest or name, with its card."""
    return Mixture.of((yield from ask(request("GetMixture", digest=id))))


def delete_mixture(id: str) -> Steps[Deletion]:
    """Takes its name away; its experts stay."""
    return Deletion.of((yield from ask(request("DeleteMixture", digest=id))))


# -- searches ----------------------------------------------------------------------------------------------------------


class SearchOptions(TypedDict, total=False):
    """As POST /v1/mixtures/search has them."""

    shots: int | None
    experts: Sequence[str] | None
    base: bool | None
    score: Literal["likelihood", "accuracy"] | None
    match: Literal["exact", "contains"] | None
    max_tokens: int | None
    per_layer: bool | None
    population: int | None
    elites: int | None
    generations: int | None
    patience: int | None
    max_evaluations: int | None
    smoothing: float | None
    start: str | Mapping[str, Any] | None
    seed: int | None


def create_search(
    examples: Sequence[Mapping[str, Any]], *, backbone: str, **options: Unpack[SearchOptions]
) -> Steps[Search]:
    """Queues a search for a mixture by a few questions with answers. The same request is the same job."""
    body = {"backbone": backbone, "examples": list(examples)} | dict(options)
    return Search.of((yield from ask(request("CreateSearch", body))))


def wait_for_search(
    search: Search | str, *, tell: Callable[[Search], None] | None = None, poll_s: float = POLL_S
) -> Steps[Search]:
    """The search once it is over, however it ended; `tell` is called with each look at it."""
    found = search if isinstance(search, Search) else (yield from get_search(search))
    while not found.is_over:
        if tell is not None:
            tell(found)
        yield Pause(poll_s)
        found = yield from get_search(found.id)
    return found


def get_search(id: str) -> Steps[Search]:
    """How far a search is, and what came out."""
    return Search.of((yield from ask(request("GetSearch", id=id))))


def searches() -> Steps[list[Search]]:
    """All of them, the newest first."""
    return [Search.of(one) for one in (yield from everything(request("ListSearches")))]


def search_trace(id: str) -> Steps[list[dict[str, Any]]]:
    """An entry for each generation."""
    return (yield from ask_list(request("GetSearchTrace", id=id)))


def search_picture(id: str) -> Steps[bytes]:
    """Scores and weights by generation, as SVG."""
    answer: Answer = yield Ask(request("GetSearchPicture", accept="*/*", id=id))
    return answer.content


def cancel_search(id: str) -> Steps[Search]:
    """Ends it; it keeps what it has."""
    return Search.of((yield from ask(request("CancelSearch", id=id))))
