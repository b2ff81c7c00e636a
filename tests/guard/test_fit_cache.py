"""A fit says what it will cost, keeps what it has read, and goes on where it was stopped."""

from __future__ import annotations

import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import pytest

from guard.bundle import Bundle
from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.cost import parameters
from tests.guard import worlds
from tests.guard.test_cli import fitting, run


def options(planted: worlds.Planted, out: Path, *more: object) -> list[object]:
    # Answers are made, too: "unsafe_output" has harmful prompts answered.
    return fitting(planted, out, "--units", "all", *more)


def test_a_second_fit_loads_no_model_and_gives_the_same_bundle(
    planted: worlds.Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(*options(planted, tmp_path / "a"))
    assert first.exit_code == 0, first.output
    monkeypatch.setattr(Checkpoint, "load_model", lambda *_: pytest.fail("the model was loaded"))
    again = run(*options(planted, tmp_path / "b"))
    assert again.exit_code == 0, again.output
    assert Bundle.load(tmp_path / "a").digest == Bundle.load(tmp_path / "b").digest
    # Another choice among the same units reads nothing but what its self-test scores.
    monkeypatch.undo()
    monkeypatch.setenv("NEURONGUARD_CACHE", str(tmp_path / "cache"))
    planned = run(*fitting(planted, tmp_path / "c", "--units", "l1", "--max-units", 9, "--dry-run"))
    assert "everything is cached: the model is not needed for these prompts" in planned.output


def test_a_dry_run_says_what_a_fit_would_cost(planted: worlds.Planted, tmp_path: Path) -> None:
    more = ("--eval-data", planted.evaluation)
    said = run(*options(planted, tmp_path / "b", "--dry-run", *more)).output
    harmful = sum('"harmful"' in line for line in planted.fit.read_text().splitlines())
    benign = len(planted.threshold.read_text().splitlines())
    assert f"fit: 1000 prompts, {tokens(planted.fit)} tokens, 0 too long; activations of 1000 to read" in said
    assert f"answers of {harmful} to make, 0 cached" in said
    assert f"threshold: {benign} prompts, " in said
    assert f"activations of {benign} to read, 0 cached; answers of 0 to make, 0 cached" in said
    assert "evaluate: 400 prompts, " in said
    assert "answers of 400 to make" in said
    # Three layers of 48 neurons, float32.
    stored = 4 * 144 * (1400 + benign) / 2**20
    assert f"144 activations a prompt: about {stored:.1f} MiB more in the cache" in said
    generated = 4 * (harmful + 400)
    assert re.search(rf"makes at most {generated}: about \d+ s on this cpu", said)
    assert not (tmp_path / "cache").exists()


def tokens(path: Path) -> int:
    from guard.data import load
    from guard.prompts import encode

    return sum(len(encode(worlds.tokenizer(), prompt.chat())) for prompt in load("fit", [path]).prompts)


def test_parameters_are_counted_from_the_files(planted: worlds.Planted) -> None:
    expected = sum(parameter.numel() for parameter in worlds.model().parameters())
    assert parameters(Checkpoint.open(planted.model)) == expected


def slowly(arguments: list[object]) -> None:
    """A fit that pauses after each chunk it keeps, so that it can be stopped between two."""
    keep = Cache.keep_array

    def keep_and_wait(self: Cache, kind: str, key: Any, value: Any) -> None:
        keep(self, kind, key, value)
        time.sleep(30)

    Cache.keep_array = keep_and_wait  # type: ignore[method-assign]
    run(*arguments)


def test_a_killed_fit_goes_on_where_it_stopped(planted: worlds.Planted, tmp_path: Path) -> None:
    wanted = options(planted, tmp_path / "b", "--label", "harmful_prompt")
    # Forked, not started anew: importing everything again would take most of this test's time.
    child = multiprocessing.get_context("fork").Process(target=slowly, args=(wanted,))
    child.start()
    deadline = time.monotonic() + 60
    try:
        while not list((tmp_path / "cache").rglob("*.npy")):
            assert child.is_alive()
            assert time.monotonic() < deadline, "nothing was read in a minute"
            time.sleep(0.01)
    finally:
        child.kill()
        child.join(10)
    assert not (tmp_path / "b").exists()
    left = run(*wanted, "--dry-run").output
    to_read = [int(n) for n in re.findall(r"activations of (\d+) to read", left)]
    assert 0 < sum(to_read) < 1000 + len(planted.threshold.read_text().splitlines())
    finished = run(*wanted)
    assert finished.exit_code == 0, finished.output
    whole = run(*options(planted, tmp_path / "c", "--label", "harmful_prompt", "--no-cache"))
    assert whole.exit_code == 0, whole.output
    assert Bundle.load(tmp_path / "b").digest == Bundle.load(tmp_path / "c").digest


def test_a_model_that_the_engine_would_not_serve_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    made = worlds.model("qwen3")
    made.config.use_sliding_window, made.config.sliding_window = True, 16
    made.config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    model = worlds.checkpoint(tmp_path / "model", made)
    rows = [{"prompt": text, "label": "benign"} for text in worlds.texts(4, seed=0)]
    data = (
        worlds.write_rows(tmp_path / "a.jsonl", rows[:2]),
        worlds.write_rows(tmp_path / "b.jsonl", rows[2:]),
    )
    result = run(
        "fit", "--model", model, "--data", data[0], "--threshold-data", data[1], "--out", tmp_path / "o"
    )
    assert result.exit_code == 1
    assert (
        "the engine would not serve it: this version of the guard does not support: sliding windows in Qwen2 "
        "and Qwen3 models (use_sliding_window)"
    ) in result.output
    assert not (tmp_path / "cache").exists()


def test_engine_options_without_the_engine_are_a_mistake(planted: worlds.Planted, tmp_path: Path) -> None:
    result = run(*options(planted, tmp_path / "b", "--engine-option", "max_model_len=64"))
    assert result.exit_code == 2
    assert "give it with --capture engine" in result.output
    result = run(*options(planted, tmp_path / "b", "--engine-option", "fast"))
    assert "'fast' is not NAME=VALUE" in result.output
