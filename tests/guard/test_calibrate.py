from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from guard.bundle import Calibration
from guard.calibrate import (
    CalibrationError,
    TooFewBenignError,
    cut,
    fit_isotonic,
    fit_platt,
    prompts_needed,
    rate_interval,
    threshold_at,
)

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


def kinked(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels, and their true probabilities, which no logistic curve of the logits gives."""
    random = np.random.default_rng(seed)
    z = random.normal(size=n)
    truth = np.where(z < 0, 0.3, 0.7) + 0.25 * np.tanh(8 * (z - 0.7)) * (z > 0) - 0.2 * (z < -1)
    return z, random.random(n) < truth, truth


def test_isotonic_calibration_follows_what_platt_cannot() -> None:
    found = {fit.__name__: fit(*kinked(20_000, 0)[:2]) for fit in (fit_isotonic, fit_platt)}
    z, _, truth = kinked(5000, 1)
    # P(unsafe) is said at even odds.
    odds = truth / (1 - truth) * (1 - truth.mean()) / truth.mean()
    truth = odds / (1 + odds)
    error = {
        name: np.abs([each.probability(float(value)) for value in z] - truth).mean()
        for name, each in found.items()
    }
    assert error["fit_isotonic"] < 0.03 < error["fit_platt"]


@given(st.integers(0, 20), st.lists(st.floats(-8, 8), min_size=2, max_size=30))
def test_isotonic_calibration_keeps_the_order_and_can_be_turned_round(seed: int, values: list[float]) -> None:
    z, positive, _ = kinked(1000, seed)
    found = fit_isotonic(z, positive)
    points = sorted(round(value, 3) for value in values)
    for low, high in pairwise(points):
        assert (low < high) == (found.probability(low) < found.probability(high))
    for point in points:
        if 1e-6 < found.probability(point) < 1 - 1e-6:
            assert found.logit(found.probability(point)) == pytest.approx(point, abs=1e-4)


def test_a_threshold_on_isotonic_probabilities_flags_the_same_prompts() -> None:
    z, positive, _ = kinked(3000, 2)
    found = fit_isotonic(z, positive)
    logits = np.random.default_rng(3).normal(size=2000)
    threshold = threshold_at(logits, 0.01, found)
    by_probability = [found.probability(float(value)) >= threshold.probability for value in logits]
    assert by_probability == (logits >= threshold.logit).tolist()
    assert sum(by_probability) == 20


def test_isotonic_calibration_refuses_too_few_prompts_and_turned_scores() -> None:
    z, positive, _ = kinked(999, 0)
    with pytest.raises(CalibrationError, match="at least 1000 prompts, there are 999"):
        fit_isotonic(z, positive)
    z, positive, _ = kinked(2000, 0)
    with pytest.raises(CalibrationError, match="no higher"):
        fit_isotonic(-z, positive)


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "isotonic", "slope": 1.0, "offset": 0.0},
        {"kind": "isotonic", "slope": 1.0, "offset": 0.0, "knots": [[0, 0]]},
        {"kind": "isotonic", "slope": 1.0, "offset": 0.0, "knots": [[0, 0], [1, 0]]},
        {"kind": "isotonic", "slope": 1.0, "offset": 0.0, "knots": [[1, 0], [0, 1]]},
        {"kind": "platt", "slope": 1.0, "offset": 0.0, "knots": [[0, 0], [1, 1]]},
    ],
)
def test_a_calibration_that_does_not_rise_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="knots"):
        Calibration.model_validate(broken)


def test_the_interval_over_sources_is_wider_where_sources_differ() -> None:
    flagged = np.arange(1000) < 10
    alike = rate_interval(flagged, np.array(list("abcdefghij"))[np.arange(1000) % 10])
    apart = rate_interval(flagged, np.array(list("abcdefghij"))[np.arange(1000) // 100])
    exact = [beta.ppf(0.025, 10, 991), beta.ppf(0.975, 11, 990)]
    for found in (alike, apart):
        assert found["exact"] == pytest.approx(exact)
        assert (found["flagged"], found["n"]) == (10, 1000)
    assert alike["over_sources"] == pytest.approx([0.01, 0.01])
    assert apart["over_sources"][0] == 0
    assert apart["over_sources"][1] >= 0.03
    assert rate_interval(flagged, np.full(1000, "one"))["over_sources"] is None


def test_a_threshold_keeps_its_promise_on_fresh_draws() -> None:
    random = np.random.default_rng(0)
    broken = 0
    for _ in range(200):
        threshold = threshold_at(random.normal(size=1000), 0.01, PLAIN)
        broken += 1 - _normal_cdf(threshold.logit) > threshold.upper95
    # Each bound is broken with probability 0.025: 5 of 200 on average, 12 or more once in 200 tries.
    assert broken < 12


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
