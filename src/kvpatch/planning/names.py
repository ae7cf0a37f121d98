"""What trials, batches and random draws are named by: hashes of what they are made of."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hashed(content: dict[str, Any]) -> str:
    """32 hex digits that belong to plain data, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def number_of(*parts: object) -> int:
    """A 63-bit number that belongs to these parts."""
    text = ":".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
