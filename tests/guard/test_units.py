from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from guard.bundle import Site
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
