from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

import guard.replace
from guard.locate.unit_set import ARRAY_FILE, CARD_FILE, UnitSet, UnitSetError, top
from tests.locate import unit_sets


def saved(path: Path, **changes: Any) -> Path:
    return unit_sets.unit_set(unit_sets.scores("mlp", "attention"), **changes).save(path)


def test_a_saved_set_loads_as_it_was(tmp_path: Path) -> None:
    scores = unit_sets.scores(*unit_sets.UNITS)
    scores["mlp"][2] = np.nan
    made = unit_sets.unit_set(scores, donor=unit_sets.model("twin", "5"), options={"a": (1, 2), "b": None})
    loaded = UnitSet.load(made.save(tmp_path / "u"))
    assert loaded.provenance == made.provenance
    assert loaded.scores.keys() == made.scores.keys()
    for name in scores:
        np.testing.assert_array_equal(loaded.scores[name], made.scores[name])
        np.testing.assert_array_equal(loaded.selected[name], made.selected[name])
    assert list(loaded.ranking()) == list(made.ranking())


def test_the_card_names_the_selected_units_for_people(tmp_path: Path) -> None:
    made = unit_sets.unit_set(unit_sets.scores(), unit_sets.chosen("mlp", (0, 3), (2, 1), (2, 11)))
    document = json.loads((made.save(tmp_path / "u") / CARD_FILE).read_text("utf-8"))
    assert document["selected"] == {"mlp": {"0": [3], "2": [1, 11]}}
    assert document["provenance"]["model"]["weights_sha256"] == "0" * 64
    assert len(made) == 3


def test_a_set_can_be_read_by_everybody(tmp_path: Path) -> None:
    directory = saved(tmp_path / "u")
    assert directory.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o644}


def test_ranking_goes_from_the_highest_score_down_and_leaves_out_what_is_no_candidate() -> None:
    scores = {"mlp": np.full((3, 12), np.nan), "attention": np.full((3, 4), np.nan)}
    scores["mlp"][1, 4], scores["mlp"][0, 7], scores["attention"][2, 3] = 0.5, 0.9, 0.5
    found = [row[:3] for row in unit_sets.unit_set(scores, count=1).ranking()]  # type: ignore[arg-type]
    assert found == [("mlp", 0, 7), ("attention", 2, 3), ("mlp", 1, 4)]


@given(st.integers(1, 48), st.integers(0, 5))
def test_top_and_ranking_go_by_score_and_then_by_component_layer_and_unit(count: int, levels: int) -> None:
    # Few levels make many ties at the edge.
    scores = {name: np.floor(a * levels) for name, a in unit_sets.scores("mlp", "attention").items()}
    units = [
        (name, layer, unit)
        for name in scores
        for layer, row in enumerate(scores[name])
        for unit in range(len(row))
    ]
    expected = sorted(units, key=lambda place: (-scores[place[0]][place[1:]], place))
    selected = top(scores, count=count)
    found = {(name, *place) for name, mask in selected.items() for place in np.argwhere(mask).tolist()}
    assert found == set(expected[:count])
    made = unit_sets.unit_set(scores, selected)
    assert [row[:3] for row in made.ranking()] == expected
    assert made.candidates == len(units)


def test_top_takes_a_fraction_of_the_candidates_not_of_all_units() -> None:
    scores = unit_sets.scores()
    scores["mlp"][0] = np.nan
    assert top(scores, fraction=0.25)["mlp"].sum() == 6
    assert not top(scores, fraction=1.0)["mlp"][0].any()


