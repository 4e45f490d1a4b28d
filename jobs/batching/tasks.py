"""What each task asks for some rows, and the columns that its answers become."""

import base64
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from jobs.batching.spec import BatchSpec
from metasepia.errors import InvalidSettings

ARROW = "application/vnd.apache.arrow.stream"
Answer = dict[str, Any]
"""One row's values by column, without prefix."""


class CutOff(Exception):
    """An answer that ends before its end: asked again."""


@dataclass(frozen=True)
class Task(ABC):
    """Rows of one model to one request and back."""

    spec: BatchSpec

    path: ClassVar[str]
    accept: ClassVar[str] = "application/json"
    at_most: ClassVar[int] = 2048
    """Rows of one request, whatever the batch asks for."""

    @property
    @abstractmethod
    def columns(self) -> tuple[pa.Field, ...]:
        """Of the answers, without prefix."""

    @abstractmethod
    def body(self, model: str | None, items: Sequence[Any], first_row: int) -> dict[str, Any]: ...

    @abstractmethod
    def answers(self, content: bytes, count: int) -> list[Answer]:
        """One an item. Raises CutOff."""

    def item(self, cell: Any) -> Any:
        """A cell as a request has it. Raises ValueError, in words, for one that cannot be asked."""
        if isinstance(cell, str):
            return cell
        if cell is None:
            raise ValueError("the cell is null")
        if isinstance(cell, bytes) and self.spec.media:
            return {self.spec.media: base64.b64encode(cell).decode()}
        if isinstance(cell, list) and self.spec.task == "classify":
            return {"vector": cell}
        wanted = "text, a list of numbers or, with --media, bytes" if self.spec.task == "classify" else "text"
        raise ValueError(f"the cell is {type(cell).__name__}, and {self.spec.task} takes {wanted}")

    def _with(self, model: str | None, body: dict[str, Any]) -> dict[str, Any]:
        return ({} if model is None else {"model": model}) | body | dict(self.spec.options)


def task_of(spec: BatchSpec) -> Task:
    """Raises InvalidSettings for a task that needs a model and has none."""
    if spec.model is None and spec.model_column is None and spec.task != "classify":
        raise InvalidSettings("model", None, "given, with --model or as a column of the input (--model-column)")
    kinds: dict[str, type[Task]] = {
        "classify": Classify, "embed": Embed, "complete": Complete, "chat": Chat, "hidden_states": HiddenStates,
    }  # fmt: skip
    return kinds[spec.task](spec)


class Classify(Task):
    path = "/v1/classify"

    @property
    def columns(self) -> tuple[pa.Field, ...]:
        return (
            pa.field("label", pa.string()),
            pa.field("probability", pa.float32()),
            pa.field("probabilities", pa.map_(pa.string(), pa.float32())),
        )

    def body(self, model: str | None, items: Sequence[Any], first_row: int) -> dict[str, Any]:
        return self._with(model, {"inputs": list(items)})

    def answers(self, content: bytes, count: int) -> list[Answer]:
        results = json.loads(content)["results"]
        return [
            {
                "label": one["label"],
                "probability": max(one["probabilities"].values()),
                "probabilities": sorted(one["probabilities"].items()),
            }
            for one in results
        ]


class Embed(Task):
    path = "/v1/embeddings"

    @property
    def columns(self) -> tuple[pa.Field, ...]:
        return (pa.field("embedding", pa.list_(pa.float32())),)

    def body(self, model: str | None, items: Sequence[Any], first_row: int) -> dict[str, Any]:
        return self._with(model, {"input": list(items), "encoding_format": "base64"})

    def answers(self, content: bytes, count: int) -> list[Answer]:
        data = sorted(json.loads(content)["data"], key=lambda one: one["index"])
        return [{"embedding": np.frombuffer(base64.b64decode(one["embedding"]), "<f4")} for one in data]


class Complete(Task):
    path = "/v1/completions"
    field = "prompt"
    at_most = 1  # the answers of one request wait for its longest one

    @property
    def columns(self) -> tuple[pa.Field, ...]:
        return (
            pa.field("completion", pa.string()),
            pa.field("finish_reason", pa.string()),
            pa.field("prompt_tokens", pa.int32()),
            pa.field("completion_tokens", pa.int32()),
        )

    def body(self, model: str | None, items: Sequence[Any], first_row: int) -> dict[str, Any]:
        asked = self._with(model, {self.field: items[0]})
        if "seed" in asked:  # equal prompts are different samples
            asked["seed"] = (int(asked["seed"]) + first_row) % 2**63
        return asked

    def answers(self, content: bytes, count: int) -> list[Answer]:
        answer = json.loads(content)
        choice, usage = answer["choices"][0], answer["usage"]
        return [
            {
                "completion": self._text(choice),
                "finish_reason": choice["finish_reason"],
                "prompt_tokens": usage["prompt_tokens"],
                "completion_tokens": usage["completion_tokens"],
            }
        ]

    def _text(self, choice: Mapping[str, Any]) -> str:
        return choice["text"]


class Chat(Complete):
    """A cell is the user's message, or a list of messages with `role` and `content`."""

    path = "/v1/chat/completions"
    field = "messages"

    def item(self, cell: Any) -> Any:
        return cell if isinstance(cell, list) else [{"role": "user", "content": super().item(cell)}]

    def _text(self, choice: Mapping[str, Any]) -> str:
        return choice["message"]["content"]


class HiddenStates(Task):
    """One vector a row and layer: pooling `last` or `mean`."""

    path = "/v1/hidden_states"
    accept = ARROW

    @property
    def layers(self) -> list[int]:
        return list(self.spec.options.get("layers", [-1]))

    @property
    def columns(self) -> tuple[pa.Field, ...]:
        """`state`, or of several layers `state_<layer>` each."""
        if self.spec.options.get("pooling", "last") == "none":
            raise InvalidSettings("pooling", "none", "last or mean: a row of the output has one vector a layer")
        names = ["state"] if len(self.layers) == 1 else [f"state_{layer}" for layer in self.layers]
        return tuple(pa.field(name, pa.list_(pa.float32())) for name in names)

    def body(self, model: str | None, items: Sequence[Any], first_row: int) -> dict[str, Any]:
        return self._with(model, {"input": list(items)})

    def answers(self, content: bytes, count: int) -> list[Answer]:
        said, found = dict[str, Any](), [dict[str, Any]() for _ in range(count)]
        names = [one.name for one in self.columns]
        try:
            with pa.ipc.open_stream(io.BytesIO(content)) as stream:
                while True:
                    batch, metadata = stream.read_next_batch_with_custom_metadata()
                    if batch.num_rows == 0 and metadata is not None:
                        said = json.loads(metadata[b"metasepia"])
                        break
                    width = batch.schema.field("state").type.list_size
                    states = batch["state"].flatten().to_numpy().reshape(-1, width)
                    for index, state in zip(batch["input"].to_pylist(), states, strict=True):
                        found[index][names[len(found[index])]] = state  # layers come in the order asked
        except (StopIteration, pa.ArrowException, OSError) as error:
            raise CutOff("the stream of states was cut off") from error
        if "error" in said or any(len(one) < len(names) for one in found):
            raise CutOff(str(said.get("error", {}).get("message", "the stream of states was cut off")))
        return found
