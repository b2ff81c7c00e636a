"""Pooling: each kind against its definition, written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from guard.monitor import STOPPED, Stop
from guard.pooling import Pooling, pool, running
from guard.scorer import ScorerError
from guard.sealed import Keyring
from guard.sequence import SequenceScorer

EMA = Pooling(kind="ema", rate=0.25, window=64)
ROLLING = Pooling(kind="rolling", window=8)
SOFTMAX = Pooling(kind="softmax", temperature=0.5, window=16)
HEADS = Pooling(kind="attention", heads=3, window=16)


def outputs(tokens, channels=1, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, channels)).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 200])
def test_ema_is_the_largest_of_the_recursion_once_its_window_is_full(tokens):
    z = outputs(tokens)[:, 0].astype(float)
    average, weight, seen = 0.0, 0.0, []
    for value in z:
        average, weight = 0.75 * average + 0.25 * value, 0.75 * weight + 0.25
        seen.append(average / weight)
    assert pool(EMA, outputs(tokens)) == pytest.approx(max(seen[min(4, tokens) - 1 :]), abs=1e-6)
    np.testing.assert_allclose(running(EMA, outputs(tokens)), seen, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 200])
def test_rolling_is_the_largest_mean_of_a_whole_window(tokens):
    z = outputs(tokens)[:, 0].astype(float)
    means = [z[t - 7 : t + 1].mean() for t in range(7, tokens)] or [z.mean()]
    assert pool(ROLLING, outputs(tokens)) == pytest.approx(max(means), abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 200])
def test_softmax_weighs_each_output_by_itself(tokens):
    z = outputs(tokens)[:, 0].astype(float)
    weights = np.exp(z / 0.5)
    assert pool(SOFTMAX, outputs(tokens)) == pytest.approx((weights * z).sum() / weights.sum(), abs=1e-6)


def test_softmax_goes_from_the_mean_to_the_largest_with_its_temperature():
    z = outputs(100)
    assert pool(Pooling(kind="softmax", temperature=1e6), z) == pytest.approx(float(z.mean()), abs=1e-4)
    assert pool(Pooling(kind="softmax", temperature=1e-3), z) == pytest.approx(float(z.max()), abs=1e-4)


def test_attention_weighs_each_heads_values_by_its_scores_and_sums_the_heads():
    z = outputs(50, 6).astype(float)
    expected = 0.0
    for head in range(3):
        weights = np.exp(z[:, head])
        expected += (weights * z[:, 3 + head]).sum() / weights.sum()
    assert pool(HEADS, outputs(50, 6)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pooling", [EMA, ROLLING, SOFTMAX, HEADS], ids=lambda p: p.kind)
def test_running_sees_the_last_tokens_only(pooling):
    z = outputs(200, pooling.channels)
    whole = running(pooling, z)
    for end in (1, 5, 16, 64, 65, 200):
        begin = max(0, end - pooling.window)
        assert running(pooling, z[begin:end])[-1] == pytest.approx(whole[end - 1], abs=1e-6)


def test_large_outputs_do_not_overflow():
    z = outputs(10, 6) * 1000
    assert math.isfinite(pool(HEADS, z))
    assert math.isfinite(pool(SOFTMAX, z[:, :1]))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"kind": "ema"}, "needs rate"),
        ({"kind": "rolling", "rate": 0.5}, "has no rate"),
        ({"kind": "softmax"}, "needs temperature"),
        ({"kind": "attention", "temperature": 1.0}, "has no temperature"),
        ({"kind": "rolling", "heads": 2}, "has one head"),
        ({"kind": "ema", "rate": 0.01, "window": 64}, "it needs 688"),
        ({"kind": "rolling", "window": 0}, "greater than or equal to 1"),
    ],
)
def test_numbers_that_do_not_fit_the_kind_are_refused(numbers, said):
    with pytest.raises(ValidationError, match=said):
        Pooling.model_validate(numbers)


def test_sequence_scorer_survives_its_arrays():
    scorer = SequenceScorer(HEADS, outputs(6, 10), outputs(6)[:, 0])
    again = SequenceScorer.of_arrays(HEADS, scorer.arrays())
    features = outputs(30, 10, seed=1)
    assert again.logit(features) == scorer.logit(features)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (np.zeros((5, 10), np.float32), np.zeros(6, np.float32)),
        (np.zeros((6, 10), np.float64), np.zeros(6, np.float32)),
        (np.zeros((6, 10), np.float32), np.zeros(5, np.float32)),
        (np.full((6, 10), np.nan, np.float32), np.zeros(6, np.float32)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(weight, bias):
    with pytest.raises(ScorerError):
        SequenceScorer(HEADS, weight, bias)


def test_a_stop_is_believed_from_a_holder_of_the_key_and_for_its_request_only():
    keys = Keyring.generate()
    stop = Stop(nonce="n" * 16, tokens=5, logit=1.5)
    assert Stop.of_reason(stop.reason(keys), keys, nonce="n" * 16) == stop
    assert Stop.of_reason(stop.reason(keys), keys, nonce="m" * 16) is None
    assert Stop.of_reason(stop.reason(Keyring.generate("k1")), keys, nonce="n" * 16) is None
    for forged in (STOPPED, f"{STOPPED}:", f"{STOPPED}:a.b.c", 17, None, "stop"):
        assert Stop.of_reason(forged, keys, nonce="n" * 16) is None
    assert stop.reason(None) == STOPPED
