"""Python processes that start at once: copies of one that has imported everything already.

What runs in them is ``python -m MODULE …`` all the same, with its own environment, signals and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = ["service.app", "uvicorn", "tests.service.fake_engine"]


class Forked:
    """A process as ``subprocess.Popen`` shows it, as far as that is used."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode


class ForkServer:
    """Starts commands of the form ``[python, "-m", module, *arguments]``."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, command: list[str], environment: Mapping[str, str], log: Path) -> Forked:
        assert command[1] == "-m"
        process = self._context.Process(target=run, args=(command[2:], dict(environment), str(log)))
        process.start()
        return Forked(process)


def run(command: list[str], environment: dict[str, str], log: str) -> None:
    """In the new process."""
    os.setsid()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
