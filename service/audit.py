"""The audit log: one JSON line for each request, with these fields and no others.

There is no field that could hold a prompt, an answer, a key or a client's free text.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

logger = logging.getLogger("neuronguard.audit")


@dataclass
class AuditRecord:
    """What is written down about one request. Times are in seconds."""

    time: str
    """UTC, ISO 8601, of the request's arrival."""
    request_id: str
    route: str
    upstream_id: str | None = None
    """The id under which the engine saw the request."""
    tenant: str | None = None
    policy: str | None = None
    mode: str | None = None
    model: str | None = None
    stream: bool | None = None
    verdict: str | None = None
    """What the rules said."""
    action: str | None = None
    """What was done."""
    judge: str | None = None
    """What the judge said of an escalated request: ``safe``, ``unsafe`` or ``failed``."""
    probability: float | None = None
    """P(unsafe); only when the settings allow it."""
    bundle: str | None = None
    status: int | None = None
    """HTTP status sent; 499 when the client went away before one was."""
    code: str | None = None
    """The error code sent, if any."""
    outcome: str = "complete"
    """``complete``, ``client_gone``, or ``interrupted`` when an answer broke off."""
    verdict_seconds: float | None = None
    total_seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the engine reported them; None when it did not."""

    def write(self) -> None:
        """Log the record as one line."""
        logger.info(json.dumps(asdict(self), separators=(",", ":")))
