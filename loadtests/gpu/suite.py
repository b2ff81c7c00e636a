"""The repository's own tests on this machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

from loadtests.gpu.isolate import ROOT
from loadtests.gpu.recorder import Recorder

NEEDED = ("pytest", "pytest_asyncio", "pytest_timeout", "hypothesis")


def run(recorder: Recorder, path: str = "tests/engine") -> None:
    """Count what passes and what does not under ``path``."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        recorder.cannot(f"not installed: {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    lines = done.stdout.strip().splitlines() or [""]
    for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", lines[-1]):
        recorder.number(word, int(number))
    recorder.expect(done.returncode == 0, f"pytest {path} ended with status {done.returncode}: {lines[-1]}")
