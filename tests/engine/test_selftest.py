"""The self-test with adapters: the engine opens only when the model has matched under every one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations

import pytest

from guard.bundle import SelfTest
from guard.engine.errors import GuardStartupError
from guard.engine.selftest import Expected, Key, SelfTestRun

PROMPTS = ((1, 2, 3), (4, 5))
MODEL = SelfTest(prompts=PROMPTS, logits={"float32": (1.0, -1.0)}, tolerance={"float32": 0.01})
ADAPTERS = {
    "law": {"float32": Expected((2.0, -2.0), 0.05), "bfloat16": Expected((2.0, -2.0), 0.5)},
    "tales": {"float32": Expected((3.0, -3.0), 0.02), "bfloat16": Expected((3.0, -3.0), 0.5)},
}
EXPECTED: dict[Key, float] = {
    (None, 0): 1.0,
    (None, 1): -1.0,
    ("law", 0): 2.0,
    ("law", 1): -2.0,
    ("tales", 0): 3.0,
    ("tales", 1): -3.0,
}


def run() -> SelfTestRun:
    return SelfTestRun(MODEL, "float32", ADAPTERS)


def keys(test: SelfTestRun) -> Iterator[Key]:
    for adapter in (None, "law", "tales"):
        for prompt in PROMPTS:
            key = test.key(prompt, adapter)
            assert key is not None
            yield key


def test_it_passes_when_the_model_and_every_adapter_have_matched_in_any_order():
    assert list(keys(run())) == list(EXPECTED)
    for order in permutations(EXPECTED):
        test = run()
        for key in order:
            assert not test.passed
            assert test.record(key, EXPECTED[key])
        assert test.passed


@pytest.mark.parametrize("wrong", EXPECTED)
def test_one_prompt_off_under_one_adapter_keeps_it_shut(wrong: Key):
    test = run()
    for key, logit in EXPECTED.items():
        assert test.record(key, logit + (0.06 if key == wrong else 0.0)) == (key != wrong)
    assert not test.passed
    assert test.worst == pytest.approx(0.06)


def test_each_adapter_has_its_own_scores_and_tolerance():
    test = run()
    assert not test.record(("law", 0), EXPECTED[None, 0])  # the model's own score: the adapter has no effect
    assert test.record(("law", 0), 2.04)
    assert not test.record(("tales", 0), 3.04)


def test_score_that_is_no_number_does_not_match():
    test = run()
    for key in EXPECTED:
        assert not test.record(key, math.nan)
    assert not test.passed


def test_a_prompt_counts_once_for_each_adapter():
    test = run()
    for _ in range(6):
        assert test.record((None, 0), 1.0)
    assert not test.passed


@pytest.mark.parametrize(
    ("prompt", "adapter"),
    [((1, 2), None), ((), None), (None, None), ((1, 2, 3), "unlisted"), ((1, 2), "law"), (None, "law")],
)
def test_other_prompts_and_adapters_are_no_part_of_it(prompt: tuple[int, ...] | None, adapter: str | None):
    assert run().key(prompt, adapter) is None


def test_prompt_is_recognised_as_a_list_too():
    assert run().key([4, 5], "tales") == ("tales", 1)


def test_dtype_that_an_adapter_was_not_measured_in_is_named_with_the_adapter():
    both = SelfTest(
        prompts=PROMPTS,
        logits={"float32": (1.0, -1.0), "bfloat16": (1.0, -1.0)},
        tolerance={"float32": 0.01, "bfloat16": 0.1},
    )
    partly = {**ADAPTERS, "tales": {"float32": Expected((3.0, -3.0), 0.02)}}
    with pytest.raises(
        GuardStartupError, match="under the adapter tales for dtype bfloat16; serve with --dtype float32"
    ):
        SelfTestRun(both, "bfloat16", partly)
    assert not SelfTestRun(both, "bfloat16", {"law": ADAPTERS["law"]}).passed


def test_dtype_that_the_model_was_not_measured_in_is_refused_without_naming_an_adapter():
    with pytest.raises(GuardStartupError, match="no self-test scores for dtype bfloat16"):
        SelfTestRun(MODEL, "bfloat16", ADAPTERS)
