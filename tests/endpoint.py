"""An OpenAI-compatible endpoint on loopback, in a thread: a small deterministic model, and every way of misbehaving.

The model is a function of the text before: `logprob(before, token)`. Its tokens are words with the space before them,
so that what an endpoint reports can be compared with the same sums taken here.
"""

import hashlib
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCABULARY = (" good", " bad", " neutral", " negative", " positive", "good", "bad", " the", ".", "\n", " ne")
OTHER = 40
"""Tokens that are not in VOCABULARY, as far as the model's normalisation goes."""


def tokens_of(text: str) -> list[str]:
    return re.findall(r" ?\w+|\s|[^\w\s]", text)


def _logit(before: str, token: str) -> float:
    """From 0 to 4, by a hash."""
    return int.from_bytes(hashlib.sha256(f"{before}\0{token}".encode()).digest()[:4]) / 2**30


def logprob(before: str, token: str) -> float:
    """Natural log-probability of a token after a text."""
    total = sum(math.exp(_logit(before, one)) for one in VOCABULARY) + OTHER
    return (_logit(before, token) if token in VOCABULARY else 0.0) - math.log(total)


def score(before: str, continuation: str) -> float:
    """log p(continuation | before), teacher-forced."""
    total = 0.0
    for token in tokens_of(continuation):
        total += logprob(before, token)
        before += token
    return total


