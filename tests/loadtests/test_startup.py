"""The start-up measurement: which process is which, and what its table says."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from loadtests import startup


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("python -m guard.serve --port 8080", "supervisor"),
        ("python -m guard.serve.watchdog 15.0", None),
        ("python -m guard.engine --model m --port 9", "API server"),
        ("VLLM::EngineCore", "engine core"),
        ("VLLM::Worker", "worker"),
        ("python -m service", "gateway"),
        ("python -B -c from multiprocessing.resource_tracker import main", None),
    ],
)
def test_processes_are_told_apart_by_their_command_lines(command: str, role: str | None) -> None:
    assert startup.role_of(command) == role


def test_what_a_process_and_its_children_used_is_counted_by_role() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}, '-m service']); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        watched, deadline = startup.Watched(child.pid), time.monotonic() + 30
        while watched.cpu()["gateway"] < 0.2:
            assert time.monotonic() < deadline
            watched.look()
        assert watched.born("gateway") is not None
        assert watched.born("worker") is None
        child.kill()


def test_table_holds_median_and_extremes_of_every_stage_and_process() -> None:
    def made(ready: float) -> dict[str, object]:
        stages = dict.fromkeys(startup.STAGES, 1.0)
        cpu = dict.fromkeys([*startup.ROLES.values(), "others"], 0.5)
        return {
            "ready": ready,
            "load": 1.0,
            "mebibytes": 100 * ready,
            "stages": stages,
            "cpu": {**cpu, "worker": ready / 4},
        }

    starts = {"spawned": [made(40.0)], "now": [made(9.0), made(11.0), made(10.0)]}
    lines = startup.table(starts).splitlines()
    assert lines[0] == "| seconds | spawned | now |"
    assert lines[2] == "| **ready** | 40.0 (40.0 to 40.0) | 10.0 (9.0 to 11.0) |"
    assert "| self-test | 1.0 (1.0 to 1.0) | 1.0 (1.0 to 1.0) |" in lines
    assert "| worker | 10.0 (10.0 to 10.0) | 2.5 (2.2 to 2.8) |" in lines
    assert "| **all** | 12.5 | 5.0 |" in lines
    assert lines[-1] == "| memory of all, MiB | 4000 | 1000 |"
    machine = {"python": "3.11.7", "vllm": "0.32.0", "commit": "abc"}
    page = startup.page({"starts": starts, "cores": 2, "machine": machine})
    assert page.startswith("# How long `make serve` takes")
    assert page.endswith(startup.table(starts))
