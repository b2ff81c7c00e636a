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


SHARE = {"rate": 0.25, "hits": 5, "n": 20, "low": 0.1, "high": 0.5}
AREA = {"auroc": 0.9, "auroc_interval": [0.8, 0.95]}
RECALL = {"tpr_at_fpr": {"0.01": 0.4}, "tpr_at_fpr_interval": {"0.01": [0.3, 0.5]}}
CHANGE = {"difference": -0.01, "difference_interval": [-0.02, 0.0]}


@pytest.fixture
def document() -> dict[str, Any]:
    """Figures in the form that the study gives them, made up."""
    names = [LAST, *POOLINGS]
    one = {
        "ranking": {**AREA, **RECALL},
        "harmful_flagged": SHARE,
        "benign_flagged": SHARE,
        "twins": 0.5,
        "by_source": {
            "bad": {"harmful": True, "flagged": SHARE, "auroc": 0.9},
            "calm": {"harmful": False, "flagged": SHARE},
        },
    }
    minus = {"minus_last": {"auroc": CHANGE, "tpr_at_fpr": {"0.01": CHANGE}}}
    left = {
        "folds": 4,
        "inverse_regularisation": 1e-4,
        "mean_auroc": 0.9,
        "mean_partial_auroc": 0.8,
        "worst_source": "bad",
        "worst_partial_auroc": 0.6,
    }
    stop = {
        "false_positive_rate": 0.01,
        "debounce": 4,
        "unsafe_stopped": SHARE,
        "missed_stopped": {**SHARE, "n": 0},
        "median_token": 7.0,
        "benign_stopped": SHARE,
    }
    text = {"tokens": 111.0, "guards": {name: {"flagged": SHARE, "auroc": 0.75} for name in names}}
    return {
        "bundles": dict.fromkeys(names, "0" * 64),
        "quality": {name: one if name == LAST else {**one, **minus} for name in names},
        "left_out": dict.fromkeys(names, left),
        "flips": {
            "flagged": dict.fromkeys(names, 20),
            "changes": {"some words": dict.fromkeys(names, SHARE)},
        },
        "needle": {
            "context": 512,
            "needles": 20,
            "alone": dict.fromkeys(names, SHARE),
            "texts": {"benign": text, "needle": text},
        },
        "answers": {
            "tokens": 40,
            "set_on": 400,
            "missed": 3,
            "unsafe": {"answers": 10, "median_tokens": 20.0},
            "benign": {"answers": 12, "median_tokens": 25.0},
            "guards": {name: [stop] for name in POOLINGS},
        },
    }


class TestReport:
    def test_every_part_has_a_row_for_every_guard(self, document: dict[str, Any]) -> None:
        text = report.markdown(document, None)
        assert "| last token | 0.900 [0.800, 0.950] |  | 40.0 % [30.0, 50.0] |" in text
        assert "| ema | 0.900 [0.800, 0.950] | -0.010 [-0.020, 0.000] |" in text
        assert "| bad | harmful | 25.0 % (0.900) |" in text
        assert "| attention | 4 | 0.0001 | 0.900 | 0.800 | 0.600 (bad) |" in text
        assert "the longest text is 111 tokens and not two thousand" in text
        assert "| softmax | 4 | 25.0 % [10.0, 50.0] | – | 7 | 25.0 % [10.0, 50.0] |" in text

    def test_the_cost_is_shown_or_said_to_be_missing(self, document: dict[str, Any]) -> None:
        assert "Not measured yet." in report.markdown(document, None)
        ratio = {"median": 0.99, "low": 0.98, "high": 1.0}
        arm = {"throughput": ratio, "decode": ratio, "prefill": ratio}
        text = report.markdown(document, {"pooling": {"ema": {"monitoring": arm}}})
        assert "| ema | monitoring | 0.990 [0.980, 1.000] |" in text
        assert "Not measured yet." not in text

    def test_pictures_are_drawn_from_the_figures(self, document: dict[str, Any], tmp_path: Path) -> None:
        figures.draw(document, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {name for name, _ in figures.NAMES.values()}

    def test_the_page_is_made_of_the_figures_that_are_kept(self) -> None:
        kept = RESULTS / "sequence.json"
        if not kept.is_file():
            pytest.skip("the study has not been run: make sequence-results")
        found = json.loads(kept.read_text("utf-8"))
        cost = RESULTS / "sequence-cost.json"
        measured = json.loads(cost.read_text("utf-8")) if cost.is_file() else None
        assert (RESULTS / "sequence.md").read_text("utf-8") == report.markdown(found, measured)
        assert list(found["bundles"]) == [LAST, *POOLINGS]
        assert all((ROOT / "docs" / "images" / name).is_file() for name, _ in figures.NAMES.values())
