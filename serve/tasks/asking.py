"""What is asked of the part that embeds tasks, from what a client sent: names resolved, answers read and checked."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.messages import Classify, TaskAsked
from cluster.door_settings import HttpSettings
from cluster.settings import TaskSettings
from metasepia.embedding import probes
from metasepia.embedding.answers import Answers
from metasepia.embedding.probes import ProbeTexts
from metasepia.errors import InvalidRequest, NotSupported, UnknownName, WindowExceeded
from metasepia.reasoning.named import PREFIX as CONTEXT
from metasepia.reasoning.named import check_labels
from serve.access.principal import current
from serve.contexts.named import Contexts
from serve.models.names import AUTO, Names
from serve.models.prompts import away
from serve.parts import Catalogue, Reasoning
from serve.requests.asked import Asked
from serve.requests.inputs import Inputs, read_labelled
from serve.tasks.bodies import TaskRequest


class TaskAsking:
    """Reads bodies of POST /v1/tasks."""

    def __init__(
        self,
        http: HttpSettings,
        settings: TaskSettings,
        names: Names,
        contexts: Contexts,
        reasoning: Reasoning,
        catalogue: Catalogue,
    ) -> None:
        self._http, self._settings, self._names = http, settings, names
        self._contexts, self._reasoning, self._catalogue = contexts, reasoning, catalogue
        self._texts: ProbeTexts | None = None

    @property
    def probe_texts(self) -> ProbeTexts:
        """Raises CorruptArtefact for texts that are not those of their digest."""
        if self._texts is None:
            self._texts = probes.shipped().first(self._settings.num_probes)
        return self._texts

    async def asked(self, body: TaskRequest, asked: Asked) -> TaskAsked:
        """Names resolved, answers read. Raises UnknownName, DeletedName, NotSupported and InvalidRequest by field."""
        expert = body.expert
        if expert is not None:
            await self._check_expert(expert)
        answers, box, source, kind = None, {}, {}, "model"
        if body.examples is not None:
            kind, examples = "data_set", body.examples
            num_chars = 64 * len(examples)
            answers = await away(num_chars, lambda: self._data_set(examples))
        elif body.answers is not None:
            given, texts = body.answers, self.probe_texts
            answers = await away(16 * len(texts), lambda: given.read(texts))
        elif body.prompt is None:
            assert body.model is not None  # `check` has seen to it
            answers, source = await self._context(body.model, asked)
        else:
            kind, (box, expert) = "prompt", await self._box(body)
            source = {"model": body.model}
        return TaskAsked(
            owner=current().tenant,
            name=body.name,
            kind=kind,
            method=body.method,
            seed=body.seed,
            answers=answers,
            box=box,
            expert=expert,
            source=source,
            background=body.background or bool(box),
            leave_out=body.long_texts == "leave_out",
            deadline_unix_s=asked.deadline.unix_s,
        )

    def _data_set(self, examples: Sequence[Any]) -> Answers:
        read = read_labelled(examples, (), self._http)
        if read.kind != "text":
            raise NotSupported(f"{read.fields[0]} as {read.kind} in a task", "give texts with labels")
        labels = [one.label for one in read.examples]
        check_labels(labels)
        return Answers.of_labelled([str(one.content) for one in read.examples], labels)

    async def _check_expert(self, name: str) -> None:
        try:
            await self._catalogue.resolve("expert", name, current().tenant)
        except UnknownName as error:
            raise UnknownName("task's expert", name[:80], error.known) from None

    async def _box(self, body: TaskRequest) -> tuple[dict[str, Any], str | None]:
        """What is to be asked, by digests, and the expert that the model is, if it is one."""
        assert body.model is not None and body.prompt is not None
        if body.model == AUTO:
            raise NotSupported("a task of the model auto", "name the model whose answers are meant")
        prompt = body.prompt.to_json()
        chosen = await self._names.resolve(body.model)
        box = {
            "backbone": chosen.backbone.prepared.digest,
            "adapter": [[digest, weight] for digest, weight in chosen.adapter],
            "prompt": prompt,
        }
        _, _, name = body.model.partition(":")
        is_expert = len(chosen.adapter) == 1 and not name.startswith("mix@")
        return box, name if is_expert else None

    async def _context(self, id_: str, asked: Asked) -> tuple[Answers, dict[str, Any]]:
        """A context's probabilities for the probe texts."""
        if not id_.startswith(CONTEXT):
            raise InvalidRequest("prompt", "this field is required: a model is asked by a prompt with {text} in it")
        stored = await self._contexts.find(id_)
        if stored.card["input"] != "text":
            raise NotSupported(f"a task of a context of {stored.card['input']}", "name one of texts")
        texts = self.probe_texts
        queries = Inputs("text", texts.texts, ("model",) * len(texts))
        found = await self._contexts.embed_queries(stored, queries, asked.deadline, asked.digest)
        classified = await self._reasoning.classify(
            Classify(
                module=stored.card["module"]["digest"],
                context=stored.artefact.digest,
                queries=found.values,
                deadline_unix_s=asked.deadline.unix_s,
            )
        )
        table = classified.probabilities.astype(np.float64)
        answers = Answers.of_probabilities(texts.texts, classified.classes, table / table.sum(1, keepdims=True))
        return answers, {"model": id_, "module": classified.module, "context": classified.context}


def in_fields(error: BaseException, body: TaskRequest) -> BaseException:
    """A complaint about `texts[i]`, `replies[i]` or the answers, about the request's field instead."""
    if type(error) not in (InvalidRequest, WindowExceeded):
        return error
    assert isinstance(error, InvalidRequest)
    found = re.fullmatch(r"(texts|replies|labels|answers|probabilities|tasks?)(\[\d+\])?", error.param or "")
    if found is None:
        return error
    if body.examples is not None:
        field = f"examples{found[2]}.text" if found[1] == "texts" and found[2] else "examples"
    elif body.answers is not None:
        field = f"answers.{found[1]}{found[2] or ''}" if found[1] != "answers" else "answers"
    else:
        field = "model"
    if isinstance(error, WindowExceeded):
        return WindowExceeded(field, error.num_tokens, error.window, error.way_out)
    return InvalidRequest(field, error.message)
