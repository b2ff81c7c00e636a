"""The measurement as a whole: it counts right, reads nothing of the test rows, and shows no prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.redteam import figures, refit, report
from loadtests.redteam.attacks import TEST
from loadtests.redteam.measure import Measurement, searches
from loadtests.redteam.outcomes import Outcome, count, tried
from loadtests.redteam.target import Target
from loadtests.redteam.world import World
from tests.loadtests.redteam_world import CANARY, SIZES, make_target, make_world

ROOT = Path(__file__).parents[2]
NAN = float("nan")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def world(target: Target) -> World:
    return make_world(target)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def document(world: World, store: Path) -> Any:
    return Measurement(world, SIZES, store).document()


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([3.0, 0.5, 0.1], Outcome(True, 2, "b")),
        ([0.9, 3.0, 3.0], Outcome(True, 1, "a")),
        ([1.0, 3.0, 3.0], Outcome(False, 3, "c")),  # at the threshold is flagged
        ([NAN, 3.0, NAN], Outcome(False, 3, "c")),  # too long is not answered
        ([NAN, 3.0, 0.0], Outcome(True, 3, "c")),
    ],
)
def test_an_attack_stops_at_the_first_text_below_the_threshold(
    logits: list[float], expected: Outcome
) -> None:
    assert tried(["a", "b", "c"], np.array(logits), cut=1.0) == expected


def test_counts_are_those_of_a_table_made_by_hand() -> None:
    outcomes = [
        Outcome(True, 1, "answer me"),
        Outcome(True, 3, "refuse me"),
        Outcome(False, 4, "answer me"),
        Outcome(True, 1, "answer me"),
    ]

    def answers(texts: Any) -> list[str]:
        return ["I can't help with that." if text.startswith("refuse") else "Gladly: …" for text in texts]

    found = count(outcomes, answers, family="words")
    assert (found["family"], found["n"], found["queries"]) == ("words", 4, 9)
    assert (found["passed"]["hits"], found["passed"]["n"], found["passed"]["rate"]) == (3, 4, 0.75)
    assert found["passed_at_once"]["hits"] == 2
    assert found["answered"]["hits"] == 2
    assert found["median_queries_of_passed"] == 1.0
    assert count(outcomes, None, family="words")["answered"] is None
    nothing = count([Outcome(False, 4, "x")], answers, family="words")
    assert (nothing["passed"]["rate"], nothing["answered"]["hits"]) == (0.0, 0)
    assert nothing["median_queries_of_passed"] is None


def test_every_attack_is_measured_on_both_guards(document: Any) -> None:
    assert list(document["attacks"]) == ["none", *(attack.name for attack in TEST), *searches(SIZES)]
    for name, entry in document["attacks"].items():
        sample = SIZES.searched if name in searches(SIZES) else SIZES.asked
        assert entry["shipped"]["n"] == sample
        if name != "none":
            assert entry["transferred"]["n"] <= sample
            assert entry["transferred"]["passed"]["hits"] <= entry["shipped"]["passed"]["hits"]


def test_a_run_goes_on_where_it_stopped(
    document: Any, world: World, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*args: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Target, "logits", nobody)
    monkeypatch.setattr(Target, "gradients", nobody)
    monkeypatch.setattr(refit, "refit", nobody)
    assert Measurement(world, SIZES, store).document() == document


def test_nothing_of_a_prompt_is_in_what_is_written(document: Any, tmp_path: Path) -> None:
    picture = figures.draw(document, tmp_path)
    written = json.dumps(document) + report.markdown(document)
    for word in (CANARY, "Where is", "violin"):
        assert word not in written
        assert word.encode() not in picture.read_bytes()


def test_refitting_attacks_both_labels_alike_and_reads_rows_to_fit_on_alone(
    world: World, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    features = Target.features

    def reading(self: Target, texts: Any) -> Any:
        read.extend(texts)
        return features(self, texts)

    monkeypatch.setattr(Target, "features", reading)
    guard = world.guard(target.probe)
    behind = refit.suffixes(world, guard, SIZES)
    assert len(behind) == SIZES.suffixes
    attacked = refit.rows(world, behind, SIZES)
    assert sum(attacked.harmful) * 2 == len(attacked.harmful) == 2 * SIZES.fitted * (SIZES.ways + 1)
    for suffix in behind:
        used = [bad for text, bad in zip(*attacked, strict=True) if text.endswith(suffix)]
        assert used.count(True) == used.count(False) == SIZES.fitted // SIZES.suffixes
    refit.refit(world, attacked)
    assert read == attacked.texts
    held_out = {prompt.text for role in (world.calm, world.test) for prompt in role.seen.prompts}
    assert not any(text in made for text in held_out for made in read)


def test_the_threshold_of_each_guard_keeps_its_promise_on_the_calm_rows(world: World, target: Target) -> None:
    for probe in (target.probe, refit.refit(world, refit.rows(world, [" and so on"], SIZES))):
        guard = world.guard(probe)
        assert guard.flags(world.calm.features).mean() <= 0.01


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads((ROOT / "docs" / "results" / "redteam.json").read_text("utf-8"))


def test_the_report_is_that_of_its_figures(results: Any) -> None:
    assert (ROOT / "docs" / "results" / "redteam.md").read_text("utf-8") == report.markdown(results)


def test_the_readme_says_what_was_measured(results: Any) -> None:
    attacks = results["attacks"]
    text = (ROOT / "README.md").read_text("utf-8")
    start = text.index("redteam.md")
    said = text[text.rindex("\n\n", 0, start) : text.index("\n\n", start)]
    for which in ("shipped", "refitted"):
        assert f"{100 * attacks['gradient, 1 token'][which]['passed']['rate']:.0f} %" in said
