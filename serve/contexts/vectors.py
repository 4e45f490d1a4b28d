"""What a context's inputs become: given vectors as they are, `stream` through an encoder or a backbone, `vanilla` and
`loo` through a backbone's prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.messages import EncoderInfo, Receipt
from metasepia.digests import short
from metasepia.errors import InvalidRequest, NotSupported, Outdated, UnknownName
from metasepia.reasoning.named import (
    Content,
    EmbeddedContext,
    EncoderName,
    InputKind,
    NamedContext,
    vectors_of_contents,
)
from serve.contexts.prompted import Prompted, Read
from serve.load.admission import POOL, Admission, Place, estimate
from serve.models.embedding import Embedding
from serve.models.names import Names
from serve.models.prompts import Prompts
from serve.requests.deadlines import Deadline
from serve.requests.inputs import Inputs, Labelled


@dataclass(frozen=True)
class Vectors:
    """float32 [inputs, width], the tokens read for them, and what made them."""

    values: np.ndarray
    num_tokens: int
    receipt: Receipt


@dataclass(frozen=True)
class Embedded:
    """A context with its vectors, those of queries to it, the tokens read, and what made them."""

    context: EmbeddedContext
    queries: np.ndarray
    """float32 [queries, width]"""
    num_tokens: int
    receipt: Receipt


class ContextVectors:
    """Embeds contexts and queries to them."""

    def __init__(
        self, names: Names, embedding: Embedding, prompts: Mapping[str, Prompts], admission: Admission
    ) -> None:
        self._names, self._embedding, self._prompts, self._admission = names, embedding, prompts, admission

    async def place(
        self, encoder: EncoderName | None, what: str, kind: InputKind, contents: Sequence[Content], deadline: Deadline
    ) -> Place:
        """The place, in the queue of what reads these contents, of a request to `what`. Raises Outdated."""
        tokens, num_bytes = estimate(contents, kind)
        part = POOL if encoder is None else await self.served(encoder, what)
        return self._admission.admitted(tokens, num_bytes, deadline, part=part)

    async def encoder(self, name: str | None, kind: InputKind) -> EncoderName:
        """What embeds `kind` under this name; None: the first encoder of that kind.

        Raises UnknownName, and NotSupported for an encoder of another kind.
        """
        kinds = await self._kinds()
        served = await self._digests()
        if name is None:
            name = next((id_ for id_, one in kinds.items() if one == kind), None)
            if name is None:
                raise NotSupported(f"an example as {kind}", f"serve an encoder of {kind}, or send vectors")
        if name not in served:
            raise UnknownName("encoder", name, tuple(served))
        if kinds.get(name, "text") != kind:
            others = ", ".join(id_ for id_, one in kinds.items() if one == kind) or "vectors"
            raise NotSupported(f"{kind} with {name}, which reads {kinds.get(name, 'text')},", f"use {others}")
        return EncoderName(name, served[name])

    async def served(self, encoder: EncoderName, what: str) -> str:
        """The name that the encoder has here now. Raises Outdated for `what` was made with it."""
        served = await self._digests()
        for name, digest in served.items():
            if digest == encoder.digest:
                return name
        here = tuple(f"{name} ({short(digest)})" for name, digest in served.items())
        raise Outdated(what, "encoder", f"{encoder.id} ({short(encoder.digest)})", here)

    async def new(
        self, named: NamedContext, labelled: Labelled, queries: Inputs | None, deadline: Deadline, request_digest: str
    ) -> Embedded:
        """The vectors of a new context, and of queries to it, all in one go. `labelled` is what `named` was made of."""
        asked = queries or Inputs(named.kind, (), ())
        if asked.contents and asked.kind != named.kind:
            raise InvalidRequest(asked.fields[0], f"{asked.kind} for examples of {named.kind}")
        examples = Inputs(
            named.kind, tuple(one.content for one in named.examples), tuple(labelled.fields[i] for i in named.given)
        )
        fields = tuple(labelled.unlabelled_fields[i] for i in named.given_unlabelled)
        unlabelled = Inputs(named.kind, named.unlabelled, fields)
        if named.protocol != "stream":
            return await self._prompted(named, examples, unlabelled, asked, deadline, request_digest)
        together = Inputs(
            named.kind,
            (*examples.contents, *unlabelled.contents, *asked.contents),
            (*examples.fields, *unlabelled.fields, *asked.fields),
        )
        found = await self._streamed(named, together, deadline, request_digest)
        return _divided(named, found)

    async def more(
        self, old: EmbeddedContext, named: NamedContext, labelled: Labelled, deadline: Deadline, request_digest: str
    ) -> Embedded:
        """`old` with more examples, which is `named`; only those are embedded where no example changes another's."""
        if named.protocol == "stream":
            new = Inputs(labelled.kind, tuple(one.content for one in labelled.examples), labelled.fields)
            found = await self._streamed(named, new, deadline, request_digest)
            vectors = np.concatenate([old.vectors, found.values])[list(named.given)]
            context = EmbeddedContext(named, np.ascontiguousarray(vectors), old.unlabelled)
            return Embedded(context, found.values[:0], found.num_tokens, found.receipt)
        known = tuple(f"the context's example {i}" for i in range(len(old.named.examples)))
        fields = (*known, *labelled.fields)
        examples = Inputs(
            named.kind, tuple(one.content for one in named.examples), tuple(fields[i] for i in named.given)
        )
        unlabelled = Inputs(named.kind, named.unlabelled, tuple("unlabelled" for _ in named.unlabelled))
        none = Inputs(named.kind, (), ())
        return await self._prompted(named, examples, unlabelled, none, deadline, request_digest)

    async def queries(self, named: NamedContext, queries: Inputs, deadline: Deadline, request_digest: str) -> Vectors:
        """Vectors of queries to a context. Of a prompted one `named` has its examples."""
        if named.protocol == "stream":
            return await self._streamed(named, queries, deadline, request_digest)
        async with deadline.limit("the embedding"):
            prompt = await self._prompt(named, ["examples"] * len(named.examples))
            read = await prompt.queries(_texts(queries), queries.fields, deadline)
        return Vectors(read.vectors, read.num_tokens, read.receipt(request_digest))

    async def _streamed(self, named: NamedContext, inputs: Inputs, deadline: Deadline, request_digest: str) -> Vectors:
        if named.kind == "vector":
            widths = [len(one) for one in inputs.contents]
            for width, field in zip(widths, inputs.fields, strict=True):
                if width != widths[0]:
                    raise InvalidRequest(
                        field, f"{width // 4} numbers, where {inputs.fields[0]} has {widths[0] // 4}; use one width"
                    )
            return Vectors(vectors_of_contents(inputs.contents), 0, Receipt(request=request_digest))
        assert named.encoder is not None
        name = await self.served(named.encoder, f"the context {named.id}")
        found = await self._embedding.embed(name, inputs.contents, inputs.fields, deadline, request_digest)
        return Vectors(found.vectors, found.num_tokens, found.receipt)

    async def _prompted(
        self,
        named: NamedContext,
        examples: Inputs,
        unlabelled: Inputs,
        queries: Inputs,
        deadline: Deadline,
        request_digest: str,
    ) -> Embedded:
        """Unlabelled texts are read as queries are, after all examples."""
        async with deadline.limit("the embedding"):
            prompt = await self._prompt(named, examples.fields)
            read: Read = await prompt.examples(deadline)
            rest = await prompt.queries(
                [*_texts(unlabelled), *_texts(queries)], [*unlabelled.fields, *queries.fields], deadline
            )
        vectors = np.concatenate([read.vectors, rest.vectors])
        num_tokens = read.num_tokens + rest.num_tokens
        return _divided(named, Vectors(vectors, num_tokens, read.receipt(request_digest)))

    async def _prompt(self, named: NamedContext, fields: Sequence[str]) -> Prompted:
        assert named.encoder is not None
        name = await self.served(named.encoder, f"the context {named.id}")
        return await Prompted.of(named, fields, self._names.backbones[name], self._prompts[name])

    async def _kinds(self) -> dict[str, InputKind]:
        """What each encoder reads; backbones read texts."""
        return {id_: info.modality for id_, info in (await self._infos()).items()}

    async def _infos(self) -> dict[str, EncoderInfo]:
        """One after another: each is asked once and known from then on."""
        return {id_: await one.info() for id_, one in self._names.encoders.items()}

    async def _digests(self) -> dict[str, str]:
        """Digests of everything that embeds, by name."""
        served = {id_: info.digest for id_, info in (await self._infos()).items()}
        return served | {one.id: one.prepared.digest for one in self._names.backbones.values()}


def _divided(named: NamedContext, found: Vectors) -> Embedded:
    """Vectors of examples, unlabelled inputs and queries, in this order, to their places."""
    num_examples = len(named.examples)
    num_inputs = num_examples + len(named.unlabelled)
    context = EmbeddedContext(
        named,
        np.ascontiguousarray(found.values[:num_examples]),
        np.ascontiguousarray(found.values[num_examples:num_inputs]) if named.unlabelled else None,
    )
    return Embedded(context, np.ascontiguousarray(found.values[num_inputs:]), found.num_tokens, found.receipt)


def _texts(inputs: Inputs) -> list[str]:
    return [str(one) for one in inputs.contents]
