"""Evidence that lies anywhere in a text: what sequence probes find and a probe of the last token cannot."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from guard.pooling import Pooling
from guard.probe import ProbeError, fit_probe
from guard.sequence_scores import TokenActivations
from guard.sequence_train import Problem, standard_of, train

FEATURES = 12
KINDS = (
    Pooling(kind="ema", rate=0.25, window=32),
    Pooling(kind="rolling", window=6),
    Pooling(kind="softmax", temperature=1.0),
    Pooling(kind="attention", heads=2),
)


def _hidden(number: int, seed: int) -> tuple[TokenActivations, np.ndarray]:
    """Noise of odd means and scales; in positives a direction shows on six tokens, not at the end."""
    random = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=FEATURES)
    positive = np.arange(number) % 2 == 0
    scale, mean = 10.0 ** np.arange(-3, FEATURES - 3) / 1e3, np.linspace(-3, 3, FEATURES)
    parts, lengths = [], []
    for label in positive:
        length = int(random.integers(20, 70))
        rows = random.normal(size=(length, FEATURES))
        if label:
            start = random.integers(0, length - 12)
            rows[start : start + 6] += 0.8 * direction
        parts.append((rows * scale + mean * scale).astype(np.float32))
        lengths.append(length)
    # Two blocks, as a cache holds them.
    half = number // 2
    return TokenActivations([np.concatenate(parts[:half]), np.concatenate(parts[half:])], lengths), positive


def _every(number: int) -> np.ndarray:
    return np.ones(number, dtype=bool)


@pytest.mark.parametrize("pooling", KINDS, ids=lambda p: p.kind)
def test_a_direction_at_a_random_place_is_found(pooling: Pooling) -> None:
    fit, positive = _hidden(400, seed=1)
    test, truth = _hidden(300, seed=2)
    (probe,) = train(fit, positive, [Problem(_every(400), 1e-2)], pooling, epochs=20)
    logits = [probe.logit(test.prompt(index)) for index in range(len(test))]
    assert roc_auc_score(truth, logits) > 0.95

    last = fit_probe(np.stack([fit.prompt(i)[-1] for i in range(400)]), positive, strength=1e-2)
    blind = last.logits(np.stack([test.prompt(i)[-1] for i in range(300)]))
    assert roc_auc_score(truth, blind) < 0.6


def test_probes_that_are_trained_side_by_side_do_not_know_of_each_other() -> None:
    """Each sees its own prompts alone, so that a source that is left out stays out."""
    fit, positive = _hidden(120, seed=3)
    flipped = positive.copy()
    flipped[60:] = ~flipped[60:]
    first = np.arange(120) < 60
    problems = [Problem(first, 1e-2), Problem(~first, 1e-3)]
    together = train(fit, flipped, problems, KINDS[2], epochs=3)
    alone = [train(fit, flipped, [problem], KINDS[2], epochs=3)[0] for problem in problems]
    other = train(fit, positive, problems, KINDS[2], epochs=3)
    for both, single in zip(together, alone, strict=True):
        assert both.weight == pytest.approx(single.weight, rel=1e-3, abs=1e-6)
    # The labels of the second half say nothing to the first probe.
    assert np.array_equal(together[0].weight, other[0].weight)
    assert not np.allclose(together[1].weight, other[1].weight)


def test_the_same_seed_gives_the_same_probe() -> None:
    fit, positive = _hidden(60, seed=4)
    a, b, c = (
        train(fit, positive, [Problem(_every(60), 1e-2)], KINDS[3], epochs=2, seed=seed)[0]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(a.weight, b.weight)
    assert np.array_equal(a.bias, b.bias)
    assert not np.array_equal(a.weight, c.weight)


def test_a_strong_penalty_makes_small_weights() -> None:
    fit, positive = _hidden(100, seed=5)
    strong, weak = train(fit, positive, [Problem(_every(100), s) for s in (1e-6, 1.0)], KINDS[1], epochs=60)
    scale = standard_of(fit).scale
    assert np.linalg.norm(strong.weight * scale) < 0.1 * np.linalg.norm(weak.weight * scale)


def test_activations_are_standardised_over_all_tokens_of_all_blocks() -> None:
    fit, _ = _hidden(50, seed=6)
    whole = np.concatenate(list(fit.blocks())).astype(np.float64)
    found = standard_of(fit)
    assert found.mean == pytest.approx(whole.mean(axis=0), rel=1e-5)
    assert found.scale == pytest.approx(whole.std(axis=0), rel=1e-4)
    still = TokenActivations([np.full((4, 2), 3.0, np.float32)], [4])
    assert np.isinf(standard_of(still).scale).all()


def test_one_class_is_refused() -> None:
    fit, _ = _hidden(10, seed=7)
    with pytest.raises(ProbeError, match="both classes"):
        train(fit, _every(10), [Problem(_every(10), 1.0)], KINDS[0])
