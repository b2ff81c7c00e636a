"""docs/scaling.md is what the code computes, and the code is what was measured."""

from __future__ import annotations

import json

import pytest

from loadtests import grid, scaling
from loadtests.scale import fit, projection
from loadtests.scale.formulas import Rank

GRID = json.loads((scaling.RESULTS / "grid.json").read_text("utf-8"))["models"]


def test_page_holds_what_the_code_computes() -> None:
    text = scaling.PAGE.read_text("utf-8")
    assert scaling.render(text) == text, "write it anew with: python -m loadtests.scaling"
    assert scaling.BLOCK.findall(text) == ["memory", "wire", "times", "projection"]


@pytest.mark.parametrize("model", list(GRID))
def test_memory_of_the_grid_is_the_formulas(model: str) -> None:
    layers, requests = grid.MODELS[model]["num_hidden_layers"], grid.ENGINE["max_num_seqs"]
    for units, taken in GRID[model]["bytes"].items():
        assert Rank(int(units), layers, requests, element=4, on_host=True).memory == taken


def test_fit_finds_the_terms_that_cells_were_made_of() -> None:
    terms = (100.0, 4.0, 20.0, 1.5)
    made = []
    for model in GRID:
        for units in grid.UNITS:
            for batch in grid.BATCHES:
                cell = fit.Cell(model, units, batch, 0.0, 0.0, 0.0, 0.0)
                value = sum(term * often for term, often in zip(terms, cell.work, strict=True))
                made.append(cell._replace(measured=value, low=value - batch, high=value + batch))
    found = fit.fit(made)
    assert found.coefficients == pytest.approx(terms)
    assert found.fitted == pytest.approx([cell.measured for cell in made])
    assert found.within == len(made)


def test_cells_are_ratios_times_the_plain_seconds_of_their_batch() -> None:
    part = {
        "prefill": {"median": 1.02, "low": 1.01, "high": 1.04, "n": 9},
        "prefill_control": {"median": 0.99, "low": 0.98, "high": 1.0, "n": 9},
    }
    (cell,) = fit.cells({"4 × 128": {"cells": {"100": {"16": part}}}}, {"4 × 128": {"16": 0.05}})
    assert (cell.measured, cell.low, cell.high) == pytest.approx((1000.0, 500.0, 2000.0))
    assert cell.control == pytest.approx(500.0)
    assert cell.work == (1.0, 4.0, 16.0, 1.6)


def test_projected_step_is_slower_with_more_layers_units_and_ending_prompts() -> None:
    served = projection.SERVED[0]

    def seconds(units: int = 1000, places: int = 8, ending: int = 8) -> float:
        return projection.seconds(projection.rank_of(served, units, places), served, ending, 2048)

    assert seconds(units=5000) > seconds()
    assert seconds(places=32) - seconds() == pytest.approx(24 * projection.H100.recorded)
    assert seconds(ending=0) < seconds() < seconds(ending=64)


def test_projected_reduction_is_paid_by_several_gpus_where_a_prompt_ends() -> None:
    one, eight = projection.SERVED[0], projection.SERVED[2]
    rank = projection.rank_of(eight, 1000, 8)
    reduced = projection.seconds(rank, eight, 8, 2048) - projection.seconds(rank, one, 8, 2048)
    assert reduced == pytest.approx(projection.H100.reduction, rel=0.01)
    assert projection.seconds(rank, eight, 0, 64) == projection.seconds(rank, one, 0, 64)
