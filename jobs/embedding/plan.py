"""From a specification to tasks: each with its name, its kind, and the key of all that its answers depend on."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.embedding import data_sets
from jobs.embedding.spec import BackboneSpec, CallableSpec, DataSetSpec, EndpointSpec, PromptSpec, Spec
from jobs.export_expert import Given, read_given
from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.meter import Meter
from metasepia.blackbox.openai import OpenAIEndpoint
from metasepia.blackbox.pace import Pace
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.tokens import adapter_json
from metasepia.digests import digest_of, digest_of_file
from metasepia.embedding.methods import LongTexts
from metasepia.embedding.space import TaskKind
from metasepia.errors import InvalidSettings, MetasepiaError
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Adapter


@dataclass(frozen=True, kw_only=True)
class DataSetUnit:
    """Reads one data set."""

    spec: DataSetSpec
    path: Path


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """An expert or mixture on a backbone, with the bytes of its parts."""

    name: str
    adapter: Adapter
    blobs: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class BackboneUnit:
    """Asks a local backbone with one prompt."""

    spec: BackboneSpec
    backbone: str
    """Digest."""
    prompt: Prompt
    expert: ExpertUse | None
    experts: tuple[ExpertUse, ...]
    """All of the model's: the process that answers holds them together."""


@dataclass(frozen=True, kw_only=True)
class CallableUnit:
    """Calls a function of Python."""

    spec: CallableSpec
    version: str
    """Digest of the module's file."""


@dataclass(frozen=True, kw_only=True)
class EndpointUnit:
    """Asks an endpoint with one prompt; in the driver, which alone has its key."""

    spec: EndpointSpec
    box: OpenAIEndpoint


LocalUnit = DataSetUnit | BackboneUnit | CallableUnit


@dataclass(frozen=True, kw_only=True)
class Task:
    """One embedding that is wanted, of each method."""

    name: str
    kind: TaskKind
    key: str
    """Digest of all that the answers depend on."""
    unit: LocalUnit | EndpointUnit
    long_texts: LongTexts = "refuse"

    @property
    def asks(self) -> bool:
        """It asks something for the probe texts."""
        return not isinstance(self.unit, DataSetUnit)


def tasks_of(spec: Spec, home: Path, cache: AnswerCache, meter: Meter) -> list[Task]:
    """In the order of the specification: data sets, then each model with each of its prompts.

    Raises InvalidSettings with the place for what is not there: files, experts, functions, and for names that are
    taken twice.
    """
    tasks: list[Task] = []
    for one in spec.data_sets:
        tasks += [_data_set(one, name, path) for name, path in data_sets.find(one)]
    for model in spec.models:
        asked = [p for p in spec.prompts if not p.models or model.name in p.models]
        try:
            if isinstance(model, CallableSpec):
                tasks.append(_callable(model, spec))
            elif isinstance(model, EndpointSpec):
                # One pace for all prompts: the limits are of the endpoint.
                pace = Pace(model.settings.requests_per_minute, model.settings.tokens_per_minute)
                tasks += [_endpoint(model, prompt, spec, cache, meter, pace) for prompt in asked]
            else:
                tasks += _backbone(model, asked, spec, home)
        except InvalidSettings:
            raise
        except MetasepiaError as error:
            raise InvalidSettings(model.place, model.name, f"something that can be used: {error}") from error
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise InvalidSettings(
                f"{spec.path} name", task.name, "one that a single task has; give `name` to one of them"
            )
        seen.add(task.name)
    return tasks


def _data_set(spec: DataSetSpec, name: str, path: Path) -> Task:
    fields = {
        "kind": "data set",
        "bytes": data_sets.stamp(path),
        "columns": [spec.text, spec.label],
        "split": spec.split,
        "where": [list(one) for one in spec.where],
        "most": spec.most,
        "seed": spec.seed,
    }
    unit = DataSetUnit(spec=spec, path=path)
    return Task(name=name, kind="data_set", key=digest_of(fields), unit=unit, long_texts=spec.long_texts)


