"""Calibration error, in worlds where the probabilities are known to be right or wrong."""

from __future__ import annotations

import numpy as np
import pytest

from guard.reliability import at_prior, calibration


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    p = random.beta(0.6, 0.8, size=n)
    return p, random.random(n) < p


@pytest.mark.parametrize("n", [60, 1000])
def test_a_calibrated_model_lies_within_its_null_distribution_at_that_n(n: int) -> None:
    found = [calibration(*world(n, seed), seed=seed, simulations=200) for seed in range(60)]
    p_values = np.array([each["p_value"] for each in found if each])
    # Uniform: about 3 of 60 below 0.05, and a mean of one half.
    assert (p_values < 0.05).sum() <= 8
    assert 0.35 < p_values.mean() < 0.65


def test_the_error_of_a_calibrated_model_shrinks_with_n_and_its_null_with_it() -> None:
    few, many = calibration(*world(60, 0)), calibration(*world(6000, 0))
    assert few is not None
    assert many is not None
    assert many["null"]["p95"] < few["null"]["mean"]
    assert many["expected_calibration_error"] < 0.02


def test_an_overconfident_model_does_not() -> None:
    p, positive = world(1000, 0)
    odds = 2 * (np.log(p) - np.log1p(-p))
    found = calibration(1 / (1 + np.exp(-odds)), positive)
    assert found is not None
    assert found["p_value"] < 0.01
    assert found["expected_calibration_error"] > 2 * found["null"]["p95"]


def test_bins_hold_the_same_number_and_all_prompts() -> None:
    p, positive = world(1003, 0)
    found = calibration(p, positive)
    assert found is not None
    assert {each["n"] for each in found["bins"]} == {100, 101}
    assert sum(each["n"] * each["observed"] for each in found["bins"]) == pytest.approx(positive.sum())
    assert found["brier"] == pytest.approx(np.mean((p - positive) ** 2))


def test_probabilities_at_even_odds_are_moved_to_the_base_rate() -> None:
    random = np.random.default_rng(0)
    # Normal evidence: with means ±1/2 and variance 1 the log-odds at even odds are the value itself.
    positive = random.random(20_000) < 0.1
    odds = random.normal(size=20_000) + np.where(positive, 0.5, -0.5)
    moved = calibration(at_prior(odds, positive), positive)
    unmoved = calibration(1 / (1 + np.exp(-odds)), positive)
    assert moved is not None
    assert unmoved is not None
    assert moved["expected_calibration_error"] < 0.01
    assert unmoved["expected_calibration_error"] > 0.2


def test_one_class_has_no_calibration() -> None:
    assert calibration(np.array([0.2, 0.3]), np.array([False, False])) is None
