"""The card for people is made of the card for machines, so the two cannot disagree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from guard.bundle import AdapterCard, Bundle
from guard.bundle_card import FORM, bundle_card
from guard.patch import stored
from guard.patch_card import PatchSite
from tests.guard import worlds
from tests.guard.test_cli import fitting, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fitted(planted: worlds.Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURONGUARD_CACHE", str(folder / "cache"))
        units = ("--units", planted.neurons, "--eval-data", planted.evaluation, "--label", "harmful_prompt")
        result = run(*fitting(planted, folder / "b", *units, "--apart", "g"))
    assert result.exit_code == 0, result.output
    return folder / "b"


def test_fit_writes_the_card_and_it_is_what_its_numbers_give(fitted: Path) -> None:
    bundle = Bundle.load(fitted)
    assert {path.name for path in fitted.iterdir()} == {"guard.json", "guard.safetensors", "CARD.md"}
    assert (fitted / "CARD.md").read_text("utf-8") == bundle_card(bundle.card, bundle.digest)
    assert run("bundle", "card", fitted).output == (fitted / "CARD.md").read_text("utf-8")


def test_it_is_no_part_of_the_digest(fitted: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(fitted)
    copied = bundle.save(tmp_path / "b")
    (copied / "CARD.md").write_text("nothing")
    assert Bundle.load(copied).digest == bundle.digest


def test_every_number_that_a_reader_needs_is_in_it(fitted: Path) -> None:
    bundle, text = Bundle.load(fitted), (fitted / "CARD.md").read_text("utf-8")
    card = bundle.card
    assert text.startswith(FORM)
    for word in (bundle.digest, card.model.weights_sha256, card.model.tokenizer_sha256, card.model.name):
        assert word in text
    for site in card.sites:
        assert f"| layer {site.layer}, neurons | {len(site.units)} | 48 |" in text
    for threshold in card.thresholds:
        assert f"| {threshold.probability:.6f} | {threshold.logit:.4f} | {threshold.benign} |" in text
    for file in card.data:
        assert f"| {file.name} | {file.role} | {file.harmful} | {file.benign} | {file.sha256[:12]} |" in text
    area = card.metrics["evaluation"]["all_harmful"]
    low, high = area["auroc_interval"]
    assert f"{area['auroc']:.3f} [{low:.3f}–{high:.3f}]" in text
    assert card.reference is not None
    for benign, harmful in zip(card.reference.benign, card.reference.harmful, strict=True):
        assert re.search(rf"\| [\d.e-]+ to [\d.e-]+ \| {benign} \| {harmful} \|", text)
    over = card.metrics["fit"]["thresholds"]["0.01"]["over_sources"]
    assert over is not None
    assert "true rate at most (95 %)" in text
    assert "worst on" in text


def test_it_quotes_no_prompt(fitted: Path, planted: worlds.Planted) -> None:
    text = (fitted / "CARD.md").read_text("utf-8")
    for file in (planted.fit, planted.threshold, planted.evaluation):
        assert not any(json.loads(line)["prompt"] in text for line in file.read_text().splitlines())


def test_patches_and_adapters_are_listed_and_it_follows_them(tmp_path: Path) -> None:
    bundle = worlds.bundle().with_adapter(AdapterCard.model_validate(worlds.ADAPTER))
    sites = [PatchSite(layer=1, kind="mlp", units=(2, 9))]
    bundle = bundle.with_patch(
        stored("quiet", sites, bundle.card.model.shape, scale=0.5, made={"by": "hand"})
    )
    text = (bundle.save(tmp_path / "b") / "CARD.md").read_text("utf-8")
    assert "| quiet | stored | 2 | 1 | by hand |" in text
    assert "| tuned | 4 |" in text
    assert bundle.digest in text


def test_what_was_not_measured_is_said() -> None:
    bundle = worlds.bundle()
    text = bundle_card(bundle.card, bundle.digest)
    assert "Not measured: no evaluation data were given" in text
    assert "Not kept: drift of live scores cannot be told" in text


def test_the_command_writes_it_to_a_file(tmp_path: Path) -> None:
    directory = worlds.bundle().save(tmp_path / "b")
    result = run("bundle", "card", directory, "--out", tmp_path / "MODEL_CARD.md")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "MODEL_CARD.md").read_bytes() == (directory / "CARD.md").read_bytes()


def test_the_shipped_card_is_what_its_numbers_give() -> None:
    shipped = ROOT / "models" / "lab" / "bundle"
    bundle = Bundle.load(shipped)
    if bundle.stored_version > 1:  # version 1 knew no card for people
        assert (shipped / "CARD.md").read_text("utf-8") == bundle_card(bundle.card, bundle.digest)
