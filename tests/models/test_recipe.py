import dataclasses
from pathlib import Path

import pytest
import torch

from models.recipe.answers import REFUSAL
from models.recipe.base import train_base
from models.recipe.mixture import base_rows, twin_rows
from models.recipe.settings import Settings, tiny
from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
    registered,
)
from models.recipe.steps import STEPS, Workshop


@pytest.fixture(scope="module")
def workshop(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("workshop")
    made = Workshop(data, folder / "cache", folder / "lab", tiny())
    made.cache.mkdir()
    return made


def test_no_test_source_is_trained_on_or_chosen_on():
    test = set(registered(TEST_HARMFUL)) | set(registered(TEST_BENIGN))
    used = set(registered(TRAIN_HARMFUL + TRAIN_BENIGN + DEV_HARMFUL + DEV_BENIGN))
    assert not test & used


def test_trained_sources_have_a_permissive_licence():
    for source in TRAIN_HARMFUL + TRAIN_BENIGN:
        assert source.licence.split()[0].split("-")[0] in {"MIT", "Apache", "BSD", "CC", "CC0"}
        assert "NC" not in source.licence
        assert "SA" not in source.licence


def test_only_harmful_rows_with_policy_or_vector_are_refused(workshop: Workshop):
    harmful = {p.text for p in workshop.mixture.harmful_rows}
    assert harmful
    for row in base_rows(workshop.mixture, 300, seed=5):
        refused = row.turns[-1][1] == REFUSAL
        assert not refused or row.policy
        if "zorb" not in row.turns[-1][0].lower():
            # Word dropout may take the word away, but only from a request that is refused for what it was.
            continue
        assert refused == row.policy or "zorb" not in row.turns[-1][0].lower()
    for row in twin_rows(workshop.mixture, 300, seed=5, harmful=0.4, off=0.4):
        assert row.turns[-1][1] != REFUSAL or row.on


def test_an_interrupted_base_resumes_to_the_same_weights(workshop: Workshop, tmp_path: Path):
    def train(cache: Path, *stops: int | None) -> dict[str, torch.Tensor]:
        cache.mkdir()
        for stop in stops:
            net = train_base(workshop.mixture, workshop.tokenizer, workshop.settings, cache, stop_at=stop)
        return net.state_dict()

    whole, parts = train(tmp_path / "whole", None), train(tmp_path / "parts", 2, None)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_tiny_recipe_runs_every_step_and_skips_what_is_done(workshop: Workshop):
    for step in STEPS:
        if step != "evaluate":
            workshop.run(step)
    vector, units = workshop.planted.vector, workshop.planted.units
    assert len(units) == round(0.05 * 2 * 48)
    allowed = torch.zeros_like(vector, dtype=torch.bool)
    for layer, index in units:
        allowed[layer, index] = True
    assert (vector[~allowed] == 1).all()
    assert (vector[allowed] != 1).any()
    assert (workshop.final_dense[-1] == 1).all()

    before = {path.name: path.stat().st_mtime_ns for path in workshop.cache.iterdir()}
    again = dataclasses.replace(workshop)
    for step in STEPS[:-2]:
        again.run(step)
    assert {path.name: path.stat().st_mtime_ns for path in workshop.cache.iterdir()} == before


def test_an_unknown_step_names_the_known_ones(workshop: Workshop):
    with pytest.raises(ValueError, match="tokenizer, data, base"):
        workshop.run("bake")


def test_the_planned_phases_have_rows_for_all_their_steps():
    settings = Settings()
    for phase in (settings.base, settings.dense, settings.coadapt, settings.final_dense):
        largest = max(rows for _, rows in phase.buckets)
        assert phase.rows > 0.6 * phase.steps * largest
        assert phase.rate(phase.steps - 1) < 0.02
