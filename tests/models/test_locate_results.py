"""What is shipped of the study: figures, the report of them, pictures; no prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.recipe.locate import figures, report
from models.recipe.locate.study import PAIRS

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads((RESULTS / "locate.json").read_text("utf-8"))


def test_the_report_is_that_of_the_figures_beside_it(document: Any) -> None:
    assert report.markdown(document) == (RESULTS / "locate.md").read_text("utf-8")


def test_pictures_are_drawn_from_the_figures_and_the_report_shows_them(document: Any, tmp_path: Path) -> None:
    figures.draw(document, tmp_path)
    text = (RESULTS / "locate.md").read_text("utf-8")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {file.format(pair=pair.name) for pair in PAIRS for file, _ in figures.NAMES.values()}
    assert all(f"(../images/{name})" in text for name in drawn)
    assert all((RESULTS.parent / "images" / name).is_file() for name in drawn)


def test_results_hold_figures_and_no_prompt(document: Any) -> None:
    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                yield from texts(each)

    assert max(map(len, texts(document))) < 100
    assert document["pairs"].keys() == {pair.name for pair in PAIRS}
    assert all(
        c["prompts"] >= 150
        for p in document["pairs"].values()
        for k in p["causal"].values()
        for c in k.values()
    )
