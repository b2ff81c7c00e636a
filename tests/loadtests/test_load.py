"""The load tests: what the tools' reports become."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests.load import __main__ as load
from loadtests.load import guidellm, mix, report
from loadtests.speed import __main__ as speed
from service.policy_file import Policies


def entry(name: str, method: str, times: dict[str, int], failures: int = 0) -> dict[str, Any]:
    """As Locust writes it."""
    return {
        "name": name,
        "method": method,
        "num_requests": sum(times.values()),
        "num_failures": failures,
        "response_times": times,
        "start_time": 100.0,
        "last_request_timestamp": 110.0,
    }


ENTRIES = [
    entry("Everyday", "POST", {"50": 100}, failures=2),
    entry("Everyday", "FIRST", {"10": 50, "20": 48, "300": 2}),
    entry("Leaver", "POST", {"30": 100}),
    entry("Leaver", "FIRST", {"40": 100}),
]


def test_locusts_times_to_the_first_text_are_kept_apart_from_those_of_whole_answers() -> None:
    found = mix.figures(ENTRIES)
    assert found["Everyday"] == {
        "requests": 100,
        "failed": 2,
        "requests_per_second": 10.0,
        "first_p50_ms": 10,
        "first_p99_ms": 300,
    }
    assert (found["all"]["requests"], found["all"]["first_p50_ms"]) == (200, 40)


def benchmark(rate: float | None, first: list[float]) -> dict[str, Any]:
    """As GuideLLM 0.8 writes it, as far as it is read."""
    requests = [{"time_to_first_token_ms": ms} for ms in first]
    kind = {"type_": "constant", "rate": rate} if rate else {"type_": "synchronous"}
    return {
        "config": {"strategy": kind},
        "requests": {"successful": requests, "errored": [{}]},
        "metrics": {
            "requests_per_second": {"successful": {"mean": 4.0}},
            "output_tokens_per_second": {"successful": {"mean": 90.0}},
            "inter_token_latency_ms": {"successful": {"percentiles": {"p50": 7.0}}},
        },
    }


def test_guidellms_percentiles_have_intervals_over_requests(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(
        json.dumps({"benchmarks": [benchmark(None, [10, 20, 30] * 20), benchmark(5.0, [7.0] * 5)]})
    )
    first, second = guidellm.read(file)
    assert (first["strategy"], first["rate"], first["failed"]) == ("synchronous", None, 1)
    assert first["first_p50_ms"]["low"] <= first["first_p50_ms"]["value"] == 20
    assert first["first_p99_ms"]["value"] == 30
    assert second["first_p50_ms"] == {"value": 7, "low": 7, "high": 7}


def test_the_policy_file_of_the_load_tests_is_one() -> None:
    served = Policies.model_validate(load.policies())
    assert {served.policies[key.policy].mode for key in served.keys} == {"observe", "enforce"}
    assert len({key.tenant for key in served.keys}) == load.TENANTS


def test_the_page_is_written_from_the_files_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "facts.json").write_text(json.dumps(speed.facts({"locust": Path(sys.executable)})))
    figures = [guidellm._figures(benchmark(5.0, [7.0, 8.0]))]
    document = {
        "guidellm": {mode: {"sweep": figures, "constant": figures} for mode in report.MODES},
        "mix": {mode: {loop: mix.figures(ENTRIES) for loop in ("closed", "open")} for mode in report.MODES},
    }
    (run / "load.json").write_text(json.dumps(document))
    report.picture(document, run / "load.png")
    speed.write(run, tmp_path / "docs")
    page = (tmp_path / "docs/results/speed.md").read_text()
    assert "| stock vLLM | constant, 5.0/s | 4.0 | 90 | 8 [7, 8] |" in page
    assert "| guard, enforcing | open | Everyday | 100 | 2 | 10.0 | 10 | 300 |" in page
    kept = json.loads((tmp_path / "docs/results/speed.json").read_text())
    assert kept["load"]["mix"]["off"]["closed"]["all"]["requests"] == 200
    assert (tmp_path / "docs/images/speed-load.png").exists()
    assert kept["facts"]["commit"]


@pytest.mark.parametrize(("line", "says"), [
    (b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}', False),
    (b'data: {"choices": [{"delta": {"content": "x"}}]}', True),
    (b'data: {"choices": []}', False),
    (b"data: [DONE]", False),
    (b"", False),
])  # fmt: skip
def test_the_first_text_is_the_first_that_is_not_empty(line: bytes, says: bool) -> None:
    from loadtests.alternatives.client import _text

    assert bool(_text(line)) == says
