"""The bundle in `models/lab/bundle` and the model it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard.bundle import Bundle
from guard.checkpoint import Checkpoint
from guard.lab import materialise
from guard.prompts import encode, prompt_tails
from guard.self_test import check
from models.recipe.bundle import SHIPPED, VARIANT
from models.recipe.bundle_data import THRESHOLD_FILES
from models.recipe.sources import TEST_BENIGN, TEST_HARMFUL, registered

ROOT = Path(__file__).parents[2]
LAB = ROOT / "models" / "lab"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(LAB / "bundle")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(materialise(LAB, VARIANT, cache=tmp_path_factory.mktemp("made")), VARIANT)


def test_it_belongs_to_the_shipped_model_and_scores_as_recorded(
    bundle: Bundle, checkpoint: Checkpoint
) -> None:
    assert bundle.card.model == checkpoint.card()
    assert set(check(bundle, checkpoint)) == {"float32", "bfloat16", "float16"}


def test_it_accepts_what_the_template_makes(bundle: Bundle, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.load_tokenizer()
    assert bundle.card.prompt_tails == prompt_tails(tokenizer)
    first = encode(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    assert any(first[-len(tail) :] == tail for tail in bundle.card.prompt_tails)


def test_its_self_test_can_tell_a_wrong_reading(bundle: Bundle) -> None:
    logits = bundle.card.self_test.logits["float32"]
    for dtype, tolerance in bundle.card.self_test.tolerance.items():
        assert tolerance < (max(logits) - min(logits)) / 10, dtype


def test_no_test_source_took_part_in_making_it(bundle: Bundle) -> None:
    roles: dict[str, set[str]] = {}
    for file in bundle.card.data:
        roles.setdefault(file.role, set()).add(file.name.removesuffix(".jsonl"))
    assert roles["evaluate"] == set(registered(TEST_HARMFUL + TEST_BENIGN))
    assert roles["threshold"] == set(THRESHOLD_FILES)
    assert not roles["fit"] & (roles["evaluate"] | roles["threshold"])


def test_it_has_all_operating_points_and_its_label(bundle: Bundle) -> None:
    assert bundle.card.label == SHIPPED
    assert [t.false_positive_rate for t in bundle.card.thresholds] == [0.01, 0.005, 0.001]
    assert bundle.card.default_decision.mode == "enforce"


def test_the_published_figures_are_about_it(bundle: Bundle) -> None:
    figures = json.loads((ROOT / "docs" / "results" / "guard-quality.json").read_text("utf-8"))
    assert figures["bundle"]["digest"] == bundle.digest
    assert figures["evaluation"] == bundle.card.metrics["evaluation"]
