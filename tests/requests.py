"""Requests of the served graph's tests: those that are answered, and those that must be refused by their field."""

import json
from typing import Any

from tests.serving import EXAMPLES, INPUTS

BACKBONE, ENCODER = "smollm2-135m", "minilm-l6"
QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
CHAT = {"model": BACKBONE, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
STORY = CHAT | {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 2000}
CLASSIFY: dict[str, Any] = {"examples": EXAMPLES, "inputs": INPUTS}
HIDDEN = {"model": BACKBONE, "input": "one body"}
ALL_STATES: dict[str, Any] = {"input": "word " * 500, "layers": list(range(31)), "pooling": "none"}

BAD_BODIES: list[tuple[str, str, Any, int, str | None]] = [
    ("malformed JSON", "/v1/classify", b'{"examples": [', 400, "body"),
    ("an empty body", "/v1/classify", b"", 400, "body"),
    ("not UTF-8", "/v1/classify", b'{"inputs": ["\xff"]}', 400, "body"),
    ("nested 100,000 deep", "/v1/classify", b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "body"),
    ("nested 100,000 deep, open", "/v1/chat/completions", b"[" * 100_000, 400, "body"),
    ("an array", "/v1/classify", b"[]", 400, "body"),
    ("12 MB", "/v1/classify", b'{"inputs": ["' + b"x" * 12_000_000 + b'"]}', 413, "body"),
    ("NaN", "/v1/chat/completions", json.dumps(CHAT | {"temperature": float("nan")}).encode(), 400, "temperature"),
    ("NaN label", "/v1/classify", b'{"examples": [{"text": "a", "label": NaN}]}', 400, "examples[0].label"),
    ("unknown model", "/v1/chat/completions", CHAT | {"model": "gpt-4"}, 404, "model"),
    ("unknown expert", "/v1/chat/completions", CHAT | {"model": f"{BACKBONE}:no-such"}, 404, "model"),
    ("unknown mixture", "/v1/chat/completions", CHAT | {"model": f"{BACKBONE}:mix@{'0' * 64}"}, 404, "model"),
    ("unknown embedding model", "/v1/embeddings", {"model": "ada", "input": "x"}, 404, "model"),
    ("unknown encoder", "/v1/classify", CLASSIFY | {"encoder": "bert"}, 404, "encoder"),
    ("an encoder asked to chat", "/v1/chat/completions", CHAT | {"model": ENCODER}, 400, None),
    ("one class", "/v1/classify", CLASSIFY | {"examples": CLASSIFY["examples"][:1] * 2}, 400, "examples"),
    ("no examples", "/v1/classify", CLASSIFY | {"examples": []}, 400, "examples"),
    ("no inputs", "/v1/classify", CLASSIFY | {"inputs": []}, 400, "inputs"),
    (
        "null label",
        "/v1/classify",
        CLASSIFY | {"examples": [*CLASSIFY["examples"], {"text": "x", "label": None}]},
        400,
        "examples[6].label",
    ),
    (
        "number label",
        "/v1/classify",
        CLASSIFY | {"examples": [{"text": "x", "label": 1}, *CLASSIFY["examples"]]},
        400,
        "examples[0].label",
    ),
    ("empty text", "/v1/classify", CLASSIFY | {"inputs": ["fine", ""]}, 400, "inputs[1]"),
    ("long text", "/v1/classify", CLASSIFY | {"inputs": ["fine", "word " * 400]}, 400, "inputs[1]"),
    (
        "long example",
        "/v1/classify",
        CLASSIFY | {"examples": [{"text": "w " * 4000, "label": "z"}, *CLASSIFY["examples"]]},
        400,
        "examples[0].text",
    ),
    ("texts of a wrong type", "/v1/classify", CLASSIFY | {"inputs": [7]}, 400, "inputs[0]"),
    ("an unknown context", "/v1/classify", {"model": "ctx-" + "0" * 64, "inputs": ["x"]}, 404, "model"),
    ("a context asked to chat", "/v1/chat/completions", CHAT | {"model": "ctx-" + "0" * 64}, 400, None),
    ("examples of a wrong type", "/v1/classify", CLASSIFY | {"examples": "x"}, 400, "examples"),
    ("an empty text to embed", "/v1/embeddings", {"model": ENCODER, "input": ["x", ""]}, 400, "input[1]"),
    ("a long text to embed", "/v1/embeddings", {"model": ENCODER, "input": "word " * 400}, 400, "input"),
    ("a token id beyond the vocabulary", "/v1/embeddings", {"model": BACKBONE, "input": [49_152]}, 400, "input"),
    ("a layer that is not there", "/v1/hidden_states", HIDDEN | {"layers": [31]}, 400, "layers[0]"),
    ("an unknown pooling", "/v1/hidden_states", HIDDEN | {"pooling": "max"}, 400, "pooling"),
    ("hidden states of nothing", "/v1/hidden_states", HIDDEN | {"input": []}, 400, "input"),
    ("hidden states of a long text", "/v1/hidden_states", HIDDEN | {"input": "word " * 9000}, 400, "input"),
    ("more states than an answer holds", "/v1/hidden_states", HIDDEN | ALL_STATES, 400, "input"),
    ("hidden states of an unknown expert", "/v1/hidden_states", HIDDEN | {"model": f"{BACKBONE}:x"}, 404, "model"),
    ("a task's name out of its form", "/v1/hidden_states", HIDDEN | {"task": "a/b"}, 400, "task"),
    ("temperature 2.1", "/v1/chat/completions", CHAT | {"temperature": 2.1}, 400, "temperature"),
    ("temperature -1", "/v1/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    ("temperature as text", "/v1/chat/completions", CHAT | {"temperature": "1"}, 400, "temperature"),
    ("max_tokens 0", "/v1/chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    ("max_tokens 10**9", "/v1/chat/completions", CHAT | {"max_tokens": 10**9}, 400, "max_tokens"),
    ("a seed below 0", "/v1/chat/completions", CHAT | {"seed": -1}, 400, "seed"),
    ("top_p 0", "/v1/chat/completions", CHAT | {"top_p": 0}, 400, "top_p"),
    ("top_p 1.5", "/v1/chat/completions", CHAT | {"top_p": 1.5}, 400, "top_p"),
    ("max_tokens beyond the window", "/v1/chat/completions", CHAT | {"max_tokens": 10_000}, 400, "max_tokens"),
    (
        "messages beyond the window",
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "word " * 9000}]},
        400,
        "messages",
    ),
    (
        "eight million letters",
        "/v1/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "x" * 8_000_000}]},
        400,
        "messages",
    ),
    ("messages of a wrong type", "/v1/chat/completions", CHAT | {"messages": "hello"}, 400, "messages"),
    ("no messages", "/v1/chat/completions", {"model": BACKBONE}, 400, "messages"),
    ("tools", "/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    ("a misspelt field", "/v1/chat/completions", CHAT | {"max_token": 3}, 400, "max_token"),
    ("half a surrogate pair", "/v1/embeddings", b'{"model": "minilm-l6", "input": "\\ud800"}', 400, "input"),
    ("weights off the simplex", "/v1/mixtures", {"backbone": BACKBONE, "weights": {"x": 0.4}}, 400, "weights"),
    ("negative weights", "/v1/mixtures", {"backbone": BACKBONE, "weights": {"x": 1.4, "y": -0.4}}, 400, "weights.x"),
    ("no weights", "/v1/mixtures", {"backbone": BACKBONE, "weights": {}}, 400, "weights"),
    ("a search without examples", "/v1/mixtures/search", {"backbone": BACKBONE, "examples": []}, 400, "examples"),
    ("an expert as JSON", "/v1/experts", {"name": "x"}, 400, None),
    ("a mixture of unknown experts", "/v1/mixtures", {"backbone": BACKBONE, "weights": {"x": 1.0}}, 404, "weights"),
]
