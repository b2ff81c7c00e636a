"""The runner of the GPU checks: whatever a check does, it is one line, and the report stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtests.gpu import run
from loadtests.gpu.checks import Check, all_checks, select
from loadtests.gpu.isolate import run_call

ROOT = Path(__file__).parents[2]
FACTS = {"torch": "2", "vllm": None, "vllm_error": "no vLLM"}


def end(ending, out, seconds=60.0, **options):
    call = f"tests.loadtests_gpu.endings:{ending}"
    return run_call(ending, call, options, out=out, device="cpu", seconds=seconds, environment={})


def check(ending, **fields):
    return Check(ending, "A check", f"tests.loadtests_gpu.endings:{ending}", {}, 60, on_cpu=True)._replace(
        **fields
    )


@pytest.mark.parametrize(
    ("ending", "state", "why", "numbers"),
    [
        ("passes", "passed", "", {"value": 1}),
        ("fails", "failed", "two is not three", {"value": 2, "table": [{"a": 1, "b|c": 0.123456}]}),
        ("raises", "failed", "status 1: RuntimeError: CUDA error: an illegal memory", {"value": 3}),
        ("leaves", "failed", "status 0: it printed nothing", {"value": 4}),
        ("crashes", "failed", "by signal SIGSEGV", {"value": 5}),
        ("gives_up", "could not be done", "there is no such mode", {"value": 7}),
        ("lacks_a_package", "could not be done", "the package a_package_nobody_has is not installed", {}),
        ("lacks_a_module_of_ours", "failed", "No module named 'guard.no_such_module'", {}),
    ],
)
def test_every_ending_is_one_outcome_with_the_numbers_so_far(tmp_path, ending, state, why, numbers):
    outcome = end(ending, tmp_path)
    assert (outcome.state, outcome.numbers) == (state, numbers)
    assert why in "; ".join(outcome.why)
    assert bool(outcome.why) == bool(why)


def test_a_check_that_hangs_is_ended_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    outcome = end("hangs", tmp_path, seconds=8.0, pids=str(pids))
    assert outcome.state == "failed"
    assert outcome.why[0].startswith("it took longer than 8 s")
    assert outcome.numbers == {"value": 6}
    assert _ended(int(pids.read_text()))


def _ended(pid: int) -> bool:
    """Whether a process that was sent SIGKILL is gone; the kernel takes its own time over the last of it."""
    for _ in range(100):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_report_has_every_check_and_counts_failures(tmp_path):
    checks = [check("passes"), check("fails"), check("gives_up"), check("passes", name="gpu", on_cpu=False),
              check("passes", name="vllm", needs_vllm=True)]  # fmt: skip
    assert run.run(checks, FACTS, tmp_path, "cpu", None) == 1
    written = json.loads((tmp_path / "report.json").read_text())
    assert [(c["name"], c["state"]) for c in written["checks"]] == [
        ("passes", "passed"),
        ("fails", "failed"),
        ("gives_up", "could not be done"),
        ("gpu", "could not be done"),
        ("vllm", "could not be done"),
    ]
    assert written["machine"] == FACTS
    text = (tmp_path / "report.md").read_text()
    assert "1 passed, 1 failed, 3 could not be done; 5 of 5 checks have ended." in text
    assert "| `fails` | failed: two is not three |" in text
    assert "vLLM does not import: no vLLM" in text
    assert "| 1 | 0.1235 |" in text


def test_sigterm_ends_the_check_that_runs_too(tmp_path):
    code = (
        "from tests.loadtests_gpu.test_run import *\n"
        "hangs = check('hangs')._replace(options={'pids': sys.argv[1] + '/pids'})\n"
        "run.select, run.machine = lambda names: [hangs], lambda out: FACTS\n"
        "run.main(['--device', 'cpu', '--out', sys.argv[1]])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    pid = _pid(tmp_path / "pids")
    process.terminate()
    assert process.wait(30) == 143
    assert _ended(pid)


def _pid(file: Path) -> int:
    for _ in range(600):
        if file.exists() and file.read_text():
            break
        time.sleep(0.1)
    return int(file.read_text())


def test_no_check_is_started_after_the_time_is_over(tmp_path):
    assert run.run([check("passes")], FACTS, tmp_path, "cpu", minutes=0.01) == 0
    assert "--minutes" in (tmp_path / "report.md").read_text()


def test_report_of_a_killed_run_has_what_had_ended(tmp_path):
    code = (
        "from tests.loadtests_gpu.test_run import *\n"
        "hangs = check('hangs')._replace(options={'pids': sys.argv[1] + '/pids'})\n"
        "run.run([check('passes'), hangs], FACTS, Path(sys.argv[1]), 'cpu', None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    orphan = _pid(tmp_path / "pids")
    process.kill()
    process.wait()
    os.killpg(os.getpgid(orphan), signal.SIGKILL)  # nobody else is left to do it
    written = json.loads((tmp_path / "report.json").read_text())
    assert [c["name"] for c in written["checks"]] == ["passes"]
    assert "1 of 2 checks have ended" in (tmp_path / "report.md").read_text()


def test_leave_for_an_untested_vllm_is_set_for_its_version(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run_call", lambda *a, environment, **k: seen.append(environment) or end_())
    run.run([check("passes")], {**FACTS, "vllm": "0.99.1"}, tmp_path, "cpu", None)
    assert seen == [{"NEURONGUARD_UNTESTED_VLLM": "0.99.1"}]


def end_():
    from loadtests.gpu.isolate import Outcome

    return Outcome("passed", [], {}, 0.0)


def test_without_cuda_one_sentence_and_status_2(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "machine", lambda out: {"torch": "2", "gpu": None})
    result = CliRunner().invoke(run.main, ["--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output == "no CUDA device is usable here; --device cpu runs what a CPU can\n"


def test_list_names_all_checks_and_an_unknown_name_is_refused():
    listed = CliRunner().invoke(run.main, ["--list"])
    assert len(listed.output.splitlines()) == len(all_checks())
    unknown = CliRunner().invoke(run.main, ["--only", "nothing"])
    assert unknown.exit_code == 2
    assert "no check is called 'nothing'" in unknown.output


def test_a_group_selects_what_is_under_it_and_names_are_unique():
    assert {c.name for c in select(["taps"])} == {"taps/parity", "taps/in-flight", "taps/synchronisation"}
    assert [c.name for c in select(["op/time"])] == ["op/time"]
    names = [c.name for c in all_checks()]
    assert len(set(names)) == len(names)


def test_matrix_has_every_mode_runner_and_scheduling():
    tiny = [c.options for c in select(["engine/tiny/float32"])]
    assert len({tuple(o.values()) for o in tiny}) == len(tiny) == 6 * 2 * 2


def test_every_check_calls_a_function_that_takes_its_options():
    """In a process of its own: some of these modules bring a compiler."""
    code = (
        "import importlib, inspect\n"
        "from loadtests.gpu.checks import all_checks\n"
        "for check in all_checks():\n"
        "    module, _, name = check.call.partition(':')\n"
        "    function = getattr(importlib.import_module(module), name)\n"
        "    inspect.signature(function).bind(None, **check.options)\n"
        "import sys; assert 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)
