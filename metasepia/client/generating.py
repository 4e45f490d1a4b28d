"""Calls that generate text, whole or as a stream of pieces."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from metasepia.client.calls import Request, Steps, ask, request
from metasepia.client.results import Completion

Messages = str | Sequence[Mapping[str, Any]]
"""A user's text, or `{"role", "content"}` each."""


class Sampling(TypedDict, total=False):
    """OpenAI's fields, and ours. Those that are None or absent are the server's defaults."""

    temperature: float | None
    """From 0 (the likeliest token always) to 2."""
    top_p: float | None
    max_tokens: int | None
    n: int | None
    """Answers to the same question."""
    seed: int | None
    """The same seed and request give the same answer."""
    stop: str | Sequence[str] | None
    logprobs: bool | int | None
    top_logprobs: int | None
    dispatch: Sequence[str] | None
    """For the model `auto`: these stages in place of the server's."""
    extra: Mapping[str, Any]
    """Further fields of the body, as they are."""


def chat(messages: Messages, *, model: str, **sampling: Unpack[Sampling]) -> Steps[Completion]:
    """The answer to a conversation. `model`: `<backbone>`, `<backbone>:<expert>`, `<backbone>:mix@...` or `auto`."""
    return Completion.of((yield from ask(chat_request(messages, model, sampling))))


def complete(prompt: str, *, model: str, **sampling: Unpack[Sampling]) -> Steps[Completion]:
    """What follows a prompt, without a chat template."""
    return Completion.of((yield from ask(prompt_request(prompt, model, sampling))))


def chat_stream(messages: Messages, *, model: str, **sampling: Unpack[Sampling]) -> Request:
    """The answer to a conversation, piece by piece: `with client.stream_chat(...) as pieces:` and iterate."""
    return chat_request(messages, model, sampling, stream=True)


def prompt_stream(prompt: str, *, model: str, **sampling: Unpack[Sampling]) -> Request:
    """What follows a prompt, piece by piece."""
    return prompt_request(prompt, model, sampling, stream=True)


def chat_request(messages: Messages, model: str, sampling: Sampling, *, stream: bool = False) -> Request:
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(one) for one in messages]
    return _request("CreateChatCompletion", {"model": model, "messages": said}, sampling, stream)


def prompt_request(prompt: str, model: str, sampling: Sampling, *, stream: bool = False) -> Request:
    return _request("CreateCompletion", {"model": model, "prompt": prompt}, sampling, stream)


def _request(name: str, body: dict[str, Any], sampling: Sampling, stream: bool) -> Request:
    fields: dict[str, Any] = dict(sampling)
    extra = fields.pop("extra", {})
    body |= {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    body |= dict(extra)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    made = request(name, body, accept="text/event-stream" if stream else None)
    return dataclasses.replace(made, streams=stream)
