"""The prompts of the lab model's bundle: who may see what."""

import json
from pathlib import Path

import pytest

from guard.data import load
from models.recipe.bundle_data import THRESHOLD_FILES, write_all
from models.recipe.sources import TEST_BENIGN, TEST_HARMFUL, registered


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle-data")
    write_all(data, out)
    return out


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir()}


def test_each_role_has_its_own_sources(folders: Path):
    roles = [files(folders / role) for role in ("fit", "threshold", "evaluate")]
    assert all(roles)
    assert sum(map(len, roles)) == len(set.union(*roles))
    assert roles[1] == set(THRESHOLD_FILES)


def test_evaluation_holds_the_test_sources_and_nothing_else(folders: Path):
    assert files(folders / "evaluate") == set(registered(TEST_HARMFUL + TEST_BENIGN))


def test_no_prompt_has_two_roles(folders: Path):
    evaluation = load("evaluate", [folders / "evaluate"])
    threshold = load("threshold", [folders / "threshold"], barred=[evaluation])
    fit = load("fit", [folders / "fit"], barred=[evaluation, threshold])
    assert "used in another role" not in {**threshold.dropped, **fit.dropped}


def test_thresholds_rest_on_benign_prompts_alone(folders: Path):
    for path in (folders / "threshold").iterdir():
        assert {json.loads(line)["label"] for line in path.read_text().splitlines()} == {"benign"}


def test_writing_again_replaces_what_was_there(folders: Path, data: Path):
    stale = folders / "fit" / "stale.jsonl"
    stale.write_text("{}")
    before = {path.name: path.read_bytes() for path in (folders / "fit").iterdir() if path != stale}
    write_all(data, folders)
    assert {path.name: path.read_bytes() for path in (folders / "fit").iterdir()} == before
