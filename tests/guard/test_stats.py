from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from guard.stats import auroc, auroc_interval, clopper_pearson, wilson


def test_known_intervals() -> None:
    rate = wilson(8, 10)
    assert (rate.low, rate.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    exact = clopper_pearson(8, 10)
    assert (exact.low, exact.high) == pytest.approx((0.4439, 0.9748), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_the_exact_interval_ends_where_the_tails_hold_2_5_per_cent(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    rate = clopper_pearson(hits, n)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    if hits < n:
        assert binom.cdf(hits, n, rate.high) == pytest.approx(0.025, abs=1e-6)
    if hits:
        assert binom.sf(hits - 1, n, rate.low) == pytest.approx(0.025, abs=1e-6)


@given(st.integers(1, 500), st.data())
def test_wilson_contains_the_rate(n: int, data: st.DataObject) -> None:
    rate = wilson(data.draw(st.integers(0, n)), n)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high


def test_zero_flags_bound_the_rate_by_about_three_over_n() -> None:
    # The one-sided rule of three is 3/n; the two-sided bound used here is 3.69/n.
    assert clopper_pearson(0, 3000).high == pytest.approx(3.69 / 3000, rel=0.01)


@pytest.mark.parametrize(("hits", "n"), [(-1, 3), (4, 3)])
def test_an_impossible_proportion_is_refused(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(hits, n)
    with pytest.raises(ValueError, match="not a proportion"):
        clopper_pearson(hits, n)


def test_an_empty_group_says_nothing() -> None:
    assert wilson(0, 0)[2:] == (0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_auroc_agrees_with_scikit_learn_and_is_none_for_one_class(rows: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([s for s, _ in rows]), np.array([p for _, p in rows])
    if positive.all() or not positive.any():
        assert auroc(scores, positive) is None
        assert auroc_interval(scores, positive) is None
    else:
        assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_the_bootstrap_interval_surrounds_the_value_and_repeats() -> None:
    random = np.random.default_rng(0)
    positive = np.arange(400) < 200
    scores = random.normal(size=400) + positive
    interval = auroc_interval(scores, positive)
    value = auroc(scores, positive)
    assert interval is not None
    assert value is not None
    assert interval[0] < value < interval[1]
    assert interval[1] - interval[0] < 0.15
    assert interval == auroc_interval(scores, positive)
