"""The check of the whole engine, in the one mode that starts fast on a CPU: two real engines."""

from __future__ import annotations

import json

import pytest

from loadtests.gpu import run
from loadtests.gpu.checks import select
from loadtests.gpu.engine import otherwise

NAME = "engine/tiny/float32/eager/v1/sync"


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_engine_check_passes_on_a_cpu(tmp_path):
    facts = {"vllm": "whatever is installed"}
    failed = run.run(select([NAME]), facts, tmp_path, "cpu", None)
    (check,) = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert (failed, check["state"], check["why"]) == (0, "passed", [])
    assert check["numbers"]["round 1: largest difference"] < 1e-3
    assert check["numbers"]["round 1: requests with other tokens than plain vLLM's"] == 0
    assert check["numbers"]["engine's worker"] == "GuardWorker"


def test_another_runner_or_scheduler_than_asked_for_is_said():
    v1 = {"runner": "vllm.v1.worker.gpu_model_runner", "async": False}
    v2 = {"runner": "vllm.v1.worker.gpu.model_runner", "async": True}
    assert otherwise(v1, "v1", "sync") is None
    assert otherwise(v2, "v2", "async") is None
    assert otherwise(v1, "v2", "sync") == "vLLM took the v1 runner where v2 was asked for"
    assert "set asynchronous scheduling to True where sync" in (otherwise(v2, "v2", "sync") or "")
