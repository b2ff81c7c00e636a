from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guard.serve.plan import free_port

STACK = Path(__file__).parent / "stack.py"


class Stack:
    """A supervisor with two fake services, run as `make serve` runs the real ones."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        services = {
            name: {"port": free_port(), "pids": str(folder / f"{name}.pids"), **options.pop(name, {})}  # type: ignore[dict-item]
            for name in ("engine", "gateway")
        }
        argument = json.dumps({"services": services, "logs": str(folder / "logs"), **options})
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(STACK), argument],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(folder)},
            )

    def text(self) -> str:
        return self.output.read_text("utf-8")

    def until_ready(self) -> None:
        wait_for(lambda: "endpoint is up" in self.text() or self.process.poll() is not None)
        assert "endpoint is up" in self.text(), self.text()

    def pids(self) -> list[int]:
        files = [self.folder / "engine.pids", self.folder / "gateway.pids"]
        return [pid for file in files if file.exists() for pid in json.loads(file.read_text() or "[]")]

    def key_file(self) -> Path:
        line = next(line for line in self.text().splitlines() if line.startswith("endpoint is up"))
        return Path(line.split()[-1])


def wait_for(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    """Start stacks that cannot outlive the test."""
    stacks: list[Stack] = []

    def _start(**options: object) -> Stack:
        folder = tmp_path / f"stack{len(stacks)}"
        folder.mkdir()
        stacks.append(Stack(folder, **options))
        return stacks[-1]

    yield _start
    for stack in stacks:
        if stack.process.poll() is None:
            stack.process.kill()
            stack.process.wait()
        for pid in filter(alive, stack.pids()):
            os.kill(pid, signal.SIGKILL)
