"""The study of sequence probes: its texts, its pictures, its report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.recipe.sequence import figures, needle, report
from models.recipe.sequence.guards import LAST, POOLINGS
from models.recipe.sequence.protocol import area

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
CALM = [f"calm request number {n}" for n in range(20)]


def _tokens(text: str) -> int:
    return len(text.split())


class TestNeedle:
    def test_benign_text_leaves_room_for_the_needle_and_fills_the_rest(self) -> None:
        for seed in range(20):
            hay = needle._hay("one two three", CALM, random.Random(seed), _tokens, 40)
            with_needle = _tokens(" ".join([*hay, "one two three"]))
            assert 40 - 4 < with_needle <= 40

    def test_the_needle_stands_where_it_is_said_to(self) -> None:
        texts = {place: needle._placed(["a", "b", "c", "d"], "X", place) for place in needle.PLACES}
        assert texts == {"first": "X a b c d", "in the middle": "a b X c d", "last": "a b c d X"}

    def test_a_chat_has_the_needle_in_its_first_turn_and_ends_with_a_question(self) -> None:
        chat = needle._chat("X", CALM)
        assert [message["role"] for message in chat] == ["user", "assistant"] * 3 + ["user"]
        assert chat[0]["content"] == "X"
        assert {message["content"] for message in chat[2::2]} <= set(CALM)
        calm = needle._chat(None, CALM, seed="X")
        assert "X" not in {message["content"] for message in calm}
        assert calm == needle._chat(None, CALM, seed="X")


def test_area_is_the_share_of_pairs_in_the_right_order() -> None:
    assert area(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert area(np.array([2.0]), np.array([])) is None


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads((RESULTS / "sequence.json").read_text("utf-8"))


class TestReport:
    def test_the_page_is_made_of_the_figures(self, document: Any) -> None:
        cost = RESULTS / "sequence-cost.json"
        measured = json.loads(cost.read_text("utf-8")) if cost.is_file() else None
        assert (RESULTS / "sequence.md").read_text("utf-8") == report.markdown(document, measured)

    def test_all_guards_are_in_every_part(self, document: Any) -> None:
        names = [LAST, *POOLINGS]
        assert list(document["bundles"]) == names
        assert list(document["quality"]) == names
        assert list(document["flips"]["flagged"]) == names
        assert list(document["needle"]["alone"]) == names
        assert list(document["answers"]["guards"]) == names[1:]

    def test_the_cost_says_when_it_was_not_measured(self, document: Any) -> None:
        assert "Not measured yet." in report.markdown(document, None)
        ratio = {"median": 0.99, "low": 0.98, "high": 1.0}
        arm = {"throughput": ratio, "decode": ratio, "prefill": ratio}
        text = report.markdown(document, {"pooling": {"ema": {"monitoring": arm}}})
        assert "| ema | monitoring | 0.990 [0.980, 1.000] |" in text

    def test_pictures_are_drawn_from_the_figures(self, document: Any, tmp_path: Path) -> None:
        figures.draw(document, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {name for name, _ in figures.NAMES.values()}
        assert all((ROOT / "docs" / "images" / name).is_file() for name, _ in figures.NAMES.values())
