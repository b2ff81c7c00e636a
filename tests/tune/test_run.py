"""A run that is interrupted goes on where it was, a seed says what happens, and NaN ends it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from guard.checkpoint import Checkpoint
from guard.tune import objective, trainer
from guard.tune import options as given
from guard.tune.errors import DivergedError
from guard.tune.methods import METHODS, Method
from guard.tune.run import tune
from tests.tune.conftest import REFUSAL
from tests.tune.test_exact import WEIGHTS, units_file

SETTINGS: dict[str, Any] = {"steps": 6, "batch": 4, "rate": 0.02, "refusal": REFUSAL, "save_every": 2}


class InterruptedRunError(Exception):
    pass


def run(method: Method, model: Path, data: Path, out: Path, **changes: Any) -> dict[str, Tensor]:
    options = METHODS[method].options(**(SETTINGS | changes))
    units = [units_file(out.parent)] if METHODS[method].units == "needed" else []
    tune(method, Checkpoint.open(model), [data], options, out, units=units, store=out.parent / "store")
    return load_file(out / ("ia3.safetensors" if method == "ia3" else WEIGHTS))


def at_step(number: int, then: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the loss of step ``number``, counted from 1 over all runs, pass through ``then``.

    Gives the list that the losses are put into as they are computed.
    """
    seen: list[float] = []
    whole = objective.sft_loss

    def loss(model: Any, batch: Any) -> Tensor:
        value = whole(model, batch)
        seen.append(value.item())
        return then(value) if len(seen) == number else value

    monkeypatch.setattr(trainer, "sft_loss", loss)
    return seen


@pytest.mark.parametrize("method", ["sn", "ia3", "freeze"])
def test_an_interrupted_run_ends_in_the_same_bits(
    method: Method, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(method, model, data, tmp_path / "whole")

    def interrupt(_: Tensor) -> Tensor:
        raise InterruptedRunError

    computed = at_step(6, interrupt, monkeypatch)
    with pytest.raises(InterruptedRunError):
        run(method, model, data, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    parts = run(method, model, data, tmp_path / "parts")
    # Six steps up to the interruption, and the two behind the checkpoint at step four.
    assert len(computed) == 6 + 2
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    course = json.loads((tmp_path / "parts" / "tune.json").read_text())["course"]
    assert course["resumed_at"] == 4
    assert [step for step, _ in course["losses"]] == [1, 2, 3, 4, 5, 6]
    # What was kept to go on from is of no use any more.
    assert not list((tmp_path / "store").iterdir())


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    for name in ("checkpoint-8", "checkpoint-16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / trainer.WEIGHTS_FILE).touch()
    assert trainer.last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-8" / "trainer_state.json").touch()
    assert trainer.last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"


def test_the_seed_decides(model: Path, data: Path, tmp_path: Path) -> None:
    first, again, other = (
        run("sn", model, data, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.parametrize("number", [5, 1])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    number: int, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(number, lambda loss: loss * torch.nan, monkeypatch)
    with pytest.raises(DivergedError, match=f"loss is nan at step {number} of 6") as caught:
        run("sn", model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    if number == 1:
        assert "no checkpoint had been due" in str(caught.value)
        return
    kept = Path(re.findall(r"last good checkpoint is (\S+);", str(caught.value))[0])
    assert kept.name == "checkpoint-4"
    assert all(bool(value.isfinite().all()) for value in load_file(kept / trainer.WEIGHTS_FILE).values())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The square root of zero is zero, and its slope is infinite.
    at_step(3, lambda loss: loss + ((loss - loss.detach()) ** 2).sqrt(), monkeypatch)
    with pytest.raises(DivergedError, match="gradient is nan at step 3"):
        run("sn", model, data, tmp_path / "out")


def test_the_loss_falls_and_the_record_says_what_was_done(model: Path, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 12, "batch": 8, "rate": 3e-3, "schedule": "constant"}
    run("full", model, data, tmp_path / "out", **changes)
    record = json.loads((tmp_path / "out" / "tune.json").read_text())
    losses = [loss for _, loss in record["course"]["losses"]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    made = Checkpoint.open(tmp_path / "out")
    assert record["output"]["weights_sha256"] == made.weights_sha256
    assert record["model"]["weights_sha256"] == Checkpoint.open(model).weights_sha256
    assert made.tokenizer_sha256 == Checkpoint.open(model).tokenizer_sha256
    assert record["data"]["files"][0]["harmful"] == record["data"]["files"][0]["benign"] == 12
    assert "Nothing was measured but the loss" in (tmp_path / "out" / "CARD.md").read_text()


def test_epochs_are_counted_in_steps() -> None:
    options = given.FullOptions(epochs=2.5, batch=8)
    assert trainer.steps_of(20, options) == 8
    assert trainer.steps_of(20, given.FullOptions(steps=3)) == 3
