"""The population stability index: its formula, its level without drift, where its reference comes from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from guard.bundle import Bundle
from guard.drift import ENOUGH, QUANTILES, DriftError, compare, make_reference, null_level, psi
from guard.reference import ScoreReference
from tests.guard import worlds
from tests.guard.test_cli import fitting, run


def uniform(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=n)


def reference() -> ScoreReference:
    made = make_reference(uniform(3000), uniform(100, seed=1) ** 0.1)
    assert made is not None
    return made


def test_the_index_is_the_formula_by_hand() -> None:
    p, q = (1.5 / 5, 3.5 / 5), (2.5 / 4, 1.5 / 4)
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert psi([1, 3], [2, 1]) == pytest.approx(by_hand)


def test_equal_shares_have_no_drift_and_the_order_of_the_two_does_not_matter() -> None:
    assert psi([10, 20, 30], [10, 20, 30]) == 0.0
    assert psi([5, 9], [9, 1]) == pytest.approx(psi([9, 1], [5, 9]))
    assert math.isfinite(psi([0, 100], [100, 0]))
    with pytest.raises(DriftError, match="2 bins cannot be compared with 3"):
        psi([1, 2], [1, 2, 3])


def test_bins_lie_at_quantiles_of_benign_scores() -> None:
    made = reference()
    assert made.bins == len(QUANTILES) + 1
    shares = np.cumsum(made.benign)[:-1] / 3000
    np.testing.assert_allclose(shares, QUANTILES, atol=0.001)
    assert sum(made.harmful) == 100
    assert np.mean(made.harmful[-3:]) > np.mean(made.harmful[:3])


def test_a_score_falls_where_the_gateway_counts_it() -> None:
    made, scores = reference(), uniform(500, seed=2)
    by_numpy = np.bincount(np.searchsorted(made.edges, scores, side="right"), minlength=made.bins)
    assert made.count(scores.tolist()) == tuple(by_numpy.tolist())
    assert made.bin_of(made.edges[3]) == 4
    assert made.bin_of(0.0) == 0
    assert made.bin_of(1.0) == made.bins - 1


def test_equal_scores_make_fewer_bins_and_all_the_same_none() -> None:
    half = np.concatenate([np.zeros(500), uniform(500)])
    made = make_reference(half, np.array([]))
    assert made is not None
    assert 1 < made.bins < len(QUANTILES) + 1
    assert min(made.benign) > 0
    assert made.harmful == (0,) * made.bins
    assert make_reference(np.full(100, 0.5), np.array([0.5])) is None


@pytest.mark.parametrize("n", [ENOUGH, 5000])
def test_without_drift_the_index_keeps_to_its_level(n: int) -> None:
    """The reference and the sample are both drawn, thousands of times."""
    random, shares, m = np.random.default_rng(3), np.diff([0.0, *QUANTILES, 1.0]), 3000
    found = np.array([psi(random.multinomial(n, shares), random.multinomial(m, shares)) for _ in range(4000)])
    for confidence in (0.95, 0.999):
        above = (found > null_level(len(shares), n, m, confidence)).mean()
        assert above == pytest.approx(1 - confidence, abs=3 * math.sqrt((1 - confidence) / 4000) + 0.002)
    assert null_level(12, ENOUGH, 3000, 0.999) < 0.08  # far below the alert at 0.2


def test_what_is_said_of_samples() -> None:
    made = reference()
    assert compare(uniform(2000, seed=4), made).verdict == "no drift"
    assert compare(uniform(2000, seed=4) ** 0.8, made).verdict == "moved"
    assert compare(uniform(2000, seed=4) ** 0.4, made).verdict == "drift"
    assert compare(uniform(ENOUGH - 1, seed=4) ** 0.4, made).verdict == "too few scores"
    with pytest.raises(DriftError, match="no score to compare"):
        compare([], made)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edges": (0.5, 0.5), "benign": (1, 1, 1), "harmful": (0, 0, 0)}, "must rise"),
        ({"edges": (0.0,)}, "greater than 0"),
        ({"edges": (1.0,)}, "less than 1"),
        ({"benign": (1, 2, 3)}, "1 edges make 2 bins, benign has 3"),
        ({"benign": (0, 0)}, "one benign prompt at least"),
        ({"harmful": (-1, 0)}, "greater than or equal to 0"),
        ({"edges": tuple(np.linspace(0.01, 0.99, 32).tolist())}, "at most 31"),
    ],
)
def test_a_reference_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ScoreReference(**{"edges": (0.5,), "benign": (1, 1), "harmful": (0, 0), **changes})


@pytest.fixture(scope="module")
def fitted(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURONGUARD_CACHE", str(folder / "cache"))
        result = run(*fitting(planted, folder / "b", "--units", planted.neurons, "--label", "harmful_prompt"))
    assert result.exit_code == 0, result.output
    return folder / "b"


def test_fit_keeps_the_scores_that_thresholds_were_set_on(fitted: Path) -> None:
    card = Bundle.load(fitted).card
    made = card.reference
    assert made is not None
    assert sum(made.benign) == card.thresholds[0].benign
    assert sum(made.harmful) == sum(file.harmful for file in card.data if file.role == "fit")
    # Held out, and still well above the benign ones.
    assert sum(made.harmful[-3:]) > 0.8 * sum(made.harmful)
    assert run("verify", fitted).exit_code == 0


def audit(path: Path, scores: np.ndarray, digest: str | None) -> Path:
    """Lines as the gateway's audit log has them."""
    rows = [{"event": "answer", "probability": p, "bundle": digest} for p in scores.tolist()]
    return worlds.write_rows(
        path, [*rows, {"event": "end", "status": 200}, {"event": "end", "probability": None}]
    )


