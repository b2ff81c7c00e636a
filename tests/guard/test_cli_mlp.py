from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from guard.bundle import Bundle
from guard.capture import read_batch
from guard.checkpoint import Checkpoint
from guard.scorer import Scorer
from tests.guard import worlds
from tests.guard.test_cli import fitting, run


@pytest.fixture(scope="module")
def exclusive(tmp_path_factory: pytest.TempPathFactory) -> worlds.Planted:
    return worlds.exclusive(tmp_path_factory.mktemp("exclusive"))


def options(exclusive: worlds.Planted, out: Path, *more: object) -> list[object]:
    return fitting(
        exclusive, out, "--units", exclusive.neurons, "--eval-data", exclusive.evaluation,
        "--label", "harmful_prompt", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(exclusive: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "bundle"
    result = run(*options(exclusive, out, "--probe", "mlp", "--hidden", 6))
    assert result.exit_code == 0, result.output
    return out


def test_a_hidden_layer_sees_on_other_sources_what_a_linear_probe_does_not(fitted: Path) -> None:
    comparison = Bundle.load(fitted).card.metrics["comparison"]
    assert comparison["probe"]["auroc"] > 0.95
    assert 0.4 < comparison["linear probe, same units"]["auroc"] < 0.6


def test_a_linear_probe_of_the_same_units_is_at_chance(exclusive: worlds.Planted, tmp_path: Path) -> None:
    assert run(*options(exclusive, tmp_path / "b")).exit_code == 0
    card = Bundle.load(tmp_path / "b").card
    assert card.probe == "linear"
    assert 0.4 < card.metrics["evaluation"]["all_harmful"]["auroc"] < 0.6
    assert not {"probe", "hidden"} & card.created.keys()


def test_the_card_says_which_probe_and_how_large(fitted: Path) -> None:
    bundle = Bundle.load(fitted)
    assert bundle.card.probe == "mlp"
    assert (bundle.scorer.hidden, bundle.scorer.features) == (6, 2)
    assert bundle.card.created["hidden"] == "6"
    assert "probe      mlp, 6 hidden units" in run("bundle", "show", fitted).output


def test_thresholds_and_self_test_are_of_the_networks_logits(fitted: Path, exclusive: worlds.Planted) -> None:
    bundle = Bundle.load(fitted)
    model = Checkpoint.open(exclusive.model).load_model()
    prompts = bundle.card.self_test.prompts
    x = np.concatenate([read_batch(model, bundle.card.sites, [p]).numpy() for p in prompts])
    parts = bundle.scorer.arrays()
    hidden = (x @ parts["probe.hidden.weight"].T + parts["probe.hidden.bias"]).clip(0)
    expected = hidden @ parts["probe.weight"] + parts["probe.bias"]
    np.testing.assert_allclose(bundle.card.self_test.logits["float32"], expected, atol=1e-5)
    flagged = bundle.card.metrics["evaluation"]["all_benign"]["flagged"]["0.01"]
    assert flagged["low"] <= bundle.card.thresholds[0].upper95


def test_the_same_inputs_give_the_same_bytes(fitted: Path, exclusive: worlds.Planted, tmp_path: Path) -> None:
    again = run(*options(exclusive, tmp_path / "b", "--probe", "mlp", "--hidden", 6))
    assert again.exit_code == 0, again.output
    for name in ("guard.json", "guard.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (fitted / name).read_bytes()


def test_a_network_bundle_verifies_and_a_changed_one_does_not(
    fitted: Path, exclusive: worlds.Planted, tmp_path: Path
) -> None:
    verified = run("bundle", "verify", fitted, "--model", exclusive.model)
    assert verified.exit_code == 0, verified.output
    bundle = Bundle.load(fitted)
    old = bundle.scorer
    assert old.readout is not None
    turned = Scorer(old.weight, old.bias, -old.readout, old.readout_bias)
    Bundle(bundle.card, turned).save(tmp_path / "b")
    refused = run("bundle", "verify", tmp_path / "b", "--model", exclusive.model)
    assert refused.exit_code == 1
    assert "self-test scores in" in refused.output


def test_evaluate_agrees_with_the_card(fitted: Path, exclusive: worlds.Planted, tmp_path: Path) -> None:
    result = run(
        "evaluate", "--model", exclusive.model, "--bundle", fitted, "--eval-data", exclusive.evaluation,
        "--judged-tokens", 4, "--json", tmp_path / "q.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "q.json").read_text())
    assert figures["evaluation"] == Bundle.load(fitted).card.metrics["evaluation"]


def test_a_size_without_a_hidden_layer_is_a_mistake(exclusive: worlds.Planted, tmp_path: Path) -> None:
    result = run(*options(exclusive, tmp_path / "b", "--hidden", 6))
    assert result.exit_code == 2
    assert "give it with --probe mlp" in result.output
    result = run(*options(exclusive, tmp_path / "b", "--probe", "mlp", "--hidden", 257))
    assert result.exit_code == 2
    assert "1<=x<=256" in result.output
