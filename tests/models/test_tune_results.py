"""What is shipped of the study of tuning: figures, the report of them, a picture; no prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.recipe.tuning import figures, report
from models.recipe.tuning.cells import CONTROLLED, cells
from models.recipe.tuning.material import ALIGNED, SFT
from tests.models import shipped


@pytest.fixture(scope="module")
def document() -> Any:
    return shipped.document("tune")


def test_the_report_is_that_of_the_figures_beside_it(document: Any) -> None:
    assert report.markdown(document) == shipped.report("tune")


def test_the_picture_is_drawn_from_the_figures_and_the_report_shows_it(tmp_path: Path) -> None:
    shipped.assert_pictures_are_shown("tune", figures.draw, tmp_path, {figures.PICTURE[0]})


def test_results_hold_figures_and_no_prompt(document: Any) -> None:
    assert shipped.longest_text(document) < 100
    assert document["prompts"]["harmful"]["prompts"] >= 200


def test_every_cell_was_measured_or_is_said_not_to_have_been(document: Any) -> None:
    planned = cells(document["size"]["draws"])
    assert {*document["models"], *document["missing"]} == {SFT, ALIGNED, *(cell.name for cell in planned)}
    assert not document["models"].keys() & set(document["missing"])
    assert document["controls"].keys() <= set(CONTROLLED)
    text = shipped.report("tune")
    assert all(name in text for name in document["missing"])


def test_a_cell_starts_from_a_model_that_is_there_before_it() -> None:
    there = {SFT, ALIGNED}
    for cell in cells(2):
        assert cell.start in there
        there.add(cell.name)


def test_what_the_report_says_of_a_claim_is_what_its_interval_says(document: Any) -> None:
    for each in document["claims"]:
        rates = [document["models"][each[key]]["unsafe"]["rate"] for key in ("from", "to")]
        assert each["difference"]["mean"] == pytest.approx(rates[0] - rates[1])
        if each["verdict"] == "as there":
            assert each["difference"]["low"] > 0
        elif each["verdict"] == "the other way":
            assert each["difference"]["high"] < 0
