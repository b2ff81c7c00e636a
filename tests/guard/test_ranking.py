"""Ranking figures and their intervals, held against scikit-learn and against worlds whose truth is known."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from guard.data import Prompt
from guard.figures import Scored, flag_rates, group, ranking
from guard.ranking import Ranking
from guard.resample import Bootstrap, requests_of
from guard.stats import newcombe
from guard.verdict import Threshold

FEW = Bootstrap(draws=200)


def scored(scores: np.ndarray, positive: np.ndarray, pairs: np.ndarray | None = None) -> Scored:
    n = len(scores)
    return Scored(scores, positive, np.array(["s"] * n), np.arange(n) if pairs is None else pairs)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=60))
def test_weighted_figures_are_those_of_scikit_learn(rows: list[tuple[int, bool, int]]) -> None:
    scores, positive, weight = (np.array(column) for column in zip(*rows, strict=True))
    if not weight[positive].sum() or not weight[~positive].sum():
        return
    curve = Ranking(scores, positive).curve(weight[None].astype(float))
    assert curve.auroc()[0] == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = average_precision_score(positive, scores, sample_weight=weight)
    assert curve.average_precision()[0] == pytest.approx(expected)
    false, true, _ = roc_curve(positive, scores, sample_weight=weight, drop_intermediate=False)
    for rate in (0.0, 0.1, 0.5):
        assert curve.recall(rate)[0] == pytest.approx(true[false <= rate + 1e-9].max())


def test_resamples_keep_each_source_and_class_and_draw_a_request_whole() -> None:
    sources = np.array(["a"] * 10 + ["b"] * 6 + ["c"] * 4)
    positive = np.array([True] * 4 + [False] * 6 + [True, False] * 3 + [True] * 4)
    requests = np.array([*range(10), 20, 20, 21, 21, 22, 22, *range(30, 34)])
    (weights,) = Bootstrap(draws=300, seed=1).weights(sources, positive, requests)
    assert weights.shape == (300, 20)
    assert (weights[:, 16:].sum(axis=1) == 4).all()
    assert (weights[:, :4].sum(axis=1) == 4).all()
    assert (weights[:, 4:10].sum(axis=1) == 6).all()
    # Each twin comes with its other half.
    assert (weights[:, 10:16:2] == weights[:, 11:16:2]).all()
    assert (weights[:, 10:16].sum(axis=1) == 6).all()
    assert (weights.std(axis=0) > 0).all()
    assert weights.mean() == pytest.approx(1)


def test_blocks_of_draws_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.resample._CELLS", 70)
    blocks = list(FEW.weights(np.array(["s"] * 10), np.arange(10) < 5, np.arange(10)))
    assert [len(block) for block in blocks] == [7] * 28 + [4]


def test_rows_of_one_pair_and_source_are_one_request() -> None:
    def prompt(text: str, source: str, pair: str | None) -> Prompt:
        return Prompt((("user", text),), "benign", source, pair=pair)

    rows = [prompt("a", "x", "1"), prompt("b", "x", None), prompt("c", "x", "1"), prompt("d", "y", "1")]
    assert requests_of(rows).tolist() == [0, 1, 0, 2]


def test_random_labels_give_one_half_within_the_interval_as_often_as_it_says() -> None:
    """19 of 20 intervals of scores that say nothing hold 0.5: the known truth, and the promise."""
    random, held = np.random.default_rng(0), 0
    for seed in range(200):
        figures = ranking(
            scored(random.normal(size=150), random.random(150) < 0.4), Bootstrap(draws=200, seed=seed)
        )
        low, high = figures["auroc_interval"]
        held += low <= 0.5 <= high
    assert 180 <= held <= 198


def test_intervals_of_known_worlds_hold_the_truth() -> None:
    """Two normal distributions one apart: AUROC Φ(1/√2), recall at 1 % FPR Φ(1 - 2.326)."""
    random, areas, recalls = np.random.default_rng(1), 0, 0
    for seed in range(100):
        positive = np.arange(700) < 200
        figures = ranking(
            scored(random.normal(size=700) + positive, positive), Bootstrap(draws=200, seed=seed)
        )
        low, high = figures["auroc_interval"]
        areas += low <= 0.7602 <= high
        low, high = figures["tpr_at_fpr_interval"]["0.01"]
        recalls += low <= 0.0924 <= high
    assert areas >= 88
    assert recalls >= 88


def test_interval_of_pairs_is_wider_than_that_of_as_many_strangers() -> None:
    random = np.random.default_rng(0)
    scores = np.repeat(random.normal(size=100) + (np.arange(100) < 50), 5)
    positive = np.repeat(np.arange(100) < 50, 5)
    pairs = np.repeat(np.arange(100), 5)

    def width(requests: np.ndarray | None) -> tuple[float, float]:
        figures = group(scored(scores, positive, requests), THRESHOLDS, FEW)
        (a, b), (c, d) = figures["auroc_interval"], figures["flag_rate_at_interval"]["0.01"]
        return b - a, d - c

    for apart, together in zip(width(None), width(pairs), strict=True):
        assert together > 1.7 * apart


def test_a_ranking_without_an_error_is_not_certain() -> None:
    figures = ranking(scored(np.arange(20.0), np.arange(20) >= 10), FEW)
    assert figures["auroc"] == 1.0
    low, high = figures["auroc_interval"]
    assert 0.7 < low < 0.9
    assert high == 1.0
    assert figures["tpr_at_fpr_interval"]["0.001"][0] < 0.75
    # Everything the wrong way round is as certain as everything right.
    assert newcombe(0.0, 10, 10) == pytest.approx((0.0, 1 - low))


def test_figures_are_null_where_a_class_is_missing() -> None:
    figures = group(scored(np.arange(5.0), np.zeros(5, bool)), THRESHOLDS, FEW)
    assert figures["auroc"] is None
    assert figures["average_precision_interval"] is None
    assert figures["tpr_at_fpr"] == figures["tpr_at_fpr_interval"] == {"0.01": None, "0.001": None}
    assert figures["flag_rate_at"] == {"0.01": 0.4, "0.005": None, "0.001": None}
    assert figures["flag_rate_harmful_at"]["0.01"] is None


THRESHOLDS = (Threshold(false_positive_rate=0.01, probability=0.8, logit=3.0, benign=400, upper95=0.02),)


def test_a_score_at_the_threshold_counts_as_flagged() -> None:
    assert (
        flag_rates(scored(np.array([2.9, 3.0]), np.ones(2, bool)), THRESHOLDS)["flag_rate_at"]["0.01"] == 0.5
    )


def test_the_bound_is_that_of_a_threshold_set_on_these_benign_prompts() -> None:
    """A threshold between order statistics: simulated, its true rate exceeds the bound 1 time in 40."""
    random, exceeded = np.random.default_rng(0), 0
    for _ in range(2000):
        benign = np.sort(random.random(300))
        exceeded += 1 - benign[-4] > 0.0338  # three flagged: a threshold just below the third highest
    bound = ranking(
        scored(np.concatenate([np.arange(300.0), [400.0]]), np.arange(301) == 300), FEW
    )["fpr_upper95"]["0.01"]  # fmt: skip
    assert bound == pytest.approx(0.0289, abs=1e-3)
    assert exceeded / 2000 < 0.025
