"""What each operation takes and answers, beside the table of operations: the OpenAPI document is made from both.

Bodies are the very models that check requests; answers are those of `serve.answers` and
`serve.answers_kept`, to which tests hold real ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from metasepia.embedding.space import KINDS
from serve import answers, answers_kept
from serve.access.routes import KeyRequest
from serve.experts.search_bodies import SearchRequest
from serve.requests.schemas import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    ContextRequest,
    EmbeddingsRequest,
    HiddenStatesRequest,
    MixtureRequest,
    MoreExamplesRequest,
)
from serve.tasks.bodies import CompareRequest, TaskRequest

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Query:
    """One parameter of the query string."""

    name: str
    schema: Schema
    says: str


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Of one operation."""

    tag: str
    says: str
    answer: type[BaseModel] | str
    """A model of JSON, or the media type of another answer."""
    body: type[BaseModel] | None = None
    query: tuple[Query, ...] = ()
    other_status: int | None = None
    """Which the same answer may come with in place of 200."""
    events: type[BaseModel] | None = None
    """Of the stream that `stream: true` asks for."""
    arrow_in: bool = False
    arrow_out: bool = False
    uploads: bool = False
    unready: type[BaseModel] | None = None
    """What a 503 holds beyond the envelope."""


def _number(name: str, default: int, low: int, high: int, says: str) -> Query:
    return Query(name, {"type": "integer", "minimum": low, "maximum": high, "default": default}, says)


_LIMIT = _number("limit", 100, 1, 1000, "How many at most.")
_AFTER = Query("after", {"type": "string"}, "The id behind which the page begins: `last_id` of the page before.")
_KIND = Query("kind", {"type": "string", "enum": list(KINDS)}, "Of this kind only.")
_INCLUDE = Query("include", {"type": "string", "enum": ["vector"]}, "The vectors too.")
_DAY = {"type": "string", "format": "date"}

