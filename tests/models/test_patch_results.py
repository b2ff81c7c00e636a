"""What is shipped of the study of patches: figures, the report of them, pictures; no prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.recipe.patching import figures, report
from models.recipe.patching.study import PAIRS
from tests.models import shipped


@pytest.fixture(scope="module")
def document() -> Any:
    return shipped.document("patch")


def test_the_report_is_that_of_the_figures_beside_it(document: Any) -> None:
    assert report.markdown(document) == shipped.report("patch")


def test_pictures_are_drawn_from_the_figures_and_the_report_shows_them(tmp_path: Path) -> None:
    expected = {figures.SAFETY[0].format(pair=pair.name) for pair in PAIRS}
    shipped.assert_pictures_are_shown("patch", figures.draw, tmp_path, expected)


def test_results_hold_figures_and_no_prompt(document: Any) -> None:
    assert shipped.longest_text(document) < 100
    assert document["pairs"].keys() == {pair.name for pair in PAIRS}
    assert document["prompts"]["harmful"]["prompts"] >= 300


def test_on_the_co_adapted_pair_five_per_cent_restore_nine_tenths_of_the_donors_safety(document: Any) -> None:
    """By the paper's ranking and by the chosen one, with the donor and without."""
    pair = document["pairs"]["planted"]
    curves = [*pair["dynamic"].values(), pair["stored"]["curve"]]
    (rows,) = zip(*([row for row in curve if row["share"] == 0.05] for curve in curves), strict=True)
    for row in rows:
        assert row["effect"]["low"] >= 0.9
        assert max(each["effect"]["value"] for each in row["controls"]["each"].values()) <= 0.1


@pytest.mark.parametrize("pair", ["dense", "first"])
def test_on_plainly_trained_pairs_the_chosen_ranking_restores_what_the_papers_does_not(
    document: Any, pair: str
) -> None:
    best, papers = document["pairs"][pair]["dynamic"].values()
    at = {row["share"]: row["effect"]["value"] for row in best}
    theirs = {row["share"]: row["effect"]["value"] for row in papers}
    assert at[0.05] >= 0.95
    assert all(at[share] > theirs[share] + 0.02 for share in (0.01, 0.02, 0.05))
    (row,) = [row for row in best if row["share"] == 0.05]
    assert max(each["effect"]["value"] for each in row["controls"]["each"].values()) <= 0.05


def test_a_patch_changes_answers_to_harmless_requests_no_more_than_its_donor(document: Any) -> None:
    """Behind the first token, where the lab models decide whether to refuse."""
    for pair in document["pairs"].values():
        donor = pair["ends"]["donor"]["ability"]
        for row in (*next(iter(pair["dynamic"].values())), *pair["stored"]["curve"]):
            for which, found in row["ability"].items():
                assert abs(found["rest"]["mean"]) <= abs(donor[which]["rest"]["mean"]) + 0.01
                assert found["perplexity"] <= 1.1 * pair["ends"]["recipient"]["ability"][which]["perplexity"]


def test_every_neuron_patched_is_the_donor_on_every_pair(document: Any) -> None:
    for pair in document["pairs"].values():
        for rows in pair["dynamic"].values():
            assert rows[-1]["share"] == 1.0
            assert rows[-1]["unsafe"] == pair["ends"]["donor"]["unsafe"]


def test_the_engine_gives_the_answers_of_the_reference(document: Any) -> None:
    for pair in document["pairs"].values():
        for each in pair["engine"].values():
            assert each["prompts"] >= 100
            assert each["same tokens"] >= 0.99 * each["prompts"]
            assert each["engine"]["hits"] == each["reference"]["hits"]
