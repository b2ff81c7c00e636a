"""The recording rules of drift compute what ``guard.drift`` does, and the alert's limits are its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from guard.drift import ALERT, ENOUGH, QUANTILES, psi
from tests.deploy.alerting import ALERTS, PROMETHEUS, succeeds, tool

BINS = len(QUANTILES) + 1
STEPS = 288
"""Samples a day, five minutes apart."""


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


@pytest.mark.parametrize("seed", range(3))
def test_prometheus_and_numpy_agree_on_the_index(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    rates = random.integers(0, 9, size=(2, BINS))  # a step, of two gateways
    rates[:, 3] = 0  # an empty bin
    reference = random.integers(1, 400, size=BINS)
    given = []
    for i in range(BINS):
        labels = {"model": "m", "digest": "d", "bin": f"{i:02}"}
        for instance, rate in zip("ab", rates[:, i], strict=True):
            given.append(series("guard_score_bin_total", f"0+{rate}x400", instance=instance, **labels))
            kinds = {"benign": int(reference[i]), "harmful": 5}
            for kind, count in kinds.items():
                labelled = {"instance": instance, **labels, "class": kind}
                given.append(series("guard_score_reference", f"{count}x400", **labelled))
    counts = (rates.sum(0) * STEPS).tolist()
    expected = psi(counts, reference.tolist())
    by_chance = (BINS - 1) * (1 / sum(counts) + 1 / reference.sum())
    checks = {"psi1d": expected, "psi_by_chance1d": float(by_chance)}
    document: dict[str, Any] = {
        "rule_files": [str(PROMETHEUS / "rules" / "recording.yml")],
        "evaluation_interval": "5m",
        "tests": [
            {
                "interval": "5m",
                "input_series": given,
                "promql_expr_test": [
                    {
                        "expr": f"abs(model_digest:guard_score_bin:{name} - {value!r}) < bool 1e-9",
                        "eval_time": "30h",
                        "exp_samples": [{"labels": '{model="m",digest="d"}', "value": 1}],
                    }
                    for name, value in checks.items()
                ],
            }
        ],
    }
    file = tmp_path / "drift.yml"
    file.write_text(yaml.safe_dump(document))
    succeeds(tool("promtool", "prometheus"), "test", "rules", file)


def test_the_alert_has_the_limits_of_the_command() -> None:
    (alert,) = (rule for rule in ALERTS if rule["alert"] == "GuardScoreDrift")
    assert f"psi1d > {ALERT:g}\n" in alert["expr"] or f"psi1d > {ALERT:g} " in alert["expr"]
    assert f"increase1d >= {ENOUGH}" in alert["expr"]
