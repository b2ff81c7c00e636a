"""Worlds whose answer is known: what the tools say there is what is so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import norm

from guard.calibrate import fit_platt, threshold_at
from guard.card import Calibration
from guard.cli import main
from guard.reliability import at_prior, calibration
from tests.guard import worlds

PLAIN = Calibration(slope=1.0, offset=0.0)


@pytest.mark.parametrize(("rate", "n"), [(0.01, 1500), (0.005, 1500), (0.001, 3500)])
def test_thresholds_hold_on_fresh_draws(rate: float, n: int) -> None:
    """The true rate of a threshold exceeds its bound 1 time in 40; it is its rate on average, or below."""
    random, exceeded, true = np.random.default_rng(0), 0, []
    for _ in range(400):
        threshold = threshold_at(random.normal(size=n), rate, PLAIN)
        true.append(float(norm.sf(threshold.logit)))
        exceeded += true[-1] > threshold.upper95
    assert exceeded <= 20
    assert np.mean(true) < 1.15 * rate + 1 / n
    # A bound that is never approached would promise nothing.
    assert max(true) > 0.7 * threshold.upper95


def test_platt_scaling_of_a_true_score_is_calibrated_on_fresh_draws() -> None:
    """Fitted on 4,000 prompts at one base rate, tested on 500 at another: within the null distribution."""
    random = np.random.default_rng(0)

    def draw(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
        positive = random.random(n) < share
        # Normal evidence of unit variance, means 3 apart: log-odds at even odds are 3 x, here in other units.
        return 7 * (random.normal(size=n) + np.where(positive, 1.5, -1.5)) + 11, positive

    p_values = []
    for seed in range(40):
        fitted = fit_platt(*draw(4000, 0.3))
        logits, positive = draw(500, 0.15)
        odds = fitted.slope * logits + fitted.offset
        found = calibration(at_prior(odds, positive), positive, seed=seed, simulations=200)
        assert found is not None
        p_values.append(found["p_value"])
    assert sum(p < 0.05 for p in p_values) <= 7
    assert np.mean(p_values) > 0.3


@pytest.mark.parametrize("seed", [0, 1])
def test_a_probe_fitted_on_random_labels_is_refused_or_knows_nothing(
    planted: worlds.Planted, tmp_path: Path, seed: int
) -> None:
    random = np.random.default_rng(seed)

    def shuffled(path: Path) -> Path:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        labels = random.permutation([row["label"] for row in rows]).tolist()
        pairs = zip(rows, labels, strict=True)
        return worlds.write_rows(tmp_path / path.name, [{**row, "label": label} for row, label in pairs])

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, [str(each) for each in arguments])
        return result.exit_code, result.output

    code, output = run(
        "fit", "--model", planted.model, "--data", shuffled(planted.fit),
        "--threshold-data", planted.threshold, "--out", tmp_path / "b", "--rate", 0.01,
        "--units", planted.neurons, "--label", "harmful_prompt",
    )  # fmt: skip
    if code:
        assert "scores positives no higher than negatives" in output
        assert not (tmp_path / "b").exists()
        return
    code, output = run(
        "evaluate", "--model", planted.model, "--bundle", tmp_path / "b",
        "--data", shuffled(planted.evaluation), "--out", tmp_path / "r", "--no-answers", "--bootstrap", 200,
    )  # fmt: skip
    assert code == 0, output
    low, high = json.loads((tmp_path / "r" / "report.json").read_text())["overall"]["auroc_interval"]
    assert low < 0.5 < high
