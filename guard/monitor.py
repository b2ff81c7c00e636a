"""The monitor: watching an answer as it grows, and stopping it.

While a request is answered, the engine scores each token of the answer as it does those of the prompt, and
looks at the pooled score of the last ones (``guard.pooling.running``). A policy may have the answer stopped
once that has stayed at or above a limit for ``debounce`` tokens in a row. The limits come from the bundle:
they are set on answers to benign prompts (``MonitorThreshold``), where no probability of the prompt's
calibration applies.

An answer that was stopped ends with ``finish_reason`` "stop" and a ``stop_reason`` of ``STOPPED`` and, where
the engine has signing keys, a seal that only it can make (``Stop``): clients can name stop strings, and a
stop string that matched is a stop_reason, too.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.sealed import Keyring, SealError

STOPPED = "guard:stopped"
MOST_DEBOUNCE = 64


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Monitor(_Wire):
    """What a policy wants watched; part of a ``Decision``."""

    logit: float
    """The pooled score at and above which a token counts."""
    debounce: int = Field(default=1, ge=1, le=MOST_DEBOUNCE)
    """Tokens in a row that have to count."""


class MonitorThreshold(_Wire):
    """An operating point of a bundle's monitor, set on answers to benign prompts."""

    false_positive_rate: float = Field(gt=0.0, lt=1.0)
    """Share of benign answers that are stopped."""
    debounce: int = Field(ge=1, le=MOST_DEBOUNCE)
    logit: float
    answers: int = Field(ge=1)
    """Number of benign answers it was set on."""
    upper95: float
    """Upper end of the 95 % interval of the true rate."""


class Stop(_Wire):
    """How an answer came to be stopped, as the engine says it."""

    nonce: str | None
    """The directive's; None for requests that came without one."""
    tokens: int = Field(ge=1)
    """Tokens of the answer that were scored: where it was stopped."""
    logit: float
    """The pooled score there."""

    def reason(self, keys: Keyring | None) -> str:
        """The ``stop_reason``."""
        if keys is None:
            return STOPPED
        return f"{STOPPED}:{keys.seal('stop', self.model_dump_json().encode())}"

    @classmethod
    def of_reason(cls, reason: object, keys: Keyring, *, nonce: str) -> Stop | None:
        """What a ``stop_reason`` says; None when it is anything but this engine's word on this request."""
        if not isinstance(reason, str) or not reason.startswith(f"{STOPPED}:"):
            return None
        try:
            stop = cls.model_validate_json(keys.open("stop", reason.removeprefix(f"{STOPPED}:")))
        except (SealError, ValidationError):
            return None
        return stop if stop.nonce == nonce else None