def _callable(spec: CallableSpec, run: Spec) -> Task:
    module = spec.call.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise InvalidSettings(
            f"{spec.place}.callable", spec.call, f"of a module that can be found ({error})"
        ) from error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise InvalidSettings(f"{spec.place}.callable", spec.call, "of a module that can be found, as a file")
    version = digest_of_file(Path(found.origin))
    fields = {
        "kind": "callable",
        "call": spec.call,
        "file": version,
        "labels": None if spec.labels is None else list(spec.labels),
        "probes": run.probes.digest,
    }
    return Task(name=spec.name, kind="model", key=digest_of(fields), unit=CallableUnit(spec=spec, version=version))


def _endpoint(spec: EndpointSpec, prompt: PromptSpec, run: Spec, cache: AnswerCache, meter: Meter, pace: Pace) -> Task:
    try:
        box = OpenAIEndpoint(spec.settings, prompt.prompt, cache, meter, pace=pace)
    except InvalidSettings as error:
        raise InvalidSettings(f"{spec.place}.{error.field}", error.value, error.allowed) from None
    key = digest_of({"kind": "endpoint", "box": box.digest, "probes": run.probes.digest})
    return Task(name=f"{spec.name}/{prompt.prompt.name}", kind="prompt", key=key, unit=EndpointUnit(spec=spec, box=box))


def _backbone(spec: BackboneSpec, prompts: Sequence[PromptSpec], run: Spec, home: Path) -> list[Task]:
    from metasepia.models import checkpoints  # imports transformers where a GGUF is to be converted

    try:
        prepared = checkpoints.prepare(spec.source, home)
    except InvalidSettings as error:
        raise InvalidSettings(f"{spec.place}.backbone", spec.source, error.allowed) from None
    experts = tuple(_expert(one, spec, prepared, home) for one in spec.experts)
    used: list[ExpertUse | None] = [*([None] if spec.base else []), *experts]
    tasks = []
    for expert in used:
        for prompt in prompts:
            fields: dict[str, Any] = {
                "kind": "backbone",
                "backbone": prepared.digest,
                "adapter": adapter_json(expert.adapter) if expert else [],
                "prompt": prompt.prompt.digest,
                "chat": spec.chat,
                "normalise": spec.normalise,
                "calibrate": list(spec.calibrate),
                "probes": run.probes.digest,
            }
            unit = BackboneUnit(
                spec=spec, backbone=prepared.digest, prompt=prompt.prompt, expert=expert, experts=experts
            )
            name = f"{spec.name}:{expert.name}" if expert else spec.name
            tasks.append(Task(name=f"{name}/{prompt.prompt.name}", kind="prompt", key=digest_of(fields), unit=unit))
    return tasks


def _expert(given: str, spec: BackboneSpec, prepared: PreparedBackbone, home: Path) -> ExpertUse:
    field = f"{spec.place}.experts"
    try:
        found: Given = read_given(given, home)
    except (MetasepiaError, OSError) as error:
        raise InvalidSettings(field, given, f"an expert: a shipped or registered name, or a file ({error})") from error
    if found.backbone != prepared.digest:
        allowed = f"an expert of {spec.source} ({prepared.digest[:12]}); this one is for {found.backbone[:12]}"
        raise InvalidSettings(field, given, allowed)
    adapter = tuple((one.digest, weight) for weight, one in found.parts)
    blobs = {one.digest: one.to_bytes() for _, one in found.parts}
    return ExpertUse(name=found.name, adapter=tuple(sorted(adapter)), blobs=blobs)


def source_of(task: Task) -> dict[str, Any]:
    """What is known of a task's source before it is answered, in plain values; experts and prompts by name."""
    unit = task.unit
    if isinstance(unit, DataSetUnit):
        told = {"path": unit.path.name, "split": unit.spec.split, "label": unit.spec.label}
        return {name: value for name, value in told.items() if value is not None}
    if isinstance(unit, CallableUnit):
        return {"callable": unit.spec.call}
    if isinstance(unit, EndpointUnit):
        return {"model_name": unit.spec.name}
    expert = {"expert": unit.expert.name} if unit.expert else {}
    return {"backbone": unit.spec.source, "prompt": unit.prompt.name, "template": unit.prompt.template, **expert}
