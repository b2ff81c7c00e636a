"""Choosing units with one model alone, where it is known which ones matter."""

from __future__ import annotations

import numpy as np
import pytest

from guard import select
from guard.probe import ProbeError
from guard.select import select_l1, select_stable, selector
from tests.guard.test_probe import world


def noisy(n: int = 500, features: int = 150, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Columns 4, 50 and 120 decide; all others are noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, features)).astype(np.float32)
    return x, x[:, 4] + x[:, 50] - x[:, 120] + random.normal(size=n) * 0.5 > 0


def test_l1_selection_finds_the_features_that_matter() -> None:
    x, positive, _ = world(n=1500, features=60)
    chosen = select_l1(x, positive, 5)
    assert {2, 9} <= set(chosen.tolist())
    assert len(chosen) == 5
    assert list(chosen) == sorted(chosen)
    assert set(select_l1(x, positive, 2).tolist()) == {2, 9}


def test_a_generous_limit_selects_everything() -> None:
    x, positive, _ = world()
    assert select_l1(x, positive, 12).tolist() == list(range(12))


def test_stability_selection_keeps_what_matters_and_leaves_the_noise() -> None:
    x, positive = noisy()
    found = select_stable(x, positive, 60)
    assert {4, 50, 120} <= set(found.columns.tolist())
    # The bound allows 5 % of the 60 asked for; L1 alone fills all of them.
    assert len(found.columns) <= 3 + 3
    assert len(select_l1(x, positive, 60)) == 60
    assert found.frequency[[4, 50, 120]].min() == 1.0


def test_stability_selection_of_noise_keeps_hardly_anything() -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=(600, 400)).astype(np.float32)
    positive = random.random(600) < 0.5
    assert len(select_l1(x, positive, 40)) == 40
    with pytest.raises(ProbeError, match="no unit is kept in 60% of the halves"):
        select_stable(x, positive, 40)


def test_halves_are_disjoint_and_keep_the_share_of_positives() -> None:
    positive = np.arange(1000) < 300
    first, second = select._halves(positive, np.random.default_rng(0))
    assert not set(first.tolist()) & set(second.tolist())
    assert [int(positive[rows].sum()) for rows in (first, second)] == [150, 150]
    assert len(first) == len(second) == 500


def test_columns_beyond_the_screen_are_those_whose_means_differ_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(select, "SCREENED", 10)
    x, positive = noisy()
    assert {4, 50, 120} <= set(select_stable(x, positive, 20).columns.tolist())


@pytest.mark.parametrize("method", ["l1", "stability"])
def test_a_head_is_chosen_whole(method: select.Method) -> None:
    x, positive = noisy(n=400, features=160)
    owner = np.arange(160) // 4
    owner[owner == 30] = 1  # columns 4 and 120 are of head 1, column 50 is of head 12
    chosen = selector(method, 2, owner, 0)(x, positive)
    assert chosen.tolist() == [*range(4, 8), *range(48, 52), *range(120, 124)]


def test_the_same_seed_chooses_the_same_units() -> None:
    x, positive = noisy(n=200, features=121)
    first, again = (select_stable(x, positive, 10, seed=4).columns.tolist() for _ in range(2))
    assert first == again
