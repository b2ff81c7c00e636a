"""Gates between recipient and donor: what opening them would add, and rankings made of it."""

from __future__ import annotations

import numpy as np
import pytest

from guard.locate import gates
from guard.locate.change import Text
from guard.locate.decoding import greedy
from guard.locate.errors import LocateError
from guard.locate.sweep import sweep
from guard.locate.twins import Twin, folded_twins
from tests.locate import contrast_toys as toys

PROMPTS = toys.prompts()[:6]
SHAPE = (toys.LAYERS, toys.WIDTH)
CLOSED, OPEN = np.zeros(SHAPE), np.ones(SHAPE)


@pytest.fixture(scope="module", params=[False, True], ids=["sharing weights", "folded"])
def twins(request: pytest.FixtureRequest) -> tuple[Twin, Twin]:
    if request.param:
        base = toys.model()
        return folded_twins(base, toys.fold(base, toys.vector()))
    return toys.twins()


@pytest.fixture(scope="module")
def texts(twins: tuple[Twin, Twin]) -> list[Text]:
    return list(zip(PROMPTS, greedy(twins[1], PROMPTS, new_tokens=5), strict=True))


def test_closed_gates_are_the_recipient_and_open_ones_the_donor(
    twins: tuple[Twin, Twin], texts: list[Text]
) -> None:
    recipient, donor = sweep(*twins, [(), toys.EVERY], texts)
    assert gates.gradient(*twins, texts, CLOSED)[1] == pytest.approx(recipient.mean(), abs=1e-6)
    assert gates.gradient(*twins, texts, OPEN)[1] == pytest.approx(donor.mean(), abs=1e-6)


def test_the_gradient_is_what_opening_a_gate_a_little_adds(
    twins: tuple[Twin, Twin], texts: list[Text]
) -> None:
    at = np.random.default_rng(0).uniform(0, 1, SHAPE)
    slope, _ = gates.gradient(*twins, texts, at)
    for layer, unit in ((1, 3), (2, 9), (3, 7)):
        step = np.zeros(SHAPE)
        step[layer, unit] = 2.0**-5
        ends = [gates.gradient(*twins, texts, at + side * step)[1] for side in (1, -1)]
        assert slope[layer, unit] == pytest.approx((ends[0] - ends[1]) / 2.0**-4, rel=5e-3, abs=1e-4)


def test_where_the_twins_do_not_differ_yet_nothing_is_to_be_added(
    twins: tuple[Twin, Twin], texts: list[Text]
) -> None:
    slope, _ = gates.gradient(*twins, texts, CLOSED)
    first = min(toys.PLANTED)
    assert np.abs(slope[:first]).max() < 1e-6
    planted = np.zeros(toys.WIDTH, dtype=bool)
    planted[toys.PLANTED[first]] = True
    assert np.abs(slope[first, ~planted]).max() < 1e-6 < np.abs(slope[first, planted]).min()


def test_gradients_along_the_path_add_up_to_the_whole_difference(
    twins: tuple[Twin, Twin], texts: list[Text]
) -> None:
    recipient, donor = sweep(*twins, [(), toys.EVERY], texts).mean(1)
    assert gates.path(*twins, texts, steps=24).sum() == pytest.approx(donor - recipient, rel=2e-2)


def test_blocks_are_ranked_by_the_gradient_that_is_left_when_those_before_are_open(
    twins: tuple[Twin, Twin], texts: list[Text]
) -> None:
    candidates = np.ones(SHAPE, dtype=bool)
    candidates[-1] = False
    found = gates.greedy_by_gradient(*twins, texts, candidates, [4, 10])
    assert np.isneginf(found[-1]).all()
    order = np.argsort(-found, axis=None)[:10]
    slope, _ = gates.gradient(*twins, texts, CLOSED)
    assert set(order[:4]) == set(
        np.argsort(-np.where(candidates, slope, -np.inf), axis=None, kind="stable")[:4]
    )
    opened = CLOSED.copy()
    opened.flat[order[:4]] = 1.0
    slope, _ = gates.gradient(*twins, texts, opened)
    left = np.where(candidates & (opened == 0), slope, -np.inf)
    assert set(order[4:]) == set(np.argsort(-left, axis=None, kind="stable")[:6])
    assert len(np.unique(found[candidates])) == candidates.sum()


def test_texts_without_an_answer_are_an_error(twins: tuple[Twin, Twin]) -> None:
    for texts in ([], [((5, 6), ())]):
        with pytest.raises(LocateError, match="none of them empty"):
            gates.gradient(*twins, texts, CLOSED)
