from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import Site
from guard.locate.unit_set import Component, UnitSet
from guard.sites import ModelShape
from guard.units import (
    UnitsError,
    columns_within,
    count,
    every_neuron,
    from_columns,
    random_like,
    read_units,
    union,
)
from tests.locate import unit_sets

SHAPE = ModelShape("LlamaForCausalLM", layers=3, mlp_width=10, heads=4, head_dim=2)


def site(layer: int, *units: int, kind: str = "mlp") -> Site:
    return Site.model_validate({"layer": layer, "kind": kind, "units": units})


def test_a_plain_file_names_neurons(tmp_path: Path) -> None:
    file = tmp_path / "u.json"
    file.write_text('{"2": [7, 1, 7], "0": [3]}')
    assert read_units(file, SHAPE) == (site(0, 3), site(2, 1, 7))


def test_a_ranking_names_pairs(tmp_path: Path) -> None:
    file = tmp_path / "u.json"
    file.write_text('{"site": "mlp", "units": [[2, 7], [0, 3], [2, 1]]}')
    assert read_units(file, SHAPE) == (site(0, 3), site(2, 1, 7))


def test_heads_come_under_their_own_key_and_after_neurons(tmp_path: Path) -> None:
    file = tmp_path / "u.json"
    file.write_text('{"attention": {"1": [3]}, "mlp": {"1": [2], "2": [0]}}')
    assert read_units(file, SHAPE) == (site(1, 2), site(1, 3, kind="attention"), site(2, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "expected an object"),
        ("{}", "expected an object"),
        ('{"0": 3}', "layer '0' must name a list"),
        ('{"x": [1]}', "layer 'x' must name a list"),
        ('{"0": []}', "layer '0' must name a list"),
        ('{"0": [-1]}', "layer '0' must name a list"),
        ('{"3": [1]}', "does not exist; the model has 3 layers"),
        ('{"0": [10]}', "mlp unit 10 of layer 0 does not exist"),
        ('{"attention": {"0": [4]}}', "attention unit 4"),
        ('{"mlp": {}}', "names no unit"),
        ('{"units": [[1]]}', "list of .layer, neuron. pairs"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "u.json"
    file.write_text(text)
    with pytest.raises(UnitsError, match=message):
        read_units(file, SHAPE)


def test_random_controls_keep_layers_kinds_and_counts() -> None:
    units = (site(0, 1, 2, 3), site(1, 0, kind="attention"), site(2, 4, 5))
    drawn = random_like(units, SHAPE, seed=1)
    assert [(s.layer, s.kind, len(s.units)) for s in drawn] == [
        (0, "mlp", 3),
        (1, "attention", 1),
        (2, "mlp", 2),
    ]
    assert drawn == random_like(units, SHAPE, seed=1)
    assert any(drawn != random_like(units, SHAPE, seed=seed) for seed in range(2, 6))


def test_a_part_is_found_in_the_whole_by_column() -> None:
    part = (site(0, 3), site(1, 1, 2, kind="attention"), site(2, 9))
    whole = union([part, (site(0, 1), site(1, 0, kind="attention"), site(2, 0))])
    features = np.arange(sum(len(SHAPE.columns(s.kind, s.units)) for s in whole))
    # whole: layer 0 neurons 1, 3; layer 1 heads 0, 1, 2 (two columns each); layer 2 neurons 0, 9.
    assert features[columns_within(part, whole, SHAPE)].tolist() == [1, 4, 5, 6, 7, 9]
    with pytest.raises(KeyError):
        columns_within((site(0, 2),), whole, SHAPE)


def test_columns_lead_back_to_their_units() -> None:
    whole = every_neuron(SHAPE)
    units = (site(0, 3, 7), site(2, 0, 9))
    assert from_columns(columns_within(units, whole, SHAPE), whole, SHAPE) == units
    assert count(units) == 4
    heads = (site(1, 0, 2, kind="attention"),)
    assert from_columns(np.array([3]), heads, SHAPE) == (site(1, 2, kind="attention"),)


def located(tmp_path: Path, *components: Component, count: int = 5, **changes: Any) -> tuple[Path, UnitSet]:
    found = unit_sets.unit_set(unit_sets.scores(*components), count=count, **changes)
    return found.save(tmp_path / "located"), found


LOCATED = ModelShape(
    "LlamaForCausalLM", unit_sets.LAYERS, unit_sets.NEURONS, unit_sets.HEADS, unit_sets.HEAD_DIM
)


def test_a_located_set_names_the_units_it_selects(tmp_path: Path) -> None:
    directory, found = located(tmp_path, "mlp", "attention", count=9)
    units = read_units(directory, LOCATED)
    for kind, layers in found.units().items():
        assert {s.layer: list(s.units) for s in units if s.kind == kind} == layers
    assert count(units) == 9
    assert read_units(directory / "units.json", LOCATED) == units


def test_a_component_that_selects_nothing_does_not_matter(tmp_path: Path) -> None:
    scores = unit_sets.scores("mlp", "query")
    scores["query"] -= 10
    unit_sets.unit_set(scores, count=5).save(tmp_path / "u")
    assert {site.kind for site in read_units(tmp_path / "u", LOCATED)} == {"mlp"}


def test_rows_of_projections_and_channels_cannot_be_read_by_a_probe(tmp_path: Path) -> None:
    directory, _ = located(tmp_path, "mlp", "query", "value", count=40)
    with pytest.raises(UnitsError, match="selects units of query, value, which a probe cannot read"):
        read_units(directory, LOCATED)


def test_a_located_set_that_selects_nothing_is_refused(tmp_path: Path) -> None:
    unit_sets.unit_set(unit_sets.scores(), unit_sets.chosen("mlp")).save(tmp_path / "u")
    with pytest.raises(UnitsError, match="selects no unit"):
        read_units(tmp_path / "u", LOCATED)


def test_a_located_set_belongs_to_its_model_and_to_the_twin(tmp_path: Path) -> None:
    directory, _ = located(tmp_path, donor=unit_sets.model("aligned", "8"))
    for weights in ("0" * 64, "8" * 64):
        assert count(read_units(directory, LOCATED, weights_sha256=weights)) == 5
    with pytest.raises(UnitsError, match="found on 'toy' and 'aligned', whose weights are not this model's"):
        read_units(directory, LOCATED, weights_sha256="9" * 64)


def test_half_a_located_set_and_an_empty_directory_are_refused(tmp_path: Path) -> None:
    directory, _ = located(tmp_path)
    (directory / "units.safetensors").unlink()
    for path in (directory, directory / "units.json"):
        with pytest.raises(UnitsError, match="not a readable set of units"):
            read_units(path, LOCATED)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnitsError, match=r"cannot read the units file .*empty/units.json"):
        read_units(tmp_path / "empty", LOCATED)
