"""What is shipped of the study: figures, the report of them, pictures; no prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.recipe.locate import figures, report
from models.recipe.locate.study import PAIRS
from tests.models import shipped


@pytest.fixture(scope="module")
def document() -> Any:
    return shipped.document("locate")


def test_the_report_is_that_of_the_figures_beside_it(document: Any) -> None:
    assert report.markdown(document) == shipped.report("locate")


def test_pictures_are_drawn_from_the_figures_and_the_report_shows_them(tmp_path: Path) -> None:
    expected = {file.format(pair=pair.name) for pair in PAIRS for file, _ in figures.NAMES.values()}
    shipped.assert_pictures_are_shown("locate", figures.draw, tmp_path, expected)


def test_results_hold_figures_and_no_prompt(document: Any) -> None:
    assert shipped.longest_text(document) < 100
    assert document["pairs"].keys() == {pair.name for pair in PAIRS}
    assert all(
        c["prompts"] >= 150
        for p in document["pairs"].values()
        for k in p["causal"].values()
        for c in k.values()
    )
