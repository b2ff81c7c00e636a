"""What time tells of the score: which prompts are paired, and what is said of their times."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loadtests.redteam.timing import FEWEST, Row, comparisons, difference, pairs, report

AT = 1.0
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def rows(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [Row(f"prompt {i}", draw.randint(5, 12), draw.gauss(0, 3)) for i in range(count)]


def test_pairs_have_equal_length_and_use_each_prompt_once() -> None:
    found = pairs(rows(60, 1), [row._replace(text=row.text + "!") for row in rows(60, 2)])
    assert len(found) > 30
    assert all(a.tokens == b.tokens for a, b in found)
    used = [row.text for pair in found for row in pair]
    assert len(used) == len(set(used))
    assert pairs(rows(60, 1), rows(60, 2), most=5) == pairs(rows(60, 1), rows(60, 2))[:5]


def test_what_is_compared_differs_in_score_and_not_in_verdict() -> None:
    refused, passed = comparisons(rows(600, 3), AT)
    for each, flagged in ((refused, True), (passed, False)):
        assert len(each.pairs) > 20
        assert all((row.logit >= AT) == flagged for pair in each.pairs for row in pair)
        # Every score of the one group lies above every score of the other.
        assert min(a.logit for a, _ in each.pairs) > max(b.logit for _, b in each.pairs)


def test_a_delay_of_one_group_is_found_and_noise_is_not() -> None:
    draw = random.Random(0)
    base = [0.02 + draw.expovariate(200) for _ in range(300)]
    other = [0.02 + draw.expovariate(200) for _ in range(300)]
    assert difference(base, other)["p"] > 0.01
    slower = difference([each + 0.002 for each in base], other)
    assert slower["p"] < 1e-4
    assert slower["difference_ms"]["median"] == pytest.approx(2.0, abs=1.0)
    assert slower["first_slower"] > 0.6
    assert slower["pairs"] == 300


def test_the_page_is_that_of_the_figures_beside_it_and_time_tells_nothing() -> None:
    found = json.loads((RESULTS / "refusal-timing.json").read_text("utf-8"))
    assert (RESULTS / "refusal-timing.md").read_text("utf-8") == report(found)
    lines = [each for comparisons in found.values() for each in comparisons.values()]
    assert len(lines) >= 6
    assert all(each["pairs"] >= FEWEST for each in lines)
    # The finding that the threat model rests on, at one in twenty for all tests together.
    assert min(each["p"] for each in lines) > 0.05 / len(lines)
