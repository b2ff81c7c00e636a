"""What groups of processes cost: CPU seconds and memory of a server with all its children."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


class Group:
    """A server and its descendants, as they are now: vLLM's engine core is a child of its API server."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._parent = psutil.Process(pid)

    def _members(self) -> Iterator[psutil.Process]:
        for process in (self._parent, *self._parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield process

    @property
    def cpu_seconds(self) -> float:
        """User and system time so far; that of children that have ended counts once they were waited for."""
        total = 0.0
        for process in self._members():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        own = self._parent.cpu_times()
        return float(total + own.children_user + own.children_system)

    @property
    def megabytes(self) -> float:
        """Sum of proportional set sizes: a page that n processes share counts 1/n for each of them."""
        total = 0
        for process in self._members():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 1e6
