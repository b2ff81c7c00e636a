from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import save_file

from guard.bundle import AdapterCard, Bundle, BundleError, Calibration, GuardCard
from guard.scorer import Scorer
from tests.guard import worlds

MATCHING = {
    "shape": GuardCard.model_validate(worlds.card()).model.shape,
    "weights_sha256": "0" * 64,
    "tokenizer_sha256": "1" * 64,
}


def test_a_saved_bundle_loads_as_it_was(tmp_path: Path) -> None:
    bundle = worlds.bundle()
    loaded = Bundle.load(bundle.save(tmp_path / "b"))
    assert loaded.card == bundle.card
    assert loaded.scorer.weight.tobytes() == bundle.scorer.weight.tobytes()
    assert loaded.scorer.bias.tobytes() == bundle.scorer.bias.tobytes()
    assert loaded.digest == bundle.digest


def test_a_bundle_can_be_read_by_everybody(tmp_path: Path) -> None:
    saved = worlds.bundle().save(tmp_path / "b")
    assert saved.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o644}


def test_the_digest_covers_card_and_arrays() -> None:
    bundle = worlds.bundle()
    other_weight = Bundle(bundle.card, Scorer(bundle.scorer.weight * 2, bundle.scorer.bias))
    other_bias = Bundle(bundle.card, Scorer.linear(bundle.scorer.weight[0], 0.25))
    other_card = worlds.bundle(label="unsafe_output")
    assert len({b.digest for b in (bundle, other_weight, other_bias, other_card)}) == 4


