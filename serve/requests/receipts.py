"""Receipts as JSON: what executed, by digest."""

import dataclasses
from typing import Any

from actors.messages import Receipt
from serve.telemetry import request_log


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """All fields, absent ones null; the adapter as a list of [digest, weight]."""
    tree = dataclasses.asdict(receipt)
    tree["adapter"] = [[digest, weight] for digest, weight in receipt.adapter]
    request_log.note_receipt(tree)
    return tree
