"""Clean up after a supervisor that could not do so itself, because it was killed.

``python -m guard.serve.watchdog GRACE`` reads lines from its standard input, which the supervisor holds open:

    group PGID      a process group to stop
    remove PATH     a directory to delete
    done            everything is cleaned up

An end of input without ``done`` means that the supervisor is gone: every group gets SIGTERM, those that
remain after GRACE seconds get SIGKILL, and the directories are deleted. Only the standard library is used.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable

_POLL_SECONDS = 0.05


def watch(lines: Iterable[str], grace: float) -> None:
    """Follow a supervisor's lines to their end, then do what it left undone."""
    groups: list[int] = []
    folders: list[str] = []
    for line in lines:
        verb, _, value = line.rstrip("\n").partition(" ")
        if verb == "done":
            return
        if verb == "group":
            groups.append(int(value))
        elif verb == "remove":
            folders.append(value)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    remaining = [group for group in groups if signal_group(group, signal.SIGTERM)]
    deadline = time.monotonic() + grace
    while remaining and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        remaining = [group for group in remaining if signal_group(group, 0)]
    for group in remaining:
        signal_group(group, signal.SIGKILL)


def signal_group(group: int, number: int) -> bool:
    """Signal a process group (0 only asks whether it exists); False when there is none."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    # A Ctrl-C or a closing terminal is the supervisor's to handle.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watch(sys.stdin, float(sys.argv[1]))
