"""What ``fit`` chooses from, and what a bundle says about how it was chosen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import Bundle
from tests.guard import worlds
from tests.guard.test_cli import fitting, run

PLANTED = {(0, 3), (0, 17), (1, 8), (1, 40), (2, 5), (2, 21)}


@pytest.fixture(scope="module", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(autouse=True)
def _shared(_one_cache: Path, _own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same model and prompts in every test: they are read once.
    monkeypatch.setenv("NEURONGUARD_CACHE", str(_one_cache))


def fitted(planted: worlds.Planted, out: Path, *more: object) -> Bundle:
    result = run(*fitting(planted, out, "--label", "harmful_prompt", *more))
    assert result.exit_code == 0, result.output
    return Bundle.load(out)


def chosen(bundle: Bundle) -> set[tuple[int, int]]:
    return {(site.layer, unit) for site in bundle.card.sites for unit in site.units}


def test_stability_selection_finds_the_planted_units_and_few_others(
    planted: worlds.Planted, tmp_path: Path
) -> None:
    bundle = fitted(planted, tmp_path / "b", "--units", "stability", "--max-units", 40)
    assert chosen(bundle) >= PLANTED
    assert len(chosen(bundle)) <= 12
    about = bundle.card.metrics["fit"]["selection"]
    assert about["method"] == "stability"
    assert len(about["share_of_halves"]) == len(chosen(bundle))
    assert min(about["share_of_halves"]) >= 0.6
    assert bundle.card.created["units"] == "stability"


def test_random_units_are_as_many_as_asked_for_and_worse(planted: worlds.Planted, tmp_path: Path) -> None:
    bundle = fitted(planted, tmp_path / "b", "--units", "random", "--max-units", 12, "--seed", 3)
    assert len(chosen(bundle)) == 12
    assert chosen(bundle) != PLANTED
    assert bundle.card.metrics["fit"]["sources_left_out"]["mean_auroc"] < 0.9


def test_heads_are_read_at_the_input_of_o_proj(planted: worlds.Planted, tmp_path: Path) -> None:
    bundle = fitted(planted, tmp_path / "b", "--sites", "both", "--max-units", 30)
    kinds = {site.kind for site in bundle.card.sites}
    assert "mlp" in kinds
    assert chosen(bundle) >= PLANTED
    heads = fitted(planted, tmp_path / "h", "--sites", "attention", "--units", "all")
    assert {(site.kind, site.units) for site in heads.card.sites} == {("attention", (0, 1, 2, 3))}
    assert heads.scorer.features == 3 * 32


def test_layers_are_chosen_by_sources_that_were_left_out(planted: worlds.Planted, tmp_path: Path) -> None:
    bundle = fitted(planted, tmp_path / "b", "--units", "all", "--layers", "choose")
    table = bundle.card.metrics["fit"]["layers"]
    # The labels depend on neurons of all three layers.
    assert table["chosen"] == "all, stacked"
    assert set(table) == {"chosen", "all, stacked", "layer 0", "layer 1", "layer 2"}
    means = {name: entry["mean_partial_auroc"] for name, entry in table.items() if name != "chosen"}
    assert max(means, key=lambda name: means[name]) == "all, stacked"
    left = bundle.card.metrics["fit"]["sources_left_out"]
    assert set(left["by_source"]) == set("abc")
    by_source = {name: entry["partial_auroc"] for name, entry in left["by_source"].items()}
    assert left["mean_partial_auroc"] == pytest.approx(np.mean(list(by_source.values())))
    assert left["worst_partial_auroc"] == min(by_source.values()) == by_source[left["worst_source"]]


def test_named_layers_are_the_only_ones_read(planted: worlds.Planted, tmp_path: Path) -> None:
    bundle = fitted(planted, tmp_path / "b", "--units", "all", "--layers", "0,2")
    assert [site.layer for site in bundle.card.sites] == [0, 2]
    assert bundle.card.created["layers"] == "(0, 2)"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "0,7"], "no units are read in layer 7; there are layers 0, 1, 2"),
        (["--layers", "first"], "neither all, choose, nor layers such as 3,5-7"),
    ],
)
def test_layers_that_are_not_there_are_named(
    planted: worlds.Planted, tmp_path: Path, more: list[object], message: str
) -> None:
    result = run(*fitting(planted, tmp_path / "b", *more))
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert not (tmp_path / "b").exists()


def test_a_plain_fit_records_no_setting_that_it_does_not_use(planted: worlds.Planted, tmp_path: Path) -> None:
    created = fitted(planted, tmp_path / "b", "--units", planted.neurons).card.created
    assert not {"probe", "hidden", "sites", "layers", "calibration"} & created.keys()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hard_negatives_are_fitted_on_and_reported_apart(planted: worlds.Planted, tmp_path: Path) -> None:
    benign = [row for row in rows(planted.fit) if row["label"] == "benign"]
    hard = worlds.write_rows(tmp_path / "hard.jsonl", [{**row, "source": "hard"} for row in benign[:150]])
    plain = fitted(planted, tmp_path / "a", "--units", planted.neurons)
    bundle = fitted(planted, tmp_path / "b", "--units", planted.neurons, "--hard-negatives", hard)
    about = bundle.card.metrics["fit"]
    # They are taken out of the other file: a prompt has one role.
    assert about["prompts"] == plain.card.metrics["fit"]["prompts"] == 1000
    assert about["left_out"]["fit"]["used in another role"] == 150
    assert about["hard_negatives"]["flagged_when_left_out"]["hard"]["n"] == 150
    assert {file.role for file in bundle.card.data} == {"fit", "hard_negative", "threshold"}
    assert "hard_negatives" not in plain.card.metrics["fit"]


def test_harmful_prompts_are_no_hard_negatives(planted: worlds.Planted, tmp_path: Path) -> None:
    hard = worlds.write_rows(
        tmp_path / "hard.jsonl", [{"prompt": "x y z", "label": "harmful", "source": "s"}]
    )
    result = run(*fitting(planted, tmp_path / "b", "--hard-negatives", hard))
    assert result.exit_code == 1
    assert "those of s are labelled harmful" in result.output


def test_strict_data_with_a_problem_stop_a_fit_in_every_role(planted: worlds.Planted, tmp_path: Path) -> None:
    for role in ("fit", "threshold"):
        broken = tmp_path / f"{role}.jsonl"
        broken.write_text(getattr(planted, role).read_text() + "{\n")
        changed = planted._replace(**{role: broken})
        result = run(*fitting(changed, tmp_path / "b", "--strict"))
        assert result.exit_code == 1
        assert f"{role}.jsonl, line {len(rows(getattr(planted, role))) + 1}" in result.output
        assert not (tmp_path / "b").exists()


def test_what_nearly_equals_a_threshold_prompt_is_not_fitted_on(
    planted: worlds.Planted, tmp_path: Path
) -> None:
    threshold = rows(planted.threshold)
    near = [{**row, "prompt": " ".join(reversed(row["prompt"].split())) + "!"} for row in threshold[:30]]
    path = tmp_path / "fit.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(planted.fit) + near)
    bundle = fitted(planted._replace(fit=path), tmp_path / "b", "--units", planted.neurons)
    about = bundle.card.metrics["fit"]
    assert about["prompts"] == 1000
    assert about["left_out"]["fit"]["nearly equal to one in another role"] == 30


def test_each_threshold_has_its_interval_two_ways(planted: worlds.Planted, tmp_path: Path) -> None:
    card = fitted(planted, tmp_path / "b", "--units", planted.neurons).card
    about = card.metrics["fit"]["thresholds"]["0.01"]
    assert about["n"] == card.thresholds[0].benign
    assert about["exact"][1] == card.thresholds[0].upper95
    assert about["exact"][0] <= about["flagged"] / about["n"] <= about["exact"][1]
    low, high = about["over_sources"]
    assert low <= about["flagged"] / about["n"] <= high


def test_isotonic_calibration_decides_like_its_thresholds(planted: worlds.Planted, tmp_path: Path) -> None:
    bundle = fitted(planted, tmp_path / "b", "--units", planted.neurons, "--calibration", "isotonic")
    calibration, threshold = bundle.card.calibration, bundle.card.thresholds[0]
    assert calibration.kind == "isotonic"
    assert calibration.probability(threshold.logit) == threshold.probability
    logits = np.linspace(-20, 20, 4001)
    flagged = [calibration.probability(float(z)) >= threshold.probability for z in logits]
    assert flagged == (logits >= threshold.logit).tolist()
