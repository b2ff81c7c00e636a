from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from guard.probe import (
    ProbeError,
    Standard,
    choose_strength,
    fit_probe,
    select_columns,
    source_folds,
)
from guard.scorer import Scorer


def world(n: int = 600, features: int = 12, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, features)) * np.geomspace(0.01, 100, features) + np.linspace(-50, 50, features)
    z = (x - x.mean(0)) / x.std(0)
    positive = z[:, 2] - z[:, 9] + random.normal(size=n) * 0.3 > 0
    return x.astype(np.float32), positive, random.choice(["a", "b", "c", "d"], n)


def test_folded_weights_give_the_logits_of_the_standardised_model() -> None:
    x, positive, _ = world()
    scaler = StandardScaler()
    reference = LogisticRegression(C=0.01, class_weight="balanced", max_iter=5000)
    expected = reference.fit(scaler.fit_transform(x.astype(np.float64)), positive)
    probe = fit_probe(x, positive, strength=0.01)
    assert probe.weight.dtype == np.float32
    wanted = expected.decision_function(scaler.transform(x.astype(np.float64)))
    np.testing.assert_allclose(probe.logits(x), wanted, atol=5e-3)


def test_folding_is_exact_for_any_weights() -> None:
    x, _, _ = world()
    standard = Standard.of(x)
    weight = np.random.default_rng(1).normal(size=(1, x.shape[1]))
    folded = Scorer(*standard.fold(weight, np.array([0.75])))
    expected = (x.astype(np.float64) - standard.mean) / standard.scale @ weight[0] + 0.75
    np.testing.assert_allclose(folded.logits(x), expected, atol=1e-3)


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    x, positive, _ = world()
    x[:, 4] = 3.25
    probe = fit_probe(x, positive, strength=0.1)
    assert probe.weight[0, 4] == 0
    assert np.isfinite(probe.weight).all()
    assert np.isfinite(probe.bias).all()


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


def test_l1_selection_finds_the_features_that_matter() -> None:
    x, positive, _ = world(n=1500, features=60)
    chosen = select_columns(x, positive, 5)
    assert {2, 9} <= set(chosen.tolist())
    assert len(chosen) == 5
    assert list(chosen) == sorted(chosen)
    assert set(select_columns(x, positive, 2).tolist()) == {2, 9}


def test_a_generous_limit_selects_everything() -> None:
    x, positive, _ = world()
    assert select_columns(x, positive, 12).tolist() == list(range(12))


def test_one_class_cannot_be_fitted() -> None:
    x, positive, _ = world()
    with pytest.raises(ProbeError, match="both classes, but 0 of 600"):
        fit_probe(x, np.zeros_like(positive), strength=1.0)


def test_positives_of_a_single_source_cannot_be_validated() -> None:
    x, _, sources = world()
    harmful = np.random.default_rng(0).random(len(x)) < 0.5
    with pytest.raises(ProbeError, match="one source"):
        choose_strength(x, harmful & (sources == "a"), sources, harmful)


def test_logits_are_float32() -> None:
    probe = Scorer.linear(np.ones(3, dtype=np.float32), 1.0)
    assert probe.logits(np.ones((2, 3), dtype=np.float32)).tolist() == [4.0, 4.0]
    assert probe.logits(np.ones((2, 3), dtype=np.float32)).dtype == np.float32
