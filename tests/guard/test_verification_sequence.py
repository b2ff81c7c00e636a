"""``neuronguard verify`` on limits at which answers are stopped: each thing that can be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import Bundle
from guard.card import GuardCard
from guard.pooling import Pooling
from guard.sequence import SequenceScorer
from guard.stats import clopper_pearson
from guard.verification import verify_bundle
from tests.guard import worlds

POOLING = Pooling(kind="rolling", window=16)


def limit(rate: float, debounce: int, logit: float, answers: int = 3000) -> dict[str, Any]:
    return {
        "false_positive_rate": rate,
        "debounce": debounce,
        "logit": logit,
        "answers": answers,
        "upper95": clopper_pearson(int(rate * answers), answers).high,
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    document = worlds.card(
        probe="sequence",
        pooling=POOLING.model_dump(),
        monitor=[limit(0.01, 1, 2.0), limit(0.01, 4, 1.0), limit(0.001, 1, 3.0), limit(0.001, 4, 2.5)],
    )
    card = GuardCard.model_validate(document)
    row = np.linspace(-1, 1, card.features, dtype=np.float32)[None]
    probe = SequenceScorer(POOLING, row, np.array([0.5], np.float32))
    return Bundle(card, probe).save(tmp_path / "b")


def looked(directory: Path) -> tuple[str, str]:
    (found,) = [check for check in verify_bundle(directory) if check.name == "monitor"]
    return found.outcome, found.text


def test_sound_limits_pass_and_are_counted(directory: Path) -> None:
    assert looked(directory) == ("passed", "4 limits on 3000 benign answers")


Change = Callable[[list[dict[str, Any]]], object]
WRONG: dict[str, tuple[str, Change]] = {
    "too few answers for the rate": (
        "rests on 2000 benign answers, and needs 3000",
        lambda limits: limits[2].update(limit(0.001, 1, 3.0, 2000)),
    ),
    "a bound that is too good": ("does not follow from", lambda limits: limits[0].update(upper95=0.0005)),
    "a bound that is too bad": ("does not follow from", lambda limits: limits[0].update(upper95=0.1)),
    "a limit below one for a higher rate": ("lies below one", lambda limits: limits[2].update(logit=1.9)),
    "a limit below one for more tokens": ("lies below one", lambda limits: limits[0].update(logit=0.9)),
    "a limit twice": ("two limits are for 0.01 and 4", lambda limits: limits.append(limits[1])),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_limit_is_said(directory: Path, case: str) -> None:
    words, change = WRONG[case]
    document = json.loads((directory / "guard.json").read_text())
    change(document["monitor"])
    (directory / "guard.json").write_text(json.dumps(document))
    outcome, text = looked(directory)
    assert outcome == "failed"
    assert words in text