def rendered(messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """The chat template."""
    text = "".join(
        f"<{one['role']}>{one['content']}" + ("" if one["role"] == "assistant" else "\n") for one in messages
    )
    return text + ("<assistant>" if add_generation_prompt else "")


@dataclass
class Http:
    """One scripted answer."""

    status: int = 200
    body: bytes | str | dict[str, Any] = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drop: bool = False
    """Ends the connection without a word."""
    promised: int | None = None
    """The Content-Length told, where that is not the body's."""


@dataclass
class Endpoint:
    """What it serves, and what it was asked. `behave(count, body)` may answer in place of the model."""

    echo: bool = False
    prompt_logprobs: bool = False
    logprobs: bool = False
    several: bool = True
    """`n` is honoured."""
    lists: bool = True
    max_top: int = 20
    model: Callable[[int], str | None] = lambda count: "tiny-1"
    fingerprint: Callable[[int], str | None] = lambda count: None
    say: Callable[[str, int], str] | None = None
    """The reply to a prompt by seed; None: a label's word drawn from the model."""
    behave: Callable[[int, dict[str, Any]], Http | None] = lambda count, body: None
    usage: Callable[[int, int], object] = lambda prompt, completion: {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
    }
    words: tuple[str, ...] = ("good", "bad")
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Times that each body was answered by the model, and would have to be paid for."""
    in_flight: int = 0
    most_in_flight: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Endpoint":
        endpoint = self

        class Handler(_Handler):
            owner = endpoint

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    # -- the model -----------------------------------------------------------------------------------------------------

    def respond(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Http:
        with self._lock:
            count = len(self.requests)
            self.requests.append((path, headers, body))
            self.times.append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            special = self.behave(count, body)
            if special is not None:
                time.sleep(special.delay_s)
                return special
            if path == "/v1/chat/completions":
                made = self._chat(body)
            elif path == "/v1/completions":
                made = self._complete(body)
            else:
                return Http(404, {"error": {"message": f"no route {path}"}})
            if isinstance(made, Http):
                return made
            made |= {"model": self.model(count)}
            if self.fingerprint(count) is not None:
                made["system_fingerprint"] = self.fingerprint(count)
            with self._lock:
                self.answered[json.dumps(body, sort_keys=True)] += 1
            return Http(200, made)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _chat(self, body: dict[str, Any]) -> dict[str, Any] | Http:
        if "prompt_logprobs" in body and not self.prompt_logprobs:
            return Http(400, {"error": {"message": "Unrecognized request argument supplied: prompt_logprobs"}})
        if body.get("top_logprobs", 0) > self.max_top:
            return Http(400, {"error": {"message": f"top_logprobs must be at most {self.max_top}"}})
        before = rendered(body["messages"], add_generation_prompt=body.get("add_generation_prompt", True))
        choices = [
            {"index": i, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop", "logprobs": None}
            for i, reply in enumerate(self._replies(before, body))
        ]
        if body.get("logprobs") and self.logprobs:
            top = [{"token": token, "logprob": value} for token, value in self._top(before, body["top_logprobs"])]
            choices[0]["logprobs"] = {"content": [{"token": top[0]["token"], "top_logprobs": top}]}
        made = {"object": "chat.completion", "choices": choices, "usage": self._usage(before, choices)}
        if "prompt_logprobs" in body:
            made["prompt_logprobs"] = self._prompt_logprobs(before)
        return made

    def _complete(self, body: dict[str, Any]) -> dict[str, Any] | Http:
        if body.get("echo") and not self.echo:
            return Http(400, {"error": {"message": "echo is not supported here; leave it out"}})
        if isinstance(body["prompt"], list) and not self.lists:
            return Http(422, {"detail": "prompt: str type expected"})
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if body.get("echo"):
            choices = [{"index": i, **self._echo(prompt)} for i, prompt in enumerate(prompts)]
            choices = choices[::-1]  # any order is allowed
        else:
            choices = [{"index": i, "text": reply} for i, reply in enumerate(self._replies(prompts[0], body))]
            if body.get("logprobs") and self.logprobs:
                choices[0]["logprobs"] = {"top_logprobs": [dict(self._top(prompts[0], body["logprobs"]))]}
            if "prompt_logprobs" in body and self.prompt_logprobs:
                choices[0]["prompt_logprobs"] = self._prompt_logprobs(prompts[0])
        return {"object": "text_completion", "choices": choices, "usage": self._usage("".join(prompts), choices)}

    def _echo(self, prompt: str) -> dict[str, Any]:
        tokens, before = ["<s>", *tokens_of(prompt), " more"], ""
        values: list[float | None] = [None]
        for token in tokens[1:]:
            values.append(logprob(before, token))
            before += token
        return {"text": before, "logprobs": {"tokens": tokens, "token_logprobs": values}}

    def _prompt_logprobs(self, prompt: str) -> list[Any]:
        before = ""
        found: list[Any] = [None]
        for token in tokens_of(prompt):
            number = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4])
            found.append({str(number): {"logprob": logprob(before, token), "rank": 1, "decoded_token": token}})
            before += token
        return found

    def _top(self, before: str, count: int) -> list[tuple[str, float]]:
        pairs = [(token, logprob(before, token)) for token in VOCABULARY]
        return sorted(pairs, key=lambda pair: -pair[1])[:count]

    def _replies(self, before: str, body: dict[str, Any]) -> list[str]:
        count = body.get("n", 1) if self.several else 1
        return [self._reply(before, body, body.get("seed", 0) + i) for i in range(count)]

    def _reply(self, before: str, body: dict[str, Any], seed: int) -> str:
        if self.say is not None:
            return self.say(before, seed)
        weights = np.exp([score(before, word) for word in self.words])
        number = int.from_bytes(hashlib.sha256(before.encode()).digest()[:4])
        return self.words[np.random.default_rng([number, seed]).choice(len(weights), p=weights / weights.sum())]

    def _usage(self, prompt: str, choices: list[dict[str, Any]]) -> object:
        return self.usage(len(tokens_of(prompt)), len(choices))


class _Handler(BaseHTTPRequestHandler):
    owner: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer = self.owner.respond(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        if answer.drop:
            self.close_connection = True
            return
        content = json.dumps(answer.body) if isinstance(answer.body, dict) else answer.body
        content = content.encode() if isinstance(content, str) else content
        self.send_response(answer.status)
        kind = "application/json" if isinstance(answer.body, dict) else "text/plain"
        for name, value in ({"content-type": kind} | answer.headers).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content) if answer.promised is None else answer.promised))
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            self.close_connection = True
        if answer.promised is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
