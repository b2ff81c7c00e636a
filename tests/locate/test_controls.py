from __future__ import annotations

import numpy as np
import pytest

from guard.locate.controls import random_like, window
from guard.locate.errors import LocateError
from guard.locate.unit_set import UnitSet
from tests.locate import unit_sets


def both(count: int = 9) -> UnitSet:
    return unit_sets.unit_set(unit_sets.scores("mlp", "attention"), count=count)


def by_layer(found: UnitSet) -> dict[str, list[int]]:
    return {name: chosen.sum(axis=1).tolist() for name, chosen in found.selected.items()}


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_random_control_has_as_many_units_in_each_layer_of_each_component(disjoint: bool) -> None:
    found = both()
    for seed in range(20):
        drawn = random_like(found, seed=seed, disjoint=disjoint)
        assert by_layer(drawn) == by_layer(found)
        if disjoint:
            assert not any((drawn.selected[name] & found.selected[name]).any() for name in found.selected)


def test_a_random_control_is_the_same_for_a_seed_and_another_for_another() -> None:
    first, again, other = (random_like(both(), seed=seed) for seed in (1, 1, 2))
    assert first.units() == again.units()
    assert first.units() != other.units()


def test_a_random_control_draws_every_candidate_alike_and_nothing_else() -> None:
    scores = unit_sets.scores()
    scores["mlp"][:, ::2] = np.nan
    found = unit_sets.unit_set(scores, count=6)
    draws = 600
    hits = sum(random_like(found, seed=seed).selected["mlp"].astype(int) for seed in range(draws))
    assert not hits[:, ::2].any()
    wanted = found.selected["mlp"].sum(axis=1)
    for layer, expected in enumerate(wanted * draws / 6):
        # Five standard deviations of a binomial count.
        share = expected / draws
        np.testing.assert_allclose(
            hits[layer, 1::2], expected, atol=5 * np.sqrt(draws * share * (1 - share)) + 1e-9
        )


def test_a_random_control_ranks_its_own_units_first_in_their_layer() -> None:
    drawn = random_like(both(), seed=3)
    for name, scores in drawn.scores.items():
        for layer, chosen in enumerate(drawn.selected[name]):
            if chosen.any() and not chosen.all():
                assert scores[layer][chosen].min() > scores[layer][~chosen].max()


def test_a_control_says_what_it_is_a_control_of() -> None:
    drawn = random_like(both(), seed=4, disjoint=True).provenance
    assert (drawn.method, drawn.seed, drawn.cost) == ("random", 4, {})
    assert drawn.options == {
        "disjoint": True,
        "of": {"method": "contrast", "options": {"fraction": 0.05}, "seed": 0, "units": 9},
    }
    assert drawn.model == unit_sets.model()
    shifted = window(both(), 2).provenance
    assert shifted.method == "window"
    assert (shifted.options["start"], shifted.options["size"]) == (2, 9)


def test_a_layer_without_enough_other_units_is_an_error() -> None:
    found = unit_sets.unit_set(unit_sets.scores("attention"), count=9)
    with pytest.raises(LocateError, match=r"layer \d has [01] attention units besides the selected ones"):
        random_like(found, seed=0, disjoint=True)


def test_windows_follow_one_another_in_the_ranking() -> None:
    found = both(10)
    ranking = [row[:3] for row in found.ranking()]
    assert len(ranking) == 48
    for start, size in ((0, 10), (10, 10), (38, 10), (3, 1), (0, 48)):
        made = window(found, start, size=size)
        chosen = {
            (name, int(layer), int(unit))
            for name, mask in made.selected.items()
            for layer, unit in np.argwhere(mask)
        }
        assert chosen == set(ranking[start : start + size])
    assert window(found, 0).units() == found.units()


def test_windows_break_ties_as_the_ranking_does() -> None:
    found = unit_sets.unit_set({"mlp": np.ones((3, 12)), "attention": np.ones((3, 4))}, count=10)
    made = window(found, 10, size=3)
    assert made.units() == {"attention": {2: [2, 3]}, "mlp": {0: [0]}}


def test_units_that_are_no_candidates_are_in_no_window() -> None:
    scores = unit_sets.scores()
    scores["mlp"][2] = np.nan
    found = unit_sets.unit_set(scores, count=6)
    assert not window(found, 0, size=24).selected["mlp"][2].any()
    with pytest.raises(LocateError, match="no window of 6 units from rank 19: the ranking has 24 units"):
        window(found, 19)


@pytest.mark.parametrize(("start", "size"), [(-1, 3), (0, 0), (0, 37)])
def test_a_window_outside_the_ranking_is_an_error(start: int, size: int) -> None:
    with pytest.raises(LocateError, match="there is no window"):
        window(unit_sets.unit_set(), start, size=size)
