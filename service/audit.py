"""The audit log: JSON Lines with these fields and no others, two lines for each request.

The first, ``event: answer``, is written before the first byte of the answer goes out; when that fails the
request is not answered. The second, ``event: end``, says how it ended; it has all fields when there was no
answer. There is no field that could hold a prompt, an answer, a key or a client's free text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from service.errors import ConfigError
from service.strict_json import dump

logger = logging.getLogger("neuronguard.audit")

AT_THE_END = (
    *("event", "time", "request_id", "route", "status", "code", "outcome"),
    *("total_seconds", "completion_tokens", "stopped", "stopped_after", "stopped_logit"),
)
"""The fields of the second line."""


@dataclass
class AuditRecord:
    """What is written down about one request. Times are in seconds."""

    time: str
    """UTC, ISO 8601, of the request's arrival."""
    request_id: str
    """As in the header ``x-request-id`` of the answer."""
    route: str
    """One of the gateway's routes, or ``unknown``."""
    event: Literal["none", "answer", "end"] = "none"
    """Which of the two lines this is; here, which was written last."""
    upstream_id: str | None = None
    """The id under which the engine saw the request."""
    engine: str | None = None
    """The engine that the request was sent to."""
    tenant: str | None = None
    """Of the API key."""
    policy: str | None = None
    """The policy that the request fell under."""
    mode: str | None = None
    """``enforce``, ``observe`` or ``check``."""
    model: str | None = None
    """The model that was asked for, if it is served."""
    stream: bool | None = None
    """Whether the answer was to be streamed."""
    verdict: str | None = None
    """What the rules said; ``test`` for the test string, which nobody judged."""
    action: str | None = None
    """What was done."""
    judge: str | None = None
    """What the judge said of an escalated request: ``safe``, ``unsafe`` or ``failed``."""
    probability: float | None = None
    """P(unsafe); only when the settings allow it."""
    bundle: str | None = None
    """Digest of the bundle that judged."""
    unscored_shape: bool | None = None
    """Whether the prompt ended otherwise than those the probe was fitted on."""
    prompt_hmac: str | None = None
    """HMAC-SHA-256 of the prompt; only when the settings name a key for it."""
    status: int | None = None
    """HTTP status sent; 499 when the client went away before one was."""
    code: str | None = None
    """The error code sent, if any."""
    outcome: str = "complete"
    """``complete``, ``client_gone``, or ``interrupted`` when an answer broke off."""
    verdict_seconds: float | None = None
    """From the arrival of the body to the verdict."""
    total_seconds: float | None = None
    """From the arrival of the request to the last byte of the answer."""
    prompt_tokens: int | None = None
    """As the engine reported them."""
    completion_tokens: int | None = None
    """As the engine reported them; None when it did not."""
    stopped: int | None = None
    """Choices that the monitor stopped as they grew; None when none of the answer was watched."""
    stopped_after: int | None = None
    """Tokens of the answer to the first stop."""
    stopped_logit: float | None = None
    """The highest score at which a choice was stopped; only when the settings allow it."""

    def write(self, event: Literal["answer", "end"]) -> None:
        """Log one of the two lines. Raises OSError when it cannot be written."""
        fields: dict[str, Any] = vars(self) | {"event": event}
        if event == "end" and self.event == "answer":
            fields = {name: fields[name] for name in AT_THE_END}
        logger.info(json.dumps(fields, separators=(",", ":")))
        self.event = event


class PromptDigest:
    """Recognises a prompt that was seen before, for those who hold the key, and tells nobody what it says."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> PromptDigest:
        """Read the key. Raises ConfigError when it is missing, open to others, or short."""
        try:
            mode, key = path.stat().st_mode, path.read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"The key for prompts in the audit log cannot be read: {error}.") from error
        if mode & 0o007:
            raise ConfigError(f"The key file {path} is accessible to every user; run: chmod 600 {path}")
        if len(key) < 32:
            raise ConfigError(f"The key in {path} has {len(key)} bytes, expected at least 32.")
        return cls(key)

    def of(self, body: dict[str, Any]) -> str:
        """Hexadecimal digits for the prompt in a validated body."""
        prompt = next(
            (body[name] for name in ("messages", "prompt", "input", "texts", "contents") if name in body),
            None,
        )
        return hmac.new(self._key, dump({"prompt": prompt}), hashlib.sha256).hexdigest()
