"""Every call of the door, in one table: what HTTP and gRPC name it, what carries it out, and the scope that it needs.

Routes, the OpenAPI document, the gRPC methods and the check of keys are made from it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from serve.access.principal import Scope
from serve.door import Door

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """One call."""

    name: str
    """Of the gRPC method, and the OpenAPI operationId."""
    method: str
    path: str
    """Starlette's pattern."""
    handler: Handler
    scope: Scope | None
    """None: open to everyone, also where keys are asked for."""
    replayed: bool = True
    """Whether its answer may be kept for an Idempotency-Key; not where it holds a secret."""

    @property
    def changes(self) -> bool:
        """Whether something is another after it, so that it may not be done twice."""
        return self.method != "GET" and self.scope != "infer" and self.name != "CompareTasks"


def operations(door: Door) -> tuple[Operation, ...]:
    """In the order in which paths are matched."""
    return (
        Operation("Classify", "POST", "/v1/classify", door.classify, "infer"),
        Operation("CreateContext", "POST", "/v1/contexts", door.create_context, "contexts"),
        Operation("ListContexts", "GET", "/v1/contexts", door.contexts, "contexts"),
        Operation("GetContext", "GET", "/v1/contexts/{id}", door.context, "contexts"),
        Operation("DeleteContext", "DELETE", "/v1/contexts/{id}", door.delete_context, "contexts"),
        Operation("ListContextExamples", "GET", "/v1/contexts/{id}/examples", door.context_examples, "contexts"),
        Operation("ExtendContext", "POST", "/v1/contexts/{id}/examples", door.extend_context, "contexts"),
        Operation("CreateChatCompletion", "POST", "/v1/chat/completions", door.chat, "infer"),
        Operation("CreateCompletion", "POST", "/v1/completions", door.complete, "infer"),
        Operation("CreateEmbeddings", "POST", "/v1/embeddings", door.embeddings, "infer"),
        Operation("CreateHiddenStates", "POST", "/v1/hidden_states", door.hidden_states.post, "infer"),
        Operation("ListObservedTasks", "GET", "/v1/hidden_states/tasks", door.tasks.list, "infer"),
        Operation("GetObservedTask", "GET", "/v1/hidden_states/tasks/{task}", door.tasks.get, "infer"),
        Operation("DeleteObservedTask", "DELETE", "/v1/hidden_states/tasks/{task}", door.tasks.delete, "contexts"),
        Operation("AddExpert", "POST", "/v1/experts", door.experts.add, "experts:write"),
        Operation("ListExperts", "GET", "/v1/experts", door.experts.list, "infer"),
        Operation("GetExpert", "GET", "/v1/experts/{name}", door.experts.get, "infer"),
        Operation("ReplaceExpert", "PUT", "/v1/experts/{name}", door.experts.replace, "experts:write"),
        Operation("DeleteExpert", "DELETE", "/v1/experts/{name}", door.experts.delete, "experts:write"),
        Operation("GetExpertContent", "GET", "/v1/experts/{name}/content", door.experts.content, "infer"),
        Operation("CreateMixture", "POST", "/v1/mixtures", door.mix, "experts:write"),
        Operation("ListMixtures", "GET", "/v1/mixtures", door.mixtures.list, "infer"),
        Operation("CreateSearch", "POST", "/v1/mixtures/search", door.searching.create, "experts:write"),
        Operation("ListSearches", "GET", "/v1/mixtures/search", door.searching.list, "infer"),
        Operation("GetSearch", "GET", "/v1/mixtures/search/{id}", door.searching.get, "infer"),
        Operation("GetSearchTrace", "GET", "/v1/mixtures/search/{id}/trace", door.searching.trace, "infer"),
        Operation("GetSearchPicture", "GET", "/v1/mixtures/search/{id}/picture", door.searching.picture, "infer"),
        Operation("CancelSearch", "DELETE", "/v1/mixtures/search/{id}", door.searching.cancel, "experts:write"),
        Operation("GetMixture", "GET", "/v1/mixtures/{digest}", door.mixtures.get, "infer"),
        Operation("DeleteMixture", "DELETE", "/v1/mixtures/{digest}", door.mixtures.delete, "experts:write"),
        Operation("CreateTask", "POST", "/v1/tasks", door.task_embeddings.make, "contexts"),
        Operation("ListTasks", "GET", "/v1/tasks", door.task_embeddings.list, "contexts"),
        Operation("ListProbes", "GET", "/v1/tasks/probes", door.task_embeddings.probes, "contexts"),
        Operation("GetTaskMap", "GET", "/v1/tasks/map", door.task_embeddings.map, "contexts"),
        Operation("CompareTasks", "POST", "/v1/tasks/compare", door.task_embeddings.compare, "contexts"),
        Operation("GetTask", "GET", "/v1/tasks/{id}", door.task_embeddings.get, "contexts"),
        Operation("DeleteTask", "DELETE", "/v1/tasks/{id}", door.task_embeddings.delete, "contexts"),
        Operation("FindNearestTasks", "GET", "/v1/tasks/{id}/nearest", door.task_embeddings.nearest, "contexts"),
        Operation("ListJobs", "GET", "/v1/jobs", door.jobs.list, "infer"),
        Operation("GetJob", "GET", "/v1/jobs/{id}", door.jobs.get, "infer"),
        Operation("ListModels", "GET", "/v1/models", door.models, "infer"),
        Operation("GetModel", "GET", "/v1/models/{model:path}", door.model, "infer"),
        Operation("CreateKey", "POST", "/v1/keys", door.keys.create, "admin", replayed=False),
        Operation("ListKeys", "GET", "/v1/keys", door.keys.list, "admin"),
        Operation("GetKey", "GET", "/v1/keys/{id}", door.keys.get, "admin"),
        Operation("RevokeKey", "DELETE", "/v1/keys/{id}", door.keys.revoke, "admin"),
        Operation("GetUsage", "GET", "/v1/usage", door.keys.usage, "infer"),
        Operation("GetHealth", "GET", "/health", door.health, None),
        Operation("GetMetrics", "GET", "/metrics", door.prometheus, "admin"),
        Operation("GetStatus", "GET", "/v1/status", door.status, "admin"),
        Operation("GetVersion", "GET", "/version", door.version, None),
    )
