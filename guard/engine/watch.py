"""Answers that are watched as they grow: when one has to be stopped. No vLLM here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from guard.monitor import Monitor, Stop

Outcome = Literal["stopped", "observed", "failed"]


@dataclass(frozen=True)
class Found:
    """What became of a watched answer at one of its tokens."""

    outcome: Outcome
    """``observed``: it would have been stopped. ``failed``: its score did not come, or is no number."""
    stop: Stop | None
    cut: bool
    """Whether the answer ends here."""


@dataclass
class Watch:
    """One answer. ``armed`` from the request's verdict on: before, there is nothing to stop."""

    monitor: Monitor
    nonce: str | None
    stops: bool
    """False in mode ``observe``."""
    armed: bool = False
    streak: int = 0
    """Tokens in a row that counted."""
    reported: bool = False

    def see(self, value: float | None, tokens: int) -> Found | None:
        """Take in the pooled score after ``tokens`` tokens of the answer; each is to be seen once.

        None: it goes on. An answer whose score is missing does not.
        """
        if not self.armed:
            return None
        if value is None or math.isnan(value):
            return self._found("failed", None)
        self.streak = self.streak + 1 if value >= self.monitor.logit else 0
        if self.streak < self.monitor.debounce:
            return None
        stop = Stop(nonce=self.nonce, tokens=tokens, logit=value)
        return self._found("stopped" if self.stops else "observed", stop)

    def _found(self, outcome: Outcome, stop: Stop | None) -> Found | None:
        """Answers that go on all the same are counted once."""
        if self.reported:
            return None
        self.reported = True
        return Found(outcome, stop, cut=self.stops)
