from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from guard import mlp_probe
from guard.leave_out import choose_strength
from guard.mlp_probe import HiddenLayer
from guard.probe import LINEAR, ProbeError, fit_probe


def exclusive_or(n: int = 1500, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positive when exactly one of units 2 and 5 is above its mean: no weighted sum can tell."""
    random = np.random.default_rng(seed)
    z = random.normal(size=(n, 8))
    x = z * np.geomspace(0.1, 10, 8) + np.linspace(-3, 3, 8)
    return x.astype(np.float32), (z[:, 2] > 0) != (z[:, 5] > 0), random.choice(["a", "b", "c", "d"], n)


def test_a_hidden_layer_tells_what_no_weighted_sum_can() -> None:
    x, positive, sources = exclusive_or()
    linear = choose_strength(x, positive, sources, positive)
    hidden = choose_strength(x, positive, sources, positive, family=HiddenLayer(8))
    assert 0.4 < roc_auc_score(positive, linear.held_out) < 0.6
    assert roc_auc_score(positive, hidden.held_out) > 0.97
    assert hidden.by_source


def test_the_chosen_network_holds_on_new_prompts() -> None:
    x, positive, sources = exclusive_or()
    family = HiddenLayer(8)
    strength = choose_strength(x, positive, sources, positive, family=family).strength
    assert strength in family.strengths
    fresh, truth, _ = exclusive_or(seed=1)
    probe = fit_probe(x, positive, strength=strength, family=family)
    assert (probe.kind, probe.hidden, probe.features) == ("mlp", 8, 8)
    assert roc_auc_score(truth, probe.logits(fresh)) > 0.97


def test_folded_weights_give_the_logits_of_the_network_on_standardised_features(monkeypatch: Any) -> None:
    x, positive, _ = exclusive_or()
    kept: list[MLPClassifier] = []
    folded = mlp_probe._folded

    def keep(network: MLPClassifier, standard: Any) -> Any:
        kept.append(network)
        return folded(network, standard)

    monkeypatch.setattr(mlp_probe, "_folded", keep)
    probe = fit_probe(x, positive, strength=0.1, family=HiddenLayer(8))
    standardised = StandardScaler().fit_transform(x.astype(np.float64))
    # The network's own forward pass: its last activation is P, whose log-odds are the logit.
    p = kept[0].predict_proba(standardised)[:, 1]
    near = (p > 1e-3) & (p < 1 - 1e-3)
    assert near.sum() > 500
    np.testing.assert_allclose(probe.logits(x)[near], np.log(p / (1 - p))[near], atol=1e-5, rtol=1e-5)


def test_both_classes_weigh_the_same_however_rare_one_is() -> None:
    x, positive, _ = exclusive_or(4000)
    keep = ~positive | (np.random.default_rng(0).random(len(x)) < 0.05)
    probe = fit_probe(x[keep], positive[keep], strength=0.1, family=HiddenLayer(8))
    fresh, truth, _ = exclusive_or(seed=1)
    flagged = probe.logits(fresh) > 0
    # Weighted as they come, one in twenty, hardly any positive would be flagged.
    assert flagged[truth].mean() > 0.8
    assert flagged[~truth].mean() < 0.2


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    x, positive, _ = exclusive_or()
    x[:, 4] = 3.25
    probe = fit_probe(x, positive, strength=0.1, family=HiddenLayer(4))
    assert (probe.weight[:, 4] == 0).all()


def test_a_seed_gives_one_network() -> None:
    x, positive, _ = exclusive_or(300)
    one, same, other = (
        b"".join(a.tobytes() for a in fit_probe(x, positive, strength=0.1, family=family).arrays().values())
        for family in (HiddenLayer(4, 7), HiddenLayer(4, 7), HiddenLayer(4, 8))
    )
    assert one == same != other


def test_the_penalty_is_the_linear_probes() -> None:
    # A weak penalty on data that a weighted sum can tell: the smaller the strength, the smaller the scores.
    x, _, _ = exclusive_or()
    positive = x[:, 2] > x[:, 2].mean()
    sizes = [np.abs(p.logits(x)).mean() for p in HiddenLayer(4).path(x, positive, (1e-3, 1e-2, 1e-1, 1.0))]
    assert sizes == sorted(sizes)
    linear = [np.abs(p.logits(x)).mean() for p in LINEAR.path(x, positive, (1e-3, 1e-2, 1e-1, 1.0))]
    assert sizes[-1] < 3 * linear[-1]


def test_one_class_cannot_be_fitted() -> None:
    x, positive, _ = exclusive_or(100)
    with pytest.raises(ProbeError, match="both classes, but 0 of 100"):
        fit_probe(x, np.zeros_like(positive), strength=1.0, family=HiddenLayer(4))
