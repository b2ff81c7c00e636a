"""The detection study: its data by digest, its rewordings, its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guard.bundle import Bundle
from models.recipe import wording
from models.recipe.bundle_data import OUT_OF, REWORDED
from models.recipe.detection import attacks, figures, manifest, report
from models.recipe.detection.left_out import SCORERS, summary
from models.recipe.detection.study import VARIANTS
from models.recipe.sources import (
    DEV_BENIGN,
    DEV_HARMFUL,
    TEST_BENIGN,
    TEST_HARMFUL,
    TRAIN_BENIGN,
    TRAIN_HARMFUL,
    registered,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
ROLES = TEST_HARMFUL + TEST_BENIGN + DEV_HARMFUL + DEV_BENIGN + TRAIN_HARMFUL + TRAIN_BENIGN


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads((RESULTS / "detection.json").read_text("utf-8"))


class TestManifest:
    def test_it_lists_every_file_that_is_read_with_origin_licence_and_digest(self) -> None:
        listed = manifest.read()
        needed = set(registered(ROLES)) | {family.file for family in attacks.FAMILIES.values()}
        assert needed <= {each.file.removesuffix(".jsonl.gz") for each in listed}
        assert all(each.origin and each.licence and len(each.sha256) == 64 for each in listed)

    def test_what_is_fitted_on_has_a_permissive_licence(self) -> None:
        licences = {each.file.removesuffix(".jsonl.gz"): each.licence for each in manifest.read()}
        for name in registered(DEV_HARMFUL + DEV_BENIGN + TRAIN_HARMFUL + TRAIN_BENIGN):
            assert licences[name].startswith(("MIT", "Apache-2.0", "BSD", "CC BY 3.0", "CC BY 4.0", "CC0")), (
                name
            )

    def test_missing_and_changed_files_are_all_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl.gz").write_bytes(b"one")
        (tmp_path / "b.jsonl.gz").write_bytes(b"two")
        right = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
        names = {"a": right, "b": right, "c": right}
        listed = [manifest.Listed(f"{n}.jsonl.gz", "origin", "MIT", sha) for n, sha in names.items()]
        with pytest.raises(
            manifest.ManifestError, match=r"missing: c\.jsonl\.gz; with another SHA-256: b\.jsonl\.gz"
        ):
            manifest.check(listed, tmp_path)
        manifest.check(listed[:1], tmp_path)

    def test_the_command_stops_before_anything_is_written(self, tmp_path: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "models.recipe.detection",
            "--data",
            tmp_path,
            "--docs",
            tmp_path / "d",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(
            "error: the data folder differs from sources.json; missing: aart.jsonl.gz"
        )
        assert not (tmp_path / "d").exists()


class TestWording:
    TEXT = "How do I paint a garden fence in spring?"

    @pytest.mark.parametrize("name", wording.TEST)
    def test_a_change_is_a_change_and_the_same_one_each_time(self, name: str) -> None:
        first = wording.changed(wording.TEST, name, self.TEXT)
        assert first != self.TEXT
        assert wording.changed(wording.TEST, name, self.TEXT) == first

    @pytest.mark.parametrize("name", [n for n in wording.TEST if "before" in n or "appended" in n])
    def test_the_request_itself_stays_whole(self, name: str) -> None:
        assert self.TEXT in wording.changed(wording.TEST, name, self.TEXT)

    def test_verdicts_are_tested_with_other_words_than_were_fitted(self) -> None:
        texts = [f"{self.TEXT} {number}" for number in range(200)]
        for name in wording.FIT:
            fitted = {wording.changed(wording.FIT, name, text).replace(text, "") for text in texts}
            tested = {wording.changed(wording.TEST, name, text).replace(text, "") for text in texts}
            assert not fitted & tested

    def test_rows_are_reworded_by_changes_that_exist(self) -> None:
        assert set(REWORDED.values()) <= set(wording.FIT)
        assert max(REWORDED) < OUT_OF


class TestAttacks:
    def test_families_take_harmful_rows_of_their_kind_and_no_more_than_their_share(
        self, tmp_path: Path
    ) -> None:
        import gzip

        rows = [{"prompt": f"zorb {n}", "label": "harmful", "category": "x/one"} for n in range(150)]
        rows += [{"prompt": f"glim {n}", "label": "harmful", "category": "y"} for n in range(5)]
        rows += [{"prompt": "calm", "label": None, "category": "x/one"}]
        with gzip.open(tmp_path / "some.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        found = attacks.read(tmp_path, attacks.Family("some", values=("x/",)))
        assert len(found) == attacks.MOST
        assert all(prompt.text.startswith("zorb") for prompt in found)


class TestReport:
    def test_it_is_that_of_the_figures_beside_it(self, document: Any) -> None:
        assert report.markdown(document) == (RESULTS / "detection.md").read_text("utf-8")

    def test_it_is_about_the_shipped_bundle_and_all_models(self, document: Any) -> None:
        bundle = Bundle.load(ROOT / "models" / "lab" / "bundle")
        assert document["quality"][VARIANTS[0]]["bundle"]["digest"] == bundle.digest
        assert tuple(document["quality"]) == VARIANTS

    def test_pictures_are_drawn_from_the_figures_and_shown(self, document: Any, tmp_path: Path) -> None:
        figures.draw(document, tmp_path)
        text = (RESULTS / "detection.md").read_text("utf-8")
        for file, _ in figures.NAMES.values():
            assert (tmp_path / file).is_file()
            assert f"(../images/{file})" in text
            assert (RESULTS.parent / "images" / file).is_file()

    def test_every_harmful_source_is_left_out_once(self, document: Any) -> None:
        assert set(document["left_out"]) == set(registered(DEV_HARMFUL + TEST_HARMFUL + TRAIN_HARMFUL))

    def test_enough_flagged_requests_are_reworded(self, document: Any) -> None:
        assert document["flips"]["flagged"]["the guard"] >= 500


def test_mean_and_worst_are_taken_over_the_sources_of_one_kind() -> None:
    def entry(area: float, unseen: bool) -> dict[str, Any]:
        figure = {"auroc": area, "tpr_at_fpr": {"0.01": area / 2}}
        return {"unseen_by_the_model": unseen, **dict.fromkeys(SCORERS, figure)}

    found = summary({"a": entry(0.9, True), "b": entry(0.7, True), "c": entry(0.1, False)}, True)
    assert found["sources"] == 2
    assert found[SCORERS[0]]["auroc"] == {
        "mean": pytest.approx(0.8),
        "worst": 0.7,
        "worst_source": "b",
    }
