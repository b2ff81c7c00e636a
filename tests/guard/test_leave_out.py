"""Leaving sources out: folds, held-out scores, and what is chosen by them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.leave_out import choose_strength, source_folds, splits
from guard.probe import ProbeError
from tests.guard.test_probe import world


def test_folds_keep_sources_whole_and_hold_both_labels() -> None:
    sources = np.array(["h1"] * 50 + ["h2"] * 30 + ["mixed"] * 40 + ["b1"] * 90 + ["b2"] * 10 + ["b3"] * 5)
    harmful = np.arange(len(sources)) < 100
    folds = source_folds(sources, harmful)
    assert folds is not None
    for name in set(sources):
        assert len(set(folds[sources == name])) == 1
    for fold in set(folds):
        assert set(harmful[folds == fold]) == {True, False}


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.booleans()), min_size=1, max_size=60))
def test_folds_are_whole_sources_with_both_labels_or_nothing(rows: list[tuple[str, bool]]) -> None:
    sources, harmful = np.array([source for source, _ in rows]), np.array([flag for _, flag in rows])
    folds = source_folds(sources, harmful)
    if folds is None:
        return
    assert all(len(set(folds[sources == name])) == 1 for name in set(sources))
    assert len(set(folds)) >= 2
    assert all(set(harmful[folds == fold]) == {True, False} for fold in set(folds))


def test_one_source_of_a_label_cannot_be_left_out() -> None:
    sources = np.array(["h"] * 5 + ["b1"] * 5 + ["b2"] * 5)
    assert source_folds(sources, np.arange(15) < 5) is None


def test_held_out_scores_come_from_probes_that_never_saw_the_source() -> None:
    x, positive, sources = world()
    here = sources == "a"
    # In source "a" the labels are turned round, and feature 0 gives them away. Only a probe that saw "a" can
    # know that: one that did not ranks it the wrong way round.
    turned = positive ^ here
    x[:, 0] = np.where(here, np.where(turned, 5, -5), np.random.default_rng(1).normal(size=len(x)))
    choice = choose_strength(x, turned, sources, turned, strengths=(0.01, 1.0))
    assert choice.by_source
    assert choice.held_out[here & turned].mean() < choice.held_out[here & ~turned].mean()
    rest = ~here
    assert choice.held_out[rest & turned].mean() > choice.held_out[rest & ~turned].mean()


def test_columns_that_are_chosen_are_chosen_without_the_held_out_source() -> None:
    random = np.random.default_rng(0)
    # Labels without any signal, and so many columns that some agree with them by chance.
    x = random.normal(size=(300, 2000)).astype(np.float32)
    positive, sources = random.random(300) < 0.5, random.choice(["a", "b", "c", "d"], 300)

    rows_seen = []

    def select(seen: np.ndarray, target: np.ndarray) -> np.ndarray:
        rows_seen.append(len(seen))
        return np.sort(np.argsort(-np.abs(seen[target].mean(0) - seen[~target].mean(0)))[:20])

    before = x[:, select(x, positive)]
    assert max(choose_strength(before, positive, sources, positive).scores.values()) > 0.6
    rows_seen.clear()
    honest = choose_strength(x, positive, sources, positive, select=select)
    assert max(honest.scores.values()) < 0.56
    assert sum(300 - rows for rows in rows_seen) == 300


def test_random_labels_give_chance() -> None:
    x, _, sources = world(seed=3)
    positive = np.random.default_rng(5).random(len(x)) < 0.5
    choice = choose_strength(x, positive, sources, positive)
    assert max(choice.scores.values()) < 0.62


def test_the_strength_with_the_best_held_out_ranking_is_kept() -> None:
    x, positive, sources = world()
    choice = choose_strength(x, positive, sources, positive, strengths=(1e-5, 1e-2))
    assert choice.scores[choice.strength] == max(choice.scores.values())


def test_positives_of_a_single_source_cannot_be_validated() -> None:
    x, _, sources = world()
    harmful = np.random.default_rng(0).random(len(x)) < 0.5
    with pytest.raises(ProbeError, match="one source"):
        choose_strength(x, harmful & (sources == "a"), sources, harmful)


def test_no_request_is_on_both_sides() -> None:
    folds = np.array([0, 0, 1, 1, 2, 2])
    groups = np.array([7, 1, 7, 2, 2, 3])
    sides = [(inside.tolist(), rest.tolist()) for inside, rest in splits(folds, groups)]
    assert sides[0] == ([True, True, False, False, False, False], [False, False, False, True, True, True])
    assert sides[1] == ([False, False, True, True, False, False], [False, True, False, False, False, True])


def test_a_request_that_another_source_copies_is_not_fitted_on_when_it_is_left_out() -> None:
    random, n = np.random.default_rng(0), 200
    # Noise all of it, but each prompt of "a" stands in "b" too, with the same label.
    x = random.normal(size=(2 * n, 300)).astype(np.float32)
    positive, request = random.random(2 * n) < 0.5, np.arange(2 * n)
    x, positive, request = (np.concatenate([part[:n], part]) for part in (x, positive, request))
    sources = np.repeat(["a", "b", "c"], n)
    leaked, honest = (
        choose_strength(x, positive, sources, positive, strengths=(1.0,), groups=groups).sources["a"].auroc
        for groups in (None, request)
    )
    assert leaked > 0.99
    assert 0.4 < honest < 0.6


def test_rows_of_one_request_fall_into_one_fold() -> None:
    x, positive, _ = world()
    groups = np.arange(len(x)) // 2
    scores: list[int] = []

    def select(seen: np.ndarray, target: np.ndarray) -> np.ndarray:
        scores.append(len(seen))
        return np.arange(seen.shape[1])

    sources = np.full(len(x), "only")
    choice = choose_strength(x, positive, sources, positive, groups=groups, select=select)
    assert not choice.by_source
    assert sum(len(x) - rows for rows in scores) == len(x)


def test_each_source_is_reported_and_the_worst_named() -> None:
    x, positive, sources = world(n=1200)
    # One source whose labels are a coin's: no probe ranks it.
    coin = sources == "d"
    positive = np.where(coin, np.random.default_rng(2).random(len(x)) < 0.5, positive)
    choice = choose_strength(x, positive, sources, positive)
    assert set(choice.sources) == {"a", "b", "c", "d"}
    assert choice.worst == "d"
    assert choice.sources["d"].auroc < 0.65 < 0.9 < choice.sources["a"].auroc
    figures = [left.partial_auroc for left in choice.sources.values()]
    assert choice.mean == pytest.approx(np.mean(figures))
    assert choice.folds == 4
