"""How much a prompt may hold. Bodies and nesting are limited where they are read."""

from __future__ import annotations

from typing import Any

from service.errors import bad_request
from service.settings import Settings


def check_size(body: dict[str, Any], settings: Settings) -> None:
    """Raises ApiError 400 for too many messages or too long a prompt in a validated body."""
    messages = body.get("messages") or ()
    if len(messages) > settings.max_messages:
        raise bad_request(
            f"The request has {len(messages)} messages; at most {settings.max_messages} are allowed.",
            code="too_many_messages",
            param="messages",
        )
    for field in ("messages", "prompt", "input", "texts", "contents", "tools"):
        size = _size(body.get(field))
        if size > settings.max_prompt_chars:
            raise bad_request(
                f"The prompt has {size} characters; at most {settings.max_prompt_chars} are allowed.",
                code="prompt_too_long",
                param=field,
            )


def _size(value: Any) -> int:
    """Characters of all texts in ``value``; a token id counts as one. Nesting is limited already."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    if isinstance(value, list):
        return len(value) if value and isinstance(value[0], int) else sum(_size(item) for item in value)
    return 0