CONTRACTS: Mapping[str, Contract] = {
    "Classify": Contract(
        tag="Classification",
        says="A label for each input, by examples in the request or by a context made before. Nothing is trained.",
        body=ClassifyRequest,
        answer=answers.Classification,
        arrow_in=True,
        arrow_out=True,
    ),
    "CreateContext": Contract(
        tag="Contexts",
        says="Labelled examples become a classifier with a name of its own. The same examples are the same context.",
        body=ContextRequest,
        answer=answers.ContextMade,
        arrow_in=True,
    ),
    "ListContexts": Contract(
        tag="Contexts", says="A page in order of id.", answer=answers.ContextList, query=(_LIMIT, _AFTER)
    ),
    "GetContext": Contract(tag="Contexts", says="One context.", answer=answers.Context),
    "DeleteContext": Contract(
        tag="Contexts", says="Takes a context away; a second time the same answer.", answer=answers.Deleted
    ),
    "ListContextExamples": Contract(
        tag="Contexts",
        says="Its examples, numbered as explanations number them.",
        answer=answers.ContextExampleList,
        query=(
            _number("begin", 0, 0, 10**9, "The first one's number."),
            _number("limit", 1000, 1, 10_000, "How many at most."),
        ),
    ),
    "ExtendContext": Contract(
        tag="Contexts",
        says="A new context: the old one's examples and these.",
        body=MoreExamplesRequest,
        answer=answers.ContextMade,
        arrow_in=True,
    ),
    "CreateChatCompletion": Contract(
        tag="Completions",
        says="The next message of a chat, by the backbone alone or with an expert.",
        body=ChatRequest,
        answer=answers.ChatCompletion,
        events=answers.ChatCompletionChunk,
    ),
    "CreateCompletion": Contract(
        tag="Completions",
        says="What follows a text.",
        body=CompletionRequest,
        answer=answers.Completion,
        events=answers.CompletionChunk,
    ),
    "CreateEmbeddings": Contract(
        tag="Embeddings",
        says="Vectors of unit norm, by an encoder or a backbone.",
        body=EmbeddingsRequest,
        answer=answers.EmbeddingList,
        arrow_in=True,
        arrow_out=True,
    ),
    "CreateHiddenStates": Contract(
        tag="Hidden states",
        says="A backbone's states by layer, pooled or of every token, with an expert or without.",
        body=HiddenStatesRequest,
        answer=answers.HiddenStatesList,
        arrow_in=True,
        arrow_out=True,
    ),
    "ListObservedTasks": Contract(
        tag="Hidden states", says="Tasks with running centroids.", answer=answers.ObservedTaskList
    ),
    "GetObservedTask": Contract(tag="Hidden states", says="One of them.", answer=answers.ObservedTask),
    "DeleteObservedTask": Contract(tag="Hidden states", says="Forgets its centroids.", answer=answers.Deleted),
    "AddExpert": Contract(
        tag="Experts",
        says="Registers an expert: z vectors (safetensors) or a PEFT LoRA with its config. The name must be free.",
        answer=answers_kept.Expert,
        uploads=True,
    ),
    "ListExperts": Contract(
        tag="Experts", says="A page in order of name.", answer=answers_kept.ExpertList, query=(_LIMIT, _AFTER)
    ),
    "GetExpert": Contract(
        tag="Experts", says="One expert, by name or digest, with its card.", answer=answers_kept.ExpertWithCard
    ),
    "ReplaceExpert": Contract(
        tag="Experts", says="The name stands for this expert from now on.", answer=answers_kept.Expert, uploads=True
    ),
    "DeleteExpert": Contract(
        tag="Experts", says="Takes the name away; a second time the same answer.", answer=answers.Deleted
    ),
    "GetExpertContent": Contract(tag="Experts", says="Its safetensors file.", answer="application/octet-stream"),
    "CreateMixture": Contract(
        tag="Mixtures",
        says="Registers weights on experts: a model of its own.",
        body=MixtureRequest,
        answer=answers_kept.MixtureMade,
    ),
    "ListMixtures": Contract(
        tag="Mixtures", says="A page in order of name.", answer=answers_kept.MixtureList, query=(_LIMIT, _AFTER)
    ),
    "CreateSearch": Contract(
        tag="Mixtures",
        says="Looks for the mixture that answers a few examples best. A job: its answer is at its location.",
        body=SearchRequest,
        answer=answers_kept.Search,
        other_status=202,
    ),
    "ListSearches": Contract(tag="Mixtures", says="All searches.", answer=answers_kept.SearchList),
    "GetSearch": Contract(tag="Mixtures", says="How one stands.", answer=answers_kept.Search),
    "GetSearchTrace": Contract(tag="Mixtures", says="Generation by generation.", answer=answers_kept.SearchTrace),
    "GetSearchPicture": Contract(tag="Mixtures", says="The same as a drawing.", answer="image/svg+xml"),
    "CancelSearch": Contract(tag="Mixtures", says="Ends it where it stands.", answer=answers_kept.Search),
    "GetMixture": Contract(
        tag="Mixtures", says="One mixture, by name or digest, with its card.", answer=answers_kept.MixtureWithCard
    ),
    "DeleteMixture": Contract(
        tag="Mixtures", says="Takes it away; its experts stay. A second time the same answer.", answer=answers.Deleted
    ),
    "CreateTask": Contract(
        tag="Tasks",
        says="Embeds a data set, a prompt on a model, a context, or the answers of a model of the client's own.",
        body=TaskRequest,
        answer=answers_kept.TaskMade,
        other_status=202,
    ),
    "ListTasks": Contract(
        tag="Tasks",
        says="A page in order of id.",
        answer=answers_kept.TaskList,
        query=(_LIMIT, _AFTER, _KIND, _INCLUDE),
        arrow_out=True,
    ),
    "ListProbes": Contract(
        tag="Tasks", says="The texts that models and prompts are asked.", answer=answers_kept.ProbeList
    ),
    "GetTaskMap": Contract(
        tag="Tasks",
        says="All tasks of one method as a page to look at.",
        answer="text/html",
        query=(Query("method", {"type": "string"}, "The settings' where none is named."),),
    ),
    "CompareTasks": Contract(
        tag="Tasks", says="Cosines of tasks, each with each.", body=CompareRequest, answer=answers_kept.TaskComparison
    ),
    "GetTask": Contract(tag="Tasks", says="One task.", answer=answers_kept.Task, query=(_INCLUDE,), arrow_out=True),
    "DeleteTask": Contract(
        tag="Tasks", says="Ends its job and takes its name away; a second time the same.", answer=answers.Deleted
    ),
    "FindNearestTasks": Contract(
        tag="Tasks",
        says="The most alike of the same space.",
        answer=answers_kept.NearestTaskList,
        query=(_number("k", 10, 1, 1000, "How many at most."), _KIND),
    ),
    "ListJobs": Contract(
        tag="Jobs",
        says="Long works of the caller: Ray jobs, searches, tasks that ask models; the newest first.",
        answer=answers_kept.JobList,
        query=(
            Query("kind", {"type": "string", "enum": ["ray", "search", "task"]}, "Only these."),
            Query("limit", {"type": "integer", "minimum": 1, "maximum": 200, "default": 100}, "At most so many."),
        ),
    ),
    "GetJob": Contract(tag="Jobs", says="How one stands.", answer=answers_kept.Job),
    "ListModels": Contract(
        tag="Models",
        says="Everything that can be named: backbones, encoders, experts, mixtures, contexts.",
        answer=answers_kept.ModelList,
    ),
    "GetModel": Contract(tag="Models", says="One of them.", answer=answers_kept.Model),
    "CreateKey": Contract(
        tag="Keys", says="Makes a key. No other answer has its secret.", body=KeyRequest, answer=answers_kept.KeyMade
    ),
    "ListKeys": Contract(
        tag="Keys", says="A page in order of id.", answer=answers_kept.KeyList, query=(_LIMIT, _AFTER)
    ),
    "GetKey": Contract(tag="Keys", says="One key, without its secret.", answer=answers_kept.Key),
    "RevokeKey": Contract(tag="Keys", says="For good; a second time the same answer.", answer=answers.Deleted),
    "GetUsage": Contract(
        tag="Keys",
        says="What keys have used, by day.",
        answer=answers_kept.UsageList,
        query=(
            Query("from", _DAY, "The first day; thirty before the last where none is named."),
            Query("to", _DAY, "The last day; today where none is named."),
            Query("tenant", {"type": "string"}, "Of this tenant; all of them need the scope admin."),
            _number("limit", 1000, 1, 10_000, "How many at most."),
        ),
    ),
    "GetHealth": Contract(
        tag="Graph",
        says="A real forward through every part.",
        answer=answers_kept.Health,
        unready=answers_kept.NotReady,
    ),
    "GetMetrics": Contract(tag="Graph", says="Prometheus' text.", answer="text/plain"),
    "GetStatus": Contract(tag="Graph", says="The graph at a glance: parts, queues, rates.", answer=answers_kept.Status),
    "GetVersion": Contract(tag="Graph", says="Of the package.", answer=answers_kept.Version),
}
"""By the operation's name."""
