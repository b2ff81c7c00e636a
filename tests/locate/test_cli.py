from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from guard.bundle import Bundle
from guard.checkpoint import Checkpoint
from guard.cli import main
from guard.commands import locate
from guard.locate.neuron2word import neuron2word
from guard.locate.unit_set import UnitSet
from tests.guard import worlds
from tests.locate import fake_method


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.checkpoint(tmp_path_factory.mktemp("models") / "model", worlds.model())


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.checkpoint(tmp_path_factory.mktemp("models") / "twin", worlds.model(seed=1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.Planted:
    return worlds.planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": text, "label": "harmful" if i < 6 else "benign"}
        for i, text in enumerate(worlds.texts(10, seed=3))
    ]
    return worlds.write_rows(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The method ``fake`` of the command line, and what it was given."""
    monkeypatch.setitem(locate.METHODS, "fake", "A method for tests.")
    monkeypatch.setitem(sys.modules, "guard.locate.fake", fake_method)
    fake_method.seen.clear()
    yield fake_method.seen
    fake_method.seen.clear()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def locating(model: Path, twin: Path, data: Path, out: Path, *more: object) -> Result:
    return run("locate", "fake", "--model", model, "--donor", twin, "--data", data, "--out", out, *more)


@pytest.mark.usefixtures("fake")
def test_a_method_writes_a_set_of_units(model: Path, twin: Path, data: Path, tmp_path: Path) -> None:
    result = locating(model, twin, data, tmp_path / "u", "--count", 7, "--parts", "attention", "--seed", 3)
    assert result.exit_code == 0, result.output
    found = UnitSet.load(tmp_path / "u")
    assert len(found) == 7
    assert list(found.scores) == ["attention"]
    assert found.provenance.seed == 3
    assert found.provenance.options["parts"] == ["attention"]
    assert found.provenance.donor is not None
    assert found.provenance.donor.weights_sha256 != found.provenance.model.weights_sha256
    assert [file.name for file in found.provenance.data] == ["prompts.jsonl"]
    assert "7 of 12 units are selected" in result.output


def test_a_method_is_given_what_its_parameters_name(
    fake: list[dict[str, Any]], model: Path, twin: Path, data: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    more = ("--no-normalise", "--side", "right", "--dtype", "bfloat16", "--device", "cpu", "--notes", notes)
    assert locating(model, twin, data, tmp_path / "u", *more).exit_code == 0
    (given,) = fake
    assert (given["dtype"], given["device"], given["seed"], given["progress"]) == ("bfloat16", "cpu", 0, True)
    assert given["options"] == fake_method.FakeOptions(normalise=False, side="right")
    assert (given["checkpoint"].path, given["donor"].path) == (model, twin)
    assert [len(dataset.prompts) for dataset in given["datasets"]] == [10]
    assert given["notes"] == notes
    assert given["cache"].root == tmp_path / "cache"


def test_no_cache_keeps_nothing(
    fake: list[dict[str, Any]], model: Path, twin: Path, data: Path, tmp_path: Path
) -> None:
    assert locating(model, twin, data, tmp_path / "u", "--no-cache").exit_code == 0
    assert fake[0]["cache"].root is None


def test_a_limit_takes_the_first_prompts_of_each_label_and_is_recorded(
    fake: list[dict[str, Any]], model: Path, twin: Path, data: Path, tmp_path: Path
) -> None:
    result = locating(model, twin, data, tmp_path / "u", "--limit", 3)
    assert result.exit_code == 0, result.output
    texts = worlds.texts(10, seed=3)
    (dataset,) = fake[0]["datasets"]
    assert [prompt.text for prompt in dataset.prompts] == [*texts[:3], *texts[6:9]]
    assert "4 beyond the limit" in result.output
    assert UnitSet.load(tmp_path / "u").provenance.options["limit"] == 3


@pytest.mark.usefixtures("fake")
def test_help_shows_the_options_of_the_method_with_their_defaults() -> None:
    text = " ".join(run("locate", "fake", "-h").output.split())
    assert "--fraction FLOAT Share of the candidates to select, by 'score'. [default: 0.1]" in text
    assert "--side [left|right] Which end. [default: left]" in text
    assert "--normalise / --no-normalise" in text
    assert "--donor" in text
    assert "--dtype [float32|bfloat16|float16|float64] [default: float32]" in text
    assert "--notes PATH Write the method's notes to this file." in text
    # It has no parameter for it.
    assert "--batch-tokens" not in text


def test_an_option_that_a_method_gains_needs_no_other_change(
    fake: list[dict[str, Any]],
    model: Path,
    twin: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True)
    class More(fake_method.FakeOptions):
        depth: int = 2
        limit: int = 4

    monkeypatch.setattr(fake_method, "FakeOptions", More)
    result = locating(model, twin, data, tmp_path / "u", "--depth", 5, "--limit", 9)
    assert result.exit_code == 0, result.output
    assert fake[0]["options"] == More(depth=5, limit=9)
    # The method's own limit is left to the method.
    assert len(fake[0]["datasets"][0].prompts) == 10


def test_a_method_of_one_model_takes_no_donor_and_a_single_data_set(
    fake: list[dict[str, Any]], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = fake_method.run

    def one(checkpoint: Any, dataset: Any, options: Any, *, batch_tokens: int = 1) -> UnitSet:
        assert batch_tokens == 77
        return two(checkpoint, checkpoint, (dataset,), options)

    monkeypatch.setattr(fake_method, "run", one)
    rest = ("--model", model, "--data", data, "--out", tmp_path / "u", "--batch-tokens", 77)
    assert run("locate", "fake", *rest).exit_code == 0
    assert len(fake) == 1
    refused = run("locate", "fake", *rest, "--donor", model)
    assert refused.exit_code == 2
    assert "No such option" in refused.output
    assert "--donor" in refused.output


@pytest.mark.usefixtures("fake")
def test_two_models_are_asked_for_where_two_are_needed(model: Path, data: Path, tmp_path: Path) -> None:
    result = run("locate", "fake", "--model", model, "--data", data, "--out", tmp_path / "u")
    assert result.exit_code == 2
    assert "name the aligned twin with --donor" in result.output


def test_mistakes_are_one_sentence_before_anything_runs(
    fake: list[dict[str, Any]], model: Path, twin: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out, more, message in (
        ("u", ("--fraction", 2), "fraction is 2.0; expected above 0 and at most 1"),
        ("u", ("--data", tmp_path / "none.jsonl"), "there is no data file"),
        ("u", ("--model", tmp_path / "none"), "there is no model directory"),
        ("mine", (), "not a set of units alone (found: thesis.txt); choose another directory"),
    ):
        result = locating(model, twin, data, tmp_path / out, *more)
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
    assert fake == []
    assert not (tmp_path / "u").exists()


def test_a_method_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(locate.METHODS, "absent", "Not there.")
    result = run("locate", "absent", "--help")
    assert result.exit_code == 1
    assert "this installation lacks the method 'absent': there is no guard.locate.absent" in result.output


def test_a_package_that_a_method_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(locate.METHODS, "fake", "A method for tests.")

    def lacking(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(locate, "import_module", lacking)
    result = run("locate", "fake", "--help")
    assert result.exit_code == 1
    assert "needs the package torch; install neuronguard[fit]" in result.output


def test_the_list_of_methods_imports_none_of_them() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from guard.cli import main\n"
        "result = CliRunner().invoke(main, ['locate', '--help']); assert result.exit_code == 0\n"
        "assert all(name in result.output for name in ('capacity', 'contrast', 'heads', 'importance'))\n"
        "loaded = {name for name in sys.modules if name.partition('.')[0] in ('torch', 'numpy')}\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("method", sorted(locate.METHODS))
def test_every_method_runs_from_the_command_line(
    method: str, model: Path, data: Path, tmp_path: Path
) -> None:
    shown = run("locate", method, "--help")
    assert shown.exit_code == 0, shown.output
    made = worlds.model()
    with torch.no_grad():
        # A twin that differs in how strongly some neurons are read.
        made.model.layers[0].mlp.down_proj.weight[:, :5] *= 3
    twin = worlds.checkpoint(tmp_path / "twin", made)
    more = ["--donor", twin] if "--donor" in shown.output else []
    if "--new-tokens" in shown.output:
        # The toy's context is short.
        more += ["--new-tokens", 8]
    result = run("locate", method, "--model", model, "--data", data, "--out", tmp_path / "u", *more)
    assert result.exit_code == 0, result.output
    found = UnitSet.load(tmp_path / "u")
    assert found.provenance.method == method
    assert found.candidates
    assert f"{len(found)} of {found.candidates} units are selected" in result.output


@pytest.fixture
def two(fake: object, model: Path, twin: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    for seed in (1, 2):
        out = tmp_path / f"seed-{seed}" / "units"
        assert locating(model, twin, data, out, "--fraction", 0.2, "--seed", seed).exit_code == 0
    return tmp_path / "seed-1" / "units", tmp_path / "seed-2" / "units"


def test_units_are_shown_and_reported(two: tuple[Path, Path], tmp_path: Path) -> None:
    shown = run("units", "show", two[0])
    assert "# Units located by `contrast`" in shown.output
    written = run("units", "show", two[0], "--report", tmp_path / "r")
    assert written.exit_code == 0, written.output
    assert (tmp_path / "r" / "report.md").read_text("utf-8").startswith(shown.output)
    assert f"wrote {tmp_path / 'r' / 'scores.png'}" in written.output


def test_sets_are_compared_under_names_that_tell_them_apart(two: tuple[Path, Path], tmp_path: Path) -> None:
    shown = run("units", "compare", *two)
    assert "| seed-1/units / seed-2/units | seed |" in shown.output
    written = run("units", "compare", *two, "--json", tmp_path / "c.json", "--report", tmp_path / "r")
    assert written.exit_code == 0, written.output
    (entry,) = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert entry["sets"] == ["seed-1/units", "seed-2/units"]
    assert (tmp_path / "r" / "overlap.png").is_file()


def test_one_set_or_one_set_twice_cannot_be_compared(two: tuple[Path, Path]) -> None:
    assert "name two sets of units or more" in run("units", "compare", two[0]).output
    assert "a set of units is named twice" in run("units", "compare", two[0], two[0]).output


def test_pictures_without_matplotlib_are_one_sentence(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "guard.locate.pictures", raising=False)
    monkeypatch.delattr("guard.locate.pictures", raising=False)
    result = run("units", "show", two[0], "--report", tmp_path / "r")
    assert result.exit_code == 1
    assert "needs the package matplotlib; install neuronguard[fit]" in result.output
    assert run("units", "show", two[0]).exit_code == 0


def test_controls_are_written_as_sets(two: tuple[Path, Path], tmp_path: Path) -> None:
    found = UnitSet.load(two[0])
    for name, more in (("random", ("--seed", 5, "--disjoint")), ("window", ("--window", len(found)))):
        result = run("units", "control", two[0], "--out", tmp_path / name, *more)
        assert result.exit_code == 0, result.output
        control = UnitSet.load(tmp_path / name)
        assert control.provenance.method == name
        assert len(control) == len(found)
        assert not (control.selected["mlp"] & found.selected["mlp"]).any()
    refused = run("units", "control", two[0], "--out", tmp_path / "x", "--window", 1, "--disjoint")
    assert "leave out --window" in refused.output


def test_the_best_neurons_are_read_as_words(two: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    result = run("units", "words", two[0], "--model", model, "--count", 2, "--top", 3)
    assert result.exit_code == 0, result.output
    best = next(UnitSet.load(two[0]).ranking())
    first, active, below, second, *_ = result.output.splitlines()
    assert first == f"layer {best.layer}, neuron {best.unit}"
    loaded, tokenizer = Checkpoint.open(model).load_model(), worlds.tokenizer()
    (expected,) = neuron2word(loaded, [(best.layer, best.unit)], top=3)
    for line, sign, tokens in zip((active, below), "+-", expected.decoded(tokenizer), strict=True):
        assert line == f"  {sign} " + " ".join(map(repr, tokens))
    assert second.startswith("layer ")


def test_heads_have_no_words(fake: object, model: Path, twin: Path, data: Path, tmp_path: Path) -> None:
    assert locating(model, twin, data, tmp_path / "u", "--parts", "attention").exit_code == 0
    result = run("units", "words", tmp_path / "u", "--model", model)
    assert result.exit_code == 1
    assert "ranks no MLP neuron" in result.output


def test_a_damaged_set_is_one_sentence(two: tuple[Path, Path]) -> None:
    (two[0] / "units.safetensors").unlink()
    result = run("units", "show", two[0])
    assert result.exit_code == 1
    assert "is not a readable set of units" in result.output
    assert "Traceback" not in result.output


def test_a_probe_is_fitted_on_located_units(
    fake: object, world: worlds.Planted, twin: Path, tmp_path: Path
) -> None:
    located = locating(world.model, twin, world.fit, tmp_path / "u", "--parts", "mlp", "--parts", "attention")
    assert located.exit_code == 0, located.output
    found = UnitSet.load(tmp_path / "u").units()
    arguments = (
        "fit", "--data", world.fit, "--threshold-data", world.threshold, "--label", "harmful_prompt",
        "--judged-tokens", 4, "--rate", 0.01, "--units", tmp_path / "u", "--out", tmp_path / "b",
    )  # fmt: skip
    result = run(*arguments, "--model", world.model)
    assert result.exit_code == 0, result.output
    sites = Bundle.load(tmp_path / "b").card.sites
    for kind in ("mlp", "attention"):
        assert {s.layer: list(s.units) for s in sites if s.kind == kind} == found[kind]  # type: ignore[index]
    # The twin took part in the comparison; a third model did not.
    third = worlds.checkpoint(tmp_path / "third", worlds.model(seed=2))
    refused = run(*arguments, "--model", third)
    assert refused.exit_code == 1
    assert "whose weights are not this model's" in refused.output
    # What chose the units cannot set thresholds or evaluate either, then or later.
    assert ("fit.jsonl", "fit") in {(file.name, file.role) for file in Bundle.load(tmp_path / "b").card.data}
    chosen = locating(world.model, twin, world.threshold, tmp_path / "t")
    assert chosen.exit_code == 0, chosen.output
    refused = run(*arguments, "--model", world.model, "--units", tmp_path / "t")
    assert refused.exit_code == 1
    assert "threshold.jsonl was used to locate the units of t and cannot be threshold data" in refused.output


def test_data_that_chose_the_units_cannot_evaluate_the_bundle(
    fake: object, world: worlds.Planted, twin: Path, tmp_path: Path
) -> None:
    assert locating(world.model, twin, world.evaluation, tmp_path / "u").exit_code == 0
    fitted = run(
        "fit", "--data", world.fit, "--threshold-data", world.threshold, "--label", "harmful_prompt",
        "--judged-tokens", 4, "--rate", 0.01, "--units", tmp_path / "u", "--out", tmp_path / "b",
        "--model", world.model,
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    result = run(
        "evaluate", "--model", world.model, "--bundle", tmp_path / "b", "--eval-data", world.evaluation
    )
    assert result.exit_code == 1
    assert "evaluation.jsonl was used to fit this bundle" in result.output
