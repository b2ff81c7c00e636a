"""The checks themselves, as far as a CPU can run them: they pass, and they fail when the guard is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from guard.engine import taps as engine_taps
from guard.engine.buffers import PendingScores, ScoreBuffers
from loadtests.gpu import operation, taps, weighing
from loadtests.gpu.recorder import Recorder, read
from loadtests.gpu.suite import run as run_suite

ROOT = Path(__file__).parents[2]


def recorded(check, tmp_path, **options):
    recorder = Recorder(tmp_path / "record", device="cpu", folder=tmp_path)
    check(recorder, **options)
    entries = read(tmp_path / "record")
    failures = [entry["failure"] for entry in entries if "failure" in entry]
    return failures, {e["number"]: e["value"] for e in entries if "number" in e}


def test_what_a_cpu_can_run_passes_and_is_reported(tmp_path):
    only = ("op/indexing", "op/time", "taps", "transformers/tiny")
    command = [sys.executable, "-m", "loadtests.gpu.run", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *(part for name in only for part in ("--only", name))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "report.json").read_text())
    assert {c["name"]: c["state"] for c in written["checks"]} == {
        "op/indexing": "passed",
        "op/time": "passed",
        "taps/parity": "passed",
        "taps/in-flight": "passed",
        "taps/synchronisation": "could not be done",
        "transformers/tiny": "passed",
    }
    assert written["machine"]["torch"]


def test_operation_that_reads_the_next_element_fails(tmp_path, monkeypatch):
    right = operation.gather
    monkeypatch.setattr(operation, "TOKENS", (2, 7))
    monkeypatch.setattr(operation, "gather", lambda x, index, out: right(x, (index + 1) % (x.numel()), out))
    failures, _ = recorded(operation.indexing, tmp_path)
    assert any(failure.startswith("not as indexing") for failure in failures)


def test_operation_that_writes_beyond_its_columns_fails(tmp_path, monkeypatch):
    right = operation.gather
    monkeypatch.setattr(operation, "TOKENS", (7,))
    monkeypatch.setattr(
        operation, "gather", lambda x, index, out: right(x, index, out, operation.BEGIN, operation.END + 1)
    )
    failures, _ = recorded(operation.indexing, tmp_path)
    assert failures


def test_weighing_in_a_short_dtype_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(weighing, "TOKENS", (7, 64))
    failures, numbers = recorded(weighing.products, tmp_path)
    assert not failures
    assert 0 < numbers["largest difference"] < weighing.TOLERANCE
    right = weighing.weigh
    monkeypatch.setattr(weighing, "weigh", lambda x, c, w, out: right(x, c, w.bfloat16().float(), out))
    failures, _ = recorded(weighing.products, tmp_path)
    assert any(failure.startswith("off by") for failure in failures)


def test_taps_on_the_row_before_fail(tmp_path, monkeypatch):
    stage = engine_taps.Taps.stage

    def earlier(self, layout):
        stage(self, layout._replace(start=(layout.start - 1).clip(0)))

    monkeypatch.setattr(engine_taps.Taps, "stage", earlier)
    failures, numbers = recorded(taps.parity, tmp_path)
    assert any("a score is off" in failure for failure in failures)
    assert numbers["prompts that ended, torch.float32"] > 100


def test_taps_that_are_not_staged_anew_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_taps.Taps, "stage", lambda self, layout: self.staging.stage(layout))
    failures, _ = recorded(taps.parity, tmp_path)
    assert any("a score is off" in failure for failure in failures)


def test_scores_that_the_next_step_overwrites_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ScoreBuffers, "to_host", lambda self, ids, logits: PendingScores(ids, logits, None), raising=True
    )
    failures, _ = recorded(taps.in_flight, tmp_path)
    assert any("2 steps in flight a score is off" in failure for failure in failures)


def test_worst_difference_does_not_overlook_a_request_or_a_number_that_is_none():
    assert taps.worst({"a": 1.0}, {"a": 1.5}) == 0.5
    assert taps.worst({"a": 1.0}, {}) == float("inf")
    assert taps.worst({"a": 1.0}, {"b": 1.0}) == float("inf")
    assert taps.worst({"a": 1.0}, {"a": float("nan")}) == float("inf")


@pytest.mark.parametrize(("body", "failed"), [("assert True", False), ("assert False", True)])
def test_the_repository_s_tests_are_counted(tmp_path, body, failed):
    (tmp_path / "test_one.py").write_text(f"def test_one():\n    {body}\n")
    failures, numbers = recorded(run_suite, tmp_path, path=str(tmp_path / "test_one.py"))
    assert bool(failures) == failed
    assert numbers == {"failed" if failed else "passed": 1}


def test_copies_of_the_features_are_seen_in_generated_code():
    code = (
        "from loadtests.gpu.compiled import _copies\n"
        "line = 'buf3 = empty_strided_cuda((37, 123), (123, 1), torch.float32)'\n"
        "assert _copies(line) == 1 and _copies(line.replace('123', '64')) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=200)
