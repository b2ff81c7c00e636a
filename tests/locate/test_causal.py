"""Causal effects: 1 where patching reproduces the donor, 0 where it does nothing, with honest intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import ttest_rel

from guard.locate.causal import ALL, SELECTED, Effect, against, causal_effect, measure, refusal_cost
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.prompts import Tokens
from tests.guard import worlds
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts(10)


def test_the_effect_is_the_share_of_the_gap_that_patching_closes() -> None:
    recipient, donor = np.array([4.0, 2.0, 3.0]), np.array([0.0, -1.0, 1.0])
    assert causal_effect(recipient, donor, donor).value == 1.0
    assert causal_effect(recipient, donor, recipient).value == 0.0
    half = causal_effect(recipient, donor, (recipient + donor) / 2, units=7)
    assert (half.value, half.low, half.high) == (0.5, 0.5, 0.5)
    assert (half.units, half.recipient, half.donor, half.patched) == (7, 3.0, 0.0, 1.5)
    # Means first, then the ratio: prompts without a gap count as well.
    assert causal_effect(np.array([1.0, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 2.0])).value == 0.0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        recipient = random.normal(2.0, 1.0, 80)
        gap = random.normal(-3.0, 1.0, 80)
        effect = causal_effect(
            recipient,
            recipient + gap,
            recipient + 0.6 * gap + random.normal(0, 0.5, 80),
            resamples=400,
            seed=seed,
        )
        hits += effect.low <= 0.6 <= effect.high
    assert 0.90 <= hits / 200 <= 0.99


def test_the_bootstrap_is_paired() -> None:
    random = np.random.default_rng(0)
    recipient = random.normal(0.0, 100.0, 50)
    effect = causal_effect(recipient, recipient - 2.0, recipient - 1.0)
    # Unpaired, the spread between prompts would drown the effect.
    assert effect.low == pytest.approx(0.5, abs=1e-9)
    assert effect.high == pytest.approx(0.5, abs=1e-9)


def test_a_gap_that_may_be_nothing_has_no_bounded_interval() -> None:
    effect = causal_effect(np.zeros(6), np.array([1.0, -1.0, 1.0, -1.0, 1.0, 0.0]), np.ones(6))
    assert (effect.low, effect.high) == (-np.inf, np.inf)
    assert effect.document()["low"] is None
    assert effect.document()["value"] == effect.value


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (([1.0, 2.0], [1.0, 2.0], [0.0, 0.0]), "same mean cost"),
        (([1.0, 2.0], [1.0], [0.0, 0.0]), "one for each prompt"),
        (([], [], []), "one for each prompt"),
        (([1.0], [np.nan], [0.0]), "not finite"),
    ],
)
def test_costs_without_an_effect_are_an_error(costs: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(LocateError, match=message):
        causal_effect(*(np.array(cost) for cost in costs))


def test_controls_are_compared_in_pairs() -> None:
    random = np.random.default_rng(0)
    patched, *controls = random.normal(0.0, 1.0, (4, 30))
    found = against(patched, controls)
    expected = ttest_rel(np.mean(controls, axis=0), patched)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference == pytest.approx(np.mean(controls) - patched.mean())
    assert against(patched, [patched]) == (0.0, 1.0)
    assert against(patched, [patched + 1.0]) == (pytest.approx(1.0), pytest.approx(0.0))
    # One prompt says nothing.
    assert against(np.zeros(1), [np.ones(1)]) == (1.0, 1.0)
    with pytest.raises(LocateError, match="at least one control"):
        against(patched, [])


def test_planted_units_carry_the_whole_effect_and_controls_do_not() -> None:
    recipient, donor = toys.twins()
    target = greedy(donor, PROMPTS, new_tokens=8)

    def distance(prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[float]:
        assert list(prompts) == PROMPTS
        return [float(answer != wanted) for answer, wanted in zip(answers, target, strict=True)]

    controls = {
        "random 1": toys.neurons({1: [0, 1, 2], 2: [0, 1, 2]}),
        "random 2": toys.neurons({1: [10, 20, 4], 2: [45, 46, 47]}),
    }
    found = measure(
        recipient, donor, PROMPTS, toys.neurons(toys.PLANTED), controls, distance, new_tokens=8, resamples=200
    )
    assert list(found.effects) == [SELECTED, "random 1", "random 2", ALL]
    assert found.effects[SELECTED] == Effect(1.0, 1.0, 1.0, 6, found.effects[SELECTED].recipient, 0.0, 0.0)
    assert found.effects[ALL].value == 1.0
    assert found.effects[ALL].units == toys.LAYERS * toys.WIDTH
    for name in controls:
        assert found.effects[name].value < 0.5
    assert found.comparison is not None
    assert found.comparison.difference > 0.5
    assert found.comparison.p < 0.01
    assert found.costs["recipient"].shape == (len(PROMPTS),)


def test_without_controls_nothing_is_compared_and_names_are_reserved() -> None:
    recipient, donor = toys.twins()
    target = greedy(donor, PROMPTS[:4], new_tokens=4)
    chosen = toys.neurons(toys.PLANTED)

    def distance(_prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[float]:
        return [float(answer != wanted) for answer, wanted in zip(answers, target, strict=True)]

    found = measure(recipient, donor, PROMPTS[:4], chosen, {}, distance, new_tokens=4, resamples=50)
    assert found.comparison is None
    with pytest.raises(LocateError, match="may not be called 'recipient'"):
        measure(recipient, donor, PROMPTS[:4], chosen, {"recipient": chosen}, distance)


def test_a_refusal_costs_nothing() -> None:
    tokenizer = worlds.tokenizer()
    texts = ["I'm sorry, but I can't help with that.", "A lamp is a light."]
    answers = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert refusal_cost(tokenizer)([(5,), (6,)], answers) == [0.0, 1.0]
