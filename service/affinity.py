"""What makes requests belong to one conversation: how they begin."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_CHARS = 1024
_TOKENS = 256


def conversation(body: dict[str, Any]) -> bytes:
    """A digest of the beginning of a validated body's prompt, which later turns share."""
    if "messages" in body:
        # The system's and the user's first message; what comes after differs from turn to turn.
        start = json.dumps(body["messages"][:2])[: 2 * _CHARS]
    else:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        start = prompt[:_CHARS] if isinstance(prompt, str) else json.dumps((prompt or [])[:_TOKENS])
    return hashlib.sha256(start.encode("utf-8", "replace")).digest()
