"""Sequence probes from the command line: fitted, loaded, measured, and refused where they do not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from guard.bundle import Bundle
from guard.capture import read_batch
from guard.checkpoint import Checkpoint
from guard.cli import main
from tests.guard import worlds


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Buried(NamedTuple):
    """A random model, and prompts that are harmful when a word of strange letters stands early in them."""

    model: Path
    fit: Path
    threshold: Path
    evaluation: Path


@pytest.fixture(scope="module")
def buried(tmp_path_factory: pytest.TempPathFactory) -> Buried:
    root, random = tmp_path_factory.mktemp("buried"), np.random.default_rng(0)

    def rows(number: int, sources: str, harmful: bool) -> list[dict[str, str]]:
        found = []
        for index in range(number):
            words = ["".join(random.choice(list("abcdefghijklmnop"), 4)) for _ in range(5)]
            strange = harmful and index % 2 == 0
            if strange:
                words[random.integers(0, 3)] = "".join(random.choice(list("wxyz"), 5))
            label = "harmful" if strange else "benign"
            found.append({"prompt": " ".join(words), "label": label, "source": sources[index % len(sources)]})
        return found

    # An odd number of sources, so that each holds both labels.
    made = worlds.model(num_hidden_layers=2, max_position_embeddings=512)
    return Buried(
        worlds.checkpoint(root / "model", made),
        worlds.write_rows(root / "fit.jsonl", rows(240, "abc", True)),
        worlds.write_rows(root / "threshold.jsonl", rows(330, "de", False)),
        worlds.write_rows(root / "evaluation.jsonl", rows(120, "fgh", True)),
    )


def fitting(buried: Buried, out: Path, *more: object) -> list[object]:
    return [
        "fit", "--model", buried.model, "--data", buried.fit, "--threshold-data", buried.threshold,
        "--out", out, "--label", "harmful_prompt", "--rate", 0.01, "--units", "all",
        "--judged-tokens", 4, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def fitted(buried: Buried, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fitted") / "bundle"
    options = ("--pooling", "softmax", "--monitor-tokens", 20, "--eval-data", buried.evaluation)
    result = run(*fitting(buried, out, *options))
    assert result.exit_code == 0, result.output
    assert "needs 3000 of them, there are 330" in result.output
    return out


def naive(bundle: Bundle, model: torch.nn.Module, prompt: tuple[int, ...]) -> np.ndarray:
    """Outputs by as many passes as there are tokens, each over what comes before."""
    assert bundle.sequence is not None
    rows = [read_batch(model, bundle.card.sites, [prompt[: end + 1]])[0] for end in range(len(prompt))]
    return bundle.sequence.outputs(torch.stack(rows).numpy())


def test_a_sequence_probe_finds_what_stands_early_in_a_prompt(fitted: Path) -> None:
    card = Bundle.load(fitted).card
    assert (card.probe, card.pooling and card.pooling.kind) == ("sequence", "softmax")
    assert card.created["pooling"] == "softmax"
    compared = card.metrics["comparison"]
    assert set(compared) == {"probe", "last token, same units", "words (TF-IDF)"}
    assert compared["probe"]["auroc"] > 0.85
    assert compared["probe"]["auroc"] == pytest.approx(card.metrics["evaluation"]["all_harmful"]["auroc"])
    assert card.metrics["fit"]["folds"] == "sources"
    flagged = card.metrics["evaluation"]["all_benign"]["flagged"]["0.01"]
    assert flagged["low"] <= card.thresholds[0].upper95


def test_the_self_test_scores_are_those_of_a_naive_reading(fitted: Path, buried: Buried) -> None:
    bundle = Bundle.load(fitted)
    model = Checkpoint.open(buried.model).load_model("float32")
    prompts = bundle.card.self_test.prompts
    recorded = bundle.card.self_test.logits["float32"]
    shortest = min(range(len(prompts)), key=lambda index: len(prompts[index]))
    outputs = naive(bundle, model, prompts[shortest])[:, 0].astype(np.float64)
    weight = np.exp(outputs - outputs.max())
    assert recorded[shortest] == pytest.approx(float(weight @ outputs / weight.sum()), abs=1e-4)
    # One is longer than four chunks of 64 tokens.
    assert max(map(len, prompts)) > 256
    assert len(recorded) == 13


def test_a_sequence_bundle_shows_and_verifies(fitted: Path, buried: Buried) -> None:
    shown = run("bundle", "show", fitted).output
    assert "mean weighted by a softmax of temperature 1.0" in shown
    assert shown.count("% of benign answers: logit") == 3
    assert "limits of its monitor" in (fitted / "CARD.md").read_text()
    for command in (
        ("verify", fitted, "--model", buried.model),
        ("bundle", "verify", fitted, "--model", buried.model),
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
    assert "3 limits on 330 benign answers" in run("verify", fitted).output


def test_evaluate_agrees_with_the_card(fitted: Path, buried: Buried, tmp_path: Path) -> None:
    result = run(
        "evaluate", "--model", buried.model, "--bundle", fitted, "--eval-data", buried.evaluation,
        "--judged-tokens", 4, "--json", tmp_path / "r.json", "--bootstrap", 100,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "r.json").read_text())
    card = Bundle.load(fitted).card
    assert document["evaluation"] == card.metrics["evaluation"]


def test_compare_and_drift_score_by_the_pooled_logit(fitted: Path, buried: Buried, tmp_path: Path) -> None:
    last = tmp_path / "last"
    assert run(*fitting(buried, last, "--pooling", "last")).exit_code == 0
    assert Bundle.load(last).card.probe == "linear"
    result = run(
        "compare", last, fitted, "--model", buried.model, "--data", buried.evaluation,
        "--json", tmp_path / "c.json", "--bootstrap", 100,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "c.json").read_text())["overall"]["auroc"]["b"]
    assert found == pytest.approx(Bundle.load(fitted).card.metrics["comparison"]["probe"]["auroc"])
    drift = run("drift", fitted, "--data", buried.threshold, "--model", buried.model)
    assert drift.exit_code == 0, drift.output


def test_an_adapter_is_listed_with_the_pooled_scores(fitted: Path, buried: Buried, tmp_path: Path) -> None:
    model = Checkpoint.open(buried.model).load_model("float32")
    tuned = worlds.adapter(tmp_path / "tuned", model, size=0.5)
    out = tmp_path / "listed"
    result = run(
        "bundle", "adapter", fitted, "--model", buried.model, "--adapter", f"tuned={tuned}", "--out", out
    )
    assert result.exit_code == 0, result.output
    (listed,) = Bundle.load(out).card.adapters
    assert len(listed.self_test["float32"]) == 13
    assert listed.self_test["float32"] != Bundle.load(fitted).card.self_test.logits["float32"]
    checked = run("bundle", "verify", out, "--model", buried.model, "--adapter", f"tuned={tuned}")
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--pooling", "ema", "--units", "l1"), "units 'l1'"),
        (("--pooling", "ema", "--layers", "choose"), "layers 'choose'"),
        (("--pooling", "ema", "--probe", "mlp"), "probe 'mlp'"),
        (("--pooling", "ema", "--probe", "product", "--label", "unsafe_output"), "probe 'product'"),
        (("--pooling", "ema", "--capture", "engine"), "--capture engine reads the last token only"),
        (("--pooling", "ema", "--heads", 2), "--heads goes with --pooling attention, not ema"),
        (("--pooling", "ema", "--ema-rate", 0.01), "it needs 688"),
        (("--window", 8), "--window goes with --pooling ema, rolling, softmax, attention, not last"),
        (("--monitor-tokens", 8), "only a sequence probe can watch answers"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    buried: Buried, tmp_path: Path, options: tuple[object, ...], text: str
) -> None:
    result = run(*fitting(buried, tmp_path / "b", *options))
    assert result.exit_code != 0
    assert text in " ".join(result.output.split())
    assert not (tmp_path / "b").exists()
