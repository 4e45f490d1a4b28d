"""A guided tour against the running graph (`make demo`): what it asks, what comes back, what it means."""

import json
import sys
import time
from typing import Any

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax

from cluster import settings

EXAMPLES = [
    ("The parcel never arrived and nobody answers my mails", "complaint"),
    ("Thank you, the replacement came the next morning", "praise"),
    ("I was charged twice for one order", "complaint"),
    ("Your support team was patient and kind", "praise"),
    ("The lamp broke after two days", "complaint"),
    ("Best purchase I made this year", "praise"),
    ("Still waiting for my refund after six weeks", "complaint"),
    ("Lovely packaging and quick delivery", "praise"),
]
INPUTS = ["The zip tore the first time I used it", "Such a friendly shop, I will come back"]


class Tour:
    """Asks the graph one thing after the other and shows each answer."""

    def __init__(self, base_url: str) -> None:
        self._client = httpx.Client(base_url=base_url, timeout=120)
        self._console = Console()
        self._step = 0

    def ask(self, title: str, method: str, path: str, body: dict[str, Any] | None, meaning: str) -> dict[str, Any]:
        """One request, shown with its answer's telling part and what it means."""
        self._step += 1
        self._console.rule(f"[bold]{self._step}. {title}")
        self._console.print(f"[cyan]{method} {path}")
        if body is not None:
            self._show(body)
        begin = time.perf_counter()
        response = self._client.request(method, path, json=body)
        elapsed_ms = 1000 * (time.perf_counter() - begin)
        answer = response.json()
        self._console.print(f"[green]{response.status_code}[/] in {elapsed_ms:.0f} ms")
        self._show(_shortened(answer))
        self._console.print(Panel(meaning, border_style="dim"))
        return answer

    def _show(self, value: object) -> None:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        lines = text.splitlines()
        shown = "\n".join(lines[:40] + (["..."] if len(lines) > 40 else []))
        self._console.print(Syntax(shown, "json", background_color="default", word_wrap=True))


def _shortened(value: Any) -> Any:
    """Long lists and digests cut for reading."""
    if isinstance(value, dict):
        return {k: _shortened(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_shortened(v) for v in value[:6]] + (["..."] if len(value) > 6 else [])
    if isinstance(value, str) and len(value) == 64 and " " not in value:
        return value[:12] + "..."
    return round(value, 4) if isinstance(value, float) else value


def main() -> None:
    http = settings.read().http
    tour = Tour(f"http://{http.host}:{http.port}")
    try:
        models = tour.ask(
            "What is served", "GET", "/v1/models", None,
            "One backbone, one encoder, and experts that name their parent. All experts share the backbone's weights.",
        )  # fmt: skip
    except httpx.TransportError as error:
        sys.exit(f"no graph answers on {http.host}:{http.port} ({error}); start one with: make serve")
    known = [m["id"] for m in models["data"]]
    experts = [m["id"] for m in models["data"] if m["x_info"]["kind"] == "expert"]
    backbone = experts[0].split(":")[0] if experts else known[0]
    tour.ask(
        "A classifier from eight examples", "POST", "/v1/classify",
        {"examples": [{"text": t, "label": y} for t, y in EXAMPLES], "inputs": INPUTS},
        "No training took place: the reasoning module read the eight labelled embeddings and answered. It learned to "
        "do so from synthetic logistic regressions only. The receipt names every part by its digest.",
    )  # fmt: skip
    context = tour.ask(
        "The same examples under a name", "POST", "/v1/contexts",
        {"examples": [{"text": t, "label": y} for t, y in EXAMPLES]},
        "The name is made from the content: the same examples in any order have it. It is on disk, a model like any "
        "other. The self-check labels each example by a context without it.",
    )  # fmt: skip
    tour.ask(
        "Inputs alone, with reasons", "POST", "/v1/classify",
        {"model": context.get("id"), "inputs": INPUTS[:1], "explain": True, "abstain_below": 0.5},
        "Influence: by how much each example raises each label's log-probability, by answering anew without it.",
    )  # fmt: skip
    question = {"messages": [{"role": "user", "content": "Name the capital of France."}], "max_tokens": 24}
    tour.ask(
        "The frozen backbone", "POST", "/v1/chat/completions", {"model": backbone, "temperature": 0, **question},
        'The plain weights: the receipt says path "plain" and names no adapter.',
    )  # fmt: skip
    for expert in experts:
        card = next(m for m in models["data"] if m["id"] == expert).get("x_info", {}).get("card", {})
        prompt = card.get("example_prompt") or "Name the capital of France."
        tour.ask(
            f"The expert {expert}", "POST", "/v1/chat/completions",
            {"model": expert, "temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": prompt}]},
            "The same weights with their singular values scaled by a vector of a few hundred kilobytes. "
            f"{card.get('description', '')}",
        )  # fmt: skip
    if len(experts) > 1:
        weights = {e.split(":")[1]: 1 / 2 for e in experts[:2]}
        made = tour.ask(
            "A mixture of two experts", "POST", "/v1/mixtures", {"backbone": backbone, "weights": weights},
            "Weights on the simplex; the mixture is known by its content and costs no slot and no load.",
        )  # fmt: skip
        if "model" in made:
            tour.ask(
                "That mixture answers", "POST", "/v1/chat/completions",
                {"model": made["model"], "temperature": 0, **question},
                "The receipt lists the experts mixed and their weights, as the shard executed them.",
            )  # fmt: skip
    if "auto" in known:
        tour.ask(
            "The request alone chooses", "POST", "/v1/chat/completions",
            {"model": "auto", "temperature": 0, **question},
            "The dispatch chain compared the prompt's hidden states with each expert's centroid; where none is near, "
            "the base weights answer. The receipt names the stage and its margin.",
        )  # fmt: skip
    tour.ask(
        "A name nobody registered", "POST", "/v1/chat/completions", {"model": f"{backbone}:no-such-expert", **question},
        "A 404 that lists the known ones: never the base model in silence.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
