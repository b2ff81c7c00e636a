"""A circuit breaker: an engine that fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_PAUSE = 60.0


class Breaker:
    """Closed while all is well, open after ``failures`` in a row, then half open: one request may try.

    The pause doubles each time that the try fails, up to a minute. Failures are those of the engine, never of
    a request: no connection, no HTTP answer, no answer in time, an error status, no valid verdict.
    """

    def __init__(self, failures: int, pause: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed = failures
        self._pause = pause
        self._clock = clock
        self.succeeded()

    def succeeded(self) -> None:
        """A verdict of this engine was verified."""
        self._failures = 0
        self._wait = self._pause
        self._until: float | None = None
        self._trying = False

    def failed(self) -> None:
        """The engine failed."""
        self._failures += 1
        if self._until is not None:
            if self._trying:
                self._wait = min(self._wait * 2, _LONGEST_PAUSE)
                self._open()
        elif self._failures >= self._allowed:
            self._open()

    def gave_up(self) -> None:
        """A request ended without saying anything about the engine; another may try."""
        self._trying = False

    @property
    def open(self) -> bool:
        """Whether the engine is left alone now."""
        return self._until is not None and (self._trying or self._clock() < self._until)

    def enter(self) -> None:
        """A request goes to the engine. Of those that come after the pause only the first does."""
        self._trying = self._until is not None

    def _open(self) -> None:
        self._until = self._clock() + self._wait
        self._trying = False
