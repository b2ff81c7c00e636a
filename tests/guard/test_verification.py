"""``neuronguard verify``: what can be wrong with a bundle, each by the check that notices it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from guard.bundle import Bundle
from guard.card import Calibration, GuardCard
from guard.scorer import Scorer
from guard.signature import load_key, make_key, sign
from guard.stats import clopper_pearson
from tests.guard import worlds
from tests.guard.test_cli import run

NAMES = [
    "files",
    "contents",
    "digest",
    "thresholds",
    "monitor",
    "data",
    "units",
    "self-test",
    "reference",
    "card",
    "model",
    "signature",
]


def threshold(rate: float, logit: float, benign: int) -> dict[str, Any]:
    return {
        "false_positive_rate": rate,
        "probability": Calibration(slope=2.0, offset=-1.0).probability(logit),
        "logit": logit,
        "benign": benign,
        "upper95": clopper_pearson(int(rate * benign), benign).high,
    }


def sound(**changes: Any) -> GuardCard:
    """A card with which nothing is wrong."""
    benign = 3000
    document = {
        "thresholds": [threshold(0.01, 1.2, benign), threshold(0.001, 2.0, benign)],
        "data": [
            {"name": "fit.jsonl", "sha256": "2" * 64, "role": "fit", "harmful": 3, "benign": 4},
            {"name": "calm.jsonl", "sha256": "3" * 64, "role": "threshold", "harmful": 0, "benign": benign},
            {"name": "test.jsonl", "sha256": "4" * 64, "role": "evaluate", "harmful": 5, "benign": 5},
        ],
        "self_test": {
            "prompts": [[1, 70, 0, 2], [1, 71, 0, 2]],
            "logits": {"float32": [0.25, 1.5]},
            "tolerance": {"float32": 0.001},
        },
        "reference": {"edges": [0.1, 0.5, 0.9], "benign": [1500, 1000, 490, 10], "harmful": [0, 1, 1, 1]},
    }
    return GuardCard.model_validate(worlds.card(**{**document, **changes}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    card = sound()
    scorer = Scorer.linear(np.linspace(-1, 1, card.features, dtype=np.float32), 0.5)
    return Bundle(card, scorer).save(tmp_path / "b")


def verified(directory: Path, *more: object) -> tuple[Result, dict[str, str], dict[str, str]]:
    """The result of the command, and outcomes and texts by check."""
    result = run("verify", directory, "--json", *more)
    checks = json.loads(result.output)["checks"]
    assert [check["name"] for check in checks] == NAMES
    return result, *({check["name"]: check[key] for check in checks} for key in ("outcome", "text"))  # type: ignore[return-value]


def test_a_sound_bundle_passes_and_says_what_was_not_asked_for(directory: Path) -> None:
    result, outcomes, _ = verified(directory)
    assert result.exit_code == 0
    assert {name for name, outcome in outcomes.items() if outcome != "passed"} == {
        "model",
        "monitor",
        "signature",
    }
    assert outcomes["model"] == outcomes["monitor"] == outcomes["signature"] == "skipped"
    lines = run("verify", directory).output.splitlines()
    assert [line.split()[1] for line in lines] == NAMES


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[str, str, Change]] = {
    "a threshold that its logit does not give": (
        "thresholds",
        "logit 1.2 is not P(unsafe) 0.7 by calibration",
        lambda card: card["thresholds"][0].update(probability=0.7),
    ),
    "a lower rate with a lower threshold": (
        "thresholds",
        "0.001 lies below that for a higher rate",
        lambda card: card.update(
            thresholds=[card["thresholds"][0], threshold(0.001, 1.1, 3000)], reference=None
        ),
    ),
    "a rate that its prompts cannot carry": (
        "thresholds",
        "0.001 rests on 2000 benign prompts, and needs 3000",
        lambda card: card.update(
            thresholds=[card["thresholds"][0], threshold(0.001, 2.0, 2000)], reference=None
        ),
    ),
    "a promise that does not follow": (
        "thresholds",
        "a true rate of at most 0.0001 does not follow from 3000 prompts",
        lambda card: card["thresholds"][0].update(upper95=0.0001),
    ),
    "a promise that is beyond its prompts": (
        "thresholds",
        "a true rate of at most 0.5 does not follow",
        lambda card: card["thresholds"][0].update(upper95=0.5),
    ),
    "one rate twice": (
        "thresholds",
        "two thresholds are for one false-positive rate",
        lambda card: card["thresholds"].append(card["thresholds"][1]),
    ),
    "more benign prompts than the files hold": (
        "data",
        "rests on 3000 benign prompts, and the threshold files hold 2999",
        lambda card: card["data"][1].update(benign=2999),
    ),
    "evaluated on what it was fitted on": (
        "data",
        "evaluated on what the bundle was made from: fit.jsonl, test.jsonl",
        lambda card: card["data"][2].update(sha256="2" * 64),
    ),
    "a data file without a digest": (
        "data",
        "fit.jsonl has no SHA-256 digest, but 'latest'",
        lambda card: card["data"][0].update(sha256="latest"),
    ),
    "a negative count": (
        "data",
        "test.jsonl has a negative number",
        lambda card: card["data"][2].update(harmful=-1),
    ),
    "a self-test prompt with another ending": (
        "self-test",
        "prompt 1 does not end as prompts of this model do",
        lambda card: card["self_test"]["prompts"][1].append(9),
    ),
    "a self-test that everything passes": (
        "self-test",
        "a guard that reads nothing would pass",
        lambda card: card["self_test"]["tolerance"].update(float32=1.25),
    ),
    "a self-test that nothing passes": (
        "self-test",
        "the tolerance 0 for float32",
        lambda card: card["self_test"]["tolerance"].update(float32=0.0),
    ),
    "a reference of other prompts": (
        "reference",
        "it holds 2999 benign prompts, and the threshold for 0.01 was set on 3000",
        lambda card: card["reference"].update(benign=[1499, 1000, 490, 10]),
    ),
    "a reference that lies above the thresholds": (
        "reference",
        "40 of its 3000 benign scores lie above the threshold for 0.01",
        lambda card: card["reference"].update(benign=[1500, 1000, 460, 40]),
    ),
    "a unit outside the model": (
        "contents",
        "unit 48 at layer 0, but a mlp site has 48 units",
        lambda card: card["sites"][0].update(units=[1, 48]),
    ),
    "a layer outside the model": (
        "contents",
        "site at layer 3, but the model has 3 layers",
        lambda card: card["sites"][0].update(layer=3),
    ),
    "a probability outside [0, 1]": (
        "contents",
        "less than or equal to 1",
        lambda card: card["thresholds"][0].update(probability=1.5),
    ),
    "a reference with too few bins": (
        "contents",
        "3 edges make 4 bins, harmful has 3",
        lambda card: card["reference"].update(harmful=[1, 1, 1]),
    ),
    "a newer schema": (
        "contents",
        "a newer neuronguard made the bundle",
        lambda card: card.update(schema_version=3),
    ),
    "units that the arrays are not for": (
        "contents",
        "float32[10] a row, expected float32[9]",
        lambda card: card["sites"][0].update(units=[1]),
    ),
    "a card that its text no longer tells": (
        "card",
        "CARD.md is not what guard.json says",
        lambda card: card["created"].update(seed="1"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_card_is_said_by_one_check(directory: Path, case: str) -> None:
    name, words, change = WRONG[case]
    document = json.loads((directory / "guard.json").read_text())
    change(document)
    (directory / "guard.json").write_text(json.dumps(document))
    result, outcomes, texts = verified(directory)
    assert result.exit_code == 1
    # The text for people always tells of another card then; that is a check of its own.
    assert {n for n, outcome in outcomes.items() if outcome == "failed"} - {"card"} == {name} - {"card"}
    assert outcomes[name] == "failed"
    assert words in texts[name]


def test_missing_damaged_and_strange_files_are_said(directory: Path) -> None:
    (directory / "notes.txt").write_text("x")
    _, outcomes, texts = verified(directory)
    assert outcomes["files"] == "failed"
    assert texts["files"] == "not part of a bundle: notes.txt"
    assert outcomes["contents"] == "passed"
    arrays = directory / "guard.safetensors"
    content = arrays.read_bytes()
    arrays.write_bytes(content[:-1])
    result, outcomes, _ = verified(directory)
    assert result.exit_code == 1
    assert outcomes["contents"] == "failed"
    assert set(outcomes.values()) == {"failed", "skipped"}
    arrays.unlink()
    _, outcomes, texts = verified(directory)
    assert texts["files"] == "missing: guard.safetensors"
    shutil.rmtree(directory)
    _, outcomes, texts = verified(directory)
    assert "is not a directory" in texts["files"]


def test_arrays_that_are_not_those_of_the_card_are_said(directory: Path) -> None:
    file = directory / "guard.safetensors"
    save_file({**load_file(file), "probe.extra": np.zeros(1, np.float32)}, file)
    _, outcomes, texts = verified(directory)
    assert outcomes["contents"] == "failed"
    assert "hold probe.extra" in texts["contents"]


def test_another_digest_than_the_one_named_is_said(directory: Path) -> None:
    digest = Bundle.load(directory).digest
    assert verified(directory, "--digest", digest)[1]["digest"] == "passed"
    _, outcomes, texts = verified(directory, "--digest", "0" * 64)
    assert outcomes["digest"] == "failed"
    assert texts["digest"] == f"the digest is {digest}, expected {'0' * 64}"


def test_an_older_bundle_passes_and_is_told_how_to_migrate() -> None:
    shipped = Path(__file__).parents[1] / "data" / "bundle-schema-1"
    _, outcomes, texts = verified(shipped)
    assert outcomes["contents"] == "passed"
    assert "schema version 1, older than 2: neuronguard bundle migrate" in texts["contents"]
    assert outcomes["reference"] == "skipped"


def test_a_text_made_by_another_release_is_not_compared(directory: Path) -> None:
    (directory / "CARD.md").write_text("<!-- neuronguard bundle card, form 0 -->\n")
    assert verified(directory)[1]["card"] == "skipped"
    (directory / "CARD.md").unlink()
    assert verified(directory)[1]["card"] == "skipped"


def test_signatures_are_checked_and_trust_only_when_a_key_is_named(directory: Path, tmp_path: Path) -> None:
    name = make_key(tmp_path / "key")
    make_key(tmp_path / "other")
    assert verified(directory, "--key", tmp_path / "key.pub")[1]["signature"] == "failed"
    sign(directory, load_key(tmp_path / "key"))
    _, outcomes, texts = verified(directory)
    assert outcomes["signature"] == "passed"
    assert texts["signature"] == f"signed by {name}; no trusted key was named (--key)"
    assert verified(directory, "--key", tmp_path / "key.pub")[2]["signature"] == f"signed by {name}"
    _, outcomes, texts = verified(directory, "--key", tmp_path / "other.pub")
    assert outcomes["signature"] == "failed"
    assert "not one of the trusted keys" in texts["signature"]
    (directory / "CARD.md").unlink()
    assert verified(directory)[1]["signature"] == "failed"


def test_a_model_that_cannot_be_opened_fails_its_check(directory: Path, tmp_path: Path) -> None:
    _, outcomes, texts = verified(directory, "--model", tmp_path)
    assert outcomes["model"] == "failed"
    assert "holds no config.json" in texts["model"]