def test_ties_at_the_edge_go_to_the_first_by_component_layer_and_unit() -> None:
    selected = top({"mlp": np.ones((3, 12)), "attention": np.ones((3, 4))}, count=13)
    assert selected["attention"].all()
    assert np.argwhere(selected["mlp"]).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "either a number of units or a fraction"),
        ({"count": 1, "fraction": 0.5}, "either a number of units or a fraction"),
        ({"count": 0}, "0 units of 36 candidates"),
        ({"count": 37}, "37 units of 36 candidates"),
        ({"fraction": 0.001}, "0 units of 36 candidates"),
        ({"fraction": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"fraction": float("nan")}, "above 0 and at most 1, got nan"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(choice: Any, message: str) -> None:
    with pytest.raises(UnitSetError, match=message):
        top(unit_sets.scores(), **choice)


def _with(array: Any, place: tuple[int, int], value: Any) -> Any:
    array = array.copy()
    array[place] = value
    return array


NONE = np.zeros((3, 12), dtype=np.bool_)
ZEROS = np.zeros((3, 12))


@pytest.mark.parametrize(
    ("scores", "selected", "message"),
    [
        ({}, {}, "at least one"),
        ({"mlp": ZEROS}, {}, "the same components"),
        ({"mlp": ZEROS}, {"attention": NONE}, "the same components"),
        ({"gate": ZEROS}, {"gate": NONE}, "'gate' is no component; there are: mlp, attention"),
        ({"mlp": ZEROS.astype(np.float32)}, {"mlp": NONE}, "expected float64 and bool arrays"),
        ({"mlp": ZEROS}, {"mlp": NONE.astype(np.int8)}, "expected float64 and bool arrays"),
        ({"mlp": ZEROS[0]}, {"mlp": NONE[0]}, r"expected float64 and bool arrays \[layers, units\]"),
        ({"mlp": ZEROS}, {"mlp": NONE[:, :11]}, r"\(3, 12\) scores but \(3, 11\) selected"),
        ({"mlp": ZEROS[:2]}, {"mlp": NONE[:2]}, r"\(2, 12\) scores do not fit the model 'toy'"),
        ({"mlp": ZEROS[:, :8]}, {"mlp": NONE[:, :8]}, r"\(3, 8\) scores do not fit the model"),
        ({"attention": ZEROS}, {"attention": NONE}, r"\(3, 12\) scores do not fit the model"),
        ({"query": ZEROS}, {"query": NONE}, r"\(3, 12\) scores do not fit the model"),
        ({"channel": ZEROS}, {"channel": NONE}, r"\(3, 12\) scores do not fit the model"),
        ({"mlp": _with(ZEROS, (1, 2), np.inf)}, {"mlp": NONE}, "a score is infinite"),
        (
            {"mlp": _with(ZEROS, (1, 2), np.nan)},
            {"mlp": _with(NONE, (1, 2), True)},
            "selected that is no candidate",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(scores: Any, selected: Any, message: str) -> None:
    with pytest.raises(UnitSetError, match=message):
        UnitSet(unit_sets.provenance(), scores, selected)


def test_provenance_takes_known_methods_and_finite_costs_only() -> None:
    for changes in ({"method": "guess"}, {"cost": {"seconds": float("nan")}}, {"author": "x"}):
        with pytest.raises(ValidationError):
            unit_sets.provenance(**changes)


def _truncate(directory: Path) -> None:
    file = directory / ARRAY_FILE
    file.write_bytes(file.read_bytes()[:200])


def _edit(directory: Path, change: Any) -> None:
    document = json.loads((directory / CARD_FILE).read_text("utf-8"))
    (directory / CARD_FILE).write_text(json.dumps(change(document)), "utf-8")


def _rearrange(directory: Path, **arrays: Any) -> None:
    save_file({**load_file(directory / ARRAY_FILE), **arrays}, directory / ARRAY_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / CARD_FILE).unlink(), r"expected units.json and units.safetensors.*No such file"),
        (lambda d: (d / ARRAY_FILE).unlink(), r"expected units.json and units.safetensors.*No such file"),
        (_truncate, "not a readable set of units"),
        (lambda d: (d / CARD_FILE).write_text('{"provenance": {'), "not a readable set of units"),
        (lambda d: (d / CARD_FILE).write_text("[]"), "must be an object with provenance and selected"),
        (
            lambda d: (d / CARD_FILE).write_text('{"0": [1]}'),
            "must be an object with provenance and selected",
        ),
        (lambda d: _edit(d, lambda c: {**c, "provenance": {}}), "validation errors? for Provenance"),
        (lambda d: _edit(d, lambda c: {**c, "selected": {"mlp": {"0": [1]}}}), "select different units"),
        (lambda d: _rearrange(d, notes=np.zeros(1)), "'notes' in units.safetensors is neither"),
        (lambda d: _rearrange(d, **{"scores.gate": np.zeros((3, 12))}), "must name the same components"),
    ],
)
def test_a_damaged_directory_is_refused_and_named(tmp_path: Path, damage: Any, message: str) -> None:
    directory = saved(tmp_path / "u")
    damage(directory)
    with pytest.raises(UnitSetError, match=message) as raised:
        UnitSet.load(directory)
    assert str(directory) in str(raised.value)


def test_card_and_arrays_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", count=5), saved(tmp_path / "other", count=6)
    (one / ARRAY_FILE).replace(other / ARRAY_FILE)
    with pytest.raises(UnitSetError, match="are they of one run"):
        UnitSet.load(other)


def test_saving_replaces_a_set_and_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "u").mkdir()
    saved(tmp_path / "u", count=5)
    saved(tmp_path / "u", count=9)
    assert len(UnitSet.load(tmp_path / "u")) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["u"]


