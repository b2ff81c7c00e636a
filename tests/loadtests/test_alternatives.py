"""The comparison with alternatives: who is asked what in which order, and how figures come of it."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import chain
from typing import Any

import pytest

from loadtests.alternatives import report
from loadtests.alternatives import rounds as rounds_module
from loadtests.alternatives.client import Answer, Target
from loadtests.alternatives.figures import figures, interval, quantile, stages
from loadtests.alternatives.processes import Group
from loadtests.alternatives.prompts import Prompts, candidates
from loadtests.alternatives.rounds import Shape, of_round, run

SHAPE = Shape(benign=2, harmful=1, busy=3, at_once=2, tokens=4)
PROMPTS = Prompts([f"b{n}" for n in range(15)], [f"h{n}" for n in range(3)])


def row(name: str, turn: int, first: float, tokens: int = 30, wrong: int = 0) -> dict[str, Any]:
    """A round in which every time to first text is ``first`` seconds."""
    part = {"first": [first] * 4, "seconds": [1.0] * 4, "wall": 2.0, "stages": [{"check": 1e3 * first}]}
    cpu = {"engine": 4 * first, "proxy": 0.4}
    return {
        "round": turn,
        "name": name,
        "wrong": wrong,
        "benign": part,
        "harmful": part,
        "busy": part | {"tokens": tokens},
        "cpu": {"benign": cpu, "harmful": cpu, "busy": cpu},
        "megabytes": {"engine": 100.0 + turn, "proxy": 10.0},
    }


async def test_all_get_the_same_fresh_prompts_and_each_comes_first_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    async def ask(session: Any, target: Target, prompt: str, max_tokens: int) -> Answer:
        asked.append((target.name, prompt))
        return Answer(0.1, 0.2, prompt.startswith("h") and target.name == "b", "text", {})

    async def ask_all(session: Any, target: Target, prompts: list[str], *_: int) -> list[Answer]:
        return [await ask(session, target, prompt, 0) for prompt in prompts]

    monkeypatch.setattr(rounds_module, "ask", ask)
    monkeypatch.setattr(rounds_module, "ask_all", ask_all)
    monkeypatch.setattr(rounds_module, "SETTLE", 0.0)
    targets = [Target("a", "", (), refuses=False), Target("b", "", ()), Target("never refuses", "", ())]
    rows: list[dict[str, Any]] = []
    await run(targets, {}, PROMPTS, 3, SHAPE, rows.append)
    assert [r["name"] for r in rows] == [
        *("a", "b", "never refuses"),
        *("b", "never refuses", "a"),
        *("never refuses", "a", "b"),
    ]
    by_name = {t.name: [prompt for name, prompt in asked if name == t.name] for t in targets}
    assert by_name["a"] == by_name["b"] == by_name["never refuses"]
    assert len(set(by_name["a"])) == len(by_name["a"]) == 3 * 6
    assert by_name["a"][:6] == ["b0", "b1", "h0", "b2", "b3", "b4"]
    assert {r["name"]: r["wrong"] for r in rows} == {"a": 0, "b": 0, "never refuses": 1}


def test_prompts_of_rounds_do_not_overlap() -> None:
    first, second = ({*chain(*of_round(PROMPTS, turn, SHAPE))} for turn in (0, 1))
    assert len(first) == len(second) == 6
    assert not first & second


def test_candidates_are_all_different_and_the_same_each_time() -> None:
    assert len(set(candidates(500))) == 500
    assert candidates(20) == candidates(20)


ROWS = [row(name, turn, first) for turn in range(6) for name, first in (("stock vLLM", 0.1), ("it", 0.2))]


class TestFigures:
    def test_times_are_milliseconds_and_ratios_those_of_the_same_rounds(self):
        found = figures(ROWS, "stock vLLM")["it"]
        assert found["first_p50_ms"] == {"value": 200, "low": 200, "high": 200}
        assert found["ratio"]["first_p50_ms"]["value"] == pytest.approx(2.0)
        # A refusal stands against stock vLLM's first token.
        assert found["ratio"]["refusal_p99_ms"]["value"] == pytest.approx(2.0)
        assert found["tokens_per_second"]["value"] == 15
        assert found["cpu_ms_per_answer"]["value"] == pytest.approx(1e3 * (4 * 0.2 + 0.4) / 4)
        assert found["cpu_ms"]["busy"] == {"engine": pytest.approx(200), "proxy": pytest.approx(100)}
        assert found["megabytes"] == 115
        assert found["stages_ms"]["benign"] == {"check": 200}

    def test_an_interval_spans_what_rounds_make_of_a_difference(self):
        firsts = [0.1, 0.2, 0.3, 0.4, 0.5]
        rows = [row("it", turn, first) for turn, first in enumerate(firsts)]
        found = interval(lambda n: quantile("benign", 0.5)([rows[i] for i in n]), len(rows))
        assert found["value"] == pytest.approx(300)
        assert found["low"] < 300 < found["high"]

    def test_stages_are_medians_over_answers(self):
        rows = [
            {"benign": {"stages": [{"check": 1.0}, {"check": 3.0}, {}]}},
            {"benign": {"stages": [{"check": 9.0}]}},
        ]
        assert stages(rows, "benign") == {"check": 3.0}

    def test_the_tables_name_every_alternative_and_what_did_not_run(self, tmp_path):
        subject = {
            "rows": ROWS,
            "stopped": {"LLM Guard": "no installation was named"},
            "rounds": 6,
            "shape": SHAPE._asdict(),
        }
        report.write({"subjects": {"some model": subject}}, tmp_path)
        text = (tmp_path / "alternatives.md").read_text()
        assert "| it | 200 [200, 200] |" in text
        assert "| it | 2.00 [2.00, 2.00] |" in text
        assert "LLM Guard did not run: no installation was named." in text
        assert (tmp_path / "alternatives.png").stat().st_size > 1000


def test_a_groups_cpu_time_is_that_of_the_children_too() -> None:
    busy = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.5: pass"
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {busy!r}]); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", parent])
    try:
        group, until = Group(child.pid), time.monotonic() + 30
        while group.cpu_seconds < 0.5 and time.monotonic() < until:
            time.sleep(0.05)
        assert group.cpu_seconds >= 0.5
        assert group.megabytes > 1
    finally:
        child.kill()
        child.wait()
