from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from guard.probe import ProbeError, Standard, fit_probe
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


def test_one_class_cannot_be_fitted() -> None:
    x, positive, _ = world()
    with pytest.raises(ProbeError, match="both classes, but 0 of 600"):
        fit_probe(x, np.zeros_like(positive), strength=1.0)


def test_logits_are_float32() -> None:
    probe = Scorer.linear(np.ones(3, dtype=np.float32), 1.0)
    assert probe.logits(np.ones((2, 3), dtype=np.float32)).tolist() == [4.0, 4.0]
    assert probe.logits(np.ones((2, 3), dtype=np.float32)).dtype == np.float32
