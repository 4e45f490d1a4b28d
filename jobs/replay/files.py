"""What a server sent, read from a file."""

import json
from pathlib import Path
from typing import Any

from metasepia.errors import CorruptArtefact


def read_answer(path: Path) -> dict[str, Any]:
    """An answer, a receipt, or a stream of server-sent events put together. Raises CorruptArtefact for what is none."""
    text = path.read_text()
    try:
        tree = _of_stream(text) if text.lstrip().startswith("data:") else json.loads(text)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(str(path), f"it is neither JSON nor a stream ({error})") from error
    if not isinstance(tree, dict):
        raise CorruptArtefact(str(path), "it is not a JSON object")
    return tree


def _of_stream(text: str) -> dict[str, Any]:
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    texts: dict[int, list[str]] = {}
    finishes: dict[int, str | None] = {}
    for event in events:
        for one in event.get("choices", ()):
            piece = one["delta"].get("content") if "delta" in one else one["text"]
            texts.setdefault(one["index"], []).append(piece or "")
            finishes[one["index"]] = one["finish_reason"] or finishes.get(one["index"])
    receipts = [event["receipt"] for event in events if event.get("receipt")]
    if not receipts:
        raise ValueError("the stream ended without a receipt")
    choices = [{"index": i, "text": "".join(parts), "finish_reason": finishes[i]} for i, parts in texts.items()]
    return {"choices": choices, "usage": events[-1].get("usage"), "receipt": receipts[-1]}
