"""Paired tests, held against worlds without a difference, and ``neuronguard compare``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from guard.bundle import Bundle
from guard.cli import main
from guard.comparison import markdown
from guard.figures import Scored
from guard.paired import delong, differences, holm, mcnemar
from guard.resample import Bootstrap
from guard.stats import auroc
from tests.guard import worlds


def test_delong_difference_and_error_are_those_of_the_definition() -> None:
    """Against the placements written out, pair by pair."""
    random = np.random.default_rng(0)
    positive = np.arange(40) < 15
    first = np.round(random.normal(size=40) + positive, 1)
    second = np.round(random.normal(size=40) + 0.5 * positive, 1)
    found = delong(first, second, positive)
    assert found is not None
    psi = [np.sign(s[positive][:, None] - s[~positive][None]) / 2 + 0.5 for s in (first, second)]
    a, b = (float(auroc(s, positive) or 0) for s in (first, second))
    assert found.value == pytest.approx(b - a)
    above = np.cov([p.mean(axis=1) for p in psi]) / 15
    below = np.cov([p.mean(axis=0) for p in psi]) / 25
    contrast = np.array([-1, 1])
    error = np.sqrt(contrast @ (above + below) @ contrast)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * error)


def test_two_scorers_without_a_difference_are_told_apart_as_often_as_chance_allows() -> None:
    random, small = np.random.default_rng(0), 0
    for _ in range(300):
        positive = np.arange(300) < 120
        shared = random.normal(size=300) + positive
        found = delong(shared + random.normal(size=300), shared + random.normal(size=300), positive)
        assert found is not None
        small += found.p_value < 0.05
    assert 5 <= small <= 27


def test_pairing_finds_what_two_separate_intervals_hide() -> None:
    random = np.random.default_rng(0)
    positive = np.arange(600) < 300
    shared = random.normal(size=600) + 0.8 * positive
    better = shared + 0.15 * positive
    scored = Scored(shared, positive, np.array(["s"] * 600), np.arange(600))
    found = differences(scored, better, Bootstrap(draws=300))
    assert found is not None
    entry = found["auroc"]
    assert entry["difference_interval"][0] > 0
    assert entry["delong_p_value"] < 0.001
    assert entry["delong_interval"] == pytest.approx(entry["difference_interval"], abs=0.01)
    assert entry["b"] - entry["a"] == pytest.approx(entry["difference"])


def test_mcnemar_counts_what_only_one_flags() -> None:
    first = np.array([True] * 10 + [False] * 30)
    second = np.array([True] * 2 + [False] * 8 + [True] + [False] * 29)
    found = mcnemar(first, second)
    assert (found["only_a"], found["only_b"], found["n"]) == (8, 1, 40)
    assert found["p_value"] == pytest.approx(2 * 10 / 512)
    assert mcnemar(first, first)["p_value"] == 1.0


def test_holm_adjusts_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundles(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One on two of the six neurons, one on all of them."""
    root = tmp_path_factory.mktemp("pair")
    (root / "few.json").write_text('{"0": [3], "1": [8]}')
    for name, units in (("few", root / "few.json"), ("all", planted.neurons)):
        result = run(
            "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
            "--out", root / name, "--rate", 0.01, "--units", units, "--label", "harmful_prompt",
            "--no-cache",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    return root / "few", root / "all"


def comparing(planted: worlds.Planted, a: Path, b: Path, *more: object) -> Result:
    return run("compare", a, b, "--model", planted.model, "--data", planted.evaluation, "--bootstrap", 200,
               "--judged-tokens", 4, *more)  # fmt: skip


def test_the_better_bundle_is_found_better_either_way_round(
    planted: worlds.Planted, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    documents = []
    for a, b in (bundles, bundles[::-1]):
        result = comparing(planted, a, b, "--json", tmp_path / "c.json")
        assert result.exit_code == 0, result.output
        documents.append(json.loads((tmp_path / "c.json").read_text()))
        assert markdown(documents[-1]) in result.output
    there, back = documents
    low, high = there["overall"]["auroc"]["difference_interval"]
    assert 0.05 < low < there["overall"]["auroc"]["difference"] < high
    assert there["overall"]["auroc"]["delong_p_value"] < 1e-6
    assert back["overall"]["auroc"]["difference"] == -there["overall"]["auroc"]["difference"]
    flags = there["flags"]["0.01"]["positive"]
    assert flags["only_b"] > flags["only_a"]
    assert flags["p_value"] <= flags["p_value_holm"] < 1e-6
    assert (there["a"]["digest"], there["b"]["digest"]) == tuple(Bundle.load(p).digest for p in bundles)
    assert set(there["by_source"]) == {"f", "g"}


def test_a_bundle_does_not_differ_from_itself(
    planted: worlds.Planted, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    result = comparing(
        planted, bundles[0], bundles[0], "--json", tmp_path / "c.json", "--question", "unsafe_output"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["question"] == "unsafe_output"
    assert found["overall"]["auroc"]["difference_interval"] == [0, 0]
    assert found["overall"]["auroc"]["delong_p_value"] == 1
    assert found["flags"]["0.01"]["negative"]["p_value"] == 1


def test_what_either_was_fitted_on_compares_nothing(
    planted: worlds.Planted, bundles: tuple[Path, Path]
) -> None:
    result = comparing(planted, *bundles, "--data", planted.threshold)
    assert result.exit_code == 1
    assert "threshold.jsonl was used to set the thresholds of this bundle" in result.output


def test_bundles_of_two_models_are_compared_each_on_its_own(
    planted: worlds.Planted, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    other = worlds.checkpoint(tmp_path / "other", worlds.model(seed=5))
    result = comparing(planted, *bundles, "--model", other)
    assert result.exit_code == 1
    assert "does not belong to the served model: weights digest" in result.output
    fitted = run(
        "fit", "--model", other, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--out", tmp_path / "b", "--rate", 0.01, "--units", "all", "--label", "harmful_prompt",
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    compared = comparing(planted, bundles[1], tmp_path / "b", "--model", other, "--json", tmp_path / "c.json")
    assert compared.exit_code == 0, compared.output
    assert json.loads((tmp_path / "c.json").read_text())["overall"]["auroc"]["difference"] < 0
    refused = comparing(planted, bundles[1], tmp_path / "b", "--model", other, "--question", "unsafe_output")
    assert refused.exit_code == 1
    assert "compare them on harmful_prompt" in refused.output
