"""What a person sees while the services start: one live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Reports a state that changes now and then, with the seconds since the start."""

    def __init__(self, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._live = live
        self._clock = clock
        self._started = self._reported = clock()
        self._state = ""

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._clock() - self._started

    def update(self, state: str) -> None:
        """Show ``state``: at once when it is new, else at intervals."""
        now = self._clock()
        if self._live:
            click.echo(f"\r\033[K  {self.seconds:3.0f} s  {state}", nl=False)
        elif state != self._state or now - self._reported >= _SECONDS_BETWEEN_LINES:
            self._reported = now
            click.echo(f"  {self.seconds:3.0f} s  {state}")
        self._state = state

    def close(self) -> None:
        """Remove the live line."""
        if self._live and self._state:
            click.echo("\r\033[K", nl=False)
        self._state = ""
