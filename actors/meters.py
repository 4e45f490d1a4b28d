"""Every metric, declared once: what it is called, what it counts, by what it is divided.

A metric is recorded where it happens: `meters.REQUESTS.inc(route=..., status=...)`, `.set(value, ...)`,
`.observe(value, ...)`; it needs no Ray to be recorded (`actors/recording.py`). Dashboards and alerts are made from
these declarations (`serve/dashboards.py`) and name nothing else. Tenants, keys, request ids and texts are never labels:
they are in logs and traces. Sums of histograms are not exact in Ray, so what is to be averaged has counters.

Queued, running, cache and adapters are what the inference gateway's model server protocol asks for.
"""

from typing import TypeVar

from actors.recording import MAX_VALUES, Composed, Counter, Gauge, Histogram, Meter, Sampling

M = TypeVar("M", bound=Meter)

PREFIX = "metasepia_"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)

METRICS: dict[str, Meter] = {}
"""By name, in the order of declaration."""

SAMPLING = Sampling(lambda: [one for one in METRICS.values() if isinstance(one, Gauge)])
"""`SAMPLING.follow(self._tell)`: gauges of what an object holds."""


def _counter(name: str, help: str, *labels: str, max_values: int = MAX_VALUES) -> Counter:
    return _declared(Counter(PREFIX + name, help, labels, max_values))


def _gauge(name: str, help: str, *labels: str, max_values: int = MAX_VALUES) -> Gauge:
    return _declared(Gauge(PREFIX + name, help, labels, max_values))


def _histogram(name: str, help: str, *labels: str, bounds: tuple[float, ...] = SECONDS) -> Histogram:
    return _declared(Histogram(PREFIX + name, help, labels, bounds=bounds))


def _composed(name: str, help: str, *labels: str) -> Composed:
    return _declared(Composed(PREFIX + name, help, labels))


def _declared(meter: M) -> M:
    assert meter.name not in METRICS
    METRICS[meter.name] = meter
    return meter


# -- gateway -----------------------------------------------------------------------------------------------------------

REQUESTS = _counter(
    "requests_total", "Requests answered; status 499: the client left.", "route", "status", max_values=128
)
FAILURES = _counter(
    "request_failures_total", "Requests refused or failed, by the code of their error.", "route", "reason"
)
DURATION = _histogram(
    "request_duration_seconds", "From a request's arrival at the gateway to the end of its answer.", "route"
)
RUNNING = _gauge("requests_in_gateway", "Requests inside the gateway now.")
TOKENS_DONE = _counter("tokens_total", "Tokens read (prompt) and written (answer) for requests.", "kind")
ADMISSION_WAITING = _gauge("admission_queued_requests", "Requests that wait for their turn at the gateway.")
ADMISSION_TOKENS = _gauge("admission_admitted_tokens", "Tokens of the requests that were let in and have not ended.")
ADMISSION_WAIT = _histogram("admission_wait_seconds", "Wait for a turn at the gateway.")
ADMISSION_REFUSED = _counter("admission_refused_total", "Requests that the gateway did not let in.", "reason")
REPLAYS = _counter("idempotent_replays_total", "Requests with an Idempotency-Key, by what became of it.", "outcome")
KEYS_REFUSED = _counter("keys_refused_total", "Requests refused for their key.", "reason")
NODES = _composed("metrics_nodes", "Ray nodes whose metrics /metrics gathered, and those that kept silent.", "state")
PART_READY = _gauge("part_ready", "1 where a part's last check went well, 0 where not.", "part")

# -- backbones: the rows of one scheduler ------------------------------------------------------------------------------

