"""The bench of the gateway measures what it says, on a small scale."""

import json
from pathlib import Path

from click.testing import CliRunner

from loadtests.gateway.__main__ import main


def test_the_bench_runs_and_loses_no_answer(tmp_path: Path) -> None:
    wish = ["--blocks", "1", "--requests", "10", "--streams", "5", "--pause-ms", "20", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, wish)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "gateway.json").read_text())
    assert set(found["servers"]) == {"backend", "gateway"}
    for own in found["servers"].values():
        assert (own["failed"], own["busy"]["count"]) == (0, 10)
        assert 0 < own["p50_ms"] <= own["p99_ms"]
    for own in found["streams"].values():
        assert (own["failed"], own["streams"]) == (0, 5)
    assert "| gateway |" in (tmp_path / "gateway.md").read_text()
