"""Checks that end in every way a check can end; each says one number first."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from loadtests.gpu.isolate import run_process
from loadtests.gpu.recorder import Recorder


def passes(recorder: Recorder, value: int = 1) -> None:
    recorder.number("value", value)


def fails(recorder: Recorder) -> None:
    recorder.number("value", 2)
    recorder.expect(False, "two is not three")
    recorder.expect(True, "not said")
    recorder.number("table", [{"a": 1, "b|c": 0.123456}])


def raises(recorder: Recorder) -> None:
    recorder.number("value", 3)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def leaves(recorder: Recorder) -> None:
    recorder.number("value", 4)
    os._exit(0)


def crashes(recorder: Recorder) -> None:
    recorder.number("value", 5)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(recorder: Recorder, pids: str) -> None:
    """It has a process of its own, as checks of the engine have, which would outlive it."""
    recorder.number("value", 6)
    code = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w')); time.sleep(600)"
    command = [sys.executable, "-c", code, pids]
    run_process(command, Path(pids + ".log"), seconds=600, environment={}, group=False)


def gives_up(recorder: Recorder) -> None:
    recorder.number("value", 7)
    recorder.cannot("there is no such mode")


def lacks_a_package(recorder: Recorder) -> None:
    importlib.import_module("a_package_nobody_has.part")


def lacks_a_module_of_ours(recorder: Recorder) -> None:
    importlib.import_module("guard.no_such_module")
