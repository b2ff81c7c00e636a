"""Child processes that leave nothing behind: not when they are stopped, not when their parent is killed.

Each child leads a process group of its own, so that a Ctrl-C in the terminal reaches the supervisor alone
and that vLLM's engine process can be stopped with its parent. The supervisor adopts what a dead child leaves
(``PR_SET_CHILD_SUBREAPER``), which is how it knows that a group is empty. For its own sudden death there are
a watchdog process and, should that be gone as well, ``PR_SET_PDEATHSIG``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from guard.serve.watchdog import signal_group

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0

# Loaded here because the child of a fork must not load libraries.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Service:
    """A process to run, and where it says that it is ready."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    """The whole environment, not an addition to ours."""
    port: int
    """Port that it listens on."""
    ready_path: str
    """Path that answers 200 once the process does its work."""
    address: str = "127.0.0.1"
    """Where this machine reaches it."""


def adopt_orphans() -> None:
    """Become the parent of every process that a child of ours leaves behind."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent(parent: int) -> None:
    """Runs in the child between fork and exec."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above took effect
            os._exit(1)


class Watchdog:
    """The process that cleans up if this one is killed; leaving this context tells it that all is clean."""

    def __init__(self, grace: float) -> None:
        command = [sys.executable, "-m", "guard.serve.watchdog", str(grace)]
        read, write = os.pipe()
        self._process = subprocess.Popen(
            command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True
        )
        os.close(read)
        self._lines = os.fdopen(write, "w", encoding="utf-8", buffering=1)

    def tell(self, verb: str, value: object = "") -> None:
        """Send one of the lines that ``guard.serve.watchdog`` knows."""
        with contextlib.suppress(OSError):  # it may have been killed, which is no reason to stop serving
            self._lines.write(f"{verb} {value}".strip() + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tell("done")
        with contextlib.suppress(OSError):
            self._lines.close()
        self._process.wait()


class Child:
    """One running service; its output goes to ``log``."""

    def __init__(self, service: Service, log: Path, watchdog: Watchdog) -> None:
        self.service = service
        self.log = log
        self.code: int | None = None
        self._empty = False
        parent = os.getpid()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(service.command),
                env=dict(service.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=lambda: _die_with_parent(parent),  # noqa: PLW1509  # there are no threads
            )
        self.pid = self._process.pid
        watchdog.tell("group", self.pid)

    def poll(self) -> int | None:
        """The exit status (negative: a signal), None while the child runs. Collects dead descendants."""
        while not self._empty:
            try:
                pid, status = os.waitpid(-self.pid, os.WNOHANG)
            except ChildProcessError:
                self._empty = True
                break
            if pid == 0:
                break
            if pid == self.pid:
                self.code = os.waitstatus_to_exitcode(status)
                self._process.returncode = self.code  # or Popen would wait for it again
        return self.code

    def gone(self) -> bool:
        """Whether neither the child nor anything it started is left."""
        self.poll()
        return self._empty

    def terminate(self) -> None:
        """Ask the child to stop. Its descendants are its own to stop as long as it lives."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def signal_group(self, number: int) -> None:
        """Signal the child and all that it started."""
        if not self.gone():
            signal_group(self.pid, number)

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of the log, without empty lines."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        return [line for line in lines if line.strip()][-count:]


def stop_all(
    children: Sequence[Child], grace: float, hurry: Callable[[], bool] = lambda: False
) -> list[Child]:
    """Stop children and all their descendants, by force after ``grace`` seconds or as soon as ``hurry()``.

    Returns the children that were still there at the end, which takes a process that cannot be killed.
    """
    for child in children:
        child.terminate()
    deadline = time.monotonic() + grace
    swept: set[int] = set()
    remaining = [child for child in children if not child.gone()]
    while remaining and time.monotonic() < deadline and not hurry():
        for child in remaining:
            if child.code is not None and child.pid not in swept:
                swept.add(child.pid)
                child.signal_group(signal.SIGTERM)
        time.sleep(_POLL_SECONDS)
        remaining = [child for child in remaining if not child.gone()]
    for child in remaining:
        child.signal_group(signal.SIGKILL)
    deadline = time.monotonic() + _KILL_SECONDS
    while remaining and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        remaining = [child for child in remaining if not child.gone()]
    return remaining