def test_saving_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    worlds.bundle().save(tmp_path / "b")
    worlds.bundle(label="unsafe_output").save(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").card.label == "unsafe_output"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        worlds.bundle().save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_bundle_and_no_rubbish(tmp_path: Path, monkeypatch: Any) -> None:
    worlds.bundle().save(tmp_path / "b")

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("guard.bundle.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        worlds.bundle(label="unsafe_output").save(tmp_path / "b")
    assert Bundle.load(tmp_path / "b").card.label == "harmful_prompt"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_logits_are_a_dot_product_in_feature_order() -> None:
    bundle = worlds.bundle()
    assert bundle.card.features == 10
    assert bundle.card.columns(bundle.card.sites[1]) == list(range(16, 24))
    x = np.eye(10, dtype=np.float32)
    np.testing.assert_array_equal(bundle.logits(x), bundle.scorer.weight[0] + np.float32(0.5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights_sha256", "9" * 64, "weights digest"),
        ("tokenizer_sha256", "9" * 64, "tokenizer and chat template"),
        ("shape", MATCHING["shape"]._replace(layers=4), "shape"),  # type: ignore[union-attr]
    ],
)
def test_another_model_is_refused_by_what_differs(field: str, value: Any, message: str) -> None:
    worlds.bundle().verify_model(**MATCHING)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=f"'toy' and does not belong to the served model: {message}"):
        worlds.bundle().verify_model(**{**MATCHING, field: value})  # type: ignore[arg-type]


def spoiled(change: str) -> dict[str, Any]:
    card = worlds.card()
    match change:
        case "unknown key":
            card["surprise"] = 1
        case "unknown key inside":
            card["calibration"]["surprise"] = 1
        case "other schema":
            card["schema_version"] = 3
        case "descending units":
            card["sites"][0]["units"] = [5, 1]
        case "repeated units":
            card["sites"][0]["units"] = [1, 1]
        case "no sites":
            card["sites"] = []
        case "layer too high":
            card["sites"][0]["layer"] = 3
        case "neuron too high":
            card["sites"][0]["units"] = [48]
        case "head too high":
            card["sites"][1]["units"] = [4]
        case "site twice":
            card["sites"].append(card["sites"][0])
        case "default without a threshold":
            card["default_false_positive_rate"] = 0.5
        case "no tail":
            card["prompt_tails"] = [[]]
        case "falling calibration":
            card["calibration"]["slope"] = -1.0
        case "self-test of another length":
            card["self_test"]["logits"]["float32"] = [1.0, 2.0]
        case "self-test without tolerance":
            card["self_test"]["tolerance"] = {}
        case "impossible probability":
            card["thresholds"][0]["probability"] = 1.5
        case "adapter twice":
            card["adapters"] = [worlds.ADAPTER, worlds.ADAPTER]
        case "adapter with other prompts":
            card["adapters"] = [worlds.ADAPTER | {"self_test": {"float32": [1.0, 2.0]}}]
        case "adapter without tolerance":
            card["adapters"] = [worlds.ADAPTER | {"tolerance": {}}]
        case "adapter without a name":
            card["adapters"] = [worlds.ADAPTER | {"name": ""}]
        case "adapter without a digest":
            card["adapters"] = [worlds.ADAPTER | {"sha256": "latest"}]
        case "unknown probe":
            card["probe"] = "forest"
        case "not a number":
            card["calibration"]["offset"] = math.nan
    return card


SPOILED = """unknown key, unknown key inside, other schema, descending units, repeated units, no sites,
layer too high, neuron too high, head too high, site twice, default without a threshold, no tail,
falling calibration,
self-test of another length, self-test without tolerance, impossible probability, adapter twice,
adapter with other prompts, adapter without tolerance, adapter without a name, adapter without a digest,
unknown probe, not a number"""


@pytest.mark.parametrize("change", [name.strip() for name in SPOILED.split(",")])
def test_a_card_with_a_fault_does_not_load(tmp_path: Path, change: str) -> None:
    worlds.bundle().save(tmp_path / "b")
    card = spoiled(change)
    assert json.dumps(card) != json.dumps(worlds.card()), "the case changes nothing"
    (tmp_path / "b" / "guard.json").write_text(json.dumps(card))
    with pytest.raises(BundleError, match=r"guard\.json is not a valid card"):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"probe.weight": np.full(10, np.nan, np.float32), "probe.bias": np.zeros(1, np.float32)},
            "not finite",
        ),
        (
            {"probe.weight": np.zeros(10, np.float32), "probe.bias": np.full(1, np.inf, np.float32)},
            "not finite",
        ),
        ({"probe.weight": np.zeros(9, np.float32), "probe.bias": np.zeros(1, np.float32)}, r"float32\[10\]"),
        (
            {"probe.weight": np.zeros((1, 10), np.float32), "probe.bias": np.zeros(1, np.float32)},
            r"\[1, 10\]",
        ),
        ({"probe.weight": np.zeros(10, np.float64), "probe.bias": np.zeros(1, np.float32)}, "float64"),
        ({"probe.weight": np.zeros(10, np.float32)}, "lack probe.bias"),
        ({"probe.weight": np.zeros(10, np.float32), "probe.bias": np.zeros(2, np.float32)}, "probe.bias"),
        ({"probe.weight": np.zeros(10, np.float32), "probe.bias": np.zeros(0, np.float32)}, "probe.bias"),
    ],
)
def test_arrays_with_a_fault_do_not_load(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    worlds.bundle().save(tmp_path / "b")
    save_file(arrays, tmp_path / "b" / "guard.safetensors")
    with pytest.raises(BundleError, match=message):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize("file", ["guard.json", "guard.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_damaged_bundle_does_not_load(tmp_path: Path, file: str, damage: str) -> None:
    path = worlds.bundle().save(tmp_path / "b") / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "b")


def test_the_card_names_its_operating_points() -> None:
    card = worlds.bundle().card
    assert card.threshold(0.01).probability == 0.8
    assert card.default_decision.decide(0.8) == "refuse"
    assert card.default_decision.decide(0.79) == "pass"
    with pytest.raises(ValueError, match=r"rate of 0\.2; there are: 0\.01"):
        card.threshold(0.2)


@given(st.floats(0.01, 20), st.floats(-10, 10), st.floats(-1e4, 1e4))
def test_probability_is_monotonic_never_overflows_and_inverts(
    slope: float, offset: float, logit: float
) -> None:
    calibration = Calibration(slope=slope, offset=offset)
    p = calibration.probability(logit)
    assert 0.0 <= p <= 1.0
    assert calibration.probability(logit + 1.0) >= p
    if 1e-9 < p < 1 - 1e-9:
        assert calibration.logit(p) == pytest.approx(logit, rel=1e-4, abs=1e-4)


def test_the_ends_of_the_probability_scale_are_infinitely_far() -> None:
    calibration = Calibration(slope=1.0, offset=0.0)
    assert calibration.logit(0.0) == -math.inf
    assert calibration.logit(1.0) == math.inf


def test_a_card_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        worlds.bundle().card.label = "unsafe_output"


def test_a_listed_adapter_is_kept_and_is_part_of_the_digest(tmp_path: Path) -> None:
    bundle = worlds.bundle()
    listed = bundle.with_adapter(AdapterCard.model_validate(worlds.ADAPTER))
    loaded = Bundle.load(listed.save(tmp_path / "b"))
    assert loaded.card.adapters == (AdapterCard.model_validate(worlds.ADAPTER),)
    assert loaded.digest == listed.digest != bundle.digest
    changed = worlds.ADAPTER | {"sha256": "4" * 64}
    assert bundle.with_adapter(AdapterCard.model_validate(changed)).digest != listed.digest
    with pytest.raises(BundleError, match="lists an adapter 'tuned' already"):
        listed.with_adapter(AdapterCard.model_validate(changed))


def test_a_bundle_without_adapters_says_nothing_about_them(tmp_path: Path) -> None:
    assert "adapters" not in json.loads((worlds.bundle().save(tmp_path / "b") / "guard.json").read_text())
