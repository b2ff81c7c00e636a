"""The study of the four methods: which prompts it uses, and that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from guard.locate.causal import ALL, SELECTED, measured
from models.recipe.locate import effects
from models.recipe.locate.prompts import EFFECT, POOLS, draw
from models.recipe.locate.study import Size, Study
from models.recipe.sources import TEST_BENIGN, TEST_HARMFUL, TRAIN_BENIGN, TRAIN_HARMFUL


def test_units_are_located_on_trained_sources_and_checked_on_unseen_ones_all_with_permissive_licences() -> (
    None
):
    trained = {source.file for source in TRAIN_HARMFUL + TRAIN_BENIGN}
    located = {file for pool in POOLS.values() for files in pool for file in files}
    assert located <= trained
    checked = {file for files in EFFECT for file in files}
    assert not checked & trained
    sources = [
        s for s in TEST_HARMFUL + TEST_BENIGN + TRAIN_HARMFUL + TRAIN_BENIGN if s.file in located | checked
    ]
    assert {source.file for source in sources} == located | checked
    assert not [source.name for source in sources if "measured only" in source.licence]
    first, second = POOLS.values()
    assert not {*first.harmful, *first.benign} & {*second.harmful, *second.benign}


def test_a_draw_takes_an_equal_share_of_each_source_and_another_seed_is_another_draw(data: Path) -> None:
    found = draw(data, POOLS["first"], "harmful", 10, 0)
    counts = [sum(p.source.startswith(file) for p in found) for file in POOLS["first"].harmful]
    assert sorted(counts) == [2, 2, 3, 3]
    assert len({p.text for p in found}) == 10
    assert draw(data, POOLS["first"], "harmful", 10, 0) == found
    assert draw(data, POOLS["first"], "harmful", 10, 1) != found
    assert {p.label for p in draw(data, POOLS["second"], "benign", 10, 0)} == {"benign"}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(Study, "checkpoint", lambda _self, name: SimpleNamespace(weights_sha256=name))
    return Study(tmp_path / "data", tmp_path / "lab", tmp_path / "store", Size())


def test_a_part_is_computed_once_for_the_same_models_and_sizes(study: Study) -> None:
    calls: Iterator[int] = iter(range(9))
    assert study.part("a", lambda: next(calls)) == 0
    assert study.part("a", lambda: next(calls)) == 0
    assert study.part("b", lambda: next(calls)) == 1
    other = Study(study.data, study.lab, study.store, Size(effect=7))
    assert other.part("a", lambda: next(calls)) == 2


def test_controls_are_averaged_prompt_by_prompt_and_windows_shown_one_by_one() -> None:
    one, none = np.ones(8), np.zeros(8)
    half = np.array([0.0, 1.0] * 4)
    costs = {
        "recipient": one, "donor": none, SELECTED: none, ALL: none,
        "random 0": one, "random 1": half, "window at 3": half,
    }  # fmt: skip
    sets = {name: 3 for name in costs if name not in ("recipient", "donor")}
    found = effects.summary(measured(costs, sets, ["random 0", "random 1", "window at 3"]))
    values = {name: each["value"] for name, each in found["effects"].items()}
    assert values == {"selected": 1.0, "random": 0.25, "window at 3": 0.5, ALL: 1.0}
    assert found["random, one by one"] == [0.0, 0.5]
    assert found["against random"]["difference"] == 0.75
    assert found["refused"][SELECTED]["rate"] == 1.0
    assert found["prompts"] == 8


def test_an_interval_is_of_the_mean() -> None:
    found = effects.interval(np.arange(100.0))
    assert found["mean"] == 49.5
    assert 42 < found["low"] < 47 < 52 < found["high"] < 57
