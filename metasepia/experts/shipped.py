"""The experts that come with the package; an expert is a folder of these two files, as training leaves it. No torch."""

import json
from pathlib import Path
from typing import Any

EXPERTS = Path(__file__).parents[1] / "assets" / "experts"
FILE, CARD = "expert.safetensors", "card.json"


def names(folder: Path = EXPERTS) -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{FILE}")))


def card_of(folder: Path) -> dict[str, Any]:
    """The card beside an expert; empty where it has none."""
    card = folder / CARD
    return json.loads(card.read_text()) if card.is_file() else {}