QUEUED = _gauge("queued_requests", "Rows that wait in a backbone's scheduler.", "backbone")
RUNNING_ROWS = _gauge("running_requests", "Rows of a backbone that are read or decode.", "backbone")
QUEUED_TOKENS = _gauge("queued_tokens", "Tokens of the rows that wait, prompts and answers.", "backbone")
CACHE = _gauge("kv_cache_utilisation", "Share of the key/value cache's bound that is reserved; 0 to 1.", "backbone")
PREFIX_TOKENS = _gauge("prefix_tokens", "Tokens of kept prefixes.", "backbone")
REUSED_TOKENS = _counter("prefix_reused_tokens_total", "Tokens taken from kept prefixes instead of read.", "backbone")
ADAPTER_ROWS = _gauge(
    "adapter_requests", "Rows by expert or mixture and by state: running or waiting.", "backbone", "adapter", "state"
)
ADAPTER_INFO = _composed(
    "adapter_requests_info",
    "Unix time; the labels are read by inference gateways: experts of running and of waiting rows.",
    "backbone", "running_lora_adapters", "waiting_lora_adapters", "max_lora",
)  # fmt: skip
EXPERT_ROOM = _gauge("expert_room", "Experts, as large as those held, that a rank has room for.", "backbone")
EXPERTS = _gauge("experts_resident", "Experts that each rank of a backbone holds.", "backbone")
EXPERT_BYTES = _gauge("expert_bytes", "Memory of the experts that a rank holds.", "backbone")
EXPERTS_MOVED = _counter(
    "experts_moved_total", "Experts brought to the ranks (in) and dropped (out).", "backbone", "way"
)
PUT_BACK = _counter("rows_put_back_total", "Background rows that made way for others.", "backbone")
ROWS = _counter("rows_total", "Rows ended, by how: stop, length, whole, or the error.", "backbone", "outcome")
FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", "From a row's arrival at its backbone to its first token.", "backbone"
)
PER_TOKEN = _histogram("time_per_output_token_seconds", "Mean time between a row's tokens after its first.", "backbone")
ROW_QUEUE = _histogram(
    "row_queue_seconds", "From a row's arrival in the scheduler until it begins to be read.", "backbone"
)
ROW_PREFILL = _histogram("row_prefill_seconds", "From a row's beginning until its prompt was read.", "backbone")
STEPS = _counter("steps_total", "Steps of a backbone's scheduler.", "backbone")
STEP = _histogram("step_seconds", "One step of a backbone, planned, run and absorbed.", "backbone")
STEP_ROWS = _histogram(
    "step_rows", "Rows in a step, those that decode and those that are read.", "backbone", bounds=SIZES
)
BATCH_TOKENS = _counter(
    "batch_tokens_total", "Tokens in forwards, by part: used ones, and padding.", "part", "model", "what"
)
REBUILDS = _counter("gang_rebuilds_total", "Gangs replaced after a rank died or froze.", "backbone", "by")
REBUILDING = _gauge("gang_rebuilding", "1 while a backbone has no gang.", "backbone")

# -- encoders and the reasoning pool -----------------------------------------------------------------------------------

ENCODER_QUEUED = _gauge("encoder_queued_items", "Texts or files that wait in an encoder or run.", "encoder")
ENCODER_QUEUE = _histogram(
    "encoder_queue_seconds", "From a request's arrival at an encoder to its first forward.", "encoder"
)
ENCODER_FORWARD = _histogram("encoder_forward_seconds", "One forward of an encoder.", "encoder")
ENCODER_BATCH = _histogram("encoder_batch_items", "Items of one forward.", "encoder", bounds=SIZES)
ENCODER_ITEMS = _counter("encoder_items_total", "Items embedded, by where from: forward or cache.", "encoder", "source")
ENCODER_CACHE = _gauge("encoder_cache_bytes", "Vectors kept of items seen before.", "encoder")
POOL_QUEUED = _gauge("reasoning_queued_queries", "Queries that wait in the reasoning pool or run.")
POOL_AUDITS = _gauge("reasoning_queued_audits", "Explanations and self-checks that wait or run.")
POOL_QUEUE = _histogram("reasoning_queue_seconds", "From a classification's arrival at the pool to its first forward.")
POOL_FORWARD = _histogram("reasoning_forward_seconds", "One forward of the reasoning pool.")
POOL_BATCH = _histogram("reasoning_batch_queries", "Queries of one forward, of all its contexts.", bounds=SIZES)
POOL_QUERIES = _counter("reasoning_queries_total", "Queries answered.")
POOL_CONTEXTS = _counter("reasoning_contexts_total", "Contexts asked for, by how: compiled, fetched, kept.", "how")
POOL_KEPT = _gauge("reasoning_contexts_kept", "Compiled contexts in memory.")
POOL_BYTES = _gauge("reasoning_context_bytes", "Memory of the compiled contexts.")

# -- other parts -------------------------------------------------------------------------------------------------------

SEARCHES = _counter("expert_searches_total", "Few-shot searches that were asked for.")
MIXTURES = _counter("mixtures_registered_total", "Mixtures registered.")
TASKS = _counter("task_embeddings_total", "Tasks embedded.")
TASK_BATCHES = _counter("task_batches_total", "Batches in which tasks were embedded.")
TASKS_QUEUED = _gauge("task_queue", "Tasks that wait, by kind: at hand, or jobs in the background.", "kind")
REGISTRY_CALLS = _counter(
    "registry_calls_total", "Calls of the registry, by how their callers saw them end.", "call", "outcome"
)
REGISTRY_TIME = _histogram("registry_call_seconds", "One call of the registry, as its caller sees it.", "call")
ROUTED = _counter("auto_routed_total", "Requests to `auto` by the stage that chose, or `abstained`.", "stage")
_CENTROID = ("backbone", "task", "expert", "layer", "pooling")
DRIFT = _gauge(
    "centroid_drift",
    "Distance of a task's recent hidden states from its reference, in spreads of the reference.",
    *_CENTROID,
    max_values=512,
)
CENTROID_STATES = _gauge("centroid_states", "Hidden states in a task's centroid.", *_CENTROID, max_values=512)
QUALITY = _gauge(
    "cluster_quality",
    "Mean separation of the tasks by a layer: 1 - (spread of a task / distance to the nearest other one).",
    "backbone", "source", "expert", "layer", "pooling",
)  # fmt: skip
