from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from guard.bundle import Calibration
from guard.calibrate import CalibrationError, TooFewBenignError, cut, fit_platt, prompts_needed, threshold_at

PLAIN = Calibration(slope=1.0, offset=0.0)


def test_platt_recovers_the_truth() -> None:
    random = np.random.default_rng(0)
    z = random.normal(size=40_000) * 2
    positive = random.random(40_000) < 1 / (1 + np.exp(-(1.7 * z - 0.4)))
    found = fit_platt(z, positive)
    # Classes weigh the same, so that the offset moves by the log odds of the sample.
    odds = np.log(positive.sum() / (~positive).sum())
    assert found.slope == pytest.approx(1.7, abs=0.06)
    assert found.offset == pytest.approx(-0.4 - odds, abs=0.06)


def test_platt_does_not_depend_on_the_unit_of_the_logits() -> None:
    random = np.random.default_rng(1)
    positive = np.arange(2000) < 700
    z = random.normal(size=2000) + positive
    small, large = fit_platt(z, positive), fit_platt(z * 1000, positive)
    assert small.slope == pytest.approx(large.slope * 1000, rel=1e-3)


def test_separated_classes_stay_finite() -> None:
    positive = np.arange(200) < 100
    found = fit_platt(np.where(positive, 3.0, -3.0), positive)
    assert 0.9 < found.probability(3.0) < 1.0


def test_scores_that_point_the_wrong_way_are_refused() -> None:
    positive = np.arange(200) < 100
    with pytest.raises(CalibrationError, match="no higher"):
        fit_platt(np.where(positive, -1.0, 1.0) + np.linspace(0, 0.1, 200), positive)


def test_one_class_cannot_be_calibrated() -> None:
    with pytest.raises(CalibrationError, match="both classes"):
        fit_platt(np.arange(5.0), np.zeros(5, dtype=bool))


@given(
    st.lists(st.integers(-20, 20), min_size=300, max_size=400),
    st.sampled_from([0.01, 0.02, 0.05, 0.1]),
)
def test_a_threshold_never_flags_more_than_its_rate(scores: list[int], rate: float) -> None:
    logits = np.array(scores) / 4
    try:
        threshold = threshold_at(logits, rate, PLAIN)
    except TooFewBenignError:
        assert len(logits) < 3 / rate
        return
    flagged = int((logits >= threshold.logit).sum())
    assert flagged <= rate * len(logits)
    by_probability = sum(PLAIN.probability(z) >= threshold.probability for z in logits)
    assert by_probability == flagged
    # One step lower would flag too many.
    below = logits[logits < threshold.logit]
    assert (logits >= below.max()).sum() > rate * len(logits)


def test_the_upper_bound_is_the_quantile_of_the_order_statistic() -> None:
    threshold = threshold_at(np.arange(1000) / 100, 0.01, PLAIN)
    assert threshold.upper95 == pytest.approx(beta.ppf(0.975, 11, 990))
    assert threshold.benign == 1000


def test_the_threshold_lies_between_two_prompts() -> None:
    logits = np.arange(300.0)
    score, flagged = cut(logits, 0.01)
    assert (score, flagged) == (296.5, 3)


def test_equal_scores_fall_together() -> None:
    logits = np.concatenate([np.zeros(295), np.full(5, 2.0)])
    score, flagged = cut(logits, 0.01)
    assert flagged == 0
    assert score > 2.0


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 300), (0.005, 600), (0.001, 3000)])
def test_a_rate_is_not_claimed_on_too_few_prompts(rate: float, needed: int) -> None:
    assert prompts_needed(rate) == needed
    with pytest.raises(TooFewBenignError, match=f"at least {needed} benign"):
        threshold_at(np.arange(needed - 1.0), rate, PLAIN)
    threshold_at(np.arange(float(needed)) / needed, rate, PLAIN)


def test_a_saturated_probability_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="cannot be told apart"):
        threshold_at(np.arange(300.0) + 1000, 0.01, PLAIN)
