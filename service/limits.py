"""How much one API key may ask for: requests in any minute, and requests at one time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import ApiError
from service.metrics import Metrics
from service.policy_file import ApiKey

WINDOW = 60.0
"""Seconds that ``requests_per_minute`` looks back."""
_BUSY_RETRY = 1


class KeyLimits:
    """Counts by key. What a key has used survives a reload of the policy file, and a restart does not."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._times: dict[str, deque[float]] = {}
        self._running: dict[str, int] = {}

    @contextmanager
    def request(self, key: ApiKey | None) -> Iterator[None]:
        """One request, from its admission to the last byte of its answer.

        Raises ApiError 429 with the seconds after which trying again makes sense. A request that is turned
        away does not count.
        """
        if key is None:
            yield
            return
        running = self._running.get(key.sha256, 0)
        if key.max_concurrent is not None and running >= key.max_concurrent:
            raise self._turned_away(
                "concurrency", f"At most {key.max_concurrent} requests at one time are allowed.", _BUSY_RETRY
            )
        if key.requests_per_minute is not None:
            self._count(key.sha256, key.requests_per_minute)
        self._running[key.sha256] = running + 1
        try:
            yield
        finally:
            self._running[key.sha256] -= 1
            if not self._running[key.sha256]:
                del self._running[key.sha256]

    def _count(self, key: str, allowed: int) -> None:
        now = self._clock()
        times = self._times.setdefault(key, deque())
        while times and times[0] <= now - WINDOW:
            times.popleft()
        if len(times) >= allowed:
            # The one that has to leave the window before another fits; the limit may have been lowered.
            wait = times[len(times) - allowed] + WINDOW - now
            raise self._turned_away("rate", f"At most {allowed} requests a minute are allowed.", wait)
        times.append(now)

    def _turned_away(self, reason: str, message: str, wait: float) -> ApiError:
        self._metrics.rejections.labels(reason).inc()
        return ApiError(
            429,
            message,
            code="rate_limit_exceeded",
            stage="request",
            kind="rate_limit_error",
            headers={"retry-after": str(max(1, math.ceil(wait)))},
        )