def test_scores_of_an_audit_log_are_compared_offline(fitted: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(fitted)
    made = bundle.card.reference
    assert made is not None
    # Twice as many scores in each bin as the reference has: nothing has moved.
    twice = [2 * count for count in made.benign]
    same = np.repeat([0.0, *made.edges], twice)
    result = run("drift", fitted, "--data", audit(tmp_path / "same.jsonl", same, bundle.digest), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["psi"] == pytest.approx(0.0, abs=1e-4)
    assert document["verdict"] == "no drift"
    assert (document["counts"], document["reference"]) == (twice, list(made.benign))
    assert document["left_out"] == {"without a score": 2, "of another bundle": 0}
    high = np.full(600, (made.edges[-1] + 1) / 2)
    moved = run("drift", fitted, "--data", audit(tmp_path / "high.jsonl", high, bundle.digest))
    assert "drift" in moved.output
    assert f"PSI {compare(high, made).psi:.3f}" in moved.output
    failing = run("drift", fitted, "--data", tmp_path / "high.jsonl", "--fail-above", 0.2)
    assert failing.exit_code == 1


def test_scores_of_another_bundle_are_left_out(fitted: Path, tmp_path: Path) -> None:
    file = audit(tmp_path / "a.jsonl", np.full(10, 0.5), "f" * 64)
    result = run("drift", fitted, "--data", file)
    assert result.exit_code == 1
    assert "no score to compare" in result.output
    assert "10 of another bundle" in result.output


def test_prompts_are_scored_by_the_model_that_the_bundle_belongs_to(
    fitted: Path, planted: worlds.Planted
) -> None:
    result = run("drift", fitted, "--data", planted.threshold, "--model", planted.model, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    # The very prompts that the reference was made of.
    assert document["counts"] == document["reference"]
    assert document["psi"] == 0.0


def test_a_bundle_without_reference_cannot_tell(tmp_path: Path) -> None:
    directory = worlds.bundle().save(tmp_path / "b")
    result = run("drift", directory, "--data", audit(tmp_path / "a.jsonl", np.full(10, 0.5), None))
    assert result.exit_code == 1
    assert "keeps no reference scores; fit it anew" in result.output


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not JSON"),
        ('{"probability": 1.5}', "must be from 0 to 1"),
        ('{"probability": "x"}', "must be from 0 to 1"),
    ],
)
def test_rows_that_are_no_scores_are_named_by_line(
    fitted: Path, tmp_path: Path, row: str, words: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"probability": 0.5}}\n{row}\n')
    result = run("drift", fitted, "--data", file)
    assert result.exit_code == 1
    assert f"a.jsonl, line 2: {words}" in result.output or "line 2" in result.output
    assert words in result.output
