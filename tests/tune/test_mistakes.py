"""What cannot be tuned is one sentence, before the model is loaded and without a trace on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from guard.checkpoint import Checkpoint
from guard.locate.unit_set import UnitSet
from tests.guard import worlds
from tests.guard.test_cli import run
from tests.locate import unit_sets
from tests.tune.conftest import REFUSAL
from tests.tune.test_exact import units_file

HARMFUL = {"prompt": "one two", "label": "harmful"}
BENIGN = {"prompt": "three four", "label": "benign", "response": "Yes"}


def command(method: str, model: Path, data: Path, out: Path, *more: object) -> Result:
    return run("tune", method, "--model", model, "--data", data, "--out", out, *more)


def refused(result: Result, out: Path, said: str) -> None:
    assert result.exit_code in (1, 2), result.output
    assert said in " ".join(result.output.split()).replace("│ ", "")
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.parametrize(
    ("method", "rows", "options", "said"),
    [
        ("sn", [HARMFUL], ["--units"], "a harmful prompt without 'response'"),
        ("sn", [BENIGN], ["--units"], "no harmful prompt"),
        ("ia3", [HARMFUL], ["--refusal", REFUSAL], "the data hold no benign prompt"),
        ("lora", [BENIGN], [], "the data hold no harmful prompt"),
        ("full", [{**BENIGN, "response": None}], [], "no 'response'; add one, or let the model"),
        ("full", [{**BENIGN, "response": 7}], [], "'response' must be text, found int"),
        ("full", [BENIGN], ["--objective", "dpo"], "no 'rejected' answer, which DPO needs"),
        ("full", [{**BENIGN, "label": None}], [], "the data hold no row"),
        ("full", [{**BENIGN, "prompt": "word " * 60}], [], "no prompt leaves room for an answer in 256"),
        ("full", [BENIGN], ["--rate", "0"], "rate must be a number above 0"),
        ("full", [BENIGN], ["--batch", "6", "--at-once", "4"], "at_once must divide the batch of 6"),
        ("sn", [HARMFUL], ["--refusal", REFUSAL], "sn is about units"),
        ("ia3", [HARMFUL, BENIGN], ["--refusal", REFUSAL, "--foundation"], "name the units as well"),
        ("lora", [HARMFUL, BENIGN], ["--refusal", REFUSAL, "--target", "nose"], "no adapter can be put on"),
    ],
)
def test_data_and_options_that_do_not_do(
    method: str, rows: list[Any], options: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    data = worlds.write_rows(tmp_path / "rows.jsonl", rows)
    if options[-1:] in (["--units"], ["--foundation"]):
        options = [*options, str(units_file(tmp_path))]
    refused(command(method, model, data, tmp_path / "out", *options), tmp_path / "out", said)


@pytest.mark.parametrize(
    ("units", "foundation", "said"),
    [
        ({"1": [48]}, None, "mlp unit 48 of layer 1 does not exist"),
        ({"3": [0]}, None, "layer 3 does not exist"),
        ({"1": [4]}, {"1": [4, 5]}, "foundation.json does not: nothing is left"),
        ([], None, "expected an object"),
    ],
)
def test_units_that_do_not_do(
    units: Any, foundation: Any, said: str, model: Path, data: Path, tmp_path: Path
) -> None:
    more: list[object] = ["--units", units_file(tmp_path, units), "--refusal", REFUSAL]
    if foundation is not None:
        (tmp_path / "foundation.json").write_text(json.dumps(foundation))
        more += ["--foundation", tmp_path / "foundation.json"]
    refused(command("sn", model, data, tmp_path / "out", *more), tmp_path / "out", said)


def located(checkpoint: Checkpoint, folder: Path) -> Path:
    """A set of units as ``locate`` writes it, found on this model."""
    scores = {"mlp": np.random.default_rng(0).random((3, 48))}
    unit_sets.unit_set(scores, count=3, model=checkpoint.card()).save(folder)
    return folder


def test_units_of_another_model_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(worlds.checkpoint(tmp_path / "other", worlds.model(seed=1)))
    units = located(other, tmp_path / "units")
    result = command("sn", model, data, tmp_path / "out", "--units", units, "--refusal", REFUSAL)
    refused(result, tmp_path / "out", "whose weights are not those of 'model'")


def test_a_set_is_of_the_models_that_were_tuned_from_its_own(model: Path, data: Path, tmp_path: Path) -> None:
    units = located(Checkpoint.open(model), tmp_path / "units")
    assert len(UnitSet.load(units)) == 3
    settings = ["--units", units, "--refusal", REFUSAL, "--steps", "2", "--rate", "0.01"]
    for here, there in ((model, "first"), (tmp_path / "first", "second")):
        result = command("sn", here, data, tmp_path / there, *settings)
        assert result.exit_code == 0, result.output
    # A record of other weights is worth nothing.
    record = (tmp_path / "second" / "tune.json").read_text()
    stranger = worlds.checkpoint(tmp_path / "stranger", worlds.model(seed=1))
    (stranger / "tune.json").write_text(record)
    result = command("sn", stranger, data, tmp_path / "third", *settings)
    refused(result, tmp_path / "third", "nor any that it was tuned from")


def test_what_exists_is_not_overwritten(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = command("full", model, data, tmp_path / "out", "--refusal", REFUSAL)
    assert result.exit_code == 1
    assert "exists already" in result.output
    assert not list((tmp_path / "out").iterdir())


def test_the_command_says_what_was_trained(model: Path, data: Path, tmp_path: Path) -> None:
    units = units_file(tmp_path)
    settings = ["--units", units, "--refusal", REFUSAL, "--steps", "2", "--rate", "0.01"]
    result = command("sn", model, data, tmp_path / "out", *settings)
    assert result.exit_code == 0, result.output
    # Three neurons of two slices, a head of two times eight rows and columns and two times eight shared rows.
    trained = 3 * 2 * 32 + 4 * 8 * 32
    assert f"checkpoint; {trained} of " in result.output
    assert "in 2 steps" in result.output


def test_every_option_is_explained() -> None:
    for method in ("budget", "freeze", "full", "ia3", "lora", "rsn", "sn"):
        text = run("tune", method, "--help").output
        assert "Optimiser steps" in text, method
    assert "(IA)³" in run("tune", "--help").output
