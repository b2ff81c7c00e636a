"""Bundles of an older schema version: read as they are, written anew only by name.

``tests/data/bundle-schema-1`` was written by the last release that knew no other version, and stays as it is.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import Bundle, BundleError
from guard.bundle_schema import CURRENT, STEPS, SchemaError, migrated
from tests.guard import worlds
from tests.guard.test_cli import run

OLD = Path(__file__).parents[1] / "data" / "bundle-schema-1"
OLD_DIGEST = "4b327941f514417b6f61da2b5aedbaaa2e3b96532c8daaec3480268f262e4ed2"


def old_card() -> dict[str, Any]:
    card: dict[str, Any] = json.loads((OLD / "guard.json").read_text())
    return card


def test_there_is_a_step_from_every_older_version_to_the_next() -> None:
    assert sorted(STEPS) == list(range(1, CURRENT))
    for version, step in STEPS.items():
        assert step({"schema_version": version})["schema_version"] == version + 1


def test_a_step_changes_nothing_but_what_its_version_brought() -> None:
    before = old_card()
    kept = copy.deepcopy(before)
    after = STEPS[1](before)
    assert before == kept
    assert after == {**before, "schema_version": 2, "reference": None}


def test_a_current_card_is_left_alone() -> None:
    assert migrated(worlds.card()) == worlds.card()


def test_an_old_bundle_is_read_whole_and_keeps_its_digest() -> None:
    loaded = Bundle.load(OLD)
    assert loaded.stored_version == 1
    assert loaded.digest == OLD_DIGEST
    assert loaded.card.schema_version == CURRENT
    assert loaded.card.reference is None
    assert [adapter.name for adapter in loaded.card.adapters] == ["tuned"]
    assert loaded.patches["quiet"].arrays["scale"].tolist() == [0.5, 0.5]
    fresh = worlds.bundle()
    assert loaded.card.model == fresh.card.model
    np.testing.assert_array_equal(loaded.scorer.weight, fresh.scorer.weight)


def test_a_copy_of_an_old_bundle_is_the_same_bundle(tmp_path: Path) -> None:
    copied = Bundle.load(OLD).save(tmp_path / "b")
    assert (copied / "guard.json").read_bytes() == (OLD / "guard.json").read_bytes()
    assert Bundle.load(copied).digest == OLD_DIGEST


def test_migrating_writes_a_bundle_of_its_own_that_names_the_old_one(tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in OLD.iterdir()}
    result = run("bundle", "migrate", OLD, tmp_path / "new")
    assert result.exit_code == 0, result.output
    new = Bundle.load(tmp_path / "new")
    assert f"schema version 1, digest {OLD_DIGEST}" in result.output
    assert f"schema version {CURRENT}, digest {new.digest}" in result.output
    assert new.stored_version == CURRENT
    assert new.digest != OLD_DIGEST
    assert new.card.created["migrated_from"] == OLD_DIGEST
    old = Bundle.load(OLD)
    assert new.card.model_copy(update={"created": old.card.created}) == old.card
    assert (tmp_path / "new" / "guard.safetensors").read_bytes() == before["guard.safetensors"]
    assert {path.name: path.read_bytes() for path in OLD.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_migrating_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("bundle", "migrate", OLD, tmp_path / name).exit_code == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_migrating_never_writes_over_anything(tmp_path: Path) -> None:
    copied = Path(shutil.copytree(OLD, tmp_path / "b"))
    for target in (copied, tmp_path):
        result = run("bundle", "migrate", copied, target)
        assert result.exit_code == 2
        assert "exists; name a directory that does not" in result.output
    assert Bundle.load(copied).digest == OLD_DIGEST


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("guard.bundle.save_file", broken)
    assert run("bundle", "migrate", OLD, tmp_path / "new").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_current_bundle_has_nothing_to_migrate(tmp_path: Path) -> None:
    worlds.bundle().save(tmp_path / "b")
    result = run("bundle", "migrate", tmp_path / "b", tmp_path / "c")
    assert result.exit_code == 1
    assert f"is of schema version {CURRENT} already" in result.output
    assert not (tmp_path / "c").exists()


def test_a_newer_bundle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    worlds.bundle().save(tmp_path / "b")
    card = worlds.card(schema_version=CURRENT + 1, from_the_future=True)
    (tmp_path / "b" / "guard.json").write_text(json.dumps(card))
    with pytest.raises(
        BundleError, match=r"reads versions up to 2: a newer neuronguard made the bundle\. Upg"
    ):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize("version", [None, "1", 0, -1, 1.0, True])
def test_a_card_without_a_version_is_refused(version: Any) -> None:
    with pytest.raises(SchemaError, match="expected a number from 1 to 2"):
        migrated({"schema_version": version})


def test_a_card_that_is_no_object_is_refused(tmp_path: Path) -> None:
    worlds.bundle().save(tmp_path / "b")
    (tmp_path / "b" / "guard.json").write_text("[]")
    with pytest.raises(BundleError, match="expected an object, found list"):
        Bundle.load(tmp_path / "b")


def test_what_version_2_brought_is_no_part_of_a_card_of_version_1(tmp_path: Path) -> None:
    """Or one file could mean two things."""
    copied = Path(shutil.copytree(OLD, tmp_path / "b"))
    reference = {"edges": [0.5], "benign": [1, 1], "harmful": [0, 0]}
    (copied / "guard.json").write_text(json.dumps(old_card() | {"reference": reference}))
    assert Bundle.load(copied).card.reference is None
