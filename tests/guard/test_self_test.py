from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from guard.bundle import Site
from guard.checkpoint import Checkpoint
from guard.judge import is_refusal
from guard.prompts import ends_with_tail, prompt_tails
from guard.scorer import Scorer
from guard.self_test import MILD_PROMPTS, PROMPTS, Measured, measure
from tests.guard import worlds

UNITS = (Site(layer=0, kind="mlp", units=(1, 2, 3)), Site(layer=2, kind="mlp", units=(0, 40)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    path = worlds.checkpoint(tmp_path_factory.mktemp("m") / "model", worlds.model())
    return measure(Checkpoint.open(path), UNITS, Scorer.linear(np.linspace(-2, 1, 5, dtype=np.float32), 0.1))


def test_the_prompts_end_as_served_prompts_do(measured: Measured) -> None:
    tails = prompt_tails(worlds.tokenizer())
    assert len(measured.self_test.prompts) == PROMPTS >= 8
    assert all(ends_with_tail(prompt, tails) for prompt in measured.self_test.prompts)


def test_scores_spread_over_everything_the_mild_prompts_reach(measured: Measured) -> None:
    logits = np.array(measured.self_test.logits["float32"])
    assert len(set(logits.tolist())) == PROMPTS
    assert logits.std() >= 0.9 * measured.spread


def test_tolerances_are_narrow_in_float32_and_rest_on_what_was_measured_in_bfloat16(
    measured: Measured,
) -> None:
    tolerance = measured.self_test.tolerance
    assert tolerance["float32"] <= 2e-3 * measured.spread
    assert measured.deviation["bfloat16"] > measured.deviation["float16"] > measured.deviation["float32"] == 0
    assert tolerance["bfloat16"] == pytest.approx(3 * measured.deviation["bfloat16"])


def test_mild_prompts_are_different_questions() -> None:
    assert len(set(MILD_PROMPTS)) == len(MILD_PROMPTS) >= 2 * PROMPTS
    assert not any(is_refusal(prompt) for prompt in MILD_PROMPTS)


def test_reading_another_neuron_is_beyond_the_tolerance(measured: Measured, tmp_path: Path) -> None:
    path = worlds.checkpoint(tmp_path / "model", worlds.model())
    wrong = (Site(layer=0, kind="mlp", units=(1, 2, 4)), UNITS[1])
    other = measure(Checkpoint.open(path), wrong, Scorer.linear(np.linspace(-2, 1, 5, dtype=np.float32), 0.1))
    expected = dict(zip(measured.self_test.prompts, measured.self_test.logits["float32"], strict=True))
    found = dict(zip(other.self_test.prompts, other.self_test.logits["float32"], strict=True))
    shared = expected.keys() & found.keys()
    assert shared
    assert max(abs(expected[p] - found[p]) for p in shared) > measured.self_test.tolerance["float32"]
