"""A server that answers as the graph does, at once and always the same: what it says of a text is made of its
characters. For tests and for the bound of what asks it.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Refusal = tuple[int, dict[str, Any], dict[str, str]]
"""Status, error, headers."""


class Upper:
    """What came in, and how it is answered."""

    def __init__(self, refuse: Callable[["Upper", str, dict[str, Any]], Refusal | None] | None = None) -> None:
        self._refuse = refuse
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/embeddings":
            vectors = [np.frombuffer(hashlib.sha256(one.encode()).digest()[:8], np.uint8) for one in body["input"]]
            spelt = [base64.b64encode((one / np.float32(256)).astype("<f4").tobytes()).decode() for one in vectors]
            return {"data": [{"index": index, "embedding": one} for index, one in enumerate(spelt)]}
        if path == "/v1/classify":
            found = [{"long": min(1.0, len(one) / 20), "short": 1 - min(1.0, len(one) / 20)} for one in body["inputs"]]
            return {"results": [{"label": max(one, key=lambda k: one[k]), "probabilities": one} for one in found]}
        text = f"{body['model']}:{body.get('seed', 0)}:{body['prompt'].upper()}"
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(text)}
        return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage}

    def __call__(self, path: str, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            refusal = self._refuse(self, path, body) if self._refuse else None
        if refusal is not None:
            status, error, headers = refusal
            return status, {"error": error}, headers
        return 200, self.answer(path, body), {}


@contextmanager
def serving(upper: Upper) -> Iterator[Upper]:
    """On a free port of loopback, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer, headers = upper(self.path, body, self.headers["idempotency-key"])
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # whoever asked was killed
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    upper.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield upper
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