def test_behind_a_link_the_directory_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved(tmp_path / "u"))
    assert saved(tmp_path / "link", count=9) == tmp_path / "link"
    assert len(UnitSet.load(tmp_path / "u")) == 9
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "u"]


@pytest.mark.parametrize("mine", ["thesis.txt", CARD_FILE])
def test_nothing_but_a_set_is_replaced(tmp_path: Path, mine: str) -> None:
    # A units.json written by hand has the same name.
    (tmp_path / mine).write_text("years of work")
    with pytest.raises(UnitSetError, match=f"not a set of units alone .found: {mine}.*choose another"):
        saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [mine]


def test_a_set_with_other_files_beside_it_is_not_replaced(tmp_path: Path) -> None:
    (saved(tmp_path / "u", count=5) / "notes.md").write_text("what I saw")
    with pytest.raises(UnitSetError, match=r"found: notes.md, units.json"):
        saved(tmp_path / "u", count=9)
    assert len(UnitSet.load(tmp_path / "u")) == 5


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "u").write_text("a file")
    with pytest.raises(UnitSetError, match="choose another directory"):
        saved(tmp_path / "u")


def test_a_failed_save_leaves_the_old_set_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "u", count=5)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("guard.locate.unit_set.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path / "u", count=9)
    assert len(UnitSet.load(tmp_path / "u")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["u"]


def test_there_is_a_set_at_every_step_of_replacing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "u")
    if not _exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two directories")

    def watched(act: Any) -> Any:
        def step(*given: Any, **more: Any) -> Any:
            result = act(*given, **more)
            assert directory.exists()
            return result

        return step

    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    monkeypatch.setattr(guard.replace.shutil, "rmtree", watched(guard.replace.shutil.rmtree))
    saved(directory, count=9)
    assert len(UnitSet.load(directory)) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["u"]


def _exchanges(path: Path) -> bool:
    first, second = path / ".first", path / ".second"
    first.mkdir()
    second.mkdir()
    possible = guard.replace._exchange(first, second)
    first.rmdir()
    second.rmdir()
    return possible


@pytest.fixture
def _no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.replace._exchange", lambda first, second: False)


@pytest.mark.usefixtures("_no_exchange")
def test_without_an_exchange_the_old_directory_is_set_aside(tmp_path: Path) -> None:
    saved(tmp_path / "u", count=5)
    saved(tmp_path / "u", count=9)
    assert len(UnitSet.load(tmp_path / "u")) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["u"]


@pytest.mark.usefixtures("_no_exchange")
def test_without_an_exchange_a_failed_rename_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "u", count=5)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == directory and ".old." not in str(self):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        saved(directory, count=9)
    assert len(UnitSet.load(directory)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["u"]
