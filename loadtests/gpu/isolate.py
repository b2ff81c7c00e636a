"""Run a check in a child process with a time limit, and say how it ended.

Whatever happens to the child (an exception, a crash, no memory, no end), here it is one outcome.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loadtests.gpu.recorder import read

ROOT = Path(__file__).parents[2]
State = Literal["passed", "failed", "could not be done"]


class Outcome(NamedTuple):
    """How a check ended."""

    state: State
    why: list[str]
    """Sentences; empty when it passed."""
    numbers: dict[str, Any]
    seconds: float


def run_call(
    name: str,
    call: str,
    options: Mapping[str, Any],
    *,
    out: Path,
    device: str,
    seconds: float,
    environment: Mapping[str, str],
) -> Outcome:
    """Run ``module:function`` in a child; its output goes to ``out/logs``, its record to ``out/records``."""
    stem = name.replace("/", "-")
    folder, logs, records = out / "world", out / "logs", out / "records"
    for directory in (folder, logs, records):
        directory.mkdir(parents=True, exist_ok=True)
    record, log, job = records / f"{stem}.jsonl", logs / f"{stem}.log", records / f"{stem}.job.json"
    record.unlink(missing_ok=True)
    job.write_text(
        json.dumps(
            {
                "call": call,
                "options": dict(options),
                "device": device,
                "record": str(record),
                "folder": str(folder),
            }
        )
    )
    started = time.monotonic()
    command = [sys.executable, "-m", "loadtests.gpu.child", str(job)]
    status = run_process(command, log, seconds=seconds, environment=environment)
    return _outcome(read(record), status, seconds, log, time.monotonic() - started)


def run_process(
    command: list[str], log: Path, *, seconds: float, environment: Mapping[str, str], group: bool = True
) -> int | None:
    """Exit status of a command that is given ``seconds``; None when it took longer and was ended.

    With ``group`` it gets a process group of its own, which ends with it: an engine's further processes too.
    A check starts its engines without, so that they end with the check.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=group,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if group:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()


def ended(status: int, log: Path) -> str:
    """A sentence on a process that did not end well, with the last line that it printed."""
    how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"its process ended {how}: {last_line(log)}"


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it printed nothing"


def _outcome(
    entries: list[dict[str, Any]], status: int | None, limit: float, log: Path, seconds: float
) -> Outcome:
    numbers = {entry["number"]: entry["value"] for entry in entries if "number" in entry}
    why = [entry["failure"] for entry in entries if "failure" in entry]
    cannot = [entry["cannot"] for entry in entries if "cannot" in entry]
    if status is None:
        why.append(f"it took longer than {limit:.0f} s and was ended: {last_line(log)}")
    elif status != 0 or not any("end" in entry for entry in entries):
        why.append(ended(status, log))
    if why:
        return Outcome("failed", why, numbers, seconds)
    if cannot:
        return Outcome("could not be done", cannot, numbers, seconds)
    return Outcome("passed", [], numbers, seconds)
