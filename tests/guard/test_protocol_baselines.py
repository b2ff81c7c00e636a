"""The baselines of ``neuronguard evaluate``, in a world where the labels are known to be neurons'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from guard.cli import main
from guard.residual import mean_embeddings, read_residual
from tests.engine import world
from tests.guard import worlds

NAMES = [
    "words (n-gram naive Bayes)", "words (TF-IDF, logistic regression)",
    *(f"random units, draw {draw}" for draw in range(1, 6)),
    "residual stream, one layer", "difference of means, one layer", "token embeddings",
    "sentence embeddings", "guard model",
]  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("baselines") / "bundle"
    result = run(
        "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--out", out, "--rate", 0.01, "--units", planted.neurons, "--label", "harmful_prompt", "--no-cache",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


def evaluate(planted: worlds.Planted, bundle: Path, out: Path, *more: object) -> Result:
    return run(
        "evaluate", "--model", planted.model, "--bundle", bundle, "--data", planted.evaluation,
        "--out", out, "--no-answers", "--bootstrap", 100, "--baselines", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(
    planted: worlds.Planted, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("with-baselines") / "r"
    result = evaluate(planted, bundle, out, "--fit-data", planted.fit)
    assert result.exit_code == 0, result.output
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


def test_all_of_the_protocol_have_a_row(fitted: tuple[dict[str, Any], str]) -> None:
    rows = fitted[0]["baselines"]
    assert list(rows) == NAMES
    for name in NAMES[-2:]:
        assert "needs the weights" in rows[name]["not_measured"]
    for name in NAMES[:-2]:
        low, high = rows[name]["auroc_interval"]
        assert low <= rows[name]["auroc"] <= high
        assert rows[name]["fitted_on"] == "the fit prompts"


def test_only_what_reads_the_planted_neurons_knows_the_labels(fitted: tuple[dict[str, Any], str]) -> None:
    document, _ = fitted
    rows, guard = document["baselines"], document["overall"]["auroc"]
    for name in NAMES[:2]:
        # No word of these prompts says anything about their label.
        low, high = rows[name]["auroc_interval"]
        assert low < 0.55
        assert high > 0.45
    assert guard > 0.99
    for name in NAMES[:-2]:
        low, high = rows[name]["auroc_difference_interval"]
        assert low <= rows[name]["auroc_difference"] <= high
        assert rows[name]["auroc_difference"] == pytest.approx(guard - rows[name]["auroc"])
    assert rows["random units, draw 1"]["auroc_difference_interval"][0] > 0
    assert len({rows[f"random units, draw {draw}"]["auroc"] for draw in range(1, 6)}) == 5
    assert rows["residual stream, one layer"]["auroc"] > rows["token embeddings"]["auroc"]


def test_the_page_names_and_draws_them(fitted: tuple[dict[str, Any], str]) -> None:
    _, page = fitted
    for name in NAMES:
        assert name in page
    assert "random units, draw 1: AUROC 0." in page


def test_without_fit_data_they_are_fitted_on_other_sources_of_the_evaluation(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    result = evaluate(planted, bundle, tmp_path / "r", "--markdown", tmp_path / "r.md", "--answers")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["baselines"]
    assert list(rows) == NAMES
    assert rows["token embeddings"]["fitted_on"] == "the evaluation prompts, other sources"
    assert 0.4 < rows["words (n-gram naive Bayes)"]["auroc"] < 0.6
    assert "| residual stream, one layer | 0." in (tmp_path / "r.md").read_text()


def test_one_source_cannot_be_folded_and_the_rows_say_so(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in planted.evaluation.read_text().splitlines()]
    file = worlds.write_rows(tmp_path / "one.jsonl", [{**row, "source": "one"} for row in rows[:60]])
    result = evaluate(planted._replace(evaluation=file), bundle, tmp_path / "r")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r" / "report.json").read_text())["baselines"]
    assert {row["not_measured"] for name, row in found.items() if name not in NAMES[-2:]} == {
        "the evaluation prompts cannot be folded by source"
    }


def test_they_are_fitted_on_what_the_bundle_was_fitted_on_and_nothing_else(
    planted: worlds.Planted, bundle: Path, tmp_path: Path
) -> None:
    other = worlds.write_rows(tmp_path / "other.jsonl", [{"prompt": "x", "label": "harmful"}])
    result = evaluate(planted, bundle, tmp_path / "r", "--fit-data", other)
    assert result.exit_code == 1
    assert "it was not fitted on other.jsonl; it was also fitted on fit.jsonl" in result.output
    assert not (tmp_path / "r").exists()


def test_the_stream_is_read_at_the_last_token_whatever_the_batch() -> None:
    model, prompts = worlds.model(), world.prompts(7, seed=3, longest=40)
    together = read_residual(model, [0, 2, 3], prompts)
    assert together.shape == (7, 3, 32)
    for row, prompt in zip(together, prompts, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = np.stack([states[layer][0, -1].numpy() for layer in (0, 2, 3)])
        np.testing.assert_allclose(row, expected, atol=1e-4)
    embedded = mean_embeddings(model, prompts)
    table = model.get_input_embeddings().weight.detach()
    np.testing.assert_allclose(embedded[2], table[list(prompts[2])].mean(0).numpy(), atol=1e-6)
