from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from guard.locate import pictures
from guard.locate.compare import compare_all
from guard.locate.report import describe, describe_pairs, document, write_pairs, write_set
from guard.locate.unit_set import UnitSet
from tests.locate import unit_sets

PNG = b"\x89PNG\r\n\x1a\n"


def sets() -> dict[str, UnitSet]:
    return {
        "one": unit_sets.unit_set(),
        "two": unit_sets.unit_set(unit_sets.scores(seed=1), seed=1),
        "heads": unit_sets.unit_set(unit_sets.scores("attention"), method="heads"),
    }


def test_a_report_says_what_was_selected_from_what_and_where() -> None:
    scores = np.zeros((3, 12))
    scores[0] = np.nan
    scores[1, 4], scores[2, 7], scores[2, 8] = 0.25, 0.75, 0.5
    made = unit_sets.unit_set({"mlp": scores}, count=2, donor=unit_sets.model("aligned", "8"))
    text = describe(made)
    assert "# Units located by `contrast`" in text
    assert "Model `toy` (weights `000000000000`), donor `aligned` (weights `888888888888`)." in text
    assert "| mlp | 24 | 2 | 8.33 % | 0.5 |" in text
    assert "| 0 | 0 |\n| 1 | 0 |\n| 2 | 2 |" in text
    assert "| 2 | 0.5 | mlp | 2 | 8 | yes |\n| 3 | 0.25 | mlp | 1 | 4 | no |" in text
    assert "1: 0.75; 2: 0.5; 10: 0." in text
    assert "| fraction | 0.05 |" in text
    assert "| x.jsonl | 3 | 4 | 222222222222 |" in text


def test_a_set_that_selects_nothing_has_a_report(tmp_path: Path) -> None:
    made = unit_sets.unit_set(unit_sets.scores(), unit_sets.chosen("mlp"))
    assert "| mlp | 36 | 0 | 0 % | – |" in describe(made)
    write_set(made, tmp_path / "r")


def test_a_comparison_has_a_row_a_pair() -> None:
    compared = compare_all(sets())
    text = describe_pairs(compared)
    overlap = compared["one", "two"].overlap
    assert overlap is not None
    assert f"| one / two | seed | 6 / 6 | {overlap.shared} |" in text
    assert "| one / heads | method | no component in common | – |" in text
    # Every row of a table has as many cells as its head.
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_figures_for_machines_are_json_without_nan() -> None:
    compared = compare_all({**sets(), "flat": unit_sets.unit_set({"mlp": np.ones((3, 12))})})
    entries = json.loads(json.dumps(document(compared), allow_nan=False))
    by_pair = {tuple(entry["sets"]): entry for entry in entries}
    assert by_pair["one", "two"]["overlap"]["candidates"] == 36
    assert by_pair["one", "heads"]["overlap"] is None
    assert by_pair["one", "flat"]["correlation"]["all"]["spearman"] is None


def test_reports_are_written_with_their_pictures(tmp_path: Path) -> None:
    files = write_set(sets()["one"], tmp_path / "one")
    assert sorted(file.name for file in files) == ["decay.png", "layers.png", "report.md", "scores.png"]
    files += write_pairs(sets(), compare_all(sets()), tmp_path / "pairs")
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes().startswith(PNG)
            assert f"]({file.name})" in (file.parent / "report.md").read_text("utf-8")


def test_the_same_units_give_the_same_picture() -> None:
    def png() -> bytes:
        file = io.BytesIO()
        pictures.heat_map(sets()["one"]).savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    assert png() == png()


def test_one_high_unit_among_many_is_seen_in_a_heat_map() -> None:
    scores = np.full((2, 10_000), 0.25)
    scores[1, 6_789] = 5.0
    scores[0, :20] = np.nan
    shown = pictures.pooled(scores, 500)
    assert shown.shape == (2, 500)
    assert np.argwhere(shown == 5.0).tolist() == [[1, 339]]
    assert np.isnan(shown[0, 0])
    assert not np.isnan(shown[0, 1:]).any()
    np.testing.assert_array_equal(pictures.pooled(scores[:, :7], 500)[1], scores[1, :7])


def test_a_heat_map_of_equal_scores_or_of_no_candidates_is_drawn() -> None:
    for value in (1.0, np.nan):
        scores = {"mlp": np.full((3, 12), value)}
        figure = pictures.heat_map(unit_sets.unit_set(scores, unit_sets.chosen("mlp")))  # type: ignore[arg-type]
        figure.savefig(io.BytesIO(), format="png")


def bars(figure: Figure) -> dict[str, list[float]]:
    axes = figure.axes[0]
    return {
        str(container.get_label()): [bar.get_height() for bar in container]  # type: ignore[attr-defined]
        for container in axes.containers
    }


def test_the_layer_histogram_shows_shares_of_the_selection() -> None:
    made = unit_sets.unit_set(unit_sets.scores(), unit_sets.chosen("mlp", (0, 1), (2, 1), (2, 2), (2, 3)))
    assert bars(pictures.layer_histogram({"one": made})) == {"mlp": [0.25, 0.0, 0.75]}
    assert set(bars(pictures.layer_histogram(sets()))) == {"one, mlp", "two, mlp", "heads, attention"}


def test_the_decay_marks_where_the_selection_ends() -> None:
    made = unit_sets.unit_set()
    line, mark = pictures.score_decay({"one": made}).axes[0].get_lines()
    ranking = [row.score for row in made.ranking()]
    assert list(line.get_ydata()) == ranking  # type: ignore[arg-type]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([6], [ranking[5]])  # type: ignore[arg-type]


def test_the_overlap_matrix_is_symmetric_and_empty_where_nothing_can_be_compared() -> None:
    compared = compare_all(sets())
    overlap = compared["one", "two"].overlap
    assert overlap is not None
    shown = np.ma.filled(
        pictures.overlap_matrix(sets(), compared).axes[0].images[0].get_array(),  # type: ignore[arg-type]
        np.nan,
    )
    expected = [[1, overlap.jaccard, np.nan], [overlap.jaccard, 1, np.nan], [np.nan, np.nan, 1]]
    np.testing.assert_array_equal(shown, expected)


def test_text_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "guard.locate.pictures", raising=False)
    monkeypatch.delattr("guard.locate.pictures", raising=False)
    assert describe(sets()["one"])
    assert describe_pairs(compare_all(sets()))
    with pytest.raises(ModuleNotFoundError) as raised:
        write_set(sets()["one"], tmp_path / "r")
    assert raised.value.name == "matplotlib"
    assert not (tmp_path / "r").exists()
