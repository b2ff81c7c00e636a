from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guard.bundle import Bundle
from guard.cli import main
from guard.scorer import Scorer
from tests.guard import worlds


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fitting(planted: worlds.Planted, out: Path, *more: object) -> list[object]:
    return [
        "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--out", out, "--judged-tokens", 4, "--rate", 0.01, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def fitted(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "bundle"
    result = run(*fitting(planted, out, "--eval-data", planted.evaluation, "--max-units", 40))
    assert result.exit_code == 0, result.output
    return out


def test_fit_recovers_the_planted_neurons_on_sources_it_never_saw(fitted: Path) -> None:
    card = Bundle.load(fitted).card
    assert card.metrics["evaluation"]["all_harmful"]["auroc"] > 0.95
    chosen = {(site.layer, unit) for site in card.sites for unit in site.units}
    assert {(0, 3), (0, 17), (1, 8), (1, 40), (2, 5), (2, 21)} <= chosen
    assert len(chosen) <= 40
    assert card.metrics["fit"]["folds"] == "sources"


def test_the_card_shows_the_probe_beside_its_baselines(fitted: Path) -> None:
    comparison = Bundle.load(fitted).card.metrics["comparison"]
    assert set(comparison) == {"probe", "words (TF-IDF)", *(f"random units, draw {i}" for i in (1, 2, 3))}
    drawn = [comparison[f"random units, draw {i}"]["auroc"] for i in (1, 2, 3)]
    assert comparison["probe"]["auroc"] > max(drawn)
    assert len(set(drawn)) == 3
    # No word of these prompts says anything about their label.
    assert 0.4 < comparison["words (TF-IDF)"]["auroc"] < 0.6


def test_the_threshold_holds_on_prompts_it_was_not_set_on(fitted: Path) -> None:
    card = Bundle.load(fitted).card
    flagged = card.metrics["evaluation"]["all_benign"]["flagged"]["0.01"]
    assert flagged["low"] <= card.thresholds[0].upper95


def test_a_bundle_loads_shows_and_verifies(fitted: Path, planted: worlds.Planted) -> None:
    shown = run("bundle", "show", fitted)
    assert "unsafe_output" in shown.output
    assert Bundle.load(fitted).digest in shown.output
    verified = run("bundle", "verify", fitted, "--model", planted.model)
    assert verified.exit_code == 0, verified.output
    assert "belongs to model" in verified.output


def test_the_same_seed_gives_the_same_bundle(planted: worlds.Planted, fitted: Path, tmp_path: Path) -> None:
    again = fitting(planted, tmp_path / "b", "--eval-data", planted.evaluation, "--max-units", 40)
    assert run(*again).exit_code == 0
    assert Bundle.load(tmp_path / "b").digest == Bundle.load(fitted).digest


def test_named_units_are_the_only_ones_read(planted: worlds.Planted, tmp_path: Path) -> None:
    result = run(*fitting(planted, tmp_path / "b", "--units", planted.neurons, "--label", "harmful_prompt"))
    assert result.exit_code == 0, result.output
    card = Bundle.load(tmp_path / "b").card
    assert {str(site.layer): list(site.units) for site in card.sites} == json.loads(
        planted.neurons.read_text()
    )
    assert card.label == "harmful_prompt"
    assert "evaluation" not in card.metrics


def test_evaluate_writes_figures_and_tables_that_agree_with_the_card(
    fitted: Path, planted: worlds.Planted, tmp_path: Path
) -> None:
    result = run(
        "evaluate", "--model", planted.model, "--bundle", fitted, "--eval-data", planted.evaluation,
        "--judged-tokens", 4, "--json", tmp_path / "q.json", "--markdown", tmp_path / "q.md",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "q.json").read_text())
    assert figures["evaluation"] == Bundle.load(fitted).card.metrics["evaluation"]
    assert "random units, draw 1" in (tmp_path / "q.md").read_text()


def test_what_was_fitted_on_cannot_evaluate(fitted: Path, planted: worlds.Planted) -> None:
    result = run("evaluate", "--model", planted.model, "--bundle", fitted, "--eval-data", planted.fit)
    assert result.exit_code == 1
    assert "fit.jsonl was used to fit this bundle" in result.output


def test_another_model_is_refused_with_one_sentence(
    fitted: Path, planted: worlds.Planted, tmp_path: Path
) -> None:
    other = worlds.checkpoint(tmp_path / "other", worlds.model(seed=7))
    for arguments in (
        ["bundle", "verify", fitted, "--model", other],
        ["evaluate", "--bundle", fitted, "--model", other, "--eval-data", planted.evaluation],
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "does not belong to the served model: weights digest" in result.output
        assert "Traceback" not in result.output


def test_self_test_scores_that_do_not_come_out_are_noticed(
    fitted: Path, planted: worlds.Planted, tmp_path: Path
) -> None:
    bundle = Bundle.load(fitted)
    weight = bundle.scorer.weight.copy()
    weight[0, 0] += 1.0
    Bundle(bundle.card, Scorer(weight, bundle.scorer.bias)).save(tmp_path / "b")
    result = run("bundle", "verify", tmp_path / "b", "--model", planted.model)
    assert result.exit_code == 1
    assert "self-test scores in" in result.output


def test_a_dry_run_does_nothing(planted: worlds.Planted, tmp_path: Path) -> None:
    result = run(*fitting(planted, tmp_path / "b", "--dry-run"))
    assert result.exit_code == 0, result.output
    assert "1000 of" not in result.output
    assert "nothing was done" in result.output
    assert not (tmp_path / "b").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--rate", 0.001, "--default-false-positive-rate", 0.001],
            "needs at least 3000 benign threshold prompts",
        ),
        (["--default-false-positive-rate", 0.02], "must be one of the rates"),
        (["--units", "gone.json"], "cannot read the units file gone.json"),
    ],
)
def test_mistakes_end_in_one_sentence_and_no_bundle(
    planted: worlds.Planted, tmp_path: Path, more: list[object], message: str
) -> None:
    result = run(*fitting(planted, tmp_path / "b", "--units", planted.neurons, *more))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "b").exists()


def test_a_directory_that_is_not_a_bundle_is_not_overwritten(planted: worlds.Planted, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    result = run(*fitting(planted, tmp_path / "mine"))
    assert result.exit_code == 2
    assert "is not a bundle" in result.output


def test_threshold_prompts_that_are_all_fitted_on_leave_nothing_to_fit(
    planted: worlds.Planted, tmp_path: Path
) -> None:
    result = run("fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.fit,
                 "--out", tmp_path / "b")  # fmt: skip
    assert result.exit_code == 1
    assert "no fit prompt is left" in result.output
    assert "used in another role" in result.output


def test_help_needs_no_torch() -> None:
    code = "import sys, guard.cli; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command_that_lacks_a_package_of_an_extra_says_which_to_install(tmp_path: Path) -> None:
    call = f"main(['bundle', 'show', {str(tmp_path)!r}])"
    code = f"import sys; sys.modules['numpy'] = None; from guard.cli import main; {call}"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert got.returncode == 1
    assert "needs the package numpy; install neuronguard[fit]" in got.stderr
