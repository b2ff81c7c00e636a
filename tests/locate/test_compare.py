from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from guard.locate.compare import compare, compare_all, layer_profile, ranked
from guard.locate.errors import LocateError
from guard.locate.unit_set import UnitSet
from tests.locate import unit_sets


def of(*units: tuple[int, int], seed: int = 0) -> UnitSet:
    return unit_sets.unit_set(unit_sets.scores(seed=seed), unit_sets.chosen("mlp", *units))


def test_shared_units_are_counted_against_chance() -> None:
    first = of((0, 0), (0, 1), (1, 5), (2, 7))
    second = of((0, 1), (1, 5), (1, 6), seed=1)
    found = compare(first, second).overlap
    assert found is not None
    assert (found.candidates, found.first, found.second, found.shared, found.outside) == (36, 4, 3, 2, 0)
    assert found.jaccard == 2 / 5
    assert found.expected == pytest.approx(4 * 3 / 36)
    # Counted: of all ways to draw 3 of 36, those with 2 or 3 of the first set's 4.
    ways = math.comb(4, 2) * 32 + math.comb(4, 3)
    assert found.p_value == pytest.approx(ways / math.comb(36, 3), rel=1e-12)


def test_chance_within_layers_is_that_of_drawing_in_each_layer() -> None:
    first = of((0, 0), (0, 1), (0, 2), (1, 5))
    second = of((0, 1), (0, 2), (1, 5), (1, 6))
    found = compare(first, second).overlap
    assert found is not None
    assert found.expected_same_layers == pytest.approx(3 * 2 / 12 + 1 * 2 / 12)
    # By listing every draw of the second set: two units of layer 0 and two of layer 1.
    pairs = list(combinations(range(12), 2))
    hits = sum(
        sum(unit < 3 for unit in low) + (5 in high) >= found.shared for low, high in product(pairs, pairs)
    )
    assert found.p_value_same_layers == pytest.approx(hits / len(pairs) ** 2, rel=1e-12)
    assert found.p_value_same_layers > found.p_value


def test_two_sets_that_only_prefer_the_same_layer_share_no_more_than_chance_within_it() -> None:
    # Twelve neurons in layer 1: half of them each, three in common, as chance has it.
    first = of(*((1, unit) for unit in range(6)))
    second = of(*((1, unit) for unit in range(3, 9)))
    found = compare(first, second).overlap
    assert found is not None
    assert found.shared == found.expected_same_layers == 3
    assert found.p_value < 0.1
    assert found.p_value_same_layers > 0.5


def test_equal_sets_agree_in_everything_and_differ_in_nothing() -> None:
    # Seven units cannot be spread evenly over three layers.
    found = compare(unit_sets.unit_set(count=7), unit_sets.unit_set(count=7))
    assert found.differ == ()
    assert found.overlap is not None
    assert found.overlap.jaccard == 1.0
    assert found.overlap.p_value == pytest.approx(1 / math.comb(36, 7))
    for support, units in (("union", 7), ("all", 36)):
        correlation = found.correlation[support]  # type: ignore[index]
        assert correlation.units == units
        assert correlation.spearman == pytest.approx(1.0)
        assert correlation.kendall == pytest.approx(1.0)
    assert found.layers == pytest.approx(1.0)


def test_a_p_value_too_small_for_a_float_is_zero_and_not_an_error() -> None:
    scores = {"mlp": np.random.default_rng(0).random((4, 5000))}
    made = unit_sets.unit_set(
        scores,  # type: ignore[arg-type]
        count=2000,
        model=unit_sets.model(layers=4, mlp_width=5000),
    )
    found = compare(made, made).overlap
    assert found is not None
    assert found.p_value == 0.0
    assert found.p_value_same_layers == pytest.approx(0.0, abs=1e-300)


def test_sets_that_share_nothing_are_no_evidence() -> None:
    found = compare(of((0, 0)), of((0, 1))).overlap
    assert found is not None
    assert (found.shared, found.jaccard, found.p_value, found.p_value_same_layers) == (0, 0.0, 1.0, 1.0)


def test_correlations_are_those_of_ranks_over_the_chosen_support() -> None:
    scores = np.arange(36.0).reshape(3, 12)
    other = np.exp(scores / 5)
    # Among the six that either selects, two neighbours change places.
    other[2, [10, 11]] = other[2, [11, 10]]
    first = unit_sets.unit_set({"mlp": scores}, count=4)
    second = unit_sets.unit_set({"mlp": other}, count=6)
    found = compare(first, second).correlation
    assert found["union"].units == 6
    assert found["union"].kendall == pytest.approx(1 - 2 * 1 / 15)
    assert found["union"].spearman == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert found["all"].units == 36
    assert found["all"].kendall == pytest.approx(1 - 2 * 1 / 630)


