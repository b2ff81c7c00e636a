"""Fitting on activations whose meaning is known, without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from guard.bundle import Calibration, Site
from guard.calibrate import fit_platt
from guard.data import Prompt
from guard.fit_probes import fit_probes
from guard.fit_settings import FitError, FitSettings
from guard.fitting import Fitted, Fitting, Role
from guard.observe import Observations
from guard.sites import ModelShape
from guard.stats import auroc

SHAPE = ModelShape("LlamaForCausalLM", 2, 10, 2, 4)
READ = tuple(Site(layer=layer, kind="mlp", units=tuple(range(10))) for layer in (0, 1))
HARM, COMPLY = 3, 17
"""Columns that say whether a request is harmful, and whether the model will answer a harmful one."""
Rule = Callable[[np.ndarray], np.ndarray]


def role(n: int, seed: int, *, only_benign: bool = False, refuses: Rule = lambda z: z < 0) -> Role:
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 20)).astype(np.float32)
    harmful = x[:, HARM] + 0.5 * random.normal(size=n) > 0.5
    if only_benign:
        x, harmful = x[~harmful], harmful[~harmful]
    refused = harmful & refuses(x[:, COMPLY] + 0.5 * random.normal(size=len(x)))
    prompts = tuple(
        Prompt((("user", f"{seed} {i}"),), "harmful" if flag else "benign", "abcdef"[i % 6])
        for i, flag in enumerate(harmful)
    )
    return Role(Observations(prompts, tuple((i,) for i in range(len(x))), refused, 0), x)


def fit(here: Role, **settings: Any) -> Fitted:
    chosen = FitSettings(units="all", rates=(0.01,), **settings)
    n = len(here.features)
    fitting = Fitting(
        here, here.seen.target(chosen.label), np.arange(n), np.zeros(n, dtype=bool), READ, SHAPE
    )
    return fit_probes(fitting, role(1500, 1, only_benign=True), chosen)


def test_a_product_finds_harm_with_one_probe_and_compliance_with_the_other() -> None:
    here = role(3000, 0)
    fitted = fit(here, probe="product")
    assert fitted.probe.kind == "product"
    size = np.abs(fitted.probe.weight)
    assert size.argmax(axis=1).tolist() == [HARM, COMPLY]
    assert (np.sort(size, axis=1)[:, -1] > 5 * np.sort(size, axis=1)[:, -2]).all()
    stages = fitted.about["stages"]
    assert set(stages) == {"harmful_prompt", "complies"}
    assert stages["complies"]["answered"] + stages["complies"]["refused"] == here.seen.harmful.sum()


def test_a_product_tells_unsafe_outputs_better_than_one_line_does() -> None:
    here, fresh = role(3000, 0), role(6000, 2)
    areas = {
        probe: auroc(fit(here, probe=probe).probe.logits(fresh.features), fresh.seen.unsafe)
        for probe in ("linear", "product")
    }
    assert areas["product"] is not None
    assert areas["linear"] is not None
    assert areas["product"] > areas["linear"] + 0.01


def test_the_probability_of_a_product_is_calibrated_on_fresh_prompts() -> None:
    fitted, fresh = fit(role(6000, 0), probe="product"), role(12_000, 3)
    logits = fitted.probe.logits(fresh.features)
    found = np.array([fitted.calibration.probability(float(z)) for z in logits])
    unsafe = fresh.seen.unsafe
    # Held-out scores of both stages stand for fresh ones: calibrating on these changes little.
    known = fit_platt(logits, unsafe)
    assert fitted.calibration.slope == pytest.approx(known.slope, rel=0.1)
    assert fitted.calibration.offset == pytest.approx(known.offset, abs=0.15)
    # P(unsafe) is said at even odds: weigh the classes alike, then compare bin by bin.
    weight = np.where(unsafe, 0.5 / unsafe.sum(), 0.5 / (~unsafe).sum())
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        here = (found >= low) & (found < low + 0.2)
        share = weight[here & unsafe].sum() / weight[here].sum()
        assert share == pytest.approx((weight * found)[here].sum() / weight[here].sum(), abs=0.1)


@pytest.mark.parametrize("rule", [lambda z: z > 9, lambda z: z > -9], ids=["never", "always"])
def test_a_model_that_never_or_always_refuses_has_no_second_probe(rule: Rule) -> None:
    with pytest.raises(FitError, match=r"needs 50 harmful prompts of each kind.*--probe linear"):
        fit(role(1000, 0, refuses=rule), probe="product")


def test_a_product_is_for_unsafe_outputs_only() -> None:
    with pytest.raises(FitError, match="fit it with the label unsafe_output"):
        FitSettings(probe="product", label="harmful_prompt")


def test_random_labels_are_at_chance_on_left_out_sources_and_cannot_be_calibrated_far() -> None:
    here = role(3000, 0)
    coin = np.random.default_rng(5).random(3000) < 0.5
    prompts = tuple(
        Prompt(p.messages, "harmful" if heads else "benign", p.source)
        for p, heads in zip(here.seen.prompts, coin, strict=True)
    )
    fitting = Role(Observations(prompts, here.seen.tokens, np.zeros(3000, dtype=bool), 0), here.features)
    try:
        fitted = fit(fitting, label="harmful_prompt")
    except ValueError as error:
        assert "there is nothing to calibrate" in str(error)  # noqa: PT017
        return
    assert fitted.about["sources_left_out"]["mean_auroc"] == pytest.approx(0.5, abs=0.04)


def test_one_layer_is_enough_when_the_other_says_nothing() -> None:
    fitted = fit(role(600, 0), label="harmful_prompt", layers="choose")
    table = fitted.about["layers"]
    # Ten columns of noise cost something when prompts are few.
    assert table["layer 1"]["mean_auroc"] < 0.6 < 0.9 < table["layer 0"]["mean_auroc"]
    assert table["chosen"] in ("layer 0", "all, stacked")
    assert (
        max(v["mean_partial_auroc"] for k, v in table.items() if k != "chosen")
        == (table[table["chosen"]]["mean_partial_auroc"])
    )


def test_platt_and_isotonic_place_the_threshold_at_the_same_logit() -> None:
    here = role(2000, 0)
    platt, isotonic = (fit(here, label="harmful_prompt", calibration=kind) for kind in ("platt", "isotonic"))
    assert platt.thresholds[0].logit == isotonic.thresholds[0].logit
    assert platt.thresholds[0].probability != isotonic.thresholds[0].probability
    assert isinstance(isotonic.calibration, Calibration)