def test_unrelated_rankings_correlate_negatively_over_what_either_selects() -> None:
    # The reason why that figure is held against a random control: see Comparison.correlation.
    found = [
        compare(
            unit_sets.unit_set(unit_sets.scores(seed=i)), unit_sets.unit_set(unit_sets.scores(seed=i + 50))
        )
        for i in range(50)
    ]
    assert np.mean([each.correlation["union"].spearman for each in found]) < -0.4
    assert abs(np.mean([each.correlation["all"].spearman for each in found])) < 0.1


def test_what_is_no_candidate_in_one_set_is_left_out_and_counted() -> None:
    scores = unit_sets.scores(seed=1)
    scores["mlp"][2] = np.nan
    first = of((0, 0), (2, 3))
    second = unit_sets.unit_set(scores, unit_sets.chosen("mlp", (0, 0)))
    found = compare(first, second)
    assert found.overlap is not None
    assert (found.overlap.candidates, found.overlap.first, found.overlap.outside) == (24, 1, 1)
    assert found.correlation["all"].units == 24


def test_sets_of_different_components_are_compared_by_layer_alone() -> None:
    neurons = unit_sets.unit_set(unit_sets.scores(), unit_sets.chosen("mlp", (0, 1), (2, 1), (2, 2), (2, 3)))
    heads = unit_sets.unit_set(
        unit_sets.scores("attention"),
        unit_sets.chosen("attention", (0, 0), (2, 0), (2, 1), (2, 2)),
        method="heads",
    )
    found = compare(neurons, heads)
    assert (found.components, found.overlap, found.correlation) == ((), None, {})
    assert found.layers == pytest.approx(1.0)
    assert found.differ == ("method",)


def test_only_components_of_both_count() -> None:
    both = unit_sets.unit_set(unit_sets.scores("mlp", "attention"), count=20)
    found = compare(both, unit_sets.unit_set())
    assert found.components == ("mlp",)
    assert found.overlap is not None
    assert found.overlap.outside == both.selected["attention"].sum()


def test_figures_without_a_meaning_are_not_a_number() -> None:
    flat = unit_sets.unit_set({"mlp": np.ones((3, 12))}, unit_sets.chosen("mlp", (0, 1), (1, 1), (2, 1)))
    found = compare(flat, unit_sets.unit_set())
    assert math.isnan(found.correlation["all"].spearman)
    assert math.isnan(found.correlation["union"].kendall)
    assert found.layers is not None
    assert math.isnan(found.layers)
    nothing = of()
    empty = compare(nothing, nothing).overlap
    assert empty is not None
    assert math.isnan(empty.jaccard)


def test_what_differs_between_two_runs_is_named() -> None:
    base = unit_sets.unit_set()
    file = {"name": "y.jsonl", "sha256": "9" * 64, "role": "fit", "harmful": 1, "benign": 1}
    for changes, expected in (
        ({"seed": 1}, ("seed",)),
        ({"data": [file]}, ("data",)),
        ({"model": unit_sets.model(weights="7")}, ("model",)),
        ({"model": unit_sets.model("renamed")}, ()),
        ({"donor": unit_sets.model(weights="7")}, ("donor",)),
        ({"options": {"fraction": 0.1}, "template": "bare"}, ("options", "template")),
        ({"method": "importance"}, ("method",)),
        ({"cost": {}, "versions": {}}, ()),
    ):
        assert compare(base, unit_sets.unit_set(**changes)).differ == expected


def test_models_of_another_size_are_refused_and_named() -> None:
    wide = unit_sets.unit_set({"mlp": np.zeros((3, 20))}, model=unit_sets.model(mlp_width=20))
    with pytest.raises(LocateError, match=r"^a and c: .*mlp is \(3, 12\) in one and \(3, 20\) in the other"):
        compare_all({"a": unit_sets.unit_set(), "b": unit_sets.unit_set(), "c": wide})


def test_every_pair_is_compared_once() -> None:
    sets = {name: unit_sets.unit_set(unit_sets.scores(seed=i)) for i, name in enumerate("abc")}
    assert list(compare_all(sets)) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_profiles_and_ranked_scores_cover_all_components() -> None:
    scores = unit_sets.scores("mlp", "attention")
    scores["mlp"][0] = np.nan
    made = unit_sets.unit_set(scores, count=36)
    assert layer_profile(made).tolist() == [4, 16, 16]
    assert ranked(made).tolist() == [row.score for row in made.ranking()]
